#include "dispatch.h"

#include <algorithm>
#include <limits>
#include <map>
#include <optional>

#include "host_memory.h"
#include "recv_rows.h"
#include "shm/attached_tokens.h"
#include "shm/groups.h"
#include "shm/private_memory.h"
#include "shm/routing.h"

namespace deep_ep {
namespace {

// What travels with a row.
struct RowMeta {
  int32_t token;
  int32_t k;
  float weight;
};

// Where every (token, k) of `rank` goes: the row at its expert's rank, -1 if there is none. Calls
// placed(dest, row, token * K + k) for each that has a row.
template <typename Placed>
void place_tokens(const int64_t* ids, int64_t count, const Routing& routing, int rank, int32_t* head, Placed&& placed) {
  std::vector<int64_t> next = routing.first_rows(rank);
  const int64_t L = routing.num_local_experts();
  for (int64_t i = 0; i < count; ++i) {
    head[i] = -1;
    if (ids[i] < 0) continue;
    const int64_t dest = ids[i] / L, row = next[ids[i]]++;
    if (row >= routing.delivered(dest)) continue;
    head[i] = static_cast<int32_t>(row);
    placed(static_cast<int32_t>(dest), head[i], static_cast<int32_t>(i));
  }
}

// All results of N rows but recv_x.
Dispatched make_results(const Tensor& x, const Tensor& topk_idx, bool low_latency, int64_t num_experts,
                        int64_t num_ranks, int64_t N, const Blocks* blocks) {
  const int64_t T = x.size(0), K = topk_idx.size(1), R = num_ranks, L = num_experts / R;
  const auto empty = [&](std::initializer_list<int64_t> shape, ScalarType dtype) {
    return empty_tensor(x, shape, dtype);
  };
  Dispatched out{
      .num_recv_tokens_per_expert = empty({L}, ScalarType::Long),
      .recv_channel_prefix_matrix = low_latency ? empty({L * R}, ScalarType::Int) : empty({L, R}, ScalarType::Int),
      .recv_src_idx = empty({N, 3}, ScalarType::Int),
      .send_head = empty({T, K}, ScalarType::Int)};
  if (!low_latency)
    out.rest = {empty({N, K}, ScalarType::Long), empty({N, K}, ScalarType::Float), empty({}, ScalarType::Long),
                empty({R, R}, ScalarType::Int), empty({R, L}, ScalarType::Int)};
  if (blocks != nullptr)
    out.padded = {.recv_count = empty({L}, ScalarType::Int),
                  .src_info = empty({L, blocks->size}, ScalarType::Int),
                  .layout = empty({L, R}, ScalarType::Long)};
  return out;
}

// Makes what rows come to.
void take_blocks(RecvRows& recv, const Blocks& blocks, const Tensor& x, Dispatched& out) {
  recv.make_blocks(blocks, x);
  out.recv_x = recv.blocks().rows();
  out.padded->recv_scales = recv.blocks().scales();
}

// Of rows in blocks: where each one that arrives at `rank` belongs; and everything but the rows, but for tokens.
std::vector<int64_t> arrange(const Routing& routing, int rank, const Blocks& blocks, const Dispatched::Padded& out) {
  auto* counts = out.recv_count.mutable_data_ptr<int32_t>();
  auto* layout = out.layout.mutable_data_ptr<int64_t>();
  std::fill_n(counts, blocks.count, 0);
  std::fill_n(out.src_info.mutable_data_ptr<int32_t>(), blocks.count * blocks.size, -1);
  std::vector<int64_t> places;
  places.reserve(routing.delivered(rank));
  routing.segments(rank, [&](int64_t l, int64_t s, int64_t first, int64_t end) {
    layout[l * routing.num_ranks() + s] = static_cast<int64_t>(counts[l]) << 32 | (end - first);
    for (; first < end; ++first) places.push_back(l * blocks.size + counts[l]++);
  });
  return places;
}

// Bytes that a rank takes for a row of recv_x and of what goes with it.
int64_t row_memory(const Post& post, int64_t row_bytes) {
  const int64_t ids = post.op == Op::dispatch ? post.top_k * (sizeof(int64_t) + sizeof(float)) : 0;
  return row_bytes + 3 * sizeof(int32_t) + ids;
}

const char* asks_for_rows(Op op) {
  return op == Op::dispatch ? "num_worst_tokens" : "num_max_dispatch_tokens_per_rank";
}

// What this rank has seen of the memory there is, if it is about to take much.
void look_at_memory(Checks& checks, Contribution& mine, const Group& group, uint64_t bytes) {
  if (bytes < group.much()) return;
  const HostMemory memory = host_memory();
  mine.post.of_host = memory.host.free();
  if (memory.cgroup) {
    mine.post.of_cgroup = memory.cgroup->free();
    mine.post.cgroup = memory.cgroup->id;
  }
  mine.post.spare = group.spare() + spare_private_memory();
  checks.require(mine.post.rows == 0 || can_map(bytes), asks_for_rows(mine.post.op), " asks for ", mine.post.rows,
                 " rows, of ", bytes, " bytes with what goes with them, which this process may not have");
}

// What is wrong if the host, or a cgroup of ranks, has too little memory for what they receive: the same on all ranks.
std::string too_much_memory(const Operation& op, const Routing& routing, int64_t element_size) {
  struct Demand {
    uint64_t available = 0, wanted = 0;
    std::string ranks;
  };
  Demand host;
  std::map<uint64_t, Demand> cgroups;
  for (int r = 0; r < op.size(); ++r) {
    const Post& post = op.post(r);
    const int64_t rows = routing.total_rows(r), bytes = row_memory(post, post.hidden * element_size);
    const auto add = [&](Demand& demand, uint64_t available) {
      // Of those that looked the first one has seen the most, before others took theirs.
      demand.available = std::max(demand.available, available);
      demand.wanted += rows * bytes - std::min<uint64_t>(rows * bytes, post.spare);
      demand.ranks +=
          str(demand.ranks.empty() ? "" : ", ", "rank ", r, " makes room for ", rows, " rows of ", bytes, " bytes");
    };
    add(host, post.of_host);
    if (post.cgroup != 0) add(cgroups[post.cgroup], post.of_cgroup);
  }
  const auto wrong = [&](const char* owner, const Demand& demand) {
    if (host.available == 0 || demand.wanted <= demand.available) return std::string();
    return str(owner, " has too little memory, ", demand.available, " bytes: ", demand.ranks, "; ask for less with ",
               asks_for_rows(op.post(0).op));
  };
  std::string text = wrong("the host", host);
  for (const auto& [id, demand] : cgroups)
    if (text.empty()) text = wrong("a memory cgroup", demand);
  return text;
}

// A call on its way.
class Dispatching : public Steps {
 public:
  Dispatching(DispatchCall call, std::optional<EarlyDispatched> early)
      : call_(std::move(call)), low_latency_(call_.is_low_latency()), early_(std::move(early)) {}

  bool sends_at_once() override { return keeps_ = !call_.checks.passed() || attached().bytes <= kAttachmentBytes; }

  void send(Turn turn) override {
    call_.checks.memory("x", call_.x).memory("topk_idx", call_.topk_idx);
    if (!low_latency_) call_.checks.memory("topk_weights", *call_.topk_weights);
    spoils_ = turn.group().spoils();
    Contribution mine = contribute(turn.group());
    op_.emplace(std::move(turn), std::move(mine));
    if (!keeps_ || !op_->has_attached()) return;
    const std::byte* const at = op_->attachment(op_->rank());
    const AttachedTokens kept = attached();
    rows_ = at;
    ids_ = kept.ids(at);
    if (!low_latency_) weights_ = kept.weights(at);
  }

  Results receive() override {
    Operation& op = *op_;
    op.receive([&](const Operation& op) { return route(op); });
    allocate(op);
    move_rows(op);
    count(op);
    return call_.in_order(finish(op));
  }

  void end() override { op_.reset(); }

 private:
  // What this rank brings.
  Contribution contribute(const Group& group) {
    Contribution mine;
    mine.post.op = call_.op();
    if (call_.checks.passed()) describe_tokens(mine, group);
    // Blocks are what rows come to, whatever the pool has.
    if (call_.blocks && !early_) early_ = call_.make_early(group);
    if (early_) recv_ = std::move(early_->recv);
    mine.rejected = call_.checks.wrong();
    mine.reserved = recv_.reserved();
    if (mine.reserved) mine.post.spare += mine.reserved->bytes;
    return mine;
  }

  // From the posts of all ranks, where every row goes; or what is wrong with them, which all ranks find.
  std::string route(const Operation& op) {
    std::vector<const int32_t*> counts(op.size());
    std::vector<int64_t> worst(op.size());
    for (int r = 0; r < op.size(); ++r) {
      counts[r] = op.words(r);
      worst[r] = op.post(r).rows;
    }
    for (int r = 1; r < op.size() && low_latency_; ++r)
      if (worst[r] != worst[0])
        return str("num_max_dispatch_tokens_per_rank must be the same on all ranks: rank 0 makes room for ", worst[0],
                   " rows, rank ", r, " for ", worst[r]);
    routing_.emplace(call_.num_experts, std::move(counts), std::move(worst));
    for (int r = 0; r < op.size(); ++r)
      if (routing_->wanted(r) > std::numeric_limits<int32_t>::max())
        return str("rank ", r, " would receive ", routing_->wanted(r), " rows; at most ",
                   std::numeric_limits<int32_t>::max(), " are possible");
    if (std::string wrong = too_much_memory(op, *routing_, call_.x.element_size()); !wrong.empty()) return wrong;
    recv_.place(
        op, call_.x, sizeof(RowMeta), [&](int r) { return routing_->delivered(r); },
        [&](int r) { return routing_->total_rows(r); });
    return {};
  }

  // Makes the results, as if no row arrived.
  void allocate(Operation& op) {
    const int64_t N = routing_->total_rows(op.rank()), delivered = routing_->delivered(op.rank());
    recv_.allocate(op);
    out_ = early_ ? std::move(early_->out)
                  : make_results(call_.x, call_.topk_idx, low_latency_, call_.num_experts, R, N, nullptr);
    if (call_.blocks) {
      recv_.set_places(places_ = arrange(*routing_, op.rank(), *call_.blocks, *out_->padded));
      src_info_ = out_->padded->src_info.mutable_data_ptr<int32_t>();
    }
    source_ = out_->recv_src_idx.mutable_data_ptr<int32_t>();
    std::fill(source_ + 3 * delivered, source_ + 3 * N, -1);
    if (low_latency_) return;
    recv_ids_ = out_->rest->recv_topk_idx.mutable_data_ptr<int64_t>();
    recv_weights_ = out_->rest->recv_topk_weights.mutable_data_ptr<float>();
    std::fill_n(recv_ids_, N * K, -1);
    std::fill_n(recv_weights_, N * K, 0.0f);
  }

  // Sends rows, receives rows.
  void move_rows(Operation& op) {
    if (op.all_attached())
      take_attached(op);
    else
      exchange(op);
  }

  // Counts and prefix sums.
  void count(const Operation& op) {
    const int64_t E = call_.num_experts;
    auto* per_expert = out_->num_recv_tokens_per_expert.mutable_data_ptr<int64_t>();
    std::fill_n(per_expert, L, 0);
    int32_t running = 0;
    auto* recv_prefix = out_->recv_channel_prefix_matrix.mutable_data_ptr<int32_t>();
    routing_->segments(op.rank(), [&](int64_t l, int64_t s, int64_t first, int64_t end) {
      per_expert[l] += end - first;
      recv_prefix[l * R + s] = running += routing_->count(s, op.rank() * L + l);
    });
    if (low_latency_) return;
    *out_->rest->num_dropped.mutable_data_ptr<int64_t>() = routing_->wanted(op.rank()) - routing_->delivered(op.rank());
    auto* between_ranks = out_->rest->rank_prefix_matrix.mutable_data_ptr<int32_t>();
    std::fill_n(between_ranks, R * R, 0);
    for (int64_t d = 0; d < R; ++d)
      routing_->segments(d, [&](int64_t, int64_t s, int64_t first, int64_t end) {
        between_ranks[s * R + d] += static_cast<int32_t>(end - first);
      });
    for (int64_t i = R; i < R * R; ++i) between_ranks[i] += between_ranks[i - R];
    auto* sent_prefix = out_->rest->channel_prefix_matrix.mutable_data_ptr<int32_t>();
    for (int64_t e = 0; e < E; ++e)
      sent_prefix[e] = routing_->count(op.rank(), e) + (e % L > 0 ? sent_prefix[e - 1] : 0);
  }

  Dispatched finish(Operation& op) {
    const auto unused = spoils_ ? RecvRows::Unused::spoiled : RecvRows::Unused::any;
    out_->recv_x = recv_.take(op, call_.x, call_.zero_unused ? RecvRows::Unused::zero : unused);
    op.finish();
    return std::move(*out_);
  }

  // Where the tokens lie in an attachment; for right arguments.
  AttachedTokens attached() const {
    Post post{};
    post.op = call_.op();
    post.tokens = call_.x.size(0);
    post.hidden = call_.x.size(1);
    post.top_k = call_.topk_idx.size(1);
    return {post, static_cast<uint64_t>(call_.x.element_size())};
  }

  // Right arguments: the post, the counts, and the tokens themselves where they are few.
  void describe_tokens(Contribution& mine, const Group& group) {
    const Tensor& x = call_.x;
    ids_ = call_.topk_idx.const_data_ptr<int64_t>();
    weights_ = low_latency_ ? nullptr : call_.topk_weights->const_data_ptr<float>();
    rows_ = static_cast<const std::byte*>(x.const_data_ptr());
    T = x.size(0);
    K = call_.topk_idx.size(1);
    R = call_.num_ranks;
    L = call_.num_experts / R;
    Post& post = mine.post;
    post.tokens = T;
    post.hidden = x.size(1);
    post.top_k = K;
    post.experts = call_.num_experts;
    post.dtype = static_cast<int64_t>(dtype_of(x));
    post.rows = call_.num_rows;
    mine.words.resize(call_.num_experts);
    const std::string wrong = count_experts(ids_, T, K, call_.num_experts, mine.words.data());
    call_.checks.require(wrong.empty(), wrong);
    const AttachedTokens attached = this->attached();
    const int64_t rows = call_.num_rows > 0 ? call_.num_rows : T * K;
    mine.expected = rows * (attached.row_bytes + sizeof(RowMeta));
    mine.least = call_.num_rows * attached.row_bytes;
    look_at_memory(call_.checks, mine, group, rows * row_memory(post, attached.row_bytes));
    mine.attached_bytes = attached.bytes;
    mine.attach = [this, attached](std::byte* to) { attached.write(to, rows_, ids_, weights_); };
    mine.attaches_own = keeps_;
  }

  // What goes with row n, of all but the row itself.
  void describe_row(int64_t n, int64_t local_expert, int64_t from, const RowMeta& meta) {
    if (!low_latency_) {
      recv_ids_[n * K + meta.k] = local_expert;
      recv_weights_[n * K + meta.k] = meta.weight;
    }
    source_[3 * n] = static_cast<int32_t>(from);
    source_[3 * n + 1] = meta.token;
    source_[3 * n + 2] = meta.k;
    if (src_info_ != nullptr) src_info_[places_[n]] = meta.token;
  }

  float weight_of(const float* weights, int64_t i) const { return low_latency_ ? 0.0f : weights[i]; }

  // All tokens of all ranks are there: this rank takes those for its experts.
  void take_attached(Operation& op) {
    place_tokens(ids_, T * K, *routing_, op.rank(), head(), [](int32_t, int32_t, int32_t) {});
    op.enter(Phase::copy);
    const int64_t delivered = routing_->delivered(op.rank()), first_expert = op.rank() * L;
    std::vector<int64_t> next(L * R);  // row of a local expert's next token from a rank
    routing_->segments(op.rank(), [&](int64_t l, int64_t s, int64_t first, int64_t) { next[l * R + s] = first; });
    for (int s = 0; s < R; ++s) {
      const AttachedTokens attached(op.post(s), call_.x.element_size());
      const std::byte* at = op.attachment(s);
      const bool own = s == op.rank();
      const std::byte* row = own ? rows_ : at;
      const int64_t* its_ids = own ? ids_ : attached.ids(at);
      const float* its_weights = own ? weights_ : attached.weights(at);
      for (int32_t t = 0; t < attached.tokens; ++t, row += attached.row_bytes)
        for (int32_t k = 0; k < K; ++k) {
          const int64_t l = its_ids[t * K + k] - first_expert;
          if (l < 0 || l >= L) continue;
          const int64_t n = next[l * R + s]++;
          if (n >= delivered) continue;
          recv_.put(n, row);
          describe_row(n, l, s, {t, k, weight_of(its_weights, t * K + k)});
        }
    }
  }

  // Every rank writes its rows to where they belong.
  void exchange(Operation& op) {
    std::vector<Entry> entries;
    entries.reserve(T * K);
    place_tokens(ids_, T * K, *routing_, op.rank(), head(),
                 [&](int32_t dest, int32_t row, int32_t i) { entries.push_back({dest, row, i}); });
    struct Segment {
      int64_t local_expert, source, end;
    };
    std::vector<Segment> segments;
    segments.reserve(L * R);
    routing_->segments(op.rank(), [&](int64_t l, int64_t s, int64_t, int64_t end) { segments.push_back({l, s, end}); });
    size_t at = 0;
    op.exchange(
        entries, recv_.regions(), recv_.row_bytes(), sizeof(RowMeta),
        [&](const Entry& entry, std::byte* meta) {
          const int32_t token = static_cast<int32_t>(entry.row / K);
          const RowMeta data{token, static_cast<int32_t>(entry.row % K), weight_of(weights_, entry.row)};
          std::memcpy(meta, &data, sizeof data);
          return rows_ + token * recv_.row_bytes();
        },
        [&](int64_t first, int64_t end, std::byte* chunk, std::byte* metas) {
          recv_.settle(first, end, chunk);
          for (int64_t n = first; n < end; ++n, metas += sizeof(RowMeta)) {
            while (segments[at].end <= n) ++at;
            RowMeta meta;
            std::memcpy(&meta, metas, sizeof meta);
            describe_row(n, segments[at].local_expert, segments[at].source, meta);
          }
        });
  }

  int32_t* head() { return out_->send_head.mutable_data_ptr<int32_t>(); }

  DispatchCall call_;
  const bool low_latency_;
  bool keeps_ = false;  // the tokens, in the attachment
  bool spoils_ = false;
  std::optional<EarlyDispatched> early_;
  RecvRows recv_;
  std::optional<Routing> routing_;
  std::optional<Dispatched> out_;
  std::vector<int64_t> places_;  // of rows, in blocks
  int64_t T = 0, K = 0, R = 0, L = 0;
  // Of this rank's tokens, where the call was given them or in the attachment:
  const std::byte* rows_ = nullptr;
  const int64_t* ids_ = nullptr;
  const float* weights_ = nullptr;
  // Of the results:
  int32_t* source_ = nullptr;
  int32_t* src_info_ = nullptr;
  int64_t* recv_ids_ = nullptr;
  float* recv_weights_ = nullptr;
  std::optional<Operation> op_;  // ends before what it writes to
};

}  // namespace

std::optional<EarlyDispatched> DispatchCall::make_early(const Group& group) {
  if (num_rows == 0) return std::nullopt;
  return deep_ep::make_early(checks, [&] {
    const bool low_latency = is_low_latency();
    const Blocks* const in_blocks = blocks ? &*blocks : nullptr;
    EarlyDispatched early{.out = make_results(x, topk_idx, low_latency, num_experts, num_ranks, num_rows, in_blocks)};
    if (blocks)
      take_blocks(early.recv, *blocks, x, early.out);
    else
      early.out.recv_x = early.recv.make_early(group, x, num_rows, sizeof(RowMeta), low_latency);
    return early;
  });
}

std::unique_ptr<Steps> DispatchCall::steps(DispatchCall call, std::optional<EarlyDispatched> early) {
  return std::make_unique<Dispatching>(std::move(call), std::move(early));
}

namespace {

Results in_order(const Dispatched& out) {
  const Dispatched::Rest& rest = *out.rest;
  return {out.recv_x,
          rest.recv_topk_idx,
          rest.recv_topk_weights,
          out.num_recv_tokens_per_expert,
          rest.num_dropped,
          rest.rank_prefix_matrix,
          rest.channel_prefix_matrix,
          out.recv_channel_prefix_matrix,
          out.recv_src_idx,
          out.send_head};
}

DispatchCall dispatch(Tensor x, Tensor topk_idx, Tensor topk_weights, int64_t num_experts, int64_t num_ranks,
                      int64_t num_worst_tokens, GroupName group) {
  Turn turn = groups::get("dispatch", group.value);
  Checks checks =
      check_dispatch(x, topk_idx, topk_weights, num_experts, num_ranks, num_worst_tokens, turn.group().size());
  return {.turn = std::move(turn),
          .checks = std::move(checks),
          .x = x,
          .topk_idx = topk_idx,
          .topk_weights = topk_weights,
          .num_experts = num_experts,
          .num_ranks = num_ranks,
          .num_rows = num_worst_tokens,
          .in_order = in_order};
}

}  // namespace
}  // namespace deep_ep

STABLE_TORCH_LIBRARY_IMPL(deep_ep, CPU, library) { deep_ep::implement<&deep_ep::dispatch, 10>(library, "dispatch"); }
