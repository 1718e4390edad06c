// Records, which say what goes with rows, and each block's share of what has arrived.
#pragma once

#include "exchange.h"

namespace deep_ep {

// Records of a chunk, int32: the token, then kWords words for every k, then kExtra words.
template <int64_t kWords, int64_t kExtra = 0>
class Records {
 public:
  __aicore__ void init(TPipe& pipe, const Tiling& tiling) {
    stride_ = tiling.record_bytes / sizeof(int32_t);
    extra_ = 1 + kWords * tiling.work.top_k;
    values_.init(pipe, tiling.chunk_tokens * stride_);
  }

  // Those of a chunk of what lies in a slot, by MTE2.
  __aicore__ void load(GM_ADDR from, const Chunk& chunk) {
    deep_ep::load(values_.tensor(), from + chunk.first * stride_ * sizeof(int32_t), chunk.count() * stride_);
  }
  // One, by MTE3.
  __aicore__ void store(int64_t i, GM_ADDR to) {
    deep_ep::store(to, values_.tensor()[static_cast<uint32_t>(i * stride_)], extra_ + kExtra);
  }

  __aicore__ void set_token(int64_t i, int64_t token) { values_.set(i * stride_, static_cast<int32_t>(token)); }
  __aicore__ int32_t token(int64_t i) { return values_.get(i * stride_); }
  __aicore__ void set_extra(int64_t i, int32_t value) { values_.set(i * stride_ + extra_, value); }
  __aicore__ int32_t extra(int64_t i) { return values_.get(i * stride_ + extra_); }
  __aicore__ void set(int64_t i, int64_t k, int64_t word, int32_t value) {
    values_.set(i * stride_ + 1 + k * kWords + word, value);
  }
  __aicore__ int32_t get(int64_t i, int64_t k, int64_t word) {
    return values_.get(i * stride_ + 1 + k * kWords + word);
  }

 private:
  int64_t stride_ = 0, extra_ = 0;
  Array<int32_t> values_;
};

// Goes through the sources whose entries are this block's share: all entries are split evenly over the blocks, whoever
// they are from.
class Share {
 public:
  // The last block may want to pass all sources, `to_the_end`.
  __aicore__ Share(Exchange& exchange, const Tiling& tiling, int64_t phase, bool to_the_end)
      : exchange_(&exchange), phase_(phase), size_(tiling.chunk_tokens), to_the_end_(to_the_end) {
    int64_t arrived = 0;
    for (int64_t source = 0; source < exchange.ranks(); ++source) arrived += exchange.told(phase, source, kEntries);
    const Split split = Split::of(arrived, GetBlockNum());
    begin_ = split.begin(GetBlockIdx());
    end_ = split.end(GetBlockIdx());
    enter();
  }

  __aicore__ bool any() const { return source_ < exchange_->ranks() && (at_ < end_ || to_the_end_); }
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
  __aicore__ void enter() { entries_ = source_ < exchange_->ranks() ? exchange_->told(phase_, source_, kEntries) : 0; }

  Exchange* exchange_;
  int64_t phase_, size_;
  bool to_the_end_;
  int64_t begin_ = 0, end_ = 0;
  int64_t source_ = 0, entries_ = 0, at_ = 0;  // at_: entries of the sources before
};

}  // namespace deep_ep
