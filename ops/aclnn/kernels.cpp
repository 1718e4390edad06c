// The kernels of ops/ through CANN (kernels.h): libdeep_ep_kernels.so.
//
// For every operator definition CANN's op_build generates two functions into the operator package's libcust_opapi.so:
// aclnnDeepEpDispatchGetWorkspaceSize(inputs..., attributes..., outputs..., &bytes, &executor) checks and tiles, and
// aclnnDeepEpDispatch(workspace, bytes, executor, stream) launches. A call of this interface has its arguments in the
// same order, so one function serves all operators.
#include <acl/acl.h>
#include <aclnn/acl_meta.h>
#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <filesystem>
#include <memory>
#include <string_view>
#include <utility>

#include "ops/kernel_library.h"
#include "windows.h"

extern "C" aclError aclrtGetOpExecuteTimeout(uint32_t* milliseconds) __attribute__((weak));

namespace deep_ep::aclnn {
namespace {

// Equal file names of other packages must not answer: the path is that of the package beside this library.
void* package() {
  static void* const library = [] {
    Dl_info self{};
    dladdr(reinterpret_cast<void*>(&package), &self);
    const std::filesystem::path folder = std::filesystem::absolute(self.dli_fname).parent_path();
    const std::string path = folder / "opp/vendors/deep_ep/op_api/lib/libcust_opapi.so";
    void* const opened = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (opened == nullptr) throw Error(str("the operator package cannot be loaded: ", dlerror()));
    return opened;
  }();
  return library;
}

void* find(const std::string& name) {
  void* const found = dlsym(package(), name.c_str());
  if (found == nullptr) throw Error(str("the operator package has no function ", name));
  return found;
}

[[noreturn]] void fail(const std::string& function, int status) {
  const char* text = aclGetRecentErrMsg();
  throw Error(str(function, " failed: ", status, text != nullptr ? ": " : "", text != nullptr ? text : ""));
}

// An argument of a first function: a pointer or an int64_t. In the calling conventions of x86_64 and of aarch64 both
// take one register or one slot of the stack, the same one whichever it is, so their number is all of the signature.
using Word = uint64_t;
constexpr size_t kMaxWords = 32;

template <size_t>
using WordAt = Word;

template <size_t... I>
int call_with(void* function, const Word* words, std::index_sequence<I...>) {
  return reinterpret_cast<int (*)(WordAt<I>...)>(function)(words[I]...);
}

template <size_t... N>
int call_any(void* function, const std::vector<Word>& words, std::index_sequence<N...>) {
  using Call = int (*)(void*, const Word*);
  static constexpr std::array<Call, sizeof...(N)> calls = {
      [](void* f, const Word* w) { return call_with(f, w, std::make_index_sequence<N>{}); }...};
  if (words.size() >= calls.size()) throw Error(str(words.size(), " arguments are too many"));
  return calls[words.size()](function, words.data());
}

int call(void* function, const std::vector<Word>& words) {
  return call_any(function, words, std::make_index_sequence<kMaxWords + 1>{});
}

template <typename T>
Word word(T value) {
  if constexpr (std::is_pointer_v<T>)
    return reinterpret_cast<Word>(value);
  else
    return static_cast<Word>(value);
}

struct Plan {
  using Launch = int (*)(void* workspace, uint64_t bytes, aclOpExecutor* executor, aclrtStream stream);

  std::string name;
  std::string group;  // the executor points to it
  Launch run = nullptr;
  uint64_t workspace_bytes = 0;
  aclOpExecutor* executor = nullptr;  // used up by `run`
  std::vector<aclTensor*> tensors;
  aclIntArray* value = nullptr;

  Plan() = default;
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;
  ~Plan() {
    for (aclTensor* tensor : tensors) aclDestroyTensor(tensor);
    if (value != nullptr) aclDestroyIntArray(value);
  }

  Word add(const DeepEpTensor& tensor) {
    std::array<int64_t, DEEP_EP_MAX_DIMS> strides{};
    int64_t elements = 1;
    for (int32_t i = tensor.num_dims - 1; i >= 0; --i) {
      strides[i] = elements;
      elements *= tensor.sizes[i];
    }
    aclTensor* made = aclCreateTensor(tensor.sizes, tensor.num_dims, static_cast<aclDataType>(tensor.dtype),
                                      strides.data(), 0, ACL_FORMAT_ND, &elements, 1, tensor.data);
    if (made == nullptr) fail("aclCreateTensor", 0);
    tensors.push_back(made);
    return word(made);
  }

  Word add(int64_t number) {
    value = aclCreateIntArray(&number, 1);
    if (value == nullptr) fail("aclCreateIntArray", 0);
    return word(value);
  }
};

std::unique_ptr<Plan> plan(const DeepEpCall& op_call) {
  auto plan = std::make_unique<Plan>();
  plan->name = "aclnn" + definition_name(op_call.op);
  plan->group = op_call.group;
  plan->run = reinterpret_cast<Plan::Launch>(find(plan->name));
  const bool communicates = !plan->group.empty();

  // In capacity mode the last number is an input of the definition, behind the others and before the windows. The
  // tiling needs its value, so that aclnn wants it from the host.
  const std::string_view op = op_call.op;
  const bool is_capacity_mode = op == "dispatch" || op == "dispatch_int8";
  const int32_t num_attributes = op_call.num_integers - is_capacity_mode;
  std::vector<Word> words;
  for (int32_t i = 0; i < op_call.num_inputs; ++i) {
    if (is_capacity_mode && i == op_call.num_inputs - 1) words.push_back(plan->add(op_call.integers[num_attributes]));
    words.push_back(plan->add(op_call.inputs[i]));
  }
  if (communicates) words.push_back(word(plan->group.data()));
  for (int32_t i = 0; i < num_attributes; ++i) words.push_back(word(op_call.integers[i]));
  for (int32_t i = 0; i < op_call.num_outputs; ++i) words.push_back(plan->add(op_call.outputs[i]));
  words.push_back(word(&plan->workspace_bytes));
  words.push_back(word(&plan->executor));

  const std::string first = plan->name + "GetWorkspaceSize";
  const int status = call(find(first), words);
  if (status != ACL_SUCCESS) fail(first, status);
  return plan;
}

// Of the clock that kernels read.
constexpr int64_t kCyclesPerMillisecond = std::string_view(DEEP_EP_SOC) == "ascend950" ? 1'000'000 : 50'000;

// A kernel gives up before the device ends it, which would leave no status behind. Not all versions of CANN say when
// that is; torch_npu sets it to 547 s.
int64_t below_op_timeout(int64_t timeout_ms) {
  uint32_t device_ms = 0;
  const bool is_known = aclrtGetOpExecuteTimeout != nullptr && aclrtGetOpExecuteTimeout(&device_ms) == ACL_SUCCESS;
  if (!is_known || device_ms == 0) device_ms = 547'000;
  return std::min(timeout_ms, int64_t{device_ms} * 9 / 10);
}

void* window_of(const int64_t* table, int64_t rank) {
  return reinterpret_cast<void*>(table[WindowMap::kHeader + rank]);
}

void open(const char* communicator, int32_t rank, int32_t size, uint64_t bytes, int64_t timeout_ms, int64_t* table) {
  const std::vector<Window> windows =
      find_windows(communicator, static_cast<uint32_t>(rank), static_cast<uint32_t>(size));
  for (const Window& window : windows)
    if (window.bytes < bytes)
      throw Error(str("HCCL's buffer has ", window.bytes, " bytes on rank ", &window - windows.data(), ", and ", bytes,
                      " are needed: set HCCL_BUFFSIZE to at least ", (bytes + (1 << 20) - 1) >> 20,
                      " (MB) on all ranks"));
  std::vector<uint64_t> addresses;
  for (const Window& window : windows) addresses.push_back(window.address);
  fill_table(table, rank, addresses, bytes, below_op_timeout(timeout_ms), kCyclesPerMillisecond);
  // No launch has been yet, whatever lies in HCCL's memory.
  const WindowMap map{size, static_cast<int64_t>(bytes)};
  const int status = aclrtMemset(window_of(table, rank), bytes, 0, map.slots_begin());
  if (status != ACL_SUCCESS) fail("aclrtMemset", status);
}

int open_windows(const char*, const char* communicator, int32_t rank, int32_t size, uint64_t bytes, int64_t timeout_ms,
                 int64_t* table, char* error) noexcept {
  return guarded(error, [&] { open(communicator, rank, size, bytes, timeout_ms, table); });
}

// They go with their communicator.
void close_windows(const char*) noexcept {}

int read_status(const int64_t* table, int32_t* status, char* error) noexcept {
  return guarded(error, [&] {
    constexpr size_t bytes = DEEP_EP_STATUS_WORDS * sizeof(int32_t);
    const auto* from = static_cast<const char*>(window_of(table, table[WindowMap::kRank])) + WindowMap::status();
    const int result = aclrtMemcpy(status, bytes, from, bytes, ACL_MEMCPY_DEVICE_TO_HOST);
    if (result != ACL_SUCCESS) fail("aclrtMemcpy", result);
  });
}

int prepare(const DeepEpCall* op_call, void** planned, uint64_t* workspace_bytes, char* error) noexcept {
  return guarded(error, [&] {
    std::unique_ptr<Plan> made = plan(*op_call);
    *workspace_bytes = made->workspace_bytes;
    *planned = made.release();
  });
}

int launch(void* planned, void* workspace, void* stream, char* error) noexcept {
  return guarded(error, [&] {
    const std::unique_ptr<Plan> plan(static_cast<Plan*>(planned));
    const int status = plan->run(workspace, plan->workspace_bytes, plan->executor, stream);
    if (status != ACL_SUCCESS) fail(plan->name, status);
  });
}

void discard(void* planned) noexcept {
  const std::unique_ptr<Plan> plan(static_cast<Plan*>(planned));
  aclDestroyAclOpExecutor(plan->executor);
}

}  // namespace
}  // namespace deep_ep::aclnn

DEEP_EP_API const DeepEpKernels* deep_ep_kernels(void) noexcept {
  using namespace deep_ep::aclnn;
  static const DeepEpKernels kernels = {DEEP_EP_KERNELS_VERSION,
                                        "AscendC " DEEP_EP_SOC,
                                        open_windows,
                                        close_windows,
                                        read_status,
                                        prepare,
                                        launch,
                                        discard};
  return &kernels;
}
