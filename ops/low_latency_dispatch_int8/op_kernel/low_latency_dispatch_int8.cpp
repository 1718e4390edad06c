// low_latency_dispatch_int8: rows are quantised by the sender.
#include "dispatch.h"

extern "C" __global__ __aicore__ void deep_ep_low_latency_dispatch_int8(GM_ADDR x, GM_ADDR topk_idx, GM_ADDR windows,
                                                                        GM_ADDR recv_data, GM_ADDR recv_scales,
                                                                        GM_ADDR recv_count, GM_ADDR recv_src_idx,
                                                                        GM_ADDR layout_range, GM_ADDR send_head,
                                                                        GM_ADDR workspace, GM_ADDR tiling_data) {
  DEEP_EP_KERNEL(tiling, tiling_data);
  deep_ep::low_latency_dispatch<deep_ep::Int8Rows<DTYPE_X, false>>(
      deep_ep::Op::low_latency_dispatch_int8, x, topk_idx, windows, recv_data, recv_scales, recv_count, recv_src_idx,
      layout_range, send_head, workspace, tiling);
}
