#include "group.h"

#include <algorithm>
#include <utility>

#include "error.h"
#include "host_memory.h"
#include "interrupt.h"

namespace deep_ep {
namespace {

constexpr uint64_t kMuch = 256 << 20;

uint64_t window_bytes(int num_ranks, uint64_t bytes) {
  const HostMemory memory = host_memory();
  if (bytes == 0) return std::max(memory.total() / 2 / num_ranks, kMinWindowBytes);
  if (const Memory& scarcest = memory.scarcest(); bytes > scarcest.available)
    throw Error(str("windows of ", bytes, " bytes are wanted, but ", scarcest.owner, " has only ", scarcest.available,
                    " bytes available", kAskForLess));
  return std::max(bytes, kMinWindowBytes);
}

}  // namespace

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
  while (!comes()) continue;
  group_->turns_.end();
}

bool Turn::has_come() { return has_come_ = has_come_ || group_->turns_.has_come(number_); }

void Turn::wait(Op op) {
  while (!comes()) group_->check_interrupt(op);
}

bool Turn::comes() {
  if (has_come()) return true;
  group_->worker_.hurry();
  return has_come_ = group_->turns_.wait_for(number_, kHealthMilliseconds);
}

}  // namespace deep_ep
