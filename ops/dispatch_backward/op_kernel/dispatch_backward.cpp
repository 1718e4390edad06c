// dispatch_backward: as many rounds as the windows make it.
#include "round_trip.h"

extern "C" __global__ __aicore__ void deep_ep_dispatch_backward(GM_ADDR grad_recv_x, GM_ADDR grad_recv_topk_weights,
                                                                GM_ADDR recv_src_idx, GM_ADDR topk_idx,
                                                                GM_ADDR send_head, GM_ADDR windows, GM_ADDR grad_x,
                                                                GM_ADDR grad_topk_weights, GM_ADDR workspace,
                                                                GM_ADDR tiling_data) {
  DEEP_EP_KERNEL(tiling, tiling_data);
  deep_ep::RoundTripTensors tensors{};
  tensors.x = grad_recv_x;
  tensors.recv_weights = grad_recv_topk_weights;
  tensors.topk_idx = topk_idx;
  tensors.send_head = send_head;
  tensors.combined = grad_x;
  tensors.answers = grad_topk_weights;
  deep_ep::RoundTrip<DTYPE_X, deep_ep::Trip::dispatch_backward> op;
  op.init(deep_ep::Op::dispatch_backward, tensors, windows, AscendC::GetUserWorkspace(workspace), tiling);
  op.process();
}
