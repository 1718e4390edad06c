#include "process.h"

#include <poll.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>

#include "proc_stat.h"

#ifndef SYS_pidfd_open
#define SYS_pidfd_open 434
#endif

namespace deep_ep {

Process::Process(int64_t pid)
    : pid_(pid),
      pidfd_(static_cast<int>(syscall(SYS_pidfd_open, pid, 0))),
      started_(pidfd_ < 0 ? ProcStat::of_process(pid).started : 0) {}

Process::~Process() {
  if (pidfd_ >= 0) close(pidfd_);
}

bool Process::has_ended() const {
  if (pidfd_ >= 0) {
    pollfd exited{pidfd_, POLLIN, 0};
    return poll(&exited, 1, 0) == 1;
  }
  const ProcStat stat = ProcStat::of_process(pid_);
  if (stat.state != 0 && started_ != 0) return stat.state == 'Z' || stat.state == 'X' || stat.started != started_;
  return kill(static_cast<pid_t>(pid_), 0) != 0 && errno == ESRCH;
}

}  // namespace deep_ep
