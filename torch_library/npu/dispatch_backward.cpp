#include "npu/launch.h"
#include "started.h"

namespace deep_ep::npu {
namespace {

std::tuple<Tensor, Tensor> dispatch_backward(Tensor grad_recv_x, Tensor grad_recv_topk_weights, Tensor recv_src_idx,
                                             Tensor topk_idx, Tensor send_head, int64_t num_experts, int64_t num_ranks,
                                             GroupName group) {
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
  return {grad_x, grad_topk_weights};
}

// The kernel is on the stream when this returns; the host waits for nothing in either case.
Tensor dispatch_backward_start(Tensor grad_recv_x, Tensor grad_recv_topk_weights, Tensor recv_src_idx, Tensor topk_idx,
                               Tensor send_head, int64_t num_experts, int64_t num_ranks, GroupName group) {
  const auto [grad_x, grad_topk_weights] = dispatch_backward(grad_recv_x, grad_recv_topk_weights, recv_src_idx,
                                                             topk_idx, send_head, num_experts, num_ranks, group);
  return hold(Op::dispatch_backward, {grad_x, grad_topk_weights});
}

}  // namespace
}  // namespace deep_ep::npu

STABLE_TORCH_LIBRARY_IMPL(deep_ep, PrivateUse1, library) {
  library.impl("dispatch_backward", TORCH_BOX(&deep_ep::npu::dispatch_backward));
  library.impl("dispatch_backward_start", TORCH_BOX(&deep_ep::npu::dispatch_backward_start));
}
