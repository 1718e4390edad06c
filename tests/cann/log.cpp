#include <third_party/hccl/inc/hccl/hccl_types.h>

#include <atomic>
#include <cstdint>
#include <deque>
#include <string_view>
#include <utility>

#include "stand_in.h"

namespace cann {
namespace {

constexpr size_t kKept = size_t{1} << 20;

struct Log {
  std::mutex mutex;
  std::deque<std::string> lines;
  std::string recent_error;
};

// Never destroyed, like all state of the stand-in: threads of torch_npu go on while the process exits.
auto& log = *new Log;

}  // namespace

void note(const char* kind, int stream, const std::string& text) {
  const std::lock_guard lock(log.mutex);
  log.lines.push_back(std::string(kind) + " " + std::to_string(stream) + " " + text + "\n");
  if (log.lines.size() > kKept) {
    log.lines.pop_front();
  }
}

int report(const char* function, const Error& error) {
  const std::string text = std::string(function) + ": " + error.reason;
  note("error", 0, text);
  const std::lock_guard lock(log.mutex);
  log.recent_error = "CANN stand-in: " + text;
  return error.code;
}

void* new_handle() {
  static std::atomic<uintptr_t> last = 0;
  return reinterpret_cast<void*>(++last);
}

}  // namespace cann

using namespace cann;

extern "C" {

// What a label calls (labels.S).
__attribute__((visibility("hidden"))) int64_t cann_stand_in_missing(const char* name) {
  note("missing", 0, name);
  // Functions with these names return a code. Others return pointers, objects or nothing: for them 0 has to do.
  for (const auto& [prefix, code] : {std::pair{"aclrt", ACL_ERROR_RT_FEATURE_NOT_SUPPORT},
                                     {"aclmdl", ACL_ERROR_RT_FEATURE_NOT_SUPPORT},
                                     {"aclopCompile", ACL_ERROR_OP_NOT_FOUND},
                                     {"NnopbaseCreate", ACL_ERROR_RT_FEATURE_NOT_SUPPORT},
                                     {"Hccl", int{HCCL_E_NOT_SUPPORT}}}) {
    if (std::string_view(name).starts_with(prefix)) {
      return report(name, {code, "the stand-in does not have it"});
    }
  }
  return 0;
}

const char* cann_stand_in_log() {
  static thread_local std::string text;
  text.clear();
  const std::lock_guard lock(cann::log.mutex);
  for (const std::string& line : cann::log.lines) {
    text += line;
  }
  return text.c_str();
}

void cann_stand_in_clear_log() {
  const std::lock_guard lock(cann::log.mutex);
  cann::log.lines.clear();
}

const char* aclGetRecentErrMsg() {
  static thread_local std::string text;
  const std::lock_guard lock(cann::log.mutex);
  text = std::exchange(cann::log.recent_error, {});
  return text.c_str();
}

// torch_npu's own log.
void aclAppLog(aclLogLevel, const char*, const char*, uint32_t, const char*, ...) {}
}
