// low_latency_dispatch: sends a few tokens per rank to the ranks of their experts, with static shapes.
#include "low_latency.h"

namespace ops {

using namespace deep_ep;

class DeepEpLowLatencyDispatch : public Operator<DeepEpLowLatencyDispatch> {
 public:
  using Operator::Operator;

  static Signature signature() {
    return low_latency_dispatch(
        Rows::copied,
        {{"recv_x", Elements::rows, "NH"}, {"recv_count", Elements::i64, "L"}, kRecvSrcIdx, kLayoutRange, kSendHead});
  }
};

OP_ADD(DeepEpLowLatencyDispatch);

}  // namespace ops
