#include "send_back.h"

namespace deep_ep {
namespace {

CombineCall low_latency_combine_padded(Tensor x, Tensor topk_idx, Tensor topk_weights, Tensor recv_src_idx,
                                       Tensor layout_range, Tensor send_head, int64_t num_experts, int64_t num_ranks,
                                       GroupName group) {
  return combine_call(Op::low_latency_combine, check_padded_handle, group, x, topk_idx, topk_weights, recv_src_idx,
                      send_head, num_experts, num_ranks, layout_range);
}

}  // namespace
}  // namespace deep_ep

STABLE_TORCH_LIBRARY_IMPL(deep_ep, CPU, library) {
  deep_ep::implement<&deep_ep::low_latency_combine_padded, 1>(library, "low_latency_combine_padded");
}
