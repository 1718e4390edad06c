"""What programs of DeepEP-Ascend do with a Buffer besides the calls themselves: hooks, weights, handles."""

import pickle
from typing import Any

import pytest
import torch
from cases import assert_same
from ranks import STRATEGIES, RankContext, RankPool
from test_bad_input import error_of
from test_buffer import make_buffer, send

T, H, K, E, M, R = 5, 32, 2, 4, 8, 2


def inputs(rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [T, H], topk_idx [T, K] and topk_weights [T, K], different ones on every rank."""
    ids = (torch.arange(T * K).view(T, K) + rank) % E
    return torch.arange(T * H).view(T, H).float() + rank, ids, torch.linspace(0.5, 2, T * K).view(T, K)


def weighted(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """x by the sum of its weights, in the order of k."""
    return sum(x * weights[:, k : k + 1] for k in range(K))


def call_hooks(ctx: RankContext, strategy: str) -> None:
    x, ids, weights = inputs(ctx.rank)
    buffer = make_buffer(ctx, strategy)
    by_rank = make_buffer(ctx, strategy, DEEP_EP_ROWS="rank")
    for one in (buffer, by_rank):
        for way in ({}, {"async_finish": True}, {"return_recv_hook": True}):
            rows, _, handle, _, hook = one.low_latency_dispatch(x, ids, M, E, use_fp8=False, **way)
            hook()
            out, _, hook = one.low_latency_combine(rows, ids, weights, handle, **way)
            hook()
            hook()
            assert_same("combined", out, weighted(x, weights))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_hook_may_always_be_called(pool: RankPool, strategy: str) -> None:
    pool.run(R, call_hooks, strategy)


def give_weights(ctx: RankContext, strategy: str, backend: str) -> None:
    torch._dynamo.reset()
    x, ids, weights = inputs(ctx.rank)
    buffer = make_buffer(ctx, strategy)

    def layer(x: torch.Tensor, at_dispatch: torch.Tensor, at_combine: torch.Tensor) -> torch.Tensor:
        rows, *_, handle, _ = send(buffer, x, ids, E, topk_weights=at_dispatch, num_worst_tokens=R * T * K)
        return buffer.combine(rows, handle, topk_weights=at_combine)[0]

    fn = layer if backend == "eager" else torch.compile(layer, backend=backend, fullgraph=True)
    at_dispatch, at_combine = weights.clone(), weights.clone().requires_grad_()
    out = fn(x, at_dispatch, at_combine)
    assert_same("combined", out, weighted(x, weights))
    # The gradient is that of the weights that were given for the sum.
    out.sum().backward()
    torch.testing.assert_close(at_combine.grad, x.sum(1, keepdim=True).expand(T, K))
    shared = weights.clone().requires_grad_()
    fn(x, shared, shared).sum().backward()
    torch.testing.assert_close(shared.grad, at_combine.grad)
    nothing = torch.full_like(weights, torch.nan)
    assert fn(x, nothing, nothing.clone()).isnan().all()

    if backend == "eager":  # rank 1 tells the other
        kind, message = error_of(fn, x, weights, weights + (ctx.rank == 1))
        assert kind == ("ValueError" if ctx.rank == 1 else "RuntimeError")
        assert "topk_weights must be None or those given to dispatch" in message
    else:
        assert_same("combined", fn(x, weights, weights + 1), weighted(x, weights + 1))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_combine_takes_equal_weights(pool: RankPool, strategy: str, backend: str) -> None:
    pool.run(R, give_weights, strategy, backend)


def read_handles(ctx: RankContext, strategy: str) -> None:
    torch._dynamo.reset()
    x, ids, weights = inputs(ctx.rank)
    handles: list[Any] = []
    for contract in ("expert", "rank"):
        buffer = make_buffer(ctx, strategy, DEEP_EP_ROWS=contract)
        for options in ({}, {"expert_alignment": 4}):
            handles.append(send(buffer, x, ids, E, topk_weights=weights, **options)[-2])
        handles.append(buffer.low_latency_dispatch(x, ids, M, E, use_fp8=False)[2])
    for handle in handles:
        for place, name in enumerate(handle._fields):
            assert handle[name] is handle[place] is getattr(handle, name)
        kind, message = error_of(handle.__getitem__, "input_splits")
        assert kind == "KeyError" and handle._fields[0] in message
        assert handle[:2] == tuple(handle)[:2] and handle[-1] is tuple(handle)[-1]
        assert type(pickle.loads(pickle.dumps(handle))) is type(handle)
    assert_same("topk_weights", handles[0]["topk_weights"], weights)

    buffer = make_buffer(ctx, strategy)

    def layer(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        rows, *_, handle, _ = send(buffer, x, ids, E, topk_weights=weights, num_worst_tokens=R * T * K)
        return buffer.combine(rows, handle)[0] * handle["topk_weights"].sum()

    leaf = weights.clone().requires_grad_()
    out = torch.compile(layer, backend="aot_eager", fullgraph=True)(x, leaf)
    assert_same("in a graph", out, weighted(x, weights) * weights.sum())
    out.sum().backward()
    grad = x.sum(1, keepdim=True) * weights.sum() + weighted(x, weights).sum()
    torch.testing.assert_close(leaf.grad, grad.expand(T, K))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_handles_are_read_by_name(pool: RankPool, strategy: str) -> None:
    pool.run(R, read_handles, strategy)
