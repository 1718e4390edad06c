// low_latency_combine: all tokens in one round.
#include "round_trip.h"

extern "C" __global__ __aicore__ void deep_ep_low_latency_combine(GM_ADDR x, GM_ADDR topk_idx, GM_ADDR topk_weights,
                                                                  GM_ADDR recv_src_idx, GM_ADDR layout_range,
                                                                  GM_ADDR send_head, GM_ADDR windows,
                                                                  GM_ADDR combined_x, GM_ADDR workspace,
                                                                  GM_ADDR tiling_data) {
  DEEP_EP_KERNEL(tiling, tiling_data);
  deep_ep::round_trip<DTYPE_X, deep_ep::Trip::combine>(
      deep_ep::Op::low_latency_combine,
      {nullptr, x, nullptr, topk_idx, topk_weights, nullptr, send_head, nullptr, combined_x, nullptr}, windows,
      workspace, tiling);
}
