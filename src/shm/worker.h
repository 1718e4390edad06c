// A thread that works off what it is given, in that order.
#pragma once

#include <condition_variable>
#include <deque>
#include <future>
#include <memory>
#include <mutex>

namespace deep_ep {

// The thread begins with the first task and ends with the worker, after the tasks that it has been given. Nobody waits
// for it, neither the destructor, which a task may be the one to call, nor a process that exits.
class Worker {
 public:
  using Task = std::packaged_task<void()>;

  ~Worker();

  void run(Task task);

 private:
  struct Queue {
    std::mutex mutex;
    std::condition_variable changed;
    std::deque<Task> tasks;
    bool closed = false;
  };

  static void work(std::shared_ptr<Queue> queue);

  std::mutex mutex_;
  std::shared_ptr<Queue> queue_;  // nullptr: no thread yet
};

// From now on no worker destroys a task that it has done; returns when none is about to. For the end of a process:
// tensors in a task may be Python's, and CPython before 3.14 ends a thread that asks for its lock while it finalizes,
// which takes the process down.
void keep_tasks();

}  // namespace deep_ep
