#include "schema.h"

// The overloads are fuse modes, which differ in the layout of weights and in what is counted; `strategy` is that of the
// communication. `options` are FusedOptions of python/deep_ep/fused_options.py.
STABLE_TORCH_LIBRARY_FRAGMENT(deep_ep, library) {
  const auto define = [&](const std::string& name, const std::string& schema) { library.def((name + schema).c_str()); };
  const std::string options =
      ", Tensor? gmm1_bias, Tensor? gmm2_bias, Tensor? shared_gmm1_weight, Tensor? shared_gmm1_weight_scale, "
      "Tensor? shared_gmm2_weight, Tensor? shared_gmm2_weight_scale, Tensor? x_active_mask, float swiglu_limit, "
      "float swiglu_alpha, float swiglu_beta)";
  for (const std::string mode : {"", ".dispatch_ffn_combine"})
    define("fused_deep_moe" + mode,
           "(Tensor x, Tensor topk_idx, Tensor topk_weights, Tensor gmm1_weight, Tensor gmm1_weight_scale, "
           "Tensor gmm2_weight, Tensor gmm2_weight_scale, int num_max_dispatch_tokens_per_rank, int num_experts, "
           "int num_ranks, int quant_mode, str group, str strategy" +
               options + " -> (Tensor combined_x, Tensor num_recv_tokens)");

  const std::string arguments =
      "(Tensor grad_out, Tensor x, Tensor topk_idx, Tensor topk_weights, Tensor gmm1_weight, Tensor gmm2_weight, "
      "int num_max_dispatch_tokens_per_rank, int num_experts, int num_ranks, str group, str strategy";
  for (const std::string mode : {"", ".dispatch_ffn_combine"}) {
    define("fused_deep_moe_backward" + mode,
           arguments +
               ") -> (Tensor grad_x, Tensor grad_topk_weights, Tensor grad_gmm1_weight, "
               "Tensor grad_gmm2_weight)");
    // Behind those four, the gradients of those options that are given.
    define("fused_deep_moe_options_backward" + mode, arguments + options + " -> Tensor[] grads");
  }
}
