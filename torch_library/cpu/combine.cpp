#include "send_back.h"
#include "started.h"

namespace deep_ep {
namespace {

constexpr Op kOp = Op::combine;

Tensor run(Turn turn, const Tensor& x, const Tensor& topk_idx, const Tensor& topk_weights, const Tensor& recv_src_idx,
           const Tensor& send_head, int64_t num_experts, int64_t num_ranks) {
  Checks checks = check_handle("x", x, topk_idx, recv_src_idx, send_head, num_experts, num_ranks, turn.group().size());
  return combine_rows(kOp, std::move(turn), std::move(checks), x, topk_idx, topk_weights, recv_src_idx, send_head,
                      num_experts, num_ranks);
}

Tensor combine(Tensor x, Tensor topk_idx, Tensor topk_weights, Tensor recv_src_idx, Tensor send_head,
               int64_t num_experts, int64_t num_ranks, GroupName group) {
  return run(groups::get(name_of(kOp), group.value), x, topk_idx, topk_weights, recv_src_idx, send_head, num_experts,
             num_ranks);
}

Tensor combine_start(Tensor x, Tensor topk_idx, Tensor topk_weights, Tensor recv_src_idx, Tensor send_head,
                     int64_t num_experts, int64_t num_ranks, GroupName group) {
  const auto body = [=, x = clone(x), topk_idx = clone(topk_idx), topk_weights = clone(topk_weights),
                     recv_src_idx = clone(recv_src_idx), send_head = clone(send_head)](Turn turn) {
    return Results{run(std::move(turn), x, topk_idx, topk_weights, recv_src_idx, send_head, num_experts, num_ranks)};
  };
  return start(kOp, groups::get(name_of(kOp), group.value), body);
}

}  // namespace
}  // namespace deep_ep

STABLE_TORCH_LIBRARY_IMPL(deep_ep, CPU, library) {
  library.impl("combine", TORCH_BOX(&deep_ep::combine));
  library.impl("combine_start", TORCH_BOX(&deep_ep::combine_start));
}
