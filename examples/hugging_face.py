"""A Mixture-of-Experts model of Hugging Face's transformers with its experts spread over ranks.

Whatever the block's router does, its experts are called with tokens, expert ids and weights: `ExpertParallel` stands in
for them, sends each token to the ranks of its experts, has the block's own experts compute there, and brings the
results back. The rest of the model is each rank's own, for its own tokens.

    python -m torch.distributed.run --nproc-per-node 4 examples/hugging_face.py

makes a small Mixtral with random weights and prints by how much its logits differ from those of the whole model.

T tokens · H hidden · K top-k · E experts · R ranks · L = E/R local experts · N received rows.
"""

import copy

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

import deep_ep


class ExpertParallel(nn.Module):
    """The experts of a block, of which this rank keeps its own L: e // L is the rank of expert e."""

    def __init__(self, experts: nn.Module, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.num_experts = experts.num_experts
        self.group = group.group_name  # which can be copied and saved
        L = self.num_experts // group.size()
        for name, weight in list(experts.named_parameters(recurse=False)):
            own = weight.detach()[group.rank() * L :][:L].clone()
            setattr(experts, name, nn.Parameter(own, weight.requires_grad))
        experts.num_experts = L
        self.local = experts

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out = deep_ep.dispatch(
            hidden_states, top_k_index, top_k_weights, num_experts=self.num_experts, group=self.group
        )
        # A row is a token with one expert, whose weight is combine's affair.
        expert = out.recv_topk_idx.amax(1, keepdim=True)  # [N, 1]
        y = self.local(out.recv_x, expert, torch.ones_like(expert, dtype=out.recv_x.dtype))
        return deep_ep.combine(y, out.handle, group=self.group)


def expert_parallel(model: nn.Module, group: dist.ProcessGroup) -> nn.Module:
    """`model` with the experts of all its blocks spread over `group`, which deep_ep.init has prepared."""
    for module in list(model.modules()):
        experts = getattr(module, "experts", None)
        if isinstance(experts, nn.Module) and hasattr(experts, "num_experts"):
            module.experts = ExpertParallel(experts, group)
    return model


def main() -> None:
    dist.init_process_group("gloo")
    deep_ep.init()
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2,
    )  # fmt: skip
    dense = MixtralForCausalLM(config)
    model = expert_parallel(copy.deepcopy(dense), dist.group.WORLD)
    ids = torch.randint(256, (2, 16 + dist.get_rank()))
    logits, expected = model(ids).logits, dense(ids).logits
    print(f"rank {dist.get_rank()}: logits differ by at most {(logits - expected).abs().max():.1e}", flush=True)
    logits.logsumexp(-1).mean().backward()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
