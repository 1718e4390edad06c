// What has to be known of a call across its operations.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>

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
  // that is not known: in compiled code, which runs without grad mode, and so of an op that is called by itself there.
  int64_t gradient = 0;
  // The same of the others of the call that it makes.
  int64_t gradient_of_call = 0;

  int64_t take_gradient() {
    const int64_t next = std::exchange(gradient, 0);
    return next != 0 ? next : gradient_of_call;
  }

  static ThreadCalls& mine() {
    thread_local ThreadCalls calls;
    return calls;
  }
};

}  // namespace deep_ep
