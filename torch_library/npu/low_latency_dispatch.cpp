#include <algorithm>

#include "npu/launch.h"
#include "started.h"

namespace deep_ep::npu {
namespace {

constexpr Op kOp = Op::low_latency_dispatch;

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

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> low_latency_dispatch_int8(Tensor x, Tensor topk_idx,
                                                                                     int64_t num_max,
                                                                                     int64_t num_experts,
                                                                                     int64_t num_ranks, GroupName group,
                                                                                     bool zero_unused) {
  const auto rows = [&](int64_t N) {
    return Results{empty_tensor(x, {N, x.size(1)}, ScalarType::Char), empty_tensor(x, {N}, ScalarType::Float)};
  };
  return outputs<6>(queued(Op::low_latency_dispatch_int8, rows, x, topk_idx, num_max, num_experts, num_ranks,
                           group.value, zero_unused));
}

// comm_alg is for .ops.
QueuedCall low_latency_dispatch(Tensor x, Tensor topk_idx, int64_t num_max, int64_t num_experts, int64_t num_ranks,
                                GroupName group, GroupName /* comm_alg */, bool zero_unused) {
  const auto rows = [&](int64_t N) { return Results{empty_tensor(x, {N, x.size(1)})}; };
  return {kOp, queued(kOp, rows, x, topk_idx, num_max, num_experts, num_ranks, group.value, zero_unused)};
}

}  // namespace
}  // namespace deep_ep::npu

STABLE_TORCH_LIBRARY_IMPL(deep_ep, PrivateUse1, library) {
  deep_ep::implement<&deep_ep::npu::low_latency_dispatch, 5>(library, "low_latency_dispatch");
  library.impl("low_latency_dispatch_int8", TORCH_BOX(&deep_ep::npu::low_latency_dispatch_int8));
}
