// Sends rows to the ranks of their experts: what dispatch and low_latency_dispatch are made of.
#pragma once

#include "arguments.h"

namespace deep_ep {

// As the op dispatch returns them, in the order of its schema; low latency has no recv_topk_idx and recv_topk_weights.
struct Dispatched {
  Tensor recv_x, recv_topk_idx, recv_topk_weights, num_recv_tokens_per_expert, num_dropped, rank_prefix_matrix,
      channel_prefix_matrix, recv_channel_prefix_matrix, recv_src_idx, send_head;
};

// Runs as the operation `op`; `checks` has been made of its arguments, which are those of the op dispatch.
Dispatched dispatch_rows(Op op, Turn turn, Checks checks, const Tensor& x, const Tensor& topk_idx,
                         const Tensor& topk_weights, int64_t num_experts, int64_t num_ranks, int64_t num_worst_tokens);

}  // namespace deep_ep
