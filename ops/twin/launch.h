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

// A core that waits until another one of the launch releases it.
struct Waiter {
  Place& place;
  bool released = false;
};

// Cores wait here for each other.
struct Gate {
  int arrived = 0;
  Known joined;
  SharedKnown known;  // by the last generation
  std::vector<Waiter*> waiting;
};

// A CrossCoreSetFlag that has fired, or all of those that make one together: what is complete by then.
struct Arrival {
  SharedKnown known;
  int core;
  Site site;
};

// Of a core and an id: what CrossCoreWaitFlag takes.
struct CrossCounter {
  static constexpr size_t kMost = 15;
  int mode = 0;  // of what it has
  std::deque<Arrival> arrived;
  Waiter* waiting = nullptr;
};

// Cores whose flags of one id and mode make one together, for some cores.
struct CrossGroup {
  int mode, id;
  std::vector<int> setters, waiters;
  int waited_id;                           // under which the waiters wait for it
  std::vector<std::deque<Arrival>> fired;  // by setter, without the others' so far
};

class Launch {
 public:
  Launch(const Settings& settings, const Group& group, const std::string& kernel, const std::vector<Region>& regions);
  ~Launch();

  static constexpr int kAllMet = -1, kAllWait = -2;
  // Waits for cores 0..cores-1 to arrive, and adds what each of them knows to `known`. Returns kAllMet, or the number
  // of a core that has ended instead, or kAllWait: no core is left that could come.
  int meet(Gate& gate, int cores, Place& place, SharedKnown* known);
  // Rule 10. What is wrong with it, if anything is.
  std::string fire(int mode, int id, const Arrival& arrival);
  // Takes a flag that has fired; `block` waits for it. nullptr: there is none; none can come, if all cores wait.
  SharedKnown take(int core, int mode, int id, Place& place, bool block);
  void check_flags();  // at the end: there are none left
  Gate& gate_of(const void* workspace);
  void report(const std::string& violation);
  void end(Core& core);
  Memory* find(const void* address);  // the region that holds it, or nullptr
  int vector_cores() const { return settings.mix ? 2 * settings.cores : settings.cores; }
  int cores() const { return settings.mix ? 3 * settings.cores : settings.cores; }
  std::string name_of(int core) const;
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
  Gate hard_gate, mix_gate;

 private:
  static constexpr int kIds = 16, kIdsOfMode4 = 27;

  // Waits under the lock until it is released, `given_up` holds, or all cores wait.
  template <typename GivenUp>
  void wait(std::unique_lock<std::mutex>& lock, Waiter& waiter, GivenUp&& given_up);
  void release(Waiter& waiter);
  CrossCounter& counter_of(int core, int mode, int id) {
    return counters_[core * (kIds + kIdsOfMode4) + (mode == 4 ? kIds : 0) + id];
  }
  CrossGroup& group_of(int core, int mode, int id);

  std::vector<Memory> memories_;  // by address
  std::mutex mutex_;
  std::condition_variable changed_;
  std::map<const void*, Gate> soft_gates_;
  std::vector<bool> ended_;
  int live_, waiting_ = 0;  // cores
  std::vector<CrossCounter> counters_;
  std::map<std::array<int, 3>, CrossGroup> groups_;  // by mode, id and the first setter
  std::atomic<bool> stopped_{false};
  Report report_;
};

template <typename GivenUp>
void Launch::wait(std::unique_lock<std::mutex>& lock, Waiter& waiter, GivenUp&& given_up) {
  if (++waiting_ == live_) changed_.notify_all();
  waiter.place.meets();
  changed_.wait(lock, [&] { return waiter.released || stopped() || given_up() || waiting_ == live_; });
  if (waiter.released) return;
  --waiting_;
  if (stopped()) throw Stopped();
}

// Holds the lock of an aligned block of a window, so that no process sees half of a write to it (rule 8).
class BlockLock {
 public:
  BlockLock(const Launch& launch, const Memory* memory, const uint8_t* address);
  ~BlockLock();

 private:
  std::atomic<uint32_t>* lock_ = nullptr;
};

}  // namespace twin
