// combine_backward: as many rounds as the windows make it.
#include "round_trip.h"

extern "C" __global__ __aicore__ void deep_ep_combine_backward(GM_ADDR grad_out, GM_ADDR x, GM_ADDR topk_idx,
                                                               GM_ADDR topk_weights, GM_ADDR recv_src_idx,
                                                               GM_ADDR send_head, GM_ADDR windows, GM_ADDR grad_x,
                                                               GM_ADDR grad_topk_weights, GM_ADDR workspace,
                                                               GM_ADDR tiling_data) {
  DEEP_EP_KERNEL(tiling, tiling_data);
  deep_ep::round_trip<DTYPE_X, deep_ep::Trip::combine_backward>(
      deep_ep::Op::combine_backward,
      {grad_out, x, nullptr, topk_idx, topk_weights, recv_src_idx, send_head, grad_x, nullptr, grad_topk_weights},
      windows, workspace, tiling);
}
