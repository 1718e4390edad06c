#include "schema.h"

// zero_unused: rows beyond those received become 0; without it they hold anything.
//
// low_latency_dispatch_int8 is for kernels that quantise: elsewhere rows are quantised and brought back around
// low_latency_dispatch.
STABLE_TORCH_LIBRARY_FRAGMENT(deep_ep, library) {
  deep_ep::define(library, "low_latency_dispatch_int8",
                  "(Tensor x, Tensor topk_idx, int num_max_dispatch_tokens_per_rank, int num_experts, int num_ranks, "
                  "str group, bool zero_unused=True) -> (Tensor recv_data, Tensor recv_scales, Tensor recv_count, "
                  "Tensor recv_src_idx, Tensor layout_range, Tensor send_head)");
  const std::string arguments =
      "(Tensor x, Tensor topk_idx, int num_max_dispatch_tokens_per_rank, int num_experts, int num_ranks, str group, "
      "str comm_alg, bool zero_unused=True)";
  deep_ep::define_with_ops(
      library, "low_latency_dispatch",
      arguments + " -> (Tensor recv_x, Tensor recv_count, Tensor recv_src_idx, Tensor layout_range, Tensor send_head)");
  deep_ep::define_with_ops(library, "low_latency_dispatch_start", arguments + " -> Tensor ticket");
}
