// Where the time of operations goes.
#pragma once

#include <array>
#include <chrono>
#include <cstdint>
#include <utility>

namespace deep_ep {

enum class Phase {
  counts,    // what this rank tells of itself and reads of the others, and the checks
  wait,      // for other ranks
  allocate,  // outputs, and where each row goes
  copy,      // rows to their slots
  reduce,    // what has arrived: sums, and what goes with rows
  finish,
};
constexpr int kPhases = 6;

using Nanoseconds = std::array<int64_t, kPhases>;

class Stopwatch {
 public:
  explicit Stopwatch(Phase first) : phase_(first), since_(Clock::now()) {}

  // Time counts for `phase` from now on. Returns the one before.
  Phase enter(Phase phase) {
    const Clock::time_point now = Clock::now();
    spent_[static_cast<int>(phase_)] += std::chrono::nanoseconds(now - since_).count();
    since_ = now;
    std::swap(phase, phase_);
    return phase;
  }

  // From here on, until `resume`, time counts for nothing.
  void pause() { enter(phase_); }
  void resume() { since_ = Clock::now(); }

  const Nanoseconds& spent() const { return spent_; }

 private:
  using Clock = std::chrono::steady_clock;
  Nanoseconds spent_{};
  Phase phase_;
  Clock::time_point since_;
};

}  // namespace deep_ep
