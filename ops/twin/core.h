// What the headers of ops/twin/include are made of: cores, their pipes and the order of what these do.
//
// A core has the pipes S (the program itself), V, MTE2 and MTE3, and the link that carries its writes to windows of
// ranks. An instruction is an operation of a pipe; what is ordered is told by vector clocks: a Clock says for every
// pipe up to which operation all are known to be complete. Each pipe has one, `after`, of what its next operation
// follows. The rules:
//
//  1. A pipe starts its operations in order, but they may overlap: an operation follows what the clock of its pipe
//     says, and on 3510 an operation of V also all earlier ones of V. PipeBarrier<P> puts all earlier operations of P
//     into the clock of P. PIPE_S is illegal.
//  2. SetFlag<P_Q> takes a snapshot of the clock of P with all operations of P so far, WaitFlag<P_Q> adds it to Q.
//  3. EnQue/DeQue and FreeTensor/AllocTensor are such flags, between MTE2, V and MTE3, never S.
//  4. SetAtomic is not delayed: it holds for what is issued after it.
//  5. SyncAll orders cores; the hard one begins with PIPE_ALL on 2201 only. On 3510 it follows MTE3.
//  6. Scalar accesses to global memory go through a cache of 64-byte lines, per core, written back whole. Of a window
//     it may have lines that the program has not read: the one behind a line that it has, and what launches before have
//     left, even of other windows in the same place. S reads nothing of a window that its core has not invalidated in
//     this launch, and writes to no line of which it has not invalidated all.
//  7. Atomics of MTE3 are not ordered among themselves, and each is atomic.
//  8. A write to a window of a rank reads the unified buffer as an operation of MTE3 and arrives as one of the link, in
//     aligned blocks of 512 bytes, each whole and at its own time, until an MTE3_S flag or PipeBarrier of MTE3 or ALL.
//  9. Accesses of different pipes, of the unified buffer or of global memory, have no other order: neither do writes
//     after reads, nor MTE2 after MTE3 through global memory, nor MTE3 after what S wrote to the unified buffer.
//
// S issues the operations, so what S has waited for is complete before all that it issues later. Two accesses that
// conflict and that no clock orders are a violation in adversarial mode, where operations also really execute late and
// in any order that the clocks allow. In fast mode an operation executes when it is issued.
#pragma once

#include <algorithm>
#include <array>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "twin.h"
#include "waiting.h"

namespace twin {

enum Pipe : uint8_t { S, V, MTE2, MTE3, LINK };
constexpr int kPipes = 5;
constexpr const char* kPipeNames[kPipes] = {"S", "V", "MTE2", "MTE3", "link"};
constexpr uint32_t kBlock = 32;       // alignment in the unified buffer
constexpr uint64_t kLinkBlock = 512;  // what arrives in one piece
constexpr uint64_t kLine = 64;        // of the data cache

// Where in a kernel's source. As a default argument, `Site at = Site::here()` is the place of the call.
struct Site {
  const char* file = "?";
  uint32_t line = 0;
  static constexpr Site here(const char* file = __builtin_FILE(), uint32_t line = __builtin_LINE()) {
    return {file, line};
  }
  std::string text() const;
};

struct Clock {
  std::array<uint64_t, kPipes> done{};
  uint64_t& operator[](int pipe) { return done[pipe]; }
  uint64_t operator[](int pipe) const { return done[pipe]; }
  void join(const Clock& other) {
    for (int p = 0; p < kPipes; ++p) done[p] = std::max(done[p], other.done[p]);
  }
};

// What a core knows of all cores of its rank, from SyncAll.
using Known = std::vector<Clock>;

struct Violation {};  // thrown where one is found, after it has been reported
struct Stopped {};    // thrown on other cores

enum class Kind : uint8_t {
  read,
  write,
  atomic,
  neighbour  // what is written back with a dirty line, unchanged: harms other writers, not readers
};

// Of bytes [begin, end) of a page of a Shadow.
struct Access {
  uint16_t begin, end;
  Pipe pipe;
  Kind kind;
  bool dirty;  // still in the data cache of its core, where only that core's S sees it
  int core;
  uint64_t number;
  Site site;
};

// Last accesses to a stretch of memory, as far as later ones can conflict with them.
class Page {
 public:
  static constexpr uint64_t kBytes = 512;
  // Adds `access`; returns an earlier one that conflicts with it and that `ordered` does not know to be complete.
  template <class Ordered>
  const Access* add(const Access& access, Ordered&& ordered);

 private:
  std::vector<Access> accesses_;
};

// A part of the unified buffer, in bytes.
struct Span {
  uint32_t begin, bytes;
  uint32_t limit;  // the end of the buffer that it lies in
};

struct Use {
  Span span;
  bool write;
  uint32_t alignment = kBlock;
  bool partly = false;  // reads only some of the bytes; the effect checks that these have been written
};

struct Memory;  // a region and what is known of it
class Launch;

// A piece of a transfer between global memory and the unified buffer.
struct Segment {
  enum Source : uint8_t { copy, repeat, value, garbage };
  uint8_t* gm;
  Memory* memory;
  uint32_t ub;
  uint32_t bytes;
  Source source = copy;  // `repeat`: the first `element` bytes of gm, over and over; `value`: those of `pad`
  uint8_t element = 0;
  uint64_t pad = 0;
};

using AtomicFunction = void (*)(uint8_t* to, const uint8_t* from, uint32_t bytes);

// A buffer that TPipe has handed out, and its place in a queue.
struct Buffer {
  enum State : uint8_t { free, allocated, queued, taken };
  uint32_t offset, bytes;
  State state = free;
  int queued_event = -1, free_event = -1;  // ids
  Site site;                               // of its last change
};

// A queue of buffers: TQue, TQueBind.
struct Queue {
  int depth;
  Pipe producer, consumer;
  std::vector<Buffer*> buffers;
  std::deque<Buffer*> fifo;
  size_t cursor = 0;
};

struct Line {
  std::array<uint8_t, kLine> data;
  uint64_t held = 0, dirty = 0;  // bytes, as bits
  Memory* memory;
};

class Core {
 public:
  static Core& current();  // of this thread

  Core(Launch& launch, int index);
  ~Core();
  void finish();  // the kernel's end: completes everything, and checks what is left
  [[noreturn]] void fail(Site at, Pipe pipe, const std::string& what);
  // The core polls: time passes for what it has issued, and in the end it yields to what it waits for. Returns whether
  // it has slept for a while.
  bool relax();

  // Operations. `effect` runs when the operation executes; `uses` are the unified buffer's bytes that it touches.
  template <class Effect>
  void issue(Pipe pipe, Site at, std::initializer_list<Use> uses, Effect&& effect);
  std::vector<Segment>& segments() { return segments_; }  // to be filled for `transfer`
  void transfer(Pipe pipe, Site at);
  Memory* memory_of(const void* address, uint64_t bytes, bool write, Site at, Pipe pipe);

  // Scalar accesses.
  uint8_t* unified_buffer(uint32_t offset) { return ub_ + offset; }
  void scalar(Span span, bool write, Site at);  // checks, before the caller reads or writes the unified buffer
  void load(const void* address, void* value, uint32_t bytes, Site at);
  void store(void* address, const void* value, uint32_t bytes, Site at);
  void clean(void* address, bool all, Site at);

  // Order.
  void set_flag(Pipe from, Pipe to, int id, Site at);
  void wait_flag(Pipe from, Pipe to, int id, Site at);
  void barrier(Pipe pipe, Site at);
  void barrier_all();
  void complete_all();  // the same, without a PipeBarrier of the program
  // Whether the hard SyncAll works: in a kernel of KERNEL_TYPE_AIV_ONLY nothing on the device serves it.
  void set_meets(bool meets) { meets_ = meets; }
  void sync_all(Site at);
  void sync_all(void* workspace, Span own, int cores, Site at);
  void set_atomic(AtomicFunction function, uint32_t element, Site at);

  // Buffers, queues and event ids of TPipe.
  Buffer* allocate(uint32_t bytes, Site at);
  Queue* make_queue(int depth, Pipe producer, Pipe consumer, int buffers, uint32_t bytes, Site at);
  Buffer* queue_allocate(Queue* queue, Site at);
  void queue_put(Queue* queue, Buffer* buffer, Site at);
  Buffer* queue_take(Queue* queue, Site at);
  void queue_free(Queue* queue, Buffer* buffer, Site at);
  void reset_buffers(Site at, bool end);
  int allocate_event(Pipe from, Pipe to, Site at);
  int fetch_event(Pipe from, Pipe to, Site at);
  void release_event(Pipe from, Pipe to, int id, Site at);

  int index() const { return index_; }
  int arch() const;
  int cores() const;
  int64_t system_cycle();  // a poll, if nothing has changed since the last one
  void check_span(Span span, uint32_t alignment, Site at, Pipe pipe);
  void check_written(uint32_t begin, uint32_t bytes, Site at, Pipe pipe);
  void* pipe_object = nullptr;  // the kernel's TPipe

 private:
  friend class Launch;

  struct Operation {
    Pipe pipe;
    uint64_t number;
    Clock after;
    Site site;
    std::function<void(uint32_t)> effect;  // of one piece
    std::vector<uint32_t> pieces;          // that have not been executed
    bool ready = true;                     // link: the data has been read
  };
  struct Event {
    bool set = false, allocated = false;
    Clock snapshot;
    Site site;
  };

  Event& event(Pipe from, Pipe to, int id) { return events_[(from * kPipes + to) * kEvents + id]; }
  Event& checked_event(Pipe from, Pipe to, int id, Site at, Pipe pipe);
  Clock clock_of(Pipe pipe) const;  // of the next operation
  Clock snapshot(Pipe pipe, Pipe to) const;
  Operation& queue_operation(Pipe pipe, Site at, uint32_t pieces, std::function<void(uint32_t)> effect);
  void note(uint32_t begin, uint32_t bytes, Pipe pipe, uint64_t number, const Clock& after, Kind kind, Site at);
  void note(Memory* memory, const uint8_t* address, uint64_t bytes, Pipe pipe, uint64_t number, const Clock& after,
            Kind kind, bool dirty, Site at);
  bool ordered(const Access& earlier, const Access& access, const Clock& after) const;
  [[noreturn]] void fail_race(Site at, const Access& access, const Access& earlier, const std::string& where);

  bool runnable(const Operation& operation) const;
  bool execute_one(const Clock* needed, bool polling);
  void force(const Clock& clock);
  void tick(bool polling);
  void execute(Operation* operation);
  void let_peers_look();
  void move_in(const Segment& segment, Site at);
  void move_out(const Segment& segment, AtomicFunction atomic, Site at);
  void deliver(const Segment& segment, AtomicFunction atomic, const uint8_t* from);
  void read_later(Site at);
  void write_later(Site at);
  void send_later(Site at);
  void split_segments();

  Line& line_of(uint8_t* line, Memory* memory);
  void fill(uint8_t* address, Line* line);
  void write_back(uint8_t* address, Line* line);
  void evict(bool must);
  void clean_line(uint8_t* address, uint64_t mask, Site at);
  void note_line(uint8_t* address, Memory* memory, uint64_t written, bool dirty, Site at);
  void check_fresh(uint8_t* line, uint64_t wanted, const void* address, Memory* memory, Site at);

  uint64_t random();
  void check_stopped();
  bool has_pending() const;
  // The core writes to global memory: others may wait for that.
  void act() {
    wrote_ = true;
    place_.goes_on();
  }
  void note_read(const void* address) {
    reads_ += (reinterpret_cast<uintptr_t>(address) ^ 0x5bd1e995) * 0x9e3779b97f4a7c15;
  }

  static constexpr int kEvents = 8;
  Launch& launch_;
  const int index_;
  const bool adversarial_;
  uint64_t random_state_;
  std::array<uint32_t, kPipes> chance_{};  // of an operation to execute when it may, out of 256
  bool youngest_first_;                    // among operations of a pipe that may execute
  int looks_ = 0;

  std::unique_ptr<uint8_t[]> ub_memory_;
  uint8_t* ub_;
  std::vector<uint8_t> written_;  // by byte of the unified buffer
  std::vector<Page> pages_;
  uint32_t ub_bytes_, ub_used_ = 0;

  std::array<uint64_t, kPipes> issued_{};  // numbers of the last operations; S: of the stretch since its last flag
  std::array<Clock, kPipes> after_;
  std::shared_ptr<const Known> known_;
  std::array<std::deque<std::unique_ptr<Operation>>, kPipes> pending_;
  std::vector<Operation*> candidates_;  // of execute_one
  std::array<Event, kPipes * kPipes * kEvents> events_;

  std::deque<Buffer> buffers_;
  std::deque<Queue> queues_;
  size_t first_queue_ = 0;  // of the current TPipe
  std::vector<Segment> segments_;
  AtomicFunction atomic_ = nullptr;
  uint32_t atomic_element_ = 1;
  Site atomic_site_;

  std::unordered_map<uint8_t*, Line> lines_;
  struct Unclean {
    uint64_t mask;
    Site site;
  };
  std::unordered_map<uint8_t*, Unclean> unclean_;  // what SetValue wrote and nothing has cleaned, evicted or not
  std::unordered_map<uint8_t*, uint64_t> fresh_;   // bytes of lines that were invalidated in this launch,
  bool all_fresh_ = false;                         // or all of them

  Memory* last_memory_ = nullptr;
  uint32_t idle_ = 0;
  Place& place_;
  // Of global memory, since the last look at the clock and between the two before: whether it was written, and where it
  // was read.
  bool wrote_ = true;
  uint64_t reads_ = 0, last_reads_ = 0;
  const void* polled_ = nullptr;
  Site last_site_;
  std::unordered_map<const void*, int> soft_syncs_;  // by workspace
  bool failed_ = false;
  bool meets_ = true;
  Counters counters_;
};

template <class Effect>
void Core::issue(Pipe pipe, Site at, std::initializer_list<Use> uses, Effect&& effect) {
  for (const Use& use : uses) check_span(use.span, use.alignment, at, pipe);
  idle_ = 0;
  if (!adversarial_) {
    ++counters_.operations[pipe];
    for (const Use& use : uses)
      if (!use.write && !use.partly) check_written(use.span.begin, use.span.bytes, at, pipe);
    effect();
    for (const Use& use : uses)
      if (use.write) std::memset(written_.data() + use.span.begin, 1, use.span.bytes);
    return;
  }
  const Clock after = clock_of(pipe);
  for (const Use& use : uses)
    note(use.span.begin, use.span.bytes, pipe, issued_[pipe] + 1, after, use.write ? Kind::write : Kind::read, at);
  std::vector<Use> kept(uses);
  queue_operation(pipe, at, 1,
                  [this, pipe, at, kept = std::move(kept), effect = std::forward<Effect>(effect)](uint32_t) {
                    for (const Use& use : kept)
                      if (!use.write && !use.partly) check_written(use.span.begin, use.span.bytes, at, pipe);
                    effect();
                    for (const Use& use : kept)
                      if (use.write) std::memset(written_.data() + use.span.begin, 1, use.span.bytes);
                  });
  tick(false);
}

}  // namespace twin
