// dispatch: sends each token to the ranks of its experts. Two operators, as the shapes of an operator's outputs either
// depend on its computation or do not.
#include <algorithm>

#include "definition.h"

namespace ops {

using namespace deep_ep;

namespace {

Signature dispatch(std::vector<TensorDef> inputs) {
  return communicating({Rows::copied,
                        std::move(inputs),
                        {{"recv_x", Elements::rows, "NH"},
                         {"recv_topk_idx", Elements::i64, "NK"},
                         {"recv_topk_weights", Elements::f32, "NK"},
                         {"num_recv_tokens_per_expert", Elements::i64, "L"},
                         {"num_dropped", Elements::i64, ""},
                         {"rank_prefix_matrix", Elements::i32, "RR"},
                         {"channel_prefix_matrix", Elements::i32, "RL"},
                         {"recv_channel_prefix_matrix", Elements::i32, "LR"},
                         kRecvSrcIdx,
                         kSendHead},
                        {}});
}

}  // namespace

// Capacity mode: N = W.
class DeepEpDispatch : public Operator<DeepEpDispatch> {
 public:
  using Operator::Operator;

  static Signature signature() {
    Signature signature =
        dispatch({{"x", Elements::rows, "TH"}, kTopkIdx, kTopkWeights, {"num_worst_tokens", Elements::i64, "=W"}});
    signature.num_rows = [](Sizes& sizes) { return sizes['W']; };
    return signature;
  }
};

OP_ADD(DeepEpDispatch);

// Exact mode: N is what peers send. Memory is taken for all rows of ranks that have as many tokens as this one.
class DeepEpDispatchExact : public Operator<DeepEpDispatchExact> {
 public:
  using Operator::Operator;

  static Signature signature() {
    Signature signature = dispatch({{"x", Elements::rows, "TH"}, kTopkIdx, kTopkWeights});
    signature.most_rows = [](const Sizes& sizes) { return std::min(sizes.product("RTK"), Sizes::kMaxRows); };
    return signature;
  }
};

OP_ADD(DeepEpDispatchExact);

}  // namespace ops
