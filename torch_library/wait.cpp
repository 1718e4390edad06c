#include "schema.h"

// The results of the call of `op` that gave the ticket. What their shapes depend on is given again: `arguments` are the
// tensors that op takes for a forward call, or like the results of a backward call; num_max is the num_worst_tokens of
// dispatch, the num_max_dispatch_tokens_per_rank of low_latency_dispatch, and 0 for other ops.
//
// `wait` returns when they are there. `arriving` returns before, and the ticket stays good for one wait, which ends
// when they hold what they should.
STABLE_TORCH_LIBRARY_FRAGMENT(deep_ep, library) {
  for (const char* name : {"wait", "arriving"})
    deep_ep::define_with_ops(library, name,
                             "(Tensor ticket, str op, Tensor[] arguments, int num_experts, int num_ranks, "
                             "SymInt num_max, str group) -> Tensor[] results");
}
