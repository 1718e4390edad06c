// Operations that go on while their caller does something else.
//
// `start` gives a ticket, int64 [1], and the op that is called with the ticket as its argument `started` returns the
// results, or raises what went wrong. What is started runs on a thread of its own, in its turn (src/group.h). It ends
// also if nobody asks for its results, which go with the ticket.
#pragma once

#include <functional>
#include <optional>
#include <utility>
#include <vector>

#include "arguments.h"

namespace deep_ep {

using Results = std::vector<Tensor>;

Tensor start(Op op, Turn turn, std::function<Results(Turn)> body);

// Raises Error unless `ticket` is of a start of `op` in this process, and not asked for before.
Results finish(Op op, const Tensor& ticket);

}  // namespace deep_ep
