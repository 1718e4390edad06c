// The edge to callers that know no exceptions: Python, through ctypes, and libraries that are loaded by name.
//
// Every function at it is noexcept. What can fail takes `error`, of kErrorBytes, and is `guarded`. The others do
// nothing that fails, unless there are not even a few bytes of memory left, which ends the process.
#pragma once

#include <cstddef>
#include <cstdio>
#include <exception>

#define DEEP_EP_API extern "C" __attribute__((visibility("default")))

namespace deep_ep {

constexpr size_t kErrorBytes = 512;

// Returns 0, or 1 after having written to `error` what the body has thrown.
template <typename Body>
int guarded(char* error, Body&& body) noexcept {
  try {
    body();
    return 0;
  } catch (const std::exception& wrong) {
    std::snprintf(error, kErrorBytes, "%s", wrong.what());
  } catch (...) {
    std::snprintf(error, kErrorBytes, "an exception of an unknown kind");
  }
  return 1;
}

}  // namespace deep_ep
