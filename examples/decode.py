"""Decoding with low latency: static shapes, one graph, two micro-batches whose communication overlaps.

    python -m torch.distributed.run --standalone --nproc-per-node 2 examples/decode.py

A call with return_recv_hook=True does not wait for its peers; its hook does. While rows of one micro-batch travel, the
experts of the other compute. Nothing leaves the graph: hooks are part of it.

T tokens of a micro-batch · M the most of any rank · H hidden · K top-k · E experts · R ranks · L = E/R local experts.
"""

import time

import torch
import torch.distributed as dist
from torch import Tensor, nn

import deep_ep

T, H, K, E, LAYERS, STEPS = 8, 256, 2, 8, 2, 50
M = T


class Layer(nn.Module):
    def __init__(self, buffer: deep_ep.Buffer, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.buffer = buffer
        self.router = nn.Linear(H, E)
        L = E // group.size()
        self.experts = nn.Parameter((torch.randn(E, H, H) / H**0.5)[group.rank() * L :][:L].clone())

    def forward(self, x: list[Tensor]) -> list[Tensor]:
        """Of each micro-batch [T, H]."""
        routed = [self.router(one).softmax(-1).topk(K) for one in x]
        sent = [self.send(one, ids) for one, (_, ids) in zip(x, routed, strict=True)]
        combined = []
        for (rows, _, handle, _, hook), (weights, ids) in zip(sent, routed, strict=True):
            hook()  # the rows are here: [L, R·M, H]
            y = torch.bmm(rows, self.experts).relu()
            combined.append(self.buffer.low_latency_combine(y, ids, weights, handle, return_recv_hook=True))
        for _, _, hook in combined:
            hook()
        return [one + out for one, (out, _, _) in zip(x, combined, strict=True)]

    def send(self, x: Tensor, ids: Tensor) -> tuple:
        return self.buffer.low_latency_dispatch(x, ids, M, E, use_fp8=False, return_recv_hook=True)


@torch.no_grad()
def main() -> None:
    dist.init_process_group("gloo")
    rank, R = dist.get_rank(), dist.get_world_size()
    buffer = deep_ep.Buffer(dist.group.WORLD, low_latency_mode=True, rows="rank")
    torch.manual_seed(0)
    layers = nn.ModuleList(Layer(buffer, dist.group.WORLD) for _ in range(LAYERS)).bfloat16()
    torch.manual_seed(rank)

    def step(x: list[Tensor]) -> list[Tensor]:
        for layer in layers:
            x = layer(x)
        return x

    compiled = torch.compile(step, fullgraph=True)
    x = [torch.randn(T, H, dtype=torch.bfloat16) for _ in range(2)]
    difference = max(float((a - b).abs().max()) for a, b in zip(compiled(x), step(x), strict=True))
    begin = time.perf_counter()
    for _ in range(STEPS):
        x = [nn.functional.normalize(one, dim=-1) for one in compiled(x)]
    tokens = 2 * T * R * STEPS / (time.perf_counter() - begin)
    if rank == 0:
        print(f"{LAYERS} layers on {R} ranks, compiled: {tokens:.0f} tokens/s; differs from eager by {difference:.0e}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
