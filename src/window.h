// One rank's window: a memfd that its owner reserves and peers of the same host map.
#pragma once

#include <cstddef>
#include <cstdint>

#include "window_layout.h"

namespace deep_ep {

class Window {
 public:
  // A new window of `bytes`, reserved at once: a lack of memory throws here instead of raising SIGBUS later.
  static Window create(uint64_t bytes);

  // Maps the window that process `pid` holds as file descriptor `fd`.
  static Window open(int64_t pid, int64_t fd, uint64_t bytes);

  Window() = default;
  Window(Window&& other) noexcept;
  Window& operator=(Window&& other) noexcept;
  ~Window();

  std::byte* at(uint64_t offset) const { return base_ + offset; }
  Control& control() const { return *reinterpret_cast<Control*>(base_); }
  int fd() const { return fd_; }

  // Peers can no longer open the window; mappings stay.
  void close_fd();

 private:
  std::byte* base_ = nullptr;
  uint64_t bytes_ = 0;
  int fd_ = -1;
};

}  // namespace deep_ep
