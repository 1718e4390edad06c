// low_latency_dispatch_int8: the same with rows that are quantised on their way, to int8 with one scale per row.
#include "low_latency.h"

namespace ops {

using namespace deep_ep;

class DeepEpLowLatencyDispatchInt8 : public Operator<DeepEpLowLatencyDispatchInt8> {
 public:
  using Operator::Operator;

  static Signature signature() {
    return low_latency_dispatch(Rows::quantised, {{"recv_data", Elements::i8, "NH"},
                                                  {"recv_scales", Elements::f32, "N"},
                                                  {"recv_count", Elements::i64, "L"},
                                                  kRecvSrcIdx,
                                                  kLayoutRange,
                                                  kSendHead});
  }
};

OP_ADD(DeepEpLowLatencyDispatchInt8);

}  // namespace ops
