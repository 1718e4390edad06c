#include <algorithm>

#include "npu/launch.h"
#include "started.h"

namespace deep_ep::npu {
namespace {

constexpr Op kOp = Op::low_latency_dispatch;

// comm_alg is for .ops.

Results queued(const Tensor& x, const Tensor& topk_idx, int64_t num_max, int64_t num_experts, int64_t num_ranks,
               const std::string& group) {
  const char* op = name_of(kOp);
  require(op, check_low_latency_dispatch(x, topk_idx, num_max, num_experts, num_ranks, group_size(op, group)));
  const int64_t L = num_experts / num_ranks, N = num_ranks * num_max * std::min(topk_idx.size(1), L);
  const auto empty = [&](std::initializer_list<int64_t> shape, ScalarType dtype) { return new_empty(x, shape, dtype); };
  const Tensor recv_x = new_empty(x, {N, x.size(1)});
  const Tensor recv_count = empty({L}, ScalarType::Long);
  const Tensor recv_src_idx = empty({N, 3}, ScalarType::Int);
  const Tensor layout_range = empty({num_experts}, ScalarType::Int);
  const Tensor send_head = empty({topk_idx.size(0), topk_idx.size(1)}, ScalarType::Int);
  run(op, group, {x, topk_idx}, {num_experts, num_ranks, num_max},
      {recv_x, recv_count, recv_src_idx, layout_range, send_head});
  return {recv_x, recv_count, recv_src_idx, layout_range, send_head};
}

// The kernel is on the stream when this returns; the host waits for nothing in either case.
Tensor low_latency_dispatch_start(Tensor x, Tensor topk_idx, int64_t num_max, int64_t num_experts, int64_t num_ranks,
                                  GroupName group, GroupName /* comm_alg */) {
  return hold(kOp, queued(x, topk_idx, num_max, num_experts, num_ranks, group.value));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> low_latency_dispatch(Tensor x, Tensor topk_idx, int64_t num_max,
                                                                        int64_t num_experts, int64_t num_ranks,
                                                                        GroupName group, GroupName /* comm_alg */,
                                                                        std::optional<Tensor> started) {
  const Results out =
      started ? finish(kOp, *started) : queued(x, topk_idx, num_max, num_experts, num_ranks, group.value);
  return {out[0], out[1], out[2], out[3], out[4]};
}

}  // namespace
}  // namespace deep_ep::npu

STABLE_TORCH_LIBRARY_IMPL(deep_ep, PrivateUse1, library) {
  library.impl("low_latency_dispatch", TORCH_BOX(&deep_ep::npu::low_latency_dispatch));
  library.impl("low_latency_dispatch_start", TORCH_BOX(&deep_ep::npu::low_latency_dispatch_start));
}
