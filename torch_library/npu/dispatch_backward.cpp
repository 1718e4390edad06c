#include "npu/launch.h"
#include "started.h"

namespace deep_ep::npu {
namespace {

QueuedCall dispatch_backward(Tensor grad_recv_x, Tensor grad_recv_topk_weights, Tensor recv_src_idx, Tensor topk_idx,
                             Tensor send_head, int64_t num_experts, int64_t num_ranks, GroupName group) {
  const char* op = "dispatch_backward";
  Checks checks = check_handle("grad_recv_x", grad_recv_x, topk_idx, recv_src_idx, send_head, num_experts, num_ranks,
                               group_size(op, group.value));
  if (checks.passed())
    checks.tensor("grad_recv_topk_weights", grad_recv_topk_weights, {ScalarType::Float},
                  {grad_recv_x.size(0), topk_idx.size(1)});
  require(op, checks);
  Tensor grad_x = empty_tensor(grad_recv_x, {topk_idx.size(0), grad_recv_x.size(1)});
  Tensor grad_topk_weights = empty_tensor(grad_recv_topk_weights, {topk_idx.size(0), topk_idx.size(1)});
  run(op, group.value, {grad_recv_x, grad_recv_topk_weights, recv_src_idx, topk_idx, send_head},
      {num_experts, num_ranks}, {grad_x, grad_topk_weights});
  return {Op::dispatch_backward, {grad_x, grad_topk_weights}};
}

}  // namespace
}  // namespace deep_ep::npu

STABLE_TORCH_LIBRARY_IMPL(deep_ep, PrivateUse1, library) {
  deep_ep::implement<&deep_ep::npu::dispatch_backward, 2>(library, "dispatch_backward");
}
