// Virtual time, and who waits for whom.
//
// Time stands still while a core of the group can go on. It passes when all of them wait, in steps that double, so that
// any deadline comes after some dozens of them. A core waits
//
// - in SyncAll, or
// - if between two looks at the clock it has written nothing and has read where it read between the two before. Time
//   then passes once all cores that wait in this way have looked again, each of them since the last one began to wait.
//   So none is late although what it waits for is there.
//
// A rank that has no launch under way is known by its process. One that has left the group, or whose process has ended,
// comes no more: nobody waits for it. As long as a thread of the process runs, or waits for a CPU or a disk, the rank
// is on its way, and time stands still. While all its threads sleep, it may wait for those who wait for it: a look at
// it then counts as kLook, and there is one in as many naps of a poller as take about so long.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <cstdint>

#include "twin.h"

namespace twin {

// A process, as another one knows it.
struct Process {
  pid_t id;
  uint64_t started;  // in the system's ticks: another process may get the same id

  static Process own();
  bool has_ended() const;
  bool sleeps() const;  // all its threads
};

// What a core is doing: nothing, since there is none; it goes on; it is in SyncAll; or the last round in which it has
// waited.
enum CoreState : uint64_t { kNoCore, kGoesOn, kMeets, kFirstRound };

// A rank, in shared memory that starts as zeros.
struct Presence {
  static constexpr int kMostCores = 256;  // of all launches under way

  std::atomic<pid_t> process;
  std::atomic<uint64_t> started;
  std::atomic<uint32_t> gone;  // no launch comes any more
  std::atomic<uint32_t> launches;
  std::atomic<uint64_t> cores[kMostCores];

  Process of() const { return {process.load(), started.load()}; }
};

// The ranks of a group, out of the sight of one of them.
class Ranks {
 public:
  explicit Ranks(const Group& group) : group_(group) {}

  void begin_launch();
  void end_launch();
  // A place for a core of this rank, which goes on. std::runtime_error: there is none left.
  std::atomic<uint64_t>* take_place();
  // Somebody who went on does so no longer: what it has done may be what others wait for.
  void begin_round();
  uint64_t round() const { return group_.shared->round.load(); }
  uint64_t microseconds() const { return group_.shared->microseconds.load(); }
  // Lets time pass if all have waited in this round.
  void pass(uint64_t round);
  // Looks at the processes: finds out who is gone and, if all others have waited in this round, lets time pass while
  // the rest sleeps.
  void look(uint64_t round);
  bool is_first_to_wait(const std::atomic<uint64_t>* place) const;  // of this rank's cores
  bool has_ended(int rank) const;

 private:
  enum class Waiting { not_all, cores, all };  // cores: all of them, and there are ranks without a launch
  Waiting waiting(uint64_t round) const;

  const Group group_;
};

// A core's part in this.
class Place {
 public:
  explicit Place(Ranks& ranks) : ranks_(ranks), state_(ranks.take_place()) {}
  ~Place() { ends(); }
  Place(const Place&) = delete;
  Place& operator=(const Place&) = delete;

  void goes_on() {
    if (waits_) set(kGoesOn);
  }
  // In SyncAll, where another core of the launch calls `meets_no_more`.
  void meets();
  void meets_no_more() { set(kGoesOn); }
  void ends();
  // The core has found nothing new since the last call.
  void waits();
  // And has slept for a while, so as not to take a CPU from those who go on.
  void sleeps();

 private:
  void set(CoreState state) {
    waits_ = false;
    if (state_ != nullptr) state_->store(state);
    std::atomic_thread_fence(std::memory_order_seq_cst);  // before what it does now
  }

  Ranks& ranks_;
  std::atomic<uint64_t>* state_;  // nullptr: it has ended, and another core may have the place
  bool waits_ = false;
  uint64_t round_ = 0;  // in which it looks at what it waits for
  uint32_t naps_ = 0;
};

}  // namespace twin
