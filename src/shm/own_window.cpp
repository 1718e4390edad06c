#include "own_window.h"

#include "error.h"
#include "host_memory.h"
#include "idle.h"

namespace deep_ep {

OwnWindow::OwnWindow(const WindowLayout& at)
    : window(Window::create(at.total())),
      pool(
          at.pool, at.pool_bytes, [this](uint64_t offset, uint64_t bytes) { return reserve(offset, bytes); },
          [this](uint64_t offset, uint64_t bytes) { return window.release(offset, bytes); },
          [this] { sweep_when_idle([weak = weak_from_this()] { return sweep(weak); }); }) {
  window.reserve(0, at.attachments);
  window.mark();
  window.reserve(at.staging, at.staging_bytes);
}

std::shared_ptr<std::byte> OwnWindow::kept(Block block) {
  return {window.at(block.offset), [own = shared_from_this(), block](std::byte*) {
            if (own->process == getpid()) own->pool.give_back(block);
          }};
}

bool OwnWindow::reserve(uint64_t offset, uint64_t bytes) {
  const HostMemory memory = host_memory();
  if (bytes > memory.host.free() || (memory.cgroup && bytes > memory.cgroup->free())) return false;
  try {
    window.reserve(offset, bytes);
  } catch (const Error&) {
    return false;
  }
  return true;
}

bool OwnWindow::sweep(const std::weak_ptr<OwnWindow>& weak) {
  const std::shared_ptr<OwnWindow> own = weak.lock();
  return own && own->pool.sweep();
}

}  // namespace deep_ep
