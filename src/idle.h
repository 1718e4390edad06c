// Memory that nobody has used for a while goes back to the system, also if nobody asks for anything any more.
#pragma once

#include <chrono>
#include <functional>

namespace deep_ep {

// Longer than a training step: what the next one needs stays.
constexpr std::chrono::seconds kIdle{60};

// Calls `sweep` about every kIdle, until it returns false. It must not throw, and may run on another thread, which
// there is as long as there is something to call.
void sweep_when_idle(std::function<bool()> sweep) noexcept;

// Does now what is due every kIdle.
void sweep();

}  // namespace deep_ep
