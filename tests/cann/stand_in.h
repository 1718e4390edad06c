// A stand-in for CANN: device memory is host memory, and what happens is written to a log that tests read.
//
// - Streams run as late as they may: a task runs when something waits for it, not before (queue.h). What a program
//   should have waited for, and did not, has therefore not happened.
// - Copies and fills must stay inside one live allocation, and new memory is full of 0xA5 (memory.cpp).
// - Some calls are forbidden while a stream is captured into a graph (graph.cpp).
// - A function that has no body here says so in the log, and is an error where it can be one (log.cpp).
//
// It follows CANN's documents in what does not wait: aclrtMemcpy and aclrtFree wait for no stream. And in what does:
// aclrtMemcpyAsync from or to host memory that is not pinned returns when the copy is done.
#pragma once

#include <acl/acl.h>

#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>

namespace cann {

// Adds a line to the log: "KIND STREAM TEXT", with stream 0 where there is none. The kinds:
//   launch   a task was put into a stream, or into the graph that captures the stream
//   run      it ran
//   sync     the host waited: for a stream, event or device, or in a copy or fill
//   malloc   device memory was allocated
//   error    something was wrong: the call, or the next synchronisation, returned an error
//   missing  a function without a body was called
void note(const char* kind, int stream, const std::string& text);

struct Error {
  int code;
  std::string reason;
};

// Notes an error, keeps it for aclGetRecentErrMsg, and returns its code.
int report(const char* function, const Error& error);

// The frame of the functions of CANN: runs `body` and makes a code of the Error that it throws.
template <typename Body>
int call(const char* function, const Body& body) {
  try {
    body();
    return ACL_SUCCESS;
  } catch (const Error& error) {
    return report(function, error);
  }
}

// Objects by handle. Handles are numbers, and no two objects of a process have the same: what is used after its
// destruction, or as something else, is found out.
void* new_handle();

template <typename T>
class Handles {
 public:
  void add(const void* handle, std::shared_ptr<T> object) {
    const std::lock_guard lock(mutex_);
    objects_[handle] = std::move(object);
  }

  // nullptr if there is no such object.
  std::shared_ptr<T> find(const void* handle) {
    const std::lock_guard lock(mutex_);
    const auto found = objects_.find(handle);
    return found == objects_.end() ? nullptr : found->second;
  }

  std::shared_ptr<T> get(const void* handle) {
    auto object = find(handle);
    return object ? object : throw Error{ACL_ERROR_RT_INVALID_HANDLE, "there is no such object"};
  }

  std::shared_ptr<T> remove(const void* handle) {
    auto object = get(handle);
    const std::lock_guard lock(mutex_);
    objects_.erase(handle);
    return object;
  }

 private:
  std::mutex mutex_;
  std::unordered_map<const void*, std::shared_ptr<T>> objects_;
};

// The device of this thread: 0 if it has set none.
int current_device();

}  // namespace cann

extern "C" {

// The lines of the log, oldest first, each with its end of line: at most the last 2^20. Valid until the thread's next
// call.
const char* cann_stand_in_log();

void cann_stand_in_clear_log();

// Puts function(argument) into a stream under a name: what a kernel is here.
aclError cann_stand_in_launch(aclrtStream stream, const char* name, void (*function)(void*), void* argument);
}
