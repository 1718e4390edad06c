#include "schema.h"

// torch_npu's MoeDistributeCombineV2 likewise.
STABLE_TORCH_LIBRARY_FRAGMENT(deep_ep, library) {
  library.def(
      "moe_distribute_combine(Tensor x, Tensor topk_idx, Tensor topk_weights, Tensor assist_info, "
      "Tensor layout_range, Tensor? expand_scales, Tensor? x_active_mask, int num_max_dispatch_tokens_per_rank, "
      "int num_experts, int num_ranks, int num_shared_ranks, bool is_shared, str group, str comm_alg) -> Tensor "
      "combined_x");
}
