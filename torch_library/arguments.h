// What the ops' kernels share on the side of torch: argument types and argument checks.
//
// A check collects the first thing that is wrong instead of throwing: a rank with a bad argument still enters the
// operation, so that all ranks raise (src/shm/operation.h).
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <string>
#include <vector>

#include "error.h"
#include "shm/arithmetic.h"
#include "shm/group.h"

namespace deep_ep {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Shape = torch::headeronly::IntHeaderOnlyArrayRef;

// A `str` argument, such as group. (torch's own conversion to std::string leaks, as of torch 2.13.)
struct GroupName {
  std::string value;
};

class Checks {
 public:
  // Shape entries: a size, or kAny.
  static constexpr int64_t kAny = -1;

  Checks() = default;
  // Tensors must be on the kind of device that `like` is on.
  explicit Checks(const Tensor& like) : device_(like.device().type()) {}

  Checks& tensor(const char* name, const Tensor& tensor, std::initializer_list<ScalarType> dtypes, Shape shape);
  // What the check of a tensor includes, too: it has memory, which a program may have freed since.
  Checks& memory(const char* name, const Tensor& tensor);
  // Of the dtypes that ops take, with a last dimension of at least 1.
  Checks& rows(const char* name, const Tensor& tensor, Shape shape);
  // E, R and K as every op has them; group_size 0 when no group is involved.
  Checks& experts(int64_t num_experts, int64_t num_ranks, int64_t group_size);
  // The message is the concatenation of its parts, put together only when it is needed.
  template <typename... Parts>
  Checks& require(bool holds, const Parts&... message) {
    if (wrong_.empty() && !holds) wrong_ = str(message...);
    return *this;
  }

  const std::string& wrong() const { return wrong_; }
  bool passed() const { return wrong_.empty(); }
  // Whether values of tensors can be looked at here.
  bool on_cpu() const { return device_ == torch::headeronly::kCPU; }

 private:
  torch::headeronly::DeviceType device_ = torch::headeronly::kCPU;
  std::string wrong_;
};

// The bytes of a row of a tensor of one or two dimensions.
uint64_t row_bytes_of(const Tensor& tensor);

// A tensor with any values, contiguous, of at most two dimensions, where `like` is. (Called by its name, as
// torch::stable::new_empty does, an op takes several times as long to find as to run.)
Tensor empty_tensor(const Tensor& like, Shape shape, ScalarType dtype);
inline Tensor empty_tensor(const Tensor& like, Shape shape) { return empty_tensor(like, shape, like.scalar_type()); }

DType dtype_of(const Tensor& tensor);

// Of all tensors and numbers but for what only values on another device than the CPU show.
Checks check_get_dispatch_layout(const Tensor& topk_idx, int64_t num_experts, int64_t num_ranks, int64_t num_nodes);
Checks check_dispatch(const Tensor& x, const Tensor& topk_idx, const Tensor& topk_weights, int64_t num_experts,
                      int64_t num_ranks, int64_t num_worst_tokens, int64_t group_size);
Checks check_low_latency_dispatch(const Tensor& x, const Tensor& topk_idx, int64_t num_max_dispatch_tokens_per_rank,
                                  int64_t num_experts, int64_t num_ranks, int64_t group_size);
// Of the same with a block of rows for each expert, and rows of `parts`.
Checks check_low_latency_dispatch_padded(const Tensor& x, const Tensor& topk_idx, const std::vector<Tensor>& parts,
                                         int64_t num_max_dispatch_tokens_per_rank, int64_t num_experts,
                                         int64_t num_ranks, int64_t group_size);
// The arguments that combine, combine_backward and dispatch_backward share; `expert_rows` [N, H] is the one called
// `rows_name`.
Checks check_handle(const char* rows_name, const Tensor& expert_rows, const Tensor& topk_idx,
                    const Tensor& recv_src_idx, const Tensor& send_head, int64_t num_experts, int64_t num_ranks,
                    int64_t group_size);
// The same for rows [L, rows of an expert, H].
Checks check_padded_handle(const char* rows_name, const Tensor& expert_rows, const Tensor& topk_idx,
                           const Tensor& recv_src_idx, const Tensor& send_head, int64_t num_experts, int64_t num_ranks,
                           int64_t group_size);

}  // namespace deep_ep

namespace torch::stable::detail {

template <>
struct ToImpl<deep_ep::GroupName> {
  static deep_ep::GroupName call(StableIValue value, uint64_t, bool) {
    const auto handle = to<StringHandle>(value);
    size_t length;
    const char* data;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    STABLE_TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
    deep_ep::GroupName name{std::string(data, length)};
    STABLE_TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return name;
  }
};

}  // namespace torch::stable::detail
