// dispatch and dispatch_int8: sends each token to the ranks of its experts, as it is or quantised on its way, to int8
// with one scale per row. Two operators each, as the shapes of an operator's outputs either depend on its computation
// or do not.
#include <algorithm>

#include "definition.h"

namespace ops {

using namespace deep_ep;

namespace {

Signature dispatch(Rows rows, std::vector<TensorDef> inputs) {
  std::vector<TensorDef> outputs{{"recv_x", Elements::rows, "NH"},
                                 {"recv_topk_idx", Elements::i64, "NK"},
                                 {"recv_topk_weights", Elements::f32, "NK"},
                                 {"num_recv_tokens_per_expert", Elements::i64, "L"},
                                 {"num_dropped", Elements::i64, ""},
                                 {"rank_prefix_matrix", Elements::i32, "RR"},
                                 {"channel_prefix_matrix", Elements::i32, "RL"},
                                 {"recv_channel_prefix_matrix", Elements::i32, "LR"},
                                 kRecvSrcIdx,
                                 kSendHead};
  if (rows == Rows::quantised) {
    outputs.front() = {"recv_data", Elements::i8, "NH"};
    outputs.insert(outputs.begin() + 1, {"recv_scales", Elements::f32, "N"});
  }
  return communicating({rows, std::move(inputs), std::move(outputs), {}});
}

// N = W.
Signature in_capacity_mode(Rows rows) {
  Signature signature =
      dispatch(rows, {{"x", Elements::rows, "TH"}, kTopkIdx, kTopkWeights, {"num_worst_tokens", Elements::i64, "=W"}});
  signature.num_rows = [](Sizes& sizes) { return sizes['W']; };
  return signature;
}

// N is what peers send. Memory is taken for all rows of ranks that have as many tokens as this one.
Signature in_exact_mode(Rows rows) {
  Signature signature = dispatch(rows, {{"x", Elements::rows, "TH"}, kTopkIdx, kTopkWeights});
  signature.most_rows = [](const Sizes& sizes) { return std::min(sizes.product("RTK"), Sizes::kMaxRows); };
  return signature;
}

}  // namespace

class DeepEpDispatch : public Operator<DeepEpDispatch> {
 public:
  using Operator::Operator;

  static Signature signature() { return in_capacity_mode(Rows::copied); }
};

OP_ADD(DeepEpDispatch);

class DeepEpDispatchExact : public Operator<DeepEpDispatchExact> {
 public:
  using Operator::Operator;

  static Signature signature() { return in_exact_mode(Rows::copied); }
};

OP_ADD(DeepEpDispatchExact);

class DeepEpDispatchInt8 : public Operator<DeepEpDispatchInt8> {
 public:
  using Operator::Operator;

  static Signature signature() { return in_capacity_mode(Rows::quantised); }
};

OP_ADD(DeepEpDispatchInt8);

class DeepEpDispatchInt8Exact : public Operator<DeepEpDispatchInt8Exact> {
 public:
  using Operator::Operator;

  static Signature signature() { return in_exact_mode(Rows::quantised); }
};

OP_ADD(DeepEpDispatchInt8Exact);

}  // namespace ops
