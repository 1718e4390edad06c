// Rows on their way through the unified buffer, tile by tile.
#pragma once

#include "kernel.h"

namespace deep_ep {

// Bytes of a row's tile.
__aicore__ inline int64_t tile_size(const Tiling& tiling, int64_t tile) {
  return tile + 1 < tiling.tiles ? tiling.tile_bytes : tiling.last_tile_bytes;
}

class RowCopier {
 public:
  __aicore__ void init(TPipe& pipe, const Tiling& tiling) {
    tiling_ = &tiling;
    pipe.InitBuffer(queue_, static_cast<uint8_t>(tiling.buffers), static_cast<uint32_t>(tiling.tile_bytes));
  }

  // One row to all places of an item.
  __aicore__ void copy(GM_ADDR from, Places& to, int64_t item) {
    const int64_t count = to.count(item);
    if (count == 0) return;
    for (int64_t tile = 0; tile < tiling_->tiles; ++tile) {
      const int64_t begin = tile * tiling_->tile_bytes, bytes = tile_size(*tiling_, tile);
      LocalTensor<uint8_t> piece = queue_.AllocTensor<uint8_t>();
      load(piece, from + begin, bytes);
      queue_.EnQue(piece);
      piece = queue_.DeQue<uint8_t>();
      for (int64_t i = 0; i < count; ++i) store(to.place(item, i) + begin, piece, bytes);
      queue_.FreeTensor(piece);
    }
  }

  // Sets `bytes` bytes, a multiple of 2, to words of `value`. At most once for each tile that there is room for, after
  // the scalar unit has waited for copies.
  __aicore__ void fill(GM_ADDR to, int64_t bytes, int32_t value) {
    if (bytes <= 0) return;
    LocalTensor<uint8_t> piece = queue_.AllocTensor<uint8_t>();
    Duplicate(piece.ReinterpretCast<int32_t>(), value, static_cast<int32_t>(tiling_->tile_bytes / sizeof(int32_t)));
    order<HardEvent::V_MTE3>();
    for (int64_t begin = 0; begin < bytes; begin += tiling_->tile_bytes)
      store(to + begin, piece, bytes - begin < tiling_->tile_bytes ? bytes - begin : tiling_->tile_bytes);
    queue_.FreeTensor(piece);
  }

 private:
  const Tiling* tiling_ = nullptr;
  TQueBind<QuePosition::VECIN, QuePosition::VECOUT, 1> queue_;
};

// Weighted sums of rows of T, in fp32.
template <typename T>
class RowSummer {
 public:
  __aicore__ void init(TPipe& pipe, const Tiling& tiling) {
    tiling_ = &tiling;
    const uint32_t bytes = static_cast<uint32_t>(tiling.tile_bytes);
    pipe.InitBuffer(terms_, static_cast<uint8_t>(tiling.buffers), bytes);
    pipe.InitBuffer(sums_, static_cast<uint8_t>(Tiling::kSums), bytes);
    term_.init(pipe, tiling.tile_bytes / sizeof(T));
    sum_.init(pipe, tiling.tile_bytes / sizeof(T));
  }

  // Sums up the rows at the places of an item, each times the weight whose bits are with it.
  __aicore__ void sum(Places& from, int64_t item, GM_ADDR to) {
    const int64_t places = from.count(item);
    for (int64_t tile = 0; tile < tiling_->tiles; ++tile) {
      const int64_t begin = tile * tiling_->tile_bytes, bytes = tile_size(*tiling_, tile);
      const int32_t count = static_cast<int32_t>(bytes / sizeof(T));
      Duplicate(sum_.tensor(), 0.0f, count);
      PipeBarrier<PIPE_V>();
      for (int64_t i = 0; i < places; ++i)
        add(from.place(item, i) + begin, float_of(static_cast<int32_t>(from.with(item, i))), count);
      LocalTensor<T> sum = sums_.AllocTensor<T>();
      if constexpr (sizeof(T) == sizeof(float))
        Adds(sum, sum_.tensor(), 0.0f, count);
      else
        Cast(sum, sum_.tensor(), RoundMode::CAST_RINT, count);
      PipeBarrier<PIPE_V>();  // the next tile's sum
      sums_.EnQue(sum);
      sum = sums_.DeQue<T>();
      store(to + begin, sum, count);
      sums_.FreeTensor(sum);
    }
  }

 private:
  __aicore__ void add(GM_ADDR from, float weight, int32_t count) {
    LocalTensor<T> row = terms_.AllocTensor<T>();
    load(row, from, count);
    terms_.EnQue(row);
    row = terms_.DeQue<T>();
    if constexpr (sizeof(T) == sizeof(float)) {
      Axpy(sum_.tensor(), row, weight, count);
    } else {
      Cast(term_.tensor(), row, RoundMode::CAST_NONE, count);
      PipeBarrier<PIPE_V>();
      Axpy(sum_.tensor(), term_.tensor(), weight, count);
    }
    PipeBarrier<PIPE_V>();
    terms_.FreeTensor(row);
  }

  const Tiling* tiling_ = nullptr;
  TQue<QuePosition::VECIN, 1> terms_;
  TQue<QuePosition::VECOUT, 1> sums_;
  Array<float> term_, sum_;
};

}  // namespace deep_ep
