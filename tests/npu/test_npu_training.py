"""Whole models in NPU graphs: the example trains as it does with aot_eager, and an MoE block needs nothing of the host.

T local tokens · H hidden · K top-k · E experts · R ranks · L = E/R local experts.
"""

from typing import Any

import ge_graphs
import kernel_route
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from cann import stand_in
from ge_graphs import HOST_SYNCS
from ranks import RankContext, RankPool
from torch import Tensor
from train_moe import Config, train

import deep_ep
from tools.twin import kernels

SMALL = {"steps": 4, "batch": 8, "seq": 32, "dim": 32, "layers": 2, "quiet": True}


def train_twice(ctx: RankContext, options: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Losses with graphs for NPUs, whose parts run one by one, and with aot_eager."""
    ge_graphs.recorded()
    metrics = train(Config(**SMALL, **options, compile="npu"), ctx.group)
    assert (metrics["graphs"], metrics["graph_breaks"]) == (1, 0)
    forward, backward = ge_graphs.recorded()
    exact = not options.get("num_worst_tokens")
    strategy = options.get("strategy", "default")
    types = {node.type for node in forward.communicating} | {node.type for node in backward.communicating}
    if strategy == "default":
        assert forward.types.count("DeepEpCombine") == SMALL["layers"]
        assert types == {
            "DeepEpDispatchExact" if exact else "DeepEpDispatch",
            *("DeepEpCombine", "DeepEpCombineBackward", "DeepEpDispatchBackward", "HcomAllReduce"),
        }
    else:
        assert types == {"HcomAllGather", "HcomAllReduce", "HcomAllToAllV" if exact else "HcomAllToAll"}
    for graph in (forward, backward):
        assert ge_graphs.check_outputs(graph) > 50
        assert exact or not [node.type for node in graph.nodes if node.type in HOST_SYNCS]
    plain = train(Config(**SMALL, **options, compile="aot_eager"), ctx.group)
    torch.set_num_threads(1)
    return metrics["losses"], plain["losses"]


@pytest.mark.parametrize(
    "size, options",
    [
        (2, {}),
        (4, {"num_worst_tokens": 300}),
        (2, {"strategy": "alltoall"}),
        (2, {"strategy": "alltoall", "num_worst_tokens": 600}),
    ],
    ids=lambda value: "-".join(map(str, value.values())) or "exact" if isinstance(value, dict) else f"{value} ranks",
)
def test_the_example_trains(pool: RankPool, size: int, options: dict[str, Any]) -> None:
    for losses, expected in pool.run(size, train_twice, options):
        # The CPU's fused attention, which has no converter, rounds differently from its parts.
        torch.testing.assert_close(losses, expected, rtol=1e-5, atol=0)


def train_on_kernels(ctx: RankContext, options: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Losses with graphs for NPUs, in which the AscendC kernels do what is deep_ep's, and with aot_eager."""
    twin = kernel_route.open_route(ctx.rank)
    group = dist.new_group(backend=kernel_route.BACKEND)
    stand_in.clear_log()
    metrics = train(Config(**SMALL, **options, compile="npu"), group)
    launched = {line.text for line in stand_in.log("launch") if line.text.startswith("deep_ep.")}
    assert launched >= {f"deep_ep.{op}" for op in ("dispatch", "combine", "dispatch_backward", "combine_backward")}
    assert not twin.take_violations()
    kernel_route.close_route()
    plain = train(Config(**SMALL, **options, compile="aot_eager"), ctx.group)
    return metrics["losses"], plain["losses"]


@pytest.mark.parametrize("options", [{}, {"num_worst_tokens": 300}], ids=["exact", "capacity"])
def test_the_example_trains_on_the_kernels(options: dict[str, Any]) -> None:
    kernels.build()
    npus = RankPool(2)
    try:
        for losses, expected in npus.run(2, train_on_kernels, options):
            torch.testing.assert_close(losses, expected, rtol=1e-5, atol=0)
    finally:
        npus.close()


# An MoE block with SwiGLU experts

H, WIDTH, K, L, M, W = 32, 64, 2, 4, 8, 96


class Block(torch.nn.Module):
    """Router, dispatch, grouped SwiGLU experts, combine; in low latency if there is a Buffer."""

    def __init__(self, group: str, R: int, buffer: deep_ep.Buffer | None) -> None:
        super().__init__()
        self.group, self.buffer, self.E = group, buffer, R * L
        torch.manual_seed(0)
        self.router = torch.nn.Linear(H, self.E, bias=False)
        self.gate, self.up = (torch.nn.Parameter(0.1 * torch.randn(L, H, WIDTH).bfloat16()) for _ in range(2))
        self.down = torch.nn.Parameter(0.1 * torch.randn(L, WIDTH, H).bfloat16())

    def experts(self, rows: Tensor, counts: Tensor) -> Tensor:
        ends = counts.cumsum(0).to(torch.int32)
        gate, up = (torch._grouped_mm(rows, weight, offs=ends) for weight in (self.gate, self.up))
        y = torch._grouped_mm(F.silu(gate) * up, self.down, offs=ends)
        # What is behind the last group is not computed.
        return torch.where(torch.arange(y.shape[0], dtype=torch.int32).unsqueeze(1) < ends[-1], y, 0)

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x.float()).softmax(-1).topk(K)
        if self.buffer is not None:
            rows, counts, handle, _, _ = self.buffer.low_latency_dispatch(x, ids, M, self.E, use_fp8=False)
            return self.buffer.low_latency_combine(self.experts(rows, counts), ids, weights, handle)[0]
        out = deep_ep.dispatch(x, ids, weights, num_experts=self.E, group=self.group, num_worst_tokens=W)
        return deep_ep.combine(self.experts(out.recv_x, out.num_recv_tokens_per_expert), out.handle, group=self.group)


def moe_block(ctx: RankContext, strategy: str, low_latency: bool) -> None:
    group = ctx.prepared_group("alltoall" if strategy == "alltoall" else "default")
    buffer = None
    if low_latency:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("DEEP_USE_MODE", "alltoall" if strategy == "alltoall" else "default")
            buffer = deep_ep.Buffer(group, low_latency_strategy=strategy, comm_alg="fullmesh_v1")
    block = Block(group.group_name, ctx.size, buffer)
    torch._dynamo.reset()
    ge_graphs.recorded()
    compiled = torch.compile(block, backend=ge_graphs.npu_backend(exact=True), fullgraph=True)
    x = torch.randn(6, H, generator=torch.Generator().manual_seed(ctx.rank)).bfloat16()
    if strategy == "ops":
        with torch.no_grad(), pytest.raises(RuntimeError, match="x must be on an NPU"):
            compiled(x)
    else:
        grads = []
        for layer in (compiled, block):
            out = layer(x)
            grads.append((out, *torch.autograd.grad(out.float().square().sum(), list(block.parameters()))))
        for actual, expected in zip(*grads, strict=True):
            torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-3)
    graphs = ge_graphs.recorded()
    assert len(graphs) == (1 if strategy == "ops" else 2)
    for graph in graphs:
        assert ge_graphs.check_outputs(graph) > 10
        assert not [node.type for node in graph.nodes if node.type in HOST_SYNCS]
        assert len(graph.of_type("GroupedMatmul")) >= 3
    if strategy == "ops":
        assert graphs[0].types == ["MoeDistributeDispatchV2", "MoeDistributeCombineV2"]


@pytest.mark.parametrize(
    "strategy, low_latency",
    [("default", False), ("alltoall", False), ("default", True), ("alltoall", True), ("ops", True)],
    ids=lambda value: value if isinstance(value, str) else "low latency" if value else "capacity",
)
def test_an_moe_block_needs_nothing_of_the_host(pool: RankPool, strategy: str, low_latency: bool) -> None:
    pool.run(2, moe_block, strategy, low_latency)
