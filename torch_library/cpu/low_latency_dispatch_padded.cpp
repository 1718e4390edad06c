#include <algorithm>

#include "dispatch.h"
#include "shm/groups.h"

namespace deep_ep {
namespace {

Results in_order(const Dispatched& out) {
  const Dispatched::Padded& padded = *out.padded;
  return {out.recv_x,
          padded.recv_scales,
          padded.recv_count,
          padded.src_info,
          padded.layout,
          out.recv_src_idx,
          out.recv_channel_prefix_matrix,
          out.send_head};
}

DispatchCall low_latency_dispatch_padded(Tensor x, Tensor topk_idx, std::vector<Tensor> parts, int64_t num_max,
                                         int64_t num_experts, int64_t num_ranks, GroupName group) {
  Turn turn = groups::get("low_latency_dispatch", group.value);
  Checks checks =
      check_low_latency_dispatch_padded(x, topk_idx, parts, num_max, num_experts, num_ranks, turn.group().size());
  const bool right = checks.passed();
  const int64_t L = right ? num_experts / num_ranks : 0, block = right ? num_ranks * num_max : 0;
  return {.turn = std::move(turn),
          .checks = std::move(checks),
          .x = x,
          .topk_idx = topk_idx,
          .num_experts = num_experts,
          .num_ranks = num_ranks,
          .num_rows = right ? block * std::min(topk_idx.size(1), L) : 0,
          .in_order = in_order,
          .blocks = Blocks{.parts = std::move(parts), .size = block, .count = L}};
}

}  // namespace
}  // namespace deep_ep

STABLE_TORCH_LIBRARY_IMPL(deep_ep, CPU, library) {
  deep_ep::implement<&deep_ep::low_latency_dispatch_padded, 8>(library, "low_latency_dispatch_padded");
}
