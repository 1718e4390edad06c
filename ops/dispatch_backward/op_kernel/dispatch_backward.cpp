// dispatch_backward: as many rounds as the windows make it.
#include "round_trip.h"

extern "C" __global__ __aicore__ void deep_ep_dispatch_backward(GM_ADDR grad_recv_x, GM_ADDR grad_recv_topk_weights,
                                                                GM_ADDR recv_src_idx, GM_ADDR topk_idx,
                                                                GM_ADDR send_head, GM_ADDR windows, GM_ADDR grad_x,
                                                                GM_ADDR grad_topk_weights, GM_ADDR workspace,
                                                                GM_ADDR tiling_data) {
  DEEP_EP_KERNEL(tiling, tiling_data);
  deep_ep::round_trip<DTYPE_GRAD_RECV_X, deep_ep::Trip::dispatch_backward>(
      deep_ep::Op::dispatch_backward,
      {nullptr, grad_recv_x, grad_recv_topk_weights, topk_idx, nullptr, nullptr, send_head, nullptr, grad_x,
       grad_topk_weights},
      windows, workspace, tiling);
}
