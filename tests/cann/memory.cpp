// Allocations with their bounds, and what copies and fills memory.
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <map>

#include "memory.h"
#include "stream.h"

namespace cann {
namespace {

constexpr size_t kBytesOfDevice = size_t{64} << 30;
constexpr size_t kAlignment = 512;
constexpr int kPoison = 0xA5;
constexpr int kHost = -1;

struct Allocation {
  size_t bytes;
  int device;  // kHost: pinned memory of the host
};

struct State {
  std::mutex mutex;
  std::map<char*, Allocation> allocations;  // by address

  // Called with the mutex held: the allocation around an address, or end().
  auto around(const void* address) {
    auto* const place = static_cast<char*>(const_cast<void*>(address));
    const auto next = allocations.upper_bound(place);
    const auto last = next == allocations.begin() ? allocations.end() : std::prev(next);
    return last != allocations.end() && place < last->first + last->second.bytes ? last : allocations.end();
  }
};

auto& state = *new State;

size_t free_bytes(int device) {
  size_t bytes = kBytesOfDevice;
  for (const auto& [address, allocation] : state.allocations) {
    bytes -= allocation.device == device ? allocation.bytes : 0;
  }
  return bytes;
}

void allocate(void** address, size_t bytes, int device) {
  const std::lock_guard lock(state.mutex);
  if (bytes == 0) {
    throw Error{ACL_ERROR_INVALID_PARAM, "0 bytes"};
  }
  if (bytes > free_bytes(device) || posix_memalign(address, kAlignment, bytes) != 0) {
    throw Error{ACL_ERROR_RT_MEMORY_ALLOCATION, "out of memory"};
  }
  std::memset(*address, kPoison, bytes);
  state.allocations[static_cast<char*>(*address)] = {bytes, device};
}

void release(void* address, bool is_host) {
  const std::lock_guard lock(state.mutex);
  const auto found = state.allocations.find(static_cast<char*>(address));
  if (found == state.allocations.end() || (found->second.device == kHost) != is_host) {
    throw Error{ACL_ERROR_INVALID_PARAM, "this is not allocated, or not any more"};
  }
  state.allocations.erase(found);
  std::free(address);
}

}  // namespace

void check_range(const void* address, size_t bytes, bool is_device) {
  if (bytes == 0) return;  // a tensor without elements may lie anywhere
  const std::lock_guard lock(state.mutex);
  const auto found = state.around(address);
  const bool is_known = found != state.allocations.end();
  if (is_known ? static_cast<const char*>(address) + bytes > found->first + found->second.bytes : is_device) {
    throw Error{ACL_ERROR_RT_PARAM_INVALID, std::to_string(bytes) + " bytes do not lie in one live allocation"};
  }
}

namespace {

bool is_pageable(const void* address) {
  const std::lock_guard lock(state.mutex);
  return state.around(address) == state.allocations.end();
}

void copy(void* to, const void* from, size_t bytes, aclrtMemcpyKind kind) {
  const bool between_devices = kind == ACL_MEMCPY_DEVICE_TO_DEVICE || kind == ACL_MEMCPY_INNER_DEVICE_TO_DEVICE ||
                               kind == ACL_MEMCPY_INTER_DEVICE_TO_DEVICE;
  check_range(to, bytes, between_devices || kind == ACL_MEMCPY_HOST_TO_DEVICE);
  check_range(from, bytes, between_devices || kind == ACL_MEMCPY_DEVICE_TO_HOST);
  std::memmove(to, from, bytes);
}

void fill(void* address, int value, size_t bytes) {
  check_range(address, bytes, true);
  std::memset(address, value, bytes);
}

void check_room(size_t room, size_t bytes) {
  if (bytes > room) {
    throw Error{ACL_ERROR_INVALID_PARAM, "more bytes than the destination has room for"};
  }
}

}  // namespace
}  // namespace cann

using namespace cann;

extern "C" {

aclError aclrtMalloc(void** address, size_t bytes, aclrtMemMallocPolicy) {
  note("malloc", 0, std::to_string(bytes));
  return call(__func__, [=] { allocate(address, bytes, current_device()); });
}

aclError aclrtMallocAlign32(void** address, size_t bytes, aclrtMemMallocPolicy policy) {
  return aclrtMalloc(address, bytes, policy);
}

aclError aclrtFree(void* address) {
  return call(__func__, [=] { release(address, false); });
}

aclError aclrtMallocHost(void** address, size_t bytes) {
  return call(__func__, [=] { allocate(address, bytes, kHost); });
}

aclError aclrtFreeHost(void* address) {
  return call(__func__, [=] { release(address, true); });
}

aclError aclrtGetMemInfo(aclrtMemAttr, size_t* free, size_t* total) {
  const std::lock_guard lock(state.mutex);
  *total = kBytesOfDevice;
  *free = free_bytes(current_device());
  return ACL_SUCCESS;
}

aclError aclrtMemcpy(void* to, size_t room, const void* from, size_t bytes, aclrtMemcpyKind kind) {
  note("sync", 0, __func__);
  return call(__func__, [=] {
    check_room(room, bytes);
    check_is_safe();
    copy(to, from, bytes, kind);
  });
}

aclError aclrtMemset(void* address, size_t room, int32_t value, size_t bytes) {
  note("sync", 0, __func__);
  return call(__func__, [=] {
    check_room(room, bytes);
    check_is_safe();
    fill(address, value, bytes);
  });
}

aclError aclrtMemcpyAsync(void* to, size_t room, const void* from, size_t bytes, aclrtMemcpyKind kind,
                          aclrtStream stream) {
  return call(__func__, [=] {
    check_room(room, bytes);
    const bool is_pinned = !is_pageable(kind == ACL_MEMCPY_DEVICE_TO_HOST ? to : from);
    const Task task{"aclrtMemcpyAsync", [=] { copy(to, from, bytes, kind); }};
    if (is_pinned) {
      launch(stream, task);
    } else {
      launch_and_wait(stream, task);
    }
  });
}

aclError aclrtMemsetAsync(void* address, size_t room, int32_t value, size_t bytes, aclrtStream stream) {
  return call(__func__, [=] {
    check_room(room, bytes);
    launch(stream, {"aclrtMemsetAsync", [=] { fill(address, value, bytes); }});
  });
}
}
