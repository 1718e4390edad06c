// Sends rows to the ranks of their experts: what dispatch and low_latency_dispatch are made of.
#pragma once

#include <memory>
#include <optional>

#include "arguments.h"
#include "recv_rows.h"
#include "started.h"

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

// The same of a call that has not begun, and what rows will come to.
struct EarlyDispatched {
  RecvRows recv;
  Dispatched out;
};

// A call of dispatch or, without topk_weights, of low_latency_dispatch.
struct DispatchCall {
  using Early = EarlyDispatched;

  Turn turn;
  Checks checks;  // of the arguments
  Tensor x, topk_idx;
  std::optional<Tensor> topk_weights = {};
  int64_t num_experts, num_ranks;
  int64_t num_rows;  // of the results; 0: as many as arrive
  Results (*in_order)(const Dispatched&);
  std::optional<Blocks> blocks = {};  // rows of low latency lie in blocks on this rank
  bool zero_unused = true;            // rows beyond those received become 0; else they hold anything

  bool is_low_latency() const { return !topk_weights; }
  Op op() const { return is_low_latency() ? Op::low_latency_dispatch : Op::dispatch; }

  // Nothing in exact mode.
  std::optional<EarlyDispatched> make_early(const Group& group);
  Results results(const EarlyDispatched& early) const { return in_order(early.out); }
  static std::unique_ptr<Steps> steps(DispatchCall call, std::optional<EarlyDispatched> early);
};

}  // namespace deep_ep
