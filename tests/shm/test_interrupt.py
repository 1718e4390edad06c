"""Ctrl-C: whatever a rank waits in, it gets KeyboardInterrupt, and its peers hear that it has left, by its number.

A rank knows that another one is in an op from `Entries` (test_liveness.py), and sends the signal then. T local tokens,
H hidden, K top-k, E experts, R ranks.
"""

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import Case
from op_calls import calls, check_ops
from patience import own_time
from ranks import RankContext, RankPool
from test_liveness import Entries

import deep_ep

SMALL = 1 << 20  # bytes, the smallest window
CASE = Case((5, 7, 0), seed=3)


class Late(Exception):
    """What the program's own handler raises."""


def ended(call: Callable[[], object]) -> tuple[str, str, float]:
    """Type and message of what the call raised, and when, in `own_time`."""

    def end() -> tuple[str, str]:
        try:
            call()
        except BaseException as error:
            return type(error).__name__, str(error)
        return "", ""

    error, at = own_time(end)
    return *error, at


def dispatch(group: str, rank: int) -> Callable[[], object]:
    arguments = calls(CASE).arguments("dispatch", rank, group)
    return lambda: torch.ops.deep_ep.dispatch.default(**arguments)


def with_gradients(group: str, rank: int, compiler: str = "") -> tuple[Callable[..., object], tuple[Any, ...]]:
    arguments = calls(CASE).arguments("dispatch", rank, group)

    def step(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        received = deep_ep.dispatch(x, ids, weights, num_experts=CASE.E, num_worst_tokens=64, group=group)
        return deep_ep.combine(received.recv_x * 2, received.handle, group=group).sum()

    step = torch.compile(step, backend=compiler, fullgraph=True) if compiler else step
    return step, (arguments["x"].clone().requires_grad_(), arguments["topk_idx"], arguments["topk_weights"])


def the_wait(how: str, group: str, rank: int) -> Callable[[], object]:
    """What rank 0 is interrupted in: a call that ends when rank 1 makes it too."""
    if how == "dispatch":
        return dispatch(group, rank)
    if how == "low latency":
        buffer = deep_ep.Buffer(deep_ep.groups.process_group(group), low_latency_mode=True)
        arguments = calls(CASE).arguments("dispatch", rank, group)
        return lambda: buffer.low_latency_dispatch(arguments["x"], arguments["topk_idx"], 8, CASE.E, use_fp8=False)
    if how == "agree":
        return lambda: deep_ep.windows.agree("fused_deep_moe", group, None, torch.float32, (1, 1, CASE.E, 1, 0))
    if how == "started":
        arguments = calls(CASE).arguments("dispatch", rank, group)
        given, sizes = (arguments["x"], arguments["topk_idx"]), {"num_experts": CASE.E, "group": group}

        def in_two_steps() -> None:
            _, last = (deep_ep.dispatch_start(*given, **sizes) for _ in range(2))
            deep_ep.wait(last)

        return in_two_steps
    step, inputs = with_gradients(group, rank, "" if how == "backward" else how)
    if how == "backward":
        return step(*inputs).backward
    step(*inputs).backward()
    return lambda: step(*inputs)


def tell_when_waiting(ctx: RankContext) -> None:
    """A call that was started has begun before the program waits for it: says when it does."""
    main, looks = threading.main_thread().ident, 0
    while looks < 3:
        time.sleep(0.02)
        stack = traceback.extract_stack(sys._current_frames()[main])
        waits = stack[-1].filename.endswith("torch/_ops.py") and any(
            frame.filename.endswith("ops/wait.py") and frame.name == "_call" for frame in stack
        )
        looks = looks + 1 if waits else 0
    ctx.store.set("waits", "")


def interrupted(ctx: RankContext, how: str) -> tuple[str, str, float]:
    """Ranks 0 and 1 wait for rank 2, which interrupts rank 0 and makes the call when that one has left.

    Type and message of what a rank raised, and the seconds from the signal until then.
    """
    group, last = ctx.group, ctx.size - 1
    deep_ep.init(group, num_bytes=SMALL)
    wait = the_wait(how, group.group_name, ctx.rank)

    def raise_late(signum: int, frame: object) -> None:
        raise Late("of the program")

    if ctx.rank < last:
        if ctx.rank == 0:
            signal.signal(signal.SIGINT, raise_late if how == "agree" else signal.default_int_handler)
            ctx.store.set("pid", str(os.getpid()))
        ctx.store.wait(["watched"])
        if ctx.rank == 0 and how == "started":
            threading.Thread(target=tell_when_waiting, args=(ctx,), daemon=True).start()
        kind, message, at = ended(wait)
        if ctx.rank == 0:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            ctx.store.set("left", "")
    else:
        pid = int(ctx.store.get("pid"))
        entries = Entries(group)
        ctx.store.set("watched", "")
        entries.wait_for(last)
        if how == "started":
            ctx.store.wait(["waits"])
        ctx.store.set("sent at", str(time.monotonic()))
        os.kill(pid, signal.SIGINT)
        ctx.store.wait(["left"])
        kind, message, at = ended(wait)
    sent_at = float(ctx.store.get("sent at"))
    # The group can be made anew.
    deep_ep.init(group, num_bytes=SMALL)
    check_ops(CASE, ctx.rank, group.group_name, "default")
    deep_ep.destroy(group)
    if ctx.rank == last:
        for key in ("pid", "watched", "waits", "left", "sent at"):
            ctx.store.delete_key(key)
    return kind, message, at - sent_at


@pytest.mark.parametrize(
    "how",
    [
        "dispatch",
        "started",
        "low latency",
        "backward",
        "aot_eager",
        "agree",
        pytest.param("inductor", marks=pytest.mark.slow),
    ],
)
def test_interrupted_while_it_waits(pool: RankPool, how: str) -> None:
    (kind, message, seconds), waiting, late = pool.run(3, interrupted, how)
    assert (kind, message) == (("Late", "of the program") if how == "agree" else ("KeyboardInterrupt", ""))
    assert seconds < 1.0
    for kind, message, _ in (waiting, late):
        assert kind == "RuntimeError"
        assert "rank 0 was interrupted" in message, message
    assert waiting[2] < 2.0
