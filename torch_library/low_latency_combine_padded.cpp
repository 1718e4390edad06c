#include "schema.h"

// low_latency_combine of rows in the places of low_latency_dispatch_padded.
STABLE_TORCH_LIBRARY_FRAGMENT(deep_ep, library) {
  const std::string arguments =
      "(Tensor x, Tensor topk_idx, Tensor topk_weights, Tensor recv_src_idx, Tensor layout_range, Tensor send_head, "
      "int num_experts, int num_ranks, str group)";
  deep_ep::define(library, "low_latency_combine_padded", arguments + " -> Tensor combined_x");
  deep_ep::define(library, "low_latency_combine_padded_start", arguments + " -> Tensor ticket");
}
