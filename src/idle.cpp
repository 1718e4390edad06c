#include "idle.h"

#include <pthread.h>

#include <mutex>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "per_process.h"

namespace deep_ep {
namespace {

class Sweeper {
 public:
  void add(std::function<bool()> sweep) {
    std::lock_guard lock(mutex_);
    sweeps_.push_back(std::move(sweep));
    if (runs_) return;
    std::thread([this] { run(); }).detach();
    runs_ = true;
  }

  void sweep() {
    std::vector<std::function<bool()>> due;
    {
      std::lock_guard lock(mutex_);
      due.swap(sweeps_);
    }
    std::erase_if(due, [](const auto& sweep) { return !sweep(); });
    std::lock_guard lock(mutex_);
    sweeps_.insert(sweeps_.end(), due.begin(), due.end());
  }

 private:
  void run() {
    pthread_setname_np(pthread_self(), "deep_ep_idle");
    while (true) {
      std::this_thread::sleep_for(kIdle);
      sweep();
      std::lock_guard lock(mutex_);
      if (!sweeps_.empty()) continue;
      runs_ = false;
      return;
    }
  }

  std::mutex mutex_;
  std::vector<std::function<bool()>> sweeps_;
  bool runs_ = false;
};

}  // namespace

void sweep() { PerProcess<Sweeper>::get().sweep(); }

void sweep_when_idle(std::function<bool()> sweep) noexcept {
  try {
    PerProcess<Sweeper>::get().add(std::move(sweep));
  } catch (const std::system_error&) {
    // No thread can be had: memory stays until it is used again.
  }
}

}  // namespace deep_ep
