// Messages: the records that this rank sends, one per token and rank that the token goes to, and those that arrive.
//
// A record is int32: the token, then for every k the expert, or -1, a number of its row, and with weights the bits of
// its weight; then kExtra words.
#pragma once

#include "counts.h"

namespace deep_ep {

template <bool kHasWeights, int64_t kExtra = 0>
class Messages {
 public:
  __aicore__ Messages() {}
  __aicore__ void init(TPipe& pipe, const Tiling& tiling, Exchange& exchange, Counts& counts, GM_ADDR topk_weights) {
    tiling_ = &tiling;
    exchange_ = &exchange;
    counts_ = &counts;
    local_experts_ = tiling.work.experts / tiling.work.ranks;
    first_expert_ = exchange.rank() * local_experts_;
    stride_ = tiling.record_bytes / sizeof(int32_t);
    extra_ = 1 + kWords * tiling.work.top_k;
    words_.init(pipe, tiling.chunk_tokens * stride_);
    places_.init(pipe, tiling);
    if constexpr (kHasWeights) weights_.init(pipe, tiling, topk_weights);
  }

  // The records of a chunk of this round's tokens. places() has where their rows go.
  __aicore__ void make(const Chunk& chunk) {
    Numbers& numbers = counts_->numbers();
    counts_->read(chunk);
    if constexpr (kHasWeights) weights_.load(chunk);
    order<HardEvent::MTE2_S>();
    for (int64_t i = 0; i < chunk.count(); ++i) {
      numbers.next_token();
      places_.clear(i);
      words_.set(i * stride_, static_cast<int32_t>(chunk.first + i));
      for (int64_t k = 0; k < tiling_->work.top_k; ++k) {
        const int32_t expert = counts_->expert(i, k);
        set(i, k, kExpert, expert);
        set(i, k, kRow, expert < 0 ? -1 : counts_->row_for(expert, i, k));
        if constexpr (kHasWeights) set(i, k, kWeight, bits_of(weights_.get(i, k)));
        if (expert < 0) continue;
        const int32_t rank = numbers.rank_of(expert);
        if (numbers.is_new(rank)) add_place(i, rank, numbers.of_rank(rank));
      }
    }
  }
  __aicore__ void set_extra(int64_t i, int32_t value) { words_.set(i * stride_ + extra_, value); }

  // Sends them. The next ones are made in their place.
  __aicore__ void send(const Chunk& chunk) {
    order<HardEvent::S_MTE3>();
    for (int64_t i = 0; i < chunk.count(); ++i)
      for (int64_t n = 0; n < places_.count(i); ++n)
        store(reinterpret_cast<GM_ADDR>(places_.with(i, n)), words_.tensor()[static_cast<uint32_t>(i * stride_)],
              extra_ + kExtra);
    order<HardEvent::MTE3_S>();
  }

  // A chunk of the records that have come from `source`.
  __aicore__ void load(int64_t source, const Chunk& chunk) {
    deep_ep::load(words_.tensor(), exchange_->record(exchange_->slot(exchange_->rank(), source), chunk.first),
                  chunk.count() * stride_);
    order<HardEvent::MTE2_S>();
  }

  __aicore__ int32_t token(int64_t i) { return words_.get(i * stride_); }
  // Which of this rank's experts it is, or -1.
  __aicore__ int64_t local_expert(int64_t i, int64_t k) {
    const int64_t l = get(i, k, kExpert) - first_expert_;
    return l < 0 || l >= local_experts_ ? -1 : l;
  }
  __aicore__ int64_t row(int64_t i, int64_t k) { return get(i, k, kRow); }
  __aicore__ int32_t weight(int64_t i, int64_t k) { return get(i, k, kWeight); }  // its bits
  __aicore__ int32_t extra(int64_t i) { return words_.get(i * stride_ + extra_); }

  __aicore__ Places& places() { return places_; }

 private:
  enum Word { kExpert, kRow, kWeight };
  static constexpr int64_t kWords = kHasWeights ? 3 : 2;

  __aicore__ void add_place(int64_t i, int64_t rank, int64_t number) {
    GM_ADDR slot = exchange_->slot(rank, exchange_->rank());
    places_.add(i, exchange_->row(slot, number), reinterpret_cast<int64_t>(exchange_->record(slot, number)));
  }

  __aicore__ void set(int64_t i, int64_t k, Word word, int32_t value) {
    words_.set(i * stride_ + 1 + k * kWords + word, value);
  }
  __aicore__ int32_t get(int64_t i, int64_t k, Word word) { return words_.get(i * stride_ + 1 + k * kWords + word); }

  const Tiling* tiling_ = nullptr;
  Exchange* exchange_ = nullptr;
  Counts* counts_ = nullptr;
  int64_t local_experts_ = 1, first_expert_ = 0;
  int64_t stride_ = 0, extra_ = 0;
  Array<int32_t> words_;
  Places places_;
  TokenValues<float> weights_;
};

// Goes through the sources whose entries are this block's share: all entries are split evenly over the blocks, whoever
// they are from.
class Share {
 public:
  __aicore__ Share(Exchange& exchange, const Tiling& tiling) : exchange_(&exchange), size_(tiling.chunk_tokens) {
    int64_t arrived = 0;
    for (int64_t source = 0; source < exchange.ranks(); ++source) arrived += exchange.entries(source);
    const Split split = Split::of(arrived, GetBlockNum());
    begin_ = split.begin(GetBlockIdx());
    end_ = split.end(GetBlockIdx());
    enter();
  }

  __aicore__ bool any() const { return source_ < exchange_->ranks() && at_ < end_; }
  __aicore__ void next() {
    at_ += entries_;
    ++source_;
    enter();
  }
  __aicore__ int64_t source() const { return source_; }
  // The block's entries of the source; none where it only passes.
  __aicore__ Chunk chunk() const {
    return {begin_ > at_ ? begin_ - at_ : 0, end_ - at_ < entries_ ? end_ - at_ : entries_, size_};
  }

 private:
  __aicore__ void enter() { entries_ = source_ < exchange_->ranks() ? exchange_->entries(source_) : 0; }

  Exchange* exchange_;
  int64_t size_;
  int64_t begin_ = 0, end_ = 0;
  int64_t source_ = 0, entries_ = 0, at_ = 0;  // at_: entries of the sources before
};

}  // namespace deep_ep
