// notify_dispatch: the rows that a dispatch will bring to this rank, for shapes that the host has to know. No torch op:
// dispatch of torch_library/npu calls it in exact mode.
#include "definition.h"

namespace ops {

using namespace deep_ep;

class DeepEpNotifyDispatch : public Operator<DeepEpNotifyDispatch> {
 public:
  using Operator::Operator;

  static Signature signature() {
    return communicating({Rows::none, {kTopkIdx}, {{"num_rows", Elements::i64, "1"}}, {}});
  }
};

OP_ADD(DeepEpNotifyDispatch);

}  // namespace ops
