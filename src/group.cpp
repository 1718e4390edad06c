#include "group.h"

#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <numeric>
#include <span>
#include <utility>

#include "arithmetic.h"
#include "copy.h"
#include "error.h"
#include "host_memory.h"
#include "idle.h"
#include "interrupt.h"
#include "per_process.h"

namespace deep_ep {
namespace {

constexpr uint64_t kMargin = 512 << 10;  // of blocks for rows
constexpr uint64_t kMuch = 256 << 20;

uint64_t window_bytes(int num_ranks, uint64_t bytes) {
  const HostMemory memory = host_memory();
  if (bytes == 0) return std::max(memory.total() / 2 / num_ranks, kMinWindowBytes);
  if (const Memory& scarcest = memory.scarcest(); bytes > scarcest.available)
    throw Error(str("windows of ", bytes, " bytes are wanted, but ", scarcest.owner, " has only ", scarcest.available,
                    " bytes available", kAskForLess));
  return std::max(bytes, kMinWindowBytes);
}

// Entries by the chunk that their slots are in; within a chunk they keep their order.
class Chunks {
 public:
  Chunks(const std::vector<Entry>& entries, const std::vector<Region>& regions) : sorted_(entries.size()) {
    int64_t chunks = 0;
    for (const Region& region : regions) chunks = std::max(chunks, region.num_chunks());
    ends_.resize(chunks + 1);
    const auto chunk_of = [&](const Entry& entry) { return entry.slot / regions[entry.dest].slots_per_chunk; };
    for (const Entry& entry : entries) {
      if (entry.slot >= regions[entry.dest].num_slots)
        throw Error(str("slot ", entry.slot, " of rank ", entry.dest, " is out of range; is the handle intact?"));
      ++ends_[chunk_of(entry) + 1];
    }
    std::partial_sum(ends_.begin(), ends_.end(), ends_.begin());
    std::vector<size_t> next(ends_);
    for (const Entry& entry : entries) sorted_[next[chunk_of(entry)]++] = entry;
  }

  int64_t count() const { return static_cast<int64_t>(ends_.size()) - 1; }

  std::span<const Entry> of(int64_t chunk) const {
    return {sorted_.data() + ends_[chunk], sorted_.data() + ends_[chunk + 1]};
  }

 private:
  std::vector<Entry> sorted_;
  std::vector<size_t> ends_;
};

void copy_text(char* to, const std::string& text) {
  const size_t size = std::min<size_t>(text.size(), kTextBytes - 1);
  std::memcpy(to, text.data(), size);
  to[size] = '\0';
}

}  // namespace

OwnWindow::OwnWindow(const WindowLayout& at)
    : window(Window::create(at.total())),
      pool(
          at.pool, at.pool_bytes, [this](uint64_t offset, uint64_t bytes) { return reserve(offset, bytes); },
          [this](uint64_t offset, uint64_t bytes) { return window.release(offset, bytes); },
          [this] { sweep_when_idle([weak = weak_from_this()] { return sweep(weak); }); }) {
  window.reserve(0, at.attachments);
  window.reserve(at.staging, at.staging_bytes);
}

std::shared_ptr<std::byte> OwnWindow::kept(Block block) {
  return {window.at(block.offset), [own = shared_from_this(), block](std::byte*) {
            if (own->process == getpid()) own->pool.give_back(block);
          }};
}

bool OwnWindow::reserve(uint64_t offset, uint64_t bytes) {
  const HostMemory memory = host_memory();
  if (bytes > memory.host.free() || (memory.cgroup && bytes > memory.cgroup->free())) return false;
  try {
    window.reserve(offset, bytes);
  } catch (const Error&) {
    return false;
  }
  return true;
}

bool OwnWindow::sweep(const std::weak_ptr<OwnWindow>& weak) {
  const std::shared_ptr<OwnWindow> own = weak.lock();
  return own && own->pool.sweep();
}

Group::Group(int rank, int size, uint64_t bytes, std::chrono::milliseconds timeout)
    : rank_(rank),
      size_(size),
      bytes_(window_bytes(size, bytes)),
      much_(std::min(kMuch, host_memory().total() / 4 / size)),
      timeout_(timeout),
      peers_(size) {
  peers_[rank_].at = WindowLayout::of(size_, kMaxExperts, bytes_);
  own_ = std::make_shared<OwnWindow>(peers_[rank_].at);
}

Group::~Group() { close(State::closed, ""); }

void Group::connect(const int64_t* pids, const int64_t* fds, const uint64_t* bytes) {
  for (int r = 0; r < size_; ++r) {
    Peer& peer = peers_[r];
    peer.pid = pids[r];
    if (r == rank_) continue;
    peer.at = WindowLayout::of(size_, kMaxExperts, bytes[r]);
    peer.window = Window::open(pids[r], fds[r], peer.at.total());
    peer.process.emplace(pids[r]);
  }
}

std::vector<Op> Group::log(uint64_t limit, uint64_t* issued) const {
  std::lock_guard lock(log_mutex_);
  std::vector<Op> ops;
  const uint64_t count = std::min({limit, kLogged, sequence_});
  for (uint64_t n = sequence_ - count; n < sequence_; ++n) ops.push_back(log_[n % kLogged]);
  *issued = sequence_;
  return ops;
}

void Group::trace(uint64_t limit) {
  std::lock_guard lock(log_mutex_);
  to_trace_ = limit;
  traced_.clear();
}

std::vector<Traced> Group::traced() {
  std::lock_guard lock(log_mutex_);
  to_trace_ = 0;
  return std::exchange(traced_, {});
}

Nanoseconds Group::spent(Op op, uint64_t* finished) const {
  std::lock_guard lock(log_mutex_);
  const auto& [nanoseconds, count] = spent_[static_cast<int>(op)];
  *finished = count;
  return nanoseconds;
}

std::optional<PoolMemory> Group::reserve(uint64_t bytes) const {
  const Block block = own_->pool.trim(own_->pool.take(bytes, bytes), bytes);
  PoolMemory taken{block, own_->kept(block)};
  return block.bytes < bytes ? std::nullopt : std::optional(std::move(taken));
}

std::byte* Group::address(int rank, uint64_t offset) const {
  return rank == rank_ ? own_->window.at(offset) : peers_[rank].window.at(offset);
}

Control& Group::control(int rank) const { return *reinterpret_cast<Control*>(address(rank, 0)); }

std::atomic<uint64_t>& Group::done(int rank, int source) const {
  return (reinterpret_cast<Done*>(address(rank, peers_[rank].at.done)) + source)->progress;
}

Post& Group::post(int rank, uint64_t sequence) const {
  const WindowLayout& at = peers_[rank].at;
  return *reinterpret_cast<Post*>(address(rank, at.posts + sequence % 2 * at.post_stride));
}

std::byte* Group::attachment(int rank, uint64_t sequence) const {
  return address(rank, peers_[rank].at.attachments + sequence % 2 * kAttachmentBytes);
}

bool Group::has_exited(int rank) const { return rank != rank_ && peers_[rank].process->has_ended(); }

void Group::ring_all() const {
  for (int r = 0; r < size_; ++r)
    if (r == rank_ || peers_[r].process) control(r).bell.ring();
}

void Group::check_interrupt(Op op) {
  try {
    deep_ep::check_interrupt();
  } catch (...) {
    close(State::broken, str("deep_ep.", name_of(op), ": rank ", rank_, " was interrupted"));
    throw;
  }
}

void Group::close(State state, const std::string& reason) {
  std::lock_guard lock(close_mutex_);
  Control& own = control(rank_);
  if (own.state.load() != State::open) return;
  copy_text(own.reason, reason);
  own.state.store(state, std::memory_order_release);
  ring_all();
}

Turn::~Turn() {
  if (!group_) return;
  while (!has_come_) has_come_ = group_->turns_.wait_for(number_, kHealthMilliseconds);
  group_->turns_.end();
}

void Turn::wait(Op op) {
  while (!has_come_ && !(has_come_ = group_->turns_.wait_for(number_, kHealthMilliseconds)))
    group_->check_interrupt(op);
}

ThreadCalls& ThreadCalls::mine() {
  thread_local ThreadCalls calls;
  return calls;
}

Operation::Operation(Turn turn, Contribution mine, const std::function<std::string(const Operation&)>& check)
    : turn_(std::move(turn)), group_(turn_.group()), op_(mine.post.op) {
  turn_.wait(op_);
  begin_ = std::chrono::steady_clock::now();
  const Control& own = group_.control(group_.rank_);
  if (own.state.load() == State::broken)
    throw Error(str(prefix(), "the windows of this group were given up and cannot be used again; make a new group (",
                    own.reason, ")"));

  ThreadCalls& calls = ThreadCalls::mine();
  if (calls.failed && !calls.failed->empty()) throw Error(*calls.failed);
  ++calls.entered;
  calls.completed = false;
  {
    std::lock_guard lock(group_.log_mutex_);
    sequence_ = ++group_.sequence_;
    if (group_.log_.size() < Group::kLogged) group_.log_.resize(Group::kLogged);
    group_.log_[(sequence_ - 1) % Group::kLogged] = op_;
  }
  if (mine.rejected.empty() && !mine.reserved)
    offered_ = group_.own_->pool.take(with_margin(std::max(mine.expected, wanted())), mine.least);
  open_ = true;

  try {
    enter(mine, check);
  } catch (const std::exception& error) {
    // Still in its turn, so that the call's next operation, whichever thread makes it, knows.
    if (calls.failed) *calls.failed = error.what();
    abandon();
    throw;
  }
}

void Operation::enter(const Contribution& mine, const std::function<std::string(const Operation&)>& check) {
  Post& post = group_.post(group_.rank_, sequence_);
  post = mine.post;
  post.rejected = !mine.rejected.empty();
  copy_text(post.text, post.rejected ? mine.rejected : ThreadCalls::mine().form);
  post.gradient = std::exchange(ThreadCalls::mine().gradient, 0);
  const Block block = mine.reserved.value_or(offered_);
  post.pool_offset = block.offset;
  post.pool_bytes = block.bytes;
  post.attached = attach(mine);
  std::copy(mine.words.begin(), mine.words.end(), reinterpret_cast<int32_t*>(&post + 1));
  group_.control(group_.rank_).sequence.store(sequence_, std::memory_order_release);
  group_.ring_all();

  const auto missing = [this](int r) { return group_.control(r).sequence.load(std::memory_order_acquire) < sequence_; };
  const auto all_posted = [&] {
    for (int r = 0; r < size(); ++r)
      if (missing(r)) return false;
    return true;
  };
  wait("to enter", all_posted, missing, [](int) { return true; });
  all_attached_ = true;
  for (int r = 0; r < size(); ++r) {
    all_attached_ = all_attached_ && this->post(r).attached != 0;
    // A rank that no longer waited for this one would not have what it asked for.
    if (group_.control(r).state.load(std::memory_order_acquire) == State::broken)
      give_up(str(prefix(), "rank ", r, " gave up: ", group_.control(r).reason));
  }

  const std::string wrong = verdict(check);
  stopwatch_.enter(Phase::allocate);
  if (wrong.empty()) return;
  needed_ = 0;
  group_.own_->pool.undo(std::exchange(offered_, {}));
  end();
  throw Error(str(prefix(), wrong));
}

bool Operation::attach(const Contribution& mine) {
  if (!mine.rejected.empty() || !mine.attach || mine.attached_bytes > kAttachmentBytes) return false;
  if (size() == 1) return true;
  if (mine.attached_bytes > group_.attachable_) {
    const uint64_t bytes = std::min(round_up(mine.attached_bytes + mine.attached_bytes / 4, kPage), kAttachmentBytes);
    for (uint64_t sequence : {0, 1})
      group_.own_->window.reserve(group_.peers_[rank()].at.attachments + sequence * kAttachmentBytes, bytes);
    group_.attachable_ = bytes;
  }
  mine.attach(group_.attachment(rank(), sequence_));
  return true;
}

Operation::~Operation() { abandon(); }

void Operation::abandon() {
  if (open_) group_.close(State::broken, failure());
  open_ = false;
}

std::string Operation::failure() const {
  return str(prefix(), "rank ", rank(), " failed in the middle of the operation");
}

void Operation::fail(const std::string& reason) { give_up(str(failure(), ": ", reason)); }

void Operation::finish() {
  end();
  ThreadCalls::mine().completed = true;
}

void Operation::end() {
  group_.own_->pool.give_back(std::exchange(offered_, {}));
  open_ = false;
  stopwatch_.enter(Phase::finish);
  wanted() = std::max(needed_, wanted() - wanted() / 64);
  std::lock_guard lock(group_.log_mutex_);
  auto& [spent, finished] = group_.spent_[static_cast<int>(op_)];
  for (int i = 0; i < kPhases; ++i) spent[i] += stopwatch_.spent()[i];
  ++finished;
  if (group_.traced_.size() >= group_.to_trace_) return;
  const auto nanoseconds = [](std::chrono::steady_clock::time_point at) {
    return std::chrono::nanoseconds(at.time_since_epoch()).count();
  };
  const Post& own = post(rank());
  group_.traced_.push_back({op_, nanoseconds(begin_), nanoseconds(std::chrono::steady_clock::now()), stopwatch_.spent(),
                            own.tokens, own.hidden, own.top_k, own.experts});
}

std::string Operation::prefix() const { return str("deep_ep.", name_of(op_), ": "); }

void Operation::give_up(const std::string& reason) {
  group_.close(State::broken, reason);
  open_ = false;
  throw Error(reason);
}

// The same on all ranks: it depends on the posts only.
std::string Operation::verdict(const std::function<std::string(const Operation&)>& check) const {
  const auto differ = [this](const char* what, auto Post::* field, auto name) {
    const auto value = [&](int r) { return post(r).*field; };
    std::string text;
    for (int r = 1; r < size(); ++r)
      if (value(r) != value(0))
        text += str(text.empty() ? str(what, " differs: rank 0 has ", name(value(0))) : "", ", rank ", r, " has ",
                    name(value(r)));
    return text;
  };
  // A rank that failed before it knew its operation may name another one than its peers: its reason counts.
  std::string rejected;
  bool one_fault = size() > 1;  // of all ranks
  for (int r = 0; r < size(); ++r) {
    if (post(r).rejected) rejected += str(rejected.empty() ? "" : "; ", "rank ", r, ": ", post(r).text);
    one_fault = one_fault && post(r).rejected && std::strcmp(post(r).text, post(0).text) == 0;
  }
  if (!rejected.empty()) return one_fault ? str("all ranks: ", post(0).text) : rejected;

  if (std::string text = differ("the operation", &Post::op, [](Op op) { return name_of(op); }); !text.empty())
    return text + str(" (operation number ", sequence_,
                      " of this group); all ranks must issue the same operations in the same order");

  for (int a = 0; a < size(); ++a)
    for (int b = a + 1; b < size(); ++b)
      if (post(a).text[0] && post(b).text[0] && std::strcmp(post(a).text, post(b).text) != 0)
        return str("the calls differ: rank ", a, " has ", post(a).text, ", rank ", b, " has ", post(b).text,
                   "; it must be the same on all ranks");

  for (int b = 0; b < size(); ++b)
    for (int a = 0; a < size(); ++a)
      if (post(a).gradient == 1 && post(b).gradient == 2)
        return str("rank ", b, " needs a gradient of what it sends, rank ", a,
                   " does not, and would not take part in backward; it must be the same on all ranks");

  const auto number = [](int64_t value) { return value; };
  std::string text = differ("the dtype", &Post::dtype, [](int64_t dtype) { return name_of(DType{dtype}); });
  if (text.empty()) text = differ("num_experts", &Post::experts, number);
  if (text.empty()) text = differ("the hidden size", &Post::hidden, number);
  if (text.empty()) text = differ("top-k", &Post::top_k, number);
  if (!text.empty()) return text + "; it must be the same on all ranks";
  try {
    return check ? check(*this) : "";
  } catch (const Error& error) {
    return error.what();
  }
}

void Operation::wait(const char* phase, const std::function<bool()>& ready, const std::function<bool(int)>& missing,
                     const std::function<bool(int)>& needed) {
  const Phase before = stopwatch_.enter(Phase::wait);
  wait_until(phase, ready, missing, needed);
  stopwatch_.enter(before);
}

void Operation::wait_until(const char* phase, const std::function<bool()>& ready,
                           const std::function<bool(int)>& missing, const std::function<bool(int)>& needed) {
  const auto start = std::chrono::steady_clock::now();
  Control& own = group_.control(rank());
  while (!own.bell.wait(ready, kHealthMilliseconds)) {
    group_.check_interrupt(op_);
    if (own.state.load(std::memory_order_acquire) == State::broken)
      throw Error(str(prefix(), "the windows of this group were given up (", own.reason, ")"));
    for (int r = 0; r < size(); ++r) {
      const bool exited = group_.has_exited(r);
      const State state = group_.control(r).state.load(std::memory_order_acquire);
      if (r == rank() || (!exited && state == State::open)) continue;
      if (ready()) return;  // asked after the above: it may have done its part just before it went
      if (!needed(r)) continue;
      const std::string who = str(prefix(), "rank ", rank(), " waits for rank ", r, " ", phase, " (operation number ",
                                  sequence_, "), but ");
      if (state == State::broken) give_up(str(who, "rank ", r, " gave up: ", group_.control(r).reason));
      if (state == State::closed) give_up(str(who, "rank ", r, " has left the group"));
      give_up(str(who, "rank ", r, " (process ", group_.peers_[r].pid, ") has died"));
    }
    const auto waited = std::chrono::steady_clock::now() - start;
    if (waited < group_.timeout_) continue;
    std::string late;
    for (int r = 0; r < size(); ++r)
      if (r != rank() && missing(r)) {
        const uint64_t at = group_.control(r).sequence.load(std::memory_order_acquire);
        late += str(late.empty() ? "" : ", ", "rank ", r, " (",
                    at < sequence_ ? str("last seen in operation number ", at) : "in this operation", ")");
      }
    give_up(str(prefix(), "rank ", rank(), " waited ", group_.timeout_.count() / 1000.0, " s for ", late, " ", phase,
                " (operation number ", sequence_, ")"));
  }
}

std::optional<Region> Operation::pool_region(int rank, int64_t num_slots, int64_t total_rows, uint64_t row_bytes,
                                             uint64_t meta_bytes) const {
  Region region;
  region.offset = post(rank).pool_offset;
  region.metas = Pool::aligned(total_rows * row_bytes);
  const uint64_t needed = region.metas + num_slots * meta_bytes;
  if (rank == this->rank()) needed_ = std::max(needed_, needed);
  if (needed > post(rank).pool_bytes) return std::nullopt;
  region.num_slots = num_slots;
  region.slots_per_chunk = std::max<int64_t>(num_slots, 1);
  return region;
}

Region Operation::staging_region(int rank, int64_t num_slots, int64_t granularity, uint64_t row_bytes,
                                 uint64_t meta_bytes) const {
  const WindowLayout& at = group_.peers_[rank].at;
  const uint64_t slot_bytes = row_bytes + meta_bytes;
  Region region;
  region.offset = at.staging;
  region.num_slots = num_slots;
  region.slots_per_chunk = std::max<int64_t>(num_slots, 1);
  if (num_slots * slot_bytes + kLine > at.staging_bytes) {
    region.num_buffers = 2;
    region.stride = at.staging_bytes / 2;
    region.slots_per_chunk = (region.stride - kLine) / slot_bytes / granularity * granularity;
    if (region.slots_per_chunk == 0)
      throw Error(str("the window of rank ", rank, " is too small: ", granularity, " rows of ", slot_bytes,
                      " bytes do not fit into half of its staging memory (", region.stride,
                      " bytes); ask for more with num_nvl_bytes, num_bytes or HCCL_BUFFSIZE"));
  }
  region.metas = round_up(region.slots_per_chunk * row_bytes, kLine);
  return region;
}

void Operation::exchange(const std::vector<Entry>& entries, const std::vector<Region>& regions, uint64_t row_bytes,
                         uint64_t meta_bytes, const Write& write, const Consume& consume) {
  const Chunks pending(entries, regions);
  const Region& mine = regions[rank()];
  std::vector<int64_t> sent(size(), 0);     // chunks delivered in full, by destination
  std::vector<int64_t> allowed(size(), 0);  // chunks that may be written, by destination
  int64_t consumed = 0;
  Control& own = group_.control(rank());
  // A rank that receives nothing is done at once, and so are its senders.
  const auto source_done = [&](int r) {
    return Progress::chunks(group_.done(rank(), r).load(std::memory_order_acquire), sequence_);
  };
  const auto chunk_arrived = [&] {
    for (int r = 0; r < size(); ++r)
      if (static_cast<int64_t>(source_done(r)) <= consumed) return false;
    return true;
  };
  const auto may_send = [&] {
    bool more = false;
    for (int d = 0; d < size(); ++d) {
      const uint64_t credit = Progress::chunks(group_.control(d).credit.load(std::memory_order_acquire), sequence_);
      allowed[d] = std::min<int64_t>(regions[d].num_chunks(), regions[d].num_buffers + credit);
      more |= allowed[d] > sent[d];
    }
    return more;
  };
  uint64_t bytes = 0;  // of all ranks
  for (const Region& region : regions)
    bytes += std::min(region.num_slots, region.num_buffers * region.slots_per_chunk) * row_bytes;
  const bool past_caches = bytes > cached_bytes();
  CopyRow* const copy = copy_row(past_caches);
  const auto push = [&] {
    int64_t first = pending.count(), end = 0;
    for (int d = 0; d < size(); ++d)
      if (sent[d] < allowed[d]) {
        first = std::min(first, sent[d]);
        end = std::max(end, allowed[d]);
      }
    for (int64_t chunk = first; chunk < end; ++chunk)
      for (const Entry& entry : pending.of(chunk)) {
        if (chunk < sent[entry.dest] || chunk >= allowed[entry.dest]) continue;
        const Region& region = regions[entry.dest];
        const int64_t slot = entry.slot - chunk * region.slots_per_chunk;
        std::byte* base = group_.address(entry.dest, region.chunk(chunk));
        copy(base + slot * row_bytes, write(entry, base + region.metas + slot * meta_bytes), row_bytes);
      }
    copies_done(past_caches);
  };
  const auto report = [&](int d) {
    const bool all = sent[d] == regions[d].num_chunks();
    group_.done(d, rank()).store(Progress::encode(sequence_, all ? Progress::kAll : sent[d]),
                                 std::memory_order_release);
    group_.control(d).bell.ring();
  };

  for (int d = 0; d < size(); ++d)
    if (regions[d].num_chunks() == 0) report(d);
  while (true) {
    if (may_send()) {
      stopwatch_.enter(Phase::copy);
      push();
      for (int d = 0; d < size(); ++d)
        if (sent[d] < allowed[d]) {
          sent[d] = allowed[d];
          report(d);
        }
    }
    while (consumed < mine.num_chunks() && chunk_arrived()) {
      const int64_t first = consumed * mine.slots_per_chunk;
      std::byte* rows = group_.address(rank(), mine.chunk(consumed));
      stopwatch_.enter(Phase::reduce);
      consume(first, std::min(first + mine.slots_per_chunk, mine.num_slots), rows, rows + mine.metas);
      own.credit.store(Progress::encode(sequence_, ++consumed), std::memory_order_release);
      if (mine.num_chunks() > mine.num_buffers) group_.ring_all();
    }
    const auto unsent = [&](int d) { return sent[d] < regions[d].num_chunks(); };
    const auto missing = [&](int r) {
      return unsent(r) || (consumed < mine.num_chunks() && static_cast<int64_t>(source_done(r)) <= consumed);
    };
    const bool all_sent = [&] {
      for (int d = 0; d < size(); ++d)
        if (unsent(d)) return false;
      return true;
    }();
    if (all_sent && consumed == mine.num_chunks()) {
      stopwatch_.enter(Phase::finish);
      return;
    }
    wait(
        consumed < mine.num_chunks() ? "to send its rows" : "to take rows",
        [&] { return may_send() || (consumed < mine.num_chunks() && chunk_arrived()); }, missing, missing);
  }
}

uint64_t Operation::with_margin(uint64_t bytes) { return bytes + std::max(bytes / 16, std::min(bytes, kMargin)); }

std::shared_ptr<std::byte> Operation::keep(uint64_t bytes) {
  // Once it is given back, it is to do for one that needs somewhat more.
  const uint64_t most = with_margin(std::max(needed_, wanted()));
  const Block block = group_.own_->pool.trim(std::exchange(offered_, {}), std::max(bytes, most));
  return group_.own_->kept(block);
}

namespace groups {
namespace {

struct Registry {
  std::mutex mutex;
  std::map<std::string, std::shared_ptr<Group>> by_name;

  std::shared_ptr<Group> find(const std::string& name) {
    std::lock_guard lock(mutex);
    const auto found = by_name.find(name);
    return found == by_name.end() ? nullptr : found->second;
  }
};

Registry& registry() { return PerProcess<Registry>::get(); }

Make& make() {
  static Make& instance = *new Make;
  return instance;
}

// If that fails it fails on all ranks, as an operation would that all have entered.
void make_windows(const char* op, const std::string& name) {
  ThreadCalls& calls = ThreadCalls::mine();
  const ThreadCalls before = calls;
  ++calls.entered;
  calls.completed = false;
  if (const std::string wrong = make()(op, name); !wrong.empty()) throw Error(wrong);
  calls = before;
}

}  // namespace

void put(const std::string& name, std::shared_ptr<Group> group) {
  std::lock_guard lock(registry().mutex);
  registry().by_name[name].swap(group);
}

void set_make(Make function) { make() = std::move(function); }

std::shared_ptr<Group> get(const char* op, const std::string& name) {
  std::shared_ptr<Group> found = registry().find(name);
  if (!found && make()) {
    make_windows(op, name);
    found = registry().find(name);
  }
  if (!found && PerProcess<Registry>::forked())
    throw Error(str("deep_ep.", op, ": this process was forked from a rank and has no part in its group '", name,
                    "'; call the op in the rank itself, or make a group of such processes"));
  if (!found)
    throw Error(str("deep_ep.", op, ": there are no windows for the group '", name,
                    "' on this rank; call deep_ep.init(group) or make a deep_ep.Buffer first"));
  return found;
}

void remove(const std::string& name, const Group* group) {
  std::shared_ptr<Group> removed;  // destroyed after the lock is released
  std::lock_guard lock(registry().mutex);
  const auto found = registry().by_name.find(name);
  if (found == registry().by_name.end() || found->second.get() != group) return;
  removed = std::move(found->second);
  registry().by_name.erase(found);
}

}  // namespace groups
}  // namespace deep_ep
