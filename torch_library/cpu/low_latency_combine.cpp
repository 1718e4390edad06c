#include "send_back.h"
#include "started.h"

namespace deep_ep {
namespace {

constexpr Op kOp = Op::low_latency_combine;

Results run(Turn turn, const Tensor& x, const Tensor& topk_idx, const Tensor& topk_weights, const Tensor& recv_src_idx,
            const Tensor& layout_range, const Tensor& send_head, int64_t num_experts, int64_t num_ranks) {
  Checks checks = check_handle("x", x, topk_idx, recv_src_idx, send_head, num_experts, num_ranks, turn.group().size());
  checks.tensor("layout_range", layout_range, {ScalarType::Int}, {num_experts});
  return {combine_rows(kOp, std::move(turn), std::move(checks), x, topk_idx, topk_weights, recv_src_idx, send_head,
                       num_experts, num_ranks, &layout_range)};
}

// comm_alg is for .ops.

Tensor low_latency_combine_start(Tensor x, Tensor topk_idx, Tensor topk_weights, Tensor recv_src_idx,
                                 Tensor layout_range, Tensor send_head, int64_t num_experts, int64_t num_ranks,
                                 GroupName group, GroupName /* comm_alg */) {
  // The caller may write to its tensors as soon as this returns.
  return start(kOp, groups::get(name_of(kOp), group.value),
               [=, x = clone(x), topk_idx = clone(topk_idx), topk_weights = clone(topk_weights),
                recv_src_idx = clone(recv_src_idx), layout_range = clone(layout_range),
                send_head = clone(send_head)](Turn turn) {
                 return run(std::move(turn), x, topk_idx, topk_weights, recv_src_idx, layout_range, send_head,
                            num_experts, num_ranks);
               });
}

Tensor low_latency_combine(Tensor x, Tensor topk_idx, Tensor topk_weights, Tensor recv_src_idx, Tensor layout_range,
                           Tensor send_head, int64_t num_experts, int64_t num_ranks, GroupName group,
                           GroupName /* comm_alg */) {
  return run(groups::get(name_of(kOp), group.value), x, topk_idx, topk_weights, recv_src_idx, layout_range, send_head,
             num_experts, num_ranks)[0];
}

}  // namespace
}  // namespace deep_ep

STABLE_TORCH_LIBRARY_IMPL(deep_ep, CPU, library) {
  library.impl("low_latency_combine", TORCH_BOX(&deep_ep::low_latency_combine));
  library.impl("low_latency_combine_start", TORCH_BOX(&deep_ep::low_latency_combine_start));
}
