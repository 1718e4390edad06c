#include <algorithm>

#include "npu/launch.h"
#include "started.h"

namespace deep_ep::npu {
namespace {

constexpr Op kOp = Op::low_latency_dispatch;

// comm_alg is for .ops.

// `rows` makes the first outputs, for N rows.
template <typename Rows>
Results queued(Op op, Rows&& rows, const Tensor& x, const Tensor& topk_idx, int64_t num_max, int64_t num_experts,
               int64_t num_ranks, const std::string& group, bool zero_unused) {
  const char* name = name_of(op);
  require(name, check_low_latency_dispatch(x, topk_idx, num_max, num_experts, num_ranks, group_size(name, group)));
  const int64_t L = num_experts / num_ranks, N = num_ranks * num_max * std::min(topk_idx.size(1), L);
  Results results = rows(N);
  results.push_back(empty_tensor(x, {L}, ScalarType::Long));                                  // recv_count
  results.push_back(empty_tensor(x, {N, 3}, ScalarType::Int));                                // recv_src_idx
  results.push_back(empty_tensor(x, {num_experts}, ScalarType::Int));                         // layout_range
  results.push_back(empty_tensor(x, {topk_idx.size(0), topk_idx.size(1)}, ScalarType::Int));  // send_head
  run(name, group, {x, topk_idx}, {num_experts, num_ranks, num_max, zero_unused}, results);
  return results;
}

Results queued(const Tensor& x, const Tensor& topk_idx, int64_t num_max, int64_t num_experts, int64_t num_ranks,
               const std::string& group, bool zero_unused) {
  const auto rows = [&](int64_t N) { return Results{empty_tensor(x, {N, x.size(1)})}; };
  return queued(kOp, rows, x, topk_idx, num_max, num_experts, num_ranks, group, zero_unused);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> low_latency_dispatch_int8(Tensor x, Tensor topk_idx,
                                                                                     int64_t num_max,
                                                                                     int64_t num_experts,
                                                                                     int64_t num_ranks, GroupName group,
                                                                                     bool zero_unused) {
  const auto rows = [&](int64_t N) {
    return Results{empty_tensor(x, {N, x.size(1)}, ScalarType::Char), empty_tensor(x, {N}, ScalarType::Float)};
  };
  const Results out = queued(Op::low_latency_dispatch_int8, rows, x, topk_idx, num_max, num_experts, num_ranks,
                             group.value, zero_unused);
  return {out[0], out[1], out[2], out[3], out[4], out[5]};
}

// The kernel is on the stream when this returns; the host waits for nothing in either case.
Tensor low_latency_dispatch_start(Tensor x, Tensor topk_idx, int64_t num_max, int64_t num_experts, int64_t num_ranks,
                                  GroupName group, GroupName /* comm_alg */, bool zero_unused) {
  return hold(kOp, queued(x, topk_idx, num_max, num_experts, num_ranks, group.value, zero_unused));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> low_latency_dispatch(Tensor x, Tensor topk_idx, int64_t num_max,
                                                                        int64_t num_experts, int64_t num_ranks,
                                                                        GroupName group, GroupName /* comm_alg */,
                                                                        bool zero_unused) {
  const Results out = queued(x, topk_idx, num_max, num_experts, num_ranks, group.value, zero_unused);
  return {out[0], out[1], out[2], out[3], out[4]};
}

}  // namespace
}  // namespace deep_ep::npu

STABLE_TORCH_LIBRARY_IMPL(deep_ep, PrivateUse1, library) {
  library.impl("low_latency_dispatch", TORCH_BOX(&deep_ep::npu::low_latency_dispatch));
  library.impl("low_latency_dispatch_int8", TORCH_BOX(&deep_ep::npu::low_latency_dispatch_int8));
  library.impl("low_latency_dispatch_start", TORCH_BOX(&deep_ep::npu::low_latency_dispatch_start));
}
