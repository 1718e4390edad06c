// Streams, and what their capture into graphs forbids.
#pragma once

#include <memory>
#include <mutex>

#include "queue.h"
#include "stand_in.h"

namespace cann {

struct Stream {
  const int number;  // its handle
  const int device;
  const std::shared_ptr<Queue> own;
  std::shared_ptr<Queue> target;  // where its tasks go: `own`, or its queue in the graph that it is captured into
};

// Guards the targets of streams, the records of events, and graphs. Never held while a task runs.
std::mutex& capture_mutex();

// Throws if there is none. The stream of nullptr is the default stream of the current device.
std::shared_ptr<Stream> get_stream(aclrtStream handle);

// Puts a task into a stream, and returns the point behind it.
Point launch(aclrtStream handle, const Task& task);

// Returns when the task has run.
void launch_and_wait(aclrtStream handle, const Task& task);

// Runs what is left in the streams of `device`, or of all (-1).
void drain(int device);

// Defined in graph.cpp. The checks throw, and spoil the capture, if it forbids what the caller is about to do.
void check_is_safe();                      // something that the modes of captures and threads are about
void check_nothing_is_captured();          // something that concerns the whole current device
void check_is_not_captured(const Queue&);  // something with this queue
// With capture_mutex() held: makes `stream` wait for `point`, which takes it into the graph that the point lies in.
void wait_for(const std::shared_ptr<Stream>& stream, const Point& point);

}  // namespace cann
