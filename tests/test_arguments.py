"""What people pass: ids of any integer dtype, weights in a model's dtype, rows of any strides and with several
dimensions of tokens. Functions and Buffers give what the same values give as the ops want them, bit by bit.

T local tokens, H hidden, K top-k, E experts, R ranks, L = E/R local experts, N received rows.
"""

import os
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from cases import Case, assert_same, make_inputs
from op_calls import error_of
from ranks import ALLTOALL_IS_SLOW, RankContext, RankPool
from torch import Tensor

import deep_ep

R, H, K, E = 2, 16, 2, 4
CASE = Case((6, 4), H=H, K=K, local_experts=E // R, ids="distinct", seed=5)

IDS = (
    *(torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
)
WEIGHTS = (torch.float32, torch.bfloat16, torch.float16)


def factors(rows: Tensor) -> Tensor:
    """One of its own for each row."""
    return (1 + torch.arange(rows.shape[0]) % 7).view(-1, *[1] * (rows.dim() - 1)).to(rows.dtype)


class Programs:
    """Of a rank: layers of (x, topk_idx, topk_weights) that return (out, ...)."""

    def __init__(self, ctx: RankContext, strategy: str) -> None:
        self.group = ctx.prepared_group(strategy)
        self.buffers = {}
        with mock.patch.dict(os.environ, DEEP_USE_MODE=strategy):
            for rows in ("expert", "rank"):
                self.buffers[rows] = deep_ep.Buffer(self.group, rows=rows)

    def functions(self, x: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        out = deep_ep.dispatch(x, ids, weights, num_experts=E, group=self.group)
        y = strided(out.recv_x * factors(out.recv_x))
        layout = deep_ep.get_dispatch_layout(ids, E, group=self.group)
        return deep_ep.combine(y, out.handle, group=self.group), out.recv_topk_weights, out.recv_topk_idx, layout[2]

    def started(self, x: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        started = deep_ep.dispatch_start(x, topk_idx=ids, topk_weights=weights, num_experts=E, group=self.group)
        out = deep_ep.wait(started)
        y = strided(out.recv_x * factors(out.recv_x))
        return deep_ep.wait(deep_ep.combine_start(y, out.handle, group=self.group)), out.recv_topk_weights

    def low_latency(self, x: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        out = deep_ep.low_latency_dispatch(x, ids, 8, E, group=self.group)
        y = strided(out.recv_x * factors(out.recv_x))
        return (deep_ep.low_latency_combine(y, ids, weights, out.handle, group=self.group),)

    def fused(self, x: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        scale = torch.linspace(-1, 1, 2 * H * H).view(1, 2 * H, H).expand(E // R, -1, -1)
        experts = deep_ep.fused_weights(scale, scale[:, :H], fuse_mode=2)
        sizes = 64, E
        return deep_ep.fused_deep_moe(x, ids, weights, *experts, *sizes, quant_mode=0, fuse_mode=2, group=self.group)

    def buffer_expert(self, x: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        return self._buffer("expert", x, ids, weights)

    def buffer_rank(self, x: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        return self._buffer("rank", x, ids, weights)

    def _buffer(self, rows: str, x: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        buffer = self.buffers[rows]
        per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(ids, E)
        layout = {
            "num_tokens_per_rank": per_rank,
            "is_token_in_rank": in_rank,
            "num_tokens_per_expert": per_expert,
        }
        recv_x, recv_ids, recv_weights, _, handle, _ = buffer.dispatch(x, topk_idx=ids, topk_weights=weights, **layout)
        y = strided(recv_x * factors(recv_x))
        back = recv_weights.to(weights.dtype) if rows == "rank" else None
        out, out_weights, _ = buffer.combine(y, handle, back)
        return (out, recv_weights, recv_ids) if out_weights is None else (out, out_weights, recv_ids)

    def buffer_low_latency_expert(self, x: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        return self._low_latency("expert", x, ids, weights)

    def buffer_low_latency_rank(self, x: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        return self._low_latency("rank", x, ids, weights)

    def _low_latency(self, rows: str, x: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        buffer = self.buffers[rows]
        recv_x, counts, handle, _, _ = buffer.low_latency_dispatch(x, ids, 8, E, use_fp8=False)
        y = strided(recv_x * factors(recv_x))
        return buffer.low_latency_combine(y, ids, weights, handle)[0], counts


PROGRAMS = [name for name in vars(Programs) if not name.startswith("_")]


def strided(tensor: Tensor) -> Tensor:
    """The same values in other strides, where there is more than one row and column."""
    return tensor.transpose(0, -1).contiguous().transpose(0, -1)


def outcome(program: Callable[..., Any], x: Tensor, ids: Tensor, weights: Tensor) -> list[Tensor]:
    """Results and gradients of a program."""
    x, weights = x.detach().requires_grad_(), weights.detach().requires_grad_()
    results = [one for one in program(x, ids, weights) if one is not None]
    outputs = [one for one in results if one.requires_grad]
    grads = [torch.arange(1.0, one.numel() + 1).view(one.shape) / 64 for one in outputs]
    return [*(one.detach() for one in results), *torch.autograd.grad(outputs, [x, weights], grads)]


def inputs_of(rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, ids and weights that all of WEIGHTS can hold."""
    x, ids, weights = (one[rank] for one in make_inputs(CASE)[:3])
    return x, ids, weights.to(torch.bfloat16).to(torch.float32)


def check_dtypes(ctx: RankContext, strategy: str, name: str, backend: str) -> None:
    program = getattr(Programs(ctx, strategy), name)
    fn = program
    if backend != "eager":
        torch._dynamo.reset()
        fn = torch.compile(program, backend=backend, fullgraph=True)
    for number, dtype in enumerate(IDS if backend == "eager" else (torch.int32, torch.uint8)):
        of_weights = WEIGHTS[(number + ctx.rank) % len(WEIGHTS)]
        x, ids, weights = inputs_of(ctx.rank)
        if not dtype.is_signed:
            ids = ids.clamp(min=0)
            ids[:, 1] = (ids[:, 0] + 1) % E
        elif ctx.rank == 1:
            dtype = IDS[(number + 1) % 4]  # ranks differ in it
        expected = outcome(program, x, ids, weights)
        actual = outcome(fn, strided(x), strided(ids.to(dtype)), strided(weights.to(of_weights)))
        assert actual[-1].dtype == of_weights
        expected[-1] = expected[-1].to(of_weights)
        for n, (one, wanted) in enumerate(zip(actual, expected, strict=True)):
            assert_same(f"{name}, ids {dtype}, weights {of_weights}: {n}", one, wanted)


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("strategy", ALLTOALL_IS_SLOW)
def test_dtypes_and_strides(pool: RankPool, strategy: str, name: str) -> None:
    pool.run(R, check_dtypes, strategy, name, "eager")


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_dtypes_and_strides_in_one_graph(pool: RankPool, name: str) -> None:
    pool.run(R, check_dtypes, "default", name, "aot_eager")


# What is not an id, or not a weight


WRONG = {
    "ids of floats": ({"topk_idx": torch.float32}, ("topk_idx", "integer", "torch.float32")),
    "ids of bools": ({"topk_idx": torch.bool}, ("topk_idx", "integer", "torch.bool")),
    "weights of ints": ({"topk_weights": torch.int32}, ("topk_weights", "torch.bfloat16", "torch.int32")),
    "weights of doubles": ({"topk_weights": torch.float64}, ("topk_weights", "torch.bfloat16", "torch.float64")),
}


def errors(ctx: RankContext, name: str, wrong: str) -> tuple[str, str]:
    """Of a call to which the last rank gives something wrong. The group is usable afterwards."""
    programs = Programs(ctx, "default")
    if name.startswith("buffer") or name == "functions":
        # What the layout of wrong ids would be plays no part.
        layout = deep_ep.get_dispatch_layout(
            torch.zeros(CASE.tokens[ctx.rank], K, dtype=torch.int64), E, group=programs.group
        )
        for buffer in programs.buffers.values():
            in_rank = layout[3].bool() if buffer is programs.buffers["rank"] else layout[3]
            buffer.get_dispatch_layout = lambda *_, rank=in_rank: (layout[0], None, layout[2], rank, None)
    x, ids, weights = inputs_of(ctx.rank)
    given = {"topk_idx": ids, "topk_weights": weights}
    if ctx.rank == R - 1:
        for argument, dtype in WRONG[wrong][0].items():
            given[argument] = given[argument].to(dtype)
    error = error_of(getattr(programs, name), x, *given.values())
    assert getattr(programs, name)(x, ids, weights)[0].shape == x.shape
    return error


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", PROGRAMS)
def test_wrong_dtypes_are_named_on_all_ranks(pool: RankPool, name: str, wrong: str) -> None:
    for rank, (kind, text) in enumerate(pool.run(R, errors, name, wrong)):
        assert kind == ("ValueError" if rank == R - 1 else "RuntimeError"), text
        for part in WRONG[wrong][1]:
            assert part in text


def check_large_ids(ctx: RankContext) -> None:
    """What int64 cannot hold is not -1."""
    group = ctx.prepared_group("default")
    x, ids = torch.ones(1, H), torch.tensor([[2**64 - 1]], dtype=torch.uint64)
    kind, text = error_of(deep_ep.dispatch, x, ids, num_experts=E, group=group)
    assert kind == "RuntimeError" and "topk_idx" in text and "allowed are -1 and 0..3" in text, text


def test_large_ids(pool: RankPool) -> None:
    pool.run(R, check_large_ids)


# Several dimensions of tokens


SHAPES = ((2, 3), (1, 2, 2))
"""Of the tokens, by rank."""
TAKE_DIMENSIONS = [name for name in PROGRAMS if name != "buffer_rank"]


def check_dimensions(ctx: RankContext, strategy: str, name: str, backend: str) -> None:
    program = getattr(Programs(ctx, strategy), name)
    x, ids, weights = inputs_of(ctx.rank)
    expected = outcome(program, x, ids, weights)
    shape = SHAPES[ctx.rank]
    fn = program
    if backend != "eager":
        torch._dynamo.reset()
        fn = torch.compile(program, backend=backend, fullgraph=True)
    actual = outcome(fn, x.view(*shape, H), ids.view(*shape, K), weights.view(*shape, K))
    assert actual[0].shape == (*shape, H)
    for n, (one, wanted) in enumerate(zip(actual, expected, strict=True)):
        assert_same(f"{name}: {n}", one.view(wanted.shape), wanted)


@pytest.mark.parametrize("name", TAKE_DIMENSIONS)
@pytest.mark.parametrize("strategy", ALLTOALL_IS_SLOW)
def test_dimensions_come_back(pool: RankPool, strategy: str, name: str) -> None:
    pool.run(R, check_dimensions, strategy, name, "eager")


@pytest.mark.slow
@pytest.mark.parametrize("name", TAKE_DIMENSIONS)
def test_dimensions_come_back_in_one_graph(pool: RankPool, name: str) -> None:
    pool.run(R, check_dimensions, "default", name, "aot_eager")


def refusals(ctx: RankContext) -> list[tuple[str, str]]:
    """Of tokens in several dimensions whose routing has others. The group is usable after each."""
    programs = Programs(ctx, "default")
    x, ids, weights = inputs_of(ctx.rank)
    shape = SHAPES[ctx.rank]
    errors = []
    for name in PROGRAMS:
        errors.append(error_of(getattr(programs, name), x.view(*shape, H), ids, weights))
        assert getattr(programs, name)(x, ids, weights)[0].shape == x.shape
    return errors


def test_other_dimensions_of_ids_are_refused(pool: RankPool) -> None:
    for kind, text in [one for errors in pool.run(R, refusals) for one in errors]:
        assert kind in ("ValueError", "RuntimeError")
        assert "x [T, H]" in text and "x.flatten(0, -2)" in text, text
