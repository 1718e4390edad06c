// low_latency_dispatch: sends a few tokens per rank to the ranks of their experts, with static shapes.
#include <algorithm>

#include "definition.h"

namespace ops {

using namespace deep_ep;

class DeepEpLowLatencyDispatch : public Operator<DeepEpLowLatencyDispatch> {
 public:
  using Operator::Operator;

  static Signature signature() {
    Signature signature = communicating(
        {Rows::copied,
         {{"x", Elements::rows, "TH"}, kTopkIdx},
         {{"recv_x", Elements::rows, "NH"}, {"recv_count", Elements::i64, "L"}, kRecvSrcIdx, kLayoutRange, kSendHead},
         {{"num_max_dispatch_tokens_per_rank", 'M'}}});
    signature.num_rows = num_rows;
    signature.max_tokens = [](const Sizes& sizes) { return sizes['M']; };
    return signature;
  }

 private:
  // A token may have at most min(K, L) rows at a rank.
  static int64_t num_rows(Sizes& sizes) {
    sizes.require(sizes['T'] <= sizes['M'], "x", "has more tokens than num_max_dispatch_tokens_per_rank");
    const int64_t most = std::min(sizes['K'], sizes['L']);
    if (most < 1) return Sizes::kUnknown;
    sizes.require(sizes['M'] <= Sizes::kMaxRows / sizes['R'] / most, "num_max_dispatch_tokens_per_rank",
                  "makes more than 2147483647 rows");
    return sizes.product("RM") * most;
  }
};

OP_ADD(DeepEpLowLatencyDispatch);

}  // namespace ops
