// The combines: the token's rank says which rows it wants, and with which weights; the expert's rank sums up the
// rows of each token, and sends one row back; the token's rank sums up what the ranks send.
//
// A record is int32: the token, then for every k the expert, or -1, its row, and the bits of its weight.
#pragma once

#include "arrivals.h"
#include "counts.h"
#include "rows.h"

namespace deep_ep {

template <typename T>
class Combine {
 public:
  __aicore__ void init(Op op, GM_ADDR x, GM_ADDR topk_idx, GM_ADDR topk_weights, GM_ADDR send_head, GM_ADDR windows,
                       GM_ADDR combined_x, GM_ADDR workspace, const Tiling& tiling) {
    tiling_ = &tiling;
    x_ = x;
    combined_x_ = combined_x;
    exchange_.init(pipe_, tiling, windows, workspace, op);
    counts_.init(pipe_, tiling, workspace, topk_idx, send_head);
    weights_.init(pipe_, tiling, topk_weights);
    records_.init(pipe_, tiling);
    places_.init(pipe_, tiling);
    rows_.init(pipe_, tiling);
    local_experts_ = tiling.work.experts / tiling.work.ranks;
  }

  __aicore__ void process() {
    if (exchange_.has_failed_before()) return;
    exchange_.begin();
    do round();
    while (!exchange_.has_failed() && exchange_.next_round(kAsked));
    exchange_.finish();
  }

 private:
  enum Phase { kAsked, kSummed };
  enum RecordWord { kExpert, kRow, kWeight, kRecordWords };

  __aicore__ void round() {
    if (counts_.count(exchange_, exchange_.own_tokens())) ask();
    exchange_.raise_all(kAsked, counts_.numbers());
    if (exchange_.all_raised(kAsked))
      for (Share share(exchange_, *tiling_, kAsked, false); share.any(); share.next())
        for (Chunk chunk = share.chunk(); chunk.any(); chunk.next()) sum(share.source(), chunk);
    const bool agreed = exchange_.agree();
    exchange_.raise_all(kSummed, counts_.numbers());
    if (agreed && exchange_.all_raised(kSummed)) gather();
  }

  // Records of this block's tokens, to the ranks of their experts.
  __aicore__ void ask() {
    Numbers& numbers = counts_.numbers();
    numbers.begin_again();
    for (Chunk chunk = exchange_.own_tokens(); chunk.any(); chunk.next()) {
      counts_.read(chunk);
      weights_.load(chunk);
      order<HardEvent::MTE2_S>();
      for (int64_t i = 0; i < chunk.count(); ++i) {
        numbers.next_token();
        places_.clear(i);
        records_.set_token(i, chunk.first + i);
        for (int64_t k = 0; k < tiling_->work.top_k; ++k) {
          const int32_t expert = counts_.expert(i, k);
          records_.set(i, k, kExpert, expert);
          records_.set(i, k, kRow, counts_.row(i, k));
          records_.set(i, k, kWeight, bits_of(weights_.get(i, k)));
          if (expert < 0) continue;
          const int32_t rank = numbers.rank_of(expert);
          if (numbers.is_new(rank)) add_place(i, rank, numbers.of_rank(rank));
        }
      }
      order<HardEvent::S_MTE3>();
      for (int64_t i = 0; i < chunk.count(); ++i)
        for (int64_t n = 0; n < places_.count(i); ++n) records_.store(i, places_.place(i, n));
      order<HardEvent::MTE3_S>();
    }
  }

  __aicore__ void add_place(int64_t i, int64_t rank, int64_t number) {
    places_.add(i, exchange_.record(exchange_.slot(rank, exchange_.rank()), number));
  }

  // The sums that `source` has asked for, to its window.
  __aicore__ void sum(int64_t source, const Chunk& chunk) {
    order<HardEvent::S_MTE2>();
    records_.load(exchange_.record(exchange_.slot(exchange_.rank(), source), 0), chunk);
    order<HardEvent::MTE2_S>();
    GM_ADDR sums = exchange_.slot(source, exchange_.rank());
    for (int64_t i = 0; i < chunk.count(); ++i) {
      places_.clear(i);
      for (int64_t k = 0; k < tiling_->work.top_k; ++k) {
        const int32_t expert = records_.get(i, k, kExpert);
        if (expert < 0 || expert / local_experts_ != exchange_.rank()) continue;
        const int64_t row = records_.get(i, k, kRow);
        if (row < tiling_->work.rows)
          places_.add(i, x_ + row * tiling_->row_bytes, records_.get(i, k, kWeight));
        else
          exchange_.fail(Failure::bad_row, source, kAsked, tiling_->work.rows, row);
      }
      rows_.sum(places_, i, exchange_.row(sums, chunk.first + i));
    }
  }

  // What has come back for this block's tokens.
  __aicore__ void gather() {
    Numbers& numbers = counts_.numbers();
    numbers.begin_again();
    for (Chunk chunk = exchange_.own_tokens(); chunk.any(); chunk.next()) {
      order<HardEvent::S_MTE2>();
      counts_.read(chunk);
      order<HardEvent::MTE2_S>();
      for (int64_t i = 0; i < chunk.count(); ++i) {
        numbers.next_token();
        places_.clear(i);
        for (int64_t k = 0; k < tiling_->work.top_k; ++k) {
          const int32_t expert = counts_.expert(i, k), rank = expert < 0 ? -1 : numbers.rank_of(expert);
          if (rank < 0 || !numbers.is_new(rank)) continue;
          GM_ADDR slot = exchange_.slot(exchange_.rank(), rank);
          places_.add(i, exchange_.row(slot, numbers.of_rank(rank)), bits_of(1.0f));
        }
        rows_.sum(places_, i, combined_x_ + (chunk.first + i) * tiling_->row_bytes);
      }
    }
  }

  const Tiling* tiling_ = nullptr;
  GM_ADDR x_ = nullptr;
  GM_ADDR combined_x_ = nullptr;
  int64_t local_experts_ = 1;
  TPipe pipe_;
  Exchange exchange_;
  Counts counts_;
  TokenValues<float> weights_;
  Records<kRecordWords> records_;
  Places places_;
  RowSummer<T> rows_;
};

}  // namespace deep_ep
