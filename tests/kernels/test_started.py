"""How the results of calls that go on arrive: behind torch's back, whoever waits for them, wherever.

T local tokens, H hidden, K top-k, E experts, R ranks, N received rows.
"""

import contextlib
import itertools
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import Case, assert_same, make_inputs
from hypothesis import given, settings
from hypothesis import strategies as st
from op_calls import error_of
from ranks import ALLTOALL_IS_SLOW, STRATEGIES, RankContext, RankPool
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import deep_ep

E, H, K = 4, 8, 2
_reads = itertools.count()


def make_buffer(ctx: RankContext, strategy: str, rows: str, **environment: str) -> deep_ep.Buffer:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ({"DEEP_USE_MODE": strategy} | environment).items():
            patch.setenv(name, value)
        return deep_ep.Buffer(ctx.prepared_group(strategy), rows=rows)


def send(buffer: deep_ep.Buffer, x: Tensor, ids: Tensor, weights: Tensor | None = None, **options: Any) -> Any:
    """The rows that x becomes, their handle, and the event."""
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(ids, E)
    layout = {"num_tokens_per_rank": per_rank, "is_token_in_rank": in_rank, "num_tokens_per_expert": per_expert}
    *results, handle, event = buffer.dispatch(x, topk_idx=ids, topk_weights=weights, **layout, **options)
    return *results, handle, event


def inputs(ctx: RankContext) -> tuple[Tensor, Tensor]:
    """Different on each rank: x [3, H] and ids [3, K], which go to both of two ranks."""
    x = torch.arange(3 * H, dtype=torch.float32).view(3, H) + 100 * ctx.rank
    return x, torch.tensor([[0, 3], [2, 1], [3, 2]])


# An op of the client's, which returns what a call is still writing to


class Opaque(torch.autograd.Function):
    """combine, with the gradient that frameworks write for it by themselves."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, buffer: deep_ep.Buffer, handle: Any, events: list[Any]) -> Tensor:
        ctx.buffer, ctx.handle = buffer, handle
        combined, _, event = buffer.combine(y, handle, async_finish=True)
        events.append(event)
        return combined

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        rows, *_, event = ctx.buffer.dispatch(grad.contiguous(), handle=ctx.handle, async_finish=True)
        event.current_stream_wait()
        return rows, None, None, None


def opaque(ctx: RankContext, strategy: str) -> None:
    buffer, (x, ids), events = make_buffer(ctx, strategy, "rank"), inputs(ctx), []
    rows, *_, handle, _ = send(buffer, x, ids)
    y = (2 * rows).requires_grad_()
    out = Opaque.apply(y, buffer, handle, events)
    events[0].current_stream_wait()
    num_ranks = ids.div(E // ctx.size, rounding_mode="floor").sort(1).values.diff().ne(0).sum(1) + 1
    assert_same("combined", out, 2 * x * num_ranks.unsqueeze(1))
    (3 * out).sum().backward()
    assert_same("gradient", y.grad, torch.full_like(y, 3))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_opaque_op_returns_what_is_still_to_come(pool: RankPool, strategy: str) -> None:
    pool.run(2, opaque, strategy)


_of_op: dict[str, Any] = {}
_custom = torch.library.Library("deep_ep_tests_started", "FRAGMENT")
_custom.define("combine(Tensor y) -> Tensor")


def _custom_combine(y: Tensor) -> Tensor:
    combined, _, event = _of_op["buffer"].combine(y, _of_op["handle"], async_finish=True)
    _of_op["events"].append(event)
    return combined


def _custom_backward(ctx: Any, grad: Tensor) -> Tensor:
    return _of_op["buffer"].dispatch(grad.contiguous(), handle=_of_op["handle"])[0]


_custom.impl("combine", _custom_combine, "CompositeExplicitAutograd")
torch.library.register_autograd("deep_ep_tests_started::combine", _custom_backward, lib=_custom)


def checkpointed(ctx: RankContext, strategy: str) -> None:
    """Selective checkpointing saves the output of an op of the client's, whose event is waited for outside of it."""
    buffer, (x, ids) = make_buffer(ctx, strategy, "rank"), inputs(ctx)
    rows, *_, handle, _ = send(buffer, x, ids)
    op = torch.ops.deep_ep_tests_started.combine.default

    def layer(y: Tensor) -> Tensor:
        out = op(torch.sin(y))
        _of_op["events"][-1].current_stream_wait()
        return torch.cos(out)

    def policy(_: Any, called: Any, *__: Any, **___: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if called is op else CheckpointPolicy.PREFER_RECOMPUTE

    grads = []
    for step in (
        layer,
        partial(
            checkpoint,
            layer,
            use_reentrant=False,
            context_fn=partial(create_selective_checkpoint_contexts, policy),
        ),
    ):
        _of_op.update(buffer=buffer, handle=handle, events=[])
        y = rows.clone().requires_grad_()
        step(y).sum().backward()
        grads.append(y.grad)
    assert_same("gradient", grads[1], grads[0])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_selective_checkpointing_saves_what_is_still_to_come(pool: RankPool, strategy: str) -> None:
    pool.run(2, checkpointed, strategy)


# Where a wait is


def in_thread() -> contextlib.AbstractContextManager[None]:
    """Stands for a block that another thread runs; see `waited`."""
    return contextlib.nullcontext()


PLACES: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "where it was issued": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "inference_mode": torch.inference_mode,
    "thread": in_thread,
}


def waited(place: str, wait: Callable[[], Any]) -> Any:
    """What `wait` returns or raises in that place."""
    if place != "thread":
        with PLACES[place]():
            return wait()
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append((wait(), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    result, error = outcome[0]
    if error is not None:
        raise error
    return result


def places(ctx: RankContext, strategy: str) -> None:
    """Results require a gradient if the call was issued where that is recorded, and have it."""
    buffer, (x, ids) = make_buffer(ctx, strategy, "rank"), inputs(ctx)
    info = ctx.prepared_group(strategy)
    weights = torch.full((3, K), 0.5)
    for issued, place in itertools.product(("where it was issued", "no_grad", "inference_mode"), PLACES):
        leaf = x.clone().requires_grad_()
        records = issued == "where it was issued"
        with PLACES[issued]():
            rows, _, recv_weights, _, _, event = send(
                buffer, 2 * leaf, ids, weights, num_worst_tokens=9, async_finish=True
            )
            started = deep_ep.dispatch_start(2 * leaf, ids, num_experts=E, group=info)
        out = waited(place, lambda started=started: deep_ep.wait(started))
        waited(place, event.current_stream_wait)
        event.current_stream_wait()  # once more
        for name, one in (("rows", rows), ("out", out.recv_x)):
            assert one.requires_grad == records, (issued, place, name)
        plain = send(buffer, 2 * x, ids, weights, num_worst_tokens=9)
        assert_same("rows", rows, plain[0])
        assert_same("recv_topk_weights", recv_weights, plain[2])
        assert_same("recv_x", out.recv_x, deep_ep.dispatch(2 * x, ids, num_experts=E, group=info).recv_x)
        if records:
            (rows.sum() + out.recv_x.sum()).backward()
            num_ranks = ids.div(E // ctx.size, rounding_mode="floor").sort(1).values.diff().ne(0).sum(1) + 1
            assert_same("gradient", leaf.grad, (2.0 * (num_ranks + K)).unsqueeze(1).expand(3, H).contiguous())


@pytest.mark.parametrize("strategy", ALLTOALL_IS_SLOW)
def test_a_wait_may_be_anywhere(pool: RankPool, strategy: str) -> None:
    pool.run(2, places, strategy)


def never_waited(ctx: RankContext, strategy: str) -> None:
    """As programs written for DeepEP-Ascend do: under rows="expert" results are right in the order of the program."""
    buffer, (x, ids) = make_buffer(ctx, strategy, "expert"), inputs(ctx)
    weights = torch.full((3, K), 0.5)
    for options in ({"num_worst_tokens": 9}, {}):
        rows, *_, handle, event = send(buffer, x, ids, weights, async_finish=True, **options)
        assert event.event is not None
        combined, _, _ = buffer.combine(2 * rows, handle, async_finish=True)
        assert_same("combined", combined, 2 * x)
    for how in ("async_finish", "return_recv_hook"):
        rows, _, handle, _, hook = buffer.low_latency_dispatch(x, ids, 4, E, use_fp8=False, **{how: True})
        combined, _, _ = buffer.low_latency_combine(2 * rows, ids, weights, handle, **{how: True})
        assert_same("combined", combined, 2 * x)
        assert callable(hook)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_under_rows_expert_nobody_waits(pool: RankPool, strategy: str) -> None:
    pool.run(2, never_waited, strategy)


def in_turn(ctx: RankContext, strategy: str) -> None:
    """Two threads share a group's calls, as micro-batches do; one waits for its call while the other makes its own."""
    buffer, (x, ids) = make_buffer(ctx, strategy, "rank"), inputs(ctx)
    to_ranks = ids.div(E // ctx.size, rounding_mode="floor").sort(1).values.diff().ne(0).sum(1, keepdim=True) + 1
    turn = threading.Barrier(2)

    def micro_batches(begins: bool) -> None:
        for step in range(6):
            # The one that begins has T = 3 tokens on every rank, the other has none on some.
            num_tokens = 3 if begins or (step + ctx.rank) % 2 else 0
            batch = (x + step)[:num_tokens]
            if not begins:
                turn.wait()
            rows, *_, handle, _ = send(buffer, batch, ids[:num_tokens])
            turn.wait()
            turn.wait()
            combined, _, event = buffer.combine(rows, handle, async_finish=True)
            if begins:
                turn.wait()
            event.current_stream_wait()
            assert_same("combined", combined, batch * to_ranks[:num_tokens])
            turn.wait()

    def until_one_fails(begins: bool) -> None:
        try:
            micro_batches(begins)
        except BaseException:
            turn.abort()
            raise

    with ThreadPoolExecutor(2) as threads:
        for _ in threads.map(until_one_fails, (True, False)):
            pass


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_threads_may_call_in_turn(pool: RankPool, strategy: str) -> None:
    pool.run(2, in_turn, strategy)


def started_by_threads(ctx: RankContext, strategy: str) -> None:
    """Nobody waits for these calls; the one after them comes after all of them."""
    group, num_threads = ctx.prepared_group(strategy), 4
    x, ids = torch.ones(2, H), torch.zeros(2, 1, dtype=torch.int64)
    turn = threading.Barrier(num_threads)

    def start(number: int) -> None:
        turn.wait()
        for _ in range(2000 if strategy == "default" else 100):
            deep_ep.dispatch_start(x + number, ids, num_experts=E, group=group, num_worst_tokens=2)

    with ThreadPoolExecutor(num_threads) as threads:
        list(threads.map(start, range(num_threads)))
    out = deep_ep.dispatch(x, ids, num_experts=E, group=group, num_worst_tokens=2)
    assert_same("recv_x", out.recv_x, x)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_threads_may_start_calls_at_once(pool: RankPool, strategy: str) -> None:
    pool.run(1, started_by_threads, strategy)


# Static buffers


def overwritten(ctx: RankContext, strategy: str, backend: str) -> None:
    """Ids and weights that are written to after the dispatch, as a decode loop does, change nothing that follows."""
    torch._dynamo.reset()
    group = ctx.prepared_group(strategy)
    x = torch.ones(3, H)

    def step(x: Tensor, ids: Tensor, weights: Tensor, starts: bool) -> tuple[Tensor, Tensor]:
        sends = {"num_experts": E, "group": group, "num_worst_tokens": 12}
        if starts:
            started = deep_ep.dispatch_start(x, ids, weights, **sends)
            ids.fill_(3)
            weights.fill_(7)
            out = deep_ep.wait(started)
        else:
            out = deep_ep.dispatch(x, ids, weights, **sends)
        ids.fill_(3)
        weights.fill_(7)
        return deep_ep.combine(out.recv_x, out.handle, group=group), out.handle.topk_idx.clone()

    compiled = step if backend == "eager" else torch.compile(step, backend=backend, fullgraph=True)
    for starts in (False, True):
        _, ids = inputs(ctx)
        leaf = x.clone().requires_grad_()
        combined, kept = compiled(leaf, ids.clone(), torch.full((3, K), 0.5), starts)
        assert_same("combined", combined, x)
        assert_same("ids", kept, ids)
        if backend != "inductor":  # torch 2.13 recomputes a clone of an input that the same graph overwrites
            combined.sum().backward()
            assert_same("gradient", leaf.grad, x)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("strategy", ALLTOALL_IS_SLOW)
def test_ids_and_weights_may_be_overwritten(pool: RankPool, strategy: str, backend: str) -> None:
    pool.run(2, overwritten, strategy, backend)


def overwritten_x(ctx: RankContext, strategy: str, backend: str) -> tuple[str, str]:
    """x may not: an error of the wait, and in inductor of the compiler, which would send what it has become."""
    torch._dynamo.reset()
    group, (x, ids) = ctx.prepared_group(strategy), inputs(ctx)

    def step(x: Tensor, ids: Tensor) -> Tensor:
        started = deep_ep.dispatch_start(x, ids, num_experts=E, group=group, num_worst_tokens=12)
        x.add_(1)
        return deep_ep.wait(started).recv_x

    compiled = step if backend == "eager" else torch.compile(step, backend=backend, fullgraph=True)
    return error_of(compiled, x, ids)


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_x_must_not_be_overwritten(pool: RankPool, strategy: str, backend: str) -> None:
    for _, message in pool.run(2, overwritten_x, strategy, backend):
        assert "x was written to between" in message or "x is written to between" in message, message


def freed(ctx: RankContext, strategy: str, number: int) -> list[tuple[str, str]]:
    """What waits say where rank 0 frees the storage of x, as Megatron does with what it has used: before its peer lets
    it be sent, and after it has been.
    """
    buffer, group, (x, ids) = make_buffer(ctx, strategy, "rank"), ctx.prepared_group(strategy), inputs(ctx)
    sends = {"num_experts": E, "group": group, "num_worst_tokens": 12}
    out, errors = deep_ep.dispatch(x, ids, **sends), []
    starts: list[tuple[Callable[[Tensor], Callable[[], Any]], Tensor]] = [
        (lambda sent: partial(deep_ep.wait, deep_ep.dispatch_start(sent, ids, **sends)), x),
        (lambda sent: partial(deep_ep.wait, deep_ep.combine_start(sent, out.handle, group=group)), out.recv_x),
        (lambda sent: buffer.low_latency_dispatch(sent, ids, 4, E, use_fp8=False, return_recv_hook=True)[-1], x),
    ]
    for n, (start, like) in enumerate(starts):
        sent, key = like.clone(), f"freed {strategy} {number} {n}"
        if ctx.rank == 1:
            ctx.store.wait([key])
        before = deep_ep.dispatch_start(x, ids, **sends)
        wait = start(sent)
        if ctx.rank == 0:
            sent.untyped_storage().resize_(0)
            ctx.store.set(key, "")
        deep_ep.wait(before)
        errors.append(error_of(wait))
    for start, like in starts:
        sent = like.clone()
        wait = start(sent)
        deep_ep.dispatch(x, ids, **sends)  # comes after it
        if ctx.rank == 0:
            sent.untyped_storage().resize_(0)
            errors.append(error_of(wait))
        else:
            wait()
    return errors


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_is_sent_must_not_be_freed(pool: RankPool, strategy: str) -> None:
    own, others = pool.run(2, freed, strategy, next(_reads))
    for kind, message in own[:3] + others:
        assert kind == "RuntimeError" and "rank 0: " in message and "storage has been freed" in message, message
    for kind, message in own[3:]:
        assert kind == "RuntimeError"
        assert "x was freed between the start of the call and its wait" in message, message


def freed_at_once(ctx: RankContext, strategy: str, number: int) -> tuple[str, str] | None:
    """Rank 0 frees what it sends before its peer has begun; what is little has been sent by then."""
    buffer, (x, ids) = make_buffer(ctx, strategy, "rank"), inputs(ctx)
    weights, key = torch.ones(3, K), f"freed at once {number}"
    rows, _, handle, _, _ = buffer.low_latency_dispatch(x, ids, 4, E, use_fp8=False)
    expected, rows = (x * K, rows.clone()), rows.clone()  # that of the op cannot be freed
    combine = partial(buffer.low_latency_combine, return_recv_hook=True)
    dispatch = partial(buffer.low_latency_dispatch, use_fp8=False, return_recv_hook=True)
    error = None
    for n, (start, sent) in enumerate(
        ((lambda y: combine(y, ids, weights, handle), rows), (lambda x: dispatch(x, ids, 4, E), x))
    ):
        if ctx.rank == 1:
            ctx.store.wait([f"{key} {n}"])
        result, *_, hook = start(sent)
        if ctx.rank == 0:
            sent.untyped_storage().resize_(0)
            ctx.store.set(f"{key} {n}", "")
            error = error_of(hook)
        else:
            hook()
        assert_same("result", result, expected[n])
    return error


def test_what_is_little_is_sent_when_the_call_is_issued(pool: RankPool) -> None:
    """Its peer has it, and so has the rank itself, whose wait says that it could not be relied on."""
    error, of_peer = pool.run(2, freed_at_once, "default", next(_reads))
    assert of_peer is None
    assert error[0] == "RuntimeError" and "x was freed between the start of the call and its wait" in error[1], error


def overwritten_in_inference(ctx: RankContext, strategy: str) -> None:
    """Rank 0 writes to what it sends before the other one has begun."""
    buffer, group = make_buffer(ctx, strategy, "rank"), ctx.prepared_group(strategy)

    def overwriting(name: str, start: Callable[..., Any], *sent: Tensor) -> Any:
        key = f"overwritten in inference: {strategy}, {name}"
        if ctx.rank != 0:
            ctx.store.wait([key])
        result = start(*sent)
        for tensor in sent:
            tensor.zero_()
        ctx.store.set(key, "")
        return result

    with torch.inference_mode():
        x = inputs(ctx)[0].repeat(1, 512)
        ids, weights = inputs(ctx)[1].clone(), torch.full((3, K), 0.5)
        sends = {"num_experts": E, "group": group, "num_worst_tokens": 12}
        out = deep_ep.dispatch(x, ids, weights, **sends)
        started = overwriting("dispatch", lambda x: deep_ep.dispatch_start(x, ids, weights, **sends), x.clone())
        assert_same("recv_x", deep_ep.wait(started).recv_x, out.recv_x)
        started = overwriting(
            "combine", lambda y: deep_ep.combine_start(y, out.handle, group=group), out.recv_x.clone()
        )
        assert_same("combined", deep_ep.wait(started), x)

        rows, *_, handle, _ = send(buffer, x, ids)
        again, *_, event = overwriting(
            "cached", lambda x: buffer.dispatch(x, handle=handle, async_finish=True), x.clone()
        )
        event.current_stream_wait()
        assert_same("rows", again, rows)
        summed, _, event = overwriting(
            "Buffer.combine", lambda y: buffer.combine(y, handle, async_finish=True), rows.clone()
        )
        event.current_stream_wait()
        assert_same("summed", summed, buffer.combine(rows, handle)[0])

        hooked = {"use_fp8": False, "return_recv_hook": True}
        plain, *_ = buffer.low_latency_dispatch(x, ids, 4, E, use_fp8=False)
        rows, _, low_handle, _, hook = overwriting(
            "low_latency_dispatch",
            lambda x, ids: buffer.low_latency_dispatch(x, ids, 4, E, **hooked),
            *(x.clone(), ids.clone()),
        )
        hook()
        assert_same("low-latency rows", rows, plain)
        combined, _, hook = overwriting(
            "low_latency_combine",
            lambda *sent: buffer.low_latency_combine(*sent, low_handle, return_recv_hook=True),
            *(rows.clone(), ids.clone(), weights.clone()),
        )
        hook()
        assert_same("low-latency combined", combined, x)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_in_inference_mode_what_is_overwritten_was_sent(pool: RankPool, strategy: str) -> None:
    """There, torch does not count writes, so that no wait could tell."""
    pool.run(2, overwritten_in_inference, strategy)


# Before the wait


def too_early(ctx: RankContext, strategy: str, number: int) -> bool:
    """Rank 0 reads before its peer has begun the call."""
    buffer, (x, ids) = make_buffer(ctx, strategy, "rank", DEBUG_MODE="ON"), inputs(ctx)
    if ctx.rank == 1:
        ctx.store.wait([f"read {number}"])
    results = send(buffer, x, ids, torch.ones(3, K), num_worst_tokens=9, async_finish=True)
    is_nothing = bool(results[0].isnan().all() and results[2].isnan().all() and (results[1] == -1).all())
    if ctx.rank == 0:
        ctx.store.set(f"read {number}", "")
    results[-1].current_stream_wait()
    assert not results[0].isnan().any() and not results[2].isnan().any()
    ctx.unprepare(strategy)
    return is_nothing


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_who_does_not_wait_reads_nan_when_debugging(pool: RankPool, strategy: str) -> None:
    assert pool.run(2, too_early, strategy, next(_reads))[0]


def without_memory(ctx: RankContext) -> list[tuple[str, str]]:
    """Rank 1 asks for rows that no memory holds, in a call that goes on; a plain call is right thereafter."""
    group, (x, ids) = ctx.prepared_group("default"), inputs(ctx)
    x = x.repeat(1, 4096)
    rows = 2**31 - 1 if ctx.rank == 1 else 12
    op, arguments = torch.ops.deep_ep, (x, ids, torch.ones(3, K))
    sizes = E, ctx.size, rows, group.group_name
    ticket = op.dispatch_start(*arguments, *sizes)
    errors = [error_of(op.wait, ticket, "dispatch", list(arguments), *sizes)]
    out = deep_ep.dispatch(x, ids, num_experts=E, group=group)
    assert_same("combined", deep_ep.combine(out.recv_x, out.handle, group=group), 2 * x)
    return errors


def test_a_call_that_goes_on_without_memory_fails_on_all_ranks(pool: RankPool) -> None:
    for ((kind, message),) in pool.run(2, without_memory):
        assert kind == "RuntimeError" and "rank 1: cannot allocate" in message, message


# Random programs


def program(seed: int, num_chains: int, compiled: bool) -> list[tuple[int, str, Any]]:
    """Steps of several micro-batches, each of which is dispatched, computed and combined, in some order. A step is the
    chain, what is done, and how."""
    draw = random.Random(seed)
    chains: list[Iterator[tuple[int, str, Any]]] = []
    for chain in range(num_chains):
        places = ["where it was issued", "no_grad"] + ([] if compiled else ["inference_mode", "thread"])
        api = draw.choice(["function", "buffer", "low latency"])
        steps = []
        for call in ("dispatch", "combine"):
            steps.append((chain, call, (api, draw.random() < 0.7)))
            steps.append((chain, "wait", draw.choice(places)))
            if call == "dispatch":
                steps.append((chain, "overwrite", None))
        chains.append(iter(steps))
    steps = []
    while chains:
        turn = draw.choice(chains)
        step = next(turn, None)
        if step is None:
            chains.remove(turn)
            continue
        steps.append(step)
        if not compiled and draw.random() < 0.3:
            steps.append((-1, draw.choice(["all_reduce", "barrier"]), None))
    return steps


class Runner:
    """Runs a program; `starts`: with calls in two steps where it says so."""

    def __init__(self, ctx: RankContext, strategy: str, rows: str, seed: int, num_chains: int) -> None:
        self.group, self.rows, self.num_chains = ctx.prepared_group(strategy), rows, num_chains
        self.buffer = make_buffer(ctx, strategy, rows)
        made = [
            make_inputs(Case((5, 3), H=H, K=K, ids="distinct", capacity=(0.8, 1.3), seed=seed + chain))
            for chain in range(num_chains)
        ]
        self.xs, self.ids, self.weights, self.worst = (
            [getattr(one, name)[ctx.rank] for one in made]
            for name in ("xs", "topk_idxs", "topk_weights", "num_worst_tokens")
        )
        self.others = 0

    def run(self, steps: list[tuple[int, str, Any]], starts: bool, *leaves: Tensor) -> list[Tensor]:
        state: list[dict[str, Any]] = [
            {"x": leaves[2 * n], "w": leaves[2 * n + 1], "ids": self.ids[n].clone()} for n in range(self.num_chains)
        ]
        outs = []
        for chain, what, how in steps:
            if chain < 0:
                self.other(what)
                continue
            one = state[chain]
            if what == "wait":
                results = waited(how, one.pop("wait"))
                one |= {name: results for name in ("received", "sums") if name in one and results is not None}
                if "sums" in one:
                    sums = one.pop("sums")
                    outs += [torch.tanh(part) for part in (sums if isinstance(sums, tuple) else (sums,))]
            elif what == "overwrite":
                one["ids"].fill_(0)
            else:
                api, in_two = how
                in_two = starts and in_two
                getattr(self, f"{what}_{api.replace(' ', '_')}")(one, chain, in_two)
        return outs

    def other(self, what: str) -> None:
        if what == "barrier":
            dist.barrier(self.group)
        else:
            value = torch.full((3,), 1.0)
            dist.all_reduce(value, group=self.group)
            assert value.tolist() == [self.group.size()] * 3
        self.others += 1

    def dispatch_function(self, one: dict[str, Any], chain: int, in_two: bool) -> None:
        given = torch.sin(one["x"]), one["ids"], one["w"]
        sizes = {"num_experts": E, "group": self.group, "num_worst_tokens": self.worst[chain] * (chain % 2)}
        if in_two:
            started = deep_ep.dispatch_start(*given, **sizes)
            one |= {"received": None, "wait": lambda: deep_ep.wait(started)}
        else:
            one |= {"received": deep_ep.dispatch(*given, **sizes), "wait": lambda: None}

    def combine_function(self, one: dict[str, Any], _: int, in_two: bool) -> None:
        out = one.pop("received")
        y = torch.cos(out.recv_x)
        if in_two:
            started = deep_ep.combine_start(y, out.handle, group=self.group)
            one |= {"sums": None, "wait": lambda: deep_ep.wait(started)}
        else:
            one |= {"sums": deep_ep.combine(y, out.handle, group=self.group), "wait": lambda: None}

    def dispatch_buffer(self, one: dict[str, Any], chain: int, in_two: bool) -> None:
        x, capacity = torch.sin(one["x"]), self.worst[chain]
        rows, _, weights, _, handle, event = send(
            self.buffer, x, one["ids"], one["w"], num_worst_tokens=capacity, async_finish=in_two
        )
        one |= {"received": (rows, weights, handle), "wait": event.current_stream_wait}

    def combine_buffer(self, one: dict[str, Any], _: int, in_two: bool) -> None:
        rows, weights, handle = one.pop("received")
        combined, of_weights, event = self.buffer.combine(
            torch.cos(rows),
            handle,
            topk_weights=weights if self.rows == "rank" else None,
            bias=torch.sin(one["x"]),
            async_finish=in_two,
        )
        sums = (combined,) if of_weights is None else (combined, of_weights)
        one |= {"sums": sums, "wait": event.current_stream_wait}

    def dispatch_low_latency(self, one: dict[str, Any], _: int, in_two: bool) -> None:
        ids = one["ids"].clone()
        rows, _, handle, _, hook = self.buffer.low_latency_dispatch(
            torch.sin(one["x"]), ids, 6, E, use_fp8=False, return_recv_hook=in_two
        )
        one |= {"received": (rows, ids, handle), "wait": hook or (lambda: None)}

    def combine_low_latency(self, one: dict[str, Any], _: int, in_two: bool) -> None:
        rows, ids, handle = one.pop("received")
        combined, event, _ = self.buffer.low_latency_combine(
            torch.cos(rows), ids, one["w"], handle, async_finish=in_two
        )
        one |= {"sums": combined, "wait": event.current_stream_wait}


def random_program(ctx: RankContext, strategy: str, rows: str, backend: str, seed: int, num_chains: int) -> None:
    torch._dynamo.reset()
    runner = Runner(ctx, strategy, rows, seed, num_chains)
    steps = program(seed, num_chains, backend != "eager")
    results = []
    for starts in (False, True):
        leaves = [
            tensor.clone().requires_grad_() for pair in zip(runner.xs, runner.weights, strict=True) for tensor in pair
        ]
        run = partial(runner.run, steps, starts)
        if starts and backend != "eager":
            run = torch.compile(run, backend=backend, fullgraph=True, dynamic=False)
        outs = run(*leaves)
        assert all(out.requires_grad for out in outs)
        loss = sum((out * (n + 1)).sum() for n, out in enumerate(outs))
        results.append([*outs, *torch.autograd.grad(loss, leaves, allow_unused=True)])
    for n, (wanted, actual) in enumerate(zip(*results, strict=True)):
        if wanted is None or actual is None:
            assert wanted is actual
        elif backend == "inductor":
            torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-5)
        else:
            assert_same(f"{n} of seed {seed}", actual, wanted)


@pytest.mark.parametrize("rows", ["expert", "rank"])
@pytest.mark.parametrize("strategy", ALLTOALL_IS_SLOW)
@settings(max_examples=15)
@given(seed=st.integers(0, 10**6), num_chains=st.integers(1, 4))
def test_programs_are_as_without_starts(pool: RankPool, strategy: str, rows: str, seed: int, num_chains: int) -> None:
    pool.run(2, random_program, strategy, rows, "eager", seed, num_chains)


@pytest.mark.slow
@pytest.mark.parametrize("rows", ["expert", "rank"])
@pytest.mark.parametrize(
    "backend, strategy, seed",
    [("aot_eager", s, n) for s in STRATEGIES for n in range(3)]
    + [("inductor", "default", 1), ("inductor", "alltoall", 2)],
)
def test_compiled_programs_are_as_without_starts(
    pool: RankPool, backend: str, strategy: str, rows: str, seed: int
) -> None:
    pool.run(2, random_program, strategy, rows, backend, seed, 2)
