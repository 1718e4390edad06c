// fused_deep_moe: dispatch, gmm1, SwiGLU, gmm2 and combine, in both fuse modes.
#include "fused.h"

namespace ops {

using namespace deep_ep;

namespace {

// With quant_mode 0 scales are empty.
Signature fused_deep_moe(bool tiles) {
  const Elements scales = tiles ? Elements::f32 : Elements::i64;
  return fused(tiles, {Rows::none,
                       {{"x", Elements::rows, "TH"},
                        kTopkIdx,
                        kTopkWeights,
                        {"gmm1_weight", Elements::weights, "LHJ"},
                        {"gmm1_weight_scale", scales, "*"},
                        {"gmm2_weight", Elements::weights, tiles ? "LHI" : "LIH"},
                        {"gmm2_weight_scale", scales, "*"}},
                       {{"combined_x", Elements::rows, "TH"}, {"num_recv_tokens", Elements::i32, tiles ? "E" : "L"}},
                       {{"num_max_dispatch_tokens_per_rank", 'M'}, {"quant_mode", AttrDef::kNumber}}});
}

}  // namespace

class DeepEpFusedDeepMoe : public Operator<DeepEpFusedDeepMoe> {
 public:
  using Operator::Operator;

  static Signature signature() { return fused_deep_moe(true); }
};

OP_ADD(DeepEpFusedDeepMoe);

class DeepEpFusedDeepMoeDispatchFfnCombine : public Operator<DeepEpFusedDeepMoeDispatchFfnCombine> {
 public:
  using Operator::Operator;

  static Signature signature() { return fused_deep_moe(false); }
};

OP_ADD(DeepEpFusedDeepMoeDispatchFfnCombine);

}  // namespace ops
