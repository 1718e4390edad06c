"""Groups: what is the caller's stays the caller's, a group is prepared once, and who goes is heard of by name.

T local tokens, H hidden, K top-k, E experts, R ranks.
"""

import atexit
import contextlib
import gc
import os
import re
import signal
import sys
import threading
import time
import weakref
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from cases import Case
from op_calls import OPS, calls, check_ops, error_of, run
from patience import own_time
from ranks import RankContext, RankDied, RankPool, raise_failures, spawn_ranks
from test_liveness import short
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

import deep_ep
from deep_ep import communicator, groups
from deep_ep.kernels.started import finish

CASES = {R: Case((5, 0, 7, 3)[:R], seed=R) for R in (1, 2, 3, 4)}


def started(op: str, strategy: str, arguments: dict[str, Any]) -> torch.Tensor:
    return run(f"{op}_start", strategy, arguments)


def threads_and_descriptors() -> tuple[int, int]:
    gc.collect()
    return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))


def comes_down_to(threads_and_descriptors_before: tuple[int, int]) -> bool:
    """Threads end behind the call that ends them."""
    deadline = time.process_time() + 20
    while (now := threads_and_descriptors()) != threads_and_descriptors_before and time.process_time() < deadline:
        os.sched_yield()
    return now == threads_and_descriptors_before


# Other people's collectives


def with_other_traffic(ctx: RankContext) -> None:
    """Collectives of the caller on the same group, between start and wait, in another order than the calls on some
    ranks: before the start on rank 0, behind it on the others, and with DDP in between.
    """
    group, right = ctx.prepared_group("alltoall"), calls(CASES[ctx.size])
    arguments = {op: right.arguments(op, ctx.rank, group.group_name) for op in OPS}
    for op in OPS:
        total = torch.full((3,), float(ctx.rank))
        work = dist.all_reduce(total, group=group, async_op=True) if ctx.rank == 0 else None
        ticket = started(op, "alltoall", arguments[op])
        if work is None:
            work = dist.all_reduce(total, group=group, async_op=True)
        work.wait()
        dist.barrier(group)
        right.check(op, ctx.rank, finish(op, ticket))
        assert total.tolist() == [sum(range(ctx.size))] * 3
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 1, bias=False), process_group=group)
    ticket = started("dispatch", "alltoall", arguments["dispatch"])
    model(torch.full((1, 2), float(ctx.rank))).sum().backward()
    right.check("dispatch", ctx.rank, finish("dispatch", ticket))
    assert model.module.weight.grad.tolist() == [[(ctx.size - 1) / 2] * 2]


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_collectives_of_the_caller_between_start_and_wait(pool: RankPool, size: int) -> None:
    pool.run(size, with_other_traffic)


def prepared_while_a_call_goes_on(ctx: RankContext, strategy: str) -> None:
    """init, Buffer and destroy on rank 0, behind a call that the others start only once rank 0 is in them."""
    group, right = ctx.group, calls(CASES[ctx.size])
    arguments = right.arguments("dispatch", ctx.rank, group.group_name)
    deep_ep.init(group, strategy=strategy, num_bytes=1 << 20)
    prepares = lambda: deep_ep.init(group), lambda: deep_ep.Buffer(group), lambda: deep_ep.destroy(group)
    for i, prepare in enumerate(prepares):
        key = f"{strategy} {i} {os.getppid()}"
        if ctx.rank:
            ctx.store.wait([key])
        ticket = started("dispatch", strategy, arguments)
        if ctx.rank == 0:
            ctx.store.set(key, "")
        prepare()
        op = getattr(torch.ops.deep_ep.wait, strategy)
        results = op(ticket, "dispatch", list(arguments.values())[:3], right.case.E, ctx.size, 0, group.group_name)
        right.check("dispatch", ctx.rank, results)


@pytest.mark.parametrize("strategy", ["default", "alltoall"])
def test_init_buffer_and_destroy_wait_for_calls_that_go_on(pool: RankPool, strategy: str) -> None:
    pool.run(2, prepared_while_a_call_goes_on, strategy)


def leaves_no_trace(ctx: RankContext) -> None:
    before = None
    for _ in range(4):
        deep_ep.init(ctx.group, strategy="alltoall")
        check_ops(CASES[ctx.size], ctx.rank, ctx.group.group_name, "alltoall")
        finish(
            "dispatch",
            started(
                "dispatch", "alltoall", calls(CASES[ctx.size]).arguments("dispatch", ctx.rank, ctx.group.group_name)
            ),
        )
        world = dist.get_world_size(), len(dist.distributed_c10d._world.pg_names)
        deep_ep.destroy(ctx.group)
        assert world == (dist.get_world_size(), len(dist.distributed_c10d._world.pg_names))
        if before is None:
            before = threads_and_descriptors()
        assert comes_down_to(before)


@pytest.mark.slow
def test_a_communicator_goes_with_destroy(pool: RankPool) -> None:
    pool.run(3, leaves_no_trace)


# A rank goes


def meet(ctx: RankContext, **choice: Any) -> str:
    """A group under alltoall, whose name is returned, once all ranks have used it."""
    ctx.init_process_group()
    deep_ep.init(ctx.group, strategy="alltoall", **choice)
    check_ops(CASES[ctx.size], ctx.rank, ctx.group.group_name, "alltoall")
    return ctx.group.group_name


def wait_for_ever(ctx: RankContext, phase: str, how: str, victim: int) -> tuple[float, str, str, tuple[int, int]]:
    """All but the victim wait for it in `phase`. When, what the wait raises, what the next call raises, and threads and
    descriptors that are left over."""
    name = meet(ctx)
    before = threads_and_descriptors()
    arguments = calls(CASES[ctx.size]).arguments("dispatch", ctx.rank, name)
    dist.barrier()
    if ctx.rank == victim:
        # The others have begun: what they post at the store tells it.
        ctx.store.wait([f"waits {rank}" for rank in range(ctx.size) if rank != victim])
        if phase == "counts":
            gather = communicator.Communicator.all_gather

            def all_gather(self: communicator.Communicator, op: str, what: str, row: torch.Tensor) -> torch.Tensor:
                return leave(ctx, how) if what == "counts" else gather(self, op, what, row)

            communicator.Communicator.all_gather = all_gather
            run("dispatch", "alltoall", arguments)
        elif phase == "tokens":
            exchange = communicator.Communicator.all_to_all

            def all_to_all(self: communicator.Communicator, op: str, what: str, *rest: Any) -> None:
                leave(ctx, how) if what == "tokens" else exchange(self, op, what, *rest)

            communicator.Communicator.all_to_all = all_to_all
            run("dispatch", "alltoall", arguments)
        leave(ctx, how)
        return 0.0, "", "", (0, 0)
    ctx.store.set(f"waits {ctx.rank}", "")
    if phase == "started":
        ticket = started("dispatch", "alltoall", arguments)
        (_, message), at = own_time(lambda: error_of(finish, "dispatch", ticket))
    else:
        (_, message), at = own_time(lambda: error_of(run, "dispatch", "alltoall", arguments))
    _, again = error_of(run, "combine", "alltoall", calls(CASES[ctx.size]).arguments("combine", ctx.rank, name))
    deadline = time.process_time() + 20
    while (after := threads_and_descriptors())[0] >= before[0] and time.process_time() < deadline:
        os.sched_yield()
    group, ctx.group = weakref.ref(ctx.group), None
    ctx._groups.clear()
    dist.destroy_process_group()
    gc.collect()
    assert group() is None
    return at, message, again, (after[0] - before[0], after[1] - before[1])


def leave(ctx: RankContext, how: str) -> Any:
    ctx.store.set("gone at", str(time.monotonic()))
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "exits":
        os._exit(0)
    elif how == "destroys":
        deep_ep.destroy(ctx.group)


SAYS = {
    "killed": r"rank {0} \(process \d+\) has died",
    "exits": r"rank {0} \(process \d+\) has died",
    "destroys": r"rank {0} has left the group",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "phase, how, victim",
    [
        ("headers", "killed", 0),
        ("headers", "destroys", 2),
        ("counts", "killed", 2),
        ("started", "killed", 1),
        pytest.param("tokens", "killed", 1, marks=pytest.mark.slow),
        pytest.param("headers", "exits", 1, marks=pytest.mark.slow),
        pytest.param("started", "destroys", 0, marks=pytest.mark.slow),
    ],
)
def test_who_goes_is_named(phase: str, how: str, victim: int) -> None:
    with spawn_ranks(3, wait_for_ever, phase, how, victim, init=False) as ranks:
        outcomes = ranks.outcomes()
        gone_at = float(ranks.store.get("gone at"))
    survivors = [outcome for rank, outcome in enumerate(outcomes) if rank != victim]
    raise_failures(survivors)
    if how != "destroys":
        assert isinstance(outcomes[victim].exception, RankDied)
    for outcome in survivors:
        at, message, again, (threads, descriptors) = outcome.value
        assert at - gone_at < 5.0
        assert message.startswith("deep_ep.dispatch: rank ")
        assert re.search(SAYS[how].format(victim), message), message
        assert re.search(SAYS[how].format(victim), again), again
        assert "was given up" in again
        assert threads < 0 and descriptors <= 0


def is_waiting(where: str) -> bool:
    """Whether the main thread is in that wait."""
    frame = sys._current_frames()[threading.main_thread().ident]
    wanted = {"init": "meeting.py", "wait": "_base.py", "destroy": "queue.py"}.get(where, "communicator.py")
    while frame is not None:
        if os.path.basename(frame.f_code.co_filename) == wanted and frame.f_code.co_name in ("_wait", "result", "join"):
            return True
        frame = frame.f_back
    return False


def interrupted(ctx: RankContext, where: str) -> tuple[float, str]:
    """Rank 0 is interrupted in a wait for rank 1, which hears of it when it comes."""
    name = meet(ctx)
    arguments = calls(CASES[ctx.size]).arguments("dispatch", ctx.rank, name)
    if where == "compiled":
        compiled = torch.compile(torch.ops.deep_ep.dispatch.alltoall, backend="aot_eager", fullgraph=True)
        compiled(**arguments)
    ticket = started("dispatch", "alltoall", arguments) if where == "wait" and ctx.rank == 0 else None
    if ctx.rank:
        ctx.store.wait(["interrupted"])
        if where == "init":
            _, message = error_of(deep_ep.init, ctx.group, num_bytes=1 << 20, strategy="alltoall")
        else:
            _, message = error_of(run, "dispatch", "alltoall", arguments)
        ctx.store.set("heard", "")
        return 0.0, message
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sent: list[float] = []

    def send() -> None:
        while not is_waiting(where):
            os.sched_yield()
        sent.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=send).start()

    def wait() -> None:
        with pytest.raises(KeyboardInterrupt):
            if where == "init":
                deep_ep.init(ctx.group)
            elif where == "destroy":
                started("dispatch", "alltoall", arguments)
                deep_ep.destroy(ctx.group)
            elif where == "compiled":
                compiled(**arguments)
            elif ticket is not None:
                finish("dispatch", ticket)
            else:
                run("dispatch", "alltoall", arguments)

    _, at = own_time(wait)
    took = at - sent[0]
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctx.store.set("interrupted", "")
    ctx.store.wait(["heard"])
    return took, ""


@pytest.mark.slow
@pytest.mark.parametrize(
    "where", ["op", "wait", "init", *(pytest.param(w, marks=pytest.mark.slow) for w in ("compiled", "destroy"))]
)
def test_interrupts_end_a_wait_and_peers_hear_of_it(where: str) -> None:
    with spawn_ranks(2, interrupted, where, init=False) as ranks:
        outcomes = ranks.outcomes()
    raise_failures(outcomes)
    took, _ = outcomes[0].value
    assert took < 1.0
    assert "rank 0 was interrupted" in outcomes[1].value[1], outcomes[1].value[1]


def late(ctx: RankContext, op: str, timeout: timedelta) -> tuple[str, str]:
    """Rank 2 comes after the others have given up, and then all make the group anew."""
    deep_ep.init(ctx.group, strategy="alltoall", timeout=timeout)
    name = ctx.group.group_name
    check_ops(CASES[ctx.size], ctx.rank, name, "alltoall")
    if ctx.rank == 2:
        dist.barrier(ctx.group)
    arguments = calls(CASES[ctx.size]).arguments(op, ctx.rank, name)
    errors = error_of(run, op, "alltoall", arguments)[1], error_of(run, op, "alltoall", arguments)[1]
    if ctx.rank != 2:
        dist.barrier(ctx.group)
    deep_ep.init(ctx.group, timeout=timedelta(minutes=5))
    check_ops(CASES[ctx.size], ctx.rank, name, "alltoall")
    deep_ep.destroy(ctx.group)
    return errors


def test_a_rank_that_does_not_come_is_named_after_the_timeout_of_init(pool: RankPool) -> None:
    results = pool.run(3, late, "combine", short())
    for first, again in results:
        assert first.startswith("deep_ep.combine: ")
        assert re.search(r"waited \d+ s for rank 2 \(process \d+\)", first), first
        assert "was given up" in again, again
    assert any(first.startswith(f"deep_ep.combine: rank {r} waits for headers") for r, (first, _) in enumerate(results))


def fails_alone(ctx: RankContext, part: str) -> list[str]:
    """Something breaks on rank 1 only: in the middle of an op, and before it."""
    deep_ep.init(ctx.group, strategy="alltoall")
    name, case = ctx.group.group_name, CASES[ctx.size]
    arguments = calls(case).arguments("dispatch", ctx.rank, name)
    if part == "before":
        from deep_ep import checks
        from deep_ep.kernels import alltoall

        right = checks.dispatch
        if ctx.rank == 1:
            alltoall.checks.dispatch = lambda *_: {}["nothing"]
        message = error_of(run, "dispatch", "alltoall", arguments)[1]
        checks.dispatch = right
        check_ops(case, ctx.rank, name, "alltoall")
    else:
        if ctx.rank == 1:
            arguments["x"] = torch.empty_like(arguments["x"])
            right_of = communicator.Communicator.all_to_all

            def fail(*_: Any) -> None:
                raise MemoryError("no memory")

            communicator.Communicator.all_to_all = fail
        message = error_of(run, "dispatch", "alltoall", arguments)[1]
        if ctx.rank == 1:
            communicator.Communicator.all_to_all = right_of
    deep_ep.init(ctx.group)
    check_ops(case, ctx.rank, name, "alltoall")
    deep_ep.destroy(ctx.group)
    return [message]


@pytest.mark.parametrize("part", ["before", "middle"])
def test_what_fails_on_one_rank_is_heard_on_all(pool: RankPool, part: str) -> None:
    for rank, (message,) in enumerate(pool.run(3, fails_alone, part)):
        if part == "before":
            assert message == "deep_ep.dispatch: rank 1: 'nothing'"
        elif rank != 1:
            assert "rank 1 gave up: no memory" in message


# A group is prepared once


def choose(ctx: RankContext) -> None:
    group, rank = ctx.group, ctx.rank
    case = CASES[ctx.size]
    buffer = deep_ep.Buffer(group, normal_strategy="alltoall", low_latency_strategy="alltoall")
    assert deep_ep.groups.info_of(group).normal.value == "alltoall"  # nobody has chosen
    info = deep_ep.init(group, strategy="default", num_bytes=1 << 20)
    other = deep_ep.Buffer(group, normal_strategy="alltoall")
    assert (buffer.normal_strategy.get_name(), other.normal_strategy.get_name()) == ("alltoall", "alltoall")
    assert deep_ep.groups.info_of(group) is info and info.normal.value == "default"
    assert deep_ep.init(group) == info == deep_ep.init(group, strategy="default")
    for ask in (0, 1, 2):
        # On one rank only, or on all.
        wish = {"strategy": "alltoall"} if ask in (rank, 2) else {}
        kind, message = error_of(deep_ep.init, group, **wish)
        assert kind == "RuntimeError"
        assert "has been prepared with the strategy default" in message
        assert f"rank {ask % 2} asks for alltoall" in message or ask == 2
    assert deep_ep.groups.info_of(group) is info
    check_ops(case, rank, group.group_name, "default")
    check_ops(case, rank, group.group_name, "alltoall")
    deep_ep.destroy(group)
    assert deep_ep.init(group, strategy="alltoall").normal.value == "alltoall"
    deep_ep.destroy(group)


def test_a_group_is_prepared_once(pool: RankPool) -> None:
    pool.run(2, choose)


# How a group is given


def every_form(ctx: RankContext) -> dict[str, tuple[str, str]]:
    """Works with a mesh and with names; what each says of what is no group of this rank."""
    ctx.init_process_group()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
    ep, others = mesh["ep"], dist.new_group([0, 1])
    x, ids = torch.full((2, 4), 1.0 + ctx.rank), torch.tensor([[0], [1]])
    layout = None
    for strategy in ("default", "alltoall"):
        deep_ep.init(ep, strategy=strategy, num_bytes=1 << 20)
        peers = [1.0 + ctx.rank // 2 * 2 + r for r in (0, 1)]
        want = torch.tensor(peers).repeat_interleave(1).unsqueeze(1).expand(2, 4)
        for group in (ep, ep.get_group(), ep.get_group().group_name):
            out = deep_ep.dispatch(x, ids, num_experts=2, group=group)
            assert out.recv_x.tolist() == want.tolist()
            assert deep_ep.combine(out.recv_x, out.handle, group=group).tolist() == x.tolist()
            buffer = deep_ep.Buffer(group, num_nvl_bytes=1 << 20, rows="rank")
            layout = buffer.get_dispatch_layout(ids, 2)
            assert buffer.group is ep.get_group() and buffer.group_size == 2
            per_rank = deep_ep.get_dispatch_layout(ids, num_experts=2, group=group)[0]
            assert layout[0].tolist() == per_rank.tolist() == [1, 1]
            low = deep_ep.low_latency_dispatch(x, ids, 2, 2, group=group)
            assert int(low.recv_count.sum()) == 2
        if strategy == "default":
            assert deep_ep.groups.op_log(ep)[1] == deep_ep.groups.op_log(ep.get_group())[1] > 0
            assert "dispatch" in deep_ep.groups.phases(ep)
        deep_ep.destroy(ep)
    errors = {}
    wrong = {"mesh": mesh, "number": 3}
    if ctx.rank > 1:
        wrong |= {"others": others, "other mesh": DeviceMesh("cpu", [0, 1])}
    else:
        DeviceMesh("cpu", [0, 1])
    for name, group in wrong.items():
        calls_of = {
            "init": lambda group=group: deep_ep.init(group),
            "destroy": lambda group=group: deep_ep.destroy(group),
            "Buffer": lambda group=group: deep_ep.Buffer(group),
            "dispatch": lambda group=group: deep_ep.dispatch(x, ids, num_experts=2, group=group),
            "op_log": lambda group=group: deep_ep.groups.op_log(group),
            "phases": lambda group=group: deep_ep.groups.phases(group),
        }
        errors |= {f"{name} {call}": error_of(function) for call, function in calls_of.items()}
    return errors


@pytest.mark.slow
def test_meshes_and_names_are_groups_and_the_rest_gets_a_sentence() -> None:
    says = {
        "mesh": r"one of 2: \('dp', 'ep'\); slice it, as in mesh\[\"ep\"\]",
        "number": "a DeviceMesh of one dimension, a name or None, got 3",
        "others": "group must be one that this rank is in",
        "other mesh": r"group must be one that this rank is in, got a mesh of the ranks \[0, 1\]",
    }
    with spawn_ranks(4, every_form, init=False) as ranks:
        outcomes = ranks.outcomes()
    raise_failures(outcomes)
    for rank, outcome in enumerate(outcomes):
        assert len(outcome.value) == (24 if rank > 1 else 12)
        for name, (kind, message) in outcome.value.items():
            assert kind == "ValueError", (name, message)
            assert re.search(says[name.rpartition(" ")[0]], message), (name, message)


def gone(ctx: RankContext, form: str, strategy: str, backend: str) -> dict[str, tuple[str, str, str]]:
    """What compiled code says, and with which type's text, when its group is no more."""
    x, ids, weights = torch.ones(2, 4), torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1)
    messages = {}
    for end in ("destroyed", "without a default group", "another of the name"):
        torch._dynamo.reset()
        ctx.init_process_group()
        world, name = ctx.group, ctx.group.group_name
        deep_ep.init(strategy=strategy, num_bytes=1 << 20)
        group = {"group": world, "name": name}.get(form)
        buffer = deep_ep.Buffer(world, num_nvl_bytes=1 << 20, normal_strategy=strategy) if form == "buffer" else None
        layout = buffer.get_dispatch_layout(ids, 2) if buffer else ()

        def layer(x: torch.Tensor) -> torch.Tensor:
            if form == "op":
                op = getattr(torch.ops.deep_ep.dispatch, strategy)
                return 2 * op(x, ids, weights, 2, 2, 0, name)[0]  # noqa: B023
            if form == "buffer":
                per_rank, _, per_expert, in_rank, _ = layout  # noqa: B023
                given = {"num_tokens_per_rank": per_rank, "is_token_in_rank": in_rank}
                return buffer.dispatch(  # noqa: B023
                    x, topk_idx=ids, topk_weights=weights, num_tokens_per_expert=per_expert, **given
                )[0]
            return 2 * deep_ep.dispatch(x, ids, num_experts=2, group=group).recv_x  # noqa: B023

        compiled = torch.compile(layer, backend=backend, fullgraph=True)
        assert compiled(x).shape[0] == (4 if ctx.rank == 0 else 0)
        dist.barrier()
        if end == "destroyed":
            deep_ep.destroy()
        else:
            dist.destroy_process_group()
        if end == "another of the name":
            ctx.init_process_group()
        try:
            compiled(x)
            messages[end] = "", "", ""
        except Exception as error:
            messages[end] = type(error).__name__, str(isinstance(error, RuntimeError)), str(error)
        if dist.is_initialized():
            dist.destroy_process_group()
    return messages


@pytest.mark.slow
@pytest.mark.parametrize(
    "form, strategy, backend",
    [
        ("default", "default", "aot_eager"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("op", "alltoall", "aot_eager"),
                ("group", "alltoall", "aot_eager"),
                ("name", "default", "aot_eager"),
                ("buffer", "default", "aot_eager"),
                ("op", "default", "aot_eager"),
                ("group", "default", "inductor"),
            )
        ),
    ],
)
def test_a_compiled_graph_says_that_its_group_is_gone(form: str, strategy: str, backend: str) -> None:
    with spawn_ranks(2, gone, form, strategy, backend, init=False) as ranks:
        outcomes = ranks.outcomes()
    raise_failures(outcomes)
    for outcome in outcomes:
        for end, (_, is_runtime_error, message) in outcome.value.items():
            assert is_runtime_error == "True", (end, message)
            says = "or gone|is gone|there are no windows for the group|there is no default group"
            assert re.search(says, message.splitlines()[0]), (end, message)


# What else there is


def forked(ctx: RankContext) -> tuple[int, str]:
    """A child that ends as processes do leaves the connections of its parent alone."""
    name = meet(ctx)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        _, message = error_of(run, "dispatch", "alltoall", calls(CASES[2]).arguments("dispatch", ctx.rank, name))
        os.write(writer, message.encode())
        deep_ep.destroy(ctx.group)
        gc.collect()
        atexit._run_exitfuncs()
        os._exit(0)
    os.close(writer)
    message = os.read(reader, 1 << 16).decode()
    _, status = os.waitpid(child, 0)
    check_ops(CASES[ctx.size], ctx.rank, name, "alltoall")
    return status, message


@pytest.mark.slow
def test_a_forked_child_is_not_in_the_group() -> None:
    with spawn_ranks(2, forked, init=False) as ranks:
        outcomes = ranks.outcomes()
    raise_failures(outcomes)
    for outcome in outcomes:
        status, message = outcome.value
        assert status == 0
        assert "was forked" in message


def in_store(ctx: RankContext, kind: str, path: str) -> None:
    if kind == "fake":
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    else:
        store = dist.FileStore(path, ctx.size) if kind == "file" else dist.HashStore()
        dist.init_process_group("gloo", store=store, rank=ctx.rank, world_size=ctx.size)
    for _ in range(2):
        deep_ep.init(strategy="alltoall")
        if kind == "fake":
            ids = torch.zeros(2, 1, dtype=torch.int64)
            assert deep_ep.dispatch(torch.ones(2, 4), ids, num_experts=4).recv_x.shape[0] == 8
        else:
            check_ops(CASES[ctx.size], ctx.rank, dist.group.WORLD.group_name, "alltoall")
        deep_ep.destroy()


@pytest.mark.slow
@pytest.mark.parametrize("kind, size", [("file", 2), ("hash", 1), ("fake", 1)])
def test_any_store_will_do(kind: str, size: int, tmp_path: Path) -> None:
    with spawn_ranks(size, in_store, kind, str(tmp_path / "store"), init=False) as ranks:
        raise_failures(ranks.outcomes())


def comes_late(ctx: RankContext, how: str, timeout: timedelta) -> tuple[float, str]:
    """Rank 1 is not in init when rank 0 is: it never comes, or dies."""
    ctx.init_process_group()
    dist.barrier()
    if ctx.rank == 1:
        if how == "killed":
            ctx.store.set("gone at", str(time.monotonic()))
            os.kill(os.getpid(), signal.SIGKILL)
        ctx.store.wait(["gave up"])
        return 0.0, error_of(deep_ep.init, ctx.group, strategy="alltoall")[1]
    with mock.patch.object(groups, "group_timeout", lambda _: timeout) if how == "late" else contextlib.nullcontext():
        (_, message), at = own_time(lambda: error_of(deep_ep.init, ctx.group, strategy="alltoall"))
    ctx.store.set("gave up", "")
    return at, message


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "late"])
def test_who_does_not_come_to_init_is_named(how: str) -> None:
    with spawn_ranks(2, comes_late, how, timedelta(seconds=1), init=False) as ranks:
        outcomes = ranks.outcomes()
        gone_at = float(ranks.store.get("gone at")) if how == "killed" else 0.0
    raise_failures(outcomes[:1] if how == "killed" else outcomes)
    at, message = outcomes[0].value
    assert message.startswith("deep_ep.init: rank 0 wait")
    if how == "killed":
        assert at - gone_at < 5.0
        assert "rank 1 has died" in message
    else:
        assert re.search(r"waited \d+ s for rank 1 of the group", message), message
        assert "rank 0 gave up: " in outcomes[1].value[1]
