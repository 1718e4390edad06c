#include <algorithm>

#include "dispatch.h"
#include "started.h"

namespace deep_ep {
namespace {

constexpr Op kOp = Op::low_latency_dispatch;

Results run(Turn turn, const Tensor& x, const Tensor& topk_idx, int64_t num_max, int64_t num_experts,
            int64_t num_ranks) {
  Checks checks = check_low_latency_dispatch(x, topk_idx, num_max, num_experts, num_ranks, turn.group().size());
  int64_t num_rows = 0;
  if (checks.passed()) num_rows = num_ranks * num_max * std::min(topk_idx.size(1), num_experts / num_ranks);
  const Dispatched out =
      dispatch_rows(std::move(turn), std::move(checks), x, topk_idx, std::nullopt, num_experts, num_ranks, num_rows);
  return {out.recv_x, out.num_recv_tokens_per_expert, out.recv_src_idx, out.recv_channel_prefix_matrix, out.send_head};
}

// comm_alg is for .ops.

Tensor low_latency_dispatch_start(Tensor x, Tensor topk_idx, int64_t num_max, int64_t num_experts, int64_t num_ranks,
                                  GroupName group, GroupName /* comm_alg */) {
  // The caller may write to its tensors as soon as this returns.
  return start(kOp, groups::get(name_of(kOp), group.value), [=, x = clone(x), topk_idx = clone(topk_idx)](Turn turn) {
    return run(std::move(turn), x, topk_idx, num_max, num_experts, num_ranks);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> low_latency_dispatch(Tensor x, Tensor topk_idx, int64_t num_max,
                                                                        int64_t num_experts, int64_t num_ranks,
                                                                        GroupName group, GroupName /* comm_alg */) {
  const Results out = run(groups::get(name_of(kOp), group.value), x, topk_idx, num_max, num_experts, num_ranks);
  return {out[0], out[1], out[2], out[3], out[4]};
}

}  // namespace
}  // namespace deep_ep

STABLE_TORCH_LIBRARY_IMPL(deep_ep, CPU, library) {
  library.impl("low_latency_dispatch", TORCH_BOX(&deep_ep::low_latency_dispatch));
  library.impl("low_latency_dispatch_start", TORCH_BOX(&deep_ep::low_latency_dispatch_start));
}
