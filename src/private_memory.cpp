#include "private_memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

#include "error.h"
#include "per_process.h"
#include "window_layout.h"

namespace deep_ep {
namespace {

// Mappings that are not in use. To map memory anew and to touch it for the first time takes longer than to write it.
class Spare {
 public:
  std::byte* take(uint64_t bytes) {
    std::lock_guard lock(mutex_);
    const auto node = mappings_.extract(bytes);
    return node ? node.mapped() : nullptr;
  }

  void give_back(uint64_t bytes, std::byte* memory) {
    std::lock_guard lock(mutex_);
    mappings_.emplace(bytes, memory);
    if (mappings_.size() <= kMost) return;
    const auto largest = std::prev(mappings_.end());
    munmap(largest->second, largest->first);
    mappings_.erase(largest);
  }

 private:
  static constexpr size_t kMost = 8;

  std::mutex mutex_;
  std::multimap<uint64_t, std::byte*> mappings_;  // by their size
};

struct SparePages : Spare {};
struct SpareHugePages : Spare {};
Spare& spare_pages() { return PerProcess<SparePages>::get(); }
Spare& spare_huge_pages() { return PerProcess<SpareHugePages>::get(); }

std::byte* map(uint64_t bytes) {
  void* const made = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (made == MAP_FAILED) throw Error(str("cannot allocate ", bytes, " bytes: ", std::strerror(errno)));
  return static_cast<std::byte*>(made);
}

}  // namespace

std::shared_ptr<std::byte> private_memory(uint64_t bytes) {
  if (bytes < kHugePage) {
    auto* const memory = static_cast<std::byte*>(std::aligned_alloc(64, std::max<uint64_t>(round_up(bytes, 64), 64)));
    if (memory == nullptr) throw Error(str("cannot allocate ", bytes, " bytes"));
    return {memory, [](std::byte* memory) { std::free(memory); }};
  }
  const uint64_t size = round_up(bytes, kHugePage);
  std::byte* memory = spare_huge_pages().take(size);
  if (memory == nullptr) {
    memory = map(size);
    madvise(memory, size, MADV_HUGEPAGE);
  }
  return {memory, [size](std::byte* memory) { spare_huge_pages().give_back(size, memory); }};
}

std::shared_ptr<std::byte> zeros_behind(uint64_t used, uint64_t bytes) {
  const uint64_t size = std::max(round_up(bytes, kPage), kPage), touched = round_up(used, kPage);
  std::byte* memory = spare_pages().take(size);
  if (memory != nullptr) {
    std::memset(memory + used, 0, std::min(touched, size) - used);
    if (touched < size) madvise(memory + touched, size - touched, MADV_DONTNEED);
  } else {
    memory = map(size);
  }
  return {memory, [size](std::byte* memory) { spare_pages().give_back(size, memory); }};
}

}  // namespace deep_ep
