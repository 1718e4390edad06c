// dispatch_int8_exact: dispatch_exact with rows that are quantised by the sender.
#include "dispatch.h"

extern "C" __global__ __aicore__ void deep_ep_dispatch_int8_exact(
    GM_ADDR x, GM_ADDR topk_idx, GM_ADDR topk_weights, GM_ADDR windows, GM_ADDR recv_data, GM_ADDR recv_scales,
    GM_ADDR recv_topk_idx, GM_ADDR recv_topk_weights, GM_ADDR num_recv_tokens_per_expert, GM_ADDR num_dropped,
    GM_ADDR rank_prefix_matrix, GM_ADDR channel_prefix_matrix, GM_ADDR recv_channel_prefix_matrix, GM_ADDR recv_src_idx,
    GM_ADDR send_head, GM_ADDR shapes, GM_ADDR workspace, GM_ADDR tiling_data) {
  DEEP_EP_KERNEL(tiling, tiling_data);
  deep_ep::normal_dispatch<deep_ep::Int8Rows<DTYPE_X, true>>(
      deep_ep::Op::dispatch_int8, x, topk_idx, topk_weights, windows,
      {recv_data, recv_scales, recv_topk_idx, recv_topk_weights, num_recv_tokens_per_expert, num_dropped,
       rank_prefix_matrix, channel_prefix_matrix, recv_channel_prefix_matrix, recv_src_idx, send_head, shapes},
      workspace, tiling);
}
