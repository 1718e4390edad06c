// What happens to rows before and after an all-to-all of any library: the tuned competitors.
//
// T local tokens · H hidden · K top-k · E experts · R ranks · L = E/R local experts · N rows of recv_x ·
// S and M: rows that a rank sends and receives.
//
// The wire carries one row per (token, rank) with the ids and weights of the token, or one per (token, expert) in the
// order of experts. A bag is a set of rows that come from, or add up to, one row.
#pragma once

#include <cstdint>

// Sizes, and memory that the caller owns, with room for the largest S, M and N. benchmarks/native.py has the same
// fields.
struct Exchange {
  int64_t tokens, hidden, top_k, experts, ranks, rank;
  int64_t dtype;    // 0: fp32, 1: fp16, 2: bf16
  int64_t threads;  // of this rank
  int64_t merge;    // the wire has one row per (token, rank)
  int64_t expand;   // recv_x has one row per (token, expert); without it, merge is set and recv_x is recv_rows
  // int64 [R, 1 + L]: rows for a rank, and the (token, k) for each of its experts.
  int64_t* send_counts;
  int64_t* recv_counts;
  int32_t* send_meta;  // [S, 2, K], merge: ids, and the bits of weights
  int32_t* recv_meta;  // [M, 2, K]
  void* send_rows;     // [S, H]; for combine: rows that come back
  void* recv_rows;     // [M, H]; for combine: rows that go back
  void* recv_x;        // [N, H]
  // The rows of send_rows that are copies of a token: bag t is token_at[t]..token_at[t + 1].
  int64_t* token_at;
  int32_t* token_rows;
  float* token_weights;
  // The rows of recv_x that are copies of a row of recv_rows.
  int64_t* wire_at;
  int32_t* wire_rows;
  float* wire_weights;

  int64_t local_experts() const { return experts / ranks; }
  int64_t row_bytes() const { return hidden * (dtype == 0 ? 4 : 2); }
  int64_t meta_bytes() const { return 8 * top_k; }
  int64_t* send_count(int64_t r) const { return send_counts + r * (1 + local_experts()); }
  int64_t* recv_count(int64_t r) const { return recv_counts + r * (1 + local_experts()); }
};

extern "C" {

// Fills send_counts, send_meta and send_rows from x [T, H], ids [T, K] and weights [T, K].
void exchange_pack(const Exchange* exchange, const void* x, const int64_t* ids, const float* weights);

// Fills recv_x from recv_counts, recv_meta and recv_rows; returns N.
int64_t exchange_unpack(const Exchange* exchange);

// Fills recv_rows from y [N, H]: with merge, sums of a token's rows. Not for exchanges without expand: y goes as it is.
void exchange_pack_back(const Exchange* exchange, const void* y);

// Fills out [T, H] from what came back into send_rows.
void exchange_unpack_back(const Exchange* exchange, void* out);
}
