// The ops, all of them, with what they take and give. Kernels are in cpu/ and npu/, and in python/deep_ep for the other
// overloads; what arguments mean is in the docstrings of python/deep_ep/ops.
//
// Every op has the overload `.alltoall` beside the one without a name, some have `.ops`. All overloads of an op have
// one schema: torch 2.13 aborts when a process ends if they differ. The overload without a name comes first: a call
// that names none takes the one that was defined first.
//
// `<op>_start` takes what the op takes, and gives a ticket for `wait` (started.h).
#include <torch/csrc/stable/library.h>

#include <string>

namespace deep_ep {
namespace {

class Schemas {
 public:
  explicit Schemas(torch::stable::detail::StableLibrary& library) : library_(library) {}

  // One overload. `schema` is everything behind the name: "(arguments) -> results".
  void one(const std::string& name, const std::string& schema) { library_.def((name + schema).c_str()); }

  void op(const std::string& name, const std::string& schema) {
    one(name, schema);
    one(name + ".alltoall", schema);
  }

  void op_with_ops(const std::string& name, const std::string& schema) {
    op(name, schema);
    one(name + ".ops", schema);
  }

  // With the op that starts it.
  void startable(const std::string& name, const std::string& arguments, const std::string& results) {
    op(name, arguments + " -> " + results);
    op(name + "_start", arguments + kTicket);
  }

  void startable_with_ops(const std::string& name, const std::string& arguments, const std::string& results) {
    op_with_ops(name, arguments + " -> " + results);
    op_with_ops(name + "_start", arguments + kTicket);
  }

 private:
  static constexpr const char* kTicket = " -> Tensor ticket";

  torch::stable::detail::StableLibrary& library_;
};

void define_normal_mode(Schemas define) {
  define.op("get_dispatch_layout",
            "(Tensor topk_idx, int num_experts, int num_ranks, int num_nodes) -> "
            "(Tensor num_tokens_per_rank, Tensor num_tokens_per_rdma_rank, Tensor num_tokens_per_expert, "
            "Tensor is_token_in_rank)");

  const std::string of_dispatch =
      "(Tensor x, Tensor topk_idx, Tensor topk_weights, int num_experts, int num_ranks, SymInt num_worst_tokens, "
      "str group)";
  const std::string beside_rows =
      "Tensor recv_topk_idx, Tensor recv_topk_weights, Tensor num_recv_tokens_per_expert, Tensor num_dropped, "
      "Tensor rank_prefix_matrix, Tensor channel_prefix_matrix, Tensor recv_channel_prefix_matrix, "
      "Tensor recv_src_idx, Tensor send_head)";
  define.startable("dispatch", of_dispatch, "(Tensor recv_x, " + beside_rows);
  // For kernels that quantise: elsewhere rows are quantised and brought back around dispatch.
  define.op("dispatch_int8", of_dispatch + " -> (Tensor recv_data, Tensor recv_scales, " + beside_rows);

  define.startable(
      "dispatch_backward",
      "(Tensor grad_recv_x, Tensor grad_recv_topk_weights, Tensor recv_src_idx, Tensor topk_idx, Tensor send_head, "
      "int num_experts, int num_ranks, str group)",
      "(Tensor grad_x, Tensor grad_topk_weights)");

  define.startable(
      "combine",
      "(Tensor x, Tensor topk_idx, Tensor topk_weights, Tensor recv_src_idx, Tensor send_head, int num_experts, "
      "int num_ranks, str group)",
      "Tensor combined_x");

  define.startable(
      "combine_backward",
      "(Tensor grad_out, Tensor x, Tensor topk_idx, Tensor topk_weights, Tensor recv_src_idx, Tensor send_head, "
      "int num_experts, int num_ranks, str group)",
      "(Tensor grad_x, Tensor grad_topk_weights)");
}

void define_low_latency(Schemas define) {
  // zero_unused: rows beyond those received become 0; without it they hold anything.
  define.startable_with_ops(
      "low_latency_dispatch",
      "(Tensor x, Tensor topk_idx, int num_max_dispatch_tokens_per_rank, int num_experts, int num_ranks, str group, "
      "str comm_alg, bool zero_unused=True)",
      "(Tensor recv_x, Tensor recv_count, Tensor recv_src_idx, Tensor layout_range, Tensor send_head)");

  define.startable_with_ops(
      "low_latency_combine",
      "(Tensor x, Tensor topk_idx, Tensor topk_weights, Tensor recv_src_idx, Tensor layout_range, Tensor send_head, "
      "int num_experts, int num_ranks, str group, str comm_alg)",
      "Tensor combined_x");

  // For kernels that quantise: elsewhere rows are quantised and brought back around low_latency_dispatch.
  define.op("low_latency_dispatch_int8",
            "(Tensor x, Tensor topk_idx, int num_max_dispatch_tokens_per_rank, int num_experts, int num_ranks, "
            "str group, bool zero_unused=True) -> (Tensor recv_data, Tensor recv_scales, Tensor recv_count, "
            "Tensor recv_src_idx, Tensor layout_range, Tensor send_head)");

  // low_latency_dispatch with R·M rows for each local expert. `parts`, if rows are made of two parts, is what they are
  // on this rank: of each its dtype and the bytes of its rows are used. layout is upstream DeepEP's: begin << 32 |
  // count.
  define.startable(
      "low_latency_dispatch_padded",
      "(Tensor x, Tensor topk_idx, Tensor[] parts, int num_max_dispatch_tokens_per_rank, int num_experts, "
      "int num_ranks, str group)",
      "(Tensor recv_x, Tensor recv_scales, Tensor recv_count, Tensor src_info, Tensor layout, Tensor recv_src_idx, "
      "Tensor layout_range, Tensor send_head)");

  // low_latency_combine of rows in the places of low_latency_dispatch_padded.
  define.startable(
      "low_latency_combine_padded",
      "(Tensor x, Tensor topk_idx, Tensor topk_weights, Tensor recv_src_idx, Tensor layout_range, Tensor send_head, "
      "int num_experts, int num_ranks, str group)",
      "Tensor combined_x");
}

// torch_npu's MoeDistributeDispatchV2 and MoeDistributeCombineV2 with what they take and give besides; their kernels
// are in Python.
void define_moe_distribute(Schemas define) {
  define.one("moe_distribute_dispatch",
             "(Tensor x, Tensor topk_idx, Tensor? topk_weights, Tensor? smooth_scales, Tensor? x_active_mask, "
             "int num_max_dispatch_tokens_per_rank, int num_experts, int num_ranks, int num_shared_ranks, "
             "bool is_shared, str group, str comm_alg) -> (Tensor recv_x, Tensor recv_scales, Tensor recv_count, "
             "Tensor assist_info, Tensor layout_range, Tensor expand_scales)");

  define.one("moe_distribute_combine",
             "(Tensor x, Tensor topk_idx, Tensor topk_weights, Tensor assist_info, Tensor layout_range, "
             "Tensor? expand_scales, Tensor? x_active_mask, int num_max_dispatch_tokens_per_rank, int num_experts, "
             "int num_ranks, int num_shared_ranks, bool is_shared, str group, str comm_alg) -> Tensor combined_x");
}

// The overloads are fuse modes, which differ in the layout of weights and in what is counted; `strategy` is that of the
// communication. `options` are FusedOptions of python/deep_ep/fused_options.py.
void define_fused_deep_moe(Schemas define) {
  const std::string options =
      ", Tensor? gmm1_bias, Tensor? gmm2_bias, Tensor? shared_gmm1_weight, Tensor? shared_gmm1_weight_scale, "
      "Tensor? shared_gmm2_weight, Tensor? shared_gmm2_weight_scale, Tensor? x_active_mask, float swiglu_limit, "
      "float swiglu_alpha, float swiglu_beta)";
  const std::string backward =
      "(Tensor grad_out, Tensor x, Tensor topk_idx, Tensor topk_weights, Tensor gmm1_weight, Tensor gmm2_weight, "
      "int num_max_dispatch_tokens_per_rank, int num_experts, int num_ranks, str group, str strategy";
  for (const std::string mode : {"", ".dispatch_ffn_combine"}) {
    define.one("fused_deep_moe" + mode,
               "(Tensor x, Tensor topk_idx, Tensor topk_weights, Tensor gmm1_weight, Tensor gmm1_weight_scale, "
               "Tensor gmm2_weight, Tensor gmm2_weight_scale, int num_max_dispatch_tokens_per_rank, int num_experts, "
               "int num_ranks, int quant_mode, str group, str strategy" +
                   options + " -> (Tensor combined_x, Tensor num_recv_tokens)");
    define.one(
        "fused_deep_moe_backward" + mode,
        backward + ") -> (Tensor grad_x, Tensor grad_topk_weights, Tensor grad_gmm1_weight, Tensor grad_gmm2_weight)");
    // Behind those four, the gradients of those options that are given.
    define.one("fused_deep_moe_options_backward" + mode, backward + options + " -> Tensor[] grads");
  }
}

// The results of the call of `op` that gave the ticket. What their shapes depend on is given again: `arguments` are the
// tensors that op takes for a forward call, or like the results of a backward call; num_max is the num_worst_tokens of
// dispatch, the num_max_dispatch_tokens_per_rank of low_latency_dispatch, and 0 for other ops.
//
// `wait` returns when they are there. `arriving` returns before, and the ticket stays good for one wait, which ends
// when they hold what they should.
void define_wait(Schemas define) {
  for (const char* name : {"wait", "arriving"})
    define.op_with_ops(name,
                       "(Tensor ticket, str op, Tensor[] arguments, int num_experts, int num_ranks, SymInt num_max, "
                       "str group) -> Tensor[] results");
}

}  // namespace
}  // namespace deep_ep

STABLE_TORCH_LIBRARY_FRAGMENT(deep_ep, library) {
  const deep_ep::Schemas define(library);
  deep_ep::define_normal_mode(define);
  deep_ep::define_low_latency(define);
  deep_ep::define_moe_distribute(define);
  deep_ep::define_fused_deep_moe(define);
  deep_ep::define_wait(define);
}
