// Kernels for tests of the launch path: over the stand-in for CANN the memory of an NPU is the host's, so a host
// function on the stream can call this library's CPU kernels on it.
#include <acl/acl.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "ops/kernels.h"
#include "stand_in.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Plan {
  std::string op, group;
  std::vector<DeepEpTensor> inputs, outputs;
  std::vector<int64_t> integers;
};

constexpr uint64_t kWorkspaceBytes = 64;

ScalarType torch_dtype(int32_t dtype) {
  switch (dtype) {
    case ACL_FLOAT:
      return ScalarType::Float;
    case ACL_FLOAT16:
      return ScalarType::Half;
    case ACL_BF16:
      return ScalarType::BFloat16;
    case ACL_INT32:
      return ScalarType::Int;
    default:
      return ScalarType::Long;
  }
}

Tensor on_host(const DeepEpTensor& tensor) {
  std::vector<int64_t> sizes(tensor.sizes, tensor.sizes + tensor.num_dims), strides(tensor.num_dims, 1);
  for (int32_t i = tensor.num_dims - 1; i > 0; --i) strides[i - 1] = strides[i] * sizes[i];
  const auto cpu = torch::stable::Device(torch::headeronly::kCPU);
  return torch::stable::from_blob(tensor.data, sizes, strides, cpu, torch_dtype(tensor.dtype));
}

// The arguments of the torch op, in its order, and room for its results.
std::vector<StableIValue> arguments_of(const Plan& plan) {
  using torch::stable::detail::from;
  std::vector<StableIValue> stack;
  const bool communicates = !plan.group.empty();
  for (size_t i = 0; i < plan.inputs.size() - communicates; ++i) stack.push_back(from(on_host(plan.inputs[i])));
  std::vector<int64_t> integers = plan.integers;
  const bool is_int8 = plan.op == "low_latency_dispatch_int8";
  const bool low_latency = plan.op.rfind("low_latency", 0) == 0 && !is_int8;
  const bool is_dispatch = is_int8 || plan.op == "low_latency_dispatch";
  bool zero_unused = false;
  if (is_dispatch) {
    zero_unused = integers.back() != 0;
    integers.pop_back();
    std::rotate(integers.begin(), integers.end() - 1, integers.end());
  }
  for (int64_t integer : integers) stack.push_back(from(integer));
  if (communicates) stack.push_back(from(plan.group));
  if (low_latency) stack.push_back(from(std::string()));
  if (is_dispatch) stack.push_back(from(zero_unused));
  stack.resize(std::max(stack.size(), plan.outputs.size()));
  return stack;
}

// By a dispatch of rows of one number each: their count is that of the rows of any other dispatch.
void notify_dispatch(const Plan& plan) {
  using torch::stable::detail::from;
  const Tensor topk_idx = on_host(plan.inputs[0]);
  Tensor x = torch::stable::new_zeros(topk_idx, {topk_idx.size(0), 1}, ScalarType::Float);
  Tensor weights = torch::stable::new_zeros(topk_idx, {topk_idx.size(0), topk_idx.size(1)}, ScalarType::Float);
  std::vector<StableIValue> stack = {
      from(x),          from(topk_idx),  from(weights), from(plan.integers[0]), from(plan.integers[1]),
      from(int64_t{0}), from(plan.group)};
  stack.resize(10);
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("deep_ep::dispatch", "", stack.data(), TORCH_ABI_VERSION));
  std::vector<Tensor> results;
  for (StableIValue value : stack) results.push_back(torch::stable::detail::to<Tensor>(value));
  *static_cast<int64_t*>(plan.outputs[0].data) = results[0].size(0);
}

void run(void* memory) {
  const Plan& plan = *static_cast<Plan*>(memory);
  try {
    if (plan.op == "notify_dispatch") return notify_dispatch(plan);
    std::vector<StableIValue> stack = arguments_of(plan);
    const std::string name = "deep_ep::" + plan.op;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name.c_str(), "", stack.data(), TORCH_ABI_VERSION));
    for (size_t i = 0; i < plan.outputs.size(); ++i) {
      const Tensor result = torch::stable::detail::to<Tensor>(stack[i]);
      const auto bytes = static_cast<size_t>(result.numel() * result.element_size());
      std::memcpy(plan.outputs[i].data, result.const_data_ptr(), bytes);
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "deep_ep host kernel %s: %s\n", plan.op.c_str(), error.what());
  }
}

// The CPU kernels find their own windows by the group's name.
int open_windows(const char*, const char*, int32_t rank, int32_t size, uint64_t bytes, int64_t, int64_t* table,
                 char*) noexcept {
  std::fill_n(table, DEEP_EP_TABLE_HEADER + size, 0);
  table[0] = DEEP_EP_KERNELS_VERSION;
  table[1] = rank;
  table[2] = size;
  table[3] = static_cast<int64_t>(bytes);
  return 0;
}

void close_windows(const char*) noexcept {}

int read_status(const int64_t*, int32_t* status, char*) noexcept {
  std::fill_n(status, DEEP_EP_STATUS_WORDS, 0);
  return 0;
}

int prepare(const DeepEpCall* call, void** plan, uint64_t* workspace_bytes, char*) noexcept {
  *plan = new Plan{call->op,
                   call->group,
                   {call->inputs, call->inputs + call->num_inputs},
                   {call->outputs, call->outputs + call->num_outputs},
                   {call->integers, call->integers + call->num_integers}};
  const char* const other = std::getenv("HOST_KERNELS_WORKSPACE_BYTES");
  *workspace_bytes = other != nullptr ? std::strtoull(other, nullptr, 10) : kWorkspaceBytes;
  return 0;
}

// A captured launch runs once for every replay, so plans live on.
int launch(void* plan, void* workspace, void* stream, char* error) noexcept {
  if (workspace == nullptr) {
    std::snprintf(error, DEEP_EP_TEXT_BYTES, "no workspace");
    return 1;
  }
  const std::string name = "deep_ep." + static_cast<Plan*>(plan)->op;
  const aclError status = cann_stand_in_launch(stream, name.c_str(), &run, plan);
  if (status != ACL_SUCCESS) std::snprintf(error, DEEP_EP_TEXT_BYTES, "the stand-in refused the launch: %d", status);
  return status;
}

int64_t discarded = 0;  // plans

void discard(void* plan) noexcept {
  delete static_cast<Plan*>(plan);
  ++discarded;
}

}  // namespace

// For tests: how many plans have been discarded.
extern "C" __attribute__((visibility("default"))) int64_t host_kernels_discarded() noexcept { return discarded; }

extern "C" __attribute__((visibility("default"))) const DeepEpKernels* deep_ep_kernels(void) noexcept {
  static const DeepEpKernels kernels = {DEEP_EP_KERNELS_VERSION,
                                        "host kernels for tests",
                                        open_windows,
                                        close_windows,
                                        read_status,
                                        prepare,
                                        launch,
                                        discard};
  return &kernels;
}
