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
#include "started.h"

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

}  // namespace

EarlyDispatched early_results(const Group& group, const Tensor& x, const Tensor& topk_idx, bool low_latency,
                              int64_t num_experts, int64_t num_ranks, int64_t num_worst_tokens, const Blocks* blocks) {
  EarlyDispatched early{.out =
                            make_results(x, topk_idx, low_latency, num_experts, num_ranks, num_worst_tokens, blocks)};
  if (blocks != nullptr)
    take_blocks(early.recv, *blocks, x, early.out);
  else
    early.out.recv_x = early.recv.make_early(group, x, num_worst_tokens, sizeof(RowMeta), low_latency);
  return early;
}

Dispatched dispatch_rows(Turn turn, Checks checks, const Tensor& x, const Tensor& topk_idx,
                         const std::optional<Tensor>& topk_weights, int64_t num_experts, int64_t num_ranks,
                         int64_t num_worst_tokens, std::optional<EarlyDispatched> early, const Blocks* blocks,
                         bool zero_unused) {
  const bool low_latency = !topk_weights.has_value();
  Contribution mine;
  Post& post = mine.post;
  post.op = low_latency ? Op::low_latency_dispatch : Op::dispatch;
  std::vector<int32_t>& counts = mine.words;
  const int64_t* ids = nullptr;
  const float* weights = nullptr;
  if (checks.passed()) {
    ids = topk_idx.const_data_ptr<int64_t>();
    weights = low_latency ? nullptr : topk_weights->const_data_ptr<float>();
    post.tokens = x.size(0);
    post.hidden = x.size(1);
    post.top_k = topk_idx.size(1);
    post.experts = num_experts;
    post.dtype = static_cast<int64_t>(dtype_of(x));
    post.rows = num_worst_tokens;
    counts.resize(num_experts);
    const std::string wrong = count_experts(ids, post.tokens, post.top_k, num_experts, counts.data());
    checks.require(wrong.empty(), wrong);
    const AttachedTokens attached(post, x.element_size());
    const int64_t rows = num_worst_tokens > 0 ? num_worst_tokens : post.tokens * post.top_k;
    mine.expected = rows * (attached.row_bytes + sizeof(RowMeta));
    mine.least = num_worst_tokens * attached.row_bytes;
    look_at_memory(checks, mine, turn.group(), rows * row_memory(post, attached.row_bytes));
    mine.attached_bytes = attached.bytes;
    mine.attach = [&, attached](std::byte* to) { attached.write(to, x.const_data_ptr(), ids, weights); };
  }
  if (blocks != nullptr && !early)
    early = make_early(checks, [&] {
      return early_results(turn.group(), x, topk_idx, true, num_experts, num_ranks, num_worst_tokens, blocks);
    });
  const bool spoils = turn.group().spoils();
  mine.rejected = checks.wrong();
  RecvRows recv = early ? std::move(early->recv) : RecvRows();
  mine.reserved = recv.reserved();
  if (mine.reserved) post.spare += mine.reserved->bytes;

  std::optional<Routing> routing;
  Operation op(std::move(turn), mine, [&](const Operation& op) {
    std::vector<const int32_t*> all_counts(op.size());
    std::vector<int64_t> worst(op.size());
    for (int r = 0; r < op.size(); ++r) {
      all_counts[r] = op.words(r);
      worst[r] = op.post(r).rows;
    }
    if (low_latency)
      for (int r = 1; r < op.size(); ++r)
        if (worst[r] != worst[0])
          return str("num_max_dispatch_tokens_per_rank must be the same on all ranks: rank 0 makes room for ", worst[0],
                     " rows, rank ", r, " for ", worst[r]);
    routing.emplace(num_experts, std::move(all_counts), std::move(worst));
    for (int r = 0; r < op.size(); ++r)
      if (routing->wanted(r) > std::numeric_limits<int32_t>::max())
        return str("rank ", r, " would receive ", routing->wanted(r), " rows; at most ",
                   std::numeric_limits<int32_t>::max(), " are possible");
    if (std::string wrong = too_much_memory(op, *routing, x.element_size()); !wrong.empty()) return wrong;
    recv.place(
        op, x, sizeof(RowMeta), [&](int r) { return routing->delivered(r); },
        [&](int r) { return routing->total_rows(r); });
    return std::string();
  });

  const int64_t T = post.tokens, K = post.top_k, R = num_ranks, L = routing->num_local_experts();
  const int64_t delivered = routing->delivered(op.rank());
  const int64_t N = routing->total_rows(op.rank());
  recv.allocate(op);
  Dispatched out = early ? early->out : make_results(x, topk_idx, low_latency, num_experts, R, N, nullptr);
  std::vector<int64_t> places;
  int32_t* src_info = nullptr;
  if (blocks != nullptr) {
    if (spoils) recv.blocks().clear();
    recv.set_places(places = arrange(*routing, op.rank(), *blocks, *out.padded));
    src_info = out.padded->src_info.mutable_data_ptr<int32_t>();
  }
  auto* source = out.recv_src_idx.mutable_data_ptr<int32_t>();
  std::fill(source + 3 * delivered, source + 3 * N, -1);
  int64_t* recv_ids = nullptr;
  float* recv_weights = nullptr;
  if (!low_latency) {
    recv_ids = out.rest->recv_topk_idx.mutable_data_ptr<int64_t>();
    recv_weights = out.rest->recv_topk_weights.mutable_data_ptr<float>();
    std::fill_n(recv_ids, N * K, -1);
    std::fill_n(recv_weights, N * K, 0.0f);
  }

  // Send rows, receive rows.
  const auto describe = [&](int64_t n, int64_t local_expert, int64_t from, const RowMeta& meta) {
    if (!low_latency) {
      recv_ids[n * K + meta.k] = local_expert;
      recv_weights[n * K + meta.k] = meta.weight;
    }
    source[3 * n] = static_cast<int32_t>(from);
    source[3 * n + 1] = meta.token;
    source[3 * n + 2] = meta.k;
    if (src_info != nullptr) src_info[places[n]] = meta.token;
  };
  const auto weight_of = [&](const float* weights, int64_t i) { return low_latency ? 0.0f : weights[i]; };
  const auto* rows = static_cast<const std::byte*>(x.const_data_ptr());
  const uint64_t row_bytes = recv.row_bytes();
  auto* head = out.send_head.mutable_data_ptr<int32_t>();
  if (op.all_attached()) {
    place_tokens(ids, T * K, *routing, op.rank(), head, [](int32_t, int32_t, int32_t) {});
    op.enter(Phase::copy);
    std::vector<int64_t> next(L * R);  // row of a local expert's next token from a rank
    routing->segments(op.rank(), [&](int64_t l, int64_t s, int64_t first, int64_t) { next[l * R + s] = first; });
    const int64_t first_expert = op.rank() * L;
    for (int s = 0; s < R; ++s) {
      const AttachedTokens attached(op.post(s), x.element_size());
      const std::byte* at = op.attachment(s);
      const bool own = s == op.rank();
      const std::byte* row = own ? rows : at;
      const int64_t* its_ids = own ? ids : attached.ids(at);
      const float* its_weights = own ? weights : attached.weights(at);
      for (int32_t t = 0; t < attached.tokens; ++t, row += row_bytes)
        for (int32_t k = 0; k < K; ++k) {
          const int64_t l = its_ids[t * K + k] - first_expert;
          if (l < 0 || l >= L) continue;
          const int64_t n = next[l * R + s]++;
          if (n >= delivered) continue;
          recv.put(n, row);
          describe(n, l, s, {t, k, weight_of(its_weights, t * K + k)});
        }
    }
  } else {
    std::vector<Entry> entries;
    entries.reserve(T * K);
    place_tokens(ids, T * K, *routing, op.rank(), head,
                 [&](int32_t dest, int32_t row, int32_t i) { entries.push_back({dest, row, i}); });
    struct Segment {
      int64_t local_expert, source, end;
    };
    std::vector<Segment> segments;
    segments.reserve(L * R);
    routing->segments(op.rank(), [&](int64_t l, int64_t s, int64_t, int64_t end) { segments.push_back({l, s, end}); });
    size_t at = 0;
    op.exchange(
        entries, recv.regions(), row_bytes, sizeof(RowMeta),
        [&](const Entry& entry, std::byte* meta) {
          const int32_t token = static_cast<int32_t>(entry.row / K);
          const RowMeta data{token, static_cast<int32_t>(entry.row % K), weight_of(weights, entry.row)};
          std::memcpy(meta, &data, sizeof data);
          return rows + token * row_bytes;
        },
        [&](int64_t first, int64_t end, std::byte* chunk, std::byte* metas) {
          recv.settle(first, end, chunk);
          for (int64_t n = first; n < end; ++n, metas += sizeof(RowMeta)) {
            while (segments[at].end <= n) ++at;
            RowMeta meta;
            std::memcpy(&meta, metas, sizeof meta);
            describe(n, segments[at].local_expert, segments[at].source, meta);
          }
        });
  }

  // Counts and prefix sums.
  auto* per_expert = out.num_recv_tokens_per_expert.mutable_data_ptr<int64_t>();
  std::fill_n(per_expert, L, 0);
  int32_t running = 0;
  auto* recv_prefix = out.recv_channel_prefix_matrix.mutable_data_ptr<int32_t>();
  routing->segments(op.rank(), [&](int64_t l, int64_t s, int64_t first, int64_t end) {
    per_expert[l] += end - first;
    recv_prefix[l * R + s] = running += routing->count(s, op.rank() * L + l);
  });
  if (!low_latency) {
    *out.rest->num_dropped.mutable_data_ptr<int64_t>() = routing->wanted(op.rank()) - delivered;
    auto* between_ranks = out.rest->rank_prefix_matrix.mutable_data_ptr<int32_t>();
    std::fill_n(between_ranks, R * R, 0);
    for (int64_t d = 0; d < R; ++d)
      routing->segments(d, [&](int64_t, int64_t s, int64_t first, int64_t end) {
        between_ranks[s * R + d] += static_cast<int32_t>(end - first);
      });
    for (int64_t i = R; i < R * R; ++i) between_ranks[i] += between_ranks[i - R];
    auto* sent_prefix = out.rest->channel_prefix_matrix.mutable_data_ptr<int32_t>();
    for (int64_t e = 0; e < num_experts; ++e) sent_prefix[e] = counts[e] + (e % L > 0 ? sent_prefix[e - 1] : 0);
  }

  const auto unused = spoils ? RecvRows::Unused::spoiled : RecvRows::Unused::any;
  out.recv_x = recv.take(op, x, zero_unused ? RecvRows::Unused::zero : unused);
  op.finish();
  return out;
}

namespace {

constexpr Op kOp = Op::dispatch;

template <typename Outputs>
Outputs in_order(const Dispatched& out) {
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

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Outputs dispatch(Tensor x, Tensor topk_idx, Tensor topk_weights, int64_t num_experts, int64_t num_ranks,
                 int64_t num_worst_tokens, GroupName group) {
  Turn turn = groups::get(name_of(kOp), group.value);
  Checks checks =
      check_dispatch(x, topk_idx, topk_weights, num_experts, num_ranks, num_worst_tokens, turn.group().size());
  return in_order<Outputs>(dispatch_rows(std::move(turn), std::move(checks), x, topk_idx, topk_weights, num_experts,
                                         num_ranks, num_worst_tokens));
}

Tensor dispatch_start(Tensor x, Tensor topk_idx, Tensor topk_weights, int64_t num_experts, int64_t num_ranks,
                      int64_t num_worst_tokens, GroupName group) {
  Turn turn = groups::get(name_of(kOp), group.value);
  Checks checks =
      check_dispatch(x, topk_idx, topk_weights, num_experts, num_ranks, num_worst_tokens, turn.group().size());
  std::optional<EarlyDispatched> early;
  if (num_worst_tokens > 0)
    early = make_early(checks, [&] {
      return early_results(turn.group(), x, topk_idx, false, num_experts, num_ranks, num_worst_tokens);
    });
  return start(kOp, std::move(turn), early ? in_order<Results>(early->out) : Results{}, [=](Turn turn) {
    return in_order<Results>(dispatch_rows(std::move(turn), checks, x, topk_idx, topk_weights, num_experts, num_ranks,
                                           num_worst_tokens, early));
  });
}

}  // namespace
}  // namespace deep_ep

STABLE_TORCH_LIBRARY_IMPL(deep_ep, CPU, library) {
  library.impl("dispatch", TORCH_BOX(&deep_ep::dispatch));
  library.impl("dispatch_start", TORCH_BOX(&deep_ep::dispatch_start));
}
