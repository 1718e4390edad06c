// The window that this rank owns: its peers write to it, and its pool holds rows for as long as tensors need them.
#pragma once

#include <unistd.h>

#include <cstdint>
#include <memory>

#include "pool.h"
#include "window.h"
#include "window_layout.h"

namespace deep_ep {

// The own window with its pool. Tensors whose memory lies in it keep it alive beyond the group.
struct OwnWindow : std::enable_shared_from_this<OwnWindow> {
  explicit OwnWindow(const WindowLayout& at);

  // The memory of a block that was taken from the pool, to which it is given back when the pointer dies.
  std::shared_ptr<std::byte> kept(Block block);

  const pid_t process = getpid();  // whose pool it is: a forked child has tensors in it, too
  Window window;
  Pool pool;

 private:
  bool reserve(uint64_t offset, uint64_t bytes);
  static bool sweep(const std::weak_ptr<OwnWindow>& weak);
};

// A block of the pool, and what keeps it.
struct PoolMemory {
  Block block;
  std::shared_ptr<std::byte> memory;
};

}  // namespace deep_ep
