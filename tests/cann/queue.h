// Tasks in order, which run only when something waits for them.
//
// Everything that waits waits for a position in a queue: synchronising a stream for the stream's end, an event for
// where it was recorded; a task that waits for an event runs the other queue up to there. A stream is a queue, and so
// is what a stream brought into a captured graph, which starts again at every replay.
#pragma once

#include <acl/acl.h>

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>

namespace cann {

struct Task {
  std::string name;
  std::function<void()> run;
};

class Queue {
 public:
  explicit Queue(int stream, aclmdlRI graph = nullptr) : stream(stream), graph(graph) {}

  const int stream;      // number of its stream, for the log
  const aclmdlRI graph;  // nullptr: the queue of a stream

  // Adds a task and returns the position behind it.
  uint64_t push(const Task& task);
  uint64_t end() const;
  bool has_reached(uint64_t position) const;

  // Runs what is left before `position`, on the caller's thread, one task of a queue at a time. No lock is held while
  // a task runs.
  void run_to(uint64_t position);

  // For a query that found `position` not reached: runs one task if the query before found the same and nothing was
  // launched in between, anywhere. That is a program that asks until it likes the answer, for ever otherwise.
  void poll(uint64_t position);

  // Makes the queue of a graph start again.
  void rewind();

  // Drops what has not run.
  void abandon();

 private:
  void run_next(std::unique_lock<std::mutex>& lock);

  std::deque<Task> tasks_;  // all of them for a graph, and those that have not run for a stream
  uint64_t first_ = 0;      // the position of tasks_[0]
  uint64_t done_ = 0;
  uint64_t polled_at_ = 0;
  bool is_running_ = false;
};

struct Point {
  std::shared_ptr<Queue> queue;
  uint64_t position = 0;

  bool is_reached() const { return queue->has_reached(position); }
  void run() const { queue->run_to(position); }
};

// Throws the first error of a task that has not been thrown yet: a device tells whoever synchronises next.
void check_tasks();

}  // namespace cann
