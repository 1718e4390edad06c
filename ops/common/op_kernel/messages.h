// Messages: the records that this rank sends, one per token and rank that the token goes to, and those that arrive.
//
// A record is int32: kExtra words, the token, then for every k the expert, or -1, a number of its row, and with weights
// the bits of its weight.
#pragma once

#include "counts.h"

namespace deep_ep {

// Goes through this block's share of all entries, which are split evenly over the blocks, whoever they are from.
class Share {
 public:
  __aicore__ Share(Exchange& exchange) : exchange_(&exchange) {
    int64_t arrived = 0;
    for (int64_t source = 0; source < exchange.ranks(); ++source) arrived += exchange.entries(source);
    const Split split = Split::of(arrived, GetBlockNum());
    at_ = split.begin(GetBlockIdx());
    end_ = split.end(GetBlockIdx());
  }

  __aicore__ bool any() const { return at_ < end_; }
  // The next entries, `most` or fewer, all of one source.
  __aicore__ Chunk take(int64_t most) {
    while (at_ >= first_ + exchange_->entries(source_)) first_ += exchange_->entries(source_++);
    const int64_t behind = first_ + exchange_->entries(source_), end = behind < end_ ? behind : end_;
    const int64_t begin = at_;
    at_ = end - at_ < most ? end : at_ + most;
    return {begin - first_, at_ - first_, most};
  }
  // Theirs.
  __aicore__ int64_t source() const { return source_; }

 private:
  Exchange* exchange_;
  int64_t at_ = 0, end_ = 0;
  int64_t source_ = 0, first_ = 0;  // first_: entries of the sources before
};

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
    length_ = kExtra + 1 + kWords * tiling.work.top_k;
    words_.init(pipe, tiling.chunk_tokens * stride_);
    from_.init(pipe, tiling.chunk_tokens);
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
      words_.set(i * stride_ + kExtra, static_cast<int32_t>(chunk.first + i));
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
  __aicore__ void set_extra(int64_t i, int32_t value) { words_.set(i * stride_, value); }

  // Sends them. The next ones are made in their place.
  __aicore__ void send(const Chunk& chunk) {
    order<HardEvent::S_MTE3>();
    for (int64_t i = 0; i < chunk.count(); ++i)
      for (int64_t n = 0; n < places_.count(i); ++n)
        store(reinterpret_cast<GM_ADDR>(places_.with(i, n)), words_.tensor()[static_cast<uint32_t>(i * stride_)],
              length_);
    order<HardEvent::MTE3_S>();
  }

  // The next records of a share of those that have come: how many.
  __aicore__ int64_t load(Share& share) {
    int64_t count = 0;
    while (share.any() && count < tiling_->chunk_tokens) {
      const Chunk chunk = share.take(tiling_->chunk_tokens - count);
      GM_ADDR slot = exchange_->slot(exchange_->rank(), share.source());
      deep_ep::load(words_.tensor()[static_cast<uint32_t>(count * stride_)], exchange_->record(slot, chunk.first),
                    chunk.count() * stride_);
      for (int64_t i = 0; i < chunk.count(); ++i, ++count) from_.set(count, share.source() << 32 | (chunk.first + i));
    }
    order<HardEvent::MTE2_S>();
    return count;
  }
  // Whose it is, and which of that rank's.
  __aicore__ int64_t source(int64_t i) { return from_.get(i) >> 32; }
  __aicore__ int64_t number(int64_t i) { return from_.get(i) & 0xffffffff; }

  __aicore__ int32_t token(int64_t i) { return words_.get(i * stride_ + kExtra); }
  // Which of this rank's experts it is, or -1.
  __aicore__ int64_t local_expert(int64_t i, int64_t k) {
    const int64_t l = get(i, k, kExpert) - first_expert_;
    return l < 0 || l >= local_experts_ ? -1 : l;
  }
  __aicore__ int64_t row(int64_t i, int64_t k) { return get(i, k, kRow); }
  __aicore__ int32_t weight(int64_t i, int64_t k) { return get(i, k, kWeight); }  // its bits
  // Where a transfer can begin.
  __aicore__ LocalTensor<int32_t> extra(int64_t i) { return words_.tensor()[static_cast<uint32_t>(i * stride_)]; }

  __aicore__ Places& places() { return places_; }

 private:
  enum Word { kExpert, kRow, kWeight };
  static constexpr int64_t kWords = kHasWeights ? 3 : 2;

  __aicore__ void add_place(int64_t i, int64_t rank, int64_t number) {
    GM_ADDR slot = exchange_->slot(rank, exchange_->rank());
    places_.add(i, exchange_->row(slot, number), reinterpret_cast<int64_t>(exchange_->record(slot, number)));
  }

  __aicore__ void set(int64_t i, int64_t k, Word word, int32_t value) {
    words_.set(i * stride_ + kExtra + 1 + k * kWords + word, value);
  }
  __aicore__ int32_t get(int64_t i, int64_t k, Word word) {
    return words_.get(i * stride_ + kExtra + 1 + k * kWords + word);
  }

  const Tiling* tiling_ = nullptr;
  Exchange* exchange_ = nullptr;
  Counts* counts_ = nullptr;
  int64_t local_experts_ = 1, first_expert_ = 0;
  int64_t stride_ = 0, length_ = 0;
  Array<int32_t> words_;
  Array<int64_t> from_;
  Places places_;
  TokenValues<float> weights_;
};

}  // namespace deep_ep
