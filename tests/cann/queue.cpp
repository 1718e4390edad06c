#include "queue.h"

#include <condition_variable>
#include <optional>
#include <utility>

#include "stand_in.h"

namespace cann {
namespace {

struct State {
  std::mutex mutex;  // of all queues
  std::condition_variable changed;
  uint64_t launches = 1;
  std::optional<Error> error;
};

auto& state = *new State;

}  // namespace

uint64_t Queue::push(const Task& task) {
  note("launch", stream, task.name);
  const std::lock_guard lock(state.mutex);
  ++state.launches;
  tasks_.push_back(task);
  return first_ + tasks_.size();
}

uint64_t Queue::end() const {
  const std::lock_guard lock(state.mutex);
  return first_ + tasks_.size();
}

bool Queue::has_reached(uint64_t position) const {
  const std::lock_guard lock(state.mutex);
  return done_ >= position;
}

void Queue::run_next(std::unique_lock<std::mutex>& lock) {
  is_running_ = true;
  const Task& task = tasks_[done_ - first_];
  lock.unlock();
  note("run", stream, task.name);
  std::optional<Error> error;
  try {
    task.run();
  } catch (const Error& thrown) {
    error = {thrown.code, task.name + ": " + thrown.reason};
    report("in a stream", *error);
  }
  lock.lock();
  state.error = state.error ? state.error : error;
  ++done_;
  if (graph == nullptr) {
    tasks_.pop_front();
    ++first_;
  }
  is_running_ = false;
  state.changed.notify_all();
}

void Queue::run_to(uint64_t position) {
  std::unique_lock lock(state.mutex);
  while (done_ < position) {
    if (is_running_) {
      state.changed.wait(lock);
    } else {
      run_next(lock);
    }
  }
}

void Queue::poll(uint64_t position) {
  std::unique_lock lock(state.mutex);
  const bool is_again = std::exchange(polled_at_, state.launches) == state.launches;
  if (done_ < position && is_again && !is_running_) {
    run_next(lock);
  }
}

void Queue::rewind() {
  const std::lock_guard lock(state.mutex);
  done_ = 0;
}

void Queue::abandon() {
  std::unique_lock lock(state.mutex);
  state.changed.wait(lock, [this] { return !is_running_; });
  first_ += tasks_.size();
  done_ = first_;
  tasks_.clear();
  state.changed.notify_all();
}

void check_tasks() {
  const std::lock_guard lock(state.mutex);
  if (const auto error = std::exchange(state.error, std::nullopt)) {
    throw *error;
  }
}

}  // namespace cann
