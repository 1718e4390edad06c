// combine_backward: gradients of the experts' rows and of topk_weights from that of combine's result.
#include "definition.h"

namespace ops {

using namespace deep_ep;

class DeepEpCombineBackward : public Operator<DeepEpCombineBackward> {
 public:
  using Operator::Operator;

  static Signature signature() {
    Signature signature = communicating({Rows::multiplied,
                                         {{"grad_out", Elements::rows, "TH"},
                                          {"x", Elements::rows, "NH"},
                                          kTopkIdx,
                                          kTopkWeights,
                                          kRecvSrcIdx,
                                          kSendHead},
                                         {{"grad_x", Elements::rows, "NH"}, {"grad_topk_weights", Elements::f32, "TK"}},
                                         {}});
    signature.answers = true;
    return signature;
  }
};

OP_ADD(DeepEpCombineBackward);

}  // namespace ops
