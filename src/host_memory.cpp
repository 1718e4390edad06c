#include "host_memory.h"

#include <sys/stat.h>

#include <algorithm>
#include <fstream>
#include <map>
#include <sstream>
#include <vector>

#include "error.h"

namespace deep_ep {
namespace {

// The numbers of a file of lines with a name and a number.
std::map<std::string, uint64_t> numbers(const std::string& path) {
  std::ifstream file(path);
  std::map<std::string, uint64_t> found;
  std::string name;
  for (uint64_t number; file >> name >> number; file.ignore(1 << 10, '\n')) found[name] = number;
  return found;
}

// The number that a file holds; nothing if it does not exist, or says max.
std::optional<uint64_t> number(const std::string& path) {
  std::ifstream file(path);
  uint64_t value;
  return file >> value ? std::optional(value) : std::nullopt;
}

// How files of the two versions of memory cgroups are called.
struct Names {
  const char *limit, *used, *active, *inactive;
};
constexpr Names kV1{"/memory.limit_in_bytes", "/memory.usage_in_bytes", "total_active_file", "total_inactive_file"};
constexpr Names kV2{"/memory.max", "/memory.current", "active_file", "inactive_file"};

// Of one cgroup, whose folder is `path`.
std::optional<Memory> memory_of(const std::string& path, const std::string& name, const Names& names) {
  const std::optional<uint64_t> limit = number(path + names.limit), used = number(path + names.used);
  if (!limit || !used) return std::nullopt;
  // As the kernel counts for MemAvailable: pages of files can go.
  auto stat = numbers(path + "/memory.stat");
  const uint64_t taken = *used - std::min(*used, stat[names.active] + stat[names.inactive]);
  struct stat folder{};
  ::stat(path.c_str(), &folder);
  return Memory{str("the memory cgroup ", name), folder.st_dev << 40 ^ folder.st_ino, *limit,
                *limit - std::min(*limit, taken)};
}

// Where memory cgroups are mounted, and which of them that is.
struct Mount {
  std::string point, root;
  bool is_v2;
};

std::vector<Mount> mounts(const std::string& proc) {
  std::ifstream file(proc + "/self/mountinfo");
  std::vector<Mount> found;
  for (std::string line; std::getline(file, line);) {
    const size_t end = line.find(" - ");
    if (end == std::string::npos) continue;
    std::istringstream first(line), last(line.substr(end + 3));
    std::string id, parent, device, root, point, type, source, options;
    first >> id >> parent >> device >> root >> point;
    last >> type >> source >> options;
    if (type == "cgroup2") found.push_back({point, root, true});
    if (type == "cgroup" && str(",", options, ",").find(",memory,") != std::string::npos)
      found.push_back({point, root, false});
  }
  return found;
}

// The path of this process's cgroup in a hierarchy; / where there is none.
std::string path_in(const std::string& proc, bool is_v2) {
  std::ifstream file(proc + "/self/cgroup");
  for (std::string line; std::getline(file, line);) {
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = str(",", line.substr(first + 1, second - first - 1), ",");
    if (is_v2 ? controllers == ",," : controllers.find(",memory,") != std::string::npos) return line.substr(second + 1);
  }
  return "/";
}

}  // namespace

HostMemory host_memory(const std::string& root) {
  const std::string proc = root + "/proc";
  auto host = numbers(proc + "/meminfo");
  HostMemory memory{{"the host", 0, host["MemTotal:"] << 10, host["MemAvailable:"] << 10}, std::nullopt};
  for (const Mount& mount : mounts(proc)) {
    // In a container the mount may begin at the container's cgroup, of which the path says the rest, or nothing.
    std::string path = path_in(proc, mount.is_v2);
    if (mount.root != "/" && path.compare(0, mount.root.size(), mount.root) == 0) path.erase(0, mount.root.size());
    if (path.find("/..") != std::string::npos) path.clear();
    while (!path.empty() && path.back() == '/') path.pop_back();
    for (;; path.erase(path.rfind('/'))) {
      const std::optional<Memory> one =
          memory_of(root + mount.point + path, path.empty() ? "/" : path, mount.is_v2 ? kV2 : kV1);
      if (one && one->total < memory.host.total && (!memory.cgroup || one->available < memory.cgroup->available))
        memory.cgroup = one;
      if (path.empty()) break;
    }
  }
  return memory;
}

}  // namespace deep_ep
