// Whose turn it is: what is done with one thing by several threads, in the order in which it was asked for.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>

namespace deep_ep {

class Turns {
 public:
  uint64_t draw() {
    std::lock_guard lock(mutex_);
    return drawn_++;
  }

  // Whether all turns drawn before `number` have ended.
  bool has_come(uint64_t number) {
    std::lock_guard lock(mutex_);
    return ended_ == number;
  }

  // Returns true once all turns drawn before `number` have ended, false after at most `milliseconds`.
  bool wait_for(uint64_t number, int milliseconds) {
    std::unique_lock lock(mutex_);
    return ended_one_.wait_for(lock, std::chrono::milliseconds(milliseconds), [&] { return ended_ == number; });
  }

  // Until all turns drawn so far have ended, or for so long. False: they have not.
  bool end_within(std::chrono::milliseconds time) {
    std::unique_lock lock(mutex_);
    return ended_one_.wait_for(lock, time, [&, drawn = drawn_] { return ended_ >= drawn; });
  }

  // Ends the turn that wait_for() has waited for.
  void end() {
    {
      std::lock_guard lock(mutex_);
      ++ended_;
    }
    ended_one_.notify_all();
  }

 private:
  std::mutex mutex_;
  std::condition_variable ended_one_;
  uint64_t drawn_ = 0;
  uint64_t ended_ = 0;
};

}  // namespace deep_ep
