#include "window.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <utility>

#include "error.h"
#include "host_memory.h"

namespace deep_ep {
namespace {

constexpr int kMadviseCollapse = 25;  // MADV_COLLAPSE, which older headers lack

// At an address that huge pages can be mapped to. In a process that locks all its memory (mlockall) a window is not
// locked, which would give memory to all of it: unlocked before it can be read, it is never filled.
std::byte* map(int fd, uint64_t bytes) {
  const auto failed = [bytes] {
    const int error = errno;
    rlimit locked{};
    getrlimit(RLIMIT_MEMLOCK, &locked);
    return Error(str("cannot map a window of ", bytes, " bytes: ", std::strerror(error),
                     error == EAGAIN
                         ? str("; this process locks its memory (mlockall), and may lock ", locked.rlim_cur,
                               " bytes (RLIMIT_MEMLOCK, ulimit -l), which a window has to fit into", kAskForLess)
                         : ""));
  };
  void* const room = mmap(nullptr, bytes + kHugePage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (room == MAP_FAILED) throw failed();
  munlock(room, bytes + kHugePage);
  const auto begin = reinterpret_cast<uintptr_t>(room), at = round_up(begin, kHugePage);
  void* const base = mmap(reinterpret_cast<void*>(at), bytes, PROT_NONE, MAP_SHARED | MAP_FIXED, fd, 0);
  if (base == MAP_FAILED || munlock(base, bytes) != 0 || mprotect(base, bytes, PROT_READ | PROT_WRITE) != 0) {
    const Error error = failed();
    munmap(room, bytes + kHugePage);
    throw error;
  }
  // What is not needed of the room. If it stays, it is addresses without memory.
  const uint64_t page = sysconf(_SC_PAGESIZE), behind = round_up(at + bytes, page);
  if (at > begin) munmap(room, at - begin);
  munmap(reinterpret_cast<void*>(behind), begin + kHugePage + round_up(bytes, page) - behind);
  return static_cast<std::byte*>(base);
}

// Memory for a part of a file; 0, or the error.
int allocate(int fd, uint64_t offset, uint64_t bytes) {
  int error;
  do error = bytes == 0 ? 0 : posix_fallocate(fd, static_cast<off_t>(offset), static_cast<off_t>(bytes));
  while (error == EINTR);
  return error;
}

// Its size is for ever: who could shorten it would kill all ranks that touch what is gone.
constexpr int kSeals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;

// The effective user of a process, or -1.
int64_t user_of(int64_t pid) {
  std::ifstream file(str("/proc/", pid, "/status"));
  for (std::string line; std::getline(file, line);)
    if (int64_t real, effective; std::sscanf(line.c_str(), "Uid: %ld %ld", &real, &effective) == 2) return effective;
  return -1;
}

// Why another process's window cannot be opened.
std::string closed_because(int64_t pid, int error) {
  const int64_t user = user_of(pid), own = geteuid();
  std::string reason = str("cannot open the window of process ", pid, ": ", std::strerror(error));
  if (user < 0) return reason + "; ranks must see each other in /proc";
  if (user != own)
    return reason + str("; ranks must be processes of one user: that is of user ", user, ", this of ", own);
  return reason +
         str("; it has changed its user since its program began, or is not dumpable for another reason, which hides"
             " what it has open from other processes of its user, ",
             user, "; start it as that user");
}

}  // namespace

Window Window::create(uint64_t bytes) {
  Window window;
  window.fd_ = memfd_create("deep_ep_window", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (window.fd_ < 0) throw Error(str("cannot create a window: ", std::strerror(errno)));
  if (ftruncate(window.fd_, static_cast<off_t>(bytes)) != 0)
    throw Error(str("cannot make a window of ", bytes, " bytes: ", std::strerror(errno), kAskForLess));
  if (fchmod(window.fd_, S_IRUSR | S_IWUSR) != 0 || fcntl(window.fd_, F_ADD_SEALS, kSeals) != 0)
    throw Error(str("cannot seal a window: ", std::strerror(errno)));
  window.base_ = map(window.fd_, bytes);
  window.bytes_ = bytes;
  return window;
}

void Window::reserve(uint64_t offset, uint64_t bytes) {
  // A cgroup has nothing to say when it has too little: who takes it is killed.
  const HostMemory memory = host_memory();
  if (bytes > memory.scarcest().available)
    throw Error(str("cannot reserve ", bytes, " bytes of shared memory for a window: ", memory.scarcest().owner,
                    " has only ", memory.scarcest().available, " bytes available", kAskForLess));
  if (reserve_huge(offset, bytes)) return;
  if (const int error = allocate(fd_, offset, bytes); error != 0)
    throw Error(
        str("cannot reserve ", bytes, " bytes of shared memory for a window: ", std::strerror(error), kAskForLess));
}

// In huge pages where whole ones fit: rows lie scattered over windows, and their translations would not be in any
// cache. A page each is made first, since the kernel (from 6.1 on) collapses no holes.
bool Window::reserve_huge(uint64_t offset, uint64_t bytes) {
  const uint64_t begin = round_up(offset, kHugePage), end = (offset + bytes) / kHugePage * kHugePage;
  if (begin >= end) return false;
  for (uint64_t at = begin; at < end; at += kHugePage)
    if (allocate(fd_, at, 1) != 0) return false;
  if (madvise(base_ + begin, end - begin, kMadviseCollapse) != 0) return false;
  return allocate(fd_, offset, begin - offset) == 0 && allocate(fd_, end, offset + bytes - end) == 0;
}

bool Window::release(uint64_t offset, uint64_t bytes) {
  return fallocate(fd_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, static_cast<off_t>(offset),
                   static_cast<off_t>(bytes)) == 0;
}

Window Window::open(int64_t pid, int64_t fd, uint64_t bytes) {
  const std::string path = str("/proc/", pid, "/fd/", fd);
  const int opened = ::open(path.c_str(), O_RDWR | O_CLOEXEC);
  if (opened < 0) throw Error(closed_because(pid, errno));
  Window window;
  window.fd_ = opened;
  Mark mark{};
  const bool is_window = pread(opened, &mark, sizeof mark, 0) == sizeof mark && mark.magic == Mark::kMagic;
  if (is_window && mark.version != Mark::kVersion)
    throw Error(str("the window of process ", pid, " has version ", mark.version, " of what ranks share, and this ",
                    "process has version ", Mark::kVersion, "; all ranks need the same build of deep_ep"));
  struct stat file;
  if (fstat(opened, &file) != 0)
    throw Error(str("cannot look at the window of process ", pid, ": ", std::strerror(errno)));
  if (!is_window || static_cast<uint64_t>(file.st_size) != bytes || fcntl(opened, F_GET_SEALS) != kSeals)
    throw Error(str("the descriptor ", fd, " of process ", pid, " is not the window of ", bytes,
                    " bytes that its rank has made"));
  window.base_ = map(opened, bytes);
  window.bytes_ = bytes;
  window.close_fd();
  return window;
}

Window::Window(Window&& other) noexcept { *this = std::move(other); }

Window& Window::operator=(Window&& other) noexcept {
  std::swap(base_, other.base_);
  std::swap(bytes_, other.bytes_);
  std::swap(fd_, other.fd_);
  return *this;
}

Window::~Window() {
  close_fd();
  if (base_ != nullptr) munmap(base_, bytes_);
}

void Window::close_fd() {
  if (fd_ >= 0) close(std::exchange(fd_, -1));
}

}  // namespace deep_ep
