#include "process.h"

#include <poll.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <fstream>
#include <sstream>

#include "error.h"

namespace deep_ep {
namespace {

#ifndef SYS_pidfd_open
#define SYS_pidfd_open 434
#endif

struct Status {
  char state = 0;  // 0: /proc does not say it
  std::string started;
};

// Its name, in brackets, may hold anything; behind it are single words, of which these are the first and the 20th.
Status status_of(int64_t pid) {
  std::ifstream file(str("/proc/", pid, "/stat"));
  std::string text, word;
  std::getline(file, text, '\0');
  Status status;
  std::istringstream words(text.substr(text.rfind(')') + 1));
  for (int i = 1; i <= 20 && words >> word; ++i) {
    if (i == 1) status.state = word[0];
    if (i == 20) status.started = word;
  }
  return status;
}

}  // namespace

Process::Process(int64_t pid)
    : pid_(pid),
      pidfd_(static_cast<int>(syscall(SYS_pidfd_open, pid, 0))),
      started_(pidfd_ < 0 ? status_of(pid).started : "") {}

Process::~Process() {
  if (pidfd_ >= 0) close(pidfd_);
}

bool Process::has_ended() const {
  if (pidfd_ >= 0) {
    pollfd exited{pidfd_, POLLIN, 0};
    return poll(&exited, 1, 0) == 1;
  }
  const Status status = status_of(pid_);
  if (status.state != 0 && !started_.empty())
    return status.state == 'Z' || status.state == 'X' || status.started != started_;
  return kill(static_cast<pid_t>(pid_), 0) != 0 && errno == ESRCH;
}

}  // namespace deep_ep
