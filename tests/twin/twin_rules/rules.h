// Kernels that keep or break one rule each: ops/twin/core.h numbers the rules. test_twin.py runs them.
#pragma once

#include <array>
#include <atomic>
#include <functional>
#include <string>
#include <vector>

#include "kernel_operator.h"
#include "twin.h"

namespace rules {

using namespace AscendC;

// Global memory of a run: two windows, of rank 0 (its own) and of rank 1, and tensors.
struct World {
  static constexpr uint32_t kFloats = 4096;
  alignas(512) std::array<float, kFloats> in;      // i
  alignas(512) std::array<float, kFloats> out{};   // not initialised
  alignas(512) std::array<float, kFloats> work{};  // zeros
  alignas(512) std::array<std::array<float, kFloats>, 2> windows{};
  alignas(512) std::array<int32_t, 1024> sync{};  // zeros
  int launch = 0;
  std::atomic<bool> seen{false};         // what a rule is about has happened
  std::atomic<int> caught{0}, other{0};  // lines

  World();
  template <typename T = float>
  GlobalTensor<T> tensor(void* base) {
    GlobalTensor<T> tensor;
    tensor.SetGlobalBuffer(static_cast<T*>(base));
    return tensor;
  }
  template <typename T = float>
  GlobalTensor<T> input() {
    return tensor<T>(in.data());
  }
  template <typename T = float>
  GlobalTensor<T> output() {
    return tensor<T>(out.data());
  }
  template <typename T = float>
  GlobalTensor<T> workspace() {
    return tensor<T>(work.data());
  }
  template <typename T = float>
  GlobalTensor<T> window(int rank) {
    return tensor<T>(windows[rank].data());
  }
};

// Which runs of a rule's kernel are violations; in the others it runs through.
struct Case {
  std::vector<std::string> breaks = {};  // what the violation says besides the lines; empty: there is none
  int arch = 0;                          // what has `breaks` or `seen` has it on this one only; 0: on both
  bool fast = false;                     // in fast mode as well
  int cores = 1;                         // blocks
  bool mix = false;                      // each of a cube core and two vector cores
  bool cube = false;                     // the same, and the vector cores do nothing
  int vector_cores = 0;                  // of the SoC; 0: as many as the launch has blocks
  bool together = true;                  // SetScheduleMode(1)
  int launches = 1;
  // What the kernel reports with `seen`: never, in some seed of adversarial mode, or always.
  enum Seen { kNever, kSometimes, kAlways } seen = kNever;
  bool (*result)(const World&) = nullptr;  // holds after a run without violation
};

struct Rule {
  std::string name;
  void (*kernel)(World&);
  Case expected;
};

std::vector<Rule>& all();

struct Register {
  Register(const char* name, void (*kernel)(World&), Case expected) { all().push_back({name, kernel, expected}); }
};

#define RULE(name, ...)                                                           \
  static void name(World& w);                                                     \
  static const Register name##_registered(#name, name, rules::Case{__VA_ARGS__}); \
  static void name([[maybe_unused]] World& w)
// The statement that is caught, and the one that it conflicts with.
#define CAUGHT(...) (w.caught = __LINE__, __VA_ARGS__)
#define OTHER(...) (w.other = __LINE__, __VA_ARGS__)

// Three tensors of 256 floats in the unified buffer, filled with 1 by V.
struct Tensors {
  explicit Tensors(bool fill = true) {
    pipe.InitBuffer(buffer, 3 * kBytes);
    a = buffer.GetWithOffset<float>(kCount, 0);
    b = buffer.GetWithOffset<float>(kCount, kBytes);
    c = buffer.GetWithOffset<float>(kCount, 2 * kBytes);
    if (!fill) return;
    Duplicate(buffer.Get<float>(), 1.0f, 3 * kCount);
    PipeBarrier<PIPE_ALL>();
  }
  static constexpr uint32_t kCount = 256, kBytes = kCount * sizeof(float);
  TPipe pipe;
  TBuf<> buffer;
  LocalTensor<float> a, b, c;
};

template <HardEvent event>
void order() {
  SetFlag<event>(0);
  WaitFlag<event>(0);
}

// Polls until something has come. False: it has not in so many cycles.
template <typename Poll>
bool wait(Poll has_come, int64_t cycles = int64_t{1} << 50) {
  for (const int64_t begin = GetSystemCycle(); !has_come();)
    if (GetSystemCycle() - begin > cycles) return false;
  return true;
}

template <typename T>
void clean(const GlobalTensor<T>& tensor) {
  DataCacheCleanAndInvalid<T, CacheLine::SINGLE_CACHE_LINE, DcciDst::CACHELINE_OUT>(tensor);
}

}  // namespace rules
