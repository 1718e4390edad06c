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

DEEP_EP_INLINE uint32_t bits(float value) {
  uint32_t out;
  std::memcpy(&out, &value, 4);
  return out;
}

DEEP_EP_INLINE float from_bits(uint32_t value) {
  float out;
  std::memcpy(&out, &value, 4);
  return out;
}

struct F32 {
  using Storage = float;
  static DEEP_EP_INLINE float load(float value) { return value; }
  static DEEP_EP_INLINE float store(float value) { return value; }
};

struct BF16 {
  using Storage = uint16_t;
  static DEEP_EP_INLINE float load(uint16_t value) { return from_bits(uint32_t{value} << 16); }
  static DEEP_EP_INLINE uint16_t store(float value) {
    const uint32_t u = bits(value);
    const uint32_t rounded = (u + 0x7fff + (u >> 16 & 1)) >> 16;
    return static_cast<uint16_t>((u & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
  }
};

struct F16 {
  using Storage = uint16_t;
  // The exponent is rebased by a multiplication, which also normalises subnormals; infinities and NaN by hand.
  static DEEP_EP_INLINE float load(uint16_t value) {
    const uint32_t magnitude = uint32_t(value & 0x7fff) << 13;
    const uint32_t finite = bits(from_bits(magnitude) * 0x1p112f);
    const uint32_t special = magnitude | 0x7f800000;
    return from_bits(uint32_t(value & 0x8000) << 16 | ((value & 0x7c00) == 0x7c00 ? special : finite));
  }
  static DEEP_EP_INLINE uint16_t store(float value) {
    const uint32_t u = bits(value) & 0x7fffffff;
    const uint32_t normal = (u - (112u << 23) + 0xfff + (u >> 13 & 1)) >> 13;
    const uint32_t subnormal = bits(from_bits(u) + 0.5f) - bits(0.5f);  // the addition rounds at 2^-24
    const uint32_t large = u > 0x7f800000 ? 0x7e00 : 0x7c00;
    const uint32_t finite = u < (113u << 23) ? subnormal : normal;
    return static_cast<uint16_t>((bits(value) >> 16 & 0x8000) | (u >= 0x477ff000 ? large : finite));
  }
};

// Sums of some columns are kept in registers while the rows pass. Rows lie anywhere in memory, and the hardware does
// not guess where the next ones start.
template <typename T>
DEEP_EP_INLINE void weighted_sum(void* out, const Terms& terms, const Terms& next, int64_t hidden) {
  using Storage = typename T::Storage;
  constexpr int64_t kLine = 64 / sizeof(Storage);
  constexpr int64_t kColumns = 2 * kLine;
  const int64_t fetched = std::min(next.count, terms.count);
  auto* to = static_cast<Storage*>(out);
  const auto row = [](const Terms& of, int64_t k) { return static_cast<const Storage*>(of.rows[k]); };
  int64_t begin = 0;
  for (; begin + kColumns <= hidden; begin += kColumns) {
    float sum[kColumns] = {};
    for (int64_t k = 0; k < terms.count; ++k) {
      const Storage* from = row(terms, k) + begin;
      for (int64_t line = 0; k < fetched && line < kColumns; line += kLine)
        __builtin_prefetch(row(next, k) + begin + line);
      for (int64_t i = 0; i < kColumns; ++i) sum[i] += terms.weights[k] * T::load(from[i]);
    }
    for (int64_t i = 0; i < kColumns; ++i) to[begin + i] = T::store(sum[i]);
  }
  for (; begin < hidden; ++begin) {
    float sum = 0.0f;
    for (int64_t k = 0; k < terms.count; ++k) sum += terms.weights[k] * T::load(row(terms, k)[begin]);
    to[begin] = T::store(sum);
  }
}

template <typename T>
DEEP_EP_INLINE float dot_and_scale(void* row, const void* other, float weight, int64_t hidden) {
  constexpr int64_t kLanes = 32;
  float lanes[kLanes] = {};
  auto* a = static_cast<typename T::Storage*>(row);
  const auto* b = static_cast<const typename T::Storage*>(other);
  const int64_t even = hidden / kLanes * kLanes;
  for (int64_t begin = 0; begin < even; begin += kLanes)
    for (int64_t i = 0; i < kLanes; ++i) {
      const float value = T::load(a[begin + i]);
      lanes[i] += value * T::load(b[begin + i]);
      a[begin + i] = T::store(weight * value);
    }
  float sum = 0.0f;
  for (int64_t i = 0; i < kLanes; ++i) sum += lanes[i];
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
  weighted_sum<F16>(out, terms, next, hidden);
}
DEEP_EP_CLONES void weighted_sum_bf16(void* out, const Terms& terms, const Terms& next, int64_t hidden) {
  weighted_sum<BF16>(out, terms, next, hidden);
}
DEEP_EP_CLONES float dot_and_scale_f32(void* row, const void* other, float weight, int64_t hidden) {
  return dot_and_scale<F32>(row, other, weight, hidden);
}
DEEP_EP_CLONES float dot_and_scale_f16(void* row, const void* other, float weight, int64_t hidden) {
  return dot_and_scale<F16>(row, other, weight, hidden);
}
DEEP_EP_CLONES float dot_and_scale_bf16(void* row, const void* other, float weight, int64_t hidden) {
  return dot_and_scale<BF16>(row, other, weight, hidden);
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
