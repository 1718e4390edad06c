// Transfers between global memory and the unified buffer, by MTE2 and MTE3, and into L1; and atomics of MTE3.
#pragma once

#include "sync.h"
#include "tensor.h"

namespace AscendC {

// In units of 32 bytes.
struct DataCopyParams {
  DataCopyParams() = default;
  DataCopyParams(uint16_t count, uint16_t length, uint16_t source, uint16_t destination)
      : blockCount(count), blockLen(length), srcStride(source), dstStride(destination) {}
  uint16_t blockCount = 1;
  uint16_t blockLen = 0;
  union {
    uint16_t srcStride = 0;
    uint16_t srcGap;
  };
  union {
    uint16_t dstStride = 0;
    uint16_t dstGap;
  };
};

// blockLen and the stride in global memory in bytes, that in the unified buffer in units of 32 bytes. Strides are from
// the end of a block to the begin of the next.
struct DataCopyExtParams {
  DataCopyExtParams() = default;
  DataCopyExtParams(uint16_t count, uint32_t length, uint32_t source, uint32_t destination, uint32_t reserved)
      : blockCount(count), blockLen(length), srcStride(source), dstStride(destination), rsv(reserved) {}
  uint16_t blockCount = 1;
  uint32_t blockLen = 0;
  uint32_t srcStride = 0;
  uint32_t dstStride = 0;
  uint32_t rsv = 0;
};

template <typename T>
struct DataCopyPadExtParams {
  DataCopyPadExtParams() = default;
  DataCopyPadExtParams(bool pad, uint8_t left, uint8_t right, T value)
      : isPad(pad), leftPadding(left), rightPadding(right), paddingValue(value) {}
  bool isPad = false;
  uint8_t leftPadding = 0;
  uint8_t rightPadding = 0;
  T paddingValue{};
};

}  // namespace AscendC

namespace twin {

// Blocks of a transfer: `length` bytes each, strides from begin to begin, in bytes.
struct Blocks {
  uint32_t count;
  uint64_t length;
  uint64_t global_stride, ub_stride;
};

inline void check_counts(uint32_t count, uint64_t length, uint64_t limit, Site at, Pipe pipe) {
  if (count > 4095) Core::current().fail(at, pipe, "blockCount is " + std::to_string(count) + ", at most 4095");
  if (length > limit)
    Core::current().fail(at, pipe, "blockLen is " + std::to_string(length) + ", at most " + std::to_string(limit));
}

template <typename T>
void transfer(const AscendC::LocalTensor<T>& local, const AscendC::GlobalTensor<T>& global, const Blocks& blocks,
              Pipe pipe, Site at) {
  Core& core = Core::current();
  const Span first = local.span(0, 0);
  if (first.space != UB && (pipe != MTE2 || first.space != L1))
    core.fail(at, pipe, std::string("has no way between global memory and ") + kSpaceNames[first.space]);
  auto* gm = reinterpret_cast<uint8_t*>(global.GetPhyAddr(0));
  auto& segments = core.segments();
  segments.clear();
  if (blocks.count == 0 || blocks.length == 0) return;  // documented as no operation
  for (uint32_t i = 0; i < blocks.count; ++i, gm += blocks.global_stride) {
    const uint64_t begin = first.begin + i * blocks.ub_stride;
    core.check_span({static_cast<uint32_t>(std::min<uint64_t>(begin, UINT32_MAX)), static_cast<uint32_t>(blocks.length),
                     first.limit, first.space},
                    i == 0 ? kBlock : 1, at, pipe);
    Memory* memory = core.memory_of(gm, blocks.length, pipe == MTE3, at, pipe);
    segments.push_back({gm, memory, static_cast<uint32_t>(begin), static_cast<uint32_t>(blocks.length)});
    segments.back().space = first.space;
  }
}

inline Blocks blocks_of(const AscendC::DataCopyParams& params, bool in) {
  const uint64_t length = params.blockLen * uint64_t{kBlock};
  const uint64_t source = length + params.srcStride * kBlock, destination = length + params.dstStride * kBlock;
  return {params.blockCount, length, in ? source : destination, in ? destination : source};
}

template <typename T>
void check_global(const AscendC::GlobalTensor<T>& global, Pipe pipe, Site at) {
  if (reinterpret_cast<uintptr_t>(global.GetPhyAddr()) % sizeof(T) != 0)
    Core::current().fail(at, pipe, "the address in global memory is not aligned to the element's size");
}

// AscendC copies a count that is no multiple of 32 bytes rounded down, which no kernel means.
template <typename T>
Blocks blocks_of(uint64_t count, Site at, Pipe pipe) {
  const uint64_t bytes = count * sizeof(T);
  if (bytes % kBlock != 0)
    Core::current().fail(at, pipe, std::to_string(bytes) + " bytes are no multiple of 32; DataCopyPad copies such");
  return {1, bytes, bytes, bytes};
}

}  // namespace twin

namespace AscendC {

template <typename T>
void DataCopy(const LocalTensor<T>& dst, const GlobalTensor<T>& src, const DataCopyParams& params,
              Site at = Site::here()) {
  twin::check_counts(params.blockCount, params.blockLen, 65535, at, twin::MTE2);
  twin::check_global(src, twin::MTE2, at);
  twin::transfer(dst, src, twin::blocks_of(params, true), twin::MTE2, at);
  Core::current().transfer(twin::MTE2, at);
}

template <typename T>
void DataCopy(const GlobalTensor<T>& dst, const LocalTensor<T>& src, const DataCopyParams& params,
              Site at = Site::here()) {
  twin::check_counts(params.blockCount, params.blockLen, 65535, at, twin::MTE3);
  twin::check_global(dst, twin::MTE3, at);
  twin::transfer(src, dst, twin::blocks_of(params, false), twin::MTE3, at);
  Core::current().transfer(twin::MTE3, at);
}

template <typename T>
void DataCopy(const LocalTensor<T>& dst, const GlobalTensor<T>& src, uint32_t count, Site at = Site::here()) {
  twin::check_global(src, twin::MTE2, at);
  twin::transfer(dst, src, twin::blocks_of<T>(count, at, twin::MTE2), twin::MTE2, at);
  Core::current().transfer(twin::MTE2, at);
}

template <typename T>
void DataCopy(const GlobalTensor<T>& dst, const LocalTensor<T>& src, uint32_t count, Site at = Site::here()) {
  twin::check_global(dst, twin::MTE3, at);
  twin::transfer(src, dst, twin::blocks_of<T>(count, at, twin::MTE3), twin::MTE3, at);
  Core::current().transfer(twin::MTE3, at);
}

// Within the unified buffer: an instruction of V.
template <typename T>
void DataCopy(const LocalTensor<T>& dst, const LocalTensor<T>& src, uint32_t count, Site at = Site::here()) {
  twin::blocks_of<T>(count, at, twin::V);
  Core::current().issue(twin::V, at, {{src.span(0, count), false}, {dst.span(0, count), true}},
                        [to = dst.data(), from = src.data(), count] { std::memmove(to, from, count * sizeof(T)); });
}

template <typename T>
void DataCopy(const LocalTensor<T>& dst, const LocalTensor<T>& src, const DataCopyParams& params,
              Site at = Site::here()) {
  constexpr uint32_t kElements = twin::kBlock / sizeof(T);
  twin::check_counts(params.blockCount, params.blockLen, 65535, at, twin::V);
  for (uint32_t i = 0; i < params.blockCount; ++i)
    DataCopy(dst[i * (params.blockLen + params.dstGap) * kElements],
             src[i * (params.blockLen + params.srcGap) * kElements], params.blockLen * kElements, at);
}

// A block in the unified buffer is [ left padding | data | right padding | up to a multiple of 32 bytes ].
template <typename T>
void DataCopyPad(const LocalTensor<T>& dst, const GlobalTensor<T>& src, const DataCopyExtParams& params,
                 const DataCopyPadExtParams<T>& pad, Site at = Site::here()) {
  using twin::Segment;
  constexpr auto kPipe = twin::MTE2;
  Core& core = Core::current();
  const uint64_t left = pad.leftPadding * sizeof(T), right = pad.rightPadding * sizeof(T);
  const uint64_t used = left + params.blockLen + right;
  const uint64_t padded = (used + twin::kBlock - 1) / twin::kBlock * twin::kBlock;
  twin::check_counts(params.blockCount, params.blockLen, 2097151, at, kPipe);
  twin::check_global(src, kPipe, at);
  if (params.blockLen % sizeof(T) != 0) core.fail(at, kPipe, "blockLen is no multiple of the element's size");
  if (left > 32 || right > 32) core.fail(at, kPipe, "leftPadding and rightPadding are at most 32 bytes each");
  if constexpr (sizeof(T) == 8)
    if (pad.isPad && pad.paddingValue != T{}) core.fail(at, kPipe, "paddingValue of a type of 64 bits is 0");
  twin::transfer(dst, src,
                 {params.blockCount, params.blockLen, uint64_t{params.blockLen} + params.srcStride,
                  padded + params.dstStride * uint64_t{twin::kBlock}},
                 kPipe, at);
  auto& segments = core.segments();
  const size_t blocks = segments.size();
  for (size_t i = 0; i < blocks; ++i) {
    const uint32_t begin = segments[i].ub;
    core.check_span({begin, static_cast<uint32_t>(padded), dst.span(0, 0).limit, segments[i].space}, 1, at, kPipe);
    segments[i].ub += left;
    // Documented: with isPad its value; without it, and without padding, the block's first element; else garbage.
    Segment rest{segments[i].gm, segments[i].memory, 0, 0, Segment::garbage, sizeof(T), 0, segments[i].space};
    if (pad.isPad) rest.source = Segment::value;
    if (pad.isPad) std::memcpy(&rest.pad, &pad.paddingValue, sizeof(T));
    if (!pad.isPad && left + right == 0) rest.source = Segment::repeat;
    const uint32_t tail = begin + left + params.blockLen;
    for (const auto& [at_ub, bytes] : {std::pair{begin, left}, std::pair{tail, padded - left - params.blockLen}}) {
      if (bytes == 0) continue;
      rest.ub = at_ub;
      rest.bytes = static_cast<uint32_t>(bytes);
      segments.push_back(rest);
    }
  }
  core.transfer(kPipe, at);
}

template <typename T>
void DataCopyPad(const GlobalTensor<T>& dst, const LocalTensor<T>& src, const DataCopyExtParams& params,
                 Site at = Site::here()) {
  twin::check_counts(params.blockCount, params.blockLen, 2097151, at, twin::MTE3);
  twin::check_global(dst, twin::MTE3, at);
  if (params.blockLen % sizeof(T) != 0)
    Core::current().fail(at, twin::MTE3, "blockLen is no multiple of the element's size");
  const uint64_t padded = (uint64_t{params.blockLen} + twin::kBlock - 1) / twin::kBlock * twin::kBlock;
  twin::transfer(src, dst,
                 {params.blockCount, params.blockLen, uint64_t{params.blockLen} + params.dstStride,
                  padded + params.srcStride * uint64_t{twin::kBlock}},
                 twin::MTE3, at);
  Core::current().transfer(twin::MTE3, at);
}

}  // namespace AscendC

namespace twin {

enum class AtomicKind { add, max, min };

// On memory that other cores and ranks change too (rule 7).
template <typename T, AtomicKind kind>
void atomic_apply(uint8_t* to, const uint8_t* from, uint32_t bytes) {
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, std::conditional_t<sizeof(T) == 2, uint16_t, uint8_t>>;
  for (uint32_t i = 0; i < bytes / sizeof(T); ++i) {
    T value;
    std::memcpy(&value, from + i * sizeof(T), sizeof(T));
    Bits* const target = reinterpret_cast<Bits*>(to) + i;
    Bits old = __atomic_load_n(target, __ATOMIC_SEQ_CST);
    T sum;
    do {
      using Wide = std::conditional_t<is_floating<T>, float, int64_t>;
      const Wide a = static_cast<Wide>(bit_cast<T>(old)), b = static_cast<Wide>(value);
      sum = static_cast<T>(kind == AtomicKind::add ? a + b : kind == AtomicKind::max ? std::max(a, b) : std::min(a, b));
    } while (!__atomic_compare_exchange_n(target, &old, bit_cast<Bits>(sum), true, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST));
  }
}

template <typename T, AtomicKind kind>
void set_atomic(Site at) {
  static_assert(one_of<T, float, half, bfloat16_t, int8_t, int16_t, int32_t>, "no atomics on this type");
  Core::current().set_atomic(&atomic_apply<T, kind>, sizeof(T), at);
}

}  // namespace twin

namespace AscendC {

template <typename T>
void SetAtomicAdd(Site at = Site::here()) {
  twin::set_atomic<T, twin::AtomicKind::add>(at);
}
template <typename T>
void SetAtomicMax(Site at = Site::here()) {
  twin::set_atomic<T, twin::AtomicKind::max>(at);
}
template <typename T>
void SetAtomicMin(Site at = Site::here()) {
  twin::set_atomic<T, twin::AtomicKind::min>(at);
}
inline void SetAtomicNone(Site at = Site::here()) { Core::current().set_atomic(nullptr, 1, at); }

}  // namespace AscendC
