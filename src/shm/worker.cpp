#include "worker.h"

#include <pthread.h>

#include <exception>
#include <thread>
#include <utility>

#include "per_process.h"

namespace deep_ep {
namespace {

struct Exit {
  std::mutex mutex;
  bool begun = false;
};

void drop(std::packaged_task<void()> done) {
  Exit& exit = PerProcess<Exit>::get();
  std::lock_guard lock(exit.mutex);
  if (exit.begun)
    new std::packaged_task<void()>(std::move(done));
  else
    done = {};
}

}  // namespace

void keep_tasks() {
  Exit& exit = PerProcess<Exit>::get();
  std::lock_guard lock(exit.mutex);
  exit.begun = true;
}

bool Worker::Task::run() {
  if (begun_.exchange(true)) return false;
  std::future<void> outcome = body_.get_future();
  body_();
  std::exception_ptr error;
  try {
    outcome.get();  // and lets go of what it shares with the body
  } catch (...) {
    error = std::current_exception();
  }
  drop(std::exchange(body_, {}));
  if (error) std::rethrow_exception(error);
  return true;
}

Worker::~Worker() {
  if (!queue_) return;
  {
    std::lock_guard lock(queue_->mutex);
    queue_->closed = true;
  }
  queue_->changed.notify_one();
}

void Worker::run(std::shared_ptr<Task> task) { add(std::move(task), true); }

void Worker::leave(std::shared_ptr<Task> task) { add(std::move(task), false); }

void Worker::hurry() {
  std::lock_guard own(mutex_);
  if (!queue_) return;
  {
    std::lock_guard lock(queue_->mutex);
    if (queue_->next() == nullptr) return;
    queue_->hurries = true;
  }
  queue_->changed.notify_one();
}

void Worker::add(std::shared_ptr<Task> task, bool hurries) {
  std::lock_guard own(mutex_);
  if (!queue_) {
    auto queue = std::make_shared<Queue>();
    std::thread(work, queue).detach();
    queue_ = std::move(queue);
  }
  bool sleeps;
  {
    std::lock_guard lock(queue_->mutex);
    queue_->next();  // lets go of what is done
    queue_->tasks.push_back(std::move(task));
    queue_->hurries = queue_->hurries || hurries;
    sleeps = hurries || !queue_->looks;
  }
  if (sleeps) queue_->changed.notify_one();
}

Worker::Task* Worker::Queue::next() {
  while (!tasks.empty() && tasks.front()->has_begun()) pop();
  return tasks.empty() ? nullptr : tasks.front().get();
}

std::shared_ptr<Worker::Task> Worker::Queue::pop() {
  std::shared_ptr<Task> first = std::move(tasks.front());
  tasks.pop_front();
  ++popped;
  return first;
}

void Worker::work(std::shared_ptr<Queue> queue) {
  pthread_setname_np(pthread_self(), "deep_ep");
  std::unique_lock lock(queue->mutex);
  constexpr uint64_t kNone = ~uint64_t{0};
  uint64_t left = kNone;  // the number of the first task, if that was there when the thread has looked
  uint64_t added = 0;     // how many there had been by then
  while (true) {
    const bool has_next = queue->next() != nullptr;
    if (has_next && (queue->hurries || queue->closed || left == queue->popped)) {
      std::shared_ptr<Task> task = queue->pop();
      lock.unlock();
      task->run();
      task.reset();
      lock.lock();
      continue;
    }
    if (!has_next && queue->closed) return;
    queue->hurries = false;
    const auto is_woken = [&] { return queue->hurries || queue->closed; };
    if (has_next || queue->added() != added) {
      left = has_next ? queue->popped : kNone;
      added = queue->added();
      queue->looks = true;
      queue->changed.wait_for(lock, kPatience, is_woken);
      queue->looks = false;
    } else {
      queue->changed.wait(lock, [&] { return is_woken() || queue->added() != added; });
    }
  }
}

}  // namespace deep_ep
