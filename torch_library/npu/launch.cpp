#include "npu/launch.h"

#include <dlfcn.h>

#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "c_boundary.h"
#include "device/window_map.h"
#include "ops/kernels.h"

namespace deep_ep::npu {
namespace {

struct Windows {
  std::vector<int64_t> words;  // the table
  void* table;                 // on the device
  int64_t size() const { return static_cast<int64_t>(words.size()) - DEEP_EP_TABLE_HEADER; }
};

// What Python has loaded and made (python/deep_ep/npu/windows.py). Never destroyed: calls may outlive static
// destruction.
struct State {
  std::mutex mutex;
  const DeepEpKernels* kernels = nullptr;
  std::map<std::string, std::shared_ptr<const Windows>> windows;
};

State& state() {
  static State& instance = *new State;
  return instance;
}

// nullptr: none are.
const DeepEpKernels* loaded() {
  std::lock_guard lock(state().mutex);
  return state().kernels;
}

const DeepEpKernels& kernels(const char* op) {
  const DeepEpKernels* const found = loaded();
  if (found == nullptr)
    throw Error(
        str("deep_ep.", op,
            ": this installation has no kernels for the NPU; build the wheel with CANN (bash build.sh -a deepep "
            "for A3, -a deepep2 for A2, -a deepep Ascend950 for A5), or name a library of kernels in "
            "DEEP_EP_KERNELS; the strategy alltoall needs none"));
  return *found;
}

const DeepEpKernels& open_kernels(const char* path) {
  void* const library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) throw Error(dlerror());
  using Entry = const DeepEpKernels*();  // without noexcept: it is not known yet what that is
  auto* const entry = reinterpret_cast<Entry*>(dlsym(library, "deep_ep_kernels"));
  if (entry == nullptr) throw Error(str(path, " exports no deep_ep_kernels()"));
  const DeepEpKernels* const kernels = entry();
  if (kernels->version != DEEP_EP_KERNELS_VERSION)
    throw Error(str(path, " has version ", kernels->version, " of the interface to kernels, this is version ",
                    static_cast<int>(DEEP_EP_KERNELS_VERSION)));
  return *kernels;
}

std::shared_ptr<const Windows> windows(const char* op, const std::string& group) {
  kernels(op);
  std::lock_guard lock(state().mutex);
  const auto found = state().windows.find(group);
  if (found == state().windows.end())
    throw Error(str("deep_ep.", op, ": there are no windows on the NPU for the group '", group,
                    "' on this rank; call deep_ep.init(group) or make a deep_ep.Buffer first, with a group that has "
                    "the NPU among its devices"));
  return found->second;
}

// torch_npu has no C interface for its task queue, in which an op must be launched to keep its order with others. The
// library is found where it is loaded: nothing here links to it, so that one build serves every version of it.
template <typename Function>
Function* torch_npu_function(const char* name) {
  static void* const library = dlopen("libtorch_npu.so", RTLD_NOLOAD | RTLD_LAZY);
  void* const found = library != nullptr ? dlsym(library, name) : nullptr;
  if (found == nullptr)
    throw Error(str("deep_ep: torch_npu ", library == nullptr ? "is not loaded" : "has no function ",
                    library == nullptr ? "" : name, "; import torch_npu, of the version that belongs to this torch"));
  return reinterpret_cast<Function*>(found);
}

void* current_stream(const Tensor& like) {
  static auto* const get = torch_npu_function<int32_t(int32_t, void**)>("aoti_torch_get_current_npu_stream");
  void* stream = nullptr;
  if (get(like.get_device_index(), &stream) != 0) throw Error("deep_ep: torch_npu gives no current stream");
  return stream;
}

void enqueue(const std::string& name, const std::function<int()>& launch) {
  static auto* const run_op_api = torch_npu_function<void(const std::string&, const std::function<int()>&, bool)>(
      "_ZN6at_npu6native9OpCommand10RunOpApiV2ERKNSt7__cxx1112basic_stringIcSt11char_"
      "traitsIcESaIcEEERKSt8functionIFivEEb");
  run_op_api(name, launch, false);
}

int32_t acl_dtype(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return 0;
    case ScalarType::Half:
      return 1;
    case ScalarType::Char:
      return 2;
    case ScalarType::Byte:
      return 4;
    case ScalarType::Int:
      return 3;
    case ScalarType::Long:
      return 9;
    case ScalarType::BFloat16:
      return 27;
    default:
      throw Error(str("deep_ep: no kernel takes tensors of ", torch::headeronly::toString(dtype)));
  }
}

DeepEpTensor describe(const Tensor& tensor) {
  DeepEpTensor out{const_cast<void*>(tensor.const_data_ptr()),
                   acl_dtype(tensor.scalar_type()),
                   static_cast<int32_t>(tensor.dim()),
                   {}};
  for (int64_t i = 0; i < tensor.dim(); ++i) out.sizes[i] = tensor.size(i);
  return out;
}

const char* text_of(Failure failure) {
  switch (failure) {
    case Failure::late:
      return "it did not answer in time: expected launch, and the newest one seen of it";
    case Failure::ahead:
      return "it is in a later launch, so one of this rank's was lost: own launch, its launch";
    case Failure::different:
      return "its launch is of another op or other sizes: own value, its value";
    case Failure::refused:
      return "it refuses this launch, and its own status says why: own op, its answer";
    case Failure::bad_id:
      return "topk_idx holds an id that is neither -1 nor a number of an expert: number of experts, id";
    case Failure::bad_row:
      return "it asks for a row that x does not have: rows, row";
    case Failure::too_small:
      return "the windows are too small for this launch: KiB needed, KiB there; ask for more with num_bytes";
    case Failure::aborted:
      return "a launch before did not come to its end: the newest one that has ended, the newest one that has begun";
    case Failure::no_room:
      return "more rows arrive there than there is memory for, and none may be dropped: rows that fit, rows";
    default:
      return "of an unknown kind";
  }
}

std::string text_of(const int32_t* status, int64_t rank) {
  return str("deep_ep.", name_of(static_cast<Op>(status[kOp])), " on rank ", rank, ", launch ", status[kLaunch],
             ", phase ", status[kPhase], ", failed at rank ", status[kPeer], ": ",
             text_of(static_cast<Failure>(status[kFailure])), ": ", status[kExpected], ", ", status[kGot]);
}

// What a launch on these windows has failed of, or what keeps this from being found out; empty if all is well.
std::string failure_of(const DeepEpKernels& kernels, const int64_t* table) {
  int32_t status[DEEP_EP_STATUS_WORDS];
  char error[DEEP_EP_TEXT_BYTES] = "";
  if (kernels.read_status(table, status, error) != 0) return error;
  return status[kFailure] == 0 ? "" : text_of(status, table[WindowMap::kRank]);
}

void require_no_failure(const char* op, const DeepEpKernels& kernels, const Windows& windows) {
  const std::string failure = failure_of(kernels, windows.words.data());
  if (failure.empty()) return;
  throw Error(str("deep_ep.", op,
                  ": a launch before has failed, and what it was to give, and those after it, is not "
                  "defined; call deep_ep.init(group) on all ranks before the next one. ",
                  failure));
}

}  // namespace

int64_t group_size(const char* op, const std::string& group) { return windows(op, group)->size(); }

void require_no_failure(const char* op, const std::string& group) {
  require_no_failure(op, kernels(op), *windows(op, group));
}

bool is_capturing(const Tensor& like) {
  static auto* const status = torch_npu_function<int(void*)>("_ZN7c10_npu23captureStatusMayInitCtxEPv");
  return status(current_stream(like)) != 0;
}

void require(const char* op, const Checks& checks) {
  if (!checks.passed()) throw Error(str("deep_ep.", op, ": ", checks.wrong()));
}

void run(const char* op, const std::string& group, std::initializer_list<Tensor> inputs,
         std::initializer_list<int64_t> integers, const std::vector<Tensor>& outputs) {
  const DeepEpKernels& kernels = npu::kernels(op);
  const Tensor& like = *inputs.begin();
  const auto found = group.empty() ? nullptr : windows(op, group);
  if (found && !is_capturing(like)) require_no_failure(op, kernels, *found);
  std::vector<DeepEpTensor> in, out;
  for (const Tensor& tensor : inputs) in.push_back(describe(tensor));
  for (const Tensor& tensor : outputs) out.push_back(describe(tensor));
  if (found)
    in.push_back({found->table, acl_dtype(ScalarType::Long), 1, {static_cast<int64_t>(found->words.size()), 0}});
  const DeepEpCall call{op,
                        group.c_str(),
                        static_cast<int32_t>(in.size()),
                        static_cast<int32_t>(out.size()),
                        static_cast<int32_t>(integers.size()),
                        in.data(),
                        out.data(),
                        integers.begin()};

  void* plan = nullptr;
  uint64_t workspace_bytes = 0;
  char error[DEEP_EP_TEXT_BYTES] = "";
  if (kernels.prepare(&call, &plan, &workspace_bytes, error) != 0) throw Error(str("deep_ep.", op, ": ", error));
  std::unique_ptr<void, decltype(kernels.discard)> unused(plan, kernels.discard);
  // Given back before the kernel has run, but on this stream: the allocator gives it to work that comes later.
  const Tensor workspace = empty_tensor(like, {static_cast<int64_t>(workspace_bytes)}, ScalarType::Byte);
  void* const memory = workspace.mutable_data_ptr();
  void* const stream = current_stream(like);
  enqueue(str("deep_ep.", op), [&kernels, plan = unused.release(), memory, stream, op] {
    char error[DEEP_EP_TEXT_BYTES] = "";
    const int status = kernels.launch(plan, memory, stream, error);
    if (status != 0) std::fprintf(stderr, "deep_ep.%s: %s\n", op, error);
    return status;
  });
}

}  // namespace deep_ep::npu

using deep_ep::guarded;
using deep_ep::npu::state;

// Loads a library of kernels; nullptr as path forgets the one that is loaded.
DEEP_EP_API int deep_ep_npu_load(const char* path, char* error) noexcept {
  return guarded(error, [&] {
    const DeepEpKernels* const kernels = path != nullptr ? &deep_ep::npu::open_kernels(path) : nullptr;
    std::lock_guard lock(state().mutex);
    state().kernels = kernels;
  });
}

// The kernels' name, or nullptr if none are loaded.
DEEP_EP_API const char* deep_ep_npu_kernels() noexcept {
  const DeepEpKernels* const kernels = deep_ep::npu::loaded();
  return kernels != nullptr ? kernels->name : nullptr;
}

DEEP_EP_API int deep_ep_npu_open_windows(const char* group, const char* communicator, int32_t rank, int32_t size,
                                         uint64_t bytes, int64_t timeout_ms, int64_t* table, char* error) noexcept {
  int status = 0;
  return guarded(error,
                 [&] {
                   status = deep_ep::npu::kernels("open_windows")
                                .open_windows(group, communicator, rank, size, bytes, timeout_ms, table, error);
                 }) ||
         status;
}

// Nonzero: a launch on these windows has failed, and `error` says which and why.
DEEP_EP_API int deep_ep_npu_check(const int64_t* table, char* error) noexcept {
  return guarded(error, [&] {
    const std::string failure = deep_ep::npu::failure_of(deep_ep::npu::kernels("check"), table);
    if (!failure.empty()) throw deep_ep::Error(failure);
  });
}

DEEP_EP_API void deep_ep_npu_close_windows(const char* group) noexcept {
  if (const DeepEpKernels* const kernels = deep_ep::npu::loaded()) kernels->close_windows(group);
}

// The ops on the group `name` of `size` ranks pass the table at `table` (device memory), which has these words, to
// their kernels; nullptr: no longer.
DEEP_EP_API void deep_ep_npu_publish_windows(const char* name, int64_t size, const int64_t* words,
                                             void* table) noexcept {
  std::lock_guard lock(state().mutex);
  state().windows.erase(name);
  if (table == nullptr) return;
  state().windows[name] = std::make_shared<const deep_ep::npu::Windows>(
      deep_ep::npu::Windows{{words, words + DEEP_EP_TABLE_HEADER + size}, table});
}
