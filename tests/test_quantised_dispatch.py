"""Quantised rows through Buffer.dispatch, in both row contracts and shape modes, on any sizes.

T local tokens, H hidden, K top-k, E experts, R ranks, N received rows.
"""

from dataclasses import replace

import pytest
import torch
from cases import Case, assert_same, cases, make_inputs
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import STRATEGIES, RankContext, RankPool
from test_low_latency import THRESHOLDS
from test_rank_rows import capacities, layout, make_buffer, received
from torch import Tensor

from deep_ep import quantization, reference


def rows_of(case: Case, rows: str, rank: int) -> tuple[Tensor, int, int]:
    """What `rank` receives [N, H], how many of its rows are used, and its num_worst_tokens."""
    inputs = make_inputs(case)
    if rows == "rank":
        worst = capacities(case, inputs)[rank]
        got = received(case, inputs, rank, worst)
        return got.recv_x, len(got.source), worst
    got = reference.dispatch(*inputs[:3], case.E, inputs.num_worst_tokens)[rank]
    return got.recv_x, int((got.recv_src_idx[:, 0] >= 0).sum()), inputs.num_worst_tokens[rank]


def check(ctx: RankContext, case: Case, strategy: str, rows: str, mode: str) -> None:
    buffer, r = make_buffer(ctx, strategy, rows), ctx.rank
    inputs = make_inputs(case)
    x, ids, weights = (tensors[r] for tensors in inputs[:3])
    recv_x, used, worst = rows_of(case, rows, r)
    arguments = {
        "topk_idx": ids,
        "topk_weights": weights.abs(),
        "num_worst_tokens": worst,
        **layout(buffer, ids, case.E),
    }
    (data, scales), *_, handle, _ = buffer.dispatch(x, quant_mode=mode, **arguments)
    for name, actual, wanted in zip(
        ("data", "scales"), (data, scales), quantization.quantize(recv_x, mode), strict=True
    ):
        assert actual.dtype == wanted.dtype and actual.shape == wanted.shape, name
        actual, wanted = (
            quantization._bytes(tensor.view(len(recv_x), tensor.shape[1] if tensor.dim() > 1 else 1))
            for tensor in (actual, wanted)
        )
        wanted[used:] = 0
        assert_same(name, actual.to(torch.int16), wanted.to(torch.int16))

    y = quantization.dequantize(data, scales).to(x.dtype)
    out, _, _ = buffer.combine(y, handle)
    plain, *_, plain_handle, _ = buffer.dispatch(x, quant_mode="none", **arguments)
    exact, _, _ = buffer.combine(plain, plain_handle)
    out, exact = out.double(), exact.double()
    total = float((out**2 + exact**2).sum())
    assert total == 0 or 1 - 2 * float((out * exact).sum()) / total < THRESHOLDS.get(mode, 2e-3)


@pytest.mark.slow
@pytest.mark.timeout(0)  # every run has its own
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("rows", ["expert", "rank"])
@settings(max_examples=40)
@given(case=cases(), exact=st.booleans(), mode=st.sampled_from(quantization.MODES[1:]))
def test_any_sizes(pool: RankPool, strategy: str, rows: str, case: Case, exact: bool, mode: str) -> None:
    small = replace(
        case,
        tokens=tuple(T % 33 for T in case.tokens),
        H=128 * (1 + case.H % 4),
        local_experts=min(case.local_experts, 8),
        capacity=None if exact else case.capacity,
    )
    pool.run(case.R, check, small, strategy, rows, mode)
