#include "schema.h"

// dispatch_int8 is for kernels that quantise: elsewhere rows are quantised and brought back around dispatch.
STABLE_TORCH_LIBRARY_FRAGMENT(deep_ep, library) {
  const std::string arguments =
      "(Tensor x, Tensor topk_idx, Tensor topk_weights, int num_experts, int num_ranks, SymInt num_worst_tokens, "
      "str group)";
  const std::string others =
      "Tensor recv_topk_idx, Tensor recv_topk_weights, Tensor num_recv_tokens_per_expert, Tensor num_dropped, Tensor "
      "rank_prefix_matrix, Tensor channel_prefix_matrix, Tensor recv_channel_prefix_matrix, Tensor recv_src_idx, "
      "Tensor "
      "send_head)";
  deep_ep::define(library, "dispatch", arguments + " -> (Tensor recv_x, " + others);
  deep_ep::define(library, "dispatch_int8", arguments + " -> (Tensor recv_data, Tensor recv_scales, " + others);
  deep_ep::define(library, "dispatch_start", arguments + " -> Tensor ticket");
}
