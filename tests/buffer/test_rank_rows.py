"""Buffer(rows="rank"), the contract of upstream DeepEP, against one written out over all ranks' inputs.

Symbols: T local tokens, H hidden, K top-k, E experts, R ranks, L = E/R local experts, N received rows.
"""

import os
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from cases import Case, Inputs, assert_same, cases, make_inputs
from hypothesis import given, settings
from ranks import ALLTOALL_IS_SLOW, STRATEGIES, RankContext, RankPool
from torch import Tensor

import deep_ep
from deep_ep import quantization


def make_buffer(ctx: RankContext, strategy: str, rows: str | None = "rank", **arguments: Any) -> deep_ep.Buffer:
    group = ctx.prepared_group(strategy)
    with mock.patch.dict(os.environ, DEEP_USE_MODE=strategy):
        return deep_ep.Buffer(group, rows=rows, **arguments)


# The reference


class Received(NamedTuple):
    """What a rank must get."""

    source: list[tuple[int, int]]  # rank and token of every row
    recv_x: Tensor
    recv_topk_idx: Tensor
    recv_topk_weights: Tensor
    counts: list[int]
    tail: int  # unused rows at the end


def received(case: Case, inputs: Inputs, rank: int, worst: int) -> Received:
    xs, idxs, weights, _ = inputs
    L = case.local_experts
    source = [
        (s, t)
        for s in range(case.R)
        for t, ids in enumerate(idxs[s].tolist())
        if any(i >= 0 and i // L == rank for i in ids)
    ]
    if worst:
        source = source[:worst]
    tail = worst - len(source) if worst else 0
    N = len(source) + tail
    x = torch.zeros(N, case.H, dtype=case.dtype)
    idx = torch.full((N, case.K), -1)
    w = torch.zeros(N, case.K)
    for n, (s, t) in enumerate(source):
        x[n] = xs[s][t]
        local = idxs[s][t] - rank * L
        mine = (local >= 0) & (local < L)
        idx[n] = local.where(mine, -1)
        w[n] = weights[s][t].where(mine, 0)
    return Received(source, x, idx, w, torch.bincount(idx[idx >= 0], minlength=L).tolist(), tail)


def capacities(case: Case, inputs: Inputs) -> list[int]:
    """W by rank: a fraction of the rows meant for it."""
    if case.capacity is None:
        return [0] * case.R
    return [max(1, round(part * len(received(case, inputs, r, 0).source))) for r, part in enumerate(case.capacity)]


def factors(num_rows: int, dtype: torch.dtype) -> Tensor:
    """One of its own for each row."""
    return (0.25 + torch.arange(num_rows).remainder(61) / 16).to(dtype).unsqueeze(1)


class Expected:
    """The results of the whole group: dispatch, rows times factors, combine, and their gradients."""

    def __init__(self, case: Case) -> None:
        self.inputs = make_inputs(case)
        self.worst = capacities(case, self.inputs)
        R = case.R
        self.received = [received(case, self.inputs, r, self.worst[r]) for r in range(R)]
        generator = torch.Generator().manual_seed(case.seed + 1)
        self.grad_outs = [torch.randn(x.shape, generator=generator).to(case.dtype) for x in self.inputs.xs]
        self.out_sums = [torch.zeros(x.shape) for x in self.inputs.xs]
        self.grad_sums = [torch.zeros(x.shape) for x in self.inputs.xs]
        self.weight_sums = [torch.zeros(w.shape) for w in self.inputs.topk_weights]
        for got in self.received:
            f = factors(len(got.recv_x), case.dtype)
            for n, (s, t) in enumerate(got.source):
                self.out_sums[s][t] += (got.recv_x[n] * f[n]).float()
                self.grad_sums[s][t] += (self.grad_outs[s][t] * f[n]).float()
                self.weight_sums[s][t] += got.recv_topk_weights[n]

    def out(self, rank: int, dtype: torch.dtype) -> Tensor:
        return self.out_sums[rank].to(dtype)


def layout(buffer: deep_ep.Buffer, ids: Tensor, E: int) -> dict[str, Tensor]:
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(ids, E)
    return {"num_tokens_per_rank": per_rank, "is_token_in_rank": in_rank, "num_tokens_per_expert": per_expert}


class Results(NamedTuple):
    recv_x: Tensor
    recv_topk_idx: Tensor
    recv_topk_weights: Tensor
    counts: Any
    source: Tensor
    dropped: Tensor
    cached: Tensor
    out: Tensor
    weights: Tensor


def layer(buffer: deep_ep.Buffer, E: int, worst: int, x: Tensor, ids: Tensor, weights: Tensor) -> Results:
    recv_x, recv_idx, recv_weights, counts, handle, event = buffer.dispatch(
        x, topk_idx=ids, topk_weights=weights, num_worst_tokens=worst, **layout(buffer, ids, E)
    )
    event.current_stream_wait()
    rows = recv_x * factors(recv_x.shape[0], recv_x.dtype)
    out, out_weights, _ = buffer.combine(rows, handle, topk_weights=recv_weights)
    cached, *_ = buffer.dispatch(x.detach(), handle=handle)
    # An output of unknown size must have a gradient or need none.
    source, dropped = handle.recv_src_idx, handle.num_dropped
    return Results(recv_x.detach(), recv_idx, recv_weights, counts, source, dropped, cached, out, out_weights)


def check(ctx: RankContext, case: Case, strategy: str, backend: str) -> None:
    buffer = make_buffer(ctx, strategy)
    expected, r = Expected(case), ctx.rank
    x, ids, weights = (tensors[r].clone() for tensors in expected.inputs[:3])
    x.requires_grad_()
    weights.requires_grad_()
    fn: Callable = layer
    if backend != "eager":
        torch._dynamo.reset()
        fn = torch.compile(layer, backend=backend, fullgraph=True)
    results = fn(buffer, case.E, expected.worst[r], x, ids, weights)
    # Twice the weight's gradient: once by way of recv_topk_weights, once by way of combine.
    grad_x, grad_weights = torch.autograd.grad(
        [results.out, results.weights, results.recv_topk_weights],
        [x, weights],
        [expected.grad_outs[r], torch.ones_like(weights), torch.ones_like(results.recv_topk_weights)],
    )
    wanted = expected.received[r]
    for name in ("recv_x", "recv_topk_idx", "recv_topk_weights"):
        assert_same(name, getattr(results, name), getattr(wanted, name))
    if case.capacity is not None:
        assert results.counts == []
    else:
        assert isinstance(results.counts, list if backend == "eager" else Tensor)
        assert torch.as_tensor(results.counts).tolist() == wanted.counts
    assert [tuple(row) for row in results.source[:, :2].tolist()] == wanted.source + [(-1, -1)] * wanted.tail
    dropped = len(received(case, expected.inputs, r, 0).source) - len(wanted.source)
    assert results.dropped.item() == dropped
    assert_same("cached", results.cached, wanted.recv_x)
    assert_same("out", results.out, expected.out(r, case.dtype))
    assert_same("weights", results.weights, expected.weight_sums[r])
    assert_same("grad_x", grad_x, expected.grad_sums[r].to(case.dtype))
    delivered = torch.zeros_like(weights)
    for rank, got in enumerate(expected.received):
        for s, t in got.source:
            if s == r:
                delivered[t] += (ids[t] >= 0) & (ids[t] // case.local_experts == rank)
    assert_same("grad_topk_weights", grad_weights, 2 * delivered)


@pytest.mark.parametrize("strategy", ALLTOALL_IS_SLOW)
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "capacity"])
@settings(max_examples=25)
@given(case=cases())
def test_matches_the_reference(pool: RankPool, strategy: str, exact: bool, case: Case) -> None:
    small = Case(
        tuple(T % 33 for T in case.tokens),
        H=case.H % 64 + 8,
        K=case.K,
        local_experts=min(case.local_experts, 8),
        dtype=case.dtype,
        ids=case.ids,
        absent=case.absent,
        capacity=None if exact else case.capacity,
        seed=case.seed,
    )
    pool.run(case.R, check, small, strategy, "eager")


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("strategy", ALLTOALL_IS_SLOW)
@pytest.mark.parametrize(
    "capacity", [None, pytest.param((0.5, 1.5), marks=pytest.mark.slow)], ids=["exact", "capacity"]
)
def test_compiles(pool: RankPool, strategy: str, capacity: tuple[float, ...] | None, backend: str) -> None:
    case = Case((7, 10), H=16, K=3, capacity=capacity, seed=3)
    pool.run(2, check, case, strategy, backend)


# Clients that differentiate by hand, with the handle of the other direction, as Megatron's fused_a2a does


def event_or_none(asynchronous: bool) -> deep_ep.EventOverlap | None:
    return deep_ep.EventOverlap(deep_ep.EventHandle()) if asynchronous else None


class HandDispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ids: Tensor, weights: Tensor, E: int, buffer: Any, asynchronous: bool) -> Any:
        options = {"async_finish": asynchronous, "allocate_on_comm_stream": asynchronous}
        per_rank, per_rdma_rank, per_expert, in_rank, event = buffer.get_dispatch_layout(
            ids, E, previous_event=event_or_none(asynchronous), **options
        )
        recv_x, recv_idx, recv_weights, counts, handle, after = buffer.dispatch(
            x,
            topk_idx=ids,
            topk_weights=weights,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_rdma_rank,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            previous_event=event,
            **options,
        )
        if asynchronous:
            after.current_stream_wait()
        ctx.buffer, ctx.handle, ctx.asynchronous, ctx.options = buffer, handle, asynchronous, options
        return recv_x, recv_idx, recv_weights, torch.as_tensor(counts), handle

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor, grad_idx: Any, grad_weights: Tensor, *_: Any) -> Any:
        grad_x, grad_weights, after = ctx.buffer.combine(
            grad_x.contiguous(),
            ctx.handle,
            topk_weights=grad_weights.float(),
            previous_event=event_or_none(ctx.asynchronous),
            **ctx.options,
        )
        if ctx.asynchronous:
            after.current_stream_wait()
        return grad_x, None, grad_weights, None, None, None


class HandCombine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, buffer: Any, handle: Any, asynchronous: bool) -> Any:
        options = {"async_finish": asynchronous, "allocate_on_comm_stream": asynchronous}
        out, _, after = buffer.combine(x, handle=handle, previous_event=event_or_none(asynchronous), **options)
        if asynchronous:
            after.current_stream_wait()
        ctx.buffer, ctx.handle, ctx.asynchronous, ctx.options = buffer, handle, asynchronous, options
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        grad_x, _, _, _, _, after = ctx.buffer.dispatch(
            grad.contiguous(), handle=ctx.handle, previous_event=event_or_none(ctx.asynchronous), **ctx.options
        )
        if ctx.asynchronous:
            after.current_stream_wait()
        return grad_x, None, None, None


def own_weight(recv_idx: Tensor, recv_weights: Tensor) -> Tensor:
    """[N, 1]. Columns of other ranks must get no gradient: combine sums up whatever it is given."""
    return (recv_weights * (recv_idx >= 0)).sum(1, keepdim=True)


def hand_layer(buffer: Any, E: int, asynchronous: bool, x: Tensor, ids: Tensor, weights: Tensor) -> Any:
    recv_x, recv_idx, recv_weights, counts, handle = HandDispatch.apply(x, ids, weights, E, buffer, asynchronous)
    rows = recv_x * factors(recv_x.shape[0], recv_x.dtype) * own_weight(recv_idx, recv_weights)
    return HandCombine.apply(rows, buffer, handle, asynchronous), counts


def native_layer(buffer: Any, E: int, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    recv_x, recv_idx, recv_weights, _, handle, _ = buffer.dispatch(
        x, topk_idx=ids, topk_weights=weights, **layout(buffer, ids, E)
    )
    rows = recv_x * factors(recv_x.shape[0], recv_x.dtype) * own_weight(recv_idx, recv_weights)
    return buffer.combine(rows, handle)[0]


def check_by_hand(ctx: RankContext, tokens: tuple[int, ...], strategy: str, asynchronous: bool, backend: str) -> None:
    case = Case(tokens, H=16, K=3, seed=5)
    buffer = make_buffer(ctx, strategy)
    x, ids, weights = (tensors[ctx.rank].clone() for tensors in make_inputs(case)[:3])
    x.requires_grad_()
    weights.requires_grad_()
    wanted = native_layer(buffer, case.E, x, ids, weights)
    wanted_grads = torch.autograd.grad(wanted, [x, weights], torch.ones_like(wanted))
    fn: Callable = hand_layer
    if backend != "eager":
        torch._dynamo.reset()
        fn = torch.compile(hand_layer, backend=backend, fullgraph=True)
    out, counts = fn(buffer, case.E, asynchronous, x, ids, weights)
    grads = torch.autograd.grad(out, [x, weights], torch.ones_like(out))
    assert counts.tolist() == received(case, make_inputs(case), ctx.rank, 0).counts
    assert_same("out", out, wanted)
    assert_same("grad_x", grads[0], wanted_grads[0])
    assert_same("grad_topk_weights", grads[1], wanted_grads[1])


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradients_by_hand(pool: RankPool, strategy: str, asynchronous: bool, backend: str) -> None:
    pool.run(2, check_by_hand, (6, 9), strategy, asynchronous, backend)


def test_gradients_by_hand_without_tokens(pool: RankPool) -> None:
    pool.run(3, check_by_hand, (0, 5, 0), "default", False, "eager")


def check_megatron(ctx: RankContext) -> None:
    from megatron.core.transformer.moe import fused_a2a

    case = Case((6, 9), H=16, K=3, seed=5)
    buffer = make_buffer(ctx, "default")
    x, ids, weights = (tensors[ctx.rank].clone() for tensors in make_inputs(case)[:3])
    x.requires_grad_()
    weights.requires_grad_()
    wanted = native_layer(buffer, case.E, x, ids, weights)
    wanted_grads = torch.autograd.grad(wanted, [x, weights], torch.ones_like(wanted))
    with mock.patch.dict(os.environ, DEEP_EP_ROWS="rank"):
        recv_x, recv_idx, recv_weights, counts, handle = fused_a2a.fused_dispatch(x, ids, weights, case.E, buffer.group)
    rows = recv_x * factors(recv_x.shape[0], recv_x.dtype) * own_weight(recv_idx, recv_weights)
    out, _ = fused_a2a.fused_combine(rows, buffer.group, handle)
    grads = torch.autograd.grad(out, [x, weights], torch.ones_like(out))
    assert counts.tolist() == received(case, make_inputs(case), ctx.rank, 0).counts
    assert_same("out", out, wanted)
    assert_same("grad_x", grads[0], wanted_grads[0])
    assert_same("grad_topk_weights", grads[1], wanted_grads[1])


@pytest.mark.slow
def test_megatron(pool: RankPool) -> None:
    pytest.importorskip("megatron.core")
    pool.run(2, check_megatron)


# Further arguments


def check_without_metadata(ctx: RankContext, strategy: str, alignment: int) -> None:
    case = Case((6, 0, 9), H=16, K=3, dtype=torch.bfloat16, seed=7)
    buffer = make_buffer(ctx, strategy)
    inputs = make_inputs(case)
    wanted = received(case, inputs, ctx.rank, 0)
    x, ids, weights = (tensors[ctx.rank] for tensors in inputs[:3])
    about = layout(buffer, ids, case.E)
    assert about["is_token_in_rank"].dtype == torch.bool
    aligned = [-(-n // alignment) * alignment for n in wanted.counts]
    recv_x, recv_idx, recv_weights, counts, handle, event = buffer.dispatch(x, expert_alignment=alignment, **about)
    assert (recv_idx, recv_weights, event.event) == (None, None, None)
    assert counts == aligned
    assert_same("recv_x", recv_x, wanted.recv_x)
    *_, counts, _, _ = buffer.dispatch(x, topk_idx=ids, topk_weights=weights, expert_alignment=alignment, **about)
    assert counts == aligned
    out, out_weights, _ = buffer.combine(recv_x, tuple(handle))
    assert out_weights is None
    assert_same("out", out, (x.float() * about["is_token_in_rank"].sum(1, keepdim=True)).to(x.dtype) + 0.0)
    rows = [sum(len(received(case, inputs, r, 0).source) for r in (ctx.rank,))]
    assert rows == [int(handle.rank_prefix_matrix[-1, ctx.rank])]
    before = [int(n) for n in handle.rank_prefix_matrix[:, ctx.rank]]
    assert before == [sum(s <= i for s, _ in wanted.source) for i in range(case.R)]


@pytest.mark.parametrize("alignment", [1, 8])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_without_metadata(pool: RankPool, strategy: str, alignment: int) -> None:
    pool.run(3, check_without_metadata, strategy, alignment)


def check_interleaved(ctx: RankContext, strategy: str) -> None:
    buffer = make_buffer(ctx, strategy)
    batches = [Case(tokens, H=16, seed=seed) for seed, tokens in enumerate(((3, 40), (40, 3), (0, 5)))]
    sent = []
    for case in batches:
        x, ids, weights = (tensors[ctx.rank] for tensors in make_inputs(case)[:3])
        sent.append(buffer.dispatch(x, topk_idx=ids, topk_weights=weights, **layout(buffer, ids, case.E)))
    for case, (recv_x, _, recv_weights, _, handle, _) in reversed(list(zip(batches, sent, strict=True))):
        expected = Expected(case)
        out, weights, _ = buffer.combine(recv_x * factors(len(recv_x), recv_x.dtype), handle, recv_weights)
        assert_same("out", out, expected.out(ctx.rank, case.dtype))
        assert_same("weights", weights, expected.weight_sums[ctx.rank])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_interleaved_micro_batches(pool: RankPool, strategy: str) -> None:
    pool.run(2, check_interleaved, strategy)


def check_quantised(ctx: RankContext, mode: str) -> None:
    case = Case((6, 9), H=128, K=3, dtype=torch.bfloat16, seed=9)
    buffer, training = make_buffer(ctx, "default"), make_buffer(ctx, "default", straight_through=True)
    inputs = make_inputs(case)
    x, ids, weights = (tensors[ctx.rank] for tensors in inputs[:3])
    arguments = {"topk_idx": ids, "topk_weights": weights, **layout(buffer, ids, case.E)}
    wanted = received(case, inputs, ctx.rank, 0).recv_x
    data, scales = quantization.quantize(wanted, mode)
    (got_data, got_scales), *_, handle, _ = buffer.dispatch(x, quant_mode=mode, **arguments)
    given, *_ = buffer.dispatch(quantization.quantize(x, mode), **arguments)
    cached, *_ = buffer.dispatch(quantization.quantize(x, mode), handle=handle)
    for pair in ((got_data, got_scales), given, cached):
        assert (pair[0].dtype, pair[1].dtype) == (data.dtype, scales.dtype)
        assert_same("data", pair[0].view(torch.uint8).to(torch.int64), data.view(torch.uint8).to(torch.int64))
        assert_same("scales", pair[1].view(torch.uint8).to(torch.int64), scales.view(torch.uint8).to(torch.int64))
    x = x.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="straight_through=True"):
        buffer.dispatch(x, quant_mode=mode, **arguments)
    rows, *_ = training.dispatch(x, quant_mode=mode, **arguments)
    assert_same("dequantised", rows, quantization.dequantize(data, scales).to(x.dtype))
    rows.sum().backward()
    assert_same("grad_x", x.grad, arguments["is_token_in_rank"].sum(1, keepdim=True).to(x.dtype).expand_as(x).clone())


@pytest.mark.parametrize("mode", quantization.MODES[1:])
def test_quantised_rows(pool: RankPool, mode: str) -> None:
    pool.run(2, check_quantised, mode)


def check_errors(ctx: RankContext) -> None:
    buffer, expert = make_buffer(ctx, "default"), make_buffer(ctx, "default", "expert")
    with mock.patch.dict(os.environ, DEEP_EP_ROWS="rank"):
        assert make_buffer(ctx, "default", None).runtime.rows == "rank"
    case = Case((4,), H=8, seed=1)
    x, ids, weights = (tensors[0] for tensors in make_inputs(case)[:3])
    right: dict[str, Any] = {"x": x, "topk_idx": ids, "topk_weights": weights, **layout(buffer, ids, case.E)}
    mask = right["is_token_in_rank"]
    for name, value, message in (
        ("is_token_in_rank", mask.int(), 'must be torch.bool under rows="rank", got torch.int32'),
        ("is_token_in_rank", mask.repeat(1, 2), r"must have the shape \[T, R\] with R = 1, got \[4, 2\]"),
        ("is_token_in_rank", None, "is missing; get_dispatch_layout gives"),
        ("topk_weights", weights.double(), "must be torch.float32, torch.bfloat16 or torch.float16, got torch.float64"),
        ("topk_idx", ids.bool(), "must be of an integer dtype, got torch.bool"),
        ("topk_idx", None, "is missing; topk_weights mean nothing without it"),
        ("expert_alignment", 0, "must be at least 1, got 0"),
        ("quant_mode", "int3", "must be one of none, int8"),
    ):
        with pytest.raises(ValueError, match=f"{name} {message}"):
            buffer.dispatch(**right | {name: value})
    recv_x, _, recv_weights, _, handle, _ = buffer.dispatch(**right)
    about = layout(expert, ids, case.E)
    assert about["is_token_in_rank"].dtype == torch.int32
    *_, expert_handle, _ = expert.dispatch(x, topk_idx=ids, **about)
    with pytest.raises(ValueError, match='rows="rank", with 6 tensors; got 8'):
        buffer.combine(recv_x, expert_handle)
    with pytest.raises(ValueError, match='rows="expert", with 8 tensors; got 6'):
        expert.dispatch(x, handle=handle)
    with pytest.raises(ValueError, match="topk_idx must be None with a handle"):
        buffer.dispatch(x, handle=handle, topk_idx=ids)
    with pytest.raises(ValueError, match=r"topk_weights must be torch.float32, .* got torch.float64"):
        buffer.combine(recv_x, handle, topk_weights=recv_weights.double())


def test_errors(pool: RankPool) -> None:
    pool.run(1, check_errors)


def quantised_layer(buffer: deep_ep.Buffer, mode: str, arguments: dict[str, Any], x: Tensor) -> tuple[Tensor, Tensor]:
    (data, scales), *_ = buffer.dispatch(x, quant_mode=mode, **arguments)
    return data, scales


def check_quantised_compiles(ctx: RankContext, mode: str, backend: str) -> None:
    case = Case((6, 9), H=128, K=3, dtype=torch.bfloat16, seed=9)
    buffer = make_buffer(ctx, "default")
    x, ids, weights = (tensors[ctx.rank] for tensors in make_inputs(case)[:3])
    arguments = {"topk_idx": ids, "topk_weights": weights, **layout(buffer, ids, case.E)}
    torch._dynamo.reset()
    compiled = torch.compile(quantised_layer, backend=backend, fullgraph=True)
    actual, expected = (fn(buffer, mode, arguments, x) for fn in (compiled, quantised_layer))
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("mode", ["int8", "mx_fp8_e4m3"])
def test_quantised_rows_compile(pool: RankPool, mode: str, backend: str) -> None:
    pool.run(2, check_quantised_compiles, mode, backend)
