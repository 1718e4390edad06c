// low_latency_combine: brings the rows of low_latency_dispatch back. layout_range is how far each source's rows reach.
#include "definition.h"

namespace ops {

using namespace deep_ep;

class DeepEpLowLatencyCombine : public Operator<DeepEpLowLatencyCombine> {
 public:
  using Operator::Operator;

  static Signature signature() {
    return communicating({Rows::summed,
                          {{"x", Elements::rows, "NH"}, kTopkIdx, kTopkWeights, kRecvSrcIdx, kLayoutRange, kSendHead},
                          {{"combined_x", Elements::rows, "TH"}},
                          {}});
  }
};

OP_ADD(DeepEpLowLatencyCombine);

}  // namespace ops
