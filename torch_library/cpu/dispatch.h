// Sends rows to the ranks of their experts: what dispatch and low_latency_dispatch are made of.
#pragma once

#include <optional>

#include "arguments.h"

namespace deep_ep {

// What the ops return, by the names that dispatch has for it.
struct Dispatched {
  Tensor recv_x, num_recv_tokens_per_expert, recv_channel_prefix_matrix, recv_src_idx, send_head;
  // What low latency does without.
  struct Rest {
    Tensor recv_topk_idx, recv_topk_weights, num_dropped, rank_prefix_matrix, channel_prefix_matrix;
  };
  std::optional<Rest> rest;
};

// The op dispatch or, without topk_weights, low_latency_dispatch; `checks` has been made of its arguments.
Dispatched dispatch_rows(Turn turn, Checks checks, const Tensor& x, const Tensor& topk_idx,
                         const std::optional<Tensor>& topk_weights, int64_t num_experts, int64_t num_ranks,
                         int64_t num_worst_tokens);

}  // namespace deep_ep
