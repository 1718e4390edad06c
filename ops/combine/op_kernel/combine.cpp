// combine: as many rounds as the windows make it.
#include "round_trip.h"

extern "C" __global__ __aicore__ void deep_ep_combine(GM_ADDR x, GM_ADDR topk_idx, GM_ADDR topk_weights,
                                                      GM_ADDR recv_src_idx, GM_ADDR send_head, GM_ADDR windows,
                                                      GM_ADDR combined_x, GM_ADDR workspace, GM_ADDR tiling_data) {
  DEEP_EP_KERNEL(tiling, tiling_data);
  deep_ep::round_trip<DTYPE_X, deep_ep::Trip::combine>(
      deep_ep::Op::combine,
      {nullptr, x, nullptr, topk_idx, topk_weights, nullptr, send_head, nullptr, combined_x, nullptr}, windows,
      workspace, tiling);
}
