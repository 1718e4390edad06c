// Instructions of V. Forms with a count take tensors at multiples of 32 bytes.
#pragma once

#include <tuple>

#include "tensor.h"

namespace AscendC {

enum class CMPMODE : uint8_t { LT = 0, GT, EQ, LE, GE, NE };
enum class SELMODE : uint8_t { VSEL_CMPMASK_SPR = 0, VSEL_TENSOR_SCALAR_MODE, VSEL_TENSOR_TENSOR_MODE };
enum class ReduceOrder : uint8_t {
  ORDER_VALUE_INDEX = 0,
  ORDER_INDEX_VALUE,
  ORDER_ONLY_VALUE,
  ORDER_ONLY_INDEX,
};

struct BrcbRepeatParams {
  BrcbRepeatParams() = default;
  BrcbRepeatParams(uint16_t block, uint16_t repeat) : dstBlkStride(block), dstRepStride(repeat) {}
  uint16_t dstBlkStride = 1;
  uint16_t dstRepStride = 8;
};

}  // namespace AscendC

namespace twin {

using AscendC::LocalTensor;

// half and bfloat16_t are computed in fp32 and rounded once, as in float-only units each result of an operation is.
template <typename T>
using Wide = std::conditional_t<is_floating<T>, float, T>;

inline void check_count(int64_t count, Site at) {
  if (count < 0) Core::current().fail(at, V, "count is " + std::to_string(count));
  if (count == 0 && Core::current().arch() == 3510)
    Core::current().fail(at, V, "count is 0, which 3510 does not define");
}

// Vector instructions work on many elements at a time: what they read may be what they write, but not overlap it.
inline void check_overlap(const Span& dst, const Span& src, Site at) {
  if (dst.begin != src.begin && dst.begin < src.begin + src.bytes && src.begin < dst.begin + dst.bytes)
    Core::current().fail(at, V, "what it writes overlaps what it reads, and is not the same");
}

// dst[i] = f(src[i]...)
template <typename T, typename... From, typename F>
void elementwise(Site at, int64_t count, F f, const LocalTensor<T>& dst, const LocalTensor<From>&... src) {
  check_count(count, at);
  if (count == 0) return;
  (check_overlap(dst.span(0, count), src.span(0, count), at), ...);
  Core::current().issue(V, at, {Use{src.span(0, count), false}..., Use{dst.span(0, count), true}},
                        [count, f, to = dst.data(), sources = std::make_tuple(src.data()...)] {
                          std::apply(
                              [&](const auto*... from) {
                                for (int64_t i = 0; i < count; ++i) to[i] = f(from[i]...);
                              },
                              sources);
                        });
}

template <typename T, typename F>
void binary(Site at, int64_t count, F f, const LocalTensor<T>& dst, const LocalTensor<T>& a, const LocalTensor<T>& b) {
  elementwise(
      at, count, [f](T x, T y) { return static_cast<T>(f(static_cast<Wide<T>>(x), static_cast<Wide<T>>(y))); }, dst, a,
      b);
}

template <typename T, typename F>
void unary(Site at, int64_t count, F f, const LocalTensor<T>& dst, const LocalTensor<T>& src) {
  elementwise(at, count, [f](T x) { return static_cast<T>(f(static_cast<Wide<T>>(x))); }, dst, src);
}

// Integers wrap around.
template <typename T>
auto unsigned_or_float(T x) {
  if constexpr (std::is_integral_v<T>)
    return static_cast<std::make_unsigned_t<T>>(x);
  else
    return x;
}

struct Plus {
  template <typename T>
  T operator()(T a, T b) const {
    return static_cast<T>(unsigned_or_float(a) + unsigned_or_float(b));
  }
};
struct Minus {
  template <typename T>
  T operator()(T a, T b) const {
    return static_cast<T>(unsigned_or_float(a) - unsigned_or_float(b));
  }
};
struct Times {
  template <typename T>
  T operator()(T a, T b) const {
    if constexpr (std::is_integral_v<T>)
      return static_cast<T>(static_cast<uint64_t>(a) * static_cast<uint64_t>(b));
    else
      return a * b;
  }
};
struct Quotient {
  float operator()(float a, float b) const { return a / b; }
};
struct Larger {
  template <typename T>
  T operator()(T a, T b) const {
    return a > b ? a : b;
  }
};
struct Smaller {
  template <typename T>
  T operator()(T a, T b) const {
    return a < b ? a : b;
  }
};

template <typename T>
constexpr bool arithmetic = one_of<T, half, float, int16_t, int32_t>;
template <typename T>
constexpr bool floats = one_of<T, half, float>;

// Bits of RoundMode.
constexpr uint32_t bit_of(RoundMode mode) { return 1u << static_cast<int>(mode); }
constexpr uint32_t kExact = bit_of(RoundMode::CAST_NONE);
constexpr uint32_t kRounding = bit_of(RoundMode::CAST_RINT) | bit_of(RoundMode::CAST_FLOOR) |
                               bit_of(RoundMode::CAST_CEIL) | bit_of(RoundMode::CAST_ROUND) |
                               bit_of(RoundMode::CAST_TRUNC);

// The modes with which Cast is documented, by architecture; 0: not at all.
template <typename To, typename From>
constexpr uint32_t cast_modes(int arch) {
  constexpr auto is = [](auto* from, auto* to) {
    return std::is_same_v<From*, decltype(from)> && std::is_same_v<To*, decltype(to)>;
  };
  constexpr float* f32 = nullptr;
  constexpr half* f16 = nullptr;
  constexpr bfloat16_t* bf16 = nullptr;
  constexpr int8_t* i8 = nullptr;
  constexpr uint8_t* u8 = nullptr;
  constexpr int16_t* i16 = nullptr;
  constexpr int32_t* i32 = nullptr;
  constexpr int64_t* i64 = nullptr;
  const uint32_t with_none = arch == 2201 ? kRounding | kExact : kRounding;
  if (is(i8, f16) || is(u8, f16) || is(i16, f32) || is(f16, f32) || is(bf16, f32)) return kExact;
  if (is(i32, i16) || is(i32, i64) || is(i64, i32)) return kExact;
  if (is(i16, f16) || is(f16, i8) || is(f16, u8) || is(i32, f32)) return with_none;
  if (is(f32, f16)) return kRounding | kExact | bit_of(RoundMode::CAST_ODD);
  if (is(f16, i16) || is(f16, i32) || is(bf16, i32) || is(f32, i16) || is(f32, bf16)) return kRounding;
  if (is(f32, i32) || is(f32, f32) || is(f32, i64) || is(i64, f32)) return kRounding;
  return 0;
}

template <typename T>
bool compare(AscendC::CMPMODE mode, T a, T b) {
  switch (mode) {
    case AscendC::CMPMODE::LT:
      return a < b;
    case AscendC::CMPMODE::GT:
      return a > b;
    case AscendC::CMPMODE::EQ:
      return a == b;
    case AscendC::CMPMODE::LE:
      return a <= b;
    case AscendC::CMPMODE::GE:
      return a >= b;
    default:
      return a != b;
  }
}

inline void set_bit(uint8_t* bits, uint32_t index, bool value) {
  bits[index / 8] = static_cast<uint8_t>((bits[index / 8] & ~(1u << index % 8)) | value << index % 8);
}

// dst: bits, f(i) for i < count.
template <typename T, typename U, typename F>
void compare_all(Site at, uint32_t count, const LocalTensor<U>& dst, std::initializer_list<Use> sources, F f) {
  static_assert(one_of<U, uint8_t, int8_t>);
  if (count * sizeof(T) % 256 != 0)
    Core::current().fail(at, V, std::to_string(count * sizeof(T)) + " bytes to compare are no multiple of 256");
  const uint32_t bytes = count / 8;
  const auto effect = [to = reinterpret_cast<uint8_t*>(dst.data()), count, f] {
    for (uint32_t i = 0; i < count; ++i) set_bit(to, i, f(i));
  };
  const Use* use = sources.begin();
  if (sources.size() == 1)
    Core::current().issue(V, at, {use[0], {dst.span(0, bytes), true}}, effect);
  else
    Core::current().issue(V, at, {use[0], use[1], {dst.span(0, bytes), true}}, effect);
}

// The sum of values[0..count-1], as a tree of pairs.
template <typename T, typename F>
T tree(const T* values, uint32_t count, F f) {
  if (count == 1) return values[0];
  uint32_t left = 1;
  while (2 * left < count) left *= 2;
  return static_cast<T>(
      f(static_cast<float>(tree(values, left, f)), static_cast<float>(tree(values + left, count - left, f))));
}

// The first, of equal ones.
template <typename T>
uint32_t index_of_largest(const T* values, uint32_t count) {
  uint32_t best = 0;
  for (uint32_t i = 1; i < count; ++i)
    if (static_cast<float>(values[i]) > static_cast<float>(values[best])) best = i;
  return best;
}

// An index, as the bits of a T.
template <typename T>
T index_bits(uint32_t index) {
  if constexpr (sizeof(T) == 4)
    return twin::bit_cast<T>(index);
  else
    return twin::bit_cast<T>(static_cast<uint16_t>(index));
}

// Rows of whole repeats (256 bytes): f(to, from) for each, with strides in bytes.
template <typename T, typename F>
void repeats(Site at, int32_t times, const LocalTensor<T>& dst, uint32_t dst_stride, uint32_t dst_count,
             const LocalTensor<T>& src, uint32_t src_stride, uint32_t src_count, F f) {
  if (times < 0 || times > 255) Core::current().fail(at, V, "repeatTime is " + std::to_string(times) + ", at most 255");
  if (times == 0) return;
  const uint32_t last = times - 1;
  Core::current().issue(V, at,
                        {{src.span(0, last * src_stride / sizeof(T) + src_count), false},
                         {dst.span(0, last * dst_stride / sizeof(T) + dst_count), true, sizeof(T)}},
                        [=, to = dst.data(), from = src.data()] {
                          for (int32_t i = 0; i < times; ++i)
                            f(to + i * dst_stride / sizeof(T), from + i * src_stride / sizeof(T));
                        });
}

template <typename T>
void check_mask(int32_t mask, Site at) {
  constexpr int32_t kLimit = 256 / sizeof(T);
  if (mask < 1 || mask > kLimit)
    Core::current().fail(at, V, "mask is " + std::to_string(mask) + ", at most " + std::to_string(kLimit));
}

}  // namespace twin

namespace AscendC {

template <typename T>
void Duplicate(const LocalTensor<T>& dst, const T& value, const int32_t& count, Site at = Site::here()) {
  static_assert(twin::one_of<T, half, bfloat16_t, float, int16_t, uint16_t, int32_t, uint32_t>);
  twin::elementwise(at, count, [value] { return value; }, dst);
}

template <typename T, typename U>
void Cast(const LocalTensor<T>& dst, const LocalTensor<U>& src, const RoundMode& mode, uint32_t count,
          Site at = Site::here()) {
  static_assert(twin::cast_modes<T, U>(2201) != 0 && twin::cast_modes<T, U>(3510) != 0, "no Cast of these types");
  if (!(twin::cast_modes<T, U>(Core::current().arch()) & twin::bit_of(mode)))
    Core::current().fail(at, twin::V,
                         "no Cast between these types with RoundMode " + std::to_string(static_cast<int>(mode)) +
                             " on " + std::to_string(Core::current().arch()));
  const RoundMode rounding = mode;
  twin::elementwise(at, count, [rounding](U x) { return twin::convert<T>(x, rounding); }, dst, src);
}

template <typename T>
void Add(const LocalTensor<T>& dst, const LocalTensor<T>& a, const LocalTensor<T>& b, const int32_t& count,
         Site at = Site::here()) {
  static_assert(twin::arithmetic<T>);
  twin::binary(at, count, twin::Plus{}, dst, a, b);
}
template <typename T>
void Sub(const LocalTensor<T>& dst, const LocalTensor<T>& a, const LocalTensor<T>& b, const int32_t& count,
         Site at = Site::here()) {
  static_assert(twin::arithmetic<T>);
  twin::binary(at, count, twin::Minus{}, dst, a, b);
}
template <typename T>
void Mul(const LocalTensor<T>& dst, const LocalTensor<T>& a, const LocalTensor<T>& b, const int32_t& count,
         Site at = Site::here()) {
  static_assert(twin::arithmetic<T>);
  twin::binary(at, count, twin::Times{}, dst, a, b);
}
template <typename T>
void Div(const LocalTensor<T>& dst, const LocalTensor<T>& a, const LocalTensor<T>& b, const int32_t& count,
         Site at = Site::here()) {
  static_assert(twin::floats<T>);
  twin::binary(at, count, twin::Quotient{}, dst, a, b);
}
template <typename T>
void Max(const LocalTensor<T>& dst, const LocalTensor<T>& a, const LocalTensor<T>& b, const int32_t& count,
         Site at = Site::here()) {
  static_assert(twin::arithmetic<T>);
  twin::binary(at, count, twin::Larger{}, dst, a, b);
}
template <typename T>
void Min(const LocalTensor<T>& dst, const LocalTensor<T>& a, const LocalTensor<T>& b, const int32_t& count,
         Site at = Site::here()) {
  static_assert(twin::arithmetic<T>);
  twin::binary(at, count, twin::Smaller{}, dst, a, b);
}

template <typename T>
void Adds(const LocalTensor<T>& dst, const LocalTensor<T>& src, const T& scalar, const int32_t& count,
          Site at = Site::here()) {
  static_assert(twin::arithmetic<T>);
  twin::unary(at, count, [s = static_cast<twin::Wide<T>>(scalar)](auto x) { return twin::Plus{}(x, s); }, dst, src);
}
template <typename T>
void Muls(const LocalTensor<T>& dst, const LocalTensor<T>& src, const T& scalar, const int32_t& count,
          Site at = Site::here()) {
  static_assert(twin::arithmetic<T>);
  twin::unary(at, count, [s = static_cast<twin::Wide<T>>(scalar)](auto x) { return twin::Times{}(x, s); }, dst, src);
}
template <typename T>
void Maxs(const LocalTensor<T>& dst, const LocalTensor<T>& src, const T& scalar, const int32_t& count,
          Site at = Site::here()) {
  static_assert(twin::arithmetic<T>);
  twin::unary(at, count, [s = static_cast<twin::Wide<T>>(scalar)](auto x) { return twin::Larger{}(x, s); }, dst, src);
}
template <typename T>
void Mins(const LocalTensor<T>& dst, const LocalTensor<T>& src, const T& scalar, const int32_t& count,
          Site at = Site::here()) {
  static_assert(twin::arithmetic<T>);
  twin::unary(at, count, [s = static_cast<twin::Wide<T>>(scalar)](auto x) { return twin::Smaller{}(x, s); }, dst, src);
}
template <typename T>
void ShiftLeft(const LocalTensor<T>& dst, const LocalTensor<T>& src, const T& scalar, const int32_t& count,
               Site at = Site::here()) {
  static_assert(twin::one_of<T, int16_t, uint16_t, int32_t, uint32_t>);
  const auto bits = static_cast<uint32_t>(scalar);
  twin::elementwise(at, count, [bits](T x) { return static_cast<T>(twin::unsigned_or_float(x) << bits); }, dst, src);
}
template <typename T>
void ShiftRight(const LocalTensor<T>& dst, const LocalTensor<T>& src, const T& scalar, const int32_t& count,
                Site at = Site::here()) {
  static_assert(twin::one_of<T, int16_t, uint16_t, int32_t, uint32_t>);
  const auto bits = static_cast<uint32_t>(scalar);
  twin::elementwise(at, count, [bits](T x) { return static_cast<T>(x >> bits); }, dst, src);
}

template <typename T>
void Abs(const LocalTensor<T>& dst, const LocalTensor<T>& src, const int32_t& count, Site at = Site::here()) {
  static_assert(twin::floats<T>);
  twin::unary(at, count, [](float x) { return std::abs(x); }, dst, src);
}
template <typename T>
void Exp(const LocalTensor<T>& dst, const LocalTensor<T>& src, const int32_t& count, Site at = Site::here()) {
  static_assert(twin::floats<T>);
  twin::unary(at, count, [](float x) { return std::exp(x); }, dst, src);
}
template <typename T>
void Sqrt(const LocalTensor<T>& dst, const LocalTensor<T>& src, const int32_t& count, Site at = Site::here()) {
  static_assert(twin::floats<T>);
  twin::unary(at, count, [](float x) { return std::sqrt(x); }, dst, src);
}
template <typename T>
void Reciprocal(const LocalTensor<T>& dst, const LocalTensor<T>& src, const int32_t& count, Site at = Site::here()) {
  static_assert(twin::floats<T>);
  twin::unary(at, count, [](float x) { return 1 / x; }, dst, src);
}

// dst += src * scalar
template <typename T, typename U>
void Axpy(const LocalTensor<T>& dst, const LocalTensor<U>& src, const U& scalar, const int32_t& count,
          Site at = Site::here()) {
  static_assert(twin::floats<T> && twin::floats<U> && sizeof(T) >= sizeof(U));
  const float factor = static_cast<float>(scalar);
  twin::elementwise(
      at, count, [factor](T sum, U x) { return static_cast<T>(static_cast<float>(sum) + factor * x); }, dst, dst, src);
}

// dst += a * b
template <typename T, typename U>
void MulAddDst(const LocalTensor<T>& dst, const LocalTensor<U>& a, const LocalTensor<U>& b, const int32_t& count,
               Site at = Site::here()) {
  static_assert(twin::floats<T> && twin::floats<U> && sizeof(T) >= sizeof(U));
  twin::elementwise(
      at, count,
      [](T sum, U x, U y) {
        return static_cast<T>(static_cast<float>(sum) + static_cast<float>(x) * static_cast<float>(y));
      },
      dst, dst, a, b);
}

// dst: the maximum, and with `index` its place, as bits.
template <typename T>
void ReduceMax(const LocalTensor<T>& dst, const LocalTensor<T>& src, const LocalTensor<T>& shared, int32_t count,
               bool index = false, Site at = Site::here()) {
  static_assert(twin::floats<T>);
  twin::check_count(count, at);
  if (count == 0) return;
  Core::current().issue(
      twin::V, at,
      {{src.span(0, count), false},
       {shared.span(0, std::min<uint32_t>(shared.GetSize(), (count * sizeof(T) + 255) / 256 * 2)), true},
       {dst.span(0, index ? 2 : 1), true, sizeof(T)}},
      [to = dst.data(), from = src.data(), count, index] {
        const uint32_t best = twin::index_of_largest(from, count);
        to[0] = from[best];
        if (index) to[1] = twin::index_bits<T>(best);
      });
}
// In pairs, then pairs of pairs.
template <typename T>
void ReduceSum(const LocalTensor<T>& dst, const LocalTensor<T>& src, const LocalTensor<T>& shared, int32_t count,
               Site at = Site::here()) {
  static_assert(twin::floats<T>);
  twin::check_count(count, at);
  if (count == 0) return;
  Core::current().issue(twin::V, at,
                        {{src.span(0, count), false},
                         {shared.span(0, std::min<uint32_t>(shared.GetSize(), (count * sizeof(T) + 255) / 256)), true},
                         {dst.span(0, 1), true, sizeof(T)}},
                        [to = dst.data(), from = src.data(), count] { to[0] = twin::tree(from, count, twin::Plus{}); });
}

// Each repeat of 256 bytes to one value. dstRepStride in elements (WholeReduceMax with an index: in pairs),
// srcRepStride in units of 32 bytes.
template <typename T, bool isSetMask = true>
void WholeReduceSum(const LocalTensor<T>& dst, const LocalTensor<T>& src, int32_t mask, int32_t repeat,
                    int32_t dstRepStride, int32_t srcBlkStride, int32_t srcRepStride, Site at = Site::here()) {
  static_assert(twin::floats<T> && isSetMask);
  twin::check_mask<T>(mask, at);
  if (srcBlkStride != 1) Core::current().fail(at, twin::V, "the twin knows srcBlkStride 1 only");
  twin::repeats(at, repeat, dst, dstRepStride * sizeof(T), 1, src, srcRepStride * twin::kBlock, mask,
                [mask](T* to, const T* from) { *to = twin::tree(from, mask, twin::Plus{}); });
}
template <typename T, bool isSetMask = true>
void WholeReduceMax(const LocalTensor<T>& dst, const LocalTensor<T>& src, int32_t mask, int32_t repeat,
                    int32_t dstRepStride, int32_t srcBlkStride, int32_t srcRepStride,
                    ReduceOrder order = ReduceOrder::ORDER_VALUE_INDEX, Site at = Site::here()) {
  static_assert(twin::floats<T> && isSetMask);
  twin::check_mask<T>(mask, at);
  if (srcBlkStride != 1) Core::current().fail(at, twin::V, "the twin knows srcBlkStride 1 only");
  const bool only = order == ReduceOrder::ORDER_ONLY_VALUE || order == ReduceOrder::ORDER_ONLY_INDEX;
  const uint32_t results = only ? 1 : 2;
  twin::repeats(at, repeat, dst, dstRepStride * results * sizeof(T), results, src, srcRepStride * twin::kBlock, mask,
                [mask, order, only](T* to, const T* from) {
                  const uint32_t best = twin::index_of_largest(from, mask);
                  const T value = from[best], index = twin::index_bits<T>(best);
                  const bool index_first =
                      order == ReduceOrder::ORDER_INDEX_VALUE || order == ReduceOrder::ORDER_ONLY_INDEX;
                  to[0] = index_first ? index : value;
                  if (!only) to[1] = index_first ? value : index;
                });
}
// Each block of 32 bytes of a repeat to one value: 8 per repeat.
template <typename T, bool isSetMask = true>
void BlockReduceMax(const LocalTensor<T>& dst, const LocalTensor<T>& src, int32_t repeat, int32_t mask,
                    int32_t dstRepStride, int32_t srcBlkStride, int32_t srcRepStride, Site at = Site::here()) {
  static_assert(twin::floats<T> && isSetMask);
  constexpr int32_t kElements = twin::kBlock / sizeof(T);
  twin::check_mask<T>(mask, at);
  if (srcBlkStride != 1) Core::current().fail(at, twin::V, "the twin knows srcBlkStride 1 only");
  const uint32_t blocks = (mask + kElements - 1) / kElements;
  twin::repeats(at, repeat, dst, dstRepStride * 8 * sizeof(T), blocks, src, srcRepStride * twin::kBlock, mask,
                [=](T* to, const T* from) {
                  for (uint32_t i = 0; i < blocks; ++i) {
                    const T* block = from + i * kElements;
                    to[i] = block[twin::index_of_largest(block, std::min<int32_t>(kElements, mask - i * kElements))];
                  }
                });
}

template <typename T, typename U>
void Compare(const LocalTensor<U>& dst, const LocalTensor<T>& a, const LocalTensor<T>& b, CMPMODE mode, uint32_t count,
             Site at = Site::here()) {
  static_assert(twin::one_of<T, half, float, int32_t>);
  if (std::is_same_v<T, int32_t> && mode != CMPMODE::EQ)
    Core::current().fail(at, twin::V, "Compare of int32_t has EQ only");
  twin::compare_all<T>(at, count, dst, {{a.span(0, count), false}, {b.span(0, count), false}},
                       [mode, x = a.data(), y = b.data()](uint32_t i) {
                         return twin::compare(mode, static_cast<twin::Wide<T>>(x[i]), static_cast<twin::Wide<T>>(y[i]));
                       });
}
template <typename T, typename U>
void CompareScalar(const LocalTensor<U>& dst, const LocalTensor<T>& a, T scalar, CMPMODE mode, uint32_t count,
                   Site at = Site::here()) {
  static_assert(twin::one_of<T, half, float, int32_t>);
  if (std::is_same_v<T, int32_t> && mode != CMPMODE::EQ)
    Core::current().fail(at, twin::V, "CompareScalar of int32_t has EQ only");
  twin::compare_all<T>(at, count, dst, {{a.span(0, count), false}}, [mode, x = a.data(), scalar](uint32_t i) {
    return twin::compare(mode, static_cast<twin::Wide<T>>(x[i]), static_cast<twin::Wide<T>>(scalar));
  });
}

// dst[i] = bit i of mask ? a[i] : b[i] or scalar
template <typename T, typename U>
void Select(const LocalTensor<T>& dst, const LocalTensor<U>& mask, const LocalTensor<T>& a, const LocalTensor<T>& b,
            SELMODE mode, uint32_t count, Site at = Site::here()) {
  static_assert(twin::floats<T>);
  if (mode != SELMODE::VSEL_TENSOR_TENSOR_MODE)
    Core::current().fail(at, twin::V, "Select of two tensors has VSEL_TENSOR_TENSOR_MODE only");
  Core::current().issue(
      twin::V, at,
      {{mask.span(0, (count + 8 * sizeof(U) - 1) / (8 * sizeof(U))), false},
       {a.span(0, count), false},
       {b.span(0, count), false},
       {dst.span(0, count), true}},
      [to = dst.data(), bits = reinterpret_cast<const uint8_t*>(mask.data()), x = a.data(), y = b.data(), count] {
        for (uint32_t i = 0; i < count; ++i) to[i] = bits[i / 8] >> i % 8 & 1 ? x[i] : y[i];
      });
}
template <typename T, typename U>
void Select(const LocalTensor<T>& dst, const LocalTensor<U>& mask, const LocalTensor<T>& a, T scalar, SELMODE mode,
            uint32_t count, Site at = Site::here()) {
  static_assert(twin::floats<T>);
  if (mode != SELMODE::VSEL_TENSOR_SCALAR_MODE)
    Core::current().fail(at, twin::V, "Select of a scalar has VSEL_TENSOR_SCALAR_MODE only");
  Core::current().issue(
      twin::V, at,
      {{mask.span(0, (count + 8 * sizeof(U) - 1) / (8 * sizeof(U))), false},
       {a.span(0, count), false},
       {dst.span(0, count), true}},
      [to = dst.data(), bits = reinterpret_cast<const uint8_t*>(mask.data()), x = a.data(), scalar, count] {
        for (uint32_t i = 0; i < count; ++i) to[i] = bits[i / 8] >> i % 8 & 1 ? x[i] : scalar;
      });
}

// dst[i] = the element at `base` + offsets[i] bytes of src
template <typename T>
void Gather(const LocalTensor<T>& dst, const LocalTensor<T>& src, const LocalTensor<uint32_t>& offsets, uint32_t base,
            uint32_t count, Site at = Site::here()) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4);
  Core& core = Core::current();
  if (count == 0) return;
  // Which elements is known only when it executes: for the order of accesses it reads all of src.
  core.issue(twin::V, at,
             {{src.span(0, src.GetSize()), false, twin::kBlock, true},
              {offsets.span(0, count), false},
              {dst.span(0, count), true}},
             [&core, at, to = dst.data(), from = src, list = offsets.data(), base, count] {
               for (uint32_t i = 0; i < count; ++i) {
                 const uint64_t offset = uint64_t{base} + list[i];
                 if (offset % sizeof(T) != 0) core.fail(at, twin::V, "an offset is not aligned to the element");
                 const twin::Span where = from.span(offset / sizeof(T), 1);
                 core.check_span(where, sizeof(T), at, twin::V);
                 core.check_written(where.space, where.begin, sizeof(T), at, twin::V);
                 std::memcpy(to + i, core.memory(where.space, where.begin), sizeof(T));
               }
             });
}

template <typename T>
void ArithProgression(const LocalTensor<T>& dst, T first, T difference, int32_t count, Site at = Site::here()) {
  static_assert(twin::arithmetic<T>);
  twin::check_count(count, at);
  if (count == 0) return;
  Core::current().issue(twin::V, at, {{dst.span(0, count), true}}, [to = dst.data(), first, difference, count] {
    for (int32_t i = 0; i < count; ++i)
      to[i] = static_cast<T>(static_cast<twin::Wide<T>>(first) +
                             static_cast<twin::Wide<T>>(i) * static_cast<twin::Wide<T>>(difference));
  });
}
template <typename T>
void CreateVecIndex(LocalTensor<T> dst, const T& first, uint32_t count, Site at = Site::here()) {
  ArithProgression(dst, first, static_cast<T>(1), count, at);
}

// Each of 8 elements per repeat to a block of 32 bytes.
template <typename T>
void Brcb(const LocalTensor<T>& dst, const LocalTensor<T>& src, uint8_t repeat, const BrcbRepeatParams& params,
          Site at = Site::here()) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4);
  constexpr uint32_t kElements = twin::kBlock / sizeof(T);
  if (repeat == 0) return;
  const uint32_t block = params.dstBlkStride * kElements, row = params.dstRepStride * kElements;
  Core::current().issue(
      twin::V, at, {{src.span(0, repeat * 8), false}, {dst.span(0, (repeat - 1) * row + 7 * block + kElements), true}},
      [to = dst.data(), from = src.data(), repeat, block, row] {
        for (uint32_t i = 0; i < repeat * 8u; ++i) std::fill_n(to + i / 8 * row + i % 8 * block, kElements, from[i]);
      });
}

}  // namespace AscendC
