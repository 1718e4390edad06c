#include "npu/launch.h"
#include "started.h"

namespace deep_ep::npu {
namespace {

constexpr Op kOp = Op::low_latency_combine;

// comm_alg is for .ops.
QueuedCall low_latency_combine(Tensor x, Tensor topk_idx, Tensor topk_weights, Tensor recv_src_idx, Tensor layout_range,
                               Tensor send_head, int64_t num_experts, int64_t num_ranks, GroupName group,
                               GroupName /* comm_alg */) {
  const char* op = name_of(kOp);
  Checks checks =
      check_handle("x", x, topk_idx, recv_src_idx, send_head, num_experts, num_ranks, group_size(op, group.value));
  checks.tensor("layout_range", layout_range, {ScalarType::Int}, {num_experts});
  checks.tensor("topk_weights", topk_weights, {ScalarType::Float}, topk_idx.sizes());
  require(op, checks);
  const Tensor combined = empty_tensor(x, {topk_idx.size(0), x.size(1)});
  run(op, group.value, {x, topk_idx, topk_weights, recv_src_idx, layout_range, send_head}, {num_experts, num_ranks},
      {combined});
  return {kOp, {combined}};
}

}  // namespace
}  // namespace deep_ep::npu

STABLE_TORCH_LIBRARY_IMPL(deep_ep, PrivateUse1, library) {
  deep_ep::implement<&deep_ep::npu::low_latency_combine, 1>(library, "low_latency_combine");
}
