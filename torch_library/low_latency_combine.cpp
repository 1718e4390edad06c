#include "schema.h"

STABLE_TORCH_LIBRARY_FRAGMENT(deep_ep, library) {
  const std::string arguments =
      "(Tensor x, Tensor topk_idx, Tensor topk_weights, Tensor recv_src_idx, Tensor layout_range, Tensor send_head, "
      "int num_experts, int num_ranks, str group, str comm_alg)";
  deep_ep::define_with_ops(library, "low_latency_combine", arguments + " -> Tensor combined_x");
  deep_ep::define_with_ops(library, "low_latency_combine_start", arguments + " -> Tensor ticket");
}
