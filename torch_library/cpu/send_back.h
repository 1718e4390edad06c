// Sends one row and one scalar per expert row back to the tokens they came from, and sums up rows per token: what
// combine, dispatch_backward and the second half of combine_backward are made of.
#pragma once

#include "arguments.h"
#include "handle.h"

namespace deep_ep {

struct SendBack {
  Handle handle{};
  DType dtype = DType::f32;
  int64_t hidden = 0;              // 0: no rows, scalars only
  const void* rows = nullptr;      // [N, hidden]
  const float* weights = nullptr;  // [T, K] of this rank's tokens; nullptr: all 1
  void* sums = nullptr;            // [T, hidden]: sum over k of weight * row, in k order
  bool has_scalars = false;
  const float* scalars = nullptr;  // [N]
  float* scalars_out = nullptr;    // [T, K]; 0 where no row was sent

  uint64_t row_bytes() const { return hidden * bytes_of(dtype); }
  uint64_t scalar_bytes() const { return has_scalars ? sizeof(float) : 0; }

  // A place for all slots of every rank; for use in the check of an Operation.
  std::vector<Region> place(const Operation& op) const;

  // `sums` and `scalars_out` must have been set.
  void run(Operation& op, const std::vector<Region>& regions) const;
};

// What an op that has a handle publishes: made of its arguments if they are right, else `wrong` says what is not.
struct HandleArguments {
  // `expert_rows` is the argument [N, H] called `rows_name`; `checks` has been made of the op's other arguments.
  HandleArguments(Op op, const Group& group, const Checks& checks, const Tensor& expert_rows, const Tensor& topk_idx,
                  const Tensor& recv_src_idx, const Tensor& send_head, int64_t num_experts, int64_t num_ranks);

  Handle handle{};
  Post post{};
  std::vector<int32_t> words;
  std::string wrong;
};

// Each token's weighted sum of the rows x [N, H], as the operation `op`: what combine and low_latency_combine are made
// of.
Tensor combine_rows(Op op, Turn turn, Checks checks, const Tensor& x, const Tensor& topk_idx,
                    const Tensor& topk_weights, const Tensor& recv_src_idx, const Tensor& send_head,
                    int64_t num_experts, int64_t num_ranks);

}  // namespace deep_ep
