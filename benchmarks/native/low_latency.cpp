// deep_ep's low-latency ops as C++ calls an op: through torch's dispatcher. One call from Python per operation.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <string>
#include <vector>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <size_t N, typename... Arguments>
std::array<StableIValue, N> call(const char* op, const Arguments&... arguments) {
  std::array<StableIValue, N> stack{torch::stable::detail::from(arguments)...};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, "", stack.data(), TORCH_ABI_VERSION));
  return stack;
}

Tensor take(StableIValue value) { return torch::stable::detail::to<Tensor>(value); }

}  // namespace

// The sizes of all calls, with what the newest ones have returned. T local tokens, M = T · H hidden · K top-k ·
// E experts · R ranks.
struct LowLatency {
  int64_t tokens, hidden, top_k, experts, ranks;
  ScalarType dtype;
  std::string group;
  std::vector<Tensor> handle;  // src_info, layout_range, send_head
  std::vector<Tensor> rows;    // recv_x
  std::vector<Tensor> sums;    // of combine

  Tensor blob(const void* data, int64_t rows, int64_t columns, ScalarType type) const {
    const torch::stable::Device cpu(torch::headeronly::kCPU);
    return torch::stable::from_blob(const_cast<void*>(data), {rows, columns}, {columns, 1}, cpu, type);
  }
};

extern "C" {

// dtype: 0: fp32, 1: fp16, 2: bf16.
LowLatency* low_latency_make(int64_t tokens, int64_t hidden, int64_t top_k, int64_t experts, int64_t ranks,
                             int64_t dtype, const char* group) {
  constexpr ScalarType types[] = {ScalarType::Float, ScalarType::Half, ScalarType::BFloat16};
  return new LowLatency{tokens, hidden, top_k, experts, ranks, types[dtype], group, {}, {}, {}};
}

void low_latency_drop(LowLatency* calls) { delete calls; }

// Returns recv_x, which lives until the next call, of num_rows rows. x is [T, H], ids are [T, K].
void* low_latency_dispatch(LowLatency* c, const void* x, const int64_t* ids, int64_t* num_rows) {
  c->rows.clear();
  auto out = call<7>("deep_ep::low_latency_dispatch", c->blob(x, c->tokens, c->hidden, c->dtype),
                     c->blob(ids, c->tokens, c->top_k, ScalarType::Long), c->tokens, c->experts, c->ranks, c->group,
                     std::string());
  take(out[1]);
  c->handle = {take(out[2]), take(out[3]), take(out[4])};
  c->rows = {take(out[0])};
  *num_rows = c->rows[0].size(0);
  return c->rows[0].mutable_data_ptr();
}

// Returns [T, H], which lives until the next call. y is [num_rows, H], ids and weights are [T, K].
void* low_latency_combine(LowLatency* c, const void* y, int64_t num_rows, const int64_t* ids, const float* weights) {
  c->sums.clear();
  auto out = call<10>("deep_ep::low_latency_combine", c->blob(y, num_rows, c->hidden, c->dtype),
                      c->blob(ids, c->tokens, c->top_k, ScalarType::Long),
                      c->blob(weights, c->tokens, c->top_k, ScalarType::Float), c->handle[0], c->handle[1],
                      c->handle[2], c->experts, c->ranks, c->group, std::string());
  c->sums = {take(out[0])};
  return c->sums[0].mutable_data_ptr();
}
}
