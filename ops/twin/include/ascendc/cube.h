// Cube cores: GM to L1 (MTE2), L1 to L0A and L0B (MTE1), Mmad (M) and Fixpipe (FIX).
//
// A fractal is 512 bytes, 16 rows of 32 bytes, and 16 x 16 words in L0C. Layouts, with C columns in 32 bytes:
//
//   Nz   L1, A in L0A on 3510, C in L0C    of [M, K], column by column of fractals
//   Zz   A in L0A on 2201                  of [M, K], row by row of fractals
//   Zn   B in L0B                          of [K, N], row by row of fractals, which are transposed: [16 of N, C of K]
#pragma once

#include "copy.h"

// Fixpipe's conversions. What begins with V has a scale for each column.
enum QuantMode_t {
  NoQuant,
  F322F16,
  F322BF16,
  DEQF16,  // int32 to half
  VDEQF16,
  REQ8,  // int32 to int8
  VREQ8,
  QF322B8_PRE,  // float to int8
  VQF322B8_PRE,
  QS322BF16_PRE,  // int32 to bfloat16_t, on 3510
  VQS322BF16_PRE,
};

namespace AscendC {

struct Nd2NzParams {
  Nd2NzParams() = default;
  Nd2NzParams(uint16_t matrices, uint16_t rows, uint32_t columns, uint64_t matrix_stride, uint64_t row_stride,
              uint16_t c0_stride, uint16_t n_stride, uint32_t nz_matrix_stride)
      : ndNum(matrices),
        nValue(rows),
        dValue(columns),
        srcNdMatrixStride(matrix_stride),
        srcDValue(row_stride),
        dstNzC0Stride(c0_stride),
        dstNzNStride(n_stride),
        dstNzMatrixStride(nz_matrix_stride) {}
  uint16_t ndNum = 0;
  uint16_t nValue = 0;
  uint32_t dValue = 0;
  uint64_t srcNdMatrixStride = 0;  // in elements, as the next
  uint64_t srcDValue = 0;
  uint16_t dstNzC0Stride = 0;  // in units of 32 bytes, as the next
  uint16_t dstNzNStride = 0;
  uint32_t dstNzMatrixStride = 0;  // in elements
};

// In fractals.
struct LoadData2DParams {
  LoadData2DParams() = default;
  LoadData2DParams(uint16_t start, uint8_t repeat, uint16_t stride, uint8_t sid, uint16_t gap, bool transpose,
                   uint8_t mode)
      : startIndex(start),
        dstGap(gap),
        srcStride(stride),
        ifTranspose(transpose),
        repeatTimes(repeat),
        sid(sid),
        addrMode(mode) {}
  uint16_t startIndex = 0;
  uint16_t dstGap = 0;
  uint16_t srcStride = 0;
  bool ifTranspose = false;
  uint8_t repeatTimes = 0;
  uint8_t sid = 0;
  uint8_t addrMode = 0;
};
using LoadData2dParams = LoadData2DParams;

// startIndex and srcStride in squares: of 32 x 32 bytes, or fractals of 16-bit types.
struct LoadData2dTransposeParams {
  LoadData2dTransposeParams() = default;
  LoadData2dTransposeParams(uint16_t start, uint8_t repeat, uint16_t stride, uint16_t gap, uint16_t fractal_gap,
                            uint8_t mode = 0)
      : startIndex(start),
        repeatTimes(repeat),
        srcStride(stride),
        dstGap(gap),
        dstFracGap(fractal_gap),
        addrMode(mode) {}
  uint16_t startIndex = 0;
  uint8_t repeatTimes = 0;
  uint16_t srcStride = 0;
  uint16_t dstGap = 0;
  uint16_t dstFracGap = 0;
  uint8_t addrMode = 0;
};

struct MmadParams {
  MmadParams() = default;
  MmadParams(uint16_t m, uint16_t n, uint16_t k, uint8_t unit_flag, bool source, bool zero)
      : m(m), n(n), k(k), unitFlag(unit_flag), cmatrixSource(source), cmatrixInitVal(zero) {}
  uint16_t m = 0, n = 0, k = 0;
  bool isBias = false;
  int32_t fmOffset = 0;
  bool enSsparse = false, enWinogradA = false, enWinogradB = false;
  uint8_t unitFlag = 0;
  bool kDirectionAlign = false;
  bool cmatrixSource = false;
  bool cmatrixInitVal = true;  // begins with 0; else with what L0C has
};

enum class CO2Layout : uint8_t { NZ = 0, ROW_MAJOR, COLUMN_MAJOR };

struct FixpipeConfig {
  CO2Layout format;
};
inline constexpr FixpipeConfig CFG_NZ = {CO2Layout::NZ};
inline constexpr FixpipeConfig CFG_ROW_MAJOR = {CO2Layout::ROW_MAJOR};

struct FixpipeParamsV220 {
  FixpipeParamsV220() = default;
  FixpipeParamsV220(uint16_t n, uint16_t m, uint16_t source_stride, uint32_t stride, bool relu)
      : nSize(n), mSize(m), srcStride(source_stride), dstStride(stride), reluEn(relu) {}
  uint16_t nSize = 0, mSize = 0;
  uint16_t srcStride = 0;  // of columns of fractals, in rows of 16 words
  uint32_t dstStride = 0;  // ROW_MAJOR: in elements; NZ: in units of 32 bytes
  QuantMode_t quantPre = QuantMode_t::NoQuant;
  uint64_t deqScalar = 0;
  uint16_t ndNum = 1;
  uint16_t srcNdStride = 0;  // in fractals of L0C
  uint16_t dstNdStride = 0;  // in elements
  bool reluEn = false;
  uint8_t unitFlag = 0;
  bool isChannelSplit = false;
};

}  // namespace AscendC

namespace twin {

constexpr uint32_t kFractal = 512, kRows = 16;

// `what` is at most `most`.
inline void check_most(const char* what, uint64_t value, uint64_t most, Site at, Pipe pipe) {
  if (value > most)
    Core::current().fail(at, pipe,
                         std::string(what) + " is " + std::to_string(value) + ", at most " + std::to_string(most));
}

template <typename T>
void check_space(const AscendC::LocalTensor<T>& tensor, std::initializer_list<SpaceId> spaces, Site at, Pipe pipe) {
  const SpaceId space = tensor.span(0, 0).space;
  if (std::find(spaces.begin(), spaces.end(), space) == spaces.end())
    Core::current().fail(at, pipe, std::string("has no way to or from ") + kSpaceNames[space]);
}

constexpr uint32_t blocks(uint32_t count, uint32_t of) { return (count + of - 1) / of; }

// Copies a row of a fractal, and what is known of it: rows that nobody has written may be moved, and not be used.
inline void move_bytes(Span to, uint32_t to_offset, Span from, uint32_t from_offset, uint32_t bytes) {
  Core& core = Core::current();
  std::memcpy(core.memory(to.space, to.begin + to_offset), core.memory(from.space, from.begin + from_offset), bytes);
  std::memcpy(core.written(to.space, to.begin + to_offset), core.written(from.space, from.begin + from_offset), bytes);
}

// MTE1: squares of `fractals` fractals, each transposed or as it is. Offsets in bytes.
struct Squares {
  uint32_t repeats, fractals;
  uint64_t source, source_stride, stride, fractal_stride;
  bool transpose;
};

template <typename T>
void load_squares(const AscendC::LocalTensor<T>& dst, const AscendC::LocalTensor<T>& src, const Squares& s, Site at) {
  Core& core = Core::current();
  check_space(dst, {L0A, L0B}, at, MTE1);
  check_space(src, {L1}, at, MTE1);
  if (s.repeats == 0) return;
  const auto at_offset = [](const AscendC::LocalTensor<T>& tensor, uint64_t offset, uint32_t bytes) {
    Span span = tensor.span(0, 0);
    return Span{static_cast<uint32_t>(std::min<uint64_t>(span.begin + offset, UINT32_MAX)), bytes, span.limit,
                span.space};
  };
  std::vector<Use> uses;
  std::vector<uint32_t> begins;
  for (uint32_t i = 0; i < s.repeats; ++i) {
    uses.push_back({at_offset(src, s.source + i * s.source_stride, s.fractals * kFractal), false, kBlock, true});
    for (uint32_t f = 0; f < s.fractals; ++f) {
      uses.push_back({at_offset(dst, i * s.stride + f * s.fractal_stride, kFractal), true, kFractal, true});
      begins.push_back(uses.back().span.begin);
    }
  }
  core.check_fractals(begins, kFractal, at, MTE1);
  core.issue_after(Clock{}, MTE1, at, uses, [s, uses] {
    for (uint32_t i = 0; i < s.repeats; ++i) {
      const Use* use = uses.data() + i * (s.fractals + 1);
      const Span from = use->span;
      for (uint32_t f = 0; f < s.fractals; ++f) {
        const Span to = use[1 + f].span;
        if (!s.transpose) {
          move_bytes(to, 0, from, f * kFractal, kFractal);
          continue;
        }
        // A square has as many rows as columns: 32 of bytes, 16 of 16-bit types.
        constexpr uint32_t kColumns = kBlock / sizeof(T);
        for (uint32_t row = 0; row < kRows; ++row)
          for (uint32_t column = 0; column < kColumns; ++column)
            move_bytes(to, row * kBlock + column * sizeof(T), from, column * kBlock + (f * kRows + row) * sizeof(T),
                       sizeof(T));
      }
    }
  });
}

// Where element [row, column] of a matrix is in L0A or L0B, in elements.
struct Fractals {
  bool rows_first;  // fractals go down the rows first
  uint32_t row_blocks, column_blocks, columns;
  uint32_t operator()(uint32_t row, uint32_t column) const {
    const uint32_t r = row / kRows, c = column / columns;
    const uint32_t fractal = rows_first ? c * row_blocks + r : r * column_blocks + c;
    return fractal * kRows * columns + row % kRows * columns + column % columns;
  }
};

// The sum of products in an order that is not defined; exact, and saturated, of integers.
template <typename C>
C sum_of_products(C begin, uint32_t count, uint64_t order, const C* x, const C* y) {
  if constexpr (std::is_integral_v<C>) {
    int64_t sum = begin;
    for (uint32_t i = 0; i < count; ++i) sum += x[i] * y[i];
    return static_cast<C>(std::clamp<int64_t>(sum, std::numeric_limits<C>::min(), std::numeric_limits<C>::max()));
  } else {
    const auto sum_up = [&](C sum, bool backwards) {
      for (uint32_t i = 0; i < count; ++i) {
        const uint32_t k = backwards ? count - 1 - i : i;
        sum += x[k] * y[k];
      }
      return sum;
    };
    const bool backwards = order & 1;
    if (order & 2) return begin + sum_up(0, backwards);  // C comes last
    if (!(order & 4)) return sum_up(begin, backwards);
    // In pieces of 16, as an array of multipliers does.
    for (uint32_t piece = 0; piece < count; piece += kRows) {
      C sum = 0;
      for (uint32_t i = piece; i < std::min(count, piece + kRows); ++i) sum += x[i] * y[i];
      begin += sum;
    }
    return begin;
  }
}

// The scale of a Fixpipe: a float of which 10 bits of the mantissa are used.
struct Scale {
  float factor;
  int offset;
  static Scale of(uint64_t bits, bool to_int8, Site at) {
    if (bits >> 32 & 31) Core::current().fail(at, FIX, "the twin has no shift in a scale: bits 32 to 36");
    if (to_int8 && !(bits >> 46 & 1)) Core::current().fail(at, FIX, "the scale says uint8: bit 46 is 0");
    const int offset = static_cast<int>(bits >> 37 & 511);
    return {bit_cast<float>(static_cast<uint32_t>(bits) & 0xffffe000), offset >= 256 ? offset - 512 : offset};
  }
};

constexpr bool has_scales(QuantMode_t mode) {
  return mode == VDEQF16 || mode == VREQ8 || mode == VQF322B8_PRE || mode == VQS322BF16_PRE;
}

template <typename T, typename U>
bool is_quant_mode(QuantMode_t mode) {
  constexpr bool from_int = std::is_same_v<U, int32_t>;
  switch (mode) {
    case NoQuant:
      return std::is_same_v<T, U>;
    case F322F16:
      return !from_int && std::is_same_v<T, half>;
    case F322BF16:
      return !from_int && std::is_same_v<T, bfloat16_t>;
    case DEQF16:
    case VDEQF16:
      return from_int && std::is_same_v<T, half>;
    case REQ8:
    case VREQ8:
      return from_int && std::is_same_v<T, int8_t>;
    case QF322B8_PRE:
    case VQF322B8_PRE:
      return !from_int && std::is_same_v<T, int8_t>;
    case QS322BF16_PRE:
    case VQS322BF16_PRE:
      return from_int && std::is_same_v<T, bfloat16_t> && Core::current().arch() == 3510;
  }
  return false;
}

template <typename T, typename U>
T quantise(U value, QuantMode_t mode, uint64_t scale_bits, Site at) {
  if constexpr (std::is_same_v<T, U>) {
    return value;
  } else {
    const auto x = static_cast<float>(value);
    if (mode == F322F16 || mode == F322BF16) return convert<T>(x, RoundMode::CAST_RINT);
    const Scale scale = Scale::of(scale_bits, std::is_same_v<T, int8_t>, at);
    const float scaled = x * scale.factor;
    if constexpr (std::is_same_v<T, int8_t>)
      return convert<T>(static_cast<float>(std::nearbyint(scaled)) + static_cast<float>(scale.offset),
                        RoundMode::CAST_RINT);
    else
      return convert<T>(scaled, RoundMode::CAST_RINT);
  }
}

template <typename T, typename U>
void fixpipe(AscendC::CO2Layout format, const AscendC::GlobalTensor<T>& dst, const AscendC::LocalTensor<U>& src,
             const AscendC::LocalTensor<uint64_t>* scales, const AscendC::FixpipeParamsV220& p, Site at) {
  Core& core = Core::current();
  const bool is_nd = format == AscendC::CO2Layout::ROW_MAJOR;
  check_space(src, {L0C}, at, FIX);
  check_global(dst, FIX, at);
  check_most("nSize", p.nSize, 4095, at, FIX);
  if (is_nd && core.arch() == 2201) check_most("mSize", p.mSize, 8192, at, FIX);
  if (p.nSize % kRows != 0) core.fail(at, FIX, "nSize is " + std::to_string(p.nSize) + ", no multiple of 16");
  if (p.reluEn || p.isChannelSplit) core.fail(at, FIX, "the twin has no relu and no split of channels in Fixpipe");
  if (!is_quant_mode<T, U>(p.quantPre)) core.fail(at, FIX, "quantPre does not convert between these types");
  if (has_scales(p.quantPre) != (scales != nullptr))
    core.fail(at, FIX, "a scale for each column comes with a tensor of scales, and the other way round");
  if (p.unitFlag == 1 || p.unitFlag > 3) core.fail(at, FIX, "unitFlag is 0, 2 or 3");
  const uint32_t matrices = is_nd ? p.ndNum : 1;
  if (p.nSize == 0 || p.mSize == 0 || matrices == 0) return;
  if (p.dstStride == 0) core.fail(at, FIX, "dstStride is 0");
  if (blocks(p.mSize, kRows) * kRows > p.srcStride && p.nSize > kRows)
    core.fail(at, FIX, "srcStride is " + std::to_string(p.srcStride) + ", less than the rows of a column of fractals");
  // The words of a matrix [n / 16][m][16] in L0C, and rows of `width` elements in global memory.
  const uint64_t column_stride = uint64_t{p.srcStride} * kRows;
  const uint64_t words = (p.nSize / kRows - 1) * column_stride + uint64_t{p.mSize} * kRows;
  const uint64_t matrix_stride = uint64_t{p.srcNdStride} * kRows * kRows;
  const uint32_t width = is_nd ? p.nSize : std::max<uint32_t>(kRows, kBlock / sizeof(T));
  if (p.nSize % width != 0) core.fail(at, FIX, "nSize is no multiple of the columns of a fractal of the output");
  std::vector<Use> uses;
  Clock more;
  auto& segments = core.segments();
  segments.clear();
  for (uint32_t i = 0; i < matrices; ++i) {
    uses.push_back({src.span(i * matrix_stride, words), false, 64, true});
    more.join(core.begin_fixpipe(uses.back().span, p.unitFlag, at));
    for (uint32_t column = 0; column < p.nSize; column += width)
      for (uint32_t row = 0; row < p.mSize; ++row) {
        const uint64_t element = is_nd ? i * uint64_t{p.dstNdStride} + row * uint64_t{p.dstStride}
                                       : column / width * (p.dstStride * uint64_t{kBlock} / sizeof(T)) + row * width;
        auto* gm = reinterpret_cast<uint8_t*>(dst.GetPhyAddr(element));
        const auto bytes = static_cast<uint32_t>(width * sizeof(T));
        segments.push_back({gm, core.memory_of(gm, bytes, true, at, FIX), 0, bytes});
      }
  }
  if (scales) {
    check_space(*scales, {L1}, at, FIX);
    uses.push_back({scales->span(0, p.nSize), false, kBlock});
  }
  const auto execute = [=, &core](std::vector<uint8_t>& rows) {
    uint8_t* to = rows.data();
    for (uint32_t i = 0; i < matrices; ++i)
      for (uint32_t column = 0; column < p.nSize; column += width)
        for (uint32_t row = 0; row < p.mSize; ++row)
          for (uint32_t n = column; n < column + width; ++n, to += sizeof(T)) {
            const auto word = static_cast<uint32_t>(i * matrix_stride + n / kRows * column_stride + row * kRows);
            const Span from = uses[i].span;
            const uint32_t offset =
                from.begin - static_cast<uint32_t>(i * matrix_stride * sizeof(U)) + (word + n % kRows) * sizeof(U);
            core.check_written(L0C, offset, sizeof(U), at, FIX);
            U value;
            std::memcpy(&value, core.memory(L0C, offset), sizeof(U));
            uint64_t scale = p.deqScalar;
            if (uses.size() > matrices)
              std::memcpy(&scale, core.memory(L1, uses.back().span.begin + n * sizeof(scale)), sizeof(scale));
            const T result = quantise<T>(value, p.quantPre, scale, at);
            std::memcpy(to, &result, sizeof(T));
          }
  };
  core.write_rows(more, at, uses, execute);
}

}  // namespace twin

namespace AscendC {

// Matrices [nValue, dValue] to Nz. Columns are filled up with 0, rows are not.
template <typename T>
void DataCopy(const LocalTensor<T>& dst, const GlobalTensor<T>& src, const Nd2NzParams& p, Site at = Site::here()) {
  using namespace twin;
  Core& core = Core::current();
  check_space(dst, {L1}, at, MTE2);
  check_global(src, MTE2, at);
  check_most("ndNum", p.ndNum, 4095, at, MTE2);
  check_most("nValue", p.nValue, 16384, at, MTE2);
  check_most("dValue", p.dValue, 65535, at, MTE2);
  check_most("srcDValue", p.srcDValue, 65535, at, MTE2);
  check_most("srcNdMatrixStride", p.srcNdMatrixStride, 65535, at, MTE2);
  check_most("dstNzC0Stride", p.dstNzC0Stride, 16384, at, MTE2);
  check_most("dstNzNStride", p.dstNzNStride, 16384, at, MTE2);
  check_most("dstNzMatrixStride", p.dstNzMatrixStride, 16384, at, MTE2);
  if (p.ndNum == 0 || p.nValue == 0 || p.dValue == 0) return;
  constexpr uint32_t kColumns = kBlock / sizeof(T);
  const Span first = dst.span(0, 0);
  std::vector<Segment> rows;
  std::vector<uint32_t> begins;
  auto& segments = core.segments();
  segments.clear();
  for (uint32_t matrix = 0; matrix < p.ndNum; ++matrix)
    for (uint32_t row = 0; row < p.nValue; ++row) {
      auto* gm = reinterpret_cast<uint8_t*>(src.GetPhyAddr(matrix * p.srcNdMatrixStride + row * p.srcDValue));
      const auto bytes = static_cast<uint32_t>(p.dValue * sizeof(T));
      Memory* memory = core.memory_of(gm, bytes, false, at, MTE2);
      rows.push_back({gm, memory, 0, bytes});
      for (uint32_t column = 0; column < p.dValue; column += kColumns) {
        const uint64_t begin =
            first.begin + matrix * uint64_t{p.dstNzMatrixStride} * sizeof(T) +
            (column / kColumns * uint64_t{p.dstNzC0Stride} + row * uint64_t{p.dstNzNStride}) * kBlock;
        const Span span{static_cast<uint32_t>(std::min<uint64_t>(begin, UINT32_MAX)), kBlock, first.limit, L1};
        core.check_span(span, kBlock, at, MTE2);
        begins.push_back(span.begin);
        const auto used = static_cast<uint32_t>(std::min(kColumns, p.dValue - column) * sizeof(T));
        segments.push_back({gm + column * sizeof(T), memory, span.begin, used});
        segments.back().space = L1;
        if (used == kBlock) continue;
        segments.push_back({gm, memory, span.begin + used, kBlock - used, Segment::value, sizeof(T)});
        segments.back().space = L1;
      }
    }
  core.check_fractals(begins, kBlock, at, MTE2);
  core.transfer_pieces(rows, at);
}

template <typename T>
void LoadData(const LocalTensor<T>& dst, const LocalTensor<T>& src, const LoadData2DParams& p, Site at = Site::here()) {
  using namespace twin;
  Core& core = Core::current();
  if (p.ifTranspose && sizeof(T) != 2) core.fail(at, MTE1, "LoadData transposes 16-bit types only");
  if (p.dstGap != 0 && core.arch() == 3510) core.fail(at, MTE1, "dstGap does nothing on 3510");
  if (p.addrMode != 0) core.fail(at, MTE1, "addrMode is 0");
  load_squares(dst, src,
               {p.repeatTimes, 1, uint64_t{p.startIndex} * kFractal, uint64_t{p.srcStride} * kFractal,
                (uint64_t{p.dstGap} + 1) * kFractal, 0, p.ifTranspose},
               at);
}

template <typename T>
void LoadDataWithTranspose(const LocalTensor<T>& dst, const LocalTensor<T>& src, const LoadData2dTransposeParams& p,
                           Site at = Site::here()) {
  using namespace twin;
  static_assert(sizeof(T) <= 2, "the twin transposes types of 8 and 16 bits");
  Core& core = Core::current();
  if (core.arch() == 3510) check_space(dst, {L0B}, at, MTE1);
  if (p.addrMode != 0) core.fail(at, MTE1, "addrMode is 0");
  constexpr uint32_t kFractals = 2 / sizeof(T);
  load_squares(dst, src,
               {p.repeatTimes, kFractals, uint64_t{p.startIndex} * kFractals * kFractal,
                uint64_t{p.srcStride} * kFractals * kFractal, (uint64_t{p.dstGap} + 1) * kFractal,
                (uint64_t{p.dstFracGap} + 1) * kFractal, true},
               at);
}

// C [m, n] = A [m, k] B [k, n], or added to what C has.
template <typename T, typename U, typename V>
void Mmad(const LocalTensor<T>& c, const LocalTensor<U>& a, const LocalTensor<V>& b, const MmadParams& p,
          Site at = Site::here()) {
  using namespace twin;
  static_assert(std::is_same_v<U, V> || (is_float8<U> && is_float8<V>), "operands of one type, or any of fp8");
  static_assert(std::is_same_v<U, int8_t> ? std::is_same_v<T, int32_t>
                                          : (is_float16<U> || is_float8<U>) && std::is_same_v<T, float>,
                "Mmad: int8 to int32; half, bfloat16_t and fp8 to float");
  Core& core = Core::current();
  if (is_float8<U> && core.arch() != 3510) core.fail(at, M, "Mmad of fp8 is one of 3510");
  check_space(c, {L0C}, at, M);
  check_space(a, {L0A}, at, M);
  check_space(b, {L0B}, at, M);
  check_most("m", p.m, 4095, at, M);
  check_most("n", p.n, 4095, at, M);
  check_most("k", p.k, 4095, at, M);
  if (p.unitFlag == 1 || p.unitFlag > 3) core.fail(at, M, "unitFlag is 0, 2 or 3");
  if (p.isBias || p.cmatrixSource) core.fail(at, M, "the twin has no bias in Mmad");
  if (p.m == 0 || p.n == 0 || p.k == 0) return;
  constexpr uint32_t kColumns = kBlock / sizeof(U);
  const uint32_t ms = blocks(p.m, kRows), ns = blocks(p.n, kRows), ks = blocks(p.k, kColumns);
  // One row is read as it is, [k].
  const bool is_row = p.m == 1;
  const Fractals place_a{core.arch() == 3510, ms, ks, kColumns}, place_b{true, ns, ks, kColumns};
  const Use use_a{a.span(0, is_row ? p.k : ms * ks * kRows * kColumns), false, kFractal, true};
  const Use use_b{b.span(0, ns * ks * kRows * kColumns), false, kFractal, true};
  const Use use_c{c.span(0, ms * ns * kRows * kRows), true, 2 * kFractal, true};
  for (const Use& use : {use_a, use_b, use_c}) core.check_span(use.span, use.alignment, at, M);
  const Clock more = core.begin_mmad(use_c.span, p.unitFlag, ms * ns >= 10, at);
  const auto execute = [=, &core, order = core.choice(8), garbage = static_cast<uint8_t>(core.choice(256))] {
    const auto check = [&](const Span& span, uint32_t element, uint32_t bytes) {
      core.check_written(span.space, span.begin + element * sizeof(U), bytes, at, M);
    };
    // Rows of A and columns of B, as they are multiplied.
    const auto rows_of = [&](const auto* from, const Span& span, uint32_t rows, auto place) {
      std::vector<T> values(size_t{rows} * p.k);
      for (uint32_t row = 0; row < rows; ++row)
        for (uint32_t k = 0; k < p.k; ++k) {
          const uint32_t element = place(row, k);
          if (k % kColumns == 0) check(span, element, std::min(kColumns, p.k - k) * sizeof(U));
          values[size_t{row} * p.k + k] = static_cast<T>(from[element]);
        }
      return values;
    };
    const std::vector<T> x =
        rows_of(a.data(), use_a.span, p.m, [&](uint32_t m, uint32_t k) { return is_row ? k : place_a(m, k); });
    const std::vector<T> y = rows_of(b.data(), use_b.span, p.n, place_b);
    for (uint32_t m = 0; m < ms * kRows; ++m)
      for (uint32_t n = 0; n < ns * kRows; ++n) {
        const uint32_t element = (n / kRows * ms * kRows + m) * kRows + n % kRows;
        const bool is_used = m < p.m && n < p.n;
        uint8_t* const to = core.memory(L0C, use_c.span.begin + element * sizeof(T));
        T value;
        if (is_used) {
          T begin{};
          if (!p.cmatrixInitVal) {
            core.check_written(L0C, use_c.span.begin + element * sizeof(T), sizeof(T), at, M);
            std::memcpy(&begin, to, sizeof(T));
          }
          value = sum_of_products(begin, p.k, order, &x[size_t{m} * p.k], &y[size_t{n} * p.k]);
        } else {
          std::memset(&value, garbage, sizeof(T));  // the product of what fills up the fractals
        }
        std::memcpy(to, &value, sizeof(T));
        std::memset(core.written(L0C, use_c.span.begin + element * sizeof(T)), is_used, sizeof(T));
      }
  };
  core.issue_after(more, M, at, std::array{use_a, use_b, use_c}, execute);
}

// C to global memory, as [m, n] or Nz.
template <typename T, typename U, const FixpipeConfig& config = CFG_ROW_MAJOR>
void Fixpipe(const GlobalTensor<T>& dst, const LocalTensor<U>& src, const FixpipeParamsV220& params,
             Site at = Site::here()) {
  twin::fixpipe(config.format, dst, src, nullptr, params, at);
}

// With a scale for each column, in L1.
template <typename T, typename U, const FixpipeConfig& config = CFG_ROW_MAJOR>
void Fixpipe(const GlobalTensor<T>& dst, const LocalTensor<U>& src, const LocalTensor<uint64_t>& scales,
             const FixpipeParamsV220& params, Site at = Site::here()) {
  twin::fixpipe(config.format, dst, src, &scales, params, at);
}

}  // namespace AscendC
