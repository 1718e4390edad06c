// Order: operations, flags, barriers, and the adversary that executes operations when it likes.
#include "core.h"

#include <sched.h>
#include <time.h>

#include <utility>

#include "launch.h"

namespace twin {

std::string Site::text() const {
  const char* name = std::strrchr(file, '/');
  return std::string(name ? name + 1 : file) + ":" + std::to_string(line);
}

Core::Core(Launch& launch, int index)
    : launch_(launch),
      index_(index),
      is_cube_(index >= launch.vector_cores()),
      adversarial_(launch.settings.adversarial),
      random_state_((launch.settings.seed + 1) * 0x9e3779b97f4a7c15 ^ (index + 1) * 0xd1b54a32d192ed03),
      known_(std::make_shared<const Known>(launch.cores())),
      place_(launch.places[index]) {
  if (is_cube_) {
    const bool is_2201 = arch() == 2201;
    spaces_[L1] = Space(is_2201 ? 512 * 1024 - 256 : 512 * 1024, adversarial_);
    spaces_[L0A] = Space(64 * 1024, adversarial_);
    spaces_[L0B] = Space(64 * 1024, adversarial_);
    spaces_[L0C] = Space(is_2201 ? 128 * 1024 : 256 * 1024, adversarial_);
  } else {
    spaces_[UB] = Space(static_cast<uint32_t>(launch.settings.unified_buffer_bytes), adversarial_);
  }
  counters_.read.resize(launch.num_regions);
  counters_.written.resize(launch.num_regions);
  issued_[S] = 1;
  // How late a pipe is depends on the seed: every fourth seed has all of them as late as possible. Every other seed has
  // what was issued last overtake the rest.
  for (uint32_t& chance : chance_) chance = std::array{200u, 64u, 4u}[random() % 3];
  if (launch.settings.seed % 4 == 1) chance_.fill(0);
  youngest_first_ = launch.settings.seed % 2 == 1;
}

Core::~Core() = default;

Space::Space(uint32_t bytes, bool adversarial)
    : memory(new uint8_t[bytes + kLinkBlock]),
      bytes(bytes),
      written(bytes),
      pages(adversarial ? bytes / Page::kBytes + 1 : 0) {
  const auto address = reinterpret_cast<uintptr_t>(memory.get());
  data = memory.get() + (kLinkBlock - address % kLinkBlock) % kLinkBlock;
  std::memset(data, 0xa5, bytes);  // what a former kernel has left
}

int Core::arch() const { return launch_.settings.arch; }
int Core::cores() const { return launch_.vector_cores(); }
int Core::blocks() const { return launch_.settings.cores; }
int Core::block() const { return is_cube_ ? index_ - cores() : index_; }
bool Core::is_mix() const { return launch_.settings.mix; }

void Core::fail(Site at, Pipe pipe, const std::string& what) {
  failed_ = true;
  launch_.report("kernel " + launch_.kernel + ", " + launch_.name_of(index_) + ", " + at.text() + ", " +
                 kPipeNames[pipe] + ": " + what);
  throw Violation();
}

void Core::check_stopped() {
  if (launch_.stopped() && !failed_) throw Stopped();
}

uint64_t Core::random() {  // xorshift*
  random_state_ ^= random_state_ >> 12;
  random_state_ ^= random_state_ << 25;
  random_state_ ^= random_state_ >> 27;
  return random_state_ * 0x2545f4914f6cdd1d >> 16;
}

// ---- Clocks.

Clock Core::clock_of(Pipe pipe) const {
  Clock clock = after_[pipe];
  clock.join(after_[S]);  // not with S's own accesses: that S issues an operation does not order these before it
  if (pipe == S) clock[S] = issued_[S];
  if (pipe == V && arch() == 3510) clock[V] = issued_[V];
  return clock;
}

Clock Core::snapshot(Pipe pipe, Pipe to) const {
  Clock clock = clock_of(pipe);
  clock[pipe] = issued_[pipe];
  if (pipe == MTE3 && to == S) clock[LINK] = issued_[LINK];  // rule 8
  return clock;
}

namespace {

std::string flag_text(Pipe from, Pipe to, int id) {
  return std::string(kPipeNames[from]) + "_" + kPipeNames[to] + "(" + std::to_string(id) + ")";
}

}  // namespace

void Core::check_flag(Pipe from, Pipe to, Site at, Pipe pipe) {
  if (!has_flags(from) || !has_flags(to))
    fail(at, pipe,
         std::string("a ") + (is_cube_ ? "cube" : "vector") + " core has no flag " + kPipeNames[from] + "_" +
             kPipeNames[to]);
}

Core::Event& Core::checked_event(Pipe from, Pipe to, int id, Site at, Pipe pipe) {
  check_flag(from, to, at, pipe);
  if (id < 0 || id >= kEvents) fail(at, pipe, "flag " + flag_text(from, to, id) + ": ids are 0 to 7");
  return event(from, to, id);
}

void Core::set_flag(Pipe from, Pipe to, int id, Site at) {
  Event& flag = checked_event(from, to, id, at, from);
  if (id >= 6 && !flag.allocated) fail(at, from, "flag " + flag_text(from, to, id) + ": ids 6 and 7 are reserved");
  if (flag.set)
    fail(at, from,
         "SetFlag " + flag_text(from, to, id) + " again before its WaitFlag; it was set at " + flag.site.text());
  flag.set = true;
  flag.site = at;
  flag.snapshot = snapshot(from, to);
  flag.known = known_alone_[from];
  if (from == S) ++issued_[S];
  ++counters_.events;
  if (adversarial_) tick(false);
}

void Core::wait_flag(Pipe from, Pipe to, int id, Site at) {
  Event& flag = checked_event(from, to, id, at, to);
  if (!flag.set) fail(at, to, "WaitFlag " + flag_text(from, to, id) + " of a flag that is not set: it waits for ever");
  flag.set = false;
  after_[to].join(flag.snapshot);
  if (flag.known) {
    SharedKnown& known = to == S ? known_ : known_alone_[to];
    known = joined(known, flag.known);
  }
  if (to != S) return;
  check_stopped();
  force(flag.snapshot);
  if (adversarial_) tick(true);
}

void Core::barrier(Pipe pipe, Site at) {
  if (pipe == S) fail(at, S, "PipeBarrier<PIPE_S> is illegal: S is in order by itself");
  if (is_cube_ ? pipe == V || pipe == MTE3 : pipe > LINK)
    fail(at, pipe, std::string("a ") + (is_cube_ ? "cube" : "vector") + " core has no such pipe");
  ++counters_.barriers;
  after_[pipe].join(after_[S]);
  after_[pipe][pipe] = issued_[pipe];
  if (pipe == MTE3) after_[pipe][LINK] = issued_[LINK];
  if (adversarial_) tick(false);
}

void Core::barrier_all() {
  ++counters_.barriers;
  complete_all();
}

void Core::complete_all() {
  check_stopped();
  Clock all;
  for (int p = 0; p < kPipes; ++p) all[p] = issued_[p];
  force(all);
  for (Clock& clock : after_) clock.join(all);
  for (SharedKnown& known : known_alone_)
    if (known) known_ = joined(known_, std::exchange(known, nullptr));
  ++issued_[S];
}

void Core::set_kernel_type(int type, Site at) {
  if ((type == KERNEL_TYPE_MIX_AIC_1_2) != is_mix())
    fail(at, S,
         is_mix() ? "a block has cube cores with KERNEL_TYPE_MIX_AIC_1_2 only"
                  : "KERNEL_TYPE_MIX_AIC_1_2: the launch has no cube cores");
  meets_ = type != KERNEL_TYPE_AIV_ONLY;
}

void Core::sync_all(Site at) {
  ++counters_.syncs;
  check_stopped();
  if (is_cube_) fail(at, S, "SyncAll<true> is one of vector cores");
  if (!meets_)
    fail(at, S, "SyncAll waits for ever in a kernel of KERNEL_TYPE_AIV_ONLY: KERNEL_TYPE_MIX_AIV_1_0 has it");
  // Rule 5. On 3510 what is ordered is what MTE3 has done, and S itself.
  if (arch() == 2201) complete_all();
  Clock mine = snapshot(MTE3, MTE3);
  force(mine);
  after_[S].join(mine);
  mine.join(after_[S]);
  mine[S] = issued_[S]++;
  auto known = std::make_shared<Known>(*known_);
  (*known)[index_].join(mine);
  known_ = std::move(known);
  meet(launch_.hard_gate, cores(), at);
}

void Core::sync_all(void* workspace, Span own, int cores_used, Site at) {
  const int used = cores_used == 0 ? cores() : cores_used;
  if (used > cores() || index_ >= used)
    fail(at, S,
         "SyncAll of " + std::to_string(used) + " cores, called by core " + std::to_string(index_) + " of " +
             std::to_string(cores()));
  const uint64_t bytes = uint64_t{kBlock} * used;
  if (own.bytes < bytes) fail(at, S, "SyncAll needs 32 bytes per core of the unified buffer");
  check_span({own.begin, static_cast<uint32_t>(bytes), own.limit}, kBlock, at, S);
  Memory* memory = memory_of(workspace, bytes, true, at, S);
  ++counters_.syncs;
  complete_all();
  // Each core counts its calls in its 32 bytes of the workspace.
  auto* slot = static_cast<uint8_t*>(workspace) + kBlock * index_;
  int32_t count;
  std::memcpy(&count, slot, sizeof(count));
  if (memory->written && !memory->written[slot - memory->begin()])
    fail(at, MTE2, "the workspace of SyncAll has not been written, and must be zeros: " + memory->text(slot));
  if (count != soft_syncs_[workspace])
    fail(at, MTE2,
         "the workspace of SyncAll was not zeroed: " + memory->text(slot) + " is " + std::to_string(count) +
             ", expected " + std::to_string(soft_syncs_[workspace]));
  ++soft_syncs_[workspace];
  ++count;
  std::memcpy(slot, &count, sizeof(count));
  std::memset(written(own.space, own.begin), 1, bytes);
  auto known = std::make_shared<Known>(*known_);
  (*known)[index_].join(after_[S]);
  known_ = std::move(known);
  meet(launch_.gate_of(workspace), used, at);
}

void Core::meet(Gate& gate, int cores, Site at) {
  wrote_ = true;
  const int missing = launch_.meet(gate, cores, place_, &known_);
  if (missing == Launch::kAllWait) fail(at, S, "SyncAll waits for ever: all cores wait");
  if (missing >= 0) fail(at, S, "SyncAll waits for ever: " + launch_.name_of(missing) + " has ended without it");
}

void Core::set_atomic(AtomicFunction function, uint32_t element, Site at) {
  atomic_ = function;
  atomic_element_ = element;
  atomic_site_ = at;
}

// ---- Operations that have been issued and not yet executed.

Core::Operation& Core::queue_operation(Pipe pipe, Site at, const Clock& after, uint32_t pieces,
                                       std::function<void(uint32_t)> effect) {
  auto operation = std::make_unique<Operation>();
  operation->pipe = pipe;
  operation->after = after;
  operation->number = ++issued_[pipe];
  operation->site = at;
  operation->effect = std::move(effect);
  operation->pieces.resize(pieces);
  for (uint32_t i = 0; i < pieces; ++i) operation->pieces[i] = i;
  ++counters_.operations[pipe];
  pending_[pipe].push_back(std::move(operation));
  ++num_pending_;
  return *pending_[pipe].back();
}

bool Core::runnable(const Operation& operation) const {
  if (!operation.ready) return false;
  for (int p = V; p < kPipes; ++p)
    if (!pending_[p].empty() && pending_[p].front()->number <= operation.after[p]) return false;
  return true;
}

// Executes a random piece of a random operation that may begin; with `needed`, one of those that it covers. Without,
// it may also find that none wants to. Returns whether something was executed.
bool Core::execute_one(const Clock* needed, bool polling) {
  candidates_.clear();
  for (int p = V; p < kPipes; ++p)
    for (const auto& operation : pending_[p]) {
      if (needed && operation->number > (*needed)[p]) break;
      if (runnable(*operation)) candidates_.push_back(operation.get());
    }
  if (candidates_.empty()) return false;
  auto chosen = candidates_.begin() + random() % candidates_.size();
  if (youngest_first_)  // candidates of a pipe stand together
    while (chosen + 1 != candidates_.end() && (*(chosen + 1))->pipe == (*chosen)->pipe) ++chosen;
  Operation* operation = *chosen;
  // What is polled for arrives in the end.
  const uint32_t chance = polling ? std::max(chance_[operation->pipe], 24u) : chance_[operation->pipe];
  if (!needed && random() % 256 >= chance) return false;
  execute(operation);
  return true;
}

void Core::execute(Operation* operation) {
  std::swap(operation->pieces[random() % operation->pieces.size()], operation->pieces.back());
  const uint32_t piece = operation->pieces.back();
  operation->pieces.pop_back();
  operation->effect(piece);
  auto& pending = pending_[operation->pipe];
  const bool overtakes = pending.front().get() != operation;
  if (operation->pipe == LINK && (overtakes || (!operation->pieces.empty() && random() % 4 == 0))) let_peers_look();
  if (!operation->pieces.empty()) return;
  --num_pending_;
  pending.erase(std::find_if(pending.begin(), pending.end(), [&](const auto& p) { return p.get() == operation; }));
}

// Part of what was sent has arrived, and perhaps not what its receiver takes for granted: time to find out.
void Core::let_peers_look() {
  constexpr int kMostLooks = 32;
  if (looks_++ >= kMostLooks) return;
  const timespec pause{0, static_cast<long>(50'000 + random() % 300'000)};
  nanosleep(&pause, nullptr);
}

// Completes what `clock` covers: S waits for it.
void Core::force(const Clock& clock) {
  if (!adversarial_) return;
  for (;;) {
    bool left = false;
    for (int p = V; p < kPipes; ++p) left = left || (!pending_[p].empty() && pending_[p].front()->number <= clock[p]);
    if (!left) return;
    if (!execute_one(&clock, false)) throw std::logic_error("twin: an operation follows itself");
  }
}

// Time passes.
void Core::tick(bool polling) {
  constexpr size_t kMostPending = 256;
  if (!has_pending()) return;
  const bool too_many = num_pending_ > kMostPending;
  execute_one(nullptr, polling);
  if (!too_many) return;
  Clock all;
  all.done.fill(UINT64_MAX);
  execute_one(&all, false);
}

bool Core::relax() {
  check_stopped();
  if (adversarial_) tick(true);
  if (++idle_ < 64) return false;
  if (idle_ < 128) {
    sched_yield();
    return false;
  }
  const timespec pause{0, 50'000};
  nanosleep(&pause, nullptr);
  return true;
}

int64_t Core::system_cycle() {
  constexpr uint64_t kBegin = 1'000'000'000;  // microseconds: the device has been on for a while
  const bool has_slept = relax();
  const bool is_new = std::exchange(wrote_, false) || reads_ != last_reads_ || has_pending();
  last_reads_ = std::exchange(reads_, 0);
  if (is_new) {
    place_.goes_on();
  } else {
    place_.waits();
    if (has_slept) place_.sleeps();
  }
  return static_cast<int64_t>((kBegin + launch_.ranks.microseconds()) * (launch_.settings.clock_hz / 1'000'000));
}

void Core::finish() {
  reset_buffers(last_site_, true);
  Clock all;
  for (int p = 0; p < kPipes; ++p) all[p] = issued_[p];
  force(all);
  for (int from = 0; from < kLanes; ++from)
    for (int to = 0; to < kLanes; ++to)
      for (int id = 0; id < kEvents; ++id)
        if (const Event& flag = event(pipe_of(from), pipe_of(to), id); flag.set)
          fail(flag.site, pipe_of(from),
               "flag " + flag_text(pipe_of(from), pipe_of(to), id) +
                   " is set and never waited for: it is left to the next kernel");
  for (const Unit& unit : units_)
    if (unit.full)
      fail(unit.site, M, "unitFlag: no Fixpipe with unitFlag takes what it has done: it is left to the next kernel");
  if (atomic_)
    fail(atomic_site_, is_cube_ ? FIX : MTE3, "SetAtomicNone is missing: the mode is left to the next kernel");
  if (!unclean_.empty()) {
    const auto& [address, unclean] = *unclean_.begin();
    Memory* memory = launch_.find(address + __builtin_ctzll(unclean.mask));
    fail(unclean.site, S,
         "SetValue of " + memory->text(address + __builtin_ctzll(unclean.mask)) +
             " is left in the data cache: DataCacheCleanAndInvalid is missing");
  }
}

}  // namespace twin
