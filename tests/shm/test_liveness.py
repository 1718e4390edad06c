"""Ranks that die, leave, are late or go another way, and what stays behind: nothing may hang, leak or be stale.

There is no sleeping here: a rank knows that others are inside an op from what they did (`Entries`), and stops
inside a transfer where it reads a certain row (`at_row`). T local tokens, H hidden, K top-k, E experts, R ranks,
N received rows.
"""

import ctypes
import functools
import gc
import itertools
import mmap
import os
import random
import re
import signal
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from cases import Case, assert_close, assert_same
from op_calls import calls, check_ops, error_of, run
from patience import own_time, pace
from ranks import Outcome, RankContext, RankDied, RankPool, raise_failures, spawn_ranks
from torch import Tensor

import deep_ep
from deep_ep import groups, windows
from deep_ep._library import library

LONG = timedelta(minutes=10)
SMALL = 1 << 20  # bytes, the smallest window
CASES = {R: Case((5, 0, 7, 3)[:R], seed=R) for R in (1, 2, 3, 4)}
# Rows for every rank that take many rounds in a small window, and fit into no attachment.
LARGE = Case((2000, 700, 3000), H=512, local_experts=1)
# A row that the last rank reads in the middle of the transfer.
MIDDLE = {"dispatch": 1500, "combine": 500}


class Raised(NamedTuple):
    """An error, and when it was raised, in `own_time`."""

    kind: str
    message: str
    at: float


def raised_by(call: Callable[..., object], *args: object) -> Raised:
    error, at = own_time(lambda: error_of(call, *args))
    return Raised(*error, at)


def make_world(ctx: RankContext, name: str, ranks: list[int] | None = None) -> dist.ProcessGroup:
    """WORLD of these ranks of the run, or all. They call it together; `name` keeps it apart from others."""
    ranks = ranks or list(range(ctx.size))
    store = dist.PrefixStore(name, ctx.store)
    dist.init_process_group("gloo", store=store, rank=ranks.index(ctx.rank), world_size=len(ranks), timeout=LONG)
    return dist.group.WORLD


def window_mappings() -> list[tuple[int, int]]:
    """First and end address of the windows that this process maps."""
    with open("/proc/self/maps") as maps:
        ranges = [line.split()[0].split("-") for line in maps if "deep_ep_window" in line]
    return [(int(first, 16), int(end, 16)) for first, end in ranges]


def _target(descriptor: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except FileNotFoundError:
        return ""  # that of listdir


class Entries:
    """Waits for peers to enter an op under `default`, from a rank that has not.

    A window begins with what it is, in 64 bytes, a counter of how often its owner was rung, and whether the owner
    sleeps. Whoever enters an op rings those who sleep; this rank says that it does.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        own = os.fstat(library.deep_ep_group_fd(groups._parts[group.group_name]["cpu"]._handle)).st_ino
        with open("/proc/self/maps") as maps:
            (first,) = (int(line.split("-")[0], 16) for line in maps if line.split()[4] == str(own))
        self._rings = ctypes.c_uint32.from_address(first + 64)
        self._before = self._rings.value
        ctypes.c_uint32.from_address(first + 68).value = 1

    def wait_for(self, peers: int) -> None:
        while self._rings.value - self._before < peers:
            os.sched_yield()


_libc = ctypes.CDLL(None)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
_libc.signal.restype = ctypes.c_void_p
_SignalHandler = ctypes.CFUNCTYPE(None, ctypes.c_int)


def at_row(tensor: Tensor, row: int, hook: Callable[[], None]) -> None:
    """The first time that somebody reads about row `row` of the tensor, calls hook() first, in that place.

    The pages around the row cannot be read until then.
    """
    row_bytes = tensor.stride(0) * tensor.element_size()
    first = (tensor.data_ptr() + row * row_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
    assert first >= tensor.data_ptr()
    assert first + mmap.PAGESIZE <= tensor.data_ptr() + tensor.nbytes

    def protect(protection: int) -> None:
        assert _libc.mprotect(first, mmap.PAGESIZE, protection) == 0

    @_SignalHandler
    def handler(signum: int) -> None:
        _libc.signal(signal.SIGSEGV, before)
        protect(mmap.PROT_READ | mmap.PROT_WRITE)
        hook()

    at_row.handler = handler  # must live as long as it may be called
    before = _libc.signal(signal.SIGSEGV, ctypes.cast(handler, ctypes.c_void_p))
    protect(0)


def spoiled(op: str, rank: int, group: dist.ProcessGroup, hook: Callable[[], None]) -> dict[str, Any]:
    """Arguments of a large dispatch or combine; this rank calls hook() in the middle of the transfer."""
    arguments = calls(LARGE).arguments(op, rank, group.group_name)
    x = arguments["x"].clone()
    at_row(x, MIDDLE[op], hook)
    return arguments | {"x": x}


def held() -> tuple[int, int]:
    """What deep_ep holds of the operating system: mapped windows, and descriptors of windows and processes."""
    gc.collect()
    descriptors = [_target(name) for name in os.listdir("/proc/self/fd")]
    return len(window_mappings()), sum(bool(re.search("deep_ep_window|pidfd", target)) for target in descriptors)


Body = TypeVar("Body", bound=Callable[..., object])


def leaves_nothing(body: Body) -> Body:
    """For a function on a rank: what it made is gone when it has returned."""

    @functools.wraps(body)
    def checked(*args: object) -> object:
        before = held()
        result = body(*args)
        assert held() == before
        return result

    return checked


@pytest.fixture(autouse=True)
def nothing_in_dev_shm() -> Iterator[None]:
    yield
    assert not [name for name in os.listdir("/dev/shm") if "deep_ep" in name]


# A rank dies


def go_on_without(ctx: RankContext, victim: int, strategy: str) -> None:
    """The survivors leave the broken group and make a new one."""
    dist.destroy_process_group()
    assert held() == (0, 0)
    survivors = [rank for rank in range(ctx.size) if rank != victim]
    group = make_world(ctx, "survivors", survivors)
    deep_ep.init(group, strategy=strategy, num_bytes=SMALL)
    check_ops(CASES[group.size()], group.rank(), group.group_name, strategy)
    del group
    dist.destroy_process_group()
    assert held() == (0, 0)


def wait_in_dispatch(ctx: RankContext, strategy: str, victim: int) -> Raised:
    """Rank 1 enters dispatch when the victim, which waits for it there, is dead. (Of little data the victim would have
    sent its part by then, and the next operation would raise.)
    """
    group = make_world(ctx, "all")
    deep_ep.init(group, strategy=strategy, num_bytes=SMALL)
    check_ops(CASES[ctx.size], ctx.rank, group.group_name, strategy)
    dist.barrier()
    if ctx.rank == 1:
        entries = Entries(group) if strategy == "default" else None
        ctx.store.set("enter", "")
        ctx.store.wait([f"rank {rank} enters" for rank in range(ctx.size) if rank != 1])
        if entries:
            entries.wait_for(ctx.size - 1)
        ctx.store.set("kill", "")
        ctx.store.wait(["killed"])
    else:
        ctx.store.wait(["enter"])
        ctx.store.set(f"rank {ctx.rank} enters", "")
    raised = raised_by(run, "dispatch", strategy, calls(LARGE).arguments("dispatch", ctx.rank, group.group_name))
    del group
    go_on_without(ctx, victim, strategy)
    return raised


def assert_survived(outcomes: list[Outcome], victim: int, op: str, killed_at: float) -> None:
    assert isinstance(outcomes[victim].exception, RankDied)
    survivors = [outcome for rank, outcome in enumerate(outcomes) if rank != victim]
    raise_failures(survivors)
    for outcome in survivors:
        kind, message, at = outcome.value
        assert kind == "RuntimeError"
        assert f"deep_ep.{op}: " in message
        assert re.search(rf"rank {victim} \(process \d+\) has died", message), message
        assert at - killed_at < 5.0


@pytest.mark.parametrize(
    "strategy, victim",
    [
        ("default", 2),
        pytest.param("default", 0, marks=pytest.mark.slow),
        pytest.param("alltoall", 2, marks=pytest.mark.slow),
    ],
)
def test_killed_while_it_waits(strategy: str, victim: int) -> None:
    with spawn_ranks(3, wait_in_dispatch, strategy, victim, init=False) as ranks:
        ranks.wait_for("kill")
        ranks.kill(victim)
        ranks.processes[victim].join()
        killed_at = time.monotonic()
        ranks.store.set("killed", "")
        outcomes = ranks.outcomes()
    assert_survived(outcomes, victim, "dispatch", killed_at)


def die_in_the_middle(ctx: RankContext, op: str, strategy: str) -> Raised:
    group = make_world(ctx, "all")
    deep_ep.init(group, strategy=strategy, num_bytes=SMALL)
    victim = ctx.size - 1

    def die() -> None:
        ctx.store.set("killed at", str(time.monotonic()))
        os.kill(os.getpid(), signal.SIGKILL)

    arguments = calls(LARGE).arguments(op, ctx.rank, group.group_name)
    raised = raised_by(run, op, strategy, spoiled(op, ctx.rank, group, die) if ctx.rank == victim else arguments)
    del group
    go_on_without(ctx, victim, strategy)
    return raised


@pytest.mark.slow
@pytest.mark.parametrize("op, strategy", [("dispatch", "default"), ("combine", "default"), ("dispatch", "alltoall")])
def test_killed_in_the_middle_of_a_transfer(op: str, strategy: str) -> None:
    with spawn_ranks(3, die_in_the_middle, op, strategy, init=False) as ranks:
        outcomes = ranks.outcomes()
        killed_at = float(ranks.store.get("killed at"))
    assert_survived(outcomes, 2, op, killed_at)


# A rank leaves or is late


def short() -> timedelta:
    """A deadline for ranks that do not come, which those who do come keep."""
    return timedelta(seconds=round(pace()))


def others_wait(ctx: RankContext, leave: str) -> Raised | None:
    """The last rank goes while the others wait for it in combine."""
    group = make_world(ctx, "all")
    deep_ep.init(group, num_bytes=SMALL)
    check_ops(CASES[ctx.size], ctx.rank, group.group_name, "default")
    dist.barrier()
    last = ctx.size - 1
    if ctx.rank == last:
        entries = Entries(group)
        ctx.store.set("enter", "")
        entries.wait_for(last)
        if leave == "exits":
            os._exit(0)
        deep_ep.destroy(group)
        raised = None
    else:
        ctx.store.wait(["enter"])
        raised = raised_by(
            run, "combine", "default", calls(CASES[ctx.size]).arguments("combine", ctx.rank, group.group_name)
        )
    if leave == "destroys":
        # Only the windows are gone, torch.distributed still has the group.
        deep_ep.init(group, num_bytes=SMALL)
        check_ops(CASES[ctx.size], ctx.rank, group.group_name, "default")
    return raised


@pytest.mark.parametrize(
    "leave, says",
    [
        ("destroys", "rank 2 has left the group"),
        pytest.param("exits", "rank 2 .* has died", marks=pytest.mark.slow),
    ],
)
def test_rank_leaves(leave: str, says: str) -> None:
    with spawn_ranks(3, others_wait, leave, init=False) as ranks:
        *others, last = ranks.outcomes()
    raise_failures(others)
    assert isinstance(last.exception, RankDied if leave == "exits" else type(None))
    for outcome in others:
        assert outcome.value.kind == "RuntimeError"
        assert re.search(rf"deep_ep\.combine: rank \d waits for rank 2 to enter .*{says}", outcome.value.message)


@leaves_nothing
def late_to_enter(ctx: RankContext, timeout: timedelta) -> list[tuple[str, str]]:
    """The last rank enters dispatch, the third operation, after the others have given up."""
    case, group = CASES[ctx.size], ctx.group
    arguments = calls(case).arguments("dispatch", ctx.rank, group.group_name)
    deep_ep.init(group, num_bytes=SMALL, timeout=timeout)
    check_ops(case, ctx.rank, group.group_name, "default", ("dispatch", "combine"))
    if ctx.rank == ctx.size - 1:
        dist.barrier(group)
    errors = [error_of(run, "dispatch", "default", arguments)]
    if ctx.rank < ctx.size - 1:
        dist.barrier(group)
    errors.append(error_of(run, "dispatch", "default", arguments))
    errors.append(error_of(run, "combine", "default", calls(case).arguments("combine", ctx.rank, group.group_name)))
    renew(ctx)
    return errors


def renew(ctx: RankContext) -> None:
    """A group that was given up works again after init."""
    deep_ep.init(ctx.group, num_bytes=SMALL)
    check_ops(CASES[ctx.size], ctx.rank, ctx.group.group_name, "default")
    deep_ep.destroy(ctx.group)


def test_late_to_enter(pool: RankPool) -> None:
    *others, last = pool.run(3, late_to_enter, short())
    for rank, errors in enumerate(others):
        message = errors[0][1]
        # One of them is the first to give up, and the other one may learn it from that one.
        assert re.search(
            r"deep_ep\.dispatch: rank \d waited \d+ s for rank 2 \(last seen in operation number 2\) to enter "
            r"\(operation number 3\)",
            message,
        ), message
        assert message.startswith(f"deep_ep.dispatch: rank {rank} wait")
    assert re.search(r"deep_ep\.dispatch: .* gave up: .* for rank 2", last[0][1]), last[0]
    for errors in (*others, last):
        for op, (kind, message) in zip(("dispatch", "dispatch", "combine"), errors, strict=True):
            assert kind == "RuntimeError"
            assert message.startswith(f"deep_ep.{op}: ")
        assert all("given up" in message for _, message in errors[1:])


@leaves_nothing
def late_in_the_middle(ctx: RankContext, op: str, key: str, timeout: timedelta) -> tuple[str, str]:
    """The last rank stops in the middle of the transfer, and goes on after the others have given up."""
    group = ctx.group

    def stop() -> None:
        ctx.store.wait([f"{key} {rank}" for rank in range(ctx.size - 1)])

    if ctx.rank == ctx.size - 1:
        arguments = spoiled(op, ctx.rank, group, stop)
    else:
        arguments = calls(LARGE).arguments(op, ctx.rank, group.group_name)
    deep_ep.init(group, num_bytes=SMALL, timeout=timeout)
    error = error_of(run, op, "default", arguments)
    ctx.store.set(f"{key} {ctx.rank}", "")
    renew(ctx)
    return error


@pytest.mark.slow
@pytest.mark.parametrize("op", ["dispatch", "combine"])
def test_late_in_the_middle_of_a_transfer(pool: RankPool, op: str) -> None:
    *others, last = pool.run(3, late_in_the_middle, op, f"{op} gave up {time.monotonic()}", short())
    for kind, message in others:
        assert kind == "RuntimeError"
        assert re.search(
            rf"deep_ep\.{op}: rank \d waited \d+ s for .*rank 2 \(in this operation\) to (send its|take) rows "
            r"\(operation number 1\)",
            message,
        ), message
    assert last[0] == "RuntimeError"
    assert re.search(rf"deep_ep\.{op}: rank 2 waits for rank \d .* gave up: ", last[1]), last


def deadlines(ctx: RankContext) -> list[timedelta]:
    """That of WORLD, of a group with a timeout of its own, and of init."""
    world = make_world(ctx, "all")
    ranks = list(range(ctx.size))
    group = dist.new_group(ranks, timeout=timedelta(minutes=3))
    passed = []
    create = windows.library.deep_ep_group_create

    def recorded(rank: int, size: int, num_bytes: int, milliseconds: int, error: object) -> int:
        passed.append(timedelta(milliseconds=milliseconds))
        return create(rank, size, num_bytes, milliseconds, error)

    with mock.patch.object(windows.library, "deep_ep_group_create", recorded):
        deep_ep.init(world, num_bytes=SMALL)
        deep_ep.init(group, num_bytes=SMALL)
        deep_ep.init(group, num_bytes=SMALL, timeout=timedelta(seconds=7))
        # Kept: no new window.
        deep_ep.init(group, num_bytes=SMALL)
    return passed


def test_deadline_is_the_timeout_of_the_group() -> None:
    with spawn_ranks(2, deadlines, init=False) as ranks:
        outcomes = ranks.outcomes()
    raise_failures(outcomes)
    for outcome in outcomes:
        assert outcome.value == [LONG, timedelta(minutes=3), timedelta(seconds=7)]


# A rank goes another way


@leaves_nothing
def without_backward(ctx: RankContext) -> tuple[list[str], tuple[str, str]]:
    """The last rank does not use its forward result and goes on to its next forward."""
    case, group, last = CASES[ctx.size], ctx.group, ctx.size - 1
    deep_ep.init(group, num_bytes=SMALL)
    arguments = calls(case).arguments("dispatch", ctx.rank, group.group_name)
    x, topk_idx = arguments["x"].clone().requires_grad_(), arguments["topk_idx"]
    losses = []
    for _ in range(2):
        received = deep_ep.dispatch(
            x, arguments["topk_idx"], arguments["topk_weights"], num_experts=case.E, group=group
        )
        out = deep_ep.combine(received.recv_x * 2, received.handle, group=group)
        losses.append((x if ctx.rank == last else out).sum())
    forward, _ = groups.op_log(group)

    def go_on() -> None:
        losses[-1].backward()
        deep_ep.dispatch(x, topk_idx, num_experts=case.E, group=group)

    error = error_of(go_on)
    check_ops(case, ctx.rank, group.group_name, "default")
    deep_ep.destroy(group)
    return forward, error


def test_one_rank_runs_no_backward(pool: RankPool) -> None:
    for forward, (kind, message) in pool.run(3, without_backward):
        assert forward == ["dispatch", "combine"] * 2
        assert kind == "RuntimeError"
        assert "rank 0 has combine_backward" in message
        assert "rank 2 has dispatch" in message
        assert "operation number 5" in message


# Groups come and go


def remade_worlds(ctx: RankContext, keep: bool) -> list[tuple[str, list[tuple[str, str]]]]:
    """WORLDs of 3, 2 and 3 ranks; per world its name, and what ops say before init."""
    told, kept = [], []
    for generation, R in enumerate((3, 2, 3)):
        if ctx.rank >= R:
            told.append(("", []))
            continue
        case = CASES[R]
        group = make_world(ctx, f"world {generation}", list(range(R)))
        arguments = calls(case).arguments("dispatch", ctx.rank, group.group_name)
        public = {"x": arguments["x"], "topk_idx": arguments["topk_idx"], "num_experts": case.E}
        told.append(
            (
                group.group_name,
                [
                    *([] if keep else [error_of(run, "dispatch", "default", arguments)]),
                    error_of(deep_ep.dispatch, **public),
                    error_of(deep_ep.get_dispatch_layout, arguments["topk_idx"], case.E),
                ],
            )
        )
        deep_ep.init(num_bytes=SMALL)
        check_ops(case, ctx.rank, group.group_name, "default")
        if keep:
            kept.append(group)
        del group
        dist.destroy_process_group()
        if not keep:
            assert held() == (0, 0)
    return told


@pytest.mark.parametrize("keep", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_world_is_made_again(keep: bool) -> None:
    """The names of groups come back. `keep`: somebody still has the ProcessGroup that was destroyed."""
    with spawn_ranks(3, remade_worlds, keep, init=False) as ranks:
        outcomes = ranks.outcomes()
    raise_failures(outcomes)
    for outcome in outcomes:
        assert len({name for name, errors in outcome.value if errors}) == 1
        for _, errors in outcome.value:
            for kind, message in errors:
                assert kind == "RuntimeError", errors
                assert "deep_ep.init(group)" in message


@leaves_nothing
def many_groups(ctx: RankContext) -> None:
    """Buffers of several groups, two of WORLD's ranks among them, with an op of each in flight."""
    members = [(0, 1, 2, 3), (0, 1), (2, 3), (0, 1, 3), (1, 3), (0, 2), (0, 1, 2, 3)]
    mine = []
    for ranks in members:
        group = dist.new_group(list(ranks))
        if ctx.rank in ranks:
            mine.append((group, deep_ep.Buffer(group, SMALL)))
    for _ in range(2):
        results = []
        for group, buffer in mine:
            case, rank = CASES[group.size()], group.rank()
            arguments = calls(case).arguments("dispatch", rank, group.group_name)
            x, ids, weights = arguments["x"], arguments["topk_idx"], arguments["topk_weights"]
            per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(ids, case.E)
            results.append(buffer.dispatch(x, None, per_rank, None, in_rank, per_expert, ids, weights))
        combined = [
            buffer.combine(calls(CASES[group.size()]).arguments("combine", group.rank(), "")["x"], result[4])[0]
            for (group, buffer), result in zip(mine, results, strict=True)
        ]
        for (group, _), result, out in zip(mine, results, combined, strict=True):
            right, rank = calls(CASES[group.size()]), group.rank()
            assert_same("recv_x", result[0], right.result("dispatch", rank)[0])
            assert_same("recv_topk_weights", result[2], right.result("dispatch", rank)[2])
            assert result[3] == right.result("dispatch", rank)[3].tolist()
            right.check("combine", rank, out)
    while mine:
        group, buffer = mine.pop()
        del buffer
        deep_ep.destroy(group)
        dist.destroy_process_group(group)


@pytest.mark.slow
def test_many_groups(pool: RankPool) -> None:
    pool.run(4, many_groups)


# Memory


@leaves_nothing
def many_alive(ctx: RankContext, count: int) -> int:
    """`count` dispatches whose recv_x is saved for backward, in a window that cannot hold them. How many lie in it."""
    group = ctx.group
    deep_ep.init(group, num_bytes=SMALL)
    generator = torch.Generator().manual_seed(ctx.rank)
    T, H, K, E = 16, 512, 2, 2 * ctx.size
    batches, received, outs = [], [], []
    for _ in range(count):
        x = torch.randn(T, H, generator=generator).requires_grad_()
        ids = torch.randint(E, (T, K), generator=generator)
        weights = torch.rand(T, K, generator=generator)
        batches.append((x, weights))
        received.append(deep_ep.dispatch(x, ids, weights, num_experts=E, group=group))
        outs.append(deep_ep.combine(received[-1].recv_x ** 2, received[-1].handle, group=group))

    ranges = sorted((r.recv_x.data_ptr(), r.recv_x.data_ptr() + r.recv_x.nbytes) for r in received)
    assert all(end <= first for (_, end), (first, _) in itertools.pairwise(ranges))
    inside = sum(any(first <= at < end for first, end in window_mappings()) for at, _ in ranges)

    copies = [r.recv_x.detach().clone() for r in received]
    torch.autograd.backward([out.sum() for out in outs])
    for (x, weights), out, r, copy in zip(batches, outs, received, copies, strict=True):
        weight = weights.sum(1, keepdim=True)
        assert_close("out", out, x**2 * weight, 1e-5 * x.detach() ** 2 * weight)
        assert_close("x.grad", x.grad, 2 * x * weight, 1e-5 * x.detach().abs() * weight)
        assert_same("recv_x", r.recv_x, copy)
    # Tensors in the window outlive the group.
    deep_ep.destroy(group)
    for r, copy in zip(received, copies, strict=True):
        assert_same("recv_x", r.recv_x, copy)
    return inside


@pytest.mark.parametrize("R", [1, 2])
def test_many_results_alive(pool: RankPool, R: int) -> None:
    for inside in pool.run(R, many_alive, 64):
        assert 0 < inside < 64


@leaves_nothing
def grow(ctx: RankContext) -> None:
    """A larger window replaces a smaller one, while results lie in the smaller one and go on to combine."""
    case, group = CASES[ctx.size], ctx.group
    right = calls(case)
    others = len(window_mappings())
    old = []
    for num_bytes in (SMALL, 2 * SMALL, 8 * SMALL):
        deep_ep.init(group, num_bytes=num_bytes)
        deep_ep.init(group, num_bytes=SMALL)  # large enough: kept
        assert groups._parts[group.group_name]["cpu"].num_bytes == num_bytes
        for _ in range(2):  # a rank without tokens does not know before the second time that rows come
            dispatched = run("dispatch", "default", right.arguments("dispatch", ctx.rank, group.group_name))
        old.append(dispatched)
        check_ops(case, ctx.rank, group.group_name, "default")
        for dispatched in old:
            right.check("dispatch", ctx.rank, dispatched)
        # The newest windows of all, and the own older ones, in which results lie.
        assert len(window_mappings()) - others == ctx.size + len(old) - 1
    handles = [dispatched[8:] for dispatched in old]
    del old, dispatched
    gc.collect()
    assert len(window_mappings()) - others == ctx.size
    arguments = right.arguments("combine", ctx.rank, group.group_name)
    for recv_src_idx, send_head in handles:
        out = run("combine", "default", arguments | {"recv_src_idx": recv_src_idx, "send_head": send_head})
        right.check("combine", ctx.rank, out)
    deep_ep.destroy(group)


@pytest.mark.slow
@pytest.mark.parametrize("R", [1, 3])
def test_windows_grow(pool: RankPool, R: int) -> None:
    pool.run(R, grow)


@leaves_nothing
def grow_as_needed(ctx: RankContext) -> None:
    """Without num_bytes a window is little larger than what has been alive in it."""
    group = ctx.group
    deep_ep.init(group)
    windows = groups._parts[group.group_name]["cpu"]

    def reserved() -> int:
        return os.fstat(library.deep_ep_group_fd(windows._handle)).st_blocks * 512

    empty = reserved()
    assert empty < 5 << 20
    right = calls(Case((2000,) * ctx.size, H=512, absent=0.0))
    for _ in range(3):
        recv_x = None
        recv_x = run("dispatch", "default", right.arguments("dispatch", ctx.rank, group.group_name))[0]
    assert any(first <= recv_x.data_ptr() < end for first, end in window_mappings())
    assert recv_x.nbytes < reserved() - empty < 1.25 * recv_x.nbytes
    check_ops(LARGE, ctx.rank, group.group_name, "default")
    deep_ep.destroy(group)


@pytest.mark.slow
def test_windows_grow_as_needed(pool: RankPool) -> None:
    pool.run(3, grow_as_needed)


@leaves_nothing
def larger_than_the_window(ctx: RankContext) -> None:
    case = Case((6000, 10), H=1024, K=1, local_experts=1, absent=0.0)
    group = ctx.group
    deep_ep.init(group, num_bytes=SMALL)
    check_ops(case, ctx.rank, group.group_name, "default")
    deep_ep.destroy(group)


@pytest.mark.slow
def test_messages_larger_than_the_window(pool: RankPool) -> None:
    """In the one direction far larger, in the other one not."""
    pool.run(2, larger_than_the_window)


def resources() -> tuple[int, int, int]:
    """Mappings of windows, descriptors, and private memory in MiB."""
    gc.collect()
    with open("/proc/self/status") as status:
        (anonymous,) = (int(line.split()[1]) >> 10 for line in status if line.startswith("RssAnon"))
    return len(window_mappings()), len(os.listdir("/proc/self/fd")), anonymous


@leaves_nothing
def many_calls(ctx: RankContext, count: int) -> list[tuple[int, int, int]]:
    """Resources after a few calls and after many, of random sizes, forward and backward."""
    group = ctx.group
    deep_ep.init(group, num_bytes=SMALL)
    shared, own = random.Random(0), torch.Generator().manual_seed(ctx.rank)
    used = []
    for i in range(count):
        tokens = [shared.choice((0, 1, shared.randrange(64), shared.randrange(1024))) for _ in range(ctx.size)]
        H, K = shared.randrange(1, 256), shared.randrange(1, 5)
        x = torch.randn(tokens[ctx.rank], H, generator=own).requires_grad_()
        ids = torch.randint(-1, 2 * ctx.size, (tokens[ctx.rank], K), generator=own)
        received = deep_ep.dispatch(x, ids, num_experts=2 * ctx.size, group=group, num_worst_tokens=i % 3 * 100)
        out = deep_ep.combine(received.recv_x, received.handle, group=group)
        out.sum().backward()
        if i in (count // 4, count - 1):
            del x, ids, received, out
            used.append(resources())
    deep_ep.destroy(group)
    return used


@pytest.mark.slow
def test_many_calls_take_no_more_than_few(pool: RankPool) -> None:
    for (maps, descriptors, memory), after in pool.run(3, many_calls, 300):
        assert after[:2] == (maps, descriptors)
        assert after[2] < memory + 16
