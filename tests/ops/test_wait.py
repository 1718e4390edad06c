"""Calls that are started and waited for: results, gradients, what runs between, and errors.

T local tokens, H hidden, K top-k, E experts, R ranks, N received rows.
"""

import contextlib
import gc
import itertools
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import Case, assert_same, cases, make_inputs
from hypothesis import given, settings
from meeting import prepare
from op_calls import OPS, calls, check_ops, error_of
from ranks import (
    ALLTOALL_IS_SLOW,
    STRATEGIES,
    WINDOW_BYTES,
    RankContext,
    RankDied,
    RankPool,
    raise_failures,
    spawn_ranks,
)
from test_order import issued_ops
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import deep_ep
from deep_ep.kernels import started as calls_under_way

_numbers = itertools.count()


def start(op: str, strategy: str, arguments: dict[str, Any]) -> Tensor:
    """A ticket. The caller has nothing left of what it has given, and others take memory of the same size."""
    given = {name: value.clone() if isinstance(value, Tensor) else value for name, value in arguments.items()}
    ticket = getattr(getattr(torch.ops.deep_ep, f"{op}_start"), strategy)(**given)
    sizes = [value.shape for value in given.values() if isinstance(value, Tensor)]
    del given
    for size in sizes:
        torch.full(size, 7)
    return ticket


def wait(op: str, strategy: str, ticket: Tensor, arguments: dict[str, Any], how: str = "wait") -> list[Tensor]:
    a = arguments
    names = {"dispatch_backward": ["grad_recv_x", "topk_idx"], "combine_backward": ["x", "topk_weights"]}
    all_names = [argument.name for argument in getattr(torch.ops.deep_ep, op).default._schema.arguments]
    tensors = [a[name] for name in names.get(op, all_names) if isinstance(a[name], Tensor)]
    sizes = a["num_experts"], a["num_ranks"], a.get("num_worst_tokens", 0)
    return getattr(getattr(torch.ops.deep_ep, how), strategy)(ticket, op, tensors, *sizes, a["group"])


def check_calls(ctx: RankContext, case: Case, strategy: str) -> None:
    """All ops are started before the first one is waited for, and one runs in between as a whole."""
    group = ctx.prepared_group(strategy).group_name
    right = calls(case)
    arguments = {op: right.arguments(op, ctx.rank, group) for op in OPS}
    tickets = {op: start(op, strategy, arguments[op]) for op in OPS}
    exact = ["dispatch"] if arguments["dispatch"]["num_worst_tokens"] == 0 else []
    early = {
        op: wait(op, strategy, tickets[op], arguments[op], "arriving")
        for op in ("dispatch", "combine")
        if op not in exact
    }
    between = getattr(torch.ops.deep_ep.dispatch, strategy)(**arguments["dispatch"])
    results = {op: wait(op, strategy, tickets[op], arguments[op]) for op in reversed(OPS)}
    right.check("dispatch", ctx.rank, between)
    for op in OPS:
        right.check(op, ctx.rank, results[op])
    for op, tensors in early.items():
        right.check(op, ctx.rank, tensors)
        assert [one.data_ptr() for one in tensors] == [one.data_ptr() for one in results[op]]


@pytest.mark.parametrize("strategy", ALLTOALL_IS_SLOW)
@settings(max_examples=20)
@given(case=cases())
def test_any_case(pool: RankPool, strategy: str, case: Case) -> None:
    pool.run(case.R, check_calls, case, strategy)


class Layer:
    """dispatch, experts and combine, started and waited for, beside other work.

    Rank 0 arrives somewhere between every start and its wait, in forward and in backward; other ranks enter the call
    only then. A start that waits for its peers cannot pass, nor can one that is moved to its wait.
    """

    def __init__(self, ctx: RankContext, strategy: str, case: Case) -> None:
        self.group, self.case, self.is_first = ctx.prepared_group(strategy).group_name, case, ctx.rank == 0
        self.places = prepare(ctx, "dispatch", "combine", "dispatch_backward", "combine_backward")
        x, self.ids, weights, self.worst = (given[ctx.rank] for given in make_inputs(case))
        shared = torch.randn(case.H, case.H, generator=torch.Generator().manual_seed(3))
        self.inputs = [tensor.clone().requires_grad_() for tensor in (x, weights, shared)]

    def arrive(self, x: Tensor, op: int) -> Tensor:
        if not self.is_first:
            return x
        x = torch.ops.deep_ep_tests.meet(x, True, self.places[op])
        return torch.ops.deep_ep_tests.meet_in_backward(x, True, self.places[op + 2])

    def enter(self, x: Tensor, op: int) -> Tensor:
        return x if self.is_first else torch.ops.deep_ep_tests.meet(x, False, self.places[op])

    def enter_in_backward(self, x: Tensor, op: int) -> Tensor:
        return x if self.is_first else torch.ops.deep_ep_tests.meet_in_backward(x, False, self.places[op + 2])

    def overlapped(self, x: Tensor, weights: Tensor, shared: Tensor) -> tuple[Tensor, ...]:
        E, group = self.case.E, self.group
        # What is sent is an intermediate, whose memory inductor could give to what is computed between.
        sent = self.enter(torch.sin(x), 0)
        started = deep_ep.dispatch_start(
            sent, self.ids, weights, num_experts=E, group=group, num_worst_tokens=self.worst
        )
        beside = self.arrive(torch.tanh(x @ shared), 0)
        received = deep_ep.wait(started)
        y = self.enter(torch.cos(self.enter_in_backward(received.recv_x, 0)), 1)
        started = deep_ep.combine_start(y, received.handle, group=group)
        beside = self.arrive(torch.tanh(beside @ shared), 1)
        out = self.enter_in_backward(deep_ep.wait(started), 1)
        return out, beside, received.recv_topk_weights

    def one_by_one(self, x: Tensor, weights: Tensor, shared: Tensor) -> tuple[Tensor, ...]:
        E, group = self.case.E, self.group
        received = deep_ep.dispatch(
            torch.sin(x), self.ids, weights, num_experts=E, group=group, num_worst_tokens=self.worst
        )
        beside = torch.tanh(torch.tanh(x @ shared) @ shared)
        return (
            deep_ep.combine(torch.cos(received.recv_x), received.handle, group=group),
            beside,
            received.recv_topk_weights,
        )


class BufferLayer(Layer):
    """The same with Buffer's calls and their events."""

    def __init__(self, ctx: RankContext, strategy: str, case: Case, rows: str) -> None:
        super().__init__(ctx, strategy, case)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("DEEP_USE_MODE", strategy)
            self.buffer = deep_ep.Buffer(ctx.prepared_group(strategy), rows=rows)

    def dispatch(self, x: Tensor, weights: Tensor, asynchronous: bool) -> tuple[Any, ...]:
        options = {"async_finish": asynchronous, "allocate_on_comm_stream": asynchronous}
        event = self.buffer.capture() if asynchronous else None
        per_rank, _, per_expert, in_rank, event = self.buffer.get_dispatch_layout(
            self.ids, self.case.E, previous_event=event, **options
        )
        return self.buffer.dispatch(
            x,
            topk_idx=self.ids,
            topk_weights=weights,
            num_tokens_per_rank=per_rank,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            num_worst_tokens=self.worst,
            previous_event=event,
            **options,
        )

    def overlapped(self, x: Tensor, weights: Tensor, shared: Tensor) -> tuple[Tensor, ...]:
        sent = self.enter(torch.sin(x), 0)
        recv_x, _, recv_weights, _, handle, event = self.dispatch(sent, weights, True)
        beside = self.arrive(torch.tanh(x @ shared), 0)
        event.current_stream_wait()
        y = self.enter(torch.cos(self.enter_in_backward(recv_x, 0)), 1)
        out, _, event = self.buffer.combine(y, handle, async_finish=True)
        with event:
            beside = self.arrive(torch.tanh(beside @ shared), 1)
        return self.enter_in_backward(out, 1), beside, recv_weights

    def one_by_one(self, x: Tensor, weights: Tensor, shared: Tensor) -> tuple[Tensor, ...]:
        recv_x, _, recv_weights, _, handle, _ = self.dispatch(torch.sin(x), weights, False)
        beside = torch.tanh(torch.tanh(x @ shared) @ shared)
        return self.buffer.combine(torch.cos(recv_x), handle)[0], beside, recv_weights


def overlap(ctx: RankContext, strategy: str, backend: str, case: Case, rows: str | None = None) -> None:
    torch._dynamo.reset()
    layer = Layer(ctx, strategy, case) if rows is None else BufferLayer(ctx, strategy, case, rows)
    step = layer.overlapped
    if backend != "eager":
        step = torch.compile(step, backend=backend, fullgraph=True)
    results = []
    for call in (layer.one_by_one, step):
        outs = call(*layer.inputs)
        generator = torch.Generator().manual_seed(5)
        loss = sum((out * torch.randn(out.shape, generator=generator)).sum() for out in outs)
        results.append([*outs, *torch.autograd.grad(loss, layer.inputs)])
    for name, wanted, actual in zip(("out", "beside", "weights", "x", "topk_weights", "shared"), *results, strict=True):
        if backend == "inductor":
            torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-5)
        else:
            assert_same(name, actual, wanted)


CASES = {"exact": Case((6, 9), H=16, seed=4), "capacity": Case((6, 9), H=16, capacity=(0.7, 1.2), seed=4)}


def where(*of_inductor: tuple[str, str]) -> list[Any]:
    """Backend, strategy and one thing more; of inductor, which takes its time, only these."""
    both = sorted({thing for _, thing in of_inductor})
    quick = [("eager", s, thing) for s in STRATEGIES for thing in both] + [("aot_eager", "default", t) for t in both]
    slow = [("aot_eager", "alltoall", thing) for thing in both] + [("inductor", *pair) for pair in of_inductor]
    return quick + [pytest.param(*case, marks=pytest.mark.slow) for case in slow]


@pytest.mark.parametrize("backend, strategy, mode", where(("default", "exact"), ("alltoall", "capacity")))
def test_overlap(pool: RankPool, backend: str, strategy: str, mode: str) -> None:
    pool.run(2, overlap, strategy, backend, CASES[mode])


@pytest.mark.parametrize("backend, strategy, rows", where(("default", "rank"), ("alltoall", "rank")))
def test_overlap_of_a_buffer(pool: RankPool, backend: str, strategy: str, rows: str) -> None:
    pool.run(2, overlap, strategy, backend, CASES["capacity"], rows)


def buffer_variants(ctx: RankContext, rows: str, strategy: str) -> None:
    """Alignment, quantised rows, handles, biases and statistics: with events as without."""
    layer = BufferLayer(ctx, strategy, Case((6, 9), H=128, dtype=torch.bfloat16, ids="distinct", seed=4), rows)
    buffer, x, E = layer.buffer, layer.inputs[0].detach(), layer.case.E
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(layer.ids, E)
    layout = {"num_tokens_per_rank": per_rank, "is_token_in_rank": in_rank, "num_tokens_per_expert": per_expert}
    routed = {"topk_idx": layer.ids, **layout}

    def both(call: Any, *args: Any, stats: str, **kwargs: Any) -> Any:
        """What the call gives with an event, after a check of all tensors in it; and that its event is the only one."""
        results = []
        for asynchronous in (False, True):
            costs = torch.zeros(ctx.size, dtype=torch.int64)
            *out, event = call(*args, async_finish=asynchronous, **{stats: costs}, **kwargs)
            assert (event.event is not None) == asynchronous
            event.current_stream_wait()
            assert costs[ctx.rank] == 0
            results.append(out)
        for wanted, actual in zip(*map(tree_leaves, results), strict=True):
            if isinstance(wanted, Tensor):
                assert_same("with an event", as_bytes(actual), as_bytes(wanted))
            else:
                assert actual == wanted
        return results[1]

    dispatch = partial(both, buffer.dispatch, x, stats="dispatch_wait_recv_cost_stats")
    for options in (
        {"num_worst_tokens": 40},
        {"num_worst_tokens": 3, "expert_alignment": 4},
        {"num_worst_tokens": 40, "quant_mode": "int8"},
        {"expert_alignment": 4},
        {},
    ):
        recv_x, *_, handle = dispatch(**routed, **options)
        dispatch(handle=handle)
    bias = torch.ones_like(x)
    both(buffer.combine, 2 * recv_x, handle, bias=(bias, bias), stats="combine_send_cost_stats")


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8).to(torch.int16) if tensor.dim() else tensor


@pytest.mark.parametrize("rows", ["expert", "rank"])
@pytest.mark.parametrize("strategy", ALLTOALL_IS_SLOW)
def test_all_that_a_buffer_can_be_asked_for(pool: RankPool, strategy: str, rows: str) -> None:
    pool.run(2, buffer_variants, rows, strategy)


# Graphs


class TwoMicroBatches(torch.nn.Module):
    """All that is started is waited for later, with the other one's calls between."""

    def __init__(self, group: str, case: Case, starts: bool) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(case.H, case.H, generator=torch.Generator().manual_seed(0)))
        self.group, self.E, self.starts = group, case.E, starts

    def dispatch(self, x: Tensor, logits: Tensor) -> Any:
        weights, ids = torch.softmax(logits, -1).topk(2)
        call = deep_ep.dispatch_start if self.starts else deep_ep.dispatch
        return call(x, ids, weights, num_experts=self.E, group=self.group)

    def combine(self, out: deep_ep.DispatchOutput) -> Any:
        call = deep_ep.combine_start if self.starts else deep_ep.combine
        return call(torch.tanh(out.recv_x) @ self.weight, out.handle, group=self.group)

    def forward(self, x1: Tensor, logits1: Tensor, x2: Tensor, logits2: Tensor) -> tuple[Tensor, Tensor]:
        wait = deep_ep.wait if self.starts else lambda result: result
        first, second = self.dispatch(x1, logits1), self.dispatch(x2, logits2)
        first = self.combine(wait(first))
        second = self.combine(wait(second))
        return wait(first), wait(second)


def two_micro_batches(ctx: RankContext, backend: str, checkpointed: bool) -> list[str]:
    """Compiled against eager and without starts; returns what this rank issued in compiled code."""
    torch._dynamo.reset()
    group = ctx.prepared_group("default")
    case = Case((4, 512), H=64)
    generator = torch.Generator().manual_seed(ctx.rank)
    args = []
    for T in case.tokens if ctx.rank == 0 else case.tokens[::-1]:
        args += [torch.randn(T, case.H, generator=generator), torch.randn(T, case.E, generator=generator)]
    args = [arg.requires_grad_() for arg in args]
    results = []
    for starts, compiles in ((False, False), (True, False), (True, True)):
        model = TwoMicroBatches(group.group_name, case, starts)
        step = partial(checkpoint, model, use_reentrant=False) if checkpointed else model
        if compiles:
            step = torch.compile(step, backend=backend, fullgraph=True, dynamic=False)
        before = issued_ops(group)[1]
        outs = step(*args)
        results.append([*outs, *torch.autograd.grad(sum(o.square().sum() for o in outs), [*args, model.weight])])
    for other in results[1:]:
        for actual, wanted in zip(other, results[0], strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4 * float(wanted.detach().abs().max()))
    return issued_ops(group, since=before)[0]


@pytest.mark.parametrize(
    "checkpointed", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["plain", "checkpointed"]
)
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_ranks_of_other_sizes_keep_one_order(pool: RankPool, backend: str, checkpointed: bool) -> None:
    first, second = pool.run(2, two_micro_batches, backend, checkpointed)
    assert first == second
    assert len(first) == (12 if checkpointed else 10)  # compiled code recomputes dispatches alone


def partly_used(ctx: RankContext, strategy: str, backend: str, use: str) -> None:
    torch._dynamo.reset()
    group = ctx.prepared_group(strategy).group_name
    case = Case((6, 9), H=16, seed=4)
    x, ids, weights, _ = (given[ctx.rank] for given in make_inputs(case))
    leaves = [tensor.clone().requires_grad_() for tensor in (x, weights)]
    kwargs = {"num_experts": case.E, "group": group, "num_worst_tokens": 40}

    def results_of(out: deep_ep.DispatchOutput) -> tuple[Tensor, ...]:
        return (out.recv_topk_weights,) if use == "weights" else (out.recv_x, out.recv_topk_weights)

    def step(x: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        beside = torch.sin(x), torch.sin(weights)
        started = deep_ep.dispatch_start(x, ids, weights, **kwargs)
        if use == "weights":
            return *beside, *results_of(deep_ep.wait(started))
        torch._dynamo.graph_break()
        return *beside, *(results_of(deep_ep.wait(started)) if use == "in another graph" else (started.ticket,))

    def one_by_one(x: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        beside = torch.sin(x), torch.sin(weights)
        return *beside, *results_of(deep_ep.dispatch(x, ids, weights, **kwargs))

    compiled = torch.compile(step, backend=backend) if backend != "eager" else step
    grads = []
    for fn in (one_by_one, compiled):
        outs = fn(*leaves)
        if use == "nothing":
            outs = outs[:2]
        grads.append(torch.autograd.grad(sum(out.square().sum() for out in outs), leaves))
    for wanted, actual in zip(*grads, strict=True):
        torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("use", ["weights", "in another graph", "nothing"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("strategy", ALLTOALL_IS_SLOW)
def test_results_that_are_partly_used(pool: RankPool, strategy: str, backend: str, use: str) -> None:
    pool.run(2, partly_used, strategy, backend, use)


def fakes(ctx: RankContext, strategy: str) -> None:
    """Of every start by opcheck, and of every wait, which opcheck would call twice with one ticket."""
    group = ctx.prepared_group(strategy).group_name
    right = calls(Case((3, 5), capacity=(0.7, 1.2)))
    for op in OPS:
        arguments = right.arguments(op, ctx.rank, group)
        begin = getattr(getattr(torch.ops.deep_ep, f"{op}_start"), strategy)
        names = [argument.name for argument in begin._schema.arguments]
        # The number of a ticket is another one each time.
        torch.library.opcheck(
            begin, tuple(arguments[name] for name in names), test_utils=("test_schema", "test_faketensor")
        )
        results = wait(op, strategy, begin(**arguments), arguments)
        with FakeTensorMode() as mode:
            given = {k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in arguments.items()}
            faked = wait(op, strategy, begin(**given), given)
        assert [(f.shape, f.dtype, f.device) for f in faked] == [(r.shape, r.dtype, r.device) for r in results]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_fakes(pool: RankPool, strategy: str) -> None:
    pool.run(2, fakes, strategy)


# What goes wrong


def wrong_calls(ctx: RankContext, strategy: str) -> list[tuple[str, str]]:
    group, last = ctx.prepared_group(strategy), ctx.rank == ctx.size - 1
    case = Case((3, 3), H=8, local_experts=1)
    x, ids = torch.ones(3, 8), torch.tensor([[0, 1]]).repeat(3, 1)
    kwargs: dict[str, Any] = {"num_experts": 2, "group": group}
    errors = []

    # What this rank sees is raised when the call is issued.
    begin = partial(deep_ep.dispatch_start, x, ids + 7 * last, **kwargs)
    errors.append(error_of(begin) if last else error_of(deep_ep.wait, begin()))

    started = deep_ep.dispatch_start(x, ids, **kwargs)
    out = deep_ep.wait(started)
    errors.append(error_of(deep_ep.wait, started))

    started = deep_ep.combine_start(out.recv_x, out.handle, group=group)
    errors.append(error_of(deep_ep.wait, started._replace(op="dispatch", arguments=(x, ids, torch.ones(3, 2)))))
    op = getattr(torch.ops.deep_ep.wait, strategy)
    errors.append(error_of(op, torch.zeros(1), "combine", list(started.arguments), 2, 2, 0, group.group_name))

    # What is sent was written to after the start.
    rows = out.recv_x.clone()
    started = deep_ep.combine_start(rows, out.handle, group=group)
    rows.zero_()
    errors.append(error_of(deep_ep.wait, started))
    check_ops(case, ctx.rank, group.group_name, strategy)
    return errors


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_wrong_calls(pool: RankPool, strategy: str) -> None:
    says = (
        ("deep_ep.dispatch: rank 1: topk_idx has the id",),
        ("deep_ep.wait: ticket must be what dispatch_start returned", "good for one wait"),
        ("deep_ep.wait: ticket must be what dispatch_start returned, got that of combine_start",),
        ("deep_ep.wait: ticket must be torch.float64",),
        ("deep_ep.combine: x was written to between the start of the call and its wait",),
    )
    for errors in pool.run(2, wrong_calls, strategy):
        for (kind, message), wanted in zip(errors, says, strict=True):
            assert kind == "RuntimeError" and all(text in message for text in wanted), message


def wrong_options(ctx: RankContext) -> list[tuple[str, str]]:
    buffer = deep_ep.Buffer(ctx.prepared_group("default"), rows="rank")
    ids, x = torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 8)
    after = deep_ep.EventOverlap(deep_ep.EventHandle(), extra_tensors=(x,))
    wrong = [{"previous_event": after}, {"async_finish": True}, {"previous_event": deep_ep.EventOverlap()}]
    errors = [
        error_of(buffer.get_dispatch_layout, ids, 2, allocate_on_comm_stream=True, **options) for options in wrong
    ]
    both = {"async_finish": True, "return_recv_hook": True}
    errors.append(error_of(buffer.low_latency_dispatch, x, ids, 2, 2, **both))

    # What this rank sees is raised when the call is issued; what another one sees is the event's, and stays with it.
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(ids, 2)
    layout = {"num_tokens_per_rank": per_rank, "is_token_in_rank": in_rank, "num_tokens_per_expert": per_expert}
    call = partial(buffer.dispatch, x, topk_idx=ids + 9 * ctx.rank, num_worst_tokens=4, async_finish=True, **layout)
    if ctx.rank == 1:
        errors.append(error_of(call))
    else:
        errors.append(error_of(buffer.get_dispatch_layout, ids, 2, previous_event=call()[-1]))
    call = partial(buffer.dispatch, topk_idx=ids, num_worst_tokens=4, async_finish=True, **layout)
    if ctx.rank == 1:
        errors.append(error_of(call, x.double()))
    else:
        errors.append(error_of(call(x)[-1].current_stream_wait))
    check_ops(Case((2, 3)), ctx.rank, buffer.group.group_name, "default")
    return errors


def test_wrong_options(pool: RankPool) -> None:
    says = [("ValueError", "allocate_on_comm_stream needs previous_event and async_finish=True")] * 3
    says += [("ValueError", "async_finish and return_recv_hook must not both be True")]
    for rank, errors in enumerate(pool.run(2, wrong_options)):
        of_ids = (
            ("ValueError", "topk_idx has the id 9") if rank == 1 else ("RuntimeError", "rank 1: topk_idx has the id 9")
        )
        told = [*says, of_ids, ("RuntimeError", "rank 1: x must be torch.bfloat16")]
        for (kind, message), (wanted_kind, wanted) in zip(errors, told, strict=True):
            assert kind == wanted_kind and wanted in message, (kind, message)


def outlive(ctx: RankContext, strategy: str) -> tuple[str, str]:
    group = ctx.prepared_group(strategy)
    arguments = calls(Case((5, 3))).arguments("dispatch", ctx.rank, group.group_name)
    if ctx.rank == 1:
        ctx.store.wait(["never"])
    ticket = start("dispatch", strategy, arguments)
    ctx.store.set("started", "")
    return error_of(wait, "dispatch", strategy, ticket, arguments)


@pytest.mark.parametrize("strategy", ALLTOALL_IS_SLOW)
def test_a_peer_that_dies(strategy: str) -> None:
    with spawn_ranks(2, outlive, strategy) as ranks:
        ranks.wait_for("started")
        ranks.kill(1)
        survivor, victim = ranks.outcomes()
    assert isinstance(victim.exception, RankDied)
    raise_failures([survivor])
    kind, message = survivor.value
    assert kind == "RuntimeError" and "deep_ep.dispatch" in message
    assert strategy == "alltoall" or "has died" in message


# The thread of a group


def threads(strategy: str) -> int:
    if strategy == "alltoall":
        return sum(thread.name == "deep_ep" for thread in threading.enumerate())
    names = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError):  # it has just ended
            names.append((task / "comm").read_text().strip())
    return names.count("deep_ep")


def wakings() -> int:
    """How often the threads of this process's groups have gone to sleep."""
    count = 0
    for task in Path("/proc/self/task").iterdir():
        if (task / "comm").read_text().strip() == "deep_ep":
            count += int((task / "status").read_text().split("\nvoluntary_ctxt_switches:")[1].split()[0])
    return count


def hooks_in_turn(ctx: RankContext) -> tuple[int, float]:
    buffer = deep_ep.Buffer(ctx.prepared_group("default"), rows="rank")
    x, ids, weights = torch.ones(2, 8), torch.tensor([[0], [1]]), torch.ones(2, 1)
    begun, before = time.monotonic(), 0
    for step in range(501):
        if step == 1:  # the thread has begun
            begun, before = time.monotonic(), wakings()
        rows, _, handle, _, hook = buffer.low_latency_dispatch(x, ids, 2, 2, use_fp8=False, return_recv_hook=True)
        hook()
        combined, _, hook = buffer.low_latency_combine(rows, ids, weights, handle, return_recv_hook=True)
        hook()
        assert_same("combined", combined, x)
    return wakings() - before, time.monotonic() - begun


def test_a_hook_of_little_data_wakes_no_thread(pool: RankPool) -> None:
    """It looks from time to time whether somebody waits for calls, however many there are."""
    ((count, seconds),) = pool.run(1, hooks_in_turn)
    assert count <= 10 + seconds / 0.001, (count, seconds)


def left_to_the_thread(ctx: RankContext, number: int) -> None:
    """Rank 0 has little to send, and waits for nothing before its peer, which has much, has received it."""
    buffer, key, T = deep_ep.Buffer(ctx.prepared_group("default"), rows="rank"), f"left {number}", 1 << 16
    assert T * 8 * 8 > 2 << 20  # what may be attached
    x = torch.full((T if ctx.rank == 1 else 3, 8), ctx.rank + 1.0)
    ids, weights = torch.arange(len(x)).unsqueeze(1) % 2, torch.ones(len(x), 1)

    def receive(step: str, hook: Callable[[], None]) -> None:
        if ctx.rank == 0:
            ctx.store.wait([f"{key} {step}"])
        hook()
        if ctx.rank == 1:
            ctx.store.set(f"{key} {step}", "")

    rows, counts, handle, _, hook = buffer.low_latency_dispatch(x, ids, T, 2, use_fp8=False, return_recv_hook=True)
    receive("dispatch", hook)
    combined, _, hook = buffer.low_latency_combine(rows, ids, weights, handle, return_recv_hook=True)
    receive("combine", hook)
    assert_same("counts", counts, torch.tensor([T // 2 + 2 - ctx.rank], dtype=torch.int32))
    assert_same("combined", combined, x)


def test_a_peer_with_much_data_does_not_wait_for_a_hook(pool: RankPool) -> None:
    pool.run(2, left_to_the_thread, next(_numbers))


def count_threads(ctx: RankContext, strategy: str) -> list[int]:
    before = threads(strategy)
    group = dist.new_group(list(range(ctx.size)))
    deep_ep.init(group, strategy=strategy, num_bytes=WINDOW_BYTES)
    counts = [threads(strategy) - before]
    arguments = calls(Case((5, 3))).arguments("dispatch", ctx.rank, group.group_name)
    for _ in range(3):
        tickets = [start("dispatch", strategy, arguments) for _ in range(2)]
        for ticket in tickets:
            wait("dispatch", strategy, ticket, arguments)
    counts.append(threads(strategy) - before)
    start("dispatch", strategy, arguments)  # nobody asks for its results
    check_ops(Case((5, 3)), ctx.rank, group.group_name, strategy)
    gc.collect()
    assert not calls_under_way._calls
    deep_ep.destroy(group)
    dist.destroy_process_group(group)
    del group
    gc.collect()
    while threads(strategy) > before:
        os.sched_yield()
    return counts


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ALLTOALL_IS_SLOW)
def test_a_group_has_one_thread_as_long_as_it_lives(strategy: str) -> None:
    with spawn_ranks(2, count_threads, strategy) as ranks:
        outcomes = ranks.outcomes()
    raise_failures(outcomes)
    assert [outcome.value for outcome in outcomes] == [[0, 1]] * 2


LEAVES_A_CALL_BEHIND = """
import os, sys
import torch, torch.distributed as dist
import deep_ep

reader, writer = os.pipe()
rank = 1 if os.fork() == 0 else 0
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
deep_ep.init(strategy=sys.argv[1], num_bytes=1 << 20)
if rank == 1:
    os.close(writer)
    os.read(reader, 1)  # until rank 0 is gone
    os._exit(0)
deep_ep.dispatch_start(torch.ones(2, 8), torch.zeros(2, 1, dtype=torch.int64), num_experts=2)
"""


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_process_ends_with_a_call_that_goes_on(strategy: str, tmp_path: Path) -> None:
    """Its peer never enters the call."""
    command = [sys.executable, "-c", LEAVES_A_CALL_BEHIND, strategy, str(tmp_path / "rendezvous")]
    subprocess.run(command, check=True, env=os.environ | {"GLOO_SOCKET_IFNAME": "lo"})
