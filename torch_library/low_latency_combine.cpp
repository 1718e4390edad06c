#include "schema.h"

STABLE_TORCH_LIBRARY_FRAGMENT(deep_ep, library) {
  deep_ep::define_low_latency(
      library, "low_latency_combine",
      "Tensor x, Tensor topk_idx, Tensor topk_weights, Tensor recv_src_idx, Tensor layout_range, Tensor send_head, "
      "int num_experts, int num_ranks, str group, str comm_alg",
      "Tensor combined_x");
}
