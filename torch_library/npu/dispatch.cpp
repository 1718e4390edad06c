#include "npu/launch.h"
#include "started.h"

namespace deep_ep::npu {
namespace {

// The rows that this rank will receive, from the counts of all ranks: the host waits for them.
int64_t exact_rows(const char* op, const Tensor& topk_idx, int64_t num_experts, int64_t num_ranks,
                   const std::string& group) {
  if (is_capturing(topk_idx))
    throw Error(
        str("deep_ep.", op,
            ": num_worst_tokens is 0, so the number of rows depends on data, which a captured graph cannot wait "
            "for; pass num_worst_tokens"));
  const Tensor rows = empty_tensor(topk_idx, {1}, ScalarType::Long);
  run("notify_dispatch", group, {topk_idx}, {num_experts, num_ranks}, {rows});
  const Tensor found = to(rows, torch::stable::Device(torch::headeronly::kCPU));
  require_no_failure(op, group);  // which would have left no number
  return *found.const_data_ptr<int64_t>();
}

// Of dispatch, or of dispatch_int8. In capacity mode the host waits for nothing.
Results queued(Op op, const Tensor& x, const Tensor& topk_idx, const Tensor& topk_weights, int64_t num_experts,
               int64_t num_ranks, int64_t num_worst_tokens, const std::string& group) {
  const char* name = name_of(op);
  require(name,
          check_dispatch(x, topk_idx, topk_weights, num_experts, num_ranks, num_worst_tokens, group_size(name, group)));
  const int64_t T = x.size(0), H = x.size(1), K = topk_idx.size(1), R = num_ranks, L = num_experts / R;
  const int64_t N = num_worst_tokens > 0 ? num_worst_tokens : exact_rows(name, topk_idx, num_experts, R, group);
  const auto empty = [&](std::initializer_list<int64_t> shape, ScalarType dtype) {
    return empty_tensor(x, shape, dtype);
  };
  Results out = {empty_tensor(x, {N, H})};
  if (op == Op::dispatch_int8) out = {empty({N, H}, ScalarType::Char), empty({N}, ScalarType::Float)};
  out.insert(out.end(),
             {empty({N, K}, ScalarType::Long), empty({N, K}, ScalarType::Float), empty({L}, ScalarType::Long),
              empty({}, ScalarType::Long), empty({R, R}, ScalarType::Int), empty({R, L}, ScalarType::Int),
              empty({L, R}, ScalarType::Int), empty({N, 3}, ScalarType::Int), empty({T, K}, ScalarType::Int)});
  run(name, group, {x, topk_idx, topk_weights}, {num_experts, num_ranks, N}, out);
  return out;
}

QueuedCall dispatch(Tensor x, Tensor topk_idx, Tensor topk_weights, int64_t num_experts, int64_t num_ranks,
                    int64_t num_worst_tokens, GroupName group) {
  const Op op = Op::dispatch;
  return {op, queued(op, x, topk_idx, topk_weights, num_experts, num_ranks, num_worst_tokens, group.value)};
}

auto dispatch_int8(Tensor x, Tensor topk_idx, Tensor topk_weights, int64_t num_experts, int64_t num_ranks,
                   int64_t num_worst_tokens, GroupName group) {
  return outputs<11>(
      queued(Op::dispatch_int8, x, topk_idx, topk_weights, num_experts, num_ranks, num_worst_tokens, group.value));
}

}  // namespace
}  // namespace deep_ep::npu

STABLE_TORCH_LIBRARY_IMPL(deep_ep, PrivateUse1, library) {
  deep_ep::implement<&deep_ep::npu::dispatch, 10>(library, "dispatch");
  library.impl("dispatch_int8", TORCH_BOX(&deep_ep::npu::dispatch_int8));
}
