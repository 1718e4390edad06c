// What memory this process may still take.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

namespace deep_ep {

// Of the host, or of a memory cgroup: what takes more than its cgroup allows is killed.
struct Memory {
  std::string owner;  // in words
  uint64_t id = 0;    // the same for all processes that share it; of the host 0
  uint64_t total = 0, available = 0;

  // What may be taken of it: some is left to others.
  uint64_t free() const {
    const uint64_t others = total / 20;
    return available > others ? available - others : 0;
  }
};

struct HostMemory {
  Memory host;
  std::optional<Memory> cgroup;  // of those that this process is in and that have a limit, the one with the least left

  const Memory& scarcest() const { return cgroup && cgroup->available < host.available ? *cgroup : host; }
  uint64_t total() const { return cgroup && cgroup->total < host.total ? cgroup->total : host.total; }
};

// root: in front of /proc and of where cgroups are mounted; for tests.
HostMemory host_memory(const std::string& root = "");

}  // namespace deep_ep
