#include "send_back.h"

namespace deep_ep {
namespace {

Tensor combine(Tensor x, Tensor topk_idx, Tensor topk_weights, Tensor recv_src_idx, Tensor send_head,
               int64_t num_experts, int64_t num_ranks, GroupName group_name) {
  const std::shared_ptr<Group> group = groups::get("combine", group_name.value);
  Checks checks = check_handle("x", x, topk_idx, recv_src_idx, send_head, num_experts, num_ranks, group->size());
  checks.tensor("topk_weights", topk_weights, {ScalarType::Float}, sizes_of(topk_idx));
  const HandleArguments arguments(Op::combine, *group, checks, x, topk_idx, recv_src_idx, send_head, num_experts,
                                  num_ranks);
  SendBack back{.handle = arguments.handle};
  std::vector<Region> regions;
  Operation op(*group, arguments.post, arguments.words, arguments.wrong, [&](const Operation& op) {
    back.dtype = dtype_of(x);
    back.hidden = x.size(1);
    back.rows = x.const_data_ptr();
    back.weights = topk_weights.const_data_ptr<float>();
    regions = back.place(op);
    return Handle::check(op);
  });

  Tensor combined = new_empty(x, {topk_idx.size(0), x.size(1)});
  back.sums = combined.mutable_data_ptr();
  back.run(op, regions);
  op.finish();
  return combined;
}

}  // namespace
}  // namespace deep_ep

STABLE_TORCH_LIBRARY_IMPL(deep_ep, CPU, library) { library.impl("combine", TORCH_BOX(&deep_ep::combine)); }
