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
from test_low_latency import THRESHOLDS, overload
from test_rank_rows import capacities, layout, make_buffer, received
from torch import Tensor
from torch.utils._pytree import tree_flatten

from deep_ep import quantization
from deep_ep.ops import dispatch_int8


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


def by_the_op(patch: pytest.MonkeyPatch) -> None:
    """From here on Buffer leaves int8 to the op, as on NPUs."""
    patch.setattr(dispatch_int8, "is_for", lambda info, x: True)


def check_by_the_op(ctx: RankContext, case: Case, strategy: str, rows: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        by_the_op(patch)
        check(ctx, case, strategy, rows, "int8")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("rows", ["expert", "rank"])
@settings(max_examples=20)
@given(case=cases(), exact=st.booleans())
def test_int8_of_the_op_on_any_sizes(pool: RankPool, strategy: str, rows: str, case: Case, exact: bool) -> None:
    small = replace(case, tokens=tuple(T % 33 for T in case.tokens), local_experts=min(case.local_experts, 8))
    small = replace(small, H=1 + case.H % 300, capacity=None if exact else case.capacity)
    pool.run(case.R, check_by_the_op, small, strategy, rows)


def check_op(ctx: RankContext, strategy: str, rows: str) -> None:
    """Where the op makes int8 of rows, Buffer gives what it gives where rows are packed, in every form of a call."""
    torch._dynamo.reset()
    case = Case((1, 6), H=40, K=2, local_experts=3, dtype=torch.bfloat16, seed=4)
    buffer = make_buffer(ctx, strategy, rows)
    x, ids, weights = (tensors[ctx.rank] for tensors in make_inputs(case)[:3])
    x[-1] = 0
    x[:1, 3] = torch.inf

    def send(x: Any, weights: Tensor, handle: Any = None, quant_mode: str | None = "int8", **options: Any) -> Any:
        if handle is not None:
            return buffer.dispatch(x, handle=handle, quant_mode=quant_mode, **options)
        given = {"topk_idx": ids, "topk_weights": weights, **layout(buffer, ids, case.E), **options}
        return buffer.dispatch(x, quant_mode=quant_mode, **given)

    def tensors_of(results: Any) -> list[Any]:
        results[-1].current_stream_wait()
        return tree_flatten(results[:-1])[0]

    def same(found: Any, wanted: Any) -> None:
        for one, other in zip(tensors_of(found), tensors_of(wanted), strict=True):
            if isinstance(one, Tensor):
                assert_same("result", one, other)
            else:
                assert one == other

    forms: list[dict[str, Any]] = [{}, {"num_worst_tokens": 40}, {"num_worst_tokens": 5}, {"expert_alignment": 8}]
    forms += [{"num_worst_tokens": 40, "async_finish": True}, {"num_worst_tokens": 40, "expert_alignment": 4}]
    marked = x, torch.empty(0, dtype=torch.int8)
    for form in forms:
        wanted = send(x, weights, **form)
        wanted[-1].current_stream_wait()
        of_handle = send(x, weights, wanted[4])
        leaf, copy = (weights.clone().requires_grad_() for _ in range(2))
        if has_gradient := rows == "expert" and "async_finish" not in form:
            send(x, copy, **form)[2].square().sum().backward()
        with pytest.MonkeyPatch.context() as patch:
            by_the_op(patch)
            for one, options in ((x, {}), (marked, {"quant_mode": None})):
                found = send(one, weights, **form, **options)
                assert found[0][0].dtype == torch.int8
                same(found, wanted)
            same(send(x, weights, found[4]), of_handle)
            if has_gradient:
                send(x, leaf, **form)[2].square().sum().backward()
                assert_same("grad of weights", leaf.grad, copy.grad)
            if form in ({}, {"num_worst_tokens": 40}):
                compiled = torch.compile(
                    lambda x, form=form: send(x, weights, **form)[0], backend="aot_eager", fullgraph=True
                )
                same((compiled(x), wanted[-1]), (wanted[0], wanted[-1]))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="x requires a gradient"):
        by_the_op(patch)
        send(x.requires_grad_(), weights)


@pytest.mark.parametrize("rows", ["expert", "rank"])
@pytest.mark.parametrize("strategy", ALLTOALL_IS_SLOW)
def test_int8_of_the_op(pool: RankPool, strategy: str, rows: str) -> None:
    pool.run(2, check_op, strategy, rows)


def opcheck(ctx: RankContext, strategy: str) -> None:
    group = ctx.prepared_group(strategy).group_name
    case = Case((3, 5), H=24, K=2, local_experts=2, dtype=torch.bfloat16)
    x, ids, weights = (tensors[ctx.rank] for tensors in make_inputs(case)[:3])
    op = overload("dispatch_int8", strategy)
    for worst in (0, 7):
        arguments = ids, weights.requires_grad_(), case.E, 2, worst, group
        tests = ("test_schema", "test_faketensor", "test_autograd_registration")
        torch.library.opcheck(op, (x, *arguments), test_utils=tests)
        with pytest.raises(RuntimeError, match="x requires a gradient, which rows of int8 do not have"):
            op(x.clone().requires_grad_(), *arguments)
        # What is wrong on one rank is said on all, and the group stays usable.
        with pytest.raises(RuntimeError, match="num_experts"):
            op(x, *arguments[:2], 3 if ctx.rank == 0 else case.E, *arguments[3:])


@pytest.mark.parametrize("strategy", ALLTOALL_IS_SLOW)
def test_opcheck_of_int8(pool: RankPool, strategy: str) -> None:
    pool.run(2, opcheck, strategy)


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
