// Calls whose results are asked for later.
//
// `start` and `hold` give a ticket, int64 [1] on the CPU, and the op that is called with the ticket as its argument
// `started` returns the results, or raises what went wrong. Results that nobody asks for go with the ticket.
#pragma once

#include <functional>
#include <optional>
#include <utility>
#include <vector>

#include "arguments.h"

namespace deep_ep {

using Results = std::vector<Tensor>;

// Runs `body` on a thread of its own, in its turn (src/group.h).
Tensor start(Op op, Turn turn, std::function<Results(Turn)> body);

// For results that are there already, such as those of work on a stream.
Tensor hold(Op op, Results results);

// Raises Error unless `ticket` is of a call of `op` in this process, and not asked for before.
Results finish(Op op, const Tensor& ticket);

}  // namespace deep_ep
