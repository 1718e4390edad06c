// What kernels are made of: order between pipes, transfers of any length, tables, and what goes with tokens.
//
// T tokens · H hidden · K top-k · E experts · R ranks · L = E/R local experts · N expert rows.
#pragma once

#include "kernel_operator.h"
#include "tiling.h"
#include "window_map.h"

// The first statement of a kernel: its tiling. It has vector cores alone, and those of AIV_ONLY cannot meet in SyncAll.
#define DEEP_EP_KERNEL(tiling, tiling_data)          \
  KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_MIX_AIV_1_0); \
  REGISTER_TILING_DEFAULT(deep_ep::Tiling);          \
  GET_TILING_DATA_WITH_STRUCT(deep_ep::Tiling, tiling, tiling_data)

namespace deep_ep {

using namespace AscendC;

// Later operations of the event's second pipe follow earlier ones of its first.
template <HardEvent event>
__aicore__ inline void order() {
  const event_t id = static_cast<event_t>(GetTPipePtr()->FetchEventID(event));
  SetFlag<event>(id);
  WaitFlag<event>(id);
}

// All that the blocks of this rank have done is complete, and their writes have arrived.
__aicore__ inline void all_blocks() {
  PipeBarrier<PIPE_ALL>();
  SyncAll();
}

__aicore__ inline uint32_t align(int64_t bytes) {
  return static_cast<uint32_t>((bytes + Tiling::kAlignment - 1) / Tiling::kAlignment * Tiling::kAlignment);
}

union Word {
  float value;
  int32_t bits;
};
__aicore__ inline int32_t bits_of(float value) {
  Word word;
  word.value = value;
  return word.bits;
}
__aicore__ inline float float_of(int32_t bits) {
  Word word;
  word.bits = bits;
  return word.value;
}

template <typename T>
__aicore__ inline GlobalTensor<T> global(GM_ADDR address) {
  GlobalTensor<T> tensor;
  tensor.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(address));
  return tensor;
}

// To and from any address: only the unified buffer's side is aligned.

// Rows of `count` elements, `stride` bytes from one to the next; each begins on an alignment in `to`.
template <typename T>
__aicore__ inline void load_rows(const LocalTensor<T>& to, GM_ADDR from, int64_t stride, int64_t rows, int64_t count) {
  const uint32_t bytes = static_cast<uint32_t>(count * sizeof(T));
  const DataCopyExtParams params{static_cast<uint16_t>(rows), bytes, static_cast<uint32_t>(stride - bytes), 0, 0};
  DataCopyPad(to.template ReinterpretCast<uint8_t>(), global<uint8_t>(from), params,
              DataCopyPadExtParams<uint8_t>{false, 0, 0, 0});
}

// Any number of elements.
template <typename T>
__aicore__ inline void load(const LocalTensor<T>& to, GM_ADDR from, int64_t count) {
  load_rows(to, from, count * sizeof(T), 1, count);
}

template <typename T>
__aicore__ inline void store(GM_ADDR to, const LocalTensor<T>& from, int64_t count) {
  const DataCopyExtParams params{1, static_cast<uint32_t>(count * sizeof(T)), 0, 0, 0};
  DataCopyPad(global<T>(to), from, params);
}

// Rows of `count` elements, each of which begins on an alignment in `from`, `stride` bytes from one to the next.
template <typename T>
__aicore__ inline void store_rows(GM_ADDR to, int64_t stride, const LocalTensor<T>& from, int64_t rows, int64_t count) {
  const uint32_t bytes = static_cast<uint32_t>(count * sizeof(T));
  const DataCopyExtParams params{static_cast<uint16_t>(rows), bytes, 0, static_cast<uint32_t>(stride - bytes), 0};
  DataCopyPad(global<T>(to), from, params);
}

// An array in the unified buffer.
template <typename T>
class Array {
 public:
  __aicore__ Array() {}
  __aicore__ void init(TPipe& pipe, int64_t size) { pipe.InitBuffer(buffer_, align(size * sizeof(T))); }
  __aicore__ LocalTensor<T> tensor() { return buffer_.template Get<T>(); }
  __aicore__ T get(int64_t i) { return tensor().GetValue(static_cast<uint32_t>(i)); }
  __aicore__ void set(int64_t i, T value) { tensor().SetValue(static_cast<uint32_t>(i), value); }

 private:
  TBuf<QuePosition::VECIN> buffer_;
};

// Counts or numbers, by expert, and from Tiling::table_ranks on by rank.
using Table = Array<int32_t>;

// Goes through rows of int32 that lie in global memory, as many to a transfer as there is room for.
class TableReader {
 public:
  __aicore__ TableReader() {}
  __aicore__ void init(TPipe& pipe, const Tiling& tiling) {
    bytes_ = tiling.table_batch * tiling.table_bytes;
    pipe.InitBuffer(queue_, kBuffers, static_cast<uint32_t>(bytes_));
  }

  // `count` rows of `words` words, `stride` bytes from one to the next.
  __aicore__ void begin(GM_ADDR from, int64_t stride, int64_t count, int64_t words) {
    from_ = from;
    stride_ = stride;
    count_ = count;
    words_ = words;
    number_ = 0;
    const int64_t fitting = bytes_ / align(words * sizeof(int32_t));
    batch_ = fitting < kMostRows ? fitting : kMostRows;
    read();
  }
  __aicore__ bool any() const { return number_ < count_; }
  // V has been told all that it has to do with the row.
  __aicore__ void next() {
    ++number_;
    if (any() && number_ % batch_ != 0) return;
    queue_.FreeTensor(rows_);
    if (any()) read();
  }
  __aicore__ int64_t number() const { return number_; }
  __aicore__ LocalTensor<int32_t> row() {
    const int64_t words = align(words_ * sizeof(int32_t)) / sizeof(int32_t);
    return rows_[static_cast<uint32_t>(number_ % batch_ * words)];
  }

 private:
  static constexpr int32_t kBuffers = 2;
  static constexpr int64_t kMostRows = 4095;  // of a transfer

  __aicore__ void read() {
    const int64_t rest = count_ - number_, rows = rest < batch_ ? rest : batch_;
    rows_ = queue_.AllocTensor<int32_t>();
    load_rows(rows_, from_ + number_ * stride_, stride_, rows, words_);
    queue_.EnQue(rows_);
    rows_ = queue_.DeQue<int32_t>();
  }

  GM_ADDR from_ = nullptr;
  int64_t bytes_ = 0, stride_ = 0, count_ = 0, words_ = 0, number_ = 0, batch_ = 1;
  LocalTensor<int32_t> rows_;
  TQue<QuePosition::VECIN, 1> queue_;
};

// Sets words to 0. What the scalar unit has written to them is ordered before.
__aicore__ inline void clear(Table& table, int64_t words) {
  Duplicate(table.tensor(), 0, static_cast<int32_t>(words));
  PipeBarrier<PIPE_V>();
}

// The tokens or rows first..end-1, `size` at a time.
struct Chunk {
  int64_t first, end, size;

  __aicore__ bool any() const { return first < end; }
  __aicore__ void next() { first += size; }
  __aicore__ int64_t count() const { return end - first < size ? end - first : size; }
};

// This block's share of the tokens from `first` on.
__aicore__ inline Chunk own_tokens(const Tiling& tiling, int64_t first, const Split& split) {
  return {first + split.begin(GetBlockIdx()), first + split.end(GetBlockIdx()), tiling.chunk_tokens};
}

// K values per token of a tensor [T, K], of a chunk of tokens.
template <typename T>
class TokenValues {
 public:
  __aicore__ TokenValues() {}
  __aicore__ void init(TPipe& pipe, const Tiling& tiling, GM_ADDR tensor) {
    tensor_ = tensor;
    top_k_ = tiling.work.top_k;
    values_.init(pipe, tiling.chunk_tokens * top_k_);
  }

  // By MTE2.
  __aicore__ void load(const Chunk& chunk) {
    deep_ep::load(values_.tensor(), tensor_ + chunk.first * top_k_ * sizeof(T), chunk.count() * top_k_);
  }
  // By MTE3.
  __aicore__ void store(const Chunk& chunk) {
    deep_ep::store(tensor_ + chunk.first * top_k_ * sizeof(T), values_.tensor(), chunk.count() * top_k_);
  }

  __aicore__ T get(int64_t i, int64_t k) { return values_.get(i * top_k_ + k); }
  __aicore__ void set(int64_t i, int64_t k, T value) { values_.set(i * top_k_ + k, value); }

 private:
  GM_ADDR tensor_ = nullptr;
  int64_t top_k_ = 0;
  Array<T> values_;
};

// For each token of a chunk, or row of what has arrived: places that something of it goes to or comes from. For the
// scalar unit alone.
class Places {
 public:
  __aicore__ Places() {}
  __aicore__ void init(TPipe& pipe, const Tiling& tiling) {
    words_ = 1 + 2 * tiling.work.top_k;
    values_.init(pipe, tiling.chunk_tokens * words_);
  }

  __aicore__ void clear(int64_t item) { values_.set(item * words_, 0); }
  __aicore__ void add(int64_t item, GM_ADDR place, int64_t with = 0) {
    const int64_t count = this->count(item);
    values_.set(item * words_ + 1 + 2 * count, reinterpret_cast<int64_t>(place));
    values_.set(item * words_ + 2 + 2 * count, with);
    values_.set(item * words_, count + 1);
  }
  __aicore__ int64_t count(int64_t item) { return values_.get(item * words_); }
  __aicore__ GM_ADDR place(int64_t item, int64_t i) {
    return reinterpret_cast<GM_ADDR>(values_.get(item * words_ + 1 + 2 * i));
  }
  // What was added with the place.
  __aicore__ int64_t with(int64_t item, int64_t i) { return values_.get(item * words_ + 2 + 2 * i); }
  __aicore__ void set_with(int64_t item, int64_t i, int64_t with) { values_.set(item * words_ + 2 + 2 * i, with); }

 private:
  int64_t words_ = 0;
  Array<int64_t> values_;
};

// Numbers what goes to each expert and to each rank, in the order of tokens and k, over all blocks of this rank. A
// first pass over the block's tokens begins at 0, and so counts them; `publish` and `gather` tell all blocks; later
// passes begin behind what the blocks before have counted.
class Numbers {
 public:
  __aicore__ Numbers() {}
  __aicore__ void init(TPipe& pipe, const Tiling& tiling, GM_ADDR workspace) {
    tiling_ = &tiling;
    workspace_ = workspace;
    ranks_ = tiling.table_ranks;
    words_ = tiling.table_words;
    local_experts_ = static_cast<int32_t>(tiling.work.experts / tiling.work.ranks);
    reader_.init(pipe, tiling);
    const int64_t size = tiling.table_bytes / sizeof(int32_t);
    next_.init(pipe, size);
    before_.init(pipe, size);
    total_.init(pipe, size);
    seen_.init(pipe, size);
    clear(seen_, words_);
    begin();
  }

  // Before a pass that counts.
  __aicore__ void begin() {
    order<HardEvent::S_V>();
    clear(next_, words_);
    order<HardEvent::V_S>();
  }

  __aicore__ void next_token() { ++token_; }
  __aicore__ int32_t rank_of(int32_t expert) { return expert / local_experts_; }
  // The number of the next row for `expert`.
  __aicore__ int32_t of_expert(int32_t expert) { return advance(expert); }
  // Whether the token has not been at `place` yet: a rank, or R + a node.
  __aicore__ bool is_new(int32_t place) {
    if (seen_.get(place) == token_) return false;
    seen_.set(place, token_);
    return true;
  }
  // The number of the next token for `rank`.
  __aicore__ int32_t of_rank(int32_t rank) { return advance(ranks_ + rank); }

  // After a pass that has counted.
  __aicore__ void publish() {
    // The next pass has another place: some blocks may still be gathering from this one.
    published_ = workspace_ + passes_++ % 2 * GetBlockNum() * tiling_->count_stride;
    order<HardEvent::S_MTE3>();
    store(published_ + GetBlockIdx() * tiling_->count_stride, next_.tensor(), words_);
  }

  // Once all blocks have published.
  __aicore__ void gather() {
    clear(before_, words_);
    clear(total_, words_);
    const int32_t words = static_cast<int32_t>(words_);
    for (reader_.begin(published_, tiling_->count_stride, GetBlockNum(), words_); reader_.any(); reader_.next()) {
      Add(total_.tensor(), total_.tensor(), reader_.row(), words);
      if (reader_.number() < GetBlockIdx()) Add(before_.tensor(), before_.tensor(), reader_.row(), words);
      PipeBarrier<PIPE_V>();  // the next row is added to the sums
    }
    order<HardEvent::V_S>();
  }

  // Before each later pass. All blocks have met since the last one.
  __aicore__ void begin_again() {
    Adds(next_.tensor(), before_.tensor(), 0, static_cast<int32_t>(words_));
    order<HardEvent::V_S>();
  }

  // Tokens of this rank that go to `rank`.
  __aicore__ int64_t tokens_for(int64_t rank) { return total_.get(ranks_ + rank); }

  __aicore__ Table& next() { return next_; }
  __aicore__ Table& before() { return before_; }
  __aicore__ Table& total() { return total_; }
  __aicore__ TableReader& reader() { return reader_; }

 private:
  __aicore__ int32_t advance(int64_t i) {
    const int32_t number = next_.get(i);
    next_.set(i, number + 1);
    return number;
  }

  const Tiling* tiling_ = nullptr;
  GM_ADDR workspace_ = nullptr;
  GM_ADDR published_ = nullptr;
  int64_t ranks_ = 0, words_ = 0, passes_ = 0;
  int32_t local_experts_ = 1, token_ = 0;
  Table next_, before_, total_;
  Table seen_;  // by place: the newest token that was there
  TableReader reader_;
};

}  // namespace deep_ep
