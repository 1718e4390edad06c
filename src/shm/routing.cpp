#include "routing.h"

#include <algorithm>

#include "error.h"

namespace deep_ep {

std::string count_experts(const int64_t* topk_idx, int64_t num_tokens, int64_t top_k, int64_t num_experts,
                          int32_t* counts) {
  std::fill_n(counts, num_experts, 0);
  for (int64_t i = 0; i < num_tokens * top_k; ++i) {
    const int64_t expert = topk_idx[i];
    if (expert == -1) continue;
    if (expert < 0 || expert >= num_experts)
      return str("topk_idx has the id ", expert, " at [", i / top_k, ", ", i % top_k, "]; allowed are -1 and 0..",
                 num_experts - 1);
    ++counts[expert];
  }
  return "";
}

void dispatch_layout(const int64_t* topk_idx, int64_t num_tokens, int64_t top_k, int64_t num_experts, int64_t num_ranks,
                     int64_t num_nodes, int32_t* per_rank, int32_t* per_node, int32_t* per_expert,
                     int32_t* is_token_in_rank) {
  const int64_t local_experts = num_experts / num_ranks;
  const int64_t ranks_per_node = num_ranks / num_nodes;
  std::fill_n(per_rank, num_ranks, 0);
  std::fill_n(per_node, num_nodes, 0);
  std::fill_n(per_expert, num_experts, 0);
  std::fill_n(is_token_in_rank, num_tokens * num_ranks, 0);
  for (int64_t t = 0; t < num_tokens; ++t) {
    int32_t* in_rank = is_token_in_rank + t * num_ranks;
    for (int64_t k = 0; k < top_k; ++k) {
      const int64_t expert = topk_idx[t * top_k + k];
      if (expert < 0) continue;
      ++per_expert[expert];
      in_rank[expert / local_experts] = 1;
    }
    for (int64_t node = 0; node < num_nodes; ++node) {
      int32_t in_node = 0;
      for (int64_t r = node * ranks_per_node; r < (node + 1) * ranks_per_node; ++r) {
        per_rank[r] += in_rank[r];
        in_node |= in_rank[r];
      }
      per_node[node] += in_node;
    }
  }
}

Routing::Routing(int64_t num_experts, std::vector<const int32_t*> counts, std::vector<int64_t> num_worst_tokens)
    : local_experts_(num_experts / static_cast<int64_t>(counts.size())),
      counts_(std::move(counts)),
      worst_(std::move(num_worst_tokens)),
      wanted_(counts_.size(), 0) {
  for (const int32_t* of_source : counts_)
    for (int64_t& wanted : wanted_)
      for (int64_t l = 0; l < local_experts_; ++l) wanted += *of_source++;
}

std::vector<int64_t> Routing::first_rows(int64_t source) const {
  std::vector<int64_t> first(num_ranks() * local_experts_);
  for (int64_t e = 0, dest = 0; dest < num_ranks(); ++dest) {
    int64_t row = 0;
    for (int64_t l = 0; l < local_experts_; ++l, ++e)
      for (int64_t s = 0; s < num_ranks(); ++s) {
        if (s == source) first[e] = row;
        row += count(s, e);
      }
  }
  return first;
}

}  // namespace deep_ep
