// Sends rows to the ranks of their experts: what dispatch and low_latency_dispatch are made of.
#pragma once

#include <optional>

#include "arguments.h"
#include "recv_rows.h"

namespace deep_ep {

// What the ops return, by the names that dispatch has for it.
struct Dispatched {
  Tensor recv_x, num_recv_tokens_per_expert, recv_channel_prefix_matrix, recv_src_idx, send_head;
  // What low latency does without.
  struct Rest {
    Tensor recv_topk_idx, recv_topk_weights, num_dropped, rank_prefix_matrix, channel_prefix_matrix;
  };
  std::optional<Rest> rest;
  // What blocks of rows add.
  struct Padded {
    Tensor recv_scales, recv_count, src_info, layout;
  };
  std::optional<Padded> padded;
};

// The op dispatch or, without topk_weights, low_latency_dispatch; `checks` has been made of its arguments. `early`: its
// results, where they were made before. `blocks`: rows of low latency lie in blocks on this rank. `zero_unused`: rows
// beyond those received become 0; else they hold anything.
struct EarlyDispatched {
  RecvRows recv;
  Dispatched out;
};
Dispatched dispatch_rows(Turn turn, Checks checks, const Tensor& x, const Tensor& topk_idx,
                         const std::optional<Tensor>& topk_weights, int64_t num_experts, int64_t num_ranks,
                         int64_t num_worst_tokens, std::optional<EarlyDispatched> early = std::nullopt,
                         const Blocks* blocks = nullptr, bool zero_unused = true);

// For right arguments, with num_worst_tokens rows.
EarlyDispatched early_results(const Group& group, const Tensor& x, const Tensor& topk_idx, bool low_latency,
                              int64_t num_experts, int64_t num_ranks, int64_t num_worst_tokens,
                              const Blocks* blocks = nullptr);

}  // namespace deep_ep
