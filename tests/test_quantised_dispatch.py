"""Quantised rows through Buffer.dispatch, in both row contracts and shape modes, on any sizes.

T local tokens, H hidden, K top-k, E experts, R ranks, N received rows.
"""

from dataclasses import replace
from typing import Any

import pytest
import reference
import torch
from cases import Case, assert_same, cases, make_inputs
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import ALLTOALL_IS_SLOW, STRATEGIES, RankContext, RankPool
from test_low_latency import THRESHOLDS
from test_rank_rows import capacities, layout, make_buffer, received
from torch import Tensor

from deep_ep import quantization


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
        flat = name == "scales" and rows == "expert" and mode.startswith("mx_")
        assert actual.dtype == wanted.dtype and actual.shape == (wanted.view(-1) if flat else wanted).shape, name
        actual = actual.view(wanted.shape)
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


MARKERS = {
    torch.int8: "int8",
    torch.float8_e4m3fn: "mx_fp8_e4m3",
    torch.float8_e5m2: "mx_fp8_e5m2",
    torch.float4_e2m1fn_x2: "mx_fp4_e2m1",
}


def check_forms_of_x(ctx: RankContext, strategy: str, rows: str) -> None:
    """(x, marker), and (data, scales) with scales of both shapes, against quant_mode."""
    torch._dynamo.reset()
    case = Case((1, 6), H=64, K=2, dtype=torch.bfloat16, seed=4)
    buffer = make_buffer(ctx, strategy, rows)
    x, ids, weights = (tensors[ctx.rank] for tensors in make_inputs(case)[:3])
    arguments = {"topk_idx": ids, "topk_weights": weights, **layout(buffer, ids, case.E)}

    def send(x: Any, **options: Any) -> tuple[Tensor, Tensor]:
        return buffer.dispatch(x, **arguments, **options)[0]

    def same(got: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
        for one, other in zip(got, wanted, strict=True):
            assert one.dtype == other.dtype and one.shape == other.shape
            assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))

    for dtype, mode in MARKERS.items():
        data, scales = send(x, quant_mode=mode)
        N, S = len(data), case.H // 32
        if mode != "int8":
            assert scales.shape == ((N * S,) if rows == "expert" else (N, S))
        own, own_scales = quantization.quantize(x, mode)
        forms: list[Any] = [(own, own_scales), (own, own_scales.view(-1))]
        # Of any shape, also [T] and [T, H]: it is no scales of rows that are not quantised.
        forms += [(x, torch.empty(shape, dtype=dtype)) for shape in (0, 1, len(x), (len(x), case.H))]
        for form in forms:
            same(send(form), (data, scales))
    compiled = torch.compile(send, backend="aot_eager", fullgraph=True)
    for form in forms[1:3]:
        same(compiled(form), (data, scales))
    # What is neither, and what is said twice.
    for form, mode, error in (
        ((x, torch.empty(0)), None, r"x\[1\] must be scales .* got torch.float32 \[0\]"),
        ((x, torch.empty(0, dtype=torch.int8)), "int8", "quant_mode must be None"),
        ((x, torch.empty(0, dtype=torch.int8)), "bf16", "quant_mode must be None"),
        ((own, own_scales), "int8", "quant_mode must be None"),
        ((own, own_scales[:0]), None, "scales must have T = "),
    ):
        with pytest.raises(ValueError, match=error):
            send(form, quant_mode=mode)
    # Scales of any other dtype stay scales, next to rows of any dtype.
    _, fp32 = send((x, torch.ones(len(x), 3)))
    assert fp32.shape[1:] == (3,) and (fp32 == 1).all()


@pytest.mark.parametrize("rows", ["expert", pytest.param("rank", marks=pytest.mark.slow)])
@pytest.mark.parametrize("strategy", ALLTOALL_IS_SLOW)
def test_forms_of_x(pool: RankPool, strategy: str, rows: str) -> None:
    pool.run(2, check_forms_of_x, strategy, rows)
