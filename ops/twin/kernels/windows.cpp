#include "windows.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <functional>
#include <stdexcept>

#include "device/window_map.h"
#include "error.h"
#include "waiting.h"

namespace twin::kernels {
namespace {

constexpr uint64_t kPage = 4096;

constexpr timespec kMillisecond{0, 1'000'000};

constexpr int kVersion = 1;  // of what ranks share

constexpr uint64_t pages(uint64_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }

}  // namespace

// And a Presence for every rank behind it.
struct Windows::Header {
  std::atomic<uint64_t> mark;  // 0 until the first rank has come
  Shared shared;
  std::atomic<int32_t> arrived;
};

uint64_t Windows::header_bytes(int size) { return sizeof(Header) + size * sizeof(Presence); }

Windows::Windows(const std::string& communicator, int rank, int size, uint64_t bytes, int64_t timeout_ms)
    : rank_(rank), size_(size), bytes_(bytes), mapped_bytes_(pages(header_bytes(size)) + size * pages(bytes)) {
  const std::string name = deep_ep::str("/ascendc_twin_", std::hash<std::string>{}(communicator));
  const auto wrong = [&](const char* what) {
    return std::runtime_error(
        deep_ep::str("cannot ", what, " ", mapped_bytes_, " bytes of shared memory: ", std::strerror(errno)));
  };
  const int file = shm_open(name.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  if (file < 0) throw wrong("open");
  const bool sized = ftruncate(file, static_cast<off_t>(mapped_bytes_)) == 0;
  void* const base = sized ? mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0) : MAP_FAILED;
  close(file);
  if (base == MAP_FAILED) throw wrong("map");
  base_ = base;

  uint64_t mark = 0;
  const uint64_t own_mark = std::hash<std::string>{}(deep_ep::str("twin ", kVersion, " ", size, " ", bytes));
  if (!static_cast<Header*>(base_)->mark.compare_exchange_strong(mark, own_mark) && mark != own_mark) {
    munmap(base_, mapped_bytes_);
    throw std::runtime_error(deep_ep::str("a rank has opened windows for the communicator ", communicator,
                                          " of another size or number, or with another version of the twin"));
  }
  enter(group());
  std::atomic<int32_t>& arrived = static_cast<Header*>(base_)->arrived;
  bool is_last = arrived.fetch_add(1) + 1 == size;
  for (int64_t looks = 0; arrived.load() < size && looks < timeout_ms; ++looks) nanosleep(&kMillisecond, nullptr);
  const bool complete = arrived.load() >= size;
  // All have it open, or it is given up.
  if (is_last || !complete) shm_unlink(name.c_str());
  if (complete) return;
  const int came = arrived.load();
  munmap(base_, mapped_bytes_);
  throw std::runtime_error(deep_ep::str("only ", came, " of ", size, " ranks have opened windows in ", timeout_ms,
                                        " ms for the communicator ", communicator));
}

Windows::~Windows() {
  leave(group());
  munmap(base_, mapped_bytes_);
}

uint8_t* Windows::window(int rank) const {
  return static_cast<uint8_t*>(base_) + pages(header_bytes(size_)) + rank * pages(bytes_);
}

std::vector<Region> Windows::regions() const {
  const deep_ep::WindowMap map{size_, static_cast<int64_t>(bytes_)};
  const auto clip = [&](int64_t offset) { return std::min(static_cast<uint64_t>(offset), bytes_); };
  const uint64_t flags = clip(deep_ep::WindowMap::kBlock), slots = clip(map.slots_begin());
  std::vector<Region> regions;
  const auto add = [&](const char* part, int rank, uint64_t begin, uint64_t end) {
    regions.push_back({window(rank) + begin, end - begin, deep_ep::str(part, " of rank ", rank), true, rank, true});
  };
  for (int rank = 0; rank < size_; ++rank) {
    add("control", rank, 0, flags);
    add("flags", rank, flags, slots);
    add("slots", rank, slots, bytes_);
  }
  return regions;
}

Group Windows::group() const {
  auto* const header = static_cast<Header*>(base_);
  return {&header->shared, reinterpret_cast<Presence*>(header + 1), size_, rank_};
}

}  // namespace twin::kernels
