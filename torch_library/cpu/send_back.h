// Sends one row and one scalar per expert row back to the tokens they came from, and sums up rows per token: what
// combine, dispatch_backward and the second half of combine_backward are made of.
#pragma once

#include <memory>

#include "arguments.h"
#include "shm/handle.h"
#include "started.h"

namespace deep_ep {

struct SendBack {
  Handle handle{};
  DType dtype = DType::f32;
  int64_t hidden = 0;              // 0: no rows, scalars only
  const void* rows = nullptr;      // [N, hidden], or in blocks:
  std::vector<int64_t> places;     // unless empty: where row n is among `rows`
  const float* weights = nullptr;  // [T, K] of this rank's tokens; nullptr: all 1
  void* sums = nullptr;            // [T, hidden]: sum over k of weight * row, in k order
  bool has_scalars = false;
  const float* scalars = nullptr;  // [N]
  float* scalars_out = nullptr;    // [T, K]; 0 where no row was sent

  uint64_t row_bytes() const { return hidden * bytes_of(dtype); }
  const std::byte* row(int64_t n) const {
    return static_cast<const std::byte*>(rows) + (places.empty() ? n : places[n]) * row_bytes();
  }
  uint64_t scalar_bytes() const { return has_scalars ? sizeof(float) : 0; }

  // What `attach_to` attaches. Needs of the handle only recv_src_idx, num_rows and rank.
  uint64_t attached_bytes(bool own) const;

  // Attaches what there is to send; with `own`, what goes to this rank itself, too. `mine` is for as long as this is.
  void attach_to(Contribution& mine, bool own = false) const;

  // From here on, rows are those of the own attachment at `at`, which has them all.
  void read_attached(const std::byte* at);

  // A place for all slots of every rank; for use in the check of an Operation.
  std::vector<Region> place(const Operation& op) const;

  // `sums` and `scalars_out` must have been set.
  void run(Operation& op, const std::vector<Region>& regions) const;

 private:
  // Whether row n is attached.
  bool attaches(int64_t n, bool own) const { return own ? handle.recv_src_idx[3 * n] >= 0 : handle.goes_away(n); }

  // What a rank of `num_rows` rows attaches: the scalars of all; an int32 for each, its place among those that are
  // attached; and the latter, in row order.
  struct Attached {
    uint64_t places_at, rows_at;

    Attached(const SendBack& back, int64_t num_rows)
        : places_at(num_rows * back.scalar_bytes()),
          rows_at(round_up(places_at + (back.hidden > 0 ? num_rows * sizeof(int32_t) : 0), kLine)) {}
  };
};

// What an op that has a handle brings: made of its arguments, if they are right.
struct HandleArguments {
  // `expert_rows` is the argument [N, H]; `checks` has been made of the op's other arguments.
  HandleArguments(Op op, const Group& group, const Checks& checks, const Tensor& expert_rows, const Tensor& topk_idx,
                  const Tensor& recv_src_idx, const Tensor& send_head, int64_t num_experts, int64_t num_ranks,
                  const Tensor* layout_range = nullptr);

  bool right() const { return contribution.rejected.empty(); }

  Handle handle{};
  Contribution contribution;
};

// A call of combine, or of a low-latency combine: each token's weighted sum of the rows x [N, H], or
// [L, rows of an expert, H].
struct CombineCall {
  using Early = Tensor;

  Op code;
  Turn turn;
  Checks checks;  // of the arguments
  Tensor x, topk_idx, topk_weights, recv_src_idx, send_head;
  int64_t num_experts, num_ranks;
  std::optional<Tensor> layout_range = {};

  Op op() const { return code; }
  std::optional<Tensor> make_early(const Group& group);
  Results results(const Tensor& early) const { return {early}; }
  static std::unique_ptr<Steps> steps(CombineCall call, std::optional<Tensor> early);
};

// Made of the op's arguments. `check`: check_handle, or check_padded_handle.
CombineCall combine_call(Op op, decltype(&check_handle) check, const GroupName& group, const Tensor& x,
                         const Tensor& topk_idx, const Tensor& topk_weights, const Tensor& recv_src_idx,
                         const Tensor& send_head, int64_t num_experts, int64_t num_ranks,
                         const std::optional<Tensor>& layout_range = {});

}  // namespace deep_ep
