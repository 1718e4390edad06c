#include "recv_rows.h"
#include "send_back.h"
#include "shm/attached_tokens.h"
#include "shm/groups.h"

namespace deep_ep {
namespace {

constexpr Op kOp = Op::combine_backward;

// Two operations: grad_out goes to the experts' ranks, where it meets x and becomes grad_x, then <x, grad_out> of every
// row comes back.
struct CombineBackwardCall {
  Turn turn, second_turn;
  Tensor grad_out, x, topk_idx, topk_weights, recv_src_idx, send_head;
  int64_t num_experts, num_ranks;

  Op op() const { return kOp; }
  Results run(Turn rows_turn);
};

Results CombineBackwardCall::run(Turn rows_turn) {
  Turn products_turn = std::move(second_turn);  // which ends here, whatever becomes of the first operation
  const Group& group = rows_turn.group();
  Checks checks = check_handle("x", x, topk_idx, recv_src_idx, send_head, num_experts, num_ranks, group.size());
  checks.tensor("topk_weights", topk_weights, {ScalarType::Float}, topk_idx.sizes());
  if (checks.passed()) checks.tensor("grad_out", grad_out, {x.scalar_type()}, {topk_idx.size(0), x.size(1)});
  HandleArguments arguments(kOp, group, checks, x, topk_idx, recv_src_idx, send_head, num_experts, num_ranks);
  const Handle& handle = arguments.handle;
  Contribution& mine = arguments.contribution;
  if (arguments.right()) {
    const AttachedTokens attached(mine.post, x.element_size());
    mine.expected = x.size(0) * (attached.row_bytes + sizeof(float));
    mine.attached_bytes = attached.bytes;
    mine.attach = [&, attached](std::byte* to) {
      attached.write(to, grad_out.const_data_ptr(), topk_idx.const_data_ptr(), topk_weights.const_data_ptr());
    };
  }

  std::vector<float> products(handle.num_rows, 0.0f);  // <x, grad_out> of every row
  std::optional<Tensor> grad_x;
  {
    RecvRows recv;
    Operation op(std::move(rows_turn), mine, [&](const Operation& op) {
      std::string wrong = Handle::check(op);
      if (wrong.empty())
        recv.place(
            op, x, sizeof(float), [&](int r) { return Handle::rows_at(op, r); },
            [&](int r) { return op.post(r).rows; });
      return wrong;
    });
    recv.allocate(op);
    const auto* gradients = static_cast<const std::byte*>(grad_out.const_data_ptr());
    const auto* weights = topk_weights.const_data_ptr<float>();
    const auto* rows = static_cast<const std::byte*>(x.const_data_ptr());
    const uint64_t row_bytes = recv.row_bytes();
    // `row` is the gradient that has come for row n.
    const auto scale = [&](int64_t n, std::byte* row, float weight) {
      products[n] = dot_and_scale(dtype_of(x), row, rows + n * row_bytes, weight, x.size(1));
    };
    if (op.all_attached()) {
      op.enter(Phase::reduce);
      for (int64_t n = 0; n < handle.num_rows; ++n) {
        const int32_t *source = handle.recv_src_idx + 3 * n, from = source[0];
        if (from < 0) continue;
        const AttachedTokens attached(op.post(from), x.element_size());
        const std::byte* at = op.attachment(from);
        const bool own = from == op.rank();
        std::byte* row = recv.rows() + n * row_bytes;
        std::memcpy(row, (own ? gradients : at) + source[1] * row_bytes, row_bytes);
        scale(n, row, (own ? weights : attached.weights(at))[source[1] * handle.top_k + source[2]]);
      }
    } else {
      op.exchange(
          handle.sends(), recv.regions(), row_bytes, sizeof(float),
          [&](const Entry& entry, std::byte* meta) {
            std::memcpy(meta, weights + entry.row, sizeof(float));
            return gradients + entry.row / handle.top_k * row_bytes;
          },
          [&](int64_t first, int64_t end, std::byte* chunk, std::byte* metas) {
            std::byte* row = recv.settle(first, end, chunk);
            for (int64_t n = first; n < end; ++n, row += row_bytes, metas += sizeof(float)) {
              float weight;
              std::memcpy(&weight, metas, sizeof weight);
              scale(n, row, weight);
            }
          });
    }
    grad_x = recv.take(op, x, RecvRows::Unused::zero);
    op.finish();
  }

  Contribution second{.post = mine.post};
  second.post.op = Op::combine_backward_weights;
  SendBack back{.handle = handle, .has_scalars = true, .scalars = products.data()};
  back.attach_to(second);
  std::vector<Region> regions;
  Operation op(std::move(products_turn), second, [&](const Operation& op) {
    regions = back.place(op);
    return std::string();
  });
  Tensor grad_topk_weights = empty_tensor(topk_weights, {topk_idx.size(0), topk_idx.size(1)});
  back.scalars_out = grad_topk_weights.mutable_data_ptr<float>();
  back.run(op, regions);
  op.finish();
  return {*grad_x, grad_topk_weights};
}

CombineBackwardCall combine_backward(Tensor grad_out, Tensor x, Tensor topk_idx, Tensor topk_weights,
                                     Tensor recv_src_idx, Tensor send_head, int64_t num_experts, int64_t num_ranks,
                                     GroupName group_name) {
  const std::shared_ptr<Group> group = groups::get(name_of(kOp), group_name.value);
  Turn first(group), second(group);
  return {std::move(first), std::move(second), grad_out,  x,           topk_idx,
          topk_weights,     recv_src_idx,      send_head, num_experts, num_ranks};
}

}  // namespace
}  // namespace deep_ep

STABLE_TORCH_LIBRARY_IMPL(deep_ep, CPU, library) {
  deep_ep::implement<&deep_ep::combine_backward, 2>(library, "combine_backward");
}
