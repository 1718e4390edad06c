#include "schema.h"

STABLE_TORCH_LIBRARY_FRAGMENT(deep_ep, library) {
  deep_ep::define(library, "combine",
                  "(Tensor x, Tensor topk_idx, Tensor topk_weights, Tensor recv_src_idx, Tensor send_head, "
                  "int num_experts, int num_ranks, str group) -> Tensor combined_x");
}
