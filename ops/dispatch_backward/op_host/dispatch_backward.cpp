// dispatch_backward: gradients of x and topk_weights from those of the received rows. The transpose of dispatch.
#include "definition.h"

namespace ops {

using namespace deep_ep;

class DeepEpDispatchBackward : public Operator<DeepEpDispatchBackward> {
 public:
  using Operator::Operator;

  static Signature signature() {
    Signature signature = communicating({Rows::summed,
                                         {{"grad_recv_x", Elements::rows, "NH"},
                                          {"grad_recv_topk_weights", Elements::f32, "NK"},
                                          kRecvSrcIdx,
                                          kTopkIdx,
                                          kSendHead},
                                         {{"grad_x", Elements::rows, "TH"}, {"grad_topk_weights", Elements::f32, "TK"}},
                                         {}});
    signature.answers = true;
    return signature;
  }
};

OP_ADD(DeepEpDispatchBackward);

}  // namespace ops
