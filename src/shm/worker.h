// A thread that works off what it is given, in that order, but for what somebody needs before it has begun with that.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <future>
#include <memory>
#include <mutex>
#include <utility>

namespace deep_ep {

// The thread begins with the first task and ends with the worker, after the tasks that it has been given. Nobody waits
// for it, neither the destructor, which a task may be the one to call, nor a process that exits.
class Worker {
 public:
  // What is done once, by the first thread that asks for it.
  class Task {
   public:
    explicit Task(std::packaged_task<void()> body) : body_(std::move(body)) {}

    // Does it, and throws what it throws; nothing where a thread has begun with it. Returns whether it has done it.
    bool run();

    bool has_begun() const { return begun_; }

   private:
    std::atomic<bool> begun_ = false;
    std::packaged_task<void()> body_;  // and what it holds, until it is done
  };

  ~Worker();

  // The thread does it as soon as it can, after what it was given before.
  void run(std::shared_ptr<Task> task);

  // Somebody is expected to do it soon. The thread does if nobody has for a while, or is in a hurry: to wake it takes
  // longer than small tasks do.
  void leave(std::shared_ptr<Task> task);

  // What was left is needed.
  void hurry();

 private:
  // After one to two of these the thread does what was left. It looks as often while there is something, and sleeps
  // when there was nothing for as long.
  static constexpr std::chrono::milliseconds kPatience{2};

  struct Queue {
    std::mutex mutex;
    std::condition_variable changed;
    std::deque<std::shared_ptr<Task>> tasks;  // somebody may have begun with the first ones
    uint64_t popped = 0;                      // that were in there, and are not any more
    bool hurries = false;                     // with what is in there
    bool looks = false;                       // the thread wakes up by itself
    bool closed = false;

    uint64_t added() const { return popped + tasks.size(); }
    // The first one that nobody has begun with; nullptr if there is none.
    Task* next();
    std::shared_ptr<Task> pop();
  };

  void add(std::shared_ptr<Task> task, bool hurries);
  static void work(std::shared_ptr<Queue> queue);

  std::mutex mutex_;
  std::shared_ptr<Queue> queue_;  // nullptr: no thread yet
};

// From now on no thread destroys a task that it has done; returns when none is about to. For the end of a process:
// tensors in a task may be Python's, and CPython before 3.14 ends a thread that asks for its lock while it finalizes,
// which takes the process down.
void keep_tasks();

}  // namespace deep_ep
