#include "npu/launch.h"
#include "started.h"

namespace deep_ep::npu {
namespace {

Tensor combine(Tensor x, Tensor topk_idx, Tensor topk_weights, Tensor recv_src_idx, Tensor send_head,
               int64_t num_experts, int64_t num_ranks, GroupName group) {
  const char* op = "combine";
  Checks checks =
      check_handle("x", x, topk_idx, recv_src_idx, send_head, num_experts, num_ranks, group_size(op, group.value));
  checks.tensor("topk_weights", topk_weights, {ScalarType::Float}, topk_idx.sizes());
  require(op, checks);
  Tensor combined = empty_tensor(x, {topk_idx.size(0), x.size(1)});
  run(op, group.value, {x, topk_idx, topk_weights, recv_src_idx, send_head}, {num_experts, num_ranks}, {combined});
  return combined;
}

// The kernel is on the stream when this returns; the host waits for nothing in either case.
Tensor combine_start(Tensor x, Tensor topk_idx, Tensor topk_weights, Tensor recv_src_idx, Tensor send_head,
                     int64_t num_experts, int64_t num_ranks, GroupName group) {
  return hold(Op::combine,
              {combine(x, topk_idx, topk_weights, recv_src_idx, send_head, num_experts, num_ranks, group)});
}

}  // namespace
}  // namespace deep_ep::npu

STABLE_TORCH_LIBRARY_IMPL(deep_ep, PrivateUse1, library) {
  library.impl("combine", TORCH_BOX(&deep_ep::npu::combine));
  library.impl("combine_start", TORCH_BOX(&deep_ep::npu::combine_start));
}
