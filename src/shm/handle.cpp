#include "handle.h"

#include <algorithm>

#include "error.h"

namespace deep_ep {
namespace {

// Of a set of (slot, row, local expert): their number, and a sum of hashes that does not depend on their order.
struct Digest {
  int32_t count = 0;
  uint32_t hash = 0;

  void add(int64_t slot, int64_t row, int64_t expert) {
    uint64_t h = (static_cast<uint64_t>(slot) << 32 | static_cast<uint64_t>(row)) + 1;
    h += static_cast<uint64_t>(expert) * 0xA0761D6478BD642Full;
    h *= 0x9E3779B97F4A7C15ull;
    h ^= h >> 29;
    h *= 0xD1B54A32D192ED03ull;
    hash += static_cast<uint32_t>(h >> 32);
    ++count;
  }
};

// The words of a rank: what it returns to, and what it expects from, every rank.
const Digest* returned(const Operation& op, int rank) { return reinterpret_cast<const Digest*>(op.words(rank)); }
const Digest* expected(const Operation& op, int rank) { return returned(op, rank) + op.size(); }

}  // namespace

std::vector<int32_t> Handle::words(std::string& wrong) const {
  std::vector<Digest> digests(2 * num_ranks);
  const int64_t L = num_experts / num_ranks;
  int64_t block = 0;  // the local expert of row n
  for (int64_t n = 0; n < num_rows && wrong.empty(); ++n) {
    const int32_t source = recv_src_idx[3 * n], token = recv_src_idx[3 * n + 1], k = recv_src_idx[3 * n + 2];
    if (source < 0) continue;
    if (source >= num_ranks || token < 0 || k < 0 || k >= top_k)
      wrong = str("recv_src_idx says (", source, ", ", token, ", ", k, ") of row ", n, "; allowed are ranks 0..",
                  num_ranks - 1, ", tokens from 0 and k 0..", top_k - 1, ", or -1 for no row");
    else {
      while (layout_range != nullptr && block < L - 1 && layout_range[(block + 1) * num_ranks - 1] <= n) ++block;
      digests[source].add(token * top_k + k, n, block);
    }
  }
  for (int64_t slot = 0; slot < num_tokens * top_k && wrong.empty(); ++slot) {
    const int64_t expert = topk_idx[slot];
    if (expert < -1 || expert >= num_experts)
      wrong = str("topk_idx has the id ", expert, " at [", slot / top_k, ", ", slot % top_k,
                  "]; allowed are -1 and 0..", num_experts - 1);
    else if (expert >= 0 && send_head[slot] < 0 && layout_range != nullptr)
      wrong = str("topk_idx has the id ", expert, " at [", slot / top_k, ", ", slot % top_k,
                  "], which was not dispatched; it must be that of low_latency_dispatch");
    if (send_head[slot] < 0 || !wrong.empty()) continue;
    if (expert < 0)
      wrong = str("send_head has a row for [", slot / top_k, ", ", slot % top_k, "], but topk_idx has the id ", expert,
                  " there; allowed are 0..", num_experts - 1);
    else if (destination(slot) == rank && send_head[slot] >= num_rows)
      wrong = str("send_head says row ", send_head[slot], " for [", slot / top_k, ", ", slot % top_k,
                  "], which this rank sent to itself; it has ", num_rows, " rows");
    else
      digests[num_ranks + destination(slot)].add(slot, send_head[slot], layout_range == nullptr ? 0 : expert % L);
  }
  const auto* words = reinterpret_cast<const int32_t*>(digests.data());
  return {words, words + digests.size() * sizeof(Digest) / sizeof(int32_t)};
}

std::string Handle::check(const Operation& op) {
  for (int expert_rank = 0; expert_rank < op.size(); ++expert_rank)
    for (int token_rank = 0; token_rank < op.size(); ++token_rank) {
      const Digest& returns = returned(op, expert_rank)[token_rank];
      const Digest& expects = expected(op, token_rank)[expert_rank];
      if (returns.count == expects.count && returns.hash == expects.hash) continue;
      return str("the handles of rank ", expert_rank, " and rank ", token_rank, " are not of one dispatch: rank ",
                 expert_rank, " holds ", returns.count, " rows from rank ", token_rank, ", which expects ",
                 expects.count, returns.count == expects.count ? ", but others" : "",
                 op.post(expert_rank).op == Op::low_latency_combine
                     ? "; handle and topk_idx must be those of one low_latency_dispatch"
                     : "");
    }
  return "";
}

int64_t Handle::rows_at(const Operation& op, int rank) {
  int64_t rows = 0;
  for (int s = 0; s < op.size(); ++s) rows += returned(op, rank)[s].count;
  return rows;
}

std::vector<Entry> Handle::returns() const {
  std::vector<Entry> entries;
  entries.reserve(num_rows);
  for (int32_t n = 0; n < num_rows; ++n) {
    const int32_t* source = recv_src_idx + 3 * n;
    if (goes_away(n)) entries.push_back({source[0], static_cast<int32_t>(source[1] * top_k + source[2]), n});
  }
  return entries;
}

std::vector<Entry> Handle::sends() const {
  std::vector<Entry> entries;
  entries.reserve(num_tokens * top_k);
  for (int64_t slot = 0; slot < num_tokens * top_k; ++slot)
    if (send_head[slot] >= 0)
      entries.push_back({static_cast<int32_t>(destination(slot)), send_head[slot], static_cast<int32_t>(slot)});
  return entries;
}

}  // namespace deep_ep
