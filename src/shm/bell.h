// Waiting between processes: a counter in shared memory that a waiter sleeps on (futex) and peers ring.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>

namespace deep_ep {

// Lives in the window of the rank that waits. All ranks of a host may ring it; only its owner sleeps on it.
struct Bell {
  std::atomic<uint32_t> rings;
  std::atomic<uint32_t> sleeping;

  // Call after the change that a waiter looks for has been stored. Who is awake sees it without.
  void ring();

  // Returns true once `ready()` holds, false after at most `milliseconds`. Yields first, then sleeps: to be woken takes
  // longer than small operations do.
  template <typename Ready>
  bool wait(Ready&& ready, int milliseconds) {
    const auto start = std::chrono::steady_clock::now();
    do {
      for (int i = 0; i < kYields; ++i) {
        if (ready()) return true;
        yield();
      }
    } while (std::chrono::steady_clock::now() - start < kAwake);
    sleeping.store(1, std::memory_order_relaxed);
    std::atomic_thread_fence(std::memory_order_seq_cst);
    const uint32_t seen = rings.load(std::memory_order_acquire);
    const bool done = ready();
    if (!done) sleep(seen, milliseconds);
    sleeping.store(0, std::memory_order_relaxed);
    return done || ready();
  }

 private:
  static constexpr std::chrono::microseconds kAwake{500};
  static constexpr int kYields = 16;

  static void yield();
  void sleep(uint32_t seen, int milliseconds);
};

}  // namespace deep_ep
