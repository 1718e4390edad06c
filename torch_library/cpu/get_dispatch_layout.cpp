#include "arguments.h"
#include "shm/routing.h"

namespace deep_ep {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> get_dispatch_layout(Tensor topk_idx, int64_t num_experts, int64_t num_ranks,
                                                               int64_t num_nodes) {
  Checks checks = check_get_dispatch_layout(topk_idx, num_experts, num_ranks, num_nodes);
  if (checks.passed()) {
    std::vector<int32_t> counts(num_experts);
    const std::string wrong = count_experts(topk_idx.const_data_ptr<int64_t>(), topk_idx.size(0), topk_idx.size(1),
                                            num_experts, counts.data());
    checks.require(wrong.empty(), wrong);
  }
  if (!checks.passed()) throw Error("deep_ep.get_dispatch_layout: " + checks.wrong());

  const auto empty = [&](std::initializer_list<int64_t> shape) {
    return empty_tensor(topk_idx, shape, ScalarType::Int);
  };
  Tensor per_rank = empty({num_ranks});
  Tensor per_node = empty({num_nodes});
  Tensor per_expert = empty({num_experts});
  Tensor is_token_in_rank = empty({topk_idx.size(0), num_ranks});
  dispatch_layout(topk_idx.const_data_ptr<int64_t>(), topk_idx.size(0), topk_idx.size(1), num_experts, num_ranks,
                  num_nodes, per_rank.mutable_data_ptr<int32_t>(), per_node.mutable_data_ptr<int32_t>(),
                  per_expert.mutable_data_ptr<int32_t>(), is_token_in_rank.mutable_data_ptr<int32_t>());
  return {per_rank, per_node, per_expert, is_token_in_rank};
}

}  // namespace
}  // namespace deep_ep

STABLE_TORCH_LIBRARY_IMPL(deep_ep, CPU, library) {
  library.impl("get_dispatch_layout", TORCH_BOX(&deep_ep::get_dispatch_layout));
}
