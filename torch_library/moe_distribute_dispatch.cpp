#include "schema.h"

// torch_npu's MoeDistributeDispatchV2 with what it takes and gives besides; its kernel is in Python.
STABLE_TORCH_LIBRARY_FRAGMENT(deep_ep, library) {
  library.def(
      "moe_distribute_dispatch(Tensor x, Tensor topk_idx, Tensor? topk_weights, Tensor? smooth_scales, "
      "Tensor? x_active_mask, int num_max_dispatch_tokens_per_rank, int num_experts, int num_ranks, "
      "int num_shared_ranks, bool is_shared, str group, str comm_alg) -> (Tensor recv_x, Tensor recv_scales, Tensor "
      "recv_count, Tensor assist_info, "
      "Tensor layout_range, Tensor expand_scales)");
}
