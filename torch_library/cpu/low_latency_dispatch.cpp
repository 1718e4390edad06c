#include <algorithm>

#include "dispatch.h"

namespace deep_ep {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> low_latency_dispatch(Tensor x, Tensor topk_idx, int64_t num_max,
                                                                        int64_t num_experts, int64_t num_ranks,
                                                                        GroupName group_name,
                                                                        GroupName /* comm_alg: for .ops */) {
  const std::shared_ptr<Group> group = groups::get("low_latency_dispatch", group_name.value);
  Checks checks = check_low_latency_dispatch(x, topk_idx, num_max, num_experts, num_ranks, group->size());
  int64_t num_rows = 0;
  Tensor topk_weights = new_empty(topk_idx, sizes_of(topk_idx), ScalarType::Float);
  std::fill_n(topk_weights.mutable_data_ptr<float>(), topk_weights.numel(), 1.0f);
  if (checks.passed()) num_rows = num_ranks * num_max * std::min(topk_idx.size(1), num_experts / num_ranks);
  const Dispatched out = dispatch_rows(Op::low_latency_dispatch, *group, std::move(checks), x, topk_idx, topk_weights,
                                       num_experts, num_ranks, num_rows);
  const Tensor layout_range = view(out.recv_channel_prefix_matrix, {num_experts});
  return {out.recv_x, out.num_recv_tokens_per_expert, out.recv_src_idx, layout_range, out.send_head};
}

}  // namespace
}  // namespace deep_ep

STABLE_TORCH_LIBRARY_IMPL(deep_ep, CPU, library) {
  library.impl("low_latency_dispatch", TORCH_BOX(&deep_ep::low_latency_dispatch));
}
