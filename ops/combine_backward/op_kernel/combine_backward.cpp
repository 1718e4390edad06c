// combine_backward: as many rounds as the windows make it.
#include "round_trip.h"

extern "C" __global__ __aicore__ void deep_ep_combine_backward(GM_ADDR grad_out, GM_ADDR x, GM_ADDR topk_idx,
                                                               GM_ADDR topk_weights, GM_ADDR recv_src_idx,
                                                               GM_ADDR send_head, GM_ADDR windows, GM_ADDR grad_x,
                                                               GM_ADDR grad_topk_weights, GM_ADDR workspace,
                                                               GM_ADDR tiling_data) {
  DEEP_EP_KERNEL(tiling, tiling_data);
  deep_ep::RoundTripTensors tensors{};
  tensors.rows = grad_out;
  tensors.x = x;
  tensors.topk_idx = topk_idx;
  tensors.topk_weights = topk_weights;
  tensors.recv_src_idx = recv_src_idx;
  tensors.send_head = send_head;
  tensors.grad_x = grad_x;
  tensors.answers = grad_topk_weights;
  deep_ep::RoundTrip<DTYPE_X, deep_ep::Trip::combine_backward> op;
  op.init(deep_ep::Op::combine_backward, tensors, windows, AscendC::GetUserWorkspace(workspace), tiling);
  op.process();
}
