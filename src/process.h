// Another process of this host, to see whether it has ended.
#pragma once

#include <cstdint>

namespace deep_ep {

class Process {
 public:
  explicit Process(int64_t pid);
  Process(const Process&) = delete;
  ~Process();

  bool has_ended() const;

 private:
  const int64_t pid_;
  const int pidfd_;         // -1: this system has none (before Linux 5.3), or a sandbox does not give it
  const uint64_t started_;  // instead: when that was (ProcStat); 0 where /proc does not say it
};

}  // namespace deep_ep
