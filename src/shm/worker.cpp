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

void Worker::run(std::shared_ptr<Task> task) {
  std::lock_guard own(mutex_);
  if (!queue_) {
    auto queue = std::make_shared<Queue>();
    std::thread(work, queue).detach();
    queue_ = std::move(queue);
  }
  {
    std::lock_guard lock(queue_->mutex);
    queue_->tasks.push_back(std::move(task));
  }
  queue_->changed.notify_one();
}

void Worker::work(std::shared_ptr<Queue> queue) {
  pthread_setname_np(pthread_self(), "deep_ep");
  while (true) {
    std::shared_ptr<Task> task;
    {
      std::unique_lock lock(queue->mutex);
      queue->changed.wait(lock, [&] { return !queue->tasks.empty() || queue->closed; });
      if (queue->tasks.empty()) return;
      task = std::move(queue->tasks.front());
      queue->tasks.pop_front();
    }
    task->run();
  }
}

}  // namespace deep_ep
