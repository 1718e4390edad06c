#include <algorithm>

#include "dispatch.h"
#include "shm/groups.h"
#include "started.h"

namespace deep_ep {
namespace {

constexpr Op kOp = Op::low_latency_dispatch;

Results in_order(const Dispatched& out) {
  return {out.recv_x, out.num_recv_tokens_per_expert, out.recv_src_idx, out.recv_channel_prefix_matrix, out.send_head};
}

// A call of the op, and how many rows it gives.
struct Call {
  Call(const char* group, const Tensor& x, const Tensor& topk_idx, int64_t num_max, int64_t num_experts,
       int64_t num_ranks)
      : turn(groups::get(name_of(kOp), group)),
        checks(check_low_latency_dispatch(x, topk_idx, num_max, num_experts, num_ranks, turn.group().size())) {
    if (checks.passed()) num_rows = num_ranks * num_max * std::min(topk_idx.size(1), num_experts / num_ranks);
  }

  Turn turn;
  Checks checks;
  int64_t num_rows = 0;
};

// comm_alg is for .ops.

Tensor low_latency_dispatch_start(Tensor x, Tensor topk_idx, int64_t num_max, int64_t num_experts, int64_t num_ranks,
                                  GroupName group, GroupName /* comm_alg */, bool zero_unused) {
  Call call(group.value.c_str(), x, topk_idx, num_max, num_experts, num_ranks);
  const auto early = make_early(call.checks, [&] {
    return early_results(call.turn.group(), x, topk_idx, true, num_experts, num_ranks, call.num_rows);
  });
  const auto body = [=, checks = call.checks, num_rows = call.num_rows](Turn turn) {
    return in_order(dispatch_rows(std::move(turn), checks, x, topk_idx, std::nullopt, num_experts, num_ranks, num_rows,
                                  early, nullptr, zero_unused));
  };
  return start(kOp, std::move(call.turn), early ? in_order(early->out) : Results{}, body);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> low_latency_dispatch(Tensor x, Tensor topk_idx, int64_t num_max,
                                                                        int64_t num_experts, int64_t num_ranks,
                                                                        GroupName group, GroupName /* comm_alg */,
                                                                        bool zero_unused) {
  Call call(group.value.c_str(), x, topk_idx, num_max, num_experts, num_ranks);
  const Results out =
      in_order(dispatch_rows(std::move(call.turn), std::move(call.checks), x, topk_idx, std::nullopt, num_experts,
                             num_ranks, call.num_rows, std::nullopt, nullptr, zero_unused));
  return {out[0], out[1], out[2], out[3], out[4]};
}

}  // namespace
}  // namespace deep_ep

STABLE_TORCH_LIBRARY_IMPL(deep_ep, CPU, library) {
  library.impl("low_latency_dispatch", TORCH_BOX(&deep_ep::low_latency_dispatch));
  library.impl("low_latency_dispatch_start", TORCH_BOX(&deep_ep::low_latency_dispatch_start));
}
