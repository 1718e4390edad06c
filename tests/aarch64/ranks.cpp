// Ranks of one group, each a process, without Python and torch: libdeep_ep.so over stand-ins for torch's libraries.
//
//   ranks libdeep_ep.so [libdeep_ep_twin_kernels.so]
//
// Dispatch and combine, in normal mode and in low latency, with many sizes and routings; with a library of kernels, on
// an NPU's tensors, too. T local tokens, H hidden, K top-k, E experts, R ranks, N rows.
#include <dlfcn.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <cstdio>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "ops/kernels.h"
#include "torch_stand_in.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int R = 2, L = 3, E = R * L, K = 2, M = 40;
constexpr int64_t kBytes = 8 << 20;

[[noreturn]] void fail(const std::string& text) {
  std::fprintf(stderr, "%s\n", text.c_str());
  _exit(1);
}

void require(bool holds, const std::string& text) {
  if (!holds) fail(text);
}

// What ranks tell each other before they have windows.
struct Table {
  std::atomic<int> arrived[8];
  int64_t pids[R], fds[R];
  uint64_t bytes[R];

  void meet(int number) {
    arrived[number].fetch_add(1);
    while (arrived[number].load() < R) usleep(1000);
  }
};

template <typename Function>
Function* function(void* library, const char* name) {
  void* const found = dlsym(library, name);
  require(found != nullptr, std::string("there is no ") + name);
  return reinterpret_cast<Function*>(found);
}

torch::stable::Device device_of(const std::string& key) {
  return {key == "CPU" ? torch::headeronly::kCPU : torch::headeronly::kPrivateUse1, 0};
}

template <typename T>
Tensor tensor(const std::string& key, ScalarType dtype, std::vector<int64_t> sizes, const std::vector<T>& values) {
  auto* const copy = new std::vector<T>(values);
  copy->reserve(1);
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * sizes[i];
  return torch::stable::from_blob(copy->data(), sizes, strides, device_of(key), dtype, [copy](void*) { delete copy; });
}

StableIValue boxed(const std::string& text) {
  StringHandle handle;
  torch_new_string_handle(text.data(), text.size(), &handle);
  return torch::stable::detail::from(handle);
}
template <typename T>
StableIValue boxed(const T& value) {
  return torch::stable::detail::from(value);
}

template <typename... Args>
std::vector<Tensor> call(const std::string& key, const char* op, uint64_t outputs, const Args&... args) {
  std::vector<StableIValue> stack{boxed(args)...};
  stack.resize(std::max<size_t>(stack.size(), outputs));
  stand_in::find(key, op)(stack.data(), sizeof...(args), outputs);
  std::vector<Tensor> results;
  for (uint64_t i = 0; i < outputs; ++i) results.push_back(torch::stable::detail::to<Tensor>(stack[i]));
  return results;
}

// x[t] of a rank, exact in fp32: no two are the same.
float value(int rank, int64_t token, int64_t column) {
  return static_cast<float>(rank * 100000 + token * 100 + column % 64);
}

struct Round {
  int64_t T[R], H;
  std::vector<int64_t> ids[R];
  std::vector<float> weights[R];
  std::string text;
};

Round make_round(std::mt19937& random, int number, int64_t most, int64_t H) {
  Round round{{}, H, {}, {}, "round " + std::to_string(number) + ": "};
  for (int r = 0; r < R; ++r) {
    round.T[r] = random() % (most + 1);
    for (int64_t t = 0; t < round.T[r]; ++t) {
      const int64_t first = random() % E;
      const bool has_second = random() % 4 != 0;
      round.ids[r].insert(round.ids[r].end(), {first, has_second ? (first + 1 + random() % (E - 1)) % E : -1});
      round.weights[r].insert(round.weights[r].end(), {0.5f, 0.25f});
    }
  }
  return round;
}

// Rows that a rank receives: every one is that of its source, and each source's are there.
void check_rows(const Round& round, int rank, const float* rows, const int32_t* sources, int64_t N, int64_t expected) {
  int64_t found = 0;
  for (int64_t n = 0; n < N; ++n) {
    const int32_t *source = sources + 3 * n, s = source[0], t = source[1], k = source[2];
    if (s < 0) continue;
    ++found;
    require(round.ids[s][t * K + k] / L == rank, round.text + "a row is of another rank");
    for (int64_t h = 0; h < round.H; ++h)
      require(rows[n * round.H + h] == value(s, t, h), round.text + "a row is not what was sent");
  }
  require(found == expected, round.text + std::to_string(found) + " rows instead of " + std::to_string(expected));
}

// What comes back: every token, times the sum of its weights.
void check_tokens(const Round& round, int rank, const std::string& op, const float* out) {
  for (int64_t t = 0; t < round.T[rank]; ++t) {
    const float sum = round.ids[rank][t * K + 1] < 0 ? 0.5f : 0.75f;
    for (int64_t h = 0; h < round.H; ++h)
      require(out[t * round.H + h] == sum * value(rank, t, h), round.text + op + ": a token is not what was combined");
  }
}

// `check` raises what a kernel has to say.
void run(
    const std::string& key, const std::string& group, int rank, int number, const Round& round, bool exact,
    const std::function<void()>& check = [] {}) {
  const int64_t T = round.T[rank], H = round.H;
  std::vector<float> x(T * H);
  for (int64_t i = 0; i < T * H; ++i) x[i] = value(rank, i / H, i % H);
  int64_t expected = 0;
  for (int s = 0; s < R; ++s)
    for (const int64_t id : round.ids[s]) expected += id >= 0 && id / L == rank;
  const Tensor rows = tensor(key, ScalarType::Float, {T, H}, x),
               ids = tensor(key, ScalarType::Long, {T, K}, round.ids[rank]),
               weights = tensor(key, ScalarType::Float, {T, K}, round.weights[rank]);
  const int64_t W = exact ? 0 : std::max<int64_t>(expected, 1) + number % 5;
  const int64_t experts = E, ranks = R, most = M;

  const auto out = call(key, "dispatch", 10, rows, ids, weights, experts, ranks, W, group);
  check();
  check_rows(round, rank, out[0].const_data_ptr<float>(), out[8].const_data_ptr<int32_t>(), out[0].size(0), expected);
  const auto back = call(key, "combine", 1, out[0], ids, weights, out[8], out[9], experts, ranks, group);
  check();
  check_tokens(round, rank, "combine", back[0].const_data_ptr<float>());
  if (std::max(round.T[0], round.T[1]) > M) return;
  const std::string none;
  const bool zero_unused = number % 2 == 0;
  const auto low = call(key, "low_latency_dispatch", 5, rows, ids, most, experts, ranks, group, none, zero_unused);
  check();
  check_rows(round, rank, low[0].const_data_ptr<float>(), low[2].const_data_ptr<int32_t>(), low[0].size(0), expected);
  const auto again =
      call(key, "low_latency_combine", 1, low[0], ids, weights, low[2], low[3], low[4], experts, ranks, group, none);
  check();
  check_tokens(round, rank, "low_latency_combine", again[0].const_data_ptr<float>());
}

void work(int rank, Table& table, const char* path, const char* kernels) {
  void* const library = dlopen(path, RTLD_NOW | RTLD_GLOBAL);
  if (library == nullptr) fail(dlerror());
  char error[512] = "";
  void* const group = function<void*(int, int, uint64_t, int64_t, char*)>(library, "deep_ep_group_create")(
      rank, R, kBytes, 60'000, error);
  require(group != nullptr, error);
  table.pids[rank] = getpid();
  table.fds[rank] = function<int(void*)>(library, "deep_ep_group_fd")(group);
  table.bytes[rank] = function<uint64_t(void*)>(library, "deep_ep_group_bytes")(group);
  table.meet(0);
  const int failed = function<int(void*, const int64_t*, const int64_t*, const uint64_t*, char*)>(
      library, "deep_ep_group_connect")(group, table.pids, table.fds, table.bytes, error);
  require(failed == 0, error);
  function<void(void*, const char*)>(library, "deep_ep_group_publish")(group, "cpu");
  table.meet(1);
  std::mt19937 random(0);
  for (int number = 0; number < 60; ++number) {
    // Attached to posts, in one piece, and in rounds through small windows.
    const bool large = number % 20 == 19;
    run("CPU", "cpu", rank, number, make_round(random, number, large ? 3000 : M, large ? 512 : 48), number % 2 == 0);
  }
  std::printf("rank %d: 60 rounds on CPU, with pages of %ld bytes\n", rank, sysconf(_SC_PAGESIZE));

  if (kernels != nullptr) {
    require(function<int(const char*, char*)>(library, "deep_ep_npu_load")(kernels, error) == 0, error);
    std::vector<int64_t> words(DEEP_EP_TABLE_HEADER + R);
    require(function<int(const char*, const char*, int32_t, int32_t, uint64_t, int64_t, int64_t*, char*)>(
                library, "deep_ep_npu_open_windows")("npu", ("ranks" + std::to_string(getppid())).c_str(), rank, R,
                                                     kBytes, 60'000, words.data(), error) == 0,
            error);
    function<void(const char*, int64_t, const int64_t*, void*)>(library, "deep_ep_npu_publish_windows")(
        "npu", R, words.data(), words.data());
    table.meet(2);
    for (int number = 0; number < 4; ++number) {
      run("PrivateUse1", "npu", rank, number, make_round(random, number, 12, 48), false, [&] {
        require(function<int(const int64_t*, char*)>(library, "deep_ep_npu_check")(words.data(), error) == 0, error);
      });
    }
    std::printf("rank %d: 4 rounds of the kernels on the twin\n", rank);
    table.meet(3);
  }
  std::fflush(stdout);
  table.meet(4);
  function<void(void*, const char*)>(library, "deep_ep_group_destroy")(group, "cpu");
}

}  // namespace

int main(int argc, char** argv) {
  require(argc > 1, "ranks libdeep_ep.so [libdeep_ep_twin_kernels.so]");
  void* const shared = mmap(nullptr, sizeof(Table), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  Table& table = *new (shared) Table{};
  std::vector<pid_t> ranks;
  for (int rank = 0; rank < R; ++rank) {
    ranks.push_back(fork());
    if (ranks.back() != 0) continue;
    try {
      work(rank, table, argv[1], argc > 2 ? argv[2] : nullptr);
    } catch (const std::exception& wrong) {
      fail(wrong.what());
    }
    _exit(0);
  }
  int result = 0;
  for (size_t i = 0; i < ranks.size(); ++i) {
    int status;
    wait(&status);
    if (status == 0) continue;
    // The others would wait for it.
    if (result == 0)
      for (const pid_t rank : ranks) kill(rank, SIGTERM);
    result = 1;
  }
  return result;
}
