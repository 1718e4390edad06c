#include "send_back.h"

namespace deep_ep {
namespace {

Tensor combine(Tensor x, Tensor topk_idx, Tensor topk_weights, Tensor recv_src_idx, Tensor send_head,
               int64_t num_experts, int64_t num_ranks, GroupName group_name) {
  const std::shared_ptr<Group> group = groups::get("combine", group_name.value);
  Checks checks = check_handle("x", x, topk_idx, recv_src_idx, send_head, num_experts, num_ranks, group->size());
  return combine_rows(Op::combine, group, std::move(checks), x, topk_idx, topk_weights, recv_src_idx, send_head,
                      num_experts, num_ranks);
}

}  // namespace
}  // namespace deep_ep

STABLE_TORCH_LIBRARY_IMPL(deep_ep, CPU, library) { library.impl("combine", TORCH_BOX(&deep_ep::combine)); }
