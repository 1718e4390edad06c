"""What deep_ep.Buffer adds to the functions it calls."""

import os
from typing import Any
from unittest import mock

import pytest
import torch
from cases import Case, assert_same, make_inputs
from ranks import ALLTOALL_IS_SLOW, STRATEGIES, RankContext, RankPool

import deep_ep

T, H, K, E, W = 12, 8, 2, 4, 10


def dropped(ctx: RankContext, strategy: str, backend: str) -> tuple[int, int]:
    """Rows for this rank that did not fit, by the handle of a Buffer and by deep_ep.dispatch."""
    torch._dynamo.reset()
    group = ctx.prepared_group(strategy)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEEP_USE_MODE", strategy)
        buffer = deep_ep.Buffer(group)
    x, ids = torch.ones(T, H), torch.arange(T * K).view(T, K) % E

    def by_buffer() -> torch.Tensor:
        per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(ids, E)
        *_, handle, _ = buffer.dispatch(
            x,
            num_tokens_per_rank=per_rank,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            topk_idx=ids,
            num_worst_tokens=W,
        )
        return handle.num_dropped

    fn = by_buffer if backend == "eager" else torch.compile(by_buffer, backend=backend, fullgraph=True)
    out = deep_ep.dispatch(x, ids, num_experts=E, group=group, num_worst_tokens=W)
    return int(fn()), int(out.num_dropped)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_dropped_rows_are_counted(pool: RankPool, strategy: str, backend: str) -> None:
    # Every expert gets T * K / E rows of each of 2 ranks, and a rank has E / 2 experts.
    assert pool.run(2, dropped, strategy, backend) == [(T * K - W, T * K - W)] * 2


def make_buffer(ctx: RankContext, strategy: str, **environment: str) -> deep_ep.Buffer:
    group = ctx.prepared_group(strategy)
    with mock.patch.dict(os.environ, DEEP_USE_MODE=strategy, **environment):
        return deep_ep.Buffer(group)


def send(buffer: deep_ep.Buffer, x: torch.Tensor, ids: torch.Tensor, E: int, **options: Any) -> tuple[Any, ...]:
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(ids, E)
    return buffer.dispatch(
        x,
        topk_idx=ids,
        num_tokens_per_rank=per_rank,
        is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert,
        **options,
    )


def aligned_layer(
    buffer: deep_ep.Buffer,
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    E: int,
    worst: int,
    alignment: int,
) -> tuple[Any, ...]:
    """Both dispatches and combine; rows that hold nothing become NaN before combine."""
    options = {"topk_weights": weights, "num_worst_tokens": worst, "expert_alignment": alignment}
    recv_x, recv_idx, recv_weights, counts, handle, _ = send(buffer, x, ids, E, **options)
    cached, cached_idx, cached_weights, _, _, _ = buffer.dispatch(x.detach(), handle=handle)
    empty = handle.recv_src_idx[:, :1] < 0
    out, _, _ = buffer.combine(torch.where(empty, float("nan"), recv_x * 2), handle, bias=(x.detach(), x.detach()))
    same = [(cached, recv_x.detach()), (cached_idx, recv_idx), (cached_weights, recv_weights.detach())]
    return out, recv_x.detach(), recv_idx, counts, handle.recv_src_idx, same


def check_alignment(ctx: RankContext, strategy: str, worst: int, backend: str) -> None:
    case = Case((7, 10), H=16, K=3, seed=3)
    x, ids, weights = (tensors[ctx.rank].clone() for tensors in make_inputs(case)[:3])
    x.requires_grad_()
    buffer = make_buffer(ctx, strategy)
    fn = aligned_layer
    if backend != "eager":
        torch._dynamo.reset()
        fn = torch.compile(aligned_layer, backend=backend, fullgraph=True)
    plain_out, rows, idx, counts, src, same = aligned_layer(buffer, x, ids, weights, case.E, worst, 1)
    (plain_grad,) = torch.autograd.grad(plain_out.sum(), x)
    out, padded_rows, padded_idx, padded_counts, padded_src, padded_same = fn(buffer, x, ids, weights, case.E, worst, 4)
    (grad,) = torch.autograd.grad(out.sum(), x)
    for actual, expected in same + padded_same:
        assert_same("cached", actual, expected)
    assert_same("out", out, plain_out)
    assert_same("grad_x", grad, plain_grad)
    counts, padded_counts = torch.as_tensor(counts).tolist(), torch.as_tensor(padded_counts).tolist()
    assert padded_counts == [-(-n // 4) * 4 for n in counts]
    assert len(padded_rows) == (len(rows) + 3 * len(counts) if worst else sum(padded_counts))
    start = 0
    for l, (n, padded) in enumerate(zip(counts, padded_counts, strict=True)):
        block = slice(start, start + n)
        first = sum(counts[:l])
        assert_same("recv_x", padded_rows[block], rows[first : first + n])
        assert_same("recv_topk_idx", padded_idx[block], idx[first : first + n])
        assert_same("recv_src_idx", padded_src[block], src[first : first + n])
        rest = slice(start + n, start + padded)
        assert not padded_rows[rest].any()
        assert (padded_idx[rest] == -1).all()
        assert (padded_src[rest] == -1).all()
        start += padded
    assert not padded_rows[start:].any()


@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("worst", [0, 12, pytest.param(60, marks=pytest.mark.slow)])
@pytest.mark.parametrize("strategy", ALLTOALL_IS_SLOW)
def test_alignment(pool: RankPool, strategy: str, worst: int, backend: str) -> None:
    pool.run(2, check_alignment, strategy, worst, backend)


def check_arguments(ctx: RankContext) -> None:
    case = Case((7, 10), H=16, K=3, dtype=torch.bfloat16, seed=3)
    x, ids, _ = (tensors[ctx.rank] for tensors in make_inputs(case)[:3])
    buffer = make_buffer(ctx, "default")
    running = make_buffer(ctx, "default", MOE_EXPERT_TOKEN_NUMS_TYPE="0")
    stats = torch.zeros(2, dtype=torch.int32)
    recv_x, _, _, counts, handle, _ = send(buffer, x, ids, case.E, dispatch_wait_recv_cost_stats=stats)
    assert stats[ctx.rank] == 0
    assert stats[1 - ctx.rank] > 0
    assert send(running, x, ids, case.E)[3] == torch.tensor(counts).cumsum(0).tolist()
    stats.zero_()
    plain, _, _ = buffer.combine(recv_x, handle, combine_send_cost_stats=stats)
    assert stats[ctx.rank] == 0
    assert stats[1 - ctx.rank] > 0
    biases = (torch.randn_like(x), torch.randn_like(x))
    one, _, _ = buffer.combine(recv_x, handle, bias=biases[0])
    two, _, _ = buffer.combine(recv_x, handle, bias=biases)
    assert_same("one bias", one, (plain.float() + biases[0]).bfloat16())
    assert_same("two biases", two, (plain.float() + biases[0] + biases[1]).bfloat16())
    for bias in (biases[0].float(), biases[0][:-1], biases[0][0]):
        with pytest.raises(ValueError, match=r"bias must be torch.bfloat16 \[T, H\]"):
            buffer.combine(recv_x, handle, bias=bias)
    int8 = make_buffer(ctx, "default", DEEP_NORMAL_MODE_USE_INT8_QUANT="1")
    (data, scales), *_, int8_handle, _ = send(int8, x, ids, case.E)
    wanted = deep_ep.quantization.quantize(recv_x, "int8")
    assert torch.equal(data, wanted[0])
    assert torch.equal(scales, wanted[1])
    assert_same("rows of a handle", int8.dispatch(x, handle=int8_handle)[0], recv_x)
    with pytest.raises(ValueError, match=r"dispatch_wait_recv_cost_stats must be torch.int32 or torch.int64 \[R\]"):
        send(buffer, x, ids, case.E, dispatch_wait_recv_cost_stats=torch.zeros(2))
    buffer.clean_low_latency_buffer(8, 16, case.E)
    buffer.destroy()
    with pytest.raises(RuntimeError, match="this Buffer was destroyed"):
        buffer.combine(recv_x, handle)
    running.combine(recv_x, handle)


def test_arguments(pool: RankPool) -> None:
    pool.run(2, check_arguments)


def test_size_hints() -> None:
    config = deep_ep.Config(20, 6, 256, 6, 128)
    assert config.get_nvl_buffer_size_hint(1024, 4) == 10 * 4 * 256 * (1024 + 256)
    assert config.get_nvl_buffer_size_hint(1024, 64) == 10 * 8 * 256 * (1024 + 256)
    assert config.get_rdma_buffer_size_hint(1024, 8) == 0
    assert config.get_rdma_buffer_size_hint(1024, 17) == 2 * 10 * 3 * 128 * (1024 + 256)
    with pytest.raises(ValueError, match="hidden_bytes must be positive, got 0"):
        config.get_nvl_buffer_size_hint(0, 1)
    assert deep_ep.Buffer.get_low_latency_rdma_size_hint(8, 56, 2, 4) == 2 * 4 * 8 * 128
    with pytest.raises(ValueError, match="must be divisible by num_ranks"):
        deep_ep.Buffer.get_low_latency_rdma_size_hint(8, 56, 3, 4)
    assert deep_ep.topk_idx_t == torch.int64
