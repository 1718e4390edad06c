// get_dispatch_layout: how many tokens go where, from topk_idx alone. Nothing is communicated.
#include "definition.h"

namespace ops {

using namespace deep_ep;

class DeepEpGetDispatchLayout : public Operator<DeepEpGetDispatchLayout> {
 public:
  using Operator::Operator;

  static Signature signature() {
    return {Rows::none,
            {kTopkIdx},
            {{"num_tokens_per_rank", Elements::i32, "R"},
             {"num_tokens_per_rdma_rank", Elements::i32, "S"},
             {"num_tokens_per_expert", Elements::i32, "E"},
             {"is_token_in_rank", Elements::i32, "TR"}},
            {{"num_experts", 'E'}, {"num_ranks", 'R'}, {"num_nodes", 'S'}}};
  }
};

OP_ADD(DeepEpGetDispatchLayout);

}  // namespace ops
