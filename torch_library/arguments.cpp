#include "arguments.h"

#include <algorithm>
#include <array>
#include <limits>

#include "shm/private_memory.h"
#include "shm/routing.h"

namespace deep_ep {
namespace {

constexpr int64_t kMaxRows = std::numeric_limits<int32_t>::max();

std::string dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "torch.float32";
    case ScalarType::Half:
      return "torch.float16";
    case ScalarType::BFloat16:
      return "torch.bfloat16";
    case ScalarType::Double:
      return "torch.float64";
    case ScalarType::Int:
      return "torch.int32";
    case ScalarType::Long:
      return "torch.int64";
    default:
      return torch::headeronly::toString(dtype);
  }
}

template <typename Items, typename Name>
std::string list(const Items& items, Name&& name, const char* separator) {
  std::string text;
  for (const auto& item : items) text += (text.empty() ? "" : separator) + name(item);
  return text;
}

std::string shape_name(Shape shape) {
  return "[" +
         list(shape, [](int64_t n) { return n == Checks::kAny ? std::string("any") : std::to_string(n); }, ", ") + "]";
}

}  // namespace

Checks& Checks::tensor(const char* name, const Tensor& tensor, std::initializer_list<ScalarType> dtypes, Shape shape) {
  if (!passed()) return *this;
  const Shape given = tensor.sizes();
  bool fits = given.size() == shape.size();
  for (size_t i = 0; fits && i < shape.size(); ++i) fits = shape[i] == kAny || shape[i] == given[i];
  const ScalarType dtype = tensor.scalar_type();
  if (std::find(dtypes.begin(), dtypes.end(), dtype) == dtypes.end())
    return require(false, name, " must be ", list(dtypes, dtype_name, ", "), ", got ", dtype_name(dtype));
  if (!fits) return require(false, name, " must have the shape ", shape_name(shape), ", got ", shape_name(given));
  require(tensor.device().type() == device_, name, " must be on the ", on_cpu() ? "CPU" : "NPU",
          ", as the other tensors are");
  require(tensor.is_contiguous(), name, " must be contiguous; call .contiguous() on it");
  return memory(name, tensor);
}

Checks& Checks::memory(const char* name, const Tensor& tensor) {
  return require(!on_cpu() || tensor.numel() == 0 || tensor.const_data_ptr() != nullptr, name,
                 " has no memory: its storage has been freed");
}

Checks& Checks::rows(const char* name, const Tensor& tensor, Shape shape) {
  this->tensor(name, tensor, {ScalarType::BFloat16, ScalarType::Half, ScalarType::Float}, shape);
  return require(!passed() || tensor.size(tensor.dim() - 1) > 0, name, " must have a hidden size of at least 1");
}

Checks& Checks::experts(int64_t num_experts, int64_t num_ranks, int64_t group_size) {
  require(num_ranks > 0, "num_ranks must be positive, got ", num_ranks);
  require(group_size == 0 || num_ranks == group_size, "num_ranks must be the size of the group, ", group_size, ", got ",
          num_ranks);
  require(num_experts > 0 && num_experts <= static_cast<int64_t>(Group::kMaxExperts), "num_experts must be 1..",
          Group::kMaxExperts, ", got ", num_experts);
  return require(!passed() || num_experts % num_ranks == 0, "num_experts (", num_experts,
                 ") must be divisible by num_ranks (", num_ranks, ")");
}

Tensor empty_tensor(const Tensor& like, Shape shape, ScalarType dtype) {
  constexpr uint64_t kLarge = 4 << 20;
  const size_t dims = shape.size();
  const std::array<int64_t, 2> all_strides{dims == 2 ? std::max<int64_t>(shape[1], 1) : 1, 1};
  const Shape strides(all_strides.data(), dims);
  const auto type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  const uint64_t bytes = (dims == 0 ? 1 : strides[0] * shape[0]) * aoti_torch_dtype_element_size(type);
  if (bytes >= kLarge && like.device().type() == torch::headeronly::kCPU) {
    const std::shared_ptr<std::byte> memory = private_memory(bytes);
    return torch::stable::from_blob(memory.get(), shape, strides, like.device(), dtype, [memory](void*) {});
  }
  int32_t device_type, device_index;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle made;
  // Torch's own reason is not to be had before 2.12.
  if (aoti_torch_empty_strided(static_cast<int64_t>(dims), shape.data(), strides.data(), type, device_type,
                               device_index, &made) != AOTI_TORCH_SUCCESS)
    throw Error(str("deep_ep: cannot allocate ", bytes, " bytes of memory on the device of the inputs"));
  return Tensor(made);
}

uint64_t row_bytes_of(const Tensor& tensor) { return (tensor.dim() == 1 ? 1 : tensor.size(1)) * tensor.element_size(); }

DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Half:
      return DType::f16;
    case ScalarType::BFloat16:
      return DType::bf16;
    default:
      return DType::f32;
  }
}

namespace {

Checks& check_topk_idx(Checks& checks, const Tensor& topk_idx, int64_t num_tokens) {
  checks.tensor("topk_idx", topk_idx, {ScalarType::Long}, {num_tokens, Checks::kAny});
  checks.require(!checks.passed() || topk_idx.size(1) > 0, "topk_idx must have at least one column");
  return checks.require(!checks.passed() || topk_idx.numel() <= kMaxRows, "topk_idx must have at most ", kMaxRows,
                        " elements");
}

}  // namespace

Checks check_get_dispatch_layout(const Tensor& topk_idx, int64_t num_experts, int64_t num_ranks, int64_t num_nodes) {
  Checks checks(topk_idx);
  check_topk_idx(checks, topk_idx, Checks::kAny).experts(num_experts, num_ranks, 0);
  return checks.require(num_nodes > 0 && num_ranks % num_nodes == 0, "num_nodes must divide num_ranks (", num_ranks,
                        "), got ", num_nodes);
}

Checks check_dispatch(const Tensor& x, const Tensor& topk_idx, const Tensor& topk_weights, int64_t num_experts,
                      int64_t num_ranks, int64_t num_worst_tokens, int64_t group_size) {
  Checks checks(x);
  checks.rows("x", x, {Checks::kAny, Checks::kAny});
  if (checks.passed()) check_topk_idx(checks, topk_idx, x.size(0));
  if (checks.passed())
    checks.tensor("topk_weights", topk_weights, {ScalarType::Float}, {topk_idx.size(0), topk_idx.size(1)});
  checks.experts(num_experts, num_ranks, group_size);
  return checks.require(num_worst_tokens >= 0 && num_worst_tokens <= kMaxRows,
                        "num_worst_tokens must be 0 (exact) or a number of rows up to ", kMaxRows, ", got ",
                        num_worst_tokens);
}

Checks check_low_latency_dispatch(const Tensor& x, const Tensor& topk_idx, int64_t num_max_dispatch_tokens_per_rank,
                                  int64_t num_experts, int64_t num_ranks, int64_t group_size) {
  Checks checks(x);
  checks.rows("x", x, {Checks::kAny, Checks::kAny});
  if (checks.passed()) check_topk_idx(checks, topk_idx, x.size(0)).experts(num_experts, num_ranks, group_size);
  if (!checks.passed()) return checks;
  const int64_t K = topk_idx.size(1), L = num_experts / num_ranks, most = std::min(K, L);
  checks.require(
      num_max_dispatch_tokens_per_rank > 0 && num_max_dispatch_tokens_per_rank <= kMaxRows / num_ranks / most,
      "num_max_dispatch_tokens_per_rank must be 1..", kMaxRows / num_ranks / most, ", got ",
      num_max_dispatch_tokens_per_rank);
  checks.require(x.size(0) <= num_max_dispatch_tokens_per_rank, "x has ", x.size(0),
                 " tokens; allowed are at most num_max_dispatch_tokens_per_rank = ", num_max_dispatch_tokens_per_rank);
  if (!checks.on_cpu()) return checks;
  const int64_t* ids = topk_idx.const_data_ptr<int64_t>();
  std::vector<int32_t> counts(num_experts);
  const std::string wrong = count_experts(ids, topk_idx.size(0), K, num_experts, counts.data());
  checks.require(wrong.empty(), wrong);
  // With ids that repeat, a token may want more rows of a rank than there is room for.
  for (int64_t t = 0; K > L && t < topk_idx.size(0); ++t)
    for (int64_t first = 0; first < K && checks.passed(); ++first) {
      int64_t rows = 0;
      for (int64_t k = 0; k < K; ++k) rows += ids[t * K + k] >= 0 && ids[t * K + k] / L == ids[t * K + first] / L;
      checks.require(ids[t * K + first] < 0 || rows <= most, "topk_idx sends token ", t, " to rank ",
                     ids[t * K + first] / L, " ", rows, " times; allowed are ", most,
                     ": ids may not repeat where K exceeds the ", L, " experts of a rank");
    }
  return checks;
}

Checks check_low_latency_dispatch_padded(const Tensor& x, const Tensor& topk_idx, const std::vector<Tensor>& parts,
                                         int64_t num_max_dispatch_tokens_per_rank, int64_t num_experts,
                                         int64_t num_ranks, int64_t group_size) {
  Checks checks =
      check_low_latency_dispatch(x, topk_idx, num_max_dispatch_tokens_per_rank, num_experts, num_ranks, group_size);
  if (!checks.passed()) return checks;
  const int64_t K = topk_idx.size(1), most = kMaxRows / num_experts;
  checks.require(num_max_dispatch_tokens_per_rank <= most, "num_max_dispatch_tokens_per_rank must be 1..", most,
                 ", got ", num_max_dispatch_tokens_per_rank);
  const int64_t* ids = topk_idx.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < topk_idx.numel() && checks.passed(); ++i)
    for (int64_t other = i - i % K; other < i; ++other)
      checks.require(ids[i] < 0 || ids[i] != ids[other], "topk_idx has the id ", ids[i], " of token ", i / K,
                     " twice; a token's ids must be distinct");
  if (parts.empty()) return checks;
  checks.require(parts.size() == 2, "parts must be two tensors or none, got ", parts.size());
  if (!checks.passed()) return checks;
  uint64_t bytes = 0;
  for (const Tensor& part : parts) {
    checks.require(part.dim() == 1 || part.dim() == 2, "parts must have one or two dimensions, got ", part.dim());
    if (checks.passed()) bytes += row_bytes_of(part);
  }
  return checks.require(bytes <= row_bytes_of(x), "parts must fit into rows of ", row_bytes_of(x), " bytes, got ",
                        bytes);
}

namespace {

Checks check_handle(const char* rows_name, const Tensor& expert_rows, Shape shape, int64_t num_rows,
                    const Tensor& topk_idx, const Tensor& recv_src_idx, const Tensor& send_head, int64_t num_experts,
                    int64_t num_ranks, int64_t group_size) {
  Checks checks(expert_rows);
  checks.rows(rows_name, expert_rows, shape);
  if (checks.passed()) checks.tensor("recv_src_idx", recv_src_idx, {ScalarType::Int}, {num_rows, 3});
  check_topk_idx(checks, topk_idx, Checks::kAny);
  if (checks.passed()) checks.tensor("send_head", send_head, {ScalarType::Int}, {topk_idx.size(0), topk_idx.size(1)});
  return checks.experts(num_experts, num_ranks, group_size);
}

}  // namespace

Checks check_handle(const char* rows_name, const Tensor& expert_rows, const Tensor& topk_idx,
                    const Tensor& recv_src_idx, const Tensor& send_head, int64_t num_experts, int64_t num_ranks,
                    int64_t group_size) {
  const int64_t N = expert_rows.dim() > 0 ? expert_rows.size(0) : 0;
  return check_handle(rows_name, expert_rows, {Checks::kAny, Checks::kAny}, N, topk_idx, recv_src_idx, send_head,
                      num_experts, num_ranks, group_size);
}

Checks check_padded_handle(const char* rows_name, const Tensor& expert_rows, const Tensor& topk_idx,
                           const Tensor& recv_src_idx, const Tensor& send_head, int64_t num_experts, int64_t num_ranks,
                           int64_t group_size) {
  const int64_t L = num_ranks > 0 ? num_experts / num_ranks : Checks::kAny;
  return check_handle(rows_name, expert_rows, {L, Checks::kAny, Checks::kAny}, Checks::kAny, topk_idx, recv_src_idx,
                      send_head, num_experts, num_ranks, group_size);
}

}  // namespace deep_ep
