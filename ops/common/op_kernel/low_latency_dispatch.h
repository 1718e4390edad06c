// The low-latency dispatches: a token's row goes once to every rank of its experts, with a record of what it is for;
// the receiver copies it to the row of each expert.
//
// A record is int32: the token, then for every k the expert, or -1, and the number of the row among those of this
// source for that expert; then the bits of the row's scale, if it has one.
#pragma once

#include "arrivals.h"
#include "counts.h"
#include "rows.h"

namespace deep_ep {

// Rows: PlainRows or Int8Rows.
template <typename Rows>
class LowLatencyDispatch {
 public:
  // Without scales recv_scales is nullptr.
  __aicore__ void init(Op op, GM_ADDR x, GM_ADDR topk_idx, GM_ADDR windows, GM_ADDR recv_x, GM_ADDR recv_scales,
                       GM_ADDR recv_count, GM_ADDR recv_src_idx, GM_ADDR layout_range, GM_ADDR send_head,
                       GM_ADDR workspace, const Tiling& tiling) {
    tiling_ = &tiling;
    x_ = x;
    recv_x_ = recv_x;
    recv_scales_ = recv_scales;
    recv_row_bytes_ = tiling.work.hidden * tiling.work.sent_bytes;
    recv_count_ = recv_count;
    recv_src_idx_ = recv_src_idx;
    layout_range_ = layout_range;
    exchange_.init(pipe_, tiling, windows, workspace, op);
    counts_.init(pipe_, tiling, workspace, topk_idx);
    send_head_.init(pipe_, tiling, send_head);
    records_.init(pipe_, tiling);
    places_.init(pipe_, tiling);
    sources_.init(pipe_, tiling.chunk_tokens * tiling.work.top_k * kSourceWords);
    rows_.init(pipe_, tiling);
    local_experts_ = tiling.work.experts / tiling.work.ranks;
    first_expert_ = exchange_.rank() * local_experts_;
  }

  __aicore__ void process() {
    if (exchange_.has_failed_before()) return;
    exchange_.begin();
    if (counts_.count(exchange_, exchange_.own_tokens())) {
      counts_.send(exchange_);
      send();
    }
    exchange_.raise_all(0, counts_.numbers());
    if (exchange_.all_raised(0)) {
      counts_.receive(exchange_);
      number_rows();
      answer();
      expand();
      clear_rest();
    }
    exchange_.finish();
  }

 private:
  enum RecordWord { kExpert, kNumber, kRecordWords };
  // Source rank, token and k of a row, and what aligns them; then its scale, likewise.
  static constexpr int64_t kScale = 8, kSourceWords = Rows::kHasScales ? 16 : 8;

  // Rows and records of this block's tokens, to the ranks of their experts.
  __aicore__ void send() {
    Numbers& numbers = counts_.numbers();
    numbers.begin_again();
    for (Chunk chunk = exchange_.own_tokens(); chunk.any(); chunk.next()) {
      counts_.read(chunk);
      order<HardEvent::MTE2_S>();
      for (int64_t i = 0; i < chunk.count(); ++i) {
        numbers.next_token();
        places_.clear(i);
        records_.set_token(i, chunk.first + i);
        for (int64_t k = 0; k < tiling_->work.top_k; ++k) {
          const int32_t expert = counts_.expert(i, k);
          records_.set(i, k, kExpert, expert);
          records_.set(i, k, kNumber, expert < 0 ? -1 : numbers.of_expert(expert));
          if (expert < 0) continue;
          const int32_t rank = numbers.rank_of(expert);
          if (numbers.is_new(rank)) add_place(i, rank, numbers.of_rank(rank));
        }
      }
      for (int64_t i = 0; i < chunk.count(); ++i) {
        const int32_t scale = rows_.send(x_ + (chunk.first + i) * tiling_->row_bytes, places_, i);
        if constexpr (Rows::kHasScales) records_.set_extra(i, scale);
      }
      order<HardEvent::S_MTE3>();
      for (int64_t i = 0; i < chunk.count(); ++i)
        for (int64_t n = 0; n < places_.count(i); ++n) records_.store(i, reinterpret_cast<GM_ADDR>(places_.with(i, n)));
      order<HardEvent::MTE3_S>();  // the next chunk's records are made in their place
    }
  }

  __aicore__ void add_place(int64_t i, int64_t rank, int64_t number) {
    GM_ADDR slot = exchange_.slot(rank, exchange_.rank());
    places_.add(i, exchange_.row(slot, number), reinterpret_cast<int64_t>(exchange_.record(slot, number)));
  }

  // numbers().next() becomes the first row of this block's tokens for each expert, at the expert's rank;
  // numbers().before() the first row of each of this rank's experts.
  __aicore__ void number_rows() {
    Numbers& numbers = counts_.numbers();
    int32_t row = 0;
    for (int64_t expert = 0; expert < tiling_->work.experts; ++expert) {
      const int64_t l = expert - first_expert_;
      if (expert % local_experts_ == 0) row = 0;
      numbers.next().set(expert, numbers.before().get(expert) + row);
      if (l >= 0 && l < local_experts_) numbers.before().set(l, row);
      row += numbers.total().get(expert);
      if (l + 1 == local_experts_) delivered_ = clip(row);
    }
  }

  // Rows that there is no room for are dropped.
  __aicore__ int64_t clip(int64_t row) const { return row < tiling_->work.rows ? row : tiling_->work.rows; }

  // Which row each (token, k) has got, if it was not one too many.
  __aicore__ void answer() {
    for (Chunk chunk = exchange_.own_tokens(); chunk.any(); chunk.next()) {
      counts_.read(chunk);
      order<HardEvent::MTE2_S>();
      for (int64_t i = 0; i < chunk.count(); ++i)
        for (int64_t k = 0; k < tiling_->work.top_k; ++k) {
          const int32_t expert = counts_.expert(i, k);
          const int32_t row = expert < 0 ? -1 : counts_.numbers().of_expert(expert);
          send_head_.set(i, k, row < tiling_->work.rows ? row : -1);
        }
      order<HardEvent::S_MTE3>();
      send_head_.store(chunk);
      order<HardEvent::MTE3_S>();
    }
  }

  // This block's share of what has arrived. The last block passes all sources, and so comes to know which rows of each
  // expert are from which source.
  __aicore__ void expand() {
    const bool is_last = GetBlockIdx() + 1 == GetBlockNum();
    Table& next_rows = counts_.numbers().before();  // of each of this rank's experts
    Table& layout = counts_.numbers().total();
    for (Share share(exchange_, *tiling_, 0, is_last); share.any(); share.next()) {
      for (Chunk chunk = share.chunk(); chunk.any(); chunk.next()) expand(share.source(), chunk);
      order<HardEvent::S_V>();
      counts_.numbers().reader().add(exchange_.slot(exchange_.rank(), share.source()) + first_expert_ * sizeof(int32_t),
                                     local_experts_, next_rows);
      order<HardEvent::V_S>();
      if (!is_last) continue;
      for (int64_t l = 0; l < local_experts_; ++l) layout.set(l * exchange_.ranks() + share.source(), next_rows.get(l));
    }
    if (is_last) describe(layout);
  }

  __aicore__ void expand(int64_t source, const Chunk& chunk) {
    GM_ADDR slot = exchange_.slot(exchange_.rank(), source);
    records_.load(exchange_.record(slot, 0), chunk);
    order<HardEvent::MTE2_S>();
    for (int64_t i = 0; i < chunk.count(); ++i) {
      places_.clear(i);
      for (int64_t k = 0; k < tiling_->work.top_k; ++k) {
        const int64_t l = records_.get(i, k, kExpert) - first_expert_;
        if (l < 0 || l >= local_experts_) continue;
        const int64_t row = counts_.numbers().before().get(l) + records_.get(i, k, kNumber);
        if (row >= tiling_->work.rows) continue;
        const int64_t at = source_words(i, places_.count(i));
        sources_.set(at, static_cast<int32_t>(source));
        sources_.set(at + 1, records_.token(i));
        sources_.set(at + 2, static_cast<int32_t>(k));
        if constexpr (Rows::kHasScales) sources_.set(at + kScale, records_.extra(i));
        places_.add(i, recv_x_ + row * recv_row_bytes_, row);
      }
    }
    order<HardEvent::S_MTE3>();
    for (int64_t i = 0; i < chunk.count(); ++i) {
      for (int64_t n = 0; n < places_.count(i); ++n) {
        const int64_t row = places_.with(i, n);
        store(recv_src_idx_ + row * 3 * sizeof(int32_t), source_of(i, n, 0), 3);
        if constexpr (Rows::kHasScales) store(recv_scales_ + row * sizeof(float), source_of(i, n, kScale), 1);
      }
      rows_.copy(exchange_.row(slot, chunk.first + i), places_, i);
    }
    order<HardEvent::MTE3_S>();
  }

  __aicore__ LocalTensor<int32_t> source_of(int64_t i, int64_t n, int64_t word) {
    return sources_.tensor()[static_cast<uint32_t>(source_words(i, n) + word)];
  }
  __aicore__ int64_t source_words(int64_t i, int64_t n) const { return (i * tiling_->work.top_k + n) * kSourceWords; }

  // layout_range, and the rows of each expert.
  __aicore__ void describe(Table& layout) {
    const int64_t R = exchange_.ranks();
    LocalTensor<int64_t> counts = counts_.numbers().next().tensor().ReinterpretCast<int64_t>();
    for (int64_t l = 0, begin = 0; l < local_experts_; ++l) {
      const int64_t end = clip(layout.get((l + 1) * R - 1));
      counts.SetValue(static_cast<uint32_t>(l), end - begin);
      begin = end;
    }
    order<HardEvent::S_MTE3>();
    store(layout_range_, layout.tensor(), local_experts_ * R);
    store(recv_count_, counts, local_experts_);
  }

  // Rows that hold nothing, each block its share of them.
  __aicore__ void clear_rest() {
    const Split split = Split::of(tiling_->work.rows - delivered_, GetBlockNum());
    const int64_t first = delivered_ + split.begin(GetBlockIdx());
    const int64_t count = split.end(GetBlockIdx()) - split.begin(GetBlockIdx());
    constexpr int64_t kSourceBytes = 3 * sizeof(int32_t);
    rows_.fill(recv_x_ + first * recv_row_bytes_, count * recv_row_bytes_, 0);
    rows_.fill(recv_src_idx_ + first * kSourceBytes, count * kSourceBytes, -1);
    if constexpr (Rows::kHasScales) rows_.fill(recv_scales_ + first * sizeof(float), count * sizeof(float), 0);
  }

  const Tiling* tiling_ = nullptr;
  GM_ADDR x_ = nullptr;
  GM_ADDR recv_x_ = nullptr;
  GM_ADDR recv_scales_ = nullptr;
  GM_ADDR recv_count_ = nullptr;
  GM_ADDR recv_src_idx_ = nullptr;
  GM_ADDR layout_range_ = nullptr;
  int64_t recv_row_bytes_ = 0;
  int64_t local_experts_ = 1, first_expert_ = 0, delivered_ = 0;
  TPipe pipe_;
  Exchange exchange_;
  Counts counts_;
  TokenValues<int32_t> send_head_;
  Records<kRecordWords, Rows::kHasScales> records_;
  Places places_;
  Array<int32_t> sources_;
  Rows rows_;
};

}  // namespace deep_ep
