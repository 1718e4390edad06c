#include "send_back.h"

namespace deep_ep {
namespace {

CombineCall combine(Tensor x, Tensor topk_idx, Tensor topk_weights, Tensor recv_src_idx, Tensor send_head,
                    int64_t num_experts, int64_t num_ranks, GroupName group) {
  return combine_call(Op::combine, check_handle, group, x, topk_idx, topk_weights, recv_src_idx, send_head, num_experts,
                      num_ranks);
}

}  // namespace
}  // namespace deep_ep

STABLE_TORCH_LIBRARY_IMPL(deep_ep, CPU, library) { deep_ep::implement<&deep_ep::combine, 1>(library, "combine"); }
