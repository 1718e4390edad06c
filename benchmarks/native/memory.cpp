// What the machine's memory can do, with as many threads as a rank has.
#include <algorithm>
#include <cstdint>
#include <cstring>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace {

constexpr int64_t kLine = 64;

// Runs body(begin, end) over shares of `bytes` that begin at lines.
template <typename Body>
void share(int64_t bytes, int64_t threads, const Body& body) {
  const int64_t step = (bytes / threads + kLine) / kLine * kLine;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < threads; ++i) body(std::min(bytes, i * step), std::min(bytes, (i + 1) * step));
}

}  // namespace

extern "C" {

void memory_copy(char* to, const char* from, int64_t bytes, int64_t threads) {
  share(bytes, threads, [=](int64_t begin, int64_t end) { std::memcpy(to + begin, from + begin, end - begin); });
}

// Writes `bytes`, a multiple of 64, to `to`, past the caches where the machine has stores for that, and reads them;
// returns their sum. `to` begins at a line.
int64_t memory_write_read(char* to, int64_t bytes, int64_t threads) {
  int64_t total = 0;
  share(bytes, threads, [=](int64_t begin, int64_t end) {
#ifdef __SSE2__
    const __m128i ones = _mm_set1_epi64x(1);
    for (int64_t i = begin; i < end; i += 16) _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), ones);
    _mm_sfence();
#else
    std::fill(reinterpret_cast<int64_t*>(to + begin), reinterpret_cast<int64_t*>(to + end), 1);
#endif
  });
  share(bytes, threads, [=, &total](int64_t begin, int64_t end) {
    int64_t sum = 0;
    for (int64_t i = begin; i < end; i += 8) {
      int64_t word;
      std::memcpy(&word, to + i, 8);
      sum += word;
    }
#pragma omp atomic
    total += sum;
  });
  return total;
}
}
