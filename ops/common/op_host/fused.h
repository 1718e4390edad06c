// What fused_deep_moe and its backward have in common.
#pragma once

#include "definition.h"
#include "device/fused_layout.h"

namespace deep_ep {

inline void require_experts(Sizes& sizes) {
  const int64_t I = sizes['I'], J = sizes['J'];
  sizes.require(I == Sizes::kUnknown || J == Sizes::kUnknown || J == 2 * I, "gmm1_weight",
                "must have twice as many columns as gmm2_weight has rows");
}

inline void require_tiles(Sizes& sizes) {
  require_experts(sizes);
  sizes.require(sizes['T'] <= sizes['M'], "x", "has more tokens than num_max_dispatch_tokens_per_rank");
  const int64_t J = sizes['J'];
  sizes.require(J == Sizes::kUnknown || J % FusedLayout::kTile == 0, "gmm1_weight",
                "must have a multiple of 128 columns");
}

// In the fuse mode FUSED_DEEP_MOE gmm2's weights are [L, H, I], and the columns of gmm1's stand in tiles.
inline Signature fused(bool tiles, Signature signature) {
  signature = communicating(std::move(signature));
  signature.require = tiles ? require_tiles : require_experts;
  signature.has_kernel = false;
  return signature;
}

}  // namespace deep_ep
