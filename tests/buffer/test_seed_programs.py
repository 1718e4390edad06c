"""What programs of DeepEP-Ascend do with a Buffer besides the calls themselves: hooks, weights, handles."""

import pickle
from typing import Any
from unittest import mock

import pytest
import torch
from cases import assert_same
from ranks import ALLTOALL_IS_SLOW, STRATEGIES, RankContext, RankPool
from test_bad_input import error_of
from test_buffer import make_buffer, send

from deep_ep import strategies
from deep_ep.buffer import runtime

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
@pytest.mark.parametrize("strategy", ALLTOALL_IS_SLOW)
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
    buffer = make_buffer(ctx, strategy)
    buffer.low_latency_strategy = strategies.AllToAllLowLatencyCommStrategy(buffer.runtime)
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


@pytest.mark.parametrize("strategy", ALLTOALL_IS_SLOW)
def test_handles_are_read_by_name(pool: RankPool, strategy: str) -> None:
    pool.run(R, read_handles, strategy)


def across_servers(ctx: RankContext, strategy: str) -> None:
    """Servers of one rank each."""
    torch._dynamo.reset()
    x, ids, weights = inputs(ctx.rank)
    plain = make_buffer(ctx, strategy)
    with mock.patch.object(runtime, "RANKS_OF_A2_SERVER", 1):
        buffer = make_buffer(ctx, strategy, HCCL_INTRA_PCIE_ENABLE="1", HCCL_INTRA_ROCE_ENABLE="0")
        assert (buffer.runtime.get_num_rdma_ranks(), buffer.runtime.get_rdma_rank()) == (R, ctx.rank)
        assert make_buffer(ctx, strategy).runtime.get_num_rdma_ranks() == 1
    rows, *_, handle, _ = send(buffer, x, ids, E, topk_weights=weights)
    wanted, _, recv_weights, *_, known, _ = send(plain, x, ids, E, topk_weights=weights)
    assert_same("rows", rows, wanted)
    assert len(handle) == 9
    for place, name in enumerate(("recv_src_idx", "is_token_in_rank", "send_head", "topk_idx", "topk_weights")):
        assert_same(name, handle[place], known[name])
    assert_same("expand_scales", handle[8], recv_weights.sum(1))
    assert_same("num_dropped", handle.num_dropped, known.num_dropped)
    for given in (handle, tuple(handle), pickle.loads(pickle.dumps(handle))):
        combined = buffer.combine(rows, given, topk_weights=given[4])[0]
        assert_same("combined", combined, weighted(x, weights))
    assert_same("cached", buffer.dispatch(x, handle=handle)[0], rows)

    def layer(x: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, Any]:
        rows, *_, handle, _ = send(buffer, x, ids, E, topk_weights=weights, num_worst_tokens=R * T * K)
        return buffer.combine(rows, handle)[0], handle

    leaf = weights.clone().requires_grad_()
    out, handle = torch.compile(layer, backend="aot_eager", fullgraph=True)(x, leaf)
    assert_same("compiled", out, weighted(x, weights))
    assert len(handle) == 9
    out.sum().backward()
    torch.testing.assert_close(leaf.grad, x.sum(1, keepdim=True).expand(T, K))


@pytest.mark.parametrize("strategy", ALLTOALL_IS_SLOW)
def test_the_handle_across_servers(pool: RankPool, strategy: str) -> None:
    pool.run(R, across_servers, strategy)
