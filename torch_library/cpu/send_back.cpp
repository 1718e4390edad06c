#include "send_back.h"

#include <algorithm>
#include <cstring>

namespace deep_ep {

std::vector<Region> SendBack::place(const Operation& op) const {
  std::vector<Region> regions;
  for (int r = 0; r < op.size(); ++r)
    regions.push_back(
        op.staging_region(r, op.post(r).tokens * handle.top_k, handle.top_k, row_bytes(), scalar_bytes()));
  return regions;
}

void SendBack::run(Operation& op, const std::vector<Region>& regions) const {
  const int64_t K = handle.top_k;
  const auto* own_rows = static_cast<const std::byte*>(rows);
  const auto write = [&](const Entry& entry, std::byte* scalar) {
    if (has_scalars) std::memcpy(scalar, scalars + entry.row, sizeof(float));
    return own_rows + entry.row * row_bytes();
  };
  // The terms of two tokens: one is summed up while the next one's rows are fetched.
  std::vector<const void*> parts(2 * K);
  std::vector<float> factors(2 * K);
  const auto consume = [&](int64_t first, int64_t end, std::byte* arrived_rows, std::byte* arrived_scalars) {
    const auto terms_of = [&](int64_t begin) {
      const int64_t at = begin / K % 2 * K;
      int64_t count = 0;
      for (int64_t slot = begin; slot < std::min(begin + K, end); ++slot) {
        if (has_scalars) scalars_out[slot] = 0.0f;
        const int64_t head = handle.send_head[slot];
        if (head < 0) continue;
        // What this rank sent to itself is where it was.
        const bool own = handle.destination(slot) == op.rank();
        if (has_scalars)
          std::memcpy(scalars_out + slot,
                      own ? reinterpret_cast<const std::byte*>(scalars + head)
                          : arrived_scalars + (slot - first) * sizeof(float),
                      sizeof(float));
        parts[at + count] = own ? own_rows + head * row_bytes() : arrived_rows + (slot - first) * row_bytes();
        factors[at + count++] = weights != nullptr ? weights[slot] : 1.0f;
      }
      return Terms{parts.data() + at, factors.data() + at, count};
    };
    Terms terms = terms_of(first);
    for (int64_t begin = first; begin < end; begin += K) {
      const Terms next = terms_of(begin + K);
      if (hidden > 0) weighted_sum(dtype, static_cast<std::byte*>(sums) + begin / K * row_bytes(), terms, next, hidden);
      terms = next;
    }
  };
  op.exchange(handle.returns(), regions, row_bytes(), scalar_bytes(), write, consume);
}

HandleArguments::HandleArguments(Op op, const Group& group, const Checks& checks, const Tensor& expert_rows,
                                 const Tensor& topk_idx, const Tensor& recv_src_idx, const Tensor& send_head,
                                 int64_t num_experts, int64_t num_ranks)
    : wrong(checks.wrong()) {
  post.op = op;
  if (!checks.passed()) return;
  handle = {recv_src_idx.const_data_ptr<int32_t>(),
            topk_idx.const_data_ptr<int64_t>(),
            send_head.const_data_ptr<int32_t>(),
            recv_src_idx.size(0),
            topk_idx.size(0),
            topk_idx.size(1),
            num_experts,
            num_ranks,
            group.rank()};
  post.tokens = handle.num_tokens;
  post.hidden = expert_rows.size(1);
  post.top_k = handle.top_k;
  post.experts = num_experts;
  post.dtype = static_cast<int64_t>(dtype_of(expert_rows));
  post.rows = handle.num_rows;
  words = handle.words(wrong);
}

Tensor combine_rows(Op op_code, Turn turn, Checks checks, const Tensor& x, const Tensor& topk_idx,
                    const Tensor& topk_weights, const Tensor& recv_src_idx, const Tensor& send_head,
                    int64_t num_experts, int64_t num_ranks) {
  checks.tensor("topk_weights", topk_weights, {ScalarType::Float}, sizes_of(topk_idx));
  const HandleArguments arguments(op_code, turn.group(), checks, x, topk_idx, recv_src_idx, send_head, num_experts,
                                  num_ranks);
  SendBack back{.handle = arguments.handle};
  std::vector<Region> regions;
  Operation op(std::move(turn), arguments.post, arguments.words, arguments.wrong, [&](const Operation& op) {
    back.dtype = dtype_of(x);
    back.hidden = x.size(1);
    back.rows = x.const_data_ptr();
    back.weights = topk_weights.const_data_ptr<float>();
    regions = back.place(op);
    return Handle::check(op);
  });

  Tensor combined = new_empty(x, {topk_idx.size(0), x.size(1)});
  back.sums = combined.mutable_data_ptr();
  back.run(op, regions);
  op.finish();
  return combined;
}

}  // namespace deep_ep
