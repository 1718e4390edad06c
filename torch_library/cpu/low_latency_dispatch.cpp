#include <algorithm>

#include "dispatch.h"
#include "shm/groups.h"

namespace deep_ep {
namespace {

Results in_order(const Dispatched& out) {
  return {out.recv_x, out.num_recv_tokens_per_expert, out.recv_src_idx, out.recv_channel_prefix_matrix, out.send_head};
}

// comm_alg is for .ops.
DispatchCall low_latency_dispatch(Tensor x, Tensor topk_idx, int64_t num_max, int64_t num_experts, int64_t num_ranks,
                                  GroupName group, GroupName /* comm_alg */, bool zero_unused) {
  Turn turn = groups::get("low_latency_dispatch", group.value);
  Checks checks = check_low_latency_dispatch(x, topk_idx, num_max, num_experts, num_ranks, turn.group().size());
  const bool right = checks.passed();
  return {.turn = std::move(turn),
          .checks = std::move(checks),
          .x = x,
          .topk_idx = topk_idx,
          .num_experts = num_experts,
          .num_ranks = num_ranks,
          .num_rows = right ? num_ranks * num_max * std::min(topk_idx.size(1), num_experts / num_ranks) : 0,
          .in_order = in_order,
          .zero_unused = zero_unused};
}

}  // namespace
}  // namespace deep_ep

STABLE_TORCH_LIBRARY_IMPL(deep_ep, CPU, library) {
  deep_ep::implement<&deep_ep::low_latency_dispatch, 5>(library, "low_latency_dispatch");
}
