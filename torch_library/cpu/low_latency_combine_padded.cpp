#include "send_back.h"
#include "shm/groups.h"

namespace deep_ep {
namespace {

CombineCall low_latency_combine_padded(Tensor x, Tensor topk_idx, Tensor topk_weights, Tensor recv_src_idx,
                                       Tensor layout_range, Tensor send_head, int64_t num_experts, int64_t num_ranks,
                                       GroupName group) {
  Turn turn = groups::get("low_latency_combine", group.value);
  Checks checks =
      check_padded_handle("x", x, topk_idx, recv_src_idx, send_head, num_experts, num_ranks, turn.group().size());
  checks.tensor("layout_range", layout_range, {ScalarType::Int}, {num_experts});
  checks.tensor("topk_weights", topk_weights, {ScalarType::Float}, topk_idx.sizes());
  return {Op::low_latency_combine,
          std::move(turn),
          std::move(checks),
          x,
          topk_idx,
          topk_weights,
          recv_src_idx,
          send_head,
          num_experts,
          num_ranks,
          layout_range};
}

}  // namespace
}  // namespace deep_ep

STABLE_TORCH_LIBRARY_IMPL(deep_ep, CPU, library) {
  deep_ep::implement<&deep_ep::low_latency_combine_padded, 1>(library, "low_latency_combine_padded");
}
