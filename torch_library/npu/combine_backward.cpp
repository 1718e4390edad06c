#include "npu/launch.h"
#include "started.h"

namespace deep_ep::npu {
namespace {

QueuedCall combine_backward(Tensor grad_out, Tensor x, Tensor topk_idx, Tensor topk_weights, Tensor recv_src_idx,
                            Tensor send_head, int64_t num_experts, int64_t num_ranks, GroupName group) {
  const char* op = "combine_backward";
  Checks checks =
      check_handle("x", x, topk_idx, recv_src_idx, send_head, num_experts, num_ranks, group_size(op, group.value));
  checks.tensor("topk_weights", topk_weights, {ScalarType::Float}, topk_idx.sizes());
  if (checks.passed()) checks.tensor("grad_out", grad_out, {x.scalar_type()}, {topk_idx.size(0), x.size(1)});
  require(op, checks);
  Tensor grad_x = empty_tensor(x, {x.size(0), x.size(1)});
  Tensor grad_topk_weights = empty_tensor(topk_weights, {topk_idx.size(0), topk_idx.size(1)});
  run(op, group.value, {grad_out, x, topk_idx, topk_weights, recv_src_idx, send_head}, {num_experts, num_ranks},
      {grad_x, grad_topk_weights});
  return {Op::combine_backward, {grad_x, grad_topk_weights}};
}

}  // namespace
}  // namespace deep_ep::npu

STABLE_TORCH_LIBRARY_IMPL(deep_ep, PrivateUse1, library) {
  deep_ep::implement<&deep_ep::npu::combine_backward, 2>(library, "combine_backward");
}
