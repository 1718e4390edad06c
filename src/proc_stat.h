// What /proc says of a process or of a thread.
#pragma once

#include <cstdint>
#include <fstream>
#include <sstream>
#include <string>

namespace deep_ep {

struct ProcStat {
  char state = 0;        // 0: /proc shows none
  uint64_t started = 0;  // in the system's ticks: another one may get the same id

  // Of the first thread, which is as old as the process: qemu-user makes up a /proc/ID/stat of the process's own.
  static ProcStat of_process(int64_t id) {
    return ProcStat("/proc/" + std::to_string(id) + "/task/" + std::to_string(id) + "/stat");
  }

  // path: /proc/ID/stat, or /proc/ID/task/ID/stat.
  explicit ProcStat(const std::string& path) {
    std::ifstream file(path);
    std::string text;
    std::getline(file, text, '\0');  // does not throw where an iterator does: what ends meanwhile cannot be read
    const size_t name_end = text.rfind(')');  // the name, in brackets, may hold anything
    if (name_end == std::string::npos) return;
    std::istringstream words(text.substr(name_end + 1));
    std::string skipped;
    words >> state;
    for (int word = 4; word < 22; ++word) words >> skipped;
    words >> started;
  }
};

}  // namespace deep_ep
