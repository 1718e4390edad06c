// What has to be known of a call across its operations.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

namespace deep_ep {

// What a thread has done with operations, for calls that fail in Python (python/deep_ep/collective.py).
struct ThreadCalls {
  uint64_t entered = 0;   // operations that it has entered, or left to the thread of their group
  bool completed = true;  // the newest of them has not failed here
  // Of the call that it makes, if it makes one: why an operation has failed, here or on the thread of the group. The
  // later ones of such a call are not entered, on any rank, and fail for that reason. Read and written in the turns of
  // these operations.
  std::shared_ptr<std::string> failed;
  // What ranks must have in common in this call, in words, where an operation's post does not say it; or nothing.
  std::string form;
  // Of the operation that it enters next: 1 if nothing that it sends needs a gradient, 2 if something does; 0 where
  // that is not known: without grad mode, and in compiled code.
  int64_t gradient = 0;

  static ThreadCalls& mine() {
    thread_local ThreadCalls calls;
    return calls;
  }
};

}  // namespace deep_ep
