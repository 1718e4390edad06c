#include "schema.h"

// low_latency_dispatch with R·M rows for each local expert. `parts`, if rows are made of two parts, is what they are on
// this rank: of each its dtype and the bytes of its rows are used. layout is upstream DeepEP's: begin << 32 | count.
STABLE_TORCH_LIBRARY_FRAGMENT(deep_ep, library) {
  const std::string arguments =
      "(Tensor x, Tensor topk_idx, Tensor[] parts, int num_max_dispatch_tokens_per_rank, int num_experts, "
      "int num_ranks, str group)";
  deep_ep::define(library, "low_latency_dispatch_padded",
                  arguments +
                      " -> (Tensor recv_x, Tensor recv_scales, Tensor recv_count, Tensor src_info, Tensor layout, "
                      "Tensor recv_src_idx, Tensor layout_range, Tensor send_head)");
  deep_ep::define(library, "low_latency_dispatch_padded_start", arguments + " -> Tensor ticket");
}
