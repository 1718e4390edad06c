"""Ranks that compile on their own issue the same communicating ops in the same order, whatever their sizes.

Two independent micro-batches, of T = (4, 4096) tokens on rank 0 and (4096, 4) on rank 1, in one graph. Left to itself,
inductor moves nodes to their users and schedules for its own rank's memory, and the forward without gradients runs
dispatch, dispatch, combine, combine on one rank and dispatch, combine, dispatch, combine on the other. A swap of two
equal ops would show in the values.
"""

import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._functorch.config as functorch_config
import torch.distributed as dist
from ranks import ALLTOALL_IS_SLOW, RankContext, RankPool
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import deep_ep
from deep_ep import groups

R = 2
TOKENS = ((4, 4096), (4096, 4))
H, K, E = 64, 2, 4


class TwoMicroBatches(torch.nn.Module):
    def __init__(self, group: str, checkpointed: bool, capacity: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(H, H, generator=generator) / H**0.5)
        self.group = group
        self.checkpointed = checkpointed
        self.capacity = capacity

    def dispatch(self, x: Tensor, logits: Tensor) -> deep_ep.DispatchOutput:
        weights, ids = torch.softmax(logits, -1).topk(K)
        W = 2 * K * x.shape[0] if self.capacity else 0  # as local as sizes get: the few-token rank drops rows
        return deep_ep.dispatch(x, ids, weights, num_experts=E, group=self.group, num_worst_tokens=W)

    def combine(self, out: deep_ep.DispatchOutput) -> Tensor:
        return deep_ep.combine(torch.tanh(out.recv_x) @ self.weight, out.handle, group=self.group)

    def interleaved(self, x1: Tensor, logits1: Tensor, x2: Tensor, logits2: Tensor) -> tuple[Tensor, Tensor]:
        first, second = self.dispatch(x1, logits1), self.dispatch(x2, logits2)
        return self.combine(first), self.combine(second)

    def one_by_one(self, x1: Tensor, logits1: Tensor, x2: Tensor, logits2: Tensor) -> tuple[Tensor, Tensor]:
        return self.combine(self.dispatch(x1, logits1)), self.combine(self.dispatch(x2, logits2))

    def forward(self, *args: Tensor) -> tuple[Tensor, Tensor]:
        if self.checkpointed:
            return checkpoint(self.interleaved, *args, use_reentrant=False)
        return self.interleaved(*args)


def make_args(rank: int, requires_grad: bool) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rank)
    args = []
    for T in TOKENS[rank]:
        args += [torch.randn(T, H, generator=generator), torch.randn(T, E, generator=generator)]
    return [arg.requires_grad_(requires_grad) for arg in args]


def issued_ops(group: dist.ProcessGroup, strategy: str = "default", since: int = 0) -> tuple[list[str], int]:
    """As groups.op_log; nothing where there is no log."""
    return groups.op_log(group, since) if strategy == "default" else ([], 0)


def run_both(
    ctx: RankContext, strategy: str, backend: str, train: bool, checkpointed: bool, capacity: bool
) -> dict[str, list[str]]:
    """Checks compiled values against eager ones; returns what each of them issued."""
    torch._dynamo.reset()
    group = ctx.prepared_group(strategy)
    model = TwoMicroBatches(group.group_name, checkpointed, capacity)
    args = make_args(ctx.rank, train)
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)
    issued, results = {}, []
    for name, fn in (("eager", model), ("compiled", compiled)):
        before = issued_ops(group, strategy)[1]
        with torch.set_grad_enabled(train):
            outs = fn(*args)
            grads = torch.autograd.grad(sum(o.square().sum() for o in outs), [*args, model.weight]) if train else ()
        issued[name] = issued_ops(group, strategy, before)[0]
        results.append([*outs, *grads])
    for eager, other in zip(*results, strict=True):
        torch.testing.assert_close(other, eager, rtol=1e-4, atol=1e-4 * float(eager.detach().abs().max()))
    return issued


FORWARD = ["dispatch", "dispatch", "combine", "combine"]
BACKWARD = ["combine_backward", "combine_backward_weights"] * 2 + ["dispatch_backward"] * 2


def check(pool: RankPool, *args: object, run: Callable = run_both) -> None:
    by_rank = pool.run(R, run, *args)
    assert by_rank[0] == by_rank[1]
    strategy, _, train, checkpointed, _ = args
    if strategy == "default":
        eager, compiled = by_rank[0]["eager"], by_rank[0]["compiled"]
        if checkpointed:
            # Eager recomputes all of a checkpoint, compiled code what it needs: the dispatches.
            assert eager == FORWARD + FORWARD + BACKWARD
            assert compiled[: len(FORWARD)] == FORWARD
            assert sorted(compiled[len(FORWARD) :]) == sorted(["dispatch", "dispatch", *BACKWARD])
        else:
            assert eager == compiled == (FORWARD + BACKWARD if train else FORWARD)


@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("strategy", ALLTOALL_IS_SLOW)
def test_aot_eager(pool: RankPool, strategy: str, checkpointed: bool) -> None:
    check(pool, strategy, "aot_eager", True, checkpointed, False)


def run_with_budget(ctx: RankContext, *args: object, budget: float) -> dict[str, list[str]]:
    with functorch_config.patch(activation_memory_budget=budget):
        return run_both(ctx, *args)


@pytest.mark.parametrize("budget", [0.0, *(pytest.param(some, marks=pytest.mark.slow) for some in (0.1, 0.5))])
@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("backend", ["aot_eager_decomp_partition", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_memory_budget_recomputes_no_communication(
    pool: RankPool, backend: str, checkpointed: bool, budget: float
) -> None:
    check(pool, "default", backend, True, checkpointed, False, run=functools.partial(run_with_budget, budget=budget))


def run_alike(ctx: RankContext, budget: float) -> list[list[str]]:
    """Two micro-batches, which are one and the same on rank 0. Returns what this rank issued, eager and compiled."""
    torch._dynamo.reset()
    group = ctx.prepared_group("default").group_name
    first, second = torch.ones(4, H), torch.ones(4, H) if ctx.rank else None
    ids = torch.arange(4 * K).view(4, K) % E

    def step(x1: Tensor, x2: Tensor | None) -> Tensor:
        total = torch.zeros(())
        for x in (x1, x1 if x2 is None else x2):
            started = deep_ep.dispatch_start(x, ids, num_experts=E, group=group)
            between = torch.sin(x).sum()
            out = deep_ep.wait(started)
            total = total + deep_ep.combine(torch.tanh(out.recv_x), out.handle, group=group).sum() + between
        return total

    issued, results = [], []
    compiled = torch.compile(step, backend="aot_eager_decomp_partition", fullgraph=True)
    for fn in (step, compiled):
        before = issued_ops(ctx.prepared_group("default"))[1]
        args = [x if x is None else x.clone().requires_grad_() for x in (first, second)]
        with functorch_config.patch(activation_memory_budget=budget):
            value = fn(*args)
            value.backward()
        issued.append(issued_ops(ctx.prepared_group("default"), since=before)[0])
        results.append([value, *(arg.grad for arg in args if arg is not None)])
    torch.testing.assert_close(*results)
    return issued


@pytest.mark.parametrize("budget", [0.0, pytest.param(0.1, marks=pytest.mark.slow), 1.0])
def test_calls_that_look_alike_stay_two(pool: RankPool, budget: float) -> None:
    once = ["dispatch", "combine"] * 2 + ["combine_backward", "combine_backward_weights", "dispatch_backward"] * 2
    assert pool.run(R, run_alike, budget) == [[once, once]] * R


@pytest.fixture
def fresh() -> Iterator[RankPool]:
    """Ranks in which nothing has been lowered yet, and the compiler has not even been loaded."""
    pool = RankPool(R, fresh=True)
    yield pool
    pool.close()


def compile_late(ctx: RankContext, *args: Any) -> dict[str, list[str]]:
    ctx.prepared_group("default")
    assert "torch._inductor.graph" not in sys.modules
    return run_both(ctx, *args)


@pytest.mark.slow
def test_a_compiler_that_is_loaded_after_init(fresh: RankPool) -> None:
    check(fresh, "default", "inductor", True, False, False, run=compile_late)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
def test_inductor(pool: RankPool, checkpointed: bool) -> None:
    check(pool, "default", "inductor", True, checkpointed, False)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["default", "alltoall"])
def test_inductor_without_gradients(pool: RankPool, strategy: str) -> None:
    check(pool, strategy, "inductor", False, False, True)


def run_mixed(ctx: RankContext, compiled_rank: int) -> list[str]:
    """One rank compiles, the other one does not. Returns what this rank issued."""
    torch._dynamo.reset()
    group = ctx.prepared_group("default")
    step = TwoMicroBatches(group.group_name, False, True).one_by_one
    args = make_args(ctx.rank, False)
    with torch.no_grad():
        expected = step(*args)
        if ctx.rank == compiled_rank:
            step = torch.compile(step, fullgraph=True, dynamic=False)
        before = issued_ops(group)[1]
        outs = step(*args)
    torch.testing.assert_close(outs, expected, rtol=1e-4, atol=1e-4)
    return issued_ops(group, since=before)[0]


@pytest.mark.slow
@pytest.mark.parametrize("compiled_rank", range(R))
def test_compiled_and_eager_ranks(pool: RankPool, compiled_rank: int) -> None:
    assert pool.run(R, run_mixed, compiled_rank) == [["dispatch", "combine"] * 2] * R


def run_unused(ctx: RankContext, strategy: str, backend: str, train: bool) -> list[str]:
    """Only rank 0 looks at what comes back. Returns what this rank issued in the compiled forward."""
    torch._dynamo.reset()
    group = ctx.prepared_group(strategy)
    model = TwoMicroBatches(group.group_name, False, False)

    def step(*args: Tensor) -> Tensor:
        first, second = model(*args)
        return first.sum() + second.sum() if ctx.rank == 0 else args[0].sum()

    args = make_args(ctx.rank, train)
    before = issued_ops(group, strategy)[1]
    with torch.set_grad_enabled(train):
        value = torch.compile(step, backend=backend, fullgraph=True)(*args)
        expected = step(*args)
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-2)
    return issued_ops(group, strategy, before)[0]


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("strategy", ALLTOALL_IS_SLOW)
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_forward_is_issued_where_its_result_is_unused(pool: RankPool, strategy: str, backend: str, train: bool) -> None:
    by_rank = pool.run(R, run_unused, strategy, backend, train)
    assert by_rank[0] == by_rank[1]
    assert sorted(by_rank[0]) == (sorted(2 * FORWARD) if strategy == "default" else [])
