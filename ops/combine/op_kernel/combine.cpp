// combine: as many rounds as the windows make it.
#include "round_trip.h"

extern "C" __global__ __aicore__ void deep_ep_combine(GM_ADDR x, GM_ADDR topk_idx, GM_ADDR topk_weights,
                                                      GM_ADDR recv_src_idx, GM_ADDR send_head, GM_ADDR windows,
                                                      GM_ADDR combined_x, GM_ADDR workspace, GM_ADDR tiling_data) {
  DEEP_EP_KERNEL(tiling, tiling_data);
  deep_ep::RoundTripTensors tensors{};
  tensors.x = x;
  tensors.topk_idx = topk_idx;
  tensors.topk_weights = topk_weights;
  tensors.send_head = send_head;
  tensors.combined = combined_x;
  deep_ep::RoundTrip<DTYPE_X, deep_ep::Trip::combine> op;
  op.init(deep_ep::Op::combine, tensors, windows, AscendC::GetUserWorkspace(workspace), tiling);
  op.process();
}
