// Calls whose results are asked for later.
//
// `<op>_start(arguments)` begins a call of `op` and returns a ticket, fp64 [1] on the CPU; the op wait, called with the
// ticket, returns the results, or raises what went wrong. Results that nobody asks for go with the ticket.
#pragma once

#include <future>
#include <string>
#include <utility>
#include <vector>

#include "arguments.h"

namespace deep_ep {

using Results = std::vector<Tensor>;

// Runs `body` on the thread of the group, in its turn (src/group.h). The caller may write to its tensors as soon as
// this returns, so `body` has copies.
Tensor start(Op op, Turn turn, std::packaged_task<Results(Turn)> body);

template <typename Body>
Tensor start(Op op, Turn turn, Body body) {
  ThreadCalls& calls = ThreadCalls::mine();
  auto of_call = [failed = calls.failed, form = calls.form, body = std::move(body)](Turn turn) mutable {
    ThreadCalls::mine().form = form;
    if (failed && !failed->empty()) throw Error(*failed);
    try {
      return body(std::move(turn));
    } catch (const std::exception& error) {
      if (failed) *failed = error.what();
      throw;
    }
  };
  Tensor ticket = start(op, std::move(turn), std::packaged_task<Results(Turn)>(std::move(of_call)));
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

}  // namespace deep_ep
