// Calls whose results are asked for later.
//
// `<op>_start(arguments)` begins a call of `op` and returns a ticket, fp64 [1] on the CPU; the op wait, called with the
// ticket, returns the results, or raises what went wrong. The op arriving, called before it, returns the same results
// while the call still writes to their memory, behind torch's back. Results that nobody asks for go with the ticket.
#pragma once

#include <exception>
#include <future>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "arguments.h"
#include "shm/thread_calls.h"

namespace deep_ep {

using Results = std::vector<Tensor>;

// Runs `body` on the thread of the group, in its turn (src/shm/group.h). It keeps the tensors that it was given alive,
// and the caller must not write to them before the wait. `early`: the tensors that `body` returns, where they can be
// made before the call; until it has ended, what they hold is undefined, and if it fails it stays so. `name`: what wait
// knows the op by.
Tensor start(Op op, Turn turn, Results early, std::packaged_task<Results(Turn)> body, const char* name);

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

// Makes values out of nothing: all bytes are 0xFF, a NaN in every format.
void spoil(const Results& results);

template <typename Body>
Tensor start(Op op, Turn turn, Results early, Body body, const char* name = nullptr) {
  ThreadCalls& calls = ThreadCalls::mine();
  auto of_call = [early, failed = calls.failed, form = calls.form, gradient = std::exchange(calls.gradient, 0),
                  body = std::move(body)](Turn turn) mutable {
    ThreadCalls::mine().failed = failed;
    ThreadCalls::mine().form = form;
    ThreadCalls::mine().gradient = gradient;
    try {
      return body(std::move(turn));
    } catch (...) {
      spoil(early);
      throw;
    }
  };
  Tensor ticket = start(op, std::move(turn), std::move(early), std::packaged_task<Results(Turn)>(std::move(of_call)),
                        name != nullptr ? name : name_of(op));
  ++calls.entered;
  calls.completed = true;
  return ticket;
}

// For results that are there already, such as those of work on a stream.
Tensor hold(Op op, Results results);

// The kernel of the op wait on every device. Raises Error unless `ticket` is of a call of `op` in this process, and not
// asked for before.
Results wait(Tensor ticket, GroupName op, std::vector<Tensor> arguments, int64_t num_experts, int64_t num_ranks,
             int64_t num_max, GroupName group);

// The kernel of the op arriving: what wait will return, at once if the call has made it early, and else at its end.
// The ticket stays good for one wait.
Results arriving(Tensor ticket, GroupName op, std::vector<Tensor> arguments, int64_t num_experts, int64_t num_ranks,
                 int64_t num_max, GroupName group);

}  // namespace deep_ep
