// The part of a dispatch handle with which rows find their way back: expert rows to the tokens they came from (combine,
// dispatch_backward), and gradients of tokens to expert rows (combine_backward).
//
// T local tokens · K top-k · E experts · R ranks · N rows of recv_x.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "exchange.h"
#include "operation.h"

namespace deep_ep {

struct Handle {
  const int32_t* recv_src_idx;  // [N, 3]: source rank, token, k of every row; -1 in rows that hold nothing
  const int64_t* topk_idx;      // [T, K]
  const int32_t* send_head;     // [T, K]: row at the expert's rank, -1 if there is none
  int64_t num_rows, num_tokens, top_k, num_experts, num_ranks;
  int64_t rank;  // whose handle this is
  // [L * R], or nullptr: running count of the rows by local expert and source rank. With it, ranks compare experts,
  // too.
  const int32_t* layout_range = nullptr;

  // The rank of the expert that slot token * K + k was sent to, for a slot with a row.
  int64_t destination(int64_t slot) const { return topk_idx[slot] / (num_experts / num_ranks); }

  // Whether row n goes to another rank.
  bool goes_away(int64_t n) const { return recv_src_idx[3 * n] >= 0 && recv_src_idx[3 * n] != rank; }

  // What every rank publishes so that check() can tell that the handles of all ranks are of one dispatch. Sets
  // `wrong` if this handle alone is inconsistent.
  std::vector<int32_t> words(std::string& wrong) const;

  // A check for Operation over the words of all ranks.
  static std::string check(const Operation& op);

  // Rows that `rank` holds, from the words of all ranks.
  static int64_t rows_at(const Operation& op, int rank);

  // From row n at the expert's rank to slot token * K + k of the token's rank, in row order, where these are two ranks.
  std::vector<Entry> returns() const;

  // From slot token * K + k to the row at the expert's rank, in slot order.
  std::vector<Entry> sends() const;
};

}  // namespace deep_ep
