// What there is one of in a process, and in a process that was forked from it another one.
#pragma once

#include <pthread.h>

namespace deep_ep {

// Never destroyed: tensors and threads may outlive static destruction. A forked child gets a new T and leaves its
// parent's alone: a thread that the child does not have may hold its lock, and what it lists is the parent's to close.
template <typename T>
class PerProcess {
 public:
  static T& get() {
    static const int watched = pthread_atfork(nullptr, nullptr, [] {
      instance_ = new T;
      forked_ = true;
    });
    static_cast<void>(watched);
    return *instance_;
  }

  // Whether this process was forked from one that had used its own.
  static bool forked() { return forked_; }

 private:
  static inline T* instance_ = new T;
  static inline bool forked_ = false;
};

}  // namespace deep_ep
