// The windows of a group of ranks, and the one way to communicate through them.
//
// R ranks · T local tokens · H hidden · K top-k · E experts · N rows.
//
// An operation has two steps. Opening it (`Operation`) publishes a post, waits for the posts of all ranks and checks
// that they fit together; all ranks see the same posts and reach the same verdict, so an operation that is
// rejected is rejected everywhere before a byte of payload moves, and the group stays usable. `exchange` then
// moves rows into slots of the receivers' windows.
#pragma once

#include <unistd.h>

#include <array>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "phases.h"
#include "pool.h"
#include "process.h"
#include "turns.h"
#include "window.h"
#include "window_layout.h"
#include "worker.h"

namespace deep_ep {

// The own window with its pool. Tensors whose memory lies in it keep it alive beyond the group.
struct OwnWindow : std::enable_shared_from_this<OwnWindow> {
  explicit OwnWindow(const WindowLayout& at);

  // The memory of a block that was taken from the pool, to which it is given back when the pointer dies.
  std::shared_ptr<std::byte> kept(Block block);

  const pid_t process = getpid();  // whose pool it is: a forked child has tensors in it, too
  Window window;
  Pool pool;

 private:
  bool reserve(uint64_t offset, uint64_t bytes);
  static bool sweep(const std::weak_ptr<OwnWindow>& weak);
};

// A block of the pool, and what keeps it.
struct PoolMemory {
  Block block;
  std::shared_ptr<std::byte> memory;
};

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
  bool join(std::chrono::milliseconds time) { return turns_.end_within(time); }

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
  std::weak_ptr<Group> weak_group() const { return group_; }

  // Returns when all operations before have ended, and `op` can begin.
  void wait(Op op);

 private:
  std::shared_ptr<Group> group_;  // nullptr: moved from
  uint64_t number_;
  bool has_come_ = false;
};

// Where the rows that a rank receives in one operation lie: slots 0..num_slots-1, in chunks. Chunk c lies in
// buffer c % num_buffers; within a chunk, all rows come first, then all metas.
struct Region {
  uint64_t offset = 0;
  uint64_t metas = 0;  // of the first buffer, relative to offset
  uint64_t stride = 0;
  int64_t num_slots = 0;
  int64_t slots_per_chunk = 1;
  int num_buffers = 1;

  int64_t num_chunks() const { return (num_slots + slots_per_chunk - 1) / slots_per_chunk; }
  uint64_t chunk(int64_t index) const { return offset + (index % num_buffers) * stride; }
};

// One row to send: from source row `row` to `slot` of rank `dest`.
struct Entry {
  int32_t dest;
  int32_t slot;
  int32_t row;
};

// What a rank brings to an operation.
struct Contribution {
  Post post{};
  std::vector<int32_t> words;  // published with the post
  std::string rejected;        // unless empty: why this rank cannot take part
  uint64_t expected = 0;       // bytes of the pool that rows for this rank are expected to need
  uint64_t least = 0;          // bytes of it without which they do not fit for certain
  // Instead, where rows for this rank go is settled: this block of the pool, of 0 bytes for none.
  std::optional<Block> reserved;
  // What this rank has to send, for an operation of little data: `attach` writes these bytes.
  uint64_t attached_bytes = 0;
  std::function<void(std::byte*)> attach;
};

// What a thread has done with operations, for calls that fail in Python (python/deep_ep/collective.py).
struct ThreadCalls {
  uint64_t entered = 0;   // operations that it has entered, or left to the thread of their group
  bool completed = true;  // the newest of them has not failed here
  // Of the call that it makes, if it makes one: why an operation has failed, here or on the thread of the group. The
  // later ones of such a call are not entered, on any rank, and fail for that reason. Read and written in the turns of
  // these operations.
  std::shared_ptr<std::string> failed;
  // What ranks must have in common in this call, in words, where an operation's post does not say it; or nothing.
  std::string form;
  // Of the operation that it enters next: 1 if nothing that it sends needs a gradient, 2 if something does; 0 where
  // that is not known: without grad mode, and in compiled code.
  int64_t gradient = 0;

  static ThreadCalls& mine();
};

class Operation {
 public:
  // Enters `mine.post.op` on the group of `turn`. `check` runs once all posts are there, may look at all of them, must
  // come to the same result on every rank, and returns what is wrong (or throws Error), or nothing.
  Operation(Turn turn, Contribution mine, const std::function<std::string(const Operation&)>& check = {});

  // Without finish() before it, the operation failed on this rank alone: the group is given up, and peers raise.
  ~Operation();

  int rank() const { return group_.rank_; }
  int size() const { return group_.size_; }
  const Post& post(int rank) const { return group_.post(rank, sequence_); }
  const int32_t* words(int rank) const { return reinterpret_cast<const int32_t*>(&post(rank) + 1); }

  // Whether all ranks have attached what they have to send: there is nothing to exchange. A rank need not attach what
  // it sends to itself, and attaches nothing if it is alone.
  bool all_attached() const { return all_attached_; }
  const std::byte* attachment(int rank) const { return group_.attachment(rank, sequence_); }

  // What the time from here on is spent on.
  void enter(Phase phase) { stopwatch_.enter(phase); }

  // A place for num_slots slots of row_bytes + meta_bytes at `rank`. For rows that are kept: the pool block that `rank`
  // offered, with room for `total_rows` rows, or nothing if it is too small. For rows that are consumed:
  // staging, in rounds of chunks if need be, each a multiple of `granularity` slots; throws if not even one fits.
  std::optional<Region> pool_region(int rank, int64_t num_slots, int64_t total_rows, uint64_t row_bytes,
                                    uint64_t meta_bytes) const;
  Region staging_region(int rank, int64_t num_slots, int64_t granularity, uint64_t row_bytes,
                        uint64_t meta_bytes) const;

  // Sends `entries` and receives into regions[rank()]. For each entry `write(entry, meta)` fills the slot's meta and
  // returns the row that is to be copied to it. For each chunk that has arrived, in order, `consume(first_slot,
  // end_slot, rows, metas)`.
  using Write = std::function<const std::byte*(const Entry&, std::byte* meta)>;
  using Consume = std::function<void(int64_t first, int64_t end, std::byte* rows, std::byte* metas)>;
  void exchange(const std::vector<Entry>& entries, const std::vector<Region>& regions, uint64_t row_bytes,
                uint64_t meta_bytes, const Write& write, const Consume& consume);

  // The first `bytes` of the own pool region, given back when the pointer dies.
  std::shared_ptr<std::byte> keep(uint64_t bytes);

  void finish();

  // For what only this rank can know after the checks: gives the group up, tells peers why, and throws.
  [[noreturn]] void fail(const std::string& reason);

 private:
  void enter(const Contribution& mine, const std::function<std::string(const Operation&)>& check);
  bool attach(const Contribution& mine);
  // What such operations have needed of the pool.
  uint64_t& wanted() const { return group_.wanted_[static_cast<int>(op_)]; }
  // Of the pool, for `bytes` of this operation: routing varies, and more where tokens are few.
  static uint64_t with_margin(uint64_t bytes);
  // Ends an operation that peers need nothing more of.
  void end();
  // Gives the group up unless it has ended.
  void abandon();
  // Waits until ready(). `missing(r)`: rank r still owes something; `needed(r)`: nothing can become ready if rank r
  // is gone; `phase` names what is waited for.
  void wait(const char* phase, const std::function<bool()>& ready, const std::function<bool(int)>& missing,
            const std::function<bool(int)>& needed);
  void wait_until(const char* phase, const std::function<bool()>& ready, const std::function<bool(int)>& missing,
                  const std::function<bool(int)>& needed);
  std::string verdict(const std::function<std::string(const Operation&)>& check) const;
  [[noreturn]] void give_up(const std::string& reason);
  std::string failure() const;
  std::string prefix() const;

  Turn turn_;
  Group& group_;
  const Op op_;
  uint64_t sequence_ = 0;
  Block offered_;
  mutable uint64_t needed_ = 0;  // bytes of it
  bool open_ = false;
  bool all_attached_ = false;
  std::chrono::steady_clock::time_point begin_;
  Stopwatch stopwatch_{Phase::counts};
};

// Groups by name, as torch.distributed names them. A name that comes back replaces the group it had.
namespace groups {
void put(const std::string& name, std::shared_ptr<Group> group);
// Throws Error if there is none of this name, and `make` makes none.
std::shared_ptr<Group> get(const char* op, const std::string& name);
// What makes the windows of a group whose first operation on this rank is `op`, if it has windows to be made:
// collective. Returns what is wrong, or nothing.
using Make = std::function<std::string(const char* op, const std::string& name)>;
void set_make(Make make);
// Forgets `group` if it is still the one of this name.
void remove(const std::string& name, const Group* group);
}  // namespace groups

}  // namespace deep_ep
