// What the cores of a launch share.
#pragma once

#include <condition_variable>
#include <map>
#include <mutex>

#include "core.h"
#include "waiting.h"

namespace twin {

struct Memory {
  Region region;
  size_t index;
  std::unique_ptr<uint8_t[]> written;  // by byte, of a region that is not initialised

  uint8_t* begin() const { return static_cast<uint8_t*>(region.base); }
  uint8_t* end() const { return begin() + region.bytes; }
  bool window() const { return region.rank >= 0; }
  std::string text(const void* address) const;
  void mark_written(const uint8_t* address, uint64_t bytes) {
    if (written) std::memset(&written[address - begin()], 1, bytes);
  }
};

// Accesses to global memory, by pages of Page::kBytes.
class GlobalAccesses {
 public:
  // Calls f(page) under the page's lock.
  template <typename F>
  void with_page(uint64_t number, F&& f) {
    Shard& shard = shards_[number % kShards];
    std::lock_guard lock(shard.mutex);
    f(shard.pages[number]);
  }

 private:
  static constexpr uint64_t kShards = 64;
  struct Shard {
    std::mutex mutex;
    std::unordered_map<uint64_t, Page> pages;
  };
  std::array<Shard, kShards> shards_;
};

// Cores wait here for each other.
struct Gate {
  int arrived = 0;
  uint64_t generation = 0;
  Known joined;
  std::shared_ptr<const Known> known;  // by the last generation
  std::vector<Place*> waiting;
};

class Launch {
 public:
  Launch(const Settings& settings, const Group& group, const std::string& kernel, const std::vector<Region>& regions);
  ~Launch();

  // Waits for cores 0..cores-1 to arrive, and adds what each of them knows to `known`. Returns the number of a core
  // that has ended instead, or -1.
  int meet(Gate& gate, int cores, Place& place, std::shared_ptr<const Known>* known);
  Gate& gate_of(const void* workspace);
  void report(const std::string& violation);
  void end(Core& core);
  Memory* find(const void* address);  // the region that holds it, or nullptr
  bool stopped() const {
    return stopped_.load(std::memory_order_relaxed) || group.shared->stopped.load(std::memory_order_relaxed);
  }
  Report take_report() {
    report_.stopped = stopped();
    return std::move(report_);
  }

  const Settings settings;
  const std::string kernel;
  const size_t num_regions;
  const Group group;
  Ranks ranks{group};
  std::deque<Place> places;  // by core
  GlobalAccesses accesses;
  Gate hard_gate;

 private:
  std::vector<Memory> memories_;  // by address
  std::mutex mutex_;
  std::condition_variable changed_;
  std::map<const void*, Gate> soft_gates_;
  std::vector<bool> ended_;
  std::atomic<bool> stopped_{false};
  Report report_;
};

// Holds the lock of an aligned block of a window, so that no process sees half of a write to it (rule 8).
class BlockLock {
 public:
  BlockLock(const Launch& launch, const Memory* memory, const uint8_t* address);
  ~BlockLock();

 private:
  std::atomic<uint32_t>* lock_ = nullptr;
};

}  // namespace twin
