#include <algorithm>

#include "dispatch.h"
#include "shm/groups.h"
#include "started.h"

namespace deep_ep {
namespace {

constexpr Op kOp = Op::low_latency_dispatch;

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

// A call of the op, and how many rows it gives.
struct Call {
  Call(const char* group, const Tensor& x, const Tensor& topk_idx, std::vector<Tensor> parts, int64_t num_max,
       int64_t num_experts, int64_t num_ranks)
      : turn(groups::get(name_of(kOp), group)),
        checks(check_low_latency_dispatch_padded(x, topk_idx, parts, num_max, num_experts, num_ranks,
                                                 turn.group().size())),
        blocks{.parts = std::move(parts)} {
    if (!checks.passed()) return;
    num_rows = num_ranks * num_max * std::min(topk_idx.size(1), num_experts / num_ranks);
    blocks.size = num_ranks * num_max;
    blocks.count = num_experts / num_ranks;
  }

  Turn turn;
  Checks checks;
  Blocks blocks;
  int64_t num_rows = 0;
};

Tensor low_latency_dispatch_padded_start(Tensor x, Tensor topk_idx, std::vector<Tensor> parts, int64_t num_max,
                                         int64_t num_experts, int64_t num_ranks, GroupName group) {
  Call call(group.value.c_str(), x, topk_idx, std::move(parts), num_max, num_experts, num_ranks);
  const auto early = make_early(call.checks, [&] {
    return early_results(call.turn.group(), x, topk_idx, true, num_experts, num_ranks, call.num_rows, &call.blocks);
  });
  const auto body = [=, checks = call.checks, num_rows = call.num_rows, blocks = call.blocks](Turn turn) {
    return in_order(dispatch_rows(std::move(turn), checks, x, topk_idx, std::nullopt, num_experts, num_ranks, num_rows,
                                  early, &blocks));
  };
  return start(kOp, std::move(call.turn), early ? in_order(early->out) : Results{}, body,
               "low_latency_dispatch_padded");
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> low_latency_dispatch_padded(
    Tensor x, Tensor topk_idx, std::vector<Tensor> parts, int64_t num_max, int64_t num_experts, int64_t num_ranks,
    GroupName group) {
  Call call(group.value.c_str(), x, topk_idx, std::move(parts), num_max, num_experts, num_ranks);
  const Results out = in_order(dispatch_rows(std::move(call.turn), std::move(call.checks), x, topk_idx, std::nullopt,
                                             num_experts, num_ranks, call.num_rows, std::nullopt, &call.blocks));
  return {out[0], out[1], out[2], out[3], out[4], out[5], out[6], out[7]};
}

}  // namespace
}  // namespace deep_ep

STABLE_TORCH_LIBRARY_IMPL(deep_ep, CPU, library) {
  library.impl("low_latency_dispatch_padded", TORCH_BOX(&deep_ep::low_latency_dispatch_padded));
  library.impl("low_latency_dispatch_padded_start", TORCH_BOX(&deep_ep::low_latency_dispatch_padded_start));
}
