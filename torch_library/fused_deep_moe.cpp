#include "schema.h"

// The overloads are fuse modes, which differ in the layout of weights and in what is counted; `strategy` is that of the
// communication.
STABLE_TORCH_LIBRARY_FRAGMENT(deep_ep, library) {
  const auto define = [&](const std::string& name, const std::string& schema) {
    library.def((name + schema).c_str());
    library.def((name + ".dispatch_ffn_combine" + schema).c_str());
  };
  define("fused_deep_moe",
         "(Tensor x, Tensor topk_idx, Tensor topk_weights, Tensor gmm1_weight, Tensor gmm1_weight_scale, "
         "Tensor gmm2_weight, Tensor gmm2_weight_scale, int num_max_dispatch_tokens_per_rank, int num_experts, "
         "int num_ranks, int quant_mode, str group, str strategy) -> (Tensor combined_x, Tensor num_recv_tokens)");
  define("fused_deep_moe_backward",
         "(Tensor grad_out, Tensor x, Tensor topk_idx, Tensor topk_weights, Tensor gmm1_weight, Tensor gmm2_weight, "
         "int num_max_dispatch_tokens_per_rank, int num_experts, int num_ranks, str group, str strategy) -> "
         "(Tensor grad_x, Tensor grad_topk_weights, Tensor grad_gmm1_weight, Tensor grad_gmm2_weight)");
}
