#include "npu/launch.h"

namespace deep_ep::npu {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> get_dispatch_layout(Tensor topk_idx, int64_t num_experts, int64_t num_ranks,
                                                               int64_t num_nodes) {
  const char* op = "get_dispatch_layout";
  require(op, check_get_dispatch_layout(topk_idx, num_experts, num_ranks, num_nodes));
  const auto empty = [&](std::initializer_list<int64_t> shape) {
    return empty_tensor(topk_idx, shape, ScalarType::Int);
  };
  Tensor per_rank = empty({num_ranks});
  Tensor per_node = empty({num_nodes});
  Tensor per_expert = empty({num_experts});
  Tensor is_token_in_rank = empty({topk_idx.size(0), num_ranks});
  run(op, "", {topk_idx}, {num_experts, num_ranks, num_nodes}, {per_rank, per_node, per_expert, is_token_in_rank});
  return {per_rank, per_node, per_expert, is_token_in_rank};
}

}  // namespace
}  // namespace deep_ep::npu

STABLE_TORCH_LIBRARY_IMPL(deep_ep, PrivateUse1, library) {
  library.impl("get_dispatch_layout", TORCH_BOX(&deep_ep::npu::get_dispatch_layout));
}
