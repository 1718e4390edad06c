#include "schema.h"

STABLE_TORCH_LIBRARY_FRAGMENT(deep_ep, library) {
  deep_ep::define(library, "get_dispatch_layout",
                  "(Tensor topk_idx, int num_experts, int num_ranks, int num_nodes) -> "
                  "(Tensor num_tokens_per_rank, Tensor num_tokens_per_rdma_rank, Tensor num_tokens_per_expert, "
                  "Tensor is_token_in_rank)");
}
