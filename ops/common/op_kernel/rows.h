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
    pipe.InitBuffer(queue_, static_cast<uint8_t>(tiling.buffers), static_cast<uint32_t>(sent(tiling.tile_bytes)));
  }

  // One row, as rows are on their way, to all places of an item.
  __aicore__ void copy(GM_ADDR from, Places& to, int64_t item) {
    const int64_t count = to.count(item);
    if (count == 0) return;
    for (int64_t tile = 0; tile < tiling_->tiles; ++tile) {
      const int64_t begin = sent(tile * tiling_->tile_bytes), bytes = sent(tile_size(*tiling_, tile));
      LocalTensor<uint8_t> piece = queue_.AllocTensor<uint8_t>();
      load(piece, from + begin, bytes);
      queue_.EnQue(piece);
      piece = queue_.DeQue<uint8_t>();
      for (int64_t i = 0; i < count; ++i) store(to.place(item, i) + begin, piece, bytes);
      queue_.FreeTensor(piece);
    }
  }

  // Sets bytes to those of `value`, which are all alike.
  __aicore__ void fill(GM_ADDR to, int64_t bytes, int32_t value) {
    if (bytes <= 0) return;
    LocalTensor<uint8_t> piece = queue_.AllocTensor<uint8_t>();
    const int64_t size = sent(tiling_->tile_bytes);
    order<HardEvent::MTE3_V>();  // the queue has MTE2 wait for what was in the tile, not V
    Duplicate(piece.ReinterpretCast<int32_t>(), value, static_cast<int32_t>(size / sizeof(int32_t)));
    order<HardEvent::V_MTE3>();
    for (int64_t begin = 0; begin < bytes; begin += size)
      store(to + begin, piece, bytes - begin < size ? bytes - begin : size);
    queue_.FreeTensor(piece);
  }

 private:
  // Of so many bytes of a row, those on their way.
  __aicore__ int64_t sent(int64_t bytes) const {
    return bytes / tiling_->work.element_bytes * tiling_->work.sent_bytes;
  }

  const Tiling* tiling_ = nullptr;
  TQueBind<QuePosition::VECIN, QuePosition::VECOUT, 1> queue_;
};

// Rows that are sent as they are.
class PlainRows : public RowCopier {
 public:
  static constexpr bool kHasScales = false;

  __aicore__ int32_t send(GM_ADDR from, Places& to, int64_t item) {
    copy(from, to, item);
    return 0;
  }
};

// Rows of T that are sent as int8, x * s to the nearest with s = 127 / absmax, and with the scale 1 / s. Without a
// finite s, which rows of about 0 do not have, s is 1. Rows with Inf or NaN are 0, with the scale NaN
// (python/deep_ep/quantization.py).
template <typename T>
class Int8Rows : public RowCopier {
 public:
  static constexpr bool kHasScales = true;

  __aicore__ void init(TPipe& pipe, const Tiling& tiling) {
    RowCopier::init(pipe, tiling);
    tiling_ = &tiling;
    const int64_t size = tiling.tile_bytes / sizeof(T);
    pipe.InitBuffer(terms_, static_cast<uint8_t>(tiling.buffers), static_cast<uint32_t>(tiling.tile_bytes));
    pipe.InitBuffer(results_, static_cast<uint8_t>(Tiling::kSums), static_cast<uint32_t>(size));
    values_.init(pipe, size);
    integers_.init(pipe, size);
    largest_.init(pipe, size);
    halves_.init(pipe, size);
  }

  // One row to all places of an item. The bits of its scale.
  __aicore__ int32_t send(GM_ADDR from, Places& to, int64_t item) {
    const int64_t count = to.count(item);
    if (count == 0) return 0;
    const int32_t absmax = find_absmax(from);
    const bool is_finite = absmax < kInfinity;
    const float quotient = 127.0f / float_of(absmax);
    const float s = (bits_of(quotient) & kMagnitude) < kInfinity ? quotient : 1.0f;
    for (int64_t tile = 0; tile < tiling_->tiles; ++tile) {
      const int64_t first = tile * tiling_->tile_bytes / sizeof(T);
      const int32_t size = load_tile(from, tile);
      LocalTensor<int8_t> result = results_.AllocTensor<int8_t>();
      quantise(result, s, is_finite, size);
      results_.EnQue(result);
      result = results_.DeQue<int8_t>();
      for (int64_t i = 0; i < count; ++i) store(to.place(item, i) + first, result, size);
      results_.FreeTensor(result);
    }
    return is_finite ? bits_of(1.0f / s) : kNaN;
  }

 private:
  static constexpr int32_t kMagnitude = 0x7fffffff, kInfinity = 0x7f800000, kNaN = 0x7fc00000;
  static constexpr int32_t kLane = Tiling::kAlignment / sizeof(int32_t);

  // A tile of a row to values_, in fp32; its number of elements.
  __aicore__ int32_t load_tile(GM_ADDR from, int64_t tile) {
    const int32_t size = static_cast<int32_t>(tile_size(*tiling_, tile) / sizeof(T));
    LocalTensor<T> row = terms_.AllocTensor<T>();
    load(row, from + tile * tiling_->tile_bytes, size);
    terms_.EnQue(row);
    row = terms_.DeQue<T>();
    if constexpr (sizeof(T) == sizeof(float))
      Adds(values_.tensor(), row, 0.0f, size);
    else
      Cast(values_.tensor(), row, RoundMode::CAST_NONE, size);
    PipeBarrier<PIPE_V>();
    terms_.FreeTensor(row);
    return size;
  }

  // The bits of the row's largest |x|. Bits of numbers without a sign are ordered as the numbers are, and then come Inf
  // and NaN.
  __aicore__ int32_t find_absmax(GM_ADDR from) {
    LocalTensor<int32_t> largest = largest_.tensor();
    int32_t size = static_cast<int32_t>(tiling_->tile_bytes / sizeof(T));
    order<HardEvent::S_V>();
    Duplicate(largest, 0, size);
    for (int64_t tile = 0; tile < tiling_->tiles; ++tile) {
      const int32_t count = load_tile(from, tile);  // and what V has done before is done
      LocalTensor<uint32_t> bits = values_.tensor().template ReinterpretCast<uint32_t>();
      ShiftLeft(bits, bits, 1u, count);
      PipeBarrier<PIPE_V>();
      ShiftRight(bits, bits, 1u, count);
      PipeBarrier<PIPE_V>();
      Max(largest, largest, bits.template ReinterpretCast<int32_t>(), count);
      PipeBarrier<PIPE_V>();
    }
    while (size > kLane) {
      const int32_t half = (size / 2 + kLane - 1) / kLane * kLane;
      Max(largest, largest, largest[static_cast<uint32_t>(half)], size - half);
      PipeBarrier<PIPE_V>();
      size = half;
    }
    order<HardEvent::V_S>();
    int32_t absmax = 0;
    for (int32_t i = 0; i < size; ++i)
      if (largest_.get(i) > absmax) absmax = largest_.get(i);
    return absmax;
  }

  // values_ by way of int32, so that they are rounded once.
  __aicore__ void quantise(LocalTensor<int8_t>& result, float s, bool is_finite, int32_t size) {
    LocalTensor<float> values = values_.tensor();
    Muls(values, values, s, size);
    PipeBarrier<PIPE_V>();
    Cast(integers_.tensor(), values, RoundMode::CAST_RINT, size);
    PipeBarrier<PIPE_V>();
    if (!is_finite) {
      Duplicate(integers_.tensor(), 0, size);
      PipeBarrier<PIPE_V>();
    }
    Cast(values, integers_.tensor(), RoundMode::CAST_RINT, size);
    PipeBarrier<PIPE_V>();
    Cast(halves_.tensor(), values, RoundMode::CAST_NONE, size);
    PipeBarrier<PIPE_V>();
    Cast(result, halves_.tensor(), RoundMode::CAST_RINT, size);
  }

  const Tiling* tiling_ = nullptr;
  TQue<QuePosition::VECIN, 1> terms_;
  TQue<QuePosition::VECOUT, 1> results_;
  Array<float> values_;
  Array<int32_t> integers_, largest_;
  Array<half> halves_;
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
