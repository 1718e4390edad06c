#include "copy.h"

#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace deep_ep {
namespace {

// Measured on a server with 2 MB of second-level and a few MB of third-level cache per core, shared with others:
// writing and reading past the caches is faster from about 16 MB per core on.
constexpr uint64_t kBytesPerCore = 16 << 20;

void copy_cached(std::byte* to, const std::byte* from, uint64_t bytes) { std::memcpy(to, from, bytes); }

#if defined(__x86_64__)
constexpr uint64_t kVector = 32, kLine = 64, kAhead = 1024;

__attribute__((target("avx2"))) void copy_past_caches(std::byte* to, const std::byte* from, uint64_t bytes) {
  const uint64_t head = std::min((kVector - reinterpret_cast<uintptr_t>(to) % kVector) % kVector, bytes);
  std::memcpy(to, from, head);
  uint64_t at = head;
  for (; at + kLine <= bytes; at += kLine) {
    // Rows mostly follow each other, and the hardware stops at the end of a page.
    _mm_prefetch(reinterpret_cast<const char*>(from + at + kAhead), _MM_HINT_T0);
    for (uint64_t i = at; i < at + kLine; i += kVector)
      _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i),
                          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i)));
  }
  std::memcpy(to + at, from + at, bytes - at);
}
#endif

}  // namespace

uint64_t cached_bytes() {
  static const uint64_t bytes = [] {
    const uint64_t of_cores = kBytesPerCore * std::max(std::thread::hardware_concurrency(), 1u);
    const long last_level = sysconf(_SC_LEVEL3_CACHE_SIZE);
    return last_level > 0 ? std::min(of_cores, static_cast<uint64_t>(last_level)) : of_cores;
  }();
  return bytes;
}

CopyRow* copy_row([[maybe_unused]] bool past_caches) {
#if defined(__x86_64__)
  if (past_caches && __builtin_cpu_supports("avx2")) return copy_past_caches;
#endif
  return copy_cached;
}

void copies_done([[maybe_unused]] bool past_caches) {
#if defined(__x86_64__)
  if (past_caches) _mm_sfence();
#endif
}

}  // namespace deep_ep
