"""What a rank is to the operating system: a process that may fork, that other processes of its user can look into.

T local tokens, H hidden, K top-k, E experts, R ranks.
"""

import atexit
import contextlib
import fcntl
import gc
import json
import mmap
import os
import re
import stat
import subprocess
import sys
import traceback
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
from cases import Case, assert_same
from op_calls import calls, check_ops, error_of, run
from ranks import STRATEGIES, RankContext, RankPool, raise_failures, spawn_ranks

import deep_ep
from deep_ep import groups, windows
from deep_ep._library import library

SMALL = 1 << 20  # bytes, the smallest window
CASES = {R: Case((5, 0, 7, 3)[:R], seed=R) for R in (1, 2, 3, 4)}


def in_child(body: Callable[[], Any]) -> Any:
    """What body() returns in a child of this process, which then ends as Python programs end; it has to be JSON."""
    receiver, sender = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(sender, json.dumps(body()).encode())
            gc.collect()
            atexit._run_exitfuncs()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.close(sender)
    with open(receiver) as answer:
        text = answer.read()
    _, status = os.waitpid(child, 0)
    assert status == 0
    return json.loads(text)


def fork_and_go_on(ctx: RankContext, strategy: str, leave: str) -> list[str]:
    """Rank 0 forks, and the child leaves the group. What ops say in the child."""
    group, right = ctx.group, calls(CASES[ctx.size])
    deep_ep.init(group, strategy=strategy, num_bytes=SMALL)
    arguments = right.arguments("dispatch", ctx.rank, group.group_name)
    public = (arguments["x"], arguments["topk_idx"], arguments["topk_weights"])
    held = [deep_ep.dispatch(*public, num_experts=right.case.E, group=group)]
    buffer = deep_ep.Buffer(group)
    x, ids, weights = public
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(ids, right.case.E)
    normal = (x, None, per_rank, None, in_rank, per_expert, ids, weights)

    def child() -> list[str]:
        held.clear()
        errors = [error_of(deep_ep.dispatch, *public, num_experts=right.case.E, group=group)]
        errors.append(error_of(deep_ep.init, group))
        if strategy == "default":
            errors.append(error_of(buffer.dispatch, *normal))
            errors.append(error_of(run, "dispatch", strategy, arguments))
        if leave == "destroys":
            deep_ep.destroy(group)
        return [f"{kind}: {message}" for kind, message in errors]

    told = in_child(child) if ctx.rank == 0 else []
    assert strategy != "default" or groups._parts[group.group_name]["cpu"].usable
    assert_same("recv_x", held[0].recv_x, right.result("dispatch", ctx.rank)[0])
    check_ops(right.case, ctx.rank, group.group_name, strategy)
    deep_ep.destroy(group)
    return told


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("leave", ["destroys", "exits"])
def test_forked_child_has_no_part_in_the_group(pool: RankPool, strategy: str, leave: str) -> None:
    told, _ = pool.run(2, fork_and_go_on, strategy, leave)
    assert len(told) == (4 if strategy == "default" else 2)
    for error in told:
        assert error.startswith("RuntimeError: deep_ep") and "this process was forked from a rank" in error, told


LEAVES_A_CALL = """
import threading, time
import torch, torch.distributed as dist
import deep_ep

class Slow:
    def __del__(self):
        dropped.set()
        time.sleep(0.2)

dropped = threading.Event()
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
deep_ep.init(strategy="{strategy}")
x = torch.ones(1 << 12, 1 << 11)  # so much that the call goes on when nobody else has x any more
x.slow = Slow()
started = deep_ep.dispatch_start(x, torch.zeros(1 << 12, 1, dtype=torch.int64), num_experts=2)
del x, started
dropped.wait()
"""


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_exits_while_a_call_lets_go_of_its_inputs(strategy: str) -> None:
    """CPython before 3.14 ends threads that ask for its lock then; through C++ that is std::terminate."""
    command = [sys.executable, "-c", LEAVES_A_CALL.format(strategy=strategy)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


def pass_on(ctx: RankContext) -> tuple[int, int]:
    """Prepares the group. Process and descriptor of the window."""
    deep_ep.init(ctx.group, num_bytes=SMALL)
    return os.getpid(), library.deep_ep_group_fd(groups._parts[ctx.group.group_name]["cpu"]._handle)


def still_works(ctx: RankContext) -> None:
    check_ops(CASES[ctx.size], ctx.rank, ctx.group.group_name, "default")
    deep_ep.destroy(ctx.group)


def test_nobody_else_can_spoil_a_window(pool: RankPool) -> None:
    for pid, fd in pool.run(2, pass_on):
        path = f"/proc/{pid}/fd/{fd}"
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
        for size in (0, os.stat(path).st_size + mmap.PAGESIZE):
            with pytest.raises(PermissionError):
                os.truncate(path, size)
        with open(path, "r+b") as window, pytest.raises(PermissionError):
            fcntl.fcntl(window, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    pool.run(2, still_works)


def with_another_file(ctx: RankContext, how: str) -> tuple[str, str]:
    """Rank 0 says that its window is a descriptor of something else."""
    with open("/dev/zero", "r+b") if how == "device" else open(os.memfd_create("short"), "r+b") as file:
        passed = mock.patch.object(windows.library, "deep_ep_group_fd", lambda handle: file.fileno())
        with passed if ctx.rank == 0 else contextlib.nullcontext():
            return error_of(deep_ep.init, ctx.group, num_bytes=SMALL)


@pytest.mark.parametrize("how", ["device", "file"])
def test_what_is_no_window_is_not_mapped(pool: RankPool, how: str) -> None:
    for kind, message in pool.run(2, with_another_file, how):
        assert kind == "RuntimeError"
        assert re.search(r"rank 1: the descriptor \d+ of process \d+ is not the window", message), message


NOBODY = 65534


def as_others(ctx: RankContext, ranks: list[int]) -> tuple[str, str]:
    """These ranks become another user."""
    if ctx.rank in ranks:
        os.setresuid(NOBODY, NOBODY, NOBODY)
    return error_of(deep_ep.init, ctx.group, num_bytes=SMALL)


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize(
    "ranks, says",
    [
        ([1], rf"spans several users \(rank 0: 0, rank 1: {NOBODY}\)"),
        ([0, 1], rf"process \d+: Permission denied; it has changed its user .* {NOBODY}; start it"),
    ],
)
def test_ranks_of_other_users(ranks: list[int], says: str) -> None:
    with spawn_ranks(2, as_others, ranks) as started:
        outcomes = started.outcomes()
    raise_failures(outcomes)
    for outcome in outcomes:
        assert outcome.value[0] == "RuntimeError"
        assert re.search(says, outcome.value[1]), outcome.value[1]
