#include "send_back.h"

#include <algorithm>
#include <cstring>

#include "shm/groups.h"

namespace deep_ep {

uint64_t SendBack::attached_bytes(bool own) const {
  int64_t rows_sent = 0;
  for (int64_t n = 0; n < handle.num_rows; ++n) rows_sent += attaches(n, own);
  return Attached(*this, handle.num_rows).rows_at + rows_sent * row_bytes();
}

void SendBack::attach_to(Contribution& mine, bool own) const {
  mine.attached_bytes = attached_bytes(own);
  mine.attach = [this, own](std::byte* to) {
    const Attached at(*this, handle.num_rows);
    std::memcpy(to, scalars, handle.num_rows * scalar_bytes());
    int32_t place = 0;
    for (int64_t n = 0; n < handle.num_rows && hidden > 0; ++n) {
      if (!attaches(n, own)) continue;
      std::memcpy(to + at.places_at + n * sizeof place, &place, sizeof place);
      std::memcpy(to + at.rows_at + place++ * row_bytes(), row(n), row_bytes());
    }
  };
  mine.attaches_own = own;
}

void SendBack::read_attached(const std::byte* at) {
  const Attached attached(*this, handle.num_rows);
  const auto* of_row = reinterpret_cast<const int32_t*>(at + attached.places_at);
  places.assign(of_row, of_row + handle.num_rows);
  rows = at + attached.rows_at;
}

std::vector<Region> SendBack::place(const Operation& op) const {
  std::vector<Region> regions;
  for (int r = 0; r < op.size() && !op.all_attached(); ++r)
    regions.push_back(
        op.staging_region(r, op.post(r).tokens * handle.top_k, handle.top_k, row_bytes(), scalar_bytes()));
  return regions;
}

void SendBack::run(Operation& op, const std::vector<Region>& regions) const {
  struct Place {
    const std::byte* row;
    const std::byte* scalar;
  };
  const int64_t K = handle.top_k;
  const auto place_in = [&](const void* rows, const void* scalars, int64_t n) {
    return Place{static_cast<const std::byte*>(rows) + n * row_bytes(),
                 static_cast<const std::byte*>(scalars) + n * scalar_bytes()};
  };
  const auto own_place = [&](int64_t n) {
    return Place{row(n), reinterpret_cast<const std::byte*>(scalars) + n * scalar_bytes()};
  };
  // What a token sums up: one is done while the next one's rows are fetched.
  std::vector<const void*> parts(2 * K);
  std::vector<float> factors(2 * K);
  // Of the slots first..end-1; arrived(slot, rank, row) is where the row that `rank` has sent lies.
  const auto reduce = [&](int64_t first, int64_t end, const auto& arrived) {
    const auto terms_of = [&](int64_t begin) {
      const int64_t at = begin / K % 2 * K;
      int64_t count = 0;
      for (int64_t slot = begin; slot < std::min(begin + K, end); ++slot) {
        if (has_scalars) scalars_out[slot] = 0.0f;
        const int64_t head = handle.send_head[slot];
        if (head < 0) continue;
        // What this rank sent to itself is where it was.
        const int64_t from = handle.destination(slot);
        const Place place = from == op.rank() ? own_place(head) : arrived(slot, from, head);
        if (has_scalars) std::memcpy(scalars_out + slot, place.scalar, sizeof(float));
        parts[at + count] = place.row;
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

  if (op.all_attached()) {
    op.enter(Phase::reduce);
    reduce(0, handle.num_tokens * K, [&](int64_t, int64_t from, int64_t row) {
      const std::byte* attached = op.attachment(static_cast<int>(from));
      const Attached at(*this, op.post(static_cast<int>(from)).rows);
      int32_t place = 0;
      if (hidden > 0) std::memcpy(&place, attached + at.places_at + row * sizeof place, sizeof place);
      return Place{attached + at.rows_at + place * row_bytes(), attached + row * scalar_bytes()};
    });
    return;
  }
  op.exchange(
      handle.returns(), regions, row_bytes(), scalar_bytes(),
      [&](const Entry& entry, std::byte* scalar) {
        const Place place = own_place(entry.row);
        std::memcpy(scalar, place.scalar, scalar_bytes());
        return place.row;
      },
      [&](int64_t first, int64_t end, std::byte* arrived_rows, std::byte* arrived_scalars) {
        reduce(first, end,
               [&](int64_t slot, int64_t, int64_t) { return place_in(arrived_rows, arrived_scalars, slot - first); });
      });
}

HandleArguments::HandleArguments(Op op, const Group& group, const Checks& checks, const Tensor& expert_rows,
                                 const Tensor& topk_idx, const Tensor& recv_src_idx, const Tensor& send_head,
                                 int64_t num_experts, int64_t num_ranks, const Tensor* layout_range) {
  Post& post = contribution.post;
  post.op = op;
  contribution.rejected = checks.wrong();
  if (!checks.passed()) return;
  handle = {recv_src_idx.const_data_ptr<int32_t>(),
            topk_idx.const_data_ptr<int64_t>(),
            send_head.const_data_ptr<int32_t>(),
            recv_src_idx.size(0),
            topk_idx.size(0),
            topk_idx.size(1),
            num_experts,
            num_ranks,
            group.rank(),
            layout_range != nullptr ? layout_range->const_data_ptr<int32_t>() : nullptr};
  post.tokens = handle.num_tokens;
  post.hidden = expert_rows.size(expert_rows.dim() - 1);
  post.top_k = handle.top_k;
  post.experts = num_experts;
  post.dtype = static_cast<int64_t>(dtype_of(expert_rows));
  post.rows = handle.num_rows;
  contribution.words = handle.words(contribution.rejected);
}

namespace {

// Where each row is if every expert has a block of so many; sets `wrong` if that is not what layout_range says.
std::vector<int64_t> places_in_blocks(const Handle& handle, int64_t block, std::string& wrong) {
  std::vector<int64_t> places(handle.num_rows);
  const int64_t R = handle.num_ranks, L = handle.num_experts / R;
  int64_t begin = 0;
  for (int64_t l = 0; l < L && wrong.empty(); ++l) {
    const int64_t end = handle.layout_range[(l + 1) * R - 1];
    if (end < begin || end > handle.num_rows || end - begin > block)
      wrong = str("layout_range says rows ", begin, " to ", end, " of local expert ", l, "; x has ", block,
                  " for each expert, and recv_src_idx ", handle.num_rows, " in all");
    else
      for (int64_t n = begin; n < end; ++n) places[n] = l * block + n - begin;
    begin = end;
  }
  for (int64_t n = begin; n < handle.num_rows && wrong.empty(); ++n)
    if (handle.recv_src_idx[3 * n] >= 0) wrong = str("recv_src_idx has row ", n, "; by layout_range there are ", begin);
  return places;
}

}  // namespace

CombineCall combine_call(Op op, decltype(&check_handle) check, const GroupName& group, const Tensor& x,
                         const Tensor& topk_idx, const Tensor& topk_weights, const Tensor& recv_src_idx,
                         const Tensor& send_head, int64_t num_experts, int64_t num_ranks,
                         const std::optional<Tensor>& layout_range) {
  Turn turn = groups::get(name_of(op), group.value);
  Checks checks = check("x", x, topk_idx, recv_src_idx, send_head, num_experts, num_ranks, turn.group().size());
  if (layout_range) checks.tensor("layout_range", *layout_range, {ScalarType::Int}, {num_experts});
  checks.tensor("topk_weights", topk_weights, {ScalarType::Float}, topk_idx.sizes());
  return {op,           std::move(turn), std::move(checks), x,         topk_idx,    topk_weights,
          recv_src_idx, send_head,       num_experts,       num_ranks, layout_range};
}

std::optional<Tensor> CombineCall::make_early(const Group&) {
  return deep_ep::make_early(checks, [&] { return empty_tensor(x, {topk_idx.size(0), x.size(x.dim() - 1)}); });
}

namespace {

// A call on its way.
class Combining : public Steps {
 public:
  Combining(CombineCall call, std::optional<Tensor> early) : call_(std::move(call)), early_(std::move(early)) {}

  bool sends_at_once() override {
    if (!call_.checks.passed()) return true;
    const Tensor &x = call_.x, &sources = call_.recv_src_idx;
    const int64_t N = sources.size(0);
    if (N * 3 * sizeof(int32_t) > kAttachmentBytes) return false;  // too many to look at
    SendBack all{.handle = {.recv_src_idx = sources.const_data_ptr<int32_t>(), .num_rows = N},
                 .dtype = dtype_of(x),
                 .hidden = x.size(x.dim() - 1)};
    return keeps_ = all.attached_bytes(true) <= kAttachmentBytes;
  }

  void send(Turn turn) override {
    const Tensor &x = call_.x, &topk_idx = call_.topk_idx, &topk_weights = call_.topk_weights;
    call_.checks.memory("x", x).memory("topk_idx", topk_idx).memory("topk_weights", topk_weights);
    HandleArguments arguments(call_.code, turn.group(), call_.checks, x, topk_idx, call_.recv_src_idx, call_.send_head,
                              call_.num_experts, call_.num_ranks, call_.layout_range ? &*call_.layout_range : nullptr);
    back_.handle = arguments.handle;
    if (arguments.right()) {
      back_.dtype = dtype_of(x);
      back_.hidden = arguments.contribution.post.hidden;
      back_.rows = x.const_data_ptr();
      if (x.dim() == 3) back_.places = places_in_blocks(arguments.handle, x.size(1), arguments.contribution.rejected);
      back_.weights = topk_weights.const_data_ptr<float>();
      back_.attach_to(arguments.contribution, keeps_);
    }
    op_.emplace(std::move(turn), std::move(arguments.contribution));
    if (keeps_ && op_->has_attached()) keep();
  }

  Results receive() override {
    std::vector<Region> regions;
    op_->receive([&](const Operation& op) {
      regions = back_.place(op);
      return Handle::check(op);
    });
    Tensor combined = early_ ? *early_ : empty_tensor(call_.x, {call_.topk_idx.size(0), back_.hidden});
    back_.sums = combined.mutable_data_ptr();
    back_.run(*op_, regions);
    op_->finish();
    return {combined};
  }

  void end() override { op_.reset(); }

 private:
  // What the program may write to from here on is not looked at any more.
  void keep() {
    Handle& handle = back_.handle;
    const int64_t slots = handle.num_tokens * handle.top_k;
    ids_.assign(handle.topk_idx, handle.topk_idx + slots);
    heads_.assign(handle.send_head, handle.send_head + slots);
    weights_.assign(back_.weights, back_.weights + slots);
    handle.topk_idx = ids_.data();
    handle.send_head = heads_.data();
    back_.weights = weights_.data();
    back_.read_attached(op_->attachment(op_->rank()));
  }

  CombineCall call_;
  std::optional<Tensor> early_;
  SendBack back_;
  bool keeps_ = false;  // rows, in the attachment, and:
  std::vector<int64_t> ids_;
  std::vector<int32_t> heads_;
  std::vector<float> weights_;
  std::optional<Operation> op_;  // ends before what it writes to
};

}  // namespace

std::unique_ptr<Steps> CombineCall::steps(CombineCall call, std::optional<Tensor> early) {
  return std::make_unique<Combining>(std::move(call), std::move(early));
}

}  // namespace deep_ep
