// combine: brings the experts' rows back to their tokens and sums them up with weights.
#include "definition.h"

namespace ops {

using namespace deep_ep;

class DeepEpCombine : public Operator<DeepEpCombine> {
 public:
  using Operator::Operator;

  static Signature signature() {
    return communicating({Rows::summed,
                          {{"x", Elements::rows, "NH"}, kTopkIdx, kTopkWeights, kRecvSrcIdx, kSendHead},
                          {{"combined_x", Elements::rows, "TH"}},
                          {}});
  }
};

OP_ADD(DeepEpCombine);

}  // namespace ops
