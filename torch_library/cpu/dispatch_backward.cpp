#include "send_back.h"
#include "shm/groups.h"

namespace deep_ep {
namespace {

constexpr Op kOp = Op::dispatch_backward;

// The gradient that arrived for the weight of every row: grad_recv_topk_weights [N, K] in the row's column k.
std::vector<float> weight_gradients(const Tensor& grad_recv_topk_weights, const Handle& handle) {
  const auto* gradients = grad_recv_topk_weights.const_data_ptr<float>();
  std::vector<float> of_row(handle.num_rows, 0.0f);
  for (int64_t n = 0; n < handle.num_rows; ++n)
    if (const int32_t* source = handle.recv_src_idx + 3 * n; source[0] >= 0)
      of_row[n] = gradients[n * handle.top_k + source[2]];
  return of_row;
}

struct DispatchBackwardCall {
  Turn turn;
  Tensor grad_recv_x, grad_recv_topk_weights, recv_src_idx, topk_idx, send_head;
  int64_t num_experts, num_ranks;

  Op op() const { return kOp; }
  Results run(Turn turn);
};

Results DispatchBackwardCall::run(Turn turn) {
  const Group& group = turn.group();
  Checks checks =
      check_handle("grad_recv_x", grad_recv_x, topk_idx, recv_src_idx, send_head, num_experts, num_ranks, group.size());
  if (checks.passed())
    checks.tensor("grad_recv_topk_weights", grad_recv_topk_weights, {ScalarType::Float},
                  {grad_recv_x.size(0), topk_idx.size(1)});
  HandleArguments arguments(kOp, group, checks, grad_recv_x, topk_idx, recv_src_idx, send_head, num_experts, num_ranks);
  SendBack back{.handle = arguments.handle};
  std::vector<float> of_row;
  if (arguments.right()) {
    back.dtype = dtype_of(grad_recv_x);
    back.hidden = grad_recv_x.size(1);
    back.rows = grad_recv_x.const_data_ptr();
    of_row = weight_gradients(grad_recv_topk_weights, back.handle);
    back.has_scalars = true;
    back.scalars = of_row.data();
    back.attach_to(arguments.contribution);
  }
  std::vector<Region> regions;
  Operation op(std::move(turn), arguments.contribution, [&](const Operation& op) {
    regions = back.place(op);
    return Handle::check(op);
  });

  Tensor grad_x = empty_tensor(grad_recv_x, {topk_idx.size(0), grad_recv_x.size(1)});
  Tensor grad_topk_weights = empty_tensor(grad_recv_topk_weights, {topk_idx.size(0), topk_idx.size(1)});
  back.sums = grad_x.mutable_data_ptr();
  back.scalars_out = grad_topk_weights.mutable_data_ptr<float>();
  back.run(op, regions);
  op.finish();
  return {grad_x, grad_topk_weights};
}

DispatchBackwardCall dispatch_backward(Tensor grad_recv_x, Tensor grad_recv_topk_weights, Tensor recv_src_idx,
                                       Tensor topk_idx, Tensor send_head, int64_t num_experts, int64_t num_ranks,
                                       GroupName group) {
  return {groups::get(name_of(kOp), group.value),
          grad_recv_x,
          grad_recv_topk_weights,
          recv_src_idx,
          topk_idx,
          send_head,
          num_experts,
          num_ranks};
}

}  // namespace
}  // namespace deep_ep

STABLE_TORCH_LIBRARY_IMPL(deep_ep, CPU, library) {
  deep_ep::implement<&deep_ep::dispatch_backward, 2>(library, "dispatch_backward");
}
