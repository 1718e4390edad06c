// half and bfloat16_t, and conversions with AscendC's rounding modes.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

namespace AscendC {

enum class RoundMode : uint8_t {
  CAST_NONE = 0,
  CAST_RINT,
  CAST_FLOOR,
  CAST_CEIL,
  CAST_ROUND,  // ties away from zero
  CAST_TRUNC,
  CAST_ODD,  // Von Neumann: an inexact result has an odd last bit
  UNKNOWN = 0xFF,
};

}  // namespace AscendC

namespace twin {

using AscendC::RoundMode;

// Kernels are C++17, and so is what they include.
template <typename To, typename From>
To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

// To an integer, in double.
inline double round_integer(double x, RoundMode mode) {
  switch (mode) {
    case RoundMode::CAST_FLOOR:
      return std::floor(x);
    case RoundMode::CAST_CEIL:
      return std::ceil(x);
    case RoundMode::CAST_ROUND:
      return std::round(x);
    case RoundMode::CAST_TRUNC:
      return std::trunc(x);
    case RoundMode::CAST_ODD: {
      const double down = std::trunc(x);
      return down == x || std::fmod(down, 2) != 0 ? down : down + std::copysign(1, x);
    }
    default:
      return std::nearbyint(x);
  }
}

// A binary floating point format of 16 bits.
template <int mantissa_bits>
struct Float16 {
  static constexpr int kBias = (1 << (14 - mantissa_bits)) - 1;
  static constexpr uint16_t kInfinity = static_cast<uint16_t>(0x7fff >> mantissa_bits << mantissa_bits);

  static float widen(uint16_t bits) {
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16, magnitude = bits & 0x7fff;
    if (magnitude >= kInfinity)
      return bit_cast<float>(sign | 0x7f800000 | (magnitude & (kInfinity ^ 0x7fff)) << (23 - mantissa_bits));
    // As a float of another bias; the product restores it, and is exact, for subnormal numbers too.
    const float shifted = bit_cast<float>(magnitude << (23 - mantissa_bits));
    const float value = mantissa_bits == 7 ? shifted : shifted * 0x1p112f;
    return bit_cast<float>(sign | bit_cast<uint32_t>(value));
  }

  static uint16_t narrow(double x, RoundMode mode) {
    const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
    if (std::isnan(x)) return sign | kInfinity | 1 << (mantissa_bits - 1);
    if (std::isinf(x)) return sign | kInfinity;
    if (x == 0) return sign;
    const int exponent = std::max(std::ilogb(x), 1 - kBias);
    const double unit = std::ldexp(1.0, exponent - mantissa_bits);
    const double rounded = std::abs(round_integer(x / unit, mode));  // in units; may carry into the exponent
    const auto bits = static_cast<uint32_t>(rounded) + (static_cast<uint32_t>(exponent - 1 + kBias) << mantissa_bits);
    if (bits < kInfinity) return sign | static_cast<uint16_t>(bits);
    const bool to_infinity = mode == RoundMode::CAST_NONE || mode == RoundMode::CAST_RINT ||
                             mode == RoundMode::CAST_ROUND || (mode == RoundMode::CAST_CEIL && !sign) ||
                             (mode == RoundMode::CAST_FLOOR && sign);
    return sign | static_cast<uint16_t>(kInfinity - !to_infinity);
  }

  // To nearest, ties to even: the common case, without library calls.
  static uint16_t narrow(float x) {
    const uint32_t bits = bit_cast<uint32_t>(x), magnitude = bits & 0x7fffffff;
    constexpr int kShift = 23 - mantissa_bits;
    constexpr uint32_t kRebias = static_cast<uint32_t>(127 - kBias) << 23;
    if (magnitude >= 0x7f800000 || magnitude < kRebias + (1u << 23)) return narrow(x, RoundMode::CAST_RINT);
    const uint32_t rounded = (magnitude - kRebias + (1u << (kShift - 1)) - 1 + (magnitude >> kShift & 1)) >> kShift;
    return static_cast<uint16_t>(bits >> 16 & 0x8000) | static_cast<uint16_t>(std::min<uint32_t>(rounded, kInfinity));
  }
};

}  // namespace twin

struct half {
  uint16_t bits = 0;
  half() = default;
  template <typename T, typename = std::enable_if_t<std::is_arithmetic_v<T>>>
  half(T x) : bits(twin::Float16<10>::narrow(static_cast<float>(x))) {}
  operator float() const { return twin::Float16<10>::widen(bits); }
};

struct bfloat16_t {
  uint16_t bits = 0;
  bfloat16_t() = default;
  template <typename T, typename = std::enable_if_t<std::is_arithmetic_v<T>>>
  bfloat16_t(T x) : bits(twin::Float16<7>::narrow(static_cast<float>(x))) {}
  explicit operator float() const { return twin::Float16<7>::widen(bits); }
};

// Of 8 bits, which only Mmad on 3510 reads.
struct fp8_e4m3fn_t {
  uint8_t bits = 0;
  explicit operator float() const {
    const int exponent = bits >> 3 & 15, mantissa = bits & 7;
    if ((bits & 127) == 127) return NAN;
    const float magnitude =
        std::ldexp(static_cast<float>(exponent == 0 ? mantissa : 8 + mantissa), std::max(exponent, 1) - 10);
    return bits & 128 ? -magnitude : magnitude;
  }
};

struct fp8_e5m2_t {
  uint8_t bits = 0;
  explicit operator float() const { return twin::Float16<10>::widen(static_cast<uint16_t>(bits << 8)); }
};

namespace AscendC {

inline float ToFloat(const bfloat16_t& x) { return static_cast<float>(x); }
inline bfloat16_t ToBfloat16(const float& x) { return x; }

}  // namespace AscendC

namespace twin {

template <typename T>
constexpr bool is_float16 = std::is_same_v<T, half> || std::is_same_v<T, bfloat16_t>;
template <typename T>
constexpr bool is_floating = is_float16<T> || std::is_same_v<T, float>;
template <typename T, typename... Ts>
constexpr bool one_of = (std::is_same_v<T, Ts> || ...);
template <typename T>
constexpr bool is_float8 = one_of<T, fp8_e4m3fn_t, fp8_e5m2_t>;

// Integers saturate; floating point numbers overflow as their rounding mode says.
template <typename To, typename From>
To convert(From from, RoundMode mode) {
  if constexpr (std::is_integral_v<From> && std::is_integral_v<To>) {
    using Limits = std::numeric_limits<To>;
    return static_cast<To>(std::clamp<int64_t>(from, static_cast<int64_t>(Limits::min()),
                                               static_cast<int64_t>(std::min<uint64_t>(Limits::max(), INT64_MAX))));
  } else if constexpr (std::is_integral_v<To>) {
    const double rounded = round_integer(static_cast<float>(from), mode);
    if (std::isnan(rounded)) return 0;
    // 2^63 is a double, its predecessor as an integer is not.
    if (rounded >= std::ldexp(1.0, std::numeric_limits<To>::digits)) return std::numeric_limits<To>::max();
    if (rounded <= static_cast<double>(std::numeric_limits<To>::min())) return std::numeric_limits<To>::min();
    return static_cast<To>(rounded);
  } else if constexpr (std::is_integral_v<From>) {
    const double exact = static_cast<double>(from);  // callers convert no int64 above 2^53
    if constexpr (std::is_same_v<To, float>) {
      const float near = static_cast<float>(exact);
      const bool down = mode == RoundMode::CAST_FLOOR || (mode == RoundMode::CAST_TRUNC && exact > 0);
      const bool up = mode == RoundMode::CAST_CEIL || (mode == RoundMode::CAST_TRUNC && exact < 0);
      if (down && near > exact) return std::nextafter(near, -INFINITY);
      if (up && near < exact) return std::nextafter(near, INFINITY);
      return near;
    } else {
      To to;
      to.bits = Float16 < std::is_same_v<To, half> ? 10 : 7 > ::narrow(exact, mode);
      return to;
    }
  } else if constexpr (std::is_same_v<To, float>) {
    const float x = static_cast<float>(from);
    return std::is_same_v<From, float> ? static_cast<float>(round_integer(x, mode)) : x;
  } else {
    const float x = static_cast<float>(from);
    if (mode == RoundMode::CAST_RINT || mode == RoundMode::CAST_NONE) return To(x);
    To to;
    to.bits = Float16 < std::is_same_v<To, half> ? 10 : 7 > ::narrow(x, mode);
    return to;
  }
}

}  // namespace twin
