#include "window.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <fstream>
#include <utility>

#include "error.h"

namespace deep_ep {
namespace {

std::byte* map(int fd, uint64_t bytes) {
  void* base = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (base == MAP_FAILED) throw Error(str("cannot map a window of ", bytes, " bytes: ", std::strerror(errno)));
  return static_cast<std::byte*>(base);
}

}  // namespace

Window Window::create(uint64_t bytes) {
  Window window;
  window.fd_ = memfd_create("deep_ep_window", MFD_CLOEXEC);
  if (window.fd_ < 0) throw Error(str("cannot create a window: ", std::strerror(errno)));
  if (ftruncate(window.fd_, static_cast<off_t>(bytes)) != 0)
    throw Error(str("cannot make a window of ", bytes, " bytes: ", std::strerror(errno), kAskForLess));
  window.base_ = map(window.fd_, bytes);
  window.bytes_ = bytes;
  return window;
}

void Window::reserve(uint64_t offset, uint64_t bytes) {
  int error;
  do error = posix_fallocate(fd_, static_cast<off_t>(offset), static_cast<off_t>(bytes));
  while (error == EINTR);
  if (error != 0)
    throw Error(
        str("cannot reserve ", bytes, " bytes of shared memory for a window: ", std::strerror(error), kAskForLess));
}

Window Window::open(int64_t pid, int64_t fd, uint64_t bytes) {
  const std::string path = str("/proc/", pid, "/fd/", fd);
  const int opened = ::open(path.c_str(), O_RDWR | O_CLOEXEC);
  if (opened < 0)
    throw Error(str("cannot open the window of process ", pid, ": ", std::strerror(errno),
                    "; ranks must be processes of one user that see each other in /proc"));
  Window window;
  window.fd_ = opened;
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

HostMemory host_memory() {
  std::ifstream file("/proc/meminfo");
  HostMemory memory{};
  std::string name;
  for (uint64_t kilobytes; file >> name >> kilobytes; file.ignore(kLine, '\n')) {
    if (name == "MemTotal:") memory.total = kilobytes << 10;
    if (name == "MemAvailable:") memory.available = kilobytes << 10;
  }
  return memory;
}

}  // namespace deep_ep
