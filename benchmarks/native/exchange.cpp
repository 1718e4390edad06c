#include "exchange.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

namespace {

float load(float value) { return value; }
float load(_Float16 value) { return static_cast<float>(value); }
float load(uint16_t bf16) {
  const uint32_t bits = uint32_t{bf16} << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

void store(float value, float& to) { to = value; }
void store(float value, _Float16& to) { to = static_cast<_Float16>(value); }
void store(float value, uint16_t& to) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  to = static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// out[n] = sum over the bag n of weight * row, in fp32. A strip of the sum stays in registers.
template <typename T>
void sum_bags(int64_t threads, T* out, int64_t count, const int64_t* at, const int32_t* index, const float* weights,
              const T* rows, int64_t hidden) {
  constexpr int64_t kStrip = 64;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t n = 0; n < count; ++n) {
    for (int64_t begin = 0; begin < hidden; begin += kStrip) {
      float sum[kStrip] = {};
      const int64_t size = std::min(kStrip, hidden - begin);
      for (int64_t b = at[n]; b < at[n + 1]; ++b) {
        const T* row = rows + index[b] * hidden + begin;
        const float weight = weights[b];
        if (size == kStrip)
          for (int64_t i = 0; i < kStrip; ++i) sum[i] += weight * load(row[i]);
        else
          for (int64_t i = 0; i < size; ++i) sum[i] += weight * load(row[i]);
      }
      T* to = out + n * hidden + begin;
      for (int64_t i = 0; i < size; ++i) store(sum[i], to[i]);
    }
  }
}

void sum_bags(const Exchange& e, void* out, int64_t count, const int64_t* at, const int32_t* index,
              const float* weights, const void* rows) {
  const auto run = [&](auto* typed) {
    using T = std::remove_pointer_t<decltype(typed)>;
    sum_bags(e.threads, typed, count, at, index, weights, static_cast<const T*>(rows), e.hidden);
  };
  if (e.dtype == 0) run(static_cast<float*>(out));
  if (e.dtype == 1) run(static_cast<_Float16*>(out));
  if (e.dtype == 2) run(static_cast<uint16_t*>(out));
}

// Copies row n of `rows` to every row of `to` in its bag.
void copy_bags(const Exchange& e, void* to, int64_t count, const int64_t* at, const int32_t* index, const void* rows) {
  const int64_t bytes = e.row_bytes();
#pragma omp parallel for num_threads(e.threads) if (e.threads > 1)
  for (int64_t n = 0; n < count; ++n)
    for (int64_t b = at[n]; b < at[n + 1]; ++b)
      std::memcpy(static_cast<char*>(to) + index[b] * bytes, static_cast<const char*>(rows) + n * bytes, bytes);
}

int64_t received(const Exchange& e) {
  int64_t rows = 0;
  for (int64_t r = 0; r < e.ranks; ++r) rows += e.recv_count(r)[0];
  return rows;
}

}  // namespace

void exchange_pack(const Exchange* exchange, const void* x, const int64_t* ids, const float* weights) {
  const Exchange& e = *exchange;
  const int64_t L = e.local_experts(), K = e.top_k;

  // Counts.
  std::fill_n(e.send_counts, e.ranks * (1 + L), 0);
  std::vector<int64_t> newest(e.ranks, -1);  // token that has a row for the rank
  for (int64_t t = 0; t < e.tokens; ++t)
    for (int64_t k = 0; k < K; ++k) {
      const int64_t expert = ids[t * K + k], r = expert / L;
      ++e.send_count(r)[1 + expert % L];
      if (e.merge && newest[r] == t) continue;
      ++e.send_count(r)[0];
      newest[r] = t;
    }

  // Where every row goes: next[r] with merge, next[expert] without.
  std::vector<int64_t> next(e.merge ? e.ranks : e.experts);
  int64_t row = 0;
  for (size_t i = 0; i < next.size(); ++i) {
    next[i] = row;
    row += e.merge ? e.send_count(i)[0] : e.send_count(i / L)[1 + i % L];
  }
  std::fill(newest.begin(), newest.end(), -1);
  int64_t bags = 0;
  for (int64_t t = 0; t < e.tokens; ++t) {
    e.token_at[t] = bags;
    for (int64_t k = 0; k < K; ++k) {
      const int64_t expert = ids[t * K + k], r = expert / L;
      if (e.merge && newest[r] == t) continue;
      newest[r] = t;
      const int64_t to = next[e.merge ? r : expert]++;
      e.token_rows[bags] = static_cast<int32_t>(to);
      e.token_weights[bags++] = e.merge ? 1.0f : weights[t * K + k];
      if (!e.merge) continue;
      int32_t* meta = e.send_meta + to * 2 * K;
      for (int64_t i = 0; i < K; ++i) meta[i] = static_cast<int32_t>(ids[t * K + i]);
      std::memcpy(meta + K, weights + t * K, 4 * K);
    }
  }
  e.token_at[e.tokens] = bags;

  copy_bags(e, e.send_rows, e.tokens, e.token_at, e.token_rows, x);
}

int64_t exchange_unpack(const Exchange* exchange) {
  const Exchange& e = *exchange;
  if (!e.expand) return received(e);
  const int64_t L = e.local_experts(), K = e.top_k;

  // Rows of recv_x by expert, source.
  std::vector<int64_t> next(L * e.ranks);
  int64_t N = 0;
  for (int64_t l = 0; l < L; ++l)
    for (int64_t s = 0; s < e.ranks; ++s) {
      next[l * e.ranks + s] = N;
      N += e.recv_count(s)[1 + l];
    }

  int64_t wire = 0, bags = 0;
  const auto add = [&](int64_t l, int64_t s, float weight) {
    e.wire_rows[bags] = static_cast<int32_t>(next[l * e.ranks + s]++);
    e.wire_weights[bags++] = weight;
  };
  for (int64_t s = 0; s < e.ranks; ++s) {
    if (e.merge) {
      for (const int64_t end = wire + e.recv_count(s)[0]; wire < end; ++wire) {
        e.wire_at[wire] = bags;
        const int32_t* meta = e.recv_meta + wire * 2 * K;
        for (int64_t k = 0; k < K; ++k) {
          const int64_t l = meta[k] - e.rank * L;
          float weight;
          std::memcpy(&weight, meta + K + k, 4);
          if (l >= 0 && l < L) add(l, s, weight);
        }
      }
    } else {
      for (int64_t l = 0; l < L; ++l)
        for (const int64_t end = wire + e.recv_count(s)[1 + l]; wire < end; ++wire) {
          e.wire_at[wire] = bags;
          add(l, s, 1.0f);
        }
    }
  }
  e.wire_at[wire] = bags;

  copy_bags(e, e.recv_x, wire, e.wire_at, e.wire_rows, e.recv_rows);
  return N;
}

void exchange_pack_back(const Exchange* exchange, const void* y) {
  const Exchange& e = *exchange;
  const int64_t M = received(e), bytes = e.row_bytes();
  if (e.merge) {
    sum_bags(e, e.recv_rows, M, e.wire_at, e.wire_rows, e.wire_weights, y);
    return;
  }
#pragma omp parallel for num_threads(e.threads) if (e.threads > 1)
  for (int64_t m = 0; m < M; ++m)
    std::memcpy(static_cast<char*>(e.recv_rows) + m * bytes,
                static_cast<const char*>(y) + e.wire_rows[e.wire_at[m]] * bytes, bytes);
}

void exchange_unpack_back(const Exchange* exchange, void* out) {
  const Exchange& e = *exchange;
  sum_bags(e, out, e.tokens, e.token_at, e.token_rows, e.token_weights, e.send_rows);
}
