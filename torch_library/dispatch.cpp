#include "schema.h"

STABLE_TORCH_LIBRARY_FRAGMENT(deep_ep, library) {
  const std::string arguments =
      "(Tensor x, Tensor topk_idx, Tensor topk_weights, int num_experts, int num_ranks, SymInt num_worst_tokens, "
      "str group)";
  deep_ep::define(library, "dispatch",
                  arguments +
                      " -> (Tensor recv_x, Tensor recv_topk_idx, Tensor recv_topk_weights, Tensor "
                      "num_recv_tokens_per_expert, Tensor num_dropped, Tensor rank_prefix_matrix, Tensor "
                      "channel_prefix_matrix, Tensor recv_channel_prefix_matrix, Tensor recv_src_idx, Tensor "
                      "send_head)");
  deep_ep::define(library, "dispatch_start", arguments + " -> Tensor ticket");
}
