#include "arithmetic.h"

#include <algorithm>
#include <cstring>

// One body per instruction set, chosen when the library is loaded.
#if defined(__x86_64__) && defined(__gnu_linux__)
#define DEEP_EP_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define DEEP_EP_CLONES
#endif
#define DEEP_EP_INLINE inline __attribute__((always_inline))

namespace deep_ep {
namespace {

// Functions that take or return vectors are all inlined: no convention of calls concerns them.
#pragma GCC diagnostic ignored "-Wpsabi"

// Vectors of 16 columns, in as many registers as they take. All arithmetic is written once, for these and for scalars.
constexpr int64_t kWidth = 16;
using Floats = float __attribute__((vector_size(4 * kWidth)));
using Words = uint32_t __attribute__((vector_size(4 * kWidth)));

template <typename To, typename From>
DEEP_EP_INLINE To bits(const From& value) {
  To out;
  static_assert(sizeof out == sizeof value);
  std::memcpy(&out, &value, sizeof out);
  return out;
}

// Formats of 16 bits, in the lower or the upper half of words: from_ ignores the other half, to_ leaves it 0.

struct BF16 {
  template <typename Float, typename Word>
  static DEEP_EP_INLINE Float from_lower(const Word& word) {
    return bits<Float>(Word(word << 16));
  }
  template <typename Float, typename Word>
  static DEEP_EP_INLINE Float from_upper(const Word& word) {
    return bits<Float>(Word(word & 0xffff0000));
  }
  template <typename Word, typename Float>
  static DEEP_EP_INLINE Word to_lower(const Float& value) {
    return round<Word>(value) >> 16;
  }
  template <typename Word, typename Float>
  static DEEP_EP_INLINE Word to_upper(const Float& value) {
    return round<Word>(value) & 0xffff0000;
  }

 private:
  // In the upper half; the lower one is undefined.
  template <typename Word, typename Float>
  static DEEP_EP_INLINE Word round(const Float& value) {
    const Word u = bits<Word>(value);
    const Word rounded = u + 0x7fff + (u >> 16 & 1);
    return value != value ? Word(rounded * 0 + 0x7fc00000) : rounded;
  }
};

struct F16 {
  // The exponent is rebased by a multiplication, which also normalises subnormals; infinities and NaN by hand.
  template <typename Float, typename Word>
  static DEEP_EP_INLINE Float from_lower(const Word& word) {
    const Word magnitude = (word & 0x7fff) << 13;
    const Word finite = bits<Word>(Float(bits<Float>(magnitude) * 0x1p112f));
    const Word special = magnitude | 0x7f800000;
    return bits<Float>(Word((word & 0x8000) << 16 | ((word & 0x7c00) == 0x7c00 ? special : finite)));
  }
  template <typename Float, typename Word>
  static DEEP_EP_INLINE Float from_upper(const Word& word) {
    return from_lower<Float>(Word(word >> 16));
  }
  template <typename Word, typename Float>
  static DEEP_EP_INLINE Word to_lower(const Float& value) {
    const Word sign = bits<Word>(value) >> 16 & 0x8000, u = bits<Word>(value) & 0x7fffffff;
    const Word normal = (u - (112u << 23) + 0xfff + (u >> 13 & 1)) >> 13;
    const Word subnormal = bits<Word>(Float(bits<Float>(u) + 0.5f)) - bits<uint32_t>(0.5f);  // rounds at 2^-24
    const Word zero = u * 0;
    const Word large = u > 0x7f800000 ? Word(zero + 0x7e00) : Word(zero + 0x7c00);
    const Word finite = u < (113u << 23) ? subnormal : normal;
    return sign | (u >= 0x477ff000 ? large : finite);
  }
  template <typename Word, typename Float>
  static DEEP_EP_INLINE Word to_upper(const Float& value) {
    return to_lower<Word>(value) << 16;
  }
};

// 32 columns in fp32: column i is in `first` or `second`, as the format says.
struct Columns {
  static constexpr int64_t kCount = 2 * kWidth;
  Floats first, second;
};

template <typename Format>
struct Half {
  using Storage = uint16_t;
  static DEEP_EP_INLINE float load(uint16_t value) { return Format::template from_lower<float>(uint32_t{value}); }
  static DEEP_EP_INLINE uint16_t store(float value) {
    return static_cast<uint16_t>(Format::template to_lower<uint32_t>(value));
  }
  // Even columns and odd ones: two of a word.
  static DEEP_EP_INLINE Columns load(const uint16_t* from) {
    Words words;
    std::memcpy(&words, from, sizeof words);
    return {Format::template from_lower<Floats>(words), Format::template from_upper<Floats>(words)};
  }
  static DEEP_EP_INLINE void store(const Columns& values, uint16_t* to) {
    const Words words =
        Format::template to_lower<Words>(values.first) | Format::template to_upper<Words>(values.second);
    std::memcpy(to, &words, sizeof words);
  }
  static DEEP_EP_INLINE float column(const Columns& values, int64_t i) {
    return i % 2 == 0 ? values.first[i / 2] : values.second[i / 2];
  }
};

struct F32 {
  using Storage = float;
  static DEEP_EP_INLINE float load(float value) { return value; }
  static DEEP_EP_INLINE float store(float value) { return value; }
  static DEEP_EP_INLINE Columns load(const float* from) {
    Columns values;
    std::memcpy(&values, from, sizeof values);
    return values;
  }
  static DEEP_EP_INLINE void store(const Columns& values, float* to) { std::memcpy(to, &values, sizeof values); }
  static DEEP_EP_INLINE float column(const Columns& values, int64_t i) {
    return i < kWidth ? values.first[i] : values.second[i - kWidth];
  }
};

// Sums of some columns are kept in registers while the rows pass. Rows lie anywhere in memory, and the hardware does
// not guess where the next ones start.
template <typename T>
DEEP_EP_INLINE void weighted_sum(void* out, const Terms& terms, const Terms& next, int64_t hidden) {
  using Storage = typename T::Storage;
  constexpr int64_t kLine = 64 / sizeof(Storage), kBlock = Columns::kCount;
  const int64_t fetched = std::min(next.count, terms.count);
  auto* to = static_cast<Storage*>(out);
  const auto row = [](const Terms& of, int64_t k) { return static_cast<const Storage*>(of.rows[k]); };
  int64_t begin = 0;
  for (; begin + 2 * kBlock <= hidden; begin += 2 * kBlock) {
    Columns a{}, b{};
    for (int64_t k = 0; k < terms.count; ++k) {
      const Storage* from = row(terms, k) + begin;
      for (int64_t line = 0; k < fetched && line < 2 * kBlock; line += kLine)
        __builtin_prefetch(row(next, k) + begin + line);
      const float weight = terms.weights[k];
      const Columns x = T::load(from), y = T::load(from + kBlock);
      a.first += weight * x.first;
      a.second += weight * x.second;
      b.first += weight * y.first;
      b.second += weight * y.second;
    }
    T::store(a, to + begin);
    T::store(b, to + begin + kBlock);
  }
  for (; begin < hidden; ++begin) {
    float sum = 0.0f;
    for (int64_t k = 0; k < terms.count; ++k) sum += terms.weights[k] * T::load(row(terms, k)[begin]);
    to[begin] = T::store(sum);
  }
}

template <typename T>
DEEP_EP_INLINE float dot_and_scale(void* row, const void* other, float weight, int64_t hidden) {
  constexpr int64_t kLanes = Columns::kCount;
  auto* a = static_cast<typename T::Storage*>(row);
  const auto* b = static_cast<const typename T::Storage*>(other);
  const int64_t even = hidden / kLanes * kLanes;
  Columns lanes{};
  for (int64_t begin = 0; begin < even; begin += kLanes) {
    const Columns x = T::load(a + begin), y = T::load(b + begin);
    lanes.first += x.first * y.first;
    lanes.second += x.second * y.second;
    T::store(Columns{weight * x.first, weight * x.second}, a + begin);
  }
  float sum = 0.0f;
  for (int64_t i = 0; i < kLanes; ++i) sum += T::column(lanes, i);
  for (int64_t i = even; i < hidden; ++i) {
    const float value = T::load(a[i]);
    sum += value * T::load(b[i]);
    a[i] = T::store(weight * value);
  }
  return sum;
}

DEEP_EP_CLONES void weighted_sum_f32(void* out, const Terms& terms, const Terms& next, int64_t hidden) {
  weighted_sum<F32>(out, terms, next, hidden);
}
DEEP_EP_CLONES void weighted_sum_f16(void* out, const Terms& terms, const Terms& next, int64_t hidden) {
  weighted_sum<Half<F16>>(out, terms, next, hidden);
}
DEEP_EP_CLONES void weighted_sum_bf16(void* out, const Terms& terms, const Terms& next, int64_t hidden) {
  weighted_sum<Half<BF16>>(out, terms, next, hidden);
}
DEEP_EP_CLONES float dot_and_scale_f32(void* row, const void* other, float weight, int64_t hidden) {
  return dot_and_scale<F32>(row, other, weight, hidden);
}
DEEP_EP_CLONES float dot_and_scale_f16(void* row, const void* other, float weight, int64_t hidden) {
  return dot_and_scale<Half<F16>>(row, other, weight, hidden);
}
DEEP_EP_CLONES float dot_and_scale_bf16(void* row, const void* other, float weight, int64_t hidden) {
  return dot_and_scale<Half<BF16>>(row, other, weight, hidden);
}

}  // namespace

void weighted_sum(DType dtype, void* out, const Terms& terms, const Terms& next, int64_t hidden) {
  constexpr decltype(&weighted_sum_f32) by_dtype[] = {weighted_sum_f32, weighted_sum_f16, weighted_sum_bf16};
  by_dtype[static_cast<int64_t>(dtype)](out, terms, next, hidden);
}

float dot_and_scale(DType dtype, void* row, const void* other, float weight, int64_t hidden) {
  constexpr decltype(&dot_and_scale_f32) by_dtype[] = {dot_and_scale_f32, dot_and_scale_f16, dot_and_scale_bf16};
  return by_dtype[static_cast<int64_t>(dtype)](row, other, weight, hidden);
}

}  // namespace deep_ep
