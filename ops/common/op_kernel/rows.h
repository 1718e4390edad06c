// Rows on their way through the unified buffer, tile by tile.
#pragma once

#include "kernel.h"

namespace deep_ep {

// Bytes of a row's tile.
__aicore__ inline int64_t tile_size(const Tiling& tiling, int64_t tile) {
  return tile + 1 < tiling.tiles ? tiling.tile_bytes : tiling.last_tile_bytes;
}

// Of so many words, the first part, a multiple of `unit`, which is at least as long as the second one.
__aicore__ inline int32_t half_of(int32_t size, int32_t unit) { return ((size + 1) / 2 + unit - 1) / unit * unit; }

class RowCopier {
 public:
  __aicore__ RowCopier() {}
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

// Tiles of rows of T, read as fp32.
template <typename T>
class RowReader {
 public:
  __aicore__ RowReader() {}
  __aicore__ void init(TPipe& pipe, const Tiling& tiling) {
    tiling_ = &tiling;
    pipe.InitBuffer(queue_, static_cast<uint8_t>(tiling.buffers), static_cast<uint32_t>(tiling.tile_bytes));
  }

  // Elements of the tile.
  __aicore__ int32_t read(GM_ADDR row, int64_t tile, Array<float>& to) {
    const int32_t count = static_cast<int32_t>(tile_size(*tiling_, tile) / sizeof(T));
    LocalTensor<T> piece = queue_.AllocTensor<T>();
    load(piece, row + tile * tiling_->tile_bytes, count);
    queue_.EnQue(piece);
    piece = queue_.DeQue<T>();
    if constexpr (sizeof(T) == sizeof(float))
      Adds(to.tensor(), piece, 0.0f, count);
    else
      Cast(to.tensor(), piece, RoundMode::CAST_NONE, count);
    PipeBarrier<PIPE_V>();
    queue_.FreeTensor(piece);
    return count;
  }

 private:
  const Tiling* tiling_ = nullptr;
  TQue<QuePosition::VECIN, 1> queue_;
};

// Rows that are sent as they are.
class PlainRows : public RowCopier {
 public:
  static constexpr bool kHasScales = false;

  __aicore__ PlainRows() {}
  __aicore__ int32_t send(GM_ADDR from, Places& to, int64_t item) {
    copy(from, to, item);
    return 0;
  }
};

// Rows of T that are sent as int8, x * s to the nearest with s = 127 / absmax, in normal mode 127 / (absmax + 1e-12),
// and with the scale 1 / s. Without a finite s, which rows of about 0 do not have in low latency, s is 1. Rows with Inf
// or NaN are 0, with the scale NaN (python/deep_ep/quantization.py).
template <typename T, bool kIsNormal>
class Int8Rows : public RowCopier {
 public:
  static constexpr bool kHasScales = true;

  __aicore__ Int8Rows() {}
  __aicore__ void init(TPipe& pipe, const Tiling& tiling) {
    RowCopier::init(pipe, tiling);
    tiling_ = &tiling;
    const int64_t size = tiling.tile_bytes / sizeof(T);
    reader_.init(pipe, tiling);
    pipe.InitBuffer(results_, static_cast<uint8_t>(Tiling::kResults), static_cast<uint32_t>(size));
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
    const float quotient = 127.0f / (float_of(absmax) + kAdded);
    const float s = (bits_of(quotient) & kMagnitude) < kInfinity ? quotient : 1.0f;
    for (int64_t tile = 0; tile < tiling_->tiles; ++tile) {
      const int64_t first = tile * tiling_->tile_bytes / sizeof(T);
      const int32_t size = reader_.read(from, tile, values_);
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
  static constexpr float kAdded = kIsNormal ? 1e-12f : 0.0f;

  // The bits of the row's largest |x|. Bits of numbers without a sign are ordered as the numbers are, and then come Inf
  // and NaN.
  __aicore__ int32_t find_absmax(GM_ADDR from) {
    LocalTensor<int32_t> largest = largest_.tensor();
    int32_t size = static_cast<int32_t>(tiling_->tile_bytes / sizeof(T));
    order<HardEvent::S_V>();
    Duplicate(largest, 0, size);
    for (int64_t tile = 0; tile < tiling_->tiles; ++tile) {
      const int32_t count = reader_.read(from, tile, values_);  // and what V has done before is done
      LocalTensor<uint32_t> bits = values_.tensor().template ReinterpretCast<uint32_t>();
      ShiftLeft(bits, bits, 1u, count);
      PipeBarrier<PIPE_V>();
      ShiftRight(bits, bits, 1u, count);
      PipeBarrier<PIPE_V>();
      Max(largest, largest, bits.template ReinterpretCast<int32_t>(), count);
      PipeBarrier<PIPE_V>();
    }
    while (size > kLane) {
      const int32_t half = half_of(size, kLane);
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
  RowReader<T> reader_;
  TQue<QuePosition::VECOUT, 1> results_;
  Array<float> values_;
  Array<int32_t> integers_, largest_;
  Array<half> halves_;
};

// Arithmetic with rows of T, in fp32.
template <typename T>
class RowMath {
 public:
  __aicore__ RowMath() {}
  __aicore__ void init(TPipe& pipe, const Tiling& tiling) {
    tiling_ = &tiling;
    reader_.init(pipe, tiling);
    pipe.InitBuffer(results_, static_cast<uint8_t>(Tiling::kResults), static_cast<uint32_t>(tiling.tile_bytes));
    term_.init(pipe, tiling.tile_bytes / sizeof(T));
    other_.init(pipe, tiling.tile_bytes / sizeof(T));
  }

  // Sums up the rows at the places of an item, each times the weight whose bits are with it.
  template <bool kHasWeights>
  __aicore__ void sum(Places& from, int64_t item, GM_ADDR to) {
    Array<float>& sum = other_;
    for (int64_t tile = 0; tile < tiling_->tiles; ++tile) {
      const int32_t count = static_cast<int32_t>(tile_size(*tiling_, tile) / sizeof(T));
      Duplicate(sum.tensor(), 0.0f, count);
      PipeBarrier<PIPE_V>();
      for (int64_t i = 0; i < from.count(item); ++i) {
        reader_.read(from.place(item, i), tile, term_);
        if constexpr (kHasWeights)
          Axpy(sum.tensor(), term_.tensor(), float_of(static_cast<int32_t>(from.with(item, i))), count);
        else
          Add(sum.tensor(), sum.tensor(), term_.tensor(), count);
        PipeBarrier<PIPE_V>();
      }
      write(sum, tile, to, count);
    }
  }

  // Writes `row` to where the places of an item have their results, `to` + offset, each times the weight whose bits are
  // with it, and adds its products with the rows at `from` + offset to `products`: product i is the sum of the kLane
  // words from i * kLane on.
  __aicore__ void multiply(GM_ADDR row, Places& offsets, int64_t item, GM_ADDR from, GM_ADDR to,
                           const LocalTensor<float>& products) {
    const int64_t places = offsets.count(item);
    if (places == 0) return;
    for (int64_t tile = 0; tile < tiling_->tiles; ++tile) {
      const int32_t count = reader_.read(row, tile, other_);
      for (int64_t i = 0; i < places; ++i) {
        const int64_t offset = reinterpret_cast<int64_t>(offsets.place(item, i));
        reader_.read(from + offset, tile, term_);
        Mul(term_.tensor(), term_.tensor(), other_.tensor(), count);
        PipeBarrier<PIPE_V>();
        const LocalTensor<float> product = products[static_cast<uint32_t>(i * kLane)];
        const int32_t lanes = fold(count);
        Add(product, product, term_.tensor(), lanes);
        PipeBarrier<PIPE_V>();
        Muls(term_.tensor(), other_.tensor(), float_of(static_cast<int32_t>(offsets.with(item, i))), count);
        PipeBarrier<PIPE_V>();
        write(term_, tile, to + offset, count);
      }
    }
  }

  static constexpr int32_t kLane = Tiling::kAlignment / sizeof(float);

 private:
  // Adds up term_ to its first words, no more than a lane: how many.
  __aicore__ int32_t fold(int32_t size) {
    LocalTensor<float> term = term_.tensor();
    while (size > kLane) {
      const int32_t half = half_of(size, kLane);
      Add(term, term, term[static_cast<uint32_t>(half)], size - half);
      PipeBarrier<PIPE_V>();
      size = half;
    }
    return size;
  }

  __aicore__ void write(Array<float>& from, int64_t tile, GM_ADDR row, int32_t count) {
    LocalTensor<T> result = results_.AllocTensor<T>();
    if constexpr (sizeof(T) == sizeof(float))
      Adds(result, from.tensor(), 0.0f, count);
    else
      Cast(result, from.tensor(), RoundMode::CAST_RINT, count);
    PipeBarrier<PIPE_V>();  // `from` is free
    results_.EnQue(result);
    result = results_.DeQue<T>();
    store(row + tile * tiling_->tile_bytes, result, count);
    results_.FreeTensor(result);
  }

  const Tiling* tiling_ = nullptr;
  RowReader<T> reader_;
  TQue<QuePosition::VECOUT, 1> results_;
  Array<float> term_, other_;
};

}  // namespace deep_ep
