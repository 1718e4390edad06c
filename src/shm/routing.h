// Routing arithmetic of the row contract "expert": one row per (token, k), ordered at the receiver by local expert,
// source rank, token, k.
//
// T local tokens · K top-k · E experts · R ranks · L = E/R local experts · N rows · W num_worst_tokens (0: all rows
// fit).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace deep_ep {

// counts[e] = number of ids e in topk_idx [T, K]. Returns what is wrong with the ids, or nothing.
std::string count_experts(const int64_t* topk_idx, int64_t num_tokens, int64_t top_k, int64_t num_experts,
                          int32_t* counts);

// Tokens per rank [R], per node [S], per expert [E], and whether token t goes to rank r [T, R]. A token counts once per
// rank and per node; node = rank / (R / S).
void dispatch_layout(const int64_t* topk_idx, int64_t num_tokens, int64_t top_k, int64_t num_experts, int64_t num_ranks,
                     int64_t num_nodes, int32_t* per_rank, int32_t* per_node, int32_t* per_expert,
                     int32_t* is_token_in_rank);

// Who sends how many rows where, from the counts of all ranks.
class Routing {
 public:
  // counts[s] is counts[E] of rank s; num_worst_tokens[d] is W of rank d.
  Routing(int64_t num_experts, std::vector<const int32_t*> counts, std::vector<int64_t> num_worst_tokens);

  int64_t num_ranks() const { return static_cast<int64_t>(counts_.size()); }
  int64_t num_local_experts() const { return local_experts_; }
  int64_t wanted(int64_t rank) const { return wanted_[rank]; }  // rows for `rank`, before dropping
  int64_t delivered(int64_t rank) const {                       // rows that fit
    return worst_[rank] > 0 && worst_[rank] < wanted_[rank] ? worst_[rank] : wanted_[rank];
  }
  int64_t total_rows(int64_t rank) const { return worst_[rank] > 0 ? worst_[rank] : wanted_[rank]; }
  int32_t count(int64_t source, int64_t expert) const { return counts_[source][expert]; }

  // First row, in rank e/L's order, of what `source` sends to expert e: [E].
  std::vector<int64_t> first_rows(int64_t source) const;

  // Calls segment(local expert, source, first row, end row) for what `rank` receives, in row order, dropped rows cut
  // off.
  template <typename Segment>
  void segments(int64_t rank, Segment&& segment) const {
    const int64_t limit = delivered(rank);
    int64_t row = 0;
    for (int64_t l = 0; l < local_experts_; ++l)
      for (int64_t s = 0; s < num_ranks(); ++s) {
        const int64_t end = row + count(s, rank * local_experts_ + l);
        segment(l, s, row < limit ? row : limit, end < limit ? end : limit);
        row = end;
      }
  }

 private:
  int64_t local_experts_;
  std::vector<const int32_t*> counts_;
  std::vector<int64_t> worst_;
  std::vector<int64_t> wanted_;
};

}  // namespace deep_ep
