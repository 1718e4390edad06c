"""Quantised rows in NPU graphs: every mode converts, and computes what eager code computes.

T local tokens · H hidden · K top-k · E experts · R ranks · M num_max_dispatch_tokens_per_rank.
"""

import ge_graphs
import pytest
import torch
from cases import Case, make_inputs
from ge_graphs import HOST_SYNCS
from ranks import RankContext, RankPool
from torch import Tensor

import deep_ep
from deep_ep import quantization

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
