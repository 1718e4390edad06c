"""Quantised rows in NPU graphs: every mode converts, and computes what eager code computes.

T local tokens · H hidden · K top-k · E experts · R ranks · M num_max_dispatch_tokens_per_rank.
"""

import ge_graphs
import kernel_route
import pytest
import torch
import torch.distributed as dist
from cann import stand_in
from cases import Case, assert_same, make_inputs
from ge_graphs import HOST_SYNCS
from ranks import RankContext, RankPool
from torch import Tensor

import deep_ep
from deep_ep import quantization
from deep_ep.ops import dispatch_int8
from tools.twin import kernels

H, K, L, M = 512, 2, 4, 8


def converts(ctx: RankContext, rows: str, mode: str, low_latency: bool) -> None:
    buffer = deep_ep.Buffer(ctx.prepared_group("default"), rows=rows)
    E = ctx.size * L
    case = Case((5, 7), H=H, K=K, local_experts=L, dtype=torch.bfloat16, ids="distinct")
    x, ids, weights = (given[ctx.rank] for given in make_inputs(case)[:3])

    def received(x: Tensor, ids: Tensor, weights: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """(data, scales), and the rows that they stand for, back at their tokens."""
        if low_latency:
            parts, _, handle, _, _ = buffer.low_latency_dispatch(x, ids, M, E, quant_mode=mode)
            flat = [part.flatten(0, 1) for part in parts] if rows == "rank" else parts
            y = quantization.dequantize(*flat).view(*parts[0].shape[:-1], H).to(x.dtype)
            return parts, buffer.low_latency_combine(y, ids, weights, handle)[0]
        per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(ids, E)
        parts, *_, handle, _ = buffer.dispatch(
            x,
            topk_idx=ids,
            topk_weights=weights,
            num_tokens_per_rank=per_rank,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            num_worst_tokens=40,
            quant_mode=mode,
        )
        return parts, buffer.combine(quantization.dequantize(*parts).to(x.dtype), handle)[0]

    torch._dynamo.reset()
    ge_graphs.recorded()
    compiled = torch.compile(received, backend=ge_graphs.npu_backend(exact=True), fullgraph=True)
    with torch.no_grad():
        (parts, combined), (wanted_parts, wanted) = compiled(x, ids, weights), received(x, ids, weights)
    for actual, expected in zip(parts, wanted_parts, strict=True):
        assert actual.dtype == expected.dtype
        assert torch.equal(actual.view(torch.uint8), expected.view(torch.uint8))
    torch.testing.assert_close(combined, wanted)
    (graph,) = ge_graphs.recorded()
    assert not [node.type for node in graph.nodes if node.type in HOST_SYNCS]


@pytest.mark.parametrize("rows, mode", [*(("expert", m) for m in quantization.MODES[1:]), ("rank", "block_fp8_e4m3")])
def test_low_latency(pool: RankPool, rows: str, mode: str) -> None:
    pool.run(2, converts, rows, mode, True)


@pytest.mark.parametrize("rows, mode", [("rank", "block_fp8_e4m3"), ("expert", "mx_fp4_e2m1")])
def test_normal_mode(pool: RankPool, rows: str, mode: str) -> None:
    pool.run(2, converts, rows, mode, False)


def converts_on_the_kernel(ctx: RankContext, worst: int, requires_grad: bool) -> None:
    """Buffer's int8 as it traces for an NPU: the graph has the operator, in whose place the AscendC kernel runs."""
    E, case = ctx.size * L, Case((5, 7), H=H, K=K, local_experts=L, dtype=torch.bfloat16, ids="distinct")
    x, ids, weights = (given[ctx.rank] for given in make_inputs(case)[:3])
    x[1] = 0
    plain = deep_ep.Buffer(ctx.prepared_group("default"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEEP_NORMAL_MODE_USE_INT8_QUANT", "1")
        twin = kernel_route.open_route(ctx.rank)
        buffer = deep_ep.Buffer(dist.new_group(backend=kernel_route.BACKEND))
        patch.setattr(dispatch_int8, "is_for", lambda info, x: True)

        def received(x: Tensor, ids: Tensor, weights: Tensor, mode: str | None = None) -> tuple[Tensor, ...]:
            one = buffer if mode is None else plain
            per_rank, _, per_expert, in_rank, _ = one.get_dispatch_layout(ids, E)
            (data, scales), _, recv_weights, *_ = one.dispatch(
                x,
                topk_idx=ids,
                topk_weights=weights,
                num_tokens_per_rank=per_rank,
                is_token_in_rank=in_rank,
                num_tokens_per_expert=per_expert,
                num_worst_tokens=worst,
                quant_mode=mode,
            )
            return data, scales, recv_weights

        torch._dynamo.reset()
        ge_graphs.recorded()
        stand_in.clear_log()
        leaf = weights.clone().requires_grad_(requires_grad)
        compiled = torch.compile(received, backend=ge_graphs.npu_backend(exact=True), fullgraph=True)
        found = compiled(x, ids, leaf)
        if requires_grad:
            found[2].sum().backward()
        graphs = ge_graphs.recorded()
        launched = [line.text for line in stand_in.log("launch")]
        assert "deep_ep.dispatch_int8" in launched and "deep_ep.dispatch" not in launched
        assert not twin.take_violations()
        kernel_route.close_route()
    assert graphs[0].types == ["DeepEpDispatchInt8" if worst else "DeepEpDispatchInt8Exact"]
    for graph in graphs:
        assert ge_graphs.check_outputs(graph) > 1
    copy = weights.clone().requires_grad_(requires_grad)
    wanted = received(x, ids, copy, "int8")
    for name, actual, expected in zip(("data", "scales", "weights"), found, wanted, strict=True):
        assert_same(name, actual.detach(), expected.detach())
    if requires_grad:
        wanted[2].sum().backward()
        assert graphs[1].types == ["DeepEpDispatchBackward"]
        assert_same("grad of weights", leaf.grad, copy.grad)


@pytest.mark.parametrize("requires_grad", [False, True], ids=["", "gradients"])
@pytest.mark.parametrize("worst", [0, 40], ids=["exact", "capacity"])
def test_int8_on_the_kernel(worst: int, requires_grad: bool) -> None:
    kernels.build()
    npus = RankPool(2)
    try:
        npus.run(2, converts_on_the_kernel, worst, requires_grad)
    finally:
        npus.close()
