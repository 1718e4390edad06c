#include "private_memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

#include "error.h"
#include "window_layout.h"

namespace deep_ep {
namespace {

// Mappings that are not in use, by their size.
struct Spare {
  static constexpr size_t kMost = 8;

  std::mutex mutex;
  std::multimap<uint64_t, std::byte*> mappings;
};

// Never destroyed: tensors may outlive static destruction.
Spare& spare() {
  static Spare& instance = *new Spare;
  return instance;
}

std::byte* take_spare(uint64_t bytes) {
  std::lock_guard lock(spare().mutex);
  const auto node = spare().mappings.extract(bytes);
  return node ? node.mapped() : nullptr;
}

void give_back(std::byte* memory, uint64_t bytes) {
  std::lock_guard lock(spare().mutex);
  auto& mappings = spare().mappings;
  mappings.emplace(bytes, memory);
  if (mappings.size() <= Spare::kMost) return;
  const auto largest = std::prev(mappings.end());
  munmap(largest->second, largest->first);
  mappings.erase(largest);
}

}  // namespace

std::shared_ptr<std::byte> private_memory(uint64_t bytes) {
  constexpr uint64_t kHuge = 2 << 20;
  const uint64_t unit = bytes < 4 * kHuge ? 64 : kHuge, size = std::max(round_up(bytes, unit), unit);
  auto* const memory = static_cast<std::byte*>(std::aligned_alloc(unit, size));
  if (memory == nullptr) throw Error(str("cannot allocate ", bytes, " bytes"));
  if (unit == kHuge) madvise(memory, size, MADV_HUGEPAGE);
  return {memory, [](std::byte* memory) { std::free(memory); }};
}

std::shared_ptr<std::byte> zeros_behind(uint64_t used, uint64_t bytes) {
  const uint64_t size = std::max(round_up(bytes, kPage), kPage), touched = round_up(used, kPage);
  std::byte* memory = take_spare(size);
  if (memory != nullptr) {
    std::memset(memory + used, 0, std::min(touched, size) - used);
    if (touched < size) madvise(memory + touched, size - touched, MADV_DONTNEED);
  } else {
    void* const made = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (made == MAP_FAILED) throw Error(str("cannot allocate ", bytes, " bytes: ", std::strerror(errno)));
    memory = static_cast<std::byte*>(made);
  }
  return {memory, [size](std::byte* memory) { give_back(memory, size); }};
}

}  // namespace deep_ep
