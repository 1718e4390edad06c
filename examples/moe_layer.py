"""An expert-parallel layer, compiled, forward and backward: each token goes to two experts, wherever they are.

    python -m torch.distributed.run --standalone --nproc-per-node 2 examples/moe_layer.py

T tokens · H hidden · K top-k · E experts · R ranks · L = E/R local experts · N received rows.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

import deep_ep

T, H, K, E = 100, 64, 2, 8


class MoE(nn.Module):
    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.group = group.group_name
        self.router = nn.Linear(H, E)
        L = E // group.size()
        experts = torch.randn(E, H, H) / H**0.5  # the same on all ranks, each of which keeps its own
        self.experts = nn.Parameter(experts[group.rank() * L :][:L].clone())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = self.router(x).softmax(-1).topk(K)
        out = deep_ep.dispatch(x, ids, weights, num_experts=E, group=self.group)
        counts = out.num_recv_tokens_per_expert  # [L]; rows are sorted by local expert
        y = nn.functional.grouped_mm(out.recv_x, self.experts, offs=counts.cumsum(0).int()).relu()
        return deep_ep.combine(y, out.handle, group=self.group), counts


def main() -> None:
    dist.init_process_group("gloo")
    deep_ep.init()
    rank = dist.get_rank()
    torch.manual_seed(0)
    layer = MoE(dist.group.WORLD).bfloat16()
    torch.manual_seed(rank)
    x = torch.randn(T + rank, H, dtype=torch.bfloat16)  # T may differ between ranks
    out, counts = torch.compile(layer, fullgraph=True)(x)
    out.square().mean().backward()
    norm = layer.experts.grad.norm()
    print(f"rank {rank}: {len(x)} tokens, rows of its experts {counts.tolist()}, norm of their gradient {norm:.3f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
