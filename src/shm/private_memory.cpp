#include "private_memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <utility>
#include <vector>

#include "error.h"
#include "host_memory.h"
#include "idle.h"
#include "per_process.h"
#include "window_layout.h"

namespace deep_ep {
namespace {

uint64_t page_bytes() {
  static const uint64_t bytes = sysconf(_SC_PAGESIZE);
  return bytes;
}

struct Mapping {
  std::byte* memory;
  uint64_t bytes;
  bool huge;         // in huge pages, where there are some
  unsigned age = 0;  // sweeps since it was given back
};

// Mappings that are not in use. To map memory anew and to touch it for the first time takes longer than to write it.
// What is in use and what is not has, together, no more bytes than were in use at once not long ago; or twice as many,
// where little of a mapping is touched: then calls of two kinds can have one each.
class Spare {
 public:
  explicit Spare(bool is_dense) : allowance_(is_dense ? 1 : 2) {}

  // Of at least `bytes`, a multiple of pages; without memory if it is new.
  Mapping take(uint64_t bytes, bool huge) {
    std::vector<Mapping> dropped;
    Mapping taken{nullptr, bytes, huge};
    {
      std::lock_guard lock(mutex_);
      // The smallest one, if it is not much too large; of equal ones the newest, which may be in the caches.
      auto best = spare_.end();
      for (auto at = spare_.begin(); at != spare_.end(); ++at)
        if (at->bytes >= bytes && at->bytes - bytes <= bytes / kSlack)
          if (best == spare_.end() || at->bytes <= best->bytes) best = at;
      if (best != spare_.end()) {
        taken = *best;
        spare_bytes_ -= best->bytes;
        spare_.erase(best);
      }
      used_ += taken.bytes;
      peak_ = std::max(peak_, used_);
      shrink(dropped);
    }
    unmap(dropped);
    if (taken.memory != nullptr) return taken;
    try {
      require(bytes);
      taken.memory = map(bytes);
    } catch (...) {
      std::lock_guard lock(mutex_);
      used_ -= bytes;
      throw;
    }
    // If that fails pages are small.
    if (huge) madvise(taken.memory, bytes, MADV_HUGEPAGE);
    return taken;
  }

  void give_back(Mapping mapping) {
    std::vector<Mapping> dropped;
    bool first;
    {
      std::lock_guard lock(mutex_);
      used_ -= mapping.bytes;
      mapping.age = 0;
      spare_.push_back(mapping);
      spare_bytes_ += mapping.bytes;
      first = !std::exchange(watched_, true);
      shrink(dropped);
    }
    unmap(dropped);
    if (first) sweep_when_idle([huge = mapping.huge] { return of(huge).sweep(); });
  }

  // Those in huge pages, which are written from end to end, and the others.
  static Spare& of(bool huge);

  uint64_t bytes() {
    std::lock_guard lock(mutex_);
    return spare_bytes_;
  }

 private:
  static constexpr uint64_t kSlack = 4;  // a mapping may be larger than what is asked for by one part in as many
  static constexpr unsigned kOld = 2;    // sweeps

  // Memory is taken where it is touched, and who takes more than its cgroup has is killed.
  static void require(uint64_t bytes) {
    constexpr uint64_t kMuch = 64 << 20;
    if (bytes < kMuch) return;
    const std::optional<Memory> cgroup = host_memory().cgroup;
    if (cgroup && bytes > cgroup->available)
      throw Error(str("cannot allocate ", bytes, " bytes: ", cgroup->owner, " has only ", cgroup->available,
                      " bytes available"));
  }

  static std::byte* map(uint64_t bytes) {
    void* const made = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (made == MAP_FAILED) throw Error(str("cannot allocate ", bytes, " bytes: ", std::strerror(errno)));
    return static_cast<std::byte*>(made);
  }

  // Where addresses cannot be given back, since the process may have no more mappings than it has, memory can.
  static void unmap(const std::vector<Mapping>& mappings) {
    for (const Mapping& mapping : mappings)
      if (munmap(mapping.memory, mapping.bytes) != 0) madvise(mapping.memory, mapping.bytes, MADV_DONTNEED);
  }

  // The oldest ones go.
  void shrink(std::vector<Mapping>& dropped) {
    auto end = spare_.begin();
    for (; end != spare_.end() && used_ + spare_bytes_ > allowance_ * std::max(peak_, peak_before_); ++end)
      spare_bytes_ -= end->bytes;
    move_out(end, dropped);
  }

  void move_out(std::vector<Mapping>::iterator end, std::vector<Mapping>& dropped) {
    dropped.insert(dropped.end(), spare_.begin(), end);
    spare_.erase(spare_.begin(), end);
  }

  bool sweep() {
    std::vector<Mapping> dropped;
    bool more;
    {
      std::lock_guard lock(mutex_);
      peak_before_ = std::exchange(peak_, used_);
      auto end = spare_.begin();
      for (auto at = spare_.begin(); at != spare_.end(); ++at)
        if (++at->age >= kOld) {
          spare_bytes_ -= at->bytes;
          end = at + 1;
        }
      move_out(end, dropped);
      shrink(dropped);
      more = watched_ = !spare_.empty();
    }
    unmap(dropped);
    return more;
  }

  const uint64_t allowance_;
  std::mutex mutex_;
  std::vector<Mapping> spare_;  // in the order in which they were given back
  uint64_t spare_bytes_ = 0, used_ = 0;
  uint64_t peak_ = 0;         // of used_ since the last sweep
  uint64_t peak_before_ = 0;  // between the one before and that
  bool watched_ = false;
};

struct Spares {
  Spare dense{true}, sparse{false};
};

Spare& Spare::of(bool huge) {
  Spares& spares = PerProcess<Spares>::get();
  return huge ? spares.dense : spares.sparse;
}

// The mapping, which goes back when the pointer dies.
std::shared_ptr<std::byte> held(const Mapping& mapping) {
  return {mapping.memory, [mapping](std::byte*) { Spare::of(mapping.huge).give_back(mapping); }};
}

}  // namespace

std::shared_ptr<std::byte> private_memory(uint64_t bytes) {
  if (bytes < kHugePage) {
    auto* const memory = static_cast<std::byte*>(std::aligned_alloc(64, std::max<uint64_t>(round_up(bytes, 64), 64)));
    if (memory == nullptr) throw Error(str("cannot allocate ", bytes, " bytes"));
    return {memory, [](std::byte* memory) { std::free(memory); }};
  }
  return held(Spare::of(true).take(round_up(bytes, kHugePage), true));
}

std::shared_ptr<std::byte> pages(uint64_t bytes) {
  return held(Spare::of(false).take(round_up(std::max<uint64_t>(bytes, 1), page_bytes()), false));
}

void clear_but(std::byte* memory, uint64_t bytes, const std::vector<Part>& written) {
  // Pages are taken away, and come back as zeros. Those that the process has locked stay, and are written.
  const auto clear = [&](uint64_t begin, uint64_t end) {
    const uint64_t first = round_up(begin, page_bytes());
    const uint64_t last = end == bytes ? round_up(end, page_bytes()) : end / page_bytes() * page_bytes();
    if (first >= last || madvise(memory + first, last - first, MADV_DONTNEED) != 0) {
      std::memset(memory + begin, 0, end - begin);
      return;
    }
    std::memset(memory + begin, 0, first - begin);
    if (last < end) std::memset(memory + last, 0, end - last);
  };
  uint64_t at = 0;
  for (const Part& part : written) {
    if (at < part.begin) clear(at, part.begin);
    at = part.end;
  }
  if (at < bytes) clear(at, bytes);
}

std::shared_ptr<std::byte> zeros_behind(uint64_t used, uint64_t bytes) {
  std::shared_ptr<std::byte> memory = pages(bytes);
  clear_but(memory.get(), bytes, {{0, used}});
  return memory;
}

uint64_t spare_private_memory() { return Spare::of(true).bytes() + Spare::of(false).bytes(); }

bool can_map(uint64_t bytes) {
  void* const made = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return made != MAP_FAILED && munmap(made, bytes) == 0;
}

}  // namespace deep_ep
