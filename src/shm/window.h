// One rank's window: a memfd that its owner reserves, part by part, and peers of the same host map as a whole.
#pragma once

#include <cstddef>
#include <cstdint>

#include "window_layout.h"

namespace deep_ep {

inline constexpr const char* kAskForLess = "; ask for less with num_nvl_bytes, num_bytes or HCCL_BUFFSIZE";

class Window {
 public:
  // A new window of `bytes`, none of which may be touched before it was reserved.
  static Window create(uint64_t bytes);

  // Reserves memory. Throws, and raises no SIGBUS later, if the host or this process's cgroup has too little.
  void reserve(uint64_t offset, uint64_t bytes);

  // Gives memory back; what was in it is gone. False if that cannot be.
  bool release(uint64_t offset, uint64_t bytes);

  // Says in the window, whose beginning is reserved, that it is one, and of which version.
  void mark() { control().mark = {Mark::kMagic, Mark::kVersion}; }

  // Maps the window that process `pid` holds as file descriptor `fd`. Throws if it has no mark, or that of another
  // version.
  static Window open(int64_t pid, int64_t fd, uint64_t bytes);

  Window() = default;
  Window(Window&& other) noexcept;
  Window& operator=(Window&& other) noexcept;
  ~Window();

  std::byte* at(uint64_t offset) const { return base_ + offset; }
  Control& control() const { return *reinterpret_cast<Control*>(base_); }
  int fd() const { return fd_; }

 private:
  bool reserve_huge(uint64_t offset, uint64_t bytes);
  void close_fd();

  std::byte* base_ = nullptr;
  uint64_t bytes_ = 0;
  int fd_ = -1;
};

}  // namespace deep_ep
