#include "send_back.h"
#include "shm/groups.h"
#include "started.h"

namespace deep_ep {
namespace {

constexpr Op kOp = Op::combine;

Checks check(const Turn& turn, const Tensor& x, const Tensor& topk_idx, const Tensor& topk_weights,
             const Tensor& recv_src_idx, const Tensor& send_head, int64_t num_experts, int64_t num_ranks) {
  Checks checks = check_handle("x", x, topk_idx, recv_src_idx, send_head, num_experts, num_ranks, turn.group().size());
  return checks.tensor("topk_weights", topk_weights, {ScalarType::Float}, topk_idx.sizes());
}

Tensor combine(Tensor x, Tensor topk_idx, Tensor topk_weights, Tensor recv_src_idx, Tensor send_head,
               int64_t num_experts, int64_t num_ranks, GroupName group) {
  Turn turn = groups::get(name_of(kOp), group.value);
  Checks checks = check(turn, x, topk_idx, topk_weights, recv_src_idx, send_head, num_experts, num_ranks);
  return combine_rows(kOp, std::move(turn), std::move(checks), x, topk_idx, topk_weights, recv_src_idx, send_head,
                      num_experts, num_ranks);
}

Tensor combine_start(Tensor x, Tensor topk_idx, Tensor topk_weights, Tensor recv_src_idx, Tensor send_head,
                     int64_t num_experts, int64_t num_ranks, GroupName group) {
  Turn turn = groups::get(name_of(kOp), group.value);
  const Checks checks = check(turn, x, topk_idx, topk_weights, recv_src_idx, send_head, num_experts, num_ranks);
  return start_combine(kOp, std::move(turn), checks, x, topk_idx, topk_weights, recv_src_idx, send_head, num_experts,
                       num_ranks);
}

}  // namespace
}  // namespace deep_ep

STABLE_TORCH_LIBRARY_IMPL(deep_ep, CPU, library) {
  library.impl("combine", TORCH_BOX(&deep_ep::combine));
  library.impl("combine_start", TORCH_BOX(&deep_ep::combine_start));
}
