// The words of kernels, GlobalTensor and LocalTensor.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../../core.h"
#include "numbers.h"

#define __aicore__
#define __global__
#define __gm__
#define __ubuf__
#define __inline__ inline
#define GM_ADDR __gm__ uint8_t*
#define KERNEL_TASK_TYPE_DEFAULT(type) twin::Core::current().set_kernel_type(type, twin::Site::here())
#define KERNEL_TASK_TYPE(key, type) KERNEL_TASK_TYPE_DEFAULT(type)
#define REGISTER_TILING_DEFAULT(type) static_assert(sizeof(type) > 0)
#define GET_TILING_DATA_WITH_STRUCT(type, name, address) const type name = *reinterpret_cast<const type*>(address)
// What ORIG_DTYPE_<NAME> and FORMAT_<NAME> are, of definitions as far as the library has them.
#define DT_FLOAT 0
#define DT_FLOAT16 1
#define DT_INT8 2
#define DT_INT32 3
#define DT_INT64 9
#define DT_BF16 27
#define FORMAT_ND 2
#define ASCEND_IS_AIV (!twin::Core::current().is_cube())
#define ASCEND_IS_AIC (twin::Core::current().is_cube())

enum pipe_t { PIPE_S, PIPE_V, PIPE_M, PIPE_MTE1, PIPE_MTE2, PIPE_MTE3, PIPE_ALL, PIPE_FIX = 10 };
enum event_t { EVENT_ID0, EVENT_ID1, EVENT_ID2, EVENT_ID3, EVENT_ID4, EVENT_ID5, EVENT_ID6, EVENT_ID7 };

namespace AscendC {

using twin::Core;
using twin::Site;

constexpr uint32_t ONE_BLK_SIZE = 32;
constexpr uint32_t ONE_REPEAT_BYTE_SIZE = 256;

enum class TPosition : uint8_t { GM, A1, A2, B1, B2, C1, CO1, VECIN, VECOUT, VECCALC };
using QuePosition = TPosition;

constexpr twin::SpaceId space_of(TPosition position) {
  switch (position) {
    case TPosition::A1:
    case TPosition::B1:
    case TPosition::C1:
      return twin::L1;
    case TPosition::A2:
      return twin::L0A;
    case TPosition::B2:
      return twin::L0B;
    case TPosition::CO1:
      return twin::L0C;
    default:
      return twin::UB;
  }
}

template <typename T>
class LocalTensor;

// A scalar in the unified buffer or in global memory, for operator(), which can be read and assigned.
template <typename Tensor, typename T>
class Element {
 public:
  Element(const Tensor& tensor, uint64_t index, Site at) : tensor_(tensor), index_(index), at_(at) {}
  operator T() const { return tensor_.GetValue(index_, at_); }
  const Element& operator=(T value) const {
    tensor_.SetValue(index_, value, at_);
    return *this;
  }
  const Element& operator=(const Element& other) const { return *this = static_cast<T>(other); }

 private:
  Tensor tensor_;
  uint64_t index_;
  Site at_;
};

// A tensor in a memory of the core: `offset` in bytes.
template <typename T>
class LocalTensor {
 public:
  using PrimType = T;
  LocalTensor() = default;
  LocalTensor(TPosition position, uint32_t address, uint32_t size)
      : LocalTensor(address, size, UINT32_MAX, nullptr, space_of(position)) {}
  LocalTensor(uint32_t offset, uint32_t size, uint32_t limit, twin::Buffer* buffer, twin::SpaceId space = twin::UB)
      : offset_(offset), size_(size), limit_(limit), buffer_(buffer), space_(space) {}

  T GetValue(uint32_t index, Site at = Site::here()) const {
    const twin::Span where = span(index, 1);
    Core& core = Core::current();
    core.scalar(where, false, at);
    T value;
    std::memcpy(&value, core.memory(where.space, where.begin), sizeof(T));
    return value;
  }
  template <typename U>
  void SetValue(uint32_t index, U value, Site at = Site::here()) const {
    const twin::Span where = span(index, 1);
    Core& core = Core::current();
    core.scalar(where, true, at);
    const T converted = static_cast<T>(value);
    std::memcpy(core.memory(where.space, where.begin), &converted, sizeof(T));
  }
  Element<LocalTensor, T> operator()(uint32_t index, Site at = Site::here()) const { return {*this, index, at}; }
  LocalTensor operator[](uint32_t index) const {
    LocalTensor part(*this);
    part.offset_ += index * sizeof(T);
    part.size_ -= std::min(size_, index);
    return part;
  }
  template <typename U>
  LocalTensor<U> ReinterpretCast() const {
    return {offset_, static_cast<uint32_t>(size_ * sizeof(T) / sizeof(U)), limit_, buffer_, space_};
  }
  uint32_t GetSize() const { return size_; }
  void SetSize(uint32_t size) { size_ = size; }
  uint64_t GetPhyAddr() const { return offset_; }
  uint64_t GetPhyAddr(uint32_t index) const { return offset_ + index * sizeof(T); }

  // For the twin.
  twin::Span span(uint64_t index, uint64_t count) const {
    const uint64_t begin = offset_ + index * sizeof(T), bytes = count * sizeof(T);
    return {static_cast<uint32_t>(std::min<uint64_t>(begin, UINT32_MAX)),
            static_cast<uint32_t>(std::min<uint64_t>(bytes, UINT32_MAX)), limit_, space_};
  }
  T* data() const { return reinterpret_cast<T*>(Core::current().memory(space_, offset_)); }
  twin::Buffer* buffer() const { return buffer_; }

 private:
  uint32_t offset_ = 0, size_ = 0;
  uint32_t limit_ = 0;  // end of the buffer
  twin::Buffer* buffer_ = nullptr;
  twin::SpaceId space_ = twin::UB;
};

// A tensor in global memory.
template <typename T>
class GlobalTensor {
 public:
  using PrimType = T;
  void SetGlobalBuffer(T* buffer, uint64_t size = 0) {
    address_ = buffer;
    size_ = size;
  }
  const T* GetPhyAddr() const { return address_; }
  T* GetPhyAddr(uint64_t index) const { return address_ + index; }
  T GetValue(uint64_t index, Site at = Site::here()) const {
    T value;
    Core::current().load(address_ + index, &value, sizeof(T), at);
    return value;
  }
  void SetValue(uint64_t index, T value, Site at = Site::here()) const {
    Core::current().store(address_ + index, &value, sizeof(T), at);
  }
  Element<GlobalTensor, T> operator()(uint64_t index, Site at = Site::here()) const { return {*this, index, at}; }
  GlobalTensor operator[](uint64_t index) const {
    GlobalTensor part(*this);
    part.address_ += index;
    part.size_ -= std::min(size_, index);
    return part;
  }
  uint64_t GetSize() const { return size_; }

 private:
  T* address_ = nullptr;
  uint64_t size_ = 0;
};

}  // namespace AscendC
