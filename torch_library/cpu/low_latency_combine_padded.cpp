#include "send_back.h"
#include "shm/groups.h"
#include "started.h"

namespace deep_ep {
namespace {

constexpr Op kOp = Op::low_latency_combine;

Checks check(const Turn& turn, const Tensor& x, const Tensor& topk_idx, const Tensor& topk_weights,
             const Tensor& recv_src_idx, const Tensor& layout_range, const Tensor& send_head, int64_t num_experts,
             int64_t num_ranks) {
  Checks checks =
      check_padded_handle("x", x, topk_idx, recv_src_idx, send_head, num_experts, num_ranks, turn.group().size());
  checks.tensor("layout_range", layout_range, {ScalarType::Int}, {num_experts});
  return checks.tensor("topk_weights", topk_weights, {ScalarType::Float}, topk_idx.sizes());
}

Tensor low_latency_combine_padded_start(Tensor x, Tensor topk_idx, Tensor topk_weights, Tensor recv_src_idx,
                                        Tensor layout_range, Tensor send_head, int64_t num_experts, int64_t num_ranks,
                                        GroupName group) {
  Turn turn = groups::get(name_of(kOp), group.value);
  const Checks checks =
      check(turn, x, topk_idx, topk_weights, recv_src_idx, layout_range, send_head, num_experts, num_ranks);
  return start_combine(kOp, std::move(turn), checks, x, topk_idx, topk_weights, recv_src_idx, send_head, num_experts,
                       num_ranks, layout_range, "low_latency_combine_padded");
}

Tensor low_latency_combine_padded(Tensor x, Tensor topk_idx, Tensor topk_weights, Tensor recv_src_idx,
                                  Tensor layout_range, Tensor send_head, int64_t num_experts, int64_t num_ranks,
                                  GroupName group) {
  Turn turn = groups::get(name_of(kOp), group.value);
  Checks checks = check(turn, x, topk_idx, topk_weights, recv_src_idx, layout_range, send_head, num_experts, num_ranks);
  return combine_rows(kOp, std::move(turn), std::move(checks), x, topk_idx, topk_weights, recv_src_idx, send_head,
                      num_experts, num_ranks, &layout_range);
}

}  // namespace
}  // namespace deep_ep

STABLE_TORCH_LIBRARY_IMPL(deep_ep, CPU, library) {
  library.impl("low_latency_combine_padded", TORCH_BOX(&deep_ep::low_latency_combine_padded));
  library.impl("low_latency_combine_padded_start", TORCH_BOX(&deep_ep::low_latency_combine_padded_start));
}
