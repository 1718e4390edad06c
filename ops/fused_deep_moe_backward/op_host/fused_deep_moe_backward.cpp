// fused_deep_moe_backward: the gradients of fused_deep_moe with quant_mode 0, in both fuse modes.
#include "fused.h"

namespace ops {

using namespace deep_ep;

namespace {

Signature fused_deep_moe_backward(bool tiles) {
  const char* gmm2 = tiles ? "LHI" : "LIH";
  return fused(tiles, {Rows::none,
                       {{"grad_out", Elements::rows, "TH"},
                        {"x", Elements::rows, "TH"},
                        kTopkIdx,
                        kTopkWeights,
                        {"gmm1_weight", Elements::rows, "LHJ"},
                        {"gmm2_weight", Elements::rows, gmm2}},
                       {{"grad_x", Elements::rows, "TH"},
                        {"grad_topk_weights", Elements::f32, "TK"},
                        {"grad_gmm1_weight", Elements::rows, "LHJ"},
                        {"grad_gmm2_weight", Elements::rows, gmm2}},
                       {{"num_max_dispatch_tokens_per_rank", 'M'}}});
}

}  // namespace

class DeepEpFusedDeepMoeBackward : public Operator<DeepEpFusedDeepMoeBackward> {
 public:
  using Operator::Operator;

  static Signature signature() { return fused_deep_moe_backward(true); }
};

OP_ADD(DeepEpFusedDeepMoeBackward);

class DeepEpFusedDeepMoeBackwardDispatchFfnCombine : public Operator<DeepEpFusedDeepMoeBackwardDispatchFfnCombine> {
 public:
  using Operator::Operator;

  static Signature signature() { return fused_deep_moe_backward(false); }
};

OP_ADD(DeepEpFusedDeepMoeBackwardDispatchFfnCombine);

}  // namespace ops
