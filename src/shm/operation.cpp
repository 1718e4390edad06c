#include "operation.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "arithmetic.h"
#include "error.h"
#include "interrupt.h"
#include "thread_calls.h"

namespace deep_ep {
namespace {

constexpr uint64_t kMargin = 512 << 10;  // of blocks for rows

}  // namespace

Operation::Operation(Turn turn, Contribution mine, const Check& check) : Operation(std::move(turn), std::move(mine)) {
  receive(check);
}

Operation::Operation(Turn turn, Contribution mine) : turn_(std::move(turn)), group_(turn_.group()), op_(mine.post.op) {
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
  in_step([&] { send(mine); });
  stopwatch_.pause();
}

template <typename Step>
void Operation::in_step(Step&& step) {
  try {
    step();
  } catch (const std::exception& error) {
    // Still in its turn, so that the call's next operation, whichever thread makes it, knows.
    if (const auto& failed = ThreadCalls::mine().failed) *failed = error.what();
    abandon();
    throw;
  }
}

void Operation::send(const Contribution& mine) {
  Post& post = group_.post(group_.rank_, sequence_);
  post = mine.post;
  post.rejected = !mine.rejected.empty();
  copy_text(post.text, post.rejected ? mine.rejected : ThreadCalls::mine().form);
  post.gradient = ThreadCalls::mine().take_gradient();
  const Block block = mine.reserved.value_or(offered_);
  post.pool_offset = block.offset;
  post.pool_bytes = block.bytes;
  post.attached = attach(mine);
  std::copy(mine.words.begin(), mine.words.end(), reinterpret_cast<int32_t*>(&post + 1));
  group_.control(group_.rank_).sequence.store(sequence_, std::memory_order_release);
  group_.ring_all();
}

void Operation::receive(const Check& check) {
  stopwatch_.resume();
  in_step([&] {
    wait_for_posts();
    const std::string wrong = verdict(check);
    stopwatch_.enter(Phase::allocate);
    if (wrong.empty()) return;
    needed_ = 0;
    group_.own_->pool.undo(std::exchange(offered_, {}));
    end();
    throw Error(str(prefix(), wrong));
  });
}

void Operation::wait_for_posts() {
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
}

bool Operation::attach(const Contribution& mine) {
  if (!mine.rejected.empty() || !mine.attach || mine.attached_bytes > kAttachmentBytes) return false;
  if (size() == 1 && !mine.attaches_own) return true;
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
std::string Operation::verdict(const Check& check) const {
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

uint64_t Operation::with_margin(uint64_t bytes) { return bytes + std::max(bytes / 16, std::min(bytes, kMargin)); }

std::shared_ptr<std::byte> Operation::keep(uint64_t bytes) {
  // Once it is given back, it is to do for one that needs somewhat more.
  const uint64_t most = with_margin(std::max(needed_, wanted()));
  const Block block = group_.own_->pool.trim(std::exchange(offered_, {}), std::max(bytes, most));
  return group_.own_->kept(block);
}

}  // namespace deep_ep
