// The windows of a group of ranks, and whose turn it is to use them. How ranks communicate through them: operation.h.
//
// R ranks · T local tokens · H hidden · K top-k · E experts.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "device/op.h"
#include "own_window.h"
#include "phases.h"
#include "process.h"
#include "turns.h"
#include "window.h"
#include "window_layout.h"
#include "worker.h"

namespace deep_ep {

// An operation that has finished, for a trace. Times are nanoseconds of the steady clock.
struct Traced {
  Op op;
  int64_t begin;
  int64_t end;
  Nanoseconds spent;
  int64_t tokens, hidden, top_k, experts;
};

class Group {
 public:
  static constexpr uint64_t kMaxExperts = 1 << 15;

  // The window grows as operations need it, to `bytes` at most; 0: to the own share in half of the memory there is.
  Group(int rank, int size, uint64_t bytes, std::chrono::milliseconds timeout);
  ~Group();

  // Maps the windows of all ranks. Rank r is process pids[r] and holds its window of bytes[r] as descriptor fds[r].
  void connect(const int64_t* pids, const int64_t* fds, const uint64_t* bytes);

  int rank() const { return rank_; }
  int size() const { return size_; }
  uint64_t bytes() const { return bytes_; }
  int fd() const { return own_->window.fd(); }

  // From so many bytes on a rank looks, before it takes them, whether they are there.
  uint64_t much() const { return much_; }

  // Bytes of the own window that hold no rows now.
  uint64_t spare() const { return own_->pool.spare(); }

  // Runs what its callers do not wait for.
  Worker& worker() { return worker_; }

  // Whether results of calls that go on are to look like none until they have come. For debugging.
  bool spoils() const { return spoils_; }
  void set_spoils() { spoils_ = true; }

  // A block of the pool for an operation that is to come, given back when its memory dies; nothing if there is none
  // of as many bytes.
  std::optional<PoolMemory> reserve(uint64_t bytes) const;

  // Until the operations that have been issued have ended, or for so long. False: they have not.
  bool join(std::chrono::milliseconds time) {
    worker_.hurry();
    return turns_.end_within(time);
  }

  // False once an operation has failed in its middle: no further one can work.
  bool usable() const { return control(rank_).state.load() == State::open; }

  // Call while the caller of `op` waits, every kHealthMilliseconds (interrupt.h). If it is interrupted the group is
  // given up, which ends what the thread of the group waits for, too, and peers hear of it.
  void check_interrupt(Op op);

  // The operations issued so far, oldest first, at most the last `limit` and the last kLogged; and how many there were.
  std::vector<Op> log(uint64_t limit, uint64_t* issued) const;

  // From here on the operations that finish are kept, so many at most, until `traced` takes them.
  void trace(uint64_t limit);
  std::vector<Traced> traced();

  // The time of all operations of a kind that have finished, and how many they were.
  Nanoseconds spent(Op op, uint64_t* finished) const;

 private:
  friend class Turn;
  friend class Operation;
  static constexpr uint64_t kLogged = 1024;

  struct Peer {
    Window window;  // unused for the own rank
    WindowLayout at{};
    std::optional<Process> process;
    int64_t pid = 0;
  };

  std::byte* address(int rank, uint64_t offset) const;
  Control& control(int rank) const;
  std::atomic<uint64_t>& done(int rank, int source) const;
  Post& post(int rank, uint64_t sequence) const;
  std::byte* attachment(int rank, uint64_t sequence) const;
  bool has_exited(int rank) const;
  void ring_all() const;
  void close(State state, const std::string& reason);

  const int rank_;
  const int size_;
  const uint64_t bytes_;
  const uint64_t much_;
  const std::chrono::milliseconds timeout_;
  std::shared_ptr<OwnWindow> own_;
  std::vector<Peer> peers_;
  Turns turns_;
  Worker worker_;
  std::atomic<bool> spoils_ = false;
  std::mutex close_mutex_;
  mutable std::mutex log_mutex_;
  uint64_t sequence_ = 0;
  std::vector<Op> log_;
  std::array<std::pair<Nanoseconds, uint64_t>, kOps> spent_{};  // by Op
  uint64_t to_trace_ = 0;
  std::vector<Traced> traced_;
  // Of the operation that runs:
  std::array<uint64_t, kOps> wanted_{};  // bytes of the pool that such operations have needed, by Op
  uint64_t attachable_ = 0;              // bytes of each attachment that are reserved
};

// The right to run the next operation of a group, from when it is made: operations run in the order of their turns,
// whichever threads they run on.
class Turn {
 public:
  Turn(std::shared_ptr<Group> group) : group_(std::move(group)), number_(group_->turns_.draw()) {}
  Turn(Turn&& other) = default;
  ~Turn();

  Group& group() const { return *group_; }
  std::shared_ptr<Group> shared_group() const { return group_; }

  // Whether all operations before have ended.
  bool has_come();

  // Returns when they have, and `op` can begin.
  void wait(Op op);

 private:
  // The same for the time of one look at signals; false: they have not.
  bool comes();

  std::shared_ptr<Group> group_;  // nullptr: moved from
  uint64_t number_;
  bool has_come_ = false;
};

}  // namespace deep_ep
