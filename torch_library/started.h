// Calls whose results are asked for later.
//
// `<op>_start(arguments)` begins a call of `op` and returns a ticket, fp64 [1] on the CPU; the op wait, called with the
// ticket, returns the results, or raises what went wrong. The op arriving, called before it, returns the same results
// while the call still writes to their memory, behind torch's back. Results that nobody asks for go with the ticket.
#pragma once

#include <cstddef>
#include <exception>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "arguments.h"
#include "shm/thread_calls.h"

namespace deep_ep {

using Results = std::vector<Tensor>;

// What a call does, in its turn (src/shm/group.h): it tells and sends the other ranks what it has to, then it receives.
class Steps {
 public:
  virtual ~Steps() = default;

  // Whether `send` waits for nobody once the turn has come, and `receive` then needs no tensor that the call was given:
  // what there is to send is little. Comes before `send`.
  virtual bool sends_at_once() { return false; }

  virtual void send(Turn turn) = 0;
  virtual Results receive() = 0;

  // Ends the turn, whatever became of the call, and keeps its tensors: the task that holds them lets go of them where
  // that may be done (Worker::Task).
  virtual void end() = 0;
};

// Sends, if that waits for nobody; the rest is done by who waits for the results, or by the thread of the group if
// another call or a peer needs it before. Otherwise that does all of it, or who waits where that comes first. It keeps
// the tensors that it was given alive, and the caller must not write to them before the wait. `early`: the tensors that
// `steps` give, where they can be made before the call; until it has ended, what they hold is undefined, and if it
// fails it stays so. `name`: what wait knows the op by.
Tensor start(Op op, Turn turn, Results early, std::unique_ptr<Steps> steps, const char* name);

// What `make` gives, if the arguments are right; where there is no memory for it they are not, and no rank takes part.
template <typename Make>
auto make_early(Checks& checks, Make&& make) -> std::optional<decltype(make())> {
  if (!checks.passed()) return std::nullopt;
  try {
    return make();
  } catch (const std::exception& error) {
    checks.require(false, error.what());
    return std::nullopt;
  }
}

// A call of an op on the CPU, as the op's arguments make it, has
//
//   op()                 its code
//   turn                 drawn when it was made, so that it keeps its place, whether it runs at once or later
//   run(turn)            which gives its results
//
// or, if results can be made before it runs, a type Early of what has to be known of them, with
//
//   make_early(group)    the same, or nothing
//   results(early)       what they are
//   steps(call, early)   in the place of run(turn)
template <typename Call>
concept HasEarly = requires { typename Call::Early; };

// A call that sends and receives in one.
template <typename Call>
class OneStep : public Steps {
 public:
  explicit OneStep(Call call) : call_(std::move(call)) {}
  void send(Turn turn) override { turn_.emplace(std::move(turn)); }
  Results receive() override { return call_.run(*std::exchange(turn_, std::nullopt)); }
  void end() override { turn_.reset(); }

 private:
  Call call_;
  std::optional<Turn> turn_;
};

template <typename Call>
Results run_call(Call call) {
  Turn turn = std::move(call.turn);
  if constexpr (HasEarly<Call>) {
    const std::unique_ptr<Steps> steps = Call::steps(std::move(call), std::nullopt);
    steps->send(std::move(turn));
    return steps->receive();
  } else {
    return call.run(std::move(turn));
  }
}

template <typename Call>
Tensor start_call(Call call, const char* name) {
  const Op op = call.op();
  Turn turn = std::move(call.turn);
  if constexpr (HasEarly<Call>) {
    auto early = call.make_early(turn.group());
    Results results = early ? call.results(*early) : Results{};
    return start(op, std::move(turn), std::move(results), Call::steps(std::move(call), std::move(early)), name);
  } else {
    return start(op, std::move(turn), {}, std::make_unique<OneStep<Call>>(std::move(call)), name);
  }
}

// A call on an NPU: its kernel is on the stream, and the host waits for nothing in either case.
struct QueuedCall {
  Op op;
  Results results;
};
inline Results run_call(QueuedCall call) { return std::move(call.results); }
Tensor start_call(QueuedCall call, const char* name);

// The results as an op returns them.
template <size_t count>
auto outputs(const Results& results) {
  if constexpr (count == 1)
    return results[0];
  else
    return [&]<size_t... I>(std::index_sequence<I...>) {
      return std::make_tuple(results[I]...);
    }(std::make_index_sequence<count>{});
}

// Held from when a call draws its turn until the group's thread has it. That thread does what it has been given in that
// order: a call whose turn comes after that of one behind it would wait for ever.
std::mutex& start_order();

// The kernels of an op of so many results and of the op that starts it. `make` has the op's arguments and returns a
// call.
template <auto make, size_t count>
struct Kernels;

template <typename Call, typename... Args, Call (*make)(Args...), size_t count>
struct Kernels<make, count> {
  static inline const char* name = nullptr;  // of the op
  static auto run(Args... args) { return outputs<count>(run_call(make(std::move(args)...))); }
  static Tensor start(Args... args) {
    std::unique_lock lock(start_order(), std::defer_lock);
    // A queued call draws no turn, and to queue it may be to wait for peers.
    if constexpr (!std::is_same_v<Call, QueuedCall>) lock.lock();
    return start_call(make(std::move(args)...), name);
  }
};

// Registers both.
template <auto make, size_t count>
void implement(torch::stable::detail::StableLibrary& library, const char* name) {
  using Both = Kernels<make, count>;
  Both::name = name;
  library.impl(name, TORCH_BOX(&Both::run));
  library.impl(str(name, "_start").c_str(), TORCH_BOX(&Both::start));
}

// The kernel of the op wait on every device. Raises Error unless `ticket` is of a call of `op` in this process, and not
// asked for before.
Results wait(Tensor ticket, GroupName op, std::vector<Tensor> arguments, int64_t num_experts, int64_t num_ranks,
             int64_t num_max, GroupName group);

// The kernel of the op arriving: what wait will return, at once if the call has made it early, and else at its end.
// The ticket stays good for one wait.
Results arriving(Tensor ticket, GroupName op, std::vector<Tensor> arguments, int64_t num_experts, int64_t num_ranks,
                 int64_t num_max, GroupName group);

}  // namespace deep_ep
