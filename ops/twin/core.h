// What the headers of ops/twin/include are made of: cores, their pipes and the order of what these do.
//
// A vector core has the pipes S (the program itself), V, MTE2 and MTE3, and the link that carries its writes to windows
// of ranks; a cube core has S, MTE2, MTE1, M and FIX. An instruction is an operation of a pipe; what is ordered is told
// by vector clocks: a Clock says for every pipe up to which operation all are known to be complete. Each pipe has one,
// `after`, of what its next operation follows. The rules:
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
// 10. CrossCoreSetFlag<mode, P> fires after all earlier work of P; two of them fire in any order. A counter of an id is
//     at most 15. CrossCoreWaitFlag<mode, P> holds back all that is issued later, on 3510 only that of P. Modes: 0, all
//     cores of a kind; 1, the two vector cores of a block; 2, a cube core and both of its vector cores; 4, on 3510, a
//     cube core and one of them. What a core has waited for, and what came before that, is complete for it.
// 11. A cube core has MTE2, MTE1, M and FIX, and no flags with S. An Mmad of 10 fractals or more of L0C follows all
//     before it; a smaller one needs PipeBarrier<PIPE_M> to go on with what another has begun.
// 12. With unitFlag, an Mmad waits for the Fixpipe that takes what L0C had before, and a Fixpipe for the Mmad, both for
//     the same part of L0C: 3 tells that this is done, 2 does not.
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

// As AscendC has them.
enum KernelMetaType : uint8_t { KERNEL_TYPE_AIV_ONLY, KERNEL_TYPE_MIX_AIV_1_0 = 2, KERNEL_TYPE_MIX_AIC_1_2 = 5 };

namespace twin {

enum Pipe : uint8_t { S, V, MTE2, MTE3, LINK, MTE1, M, FIX, CROSS };
constexpr int kPipes = 9;
constexpr const char* kPipeNames[kPipes] = {"S", "V", "MTE2", "MTE3", "link", "MTE1", "M", "FIX", "cross-core flags"};
constexpr uint32_t kBlock = 32;       // alignment in the unified buffer and in L1
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

// What a core knows of all cores of its rank, from SyncAll and cross-core flags.
using Known = std::vector<Clock>;
using SharedKnown = std::shared_ptr<const Known>;

// What both know; either may be nullptr.
SharedKnown joined(const SharedKnown& a, const SharedKnown& b);

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

// The memories on the chip that a core works with: a vector core has UB, a cube core the others.
enum SpaceId : uint8_t { UB, L1, L0A, L0B, L0C };
constexpr int kSpaces = 5;
constexpr const char* kSpaceNames[kSpaces] = {"unified buffer", "L1", "L0A", "L0B", "L0C"};

struct Space {
  Space() = default;
  Space(uint32_t bytes, bool adversarial);

  std::unique_ptr<uint8_t[]> memory;
  uint8_t* data = nullptr;
  uint32_t bytes = 0, used = 0;  // used: by buffers
  std::vector<uint8_t> written;  // by byte
  std::vector<Page> pages;       // in adversarial mode
};

// A part of such a memory, in bytes.
struct Span {
  uint32_t begin, bytes;
  uint32_t limit;  // the end of the buffer that it lies in
  SpaceId space = UB;
};

struct Use {
  Span span;
  bool write;
  uint32_t alignment = kBlock;
  bool partly = false;  // touches only some of the bytes; the effect checks or tells which have been written
};

struct Memory;  // a region and what is known of it
struct Gate;
class Launch;

// A piece of a transfer between global memory and the unified buffer, or into L1.
struct Segment {
  enum Source : uint8_t { copy, repeat, value, garbage };
  uint8_t* gm;
  Memory* memory;
  uint32_t ub;  // offset in `space`
  uint32_t bytes;
  Source source = copy;  // `repeat`: the first `element` bytes of gm, over and over; `value`: those of `pad`
  uint8_t element = 0;
  uint64_t pad = 0;
  SpaceId space = UB;
};

using AtomicFunction = void (*)(uint8_t* to, const uint8_t* from, uint32_t bytes);

// A buffer that TPipe has handed out, and its place in a queue.
struct Buffer {
  enum State : uint8_t { free, allocated, queued, taken };
  uint32_t offset, bytes;
  State state = free;
  int queued_event = -1, free_event = -1;  // ids
  Site site;                               // of its last change
  SpaceId space = UB;
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
  void issue(Pipe pipe, Site at, std::initializer_list<Use> uses, Effect&& effect) {
    issue_after(Clock{}, pipe, at, uses, std::forward<Effect>(effect));
  }
  // One that follows `more`, and not only what its pipe follows.
  template <class Uses, class Effect>
  void issue_after(const Clock& more, Pipe pipe, Site at, const Uses& uses, Effect&& effect);
  // Rule 11 and 12: an Mmad or Fixpipe of a part of L0C, and what it follows besides.
  Clock begin_mmad(Span c, int unit_flag, bool in_order, Site at);
  Clock begin_fixpipe(Span c, int unit_flag, Site at);
  // Of FIX, from uses of the core's memories to rows of global memory; `effect` fills in their bytes.
  void write_rows(const Clock& more, Site at, const std::vector<Use>& uses,
                  std::function<void(std::vector<uint8_t>& bytes)> effect);
  std::vector<Segment>& segments() { return segments_; }  // to be filled for `transfer`
  void transfer(Pipe pipe, Site at);
  // By MTE2 into L1, in pieces too small to be noted each for itself: `whole` has them together.
  void transfer_pieces(const std::vector<Segment>& whole, Site at);
  void check_fractals(std::vector<uint32_t>& begins, uint32_t bytes, Site at, Pipe pipe);  // overlap nowhere
  uint64_t choice(uint64_t choices) { return adversarial_ ? random() % choices : 0; }      // of what is not defined
  Memory* memory_of(const void* address, uint64_t bytes, bool write, Site at, Pipe pipe);

  // Scalar accesses.
  uint8_t* memory(SpaceId space, uint32_t offset) { return spaces_[space].data + offset; }
  uint8_t* written(SpaceId space, uint32_t offset) { return spaces_[space].written.data() + offset; }
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
  // Rule 10. `pipe`: whose earlier work a Set follows; on 3510, which pipe waits.
  void set_cross_flag(int mode, Pipe pipe, int id, Site at);
  void wait_cross_flag(int mode, Pipe pipe, int id, Site at);
  // KERNEL_TYPE_*: in a kernel of KERNEL_TYPE_AIV_ONLY nothing on the device serves the hard SyncAll.
  void set_kernel_type(int type, Site at);
  void sync_all(Site at);      // of vector cores
  void sync_all_mix(Site at);  // and cube cores
  void sync_all(void* workspace, Span own, int cores, Site at);
  void set_atomic(AtomicFunction function, uint32_t element, Site at);

  // Buffers, queues and event ids of TPipe.
  Buffer* allocate(uint32_t bytes, Site at, SpaceId space = UB);
  Queue* make_queue(int depth, Pipe producer, Pipe consumer, int buffers, uint32_t bytes, Site at);
  Buffer* queue_allocate(Queue* queue, Site at);
  void queue_put(Queue* queue, Buffer* buffer, Site at);
  Buffer* queue_take(Queue* queue, Site at);
  void queue_free(Queue* queue, Buffer* buffer, Site at);
  void reset_buffers(Site at, bool end);
  int allocate_event(Pipe from, Pipe to, Site at);
  int fetch_event(Pipe from, Pipe to, Site at);
  void release_event(Pipe from, Pipe to, int id, Site at);

  int index() const { return index_; }  // in the launch: vector cores, and behind them cube cores
  bool is_cube() const { return is_cube_; }
  int block() const;   // GetBlockIdx
  int blocks() const;  // GetBlockNum
  int arch() const;
  int cores() const;  // vector cores
  bool is_mix() const;
  int64_t system_cycle();  // a poll, if nothing has changed since the last one
  void check_span(Span span, uint32_t alignment, Site at, Pipe pipe);
  void check_written(SpaceId space, uint32_t begin, uint32_t bytes, Site at, Pipe pipe);
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
    SharedKnown known;  // that the pipe had alone
    Site site;
  };

  // Which of the pipes that have flags: S, V, MTE2 and MTE3 of a vector core, MTE2, MTE1, M and FIX of a cube core.
  int lane_of(Pipe pipe) const { return !is_cube_ ? pipe : pipe == MTE2 ? 0 : pipe - MTE1 + 1; }
  Pipe pipe_of(int lane) const { return Pipe(!is_cube_ ? lane : lane == 0 ? int{MTE2} : lane - 1 + MTE1); }
  bool has_flags(Pipe pipe) const { return is_cube_ ? pipe == MTE2 || (pipe >= MTE1 && pipe <= FIX) : pipe < LINK; }
  void check_flag(Pipe from, Pipe to, Site at, Pipe pipe);
  Event& event(Pipe from, Pipe to, int id) { return events_[(lane_of(from) * kLanes + lane_of(to)) * kEvents + id]; }
  void meet(Gate& gate, int cores, Site at);
  void check_cross_flag(int mode, Pipe pipe, int id, Site at);
  Event& checked_event(Pipe from, Pipe to, int id, Site at, Pipe pipe);
  Clock clock_of(Pipe pipe) const;  // of the next operation
  Clock snapshot(Pipe pipe, Pipe to) const;
  Operation& queue_operation(Pipe pipe, Site at, const Clock& after, uint32_t pieces,
                             std::function<void(uint32_t)> effect);
  void note(SpaceId space, uint32_t begin, uint32_t bytes, Pipe pipe, uint64_t number, const Clock& after, Kind kind,
            Site at);
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
  void check_atomic(Pipe pipe, Site at);
  void count_transfer(Pipe pipe, const std::vector<Segment>& segments);
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
  bool has_pending() const { return num_pending_ != 0; }
  // The core writes to global memory: others may wait for that.
  void act() {
    wrote_ = true;
    place_.goes_on();
  }
  void note_read(const void* address) {
    reads_ += (reinterpret_cast<uintptr_t>(address) ^ 0x5bd1e995) * 0x9e3779b97f4a7c15;
  }

  static constexpr int kEvents = 8, kLanes = 4;
  Launch& launch_;
  const int index_;
  const bool is_cube_;
  const bool adversarial_;
  uint64_t random_state_;
  std::array<uint32_t, kPipes> chance_{};  // of an operation to execute when it may, out of 256
  bool youngest_first_;                    // among operations of a pipe that may execute
  int looks_ = 0;

  std::array<Space, kSpaces> spaces_;
  // Of 512 bytes of L0C (rule 12): whether they wait for a Fixpipe, and the operations that have told so.
  struct Unit {
    bool full = false;
    Clock told;
    Site site;
  };
  std::vector<Unit> units_;
  static constexpr uint32_t kUnit = 512;
  template <typename F>
  void by_unit(Span c, F&& f);
  void tell(Unit& unit, bool full, Pipe pipe, Site at);

  std::array<uint64_t, kPipes> issued_{};  // numbers of the last operations; S: of the stretch since its last flag
  std::array<Clock, kPipes> after_;
  SharedKnown known_;
  std::array<SharedKnown, kPipes> known_alone_;  // by a pipe that has waited, on 3510, and by those it has told
  std::array<std::deque<std::unique_ptr<Operation>>, kPipes> pending_;
  size_t num_pending_ = 0;
  std::vector<Operation*> candidates_;  // of execute_one
  std::array<Event, kLanes * kLanes * kEvents> events_;

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

template <class Uses, class Effect>
void Core::issue_after(const Clock& more, Pipe pipe, Site at, const Uses& uses, Effect&& effect) {
  for (const Use& use : uses) check_span(use.span, use.alignment, at, pipe);
  idle_ = 0;
  if (!adversarial_) {
    ++counters_.operations[pipe];
    for (const Use& use : uses)
      if (!use.write && !use.partly) check_written(use.span.space, use.span.begin, use.span.bytes, at, pipe);
    effect();
    for (const Use& use : uses)
      if (use.write && !use.partly) std::memset(written(use.span.space, use.span.begin), 1, use.span.bytes);
    return;
  }
  Clock after = clock_of(pipe);
  after.join(more);
  for (const Use& use : uses)
    note(use.span.space, use.span.begin, use.span.bytes, pipe, issued_[pipe] + 1, after,
         use.write ? Kind::write : Kind::read, at);
  std::vector<Use> kept(std::begin(uses), std::end(uses));
  queue_operation(pipe, at, after, 1,
                  [this, pipe, at, kept = std::move(kept), effect = std::forward<Effect>(effect)](uint32_t) {
                    for (const Use& use : kept)
                      if (!use.write && !use.partly)
                        check_written(use.span.space, use.span.begin, use.span.bytes, at, pipe);
                    effect();
                    for (const Use& use : kept)
                      if (use.write && !use.partly)
                        std::memset(written(use.span.space, use.span.begin), 1, use.span.bytes);
                  });
  tick(false);
}

}  // namespace twin
