// low_latency_combine: all tokens in one round.
#include "combine.h"

extern "C" __global__ __aicore__ void deep_ep_low_latency_combine(GM_ADDR x, GM_ADDR topk_idx, GM_ADDR topk_weights,
                                                                  GM_ADDR recv_src_idx, GM_ADDR layout_range,
                                                                  GM_ADDR send_head, GM_ADDR windows,
                                                                  GM_ADDR combined_x, GM_ADDR workspace,
                                                                  GM_ADDR tiling_data) {
  DEEP_EP_KERNEL(tiling, tiling_data);
  deep_ep::Combine<DTYPE_X> op;
  op.init(deep_ep::Op::low_latency_combine, x, topk_idx, topk_weights, send_head, windows, combined_x,
          AscendC::GetUserWorkspace(workspace), tiling);
  op.process();
}
