// What the low-latency dispatches have in common.
#pragma once

#include <algorithm>
#include <utility>

#include "definition.h"

namespace deep_ep {

// A token may have at most min(K, L) rows at a rank.
inline int64_t low_latency_rows(Sizes& sizes) {
  sizes.require(sizes['T'] <= sizes['M'], "x", "has more tokens than num_max_dispatch_tokens_per_rank");
  const int64_t most = std::min(sizes['K'], sizes['L']);
  if (most < 1) return Sizes::kUnknown;
  sizes.require(sizes['M'] <= Sizes::kMaxRows / sizes['R'] / most, "num_max_dispatch_tokens_per_rank",
                "makes more than 2147483647 rows");
  return sizes.product("RM") * most;
}

inline Signature low_latency_dispatch(Rows rows, std::vector<TensorDef> outputs) {
  Signature signature = communicating({rows,
                                       {{"x", Elements::rows, "TH"}, kTopkIdx},
                                       std::move(outputs),
                                       {{"num_max_dispatch_tokens_per_rank", 'M'}, kZeroUnused}});
  signature.num_rows = low_latency_rows;
  signature.max_tokens = [](const Sizes& sizes) { return sizes['M']; };
  return signature;
}

}  // namespace deep_ep
