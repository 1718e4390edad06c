#include "schema.h"

STABLE_TORCH_LIBRARY_FRAGMENT(deep_ep, library) {
  const std::string arguments =
      "(Tensor grad_recv_x, Tensor grad_recv_topk_weights, Tensor recv_src_idx, Tensor topk_idx, Tensor "
      "send_head, int num_experts, int num_ranks, str group)";
  deep_ep::define(library, "dispatch_backward", arguments + " -> (Tensor grad_x, Tensor grad_topk_weights)");
  deep_ep::define(library, "dispatch_backward_start", arguments + " -> Tensor ticket");
}
