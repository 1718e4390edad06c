"""Groups whose ranks have NPUs: windows on CPU are there once a tensor on CPU is, and ranks may be on many hosts.

H hidden · K top-k · L local experts · E experts · M num_max_dispatch_tokens_per_rank.
"""

import ctypes
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch_npu  # noqa: F401
from cases import Case, assert_close
from op_calls import calls, check_ops, error_of, run
from probes import expect
from ranks import RankContext, RankPool, raise_failures, spawn_ranks

import deep_ep
from tools.twin import kernels as twin_kernels
from tools.twin import model

SIZE = 2
ON_NPU, M = Case((5, 3), H=256, K=2, local_experts=4, dtype=torch.bfloat16, ids="distinct", absent=0.1), 7
ON_CPU = Case((5, 0))
SMALL = 1 << 20
SHORT = timedelta(seconds=1)


@pytest.fixture(scope="module")
def npus() -> Iterator[RankPool]:
    twin_kernels.build()
    pool = RankPool(SIZE)
    yield pool
    pool.close()


def make_group(ctx: RankContext) -> dist.ProcessGroup:
    """A new one of all ranks, not prepared, whose kernels are those on the twin. Collective."""
    os.environ["DEEP_EP_KERNELS"] = str(twin_kernels.build())
    torch.npu.set_device(ctx.rank)
    return dist.new_group(backend="cpu:gloo,npu:hccl", timeout=timedelta(seconds=30))


def on_npu(ctx: RankContext, group: dist.ProcessGroup) -> None:
    """A dispatch and a combine of an NPU's tensors."""
    wanted = expect(ON_NPU, M)
    x, ids, weights, y = (t[ctx.rank].npu() for t in (wanted.xs, wanted.ids, wanted.weights, wanted.ys))
    _, _, handle = deep_ep.low_latency_dispatch(x, ids, M, ON_NPU.E, group=group)
    combined = deep_ep.low_latency_combine(y, ids, weights, handle, group=group)
    assert_close("combined", combined.cpu(), wanted.combined[ctx.rank], wanted.tolerances[ctx.rank])


def on_cpu(ctx: RankContext, group: dist.ProcessGroup, op: str = "dispatch", how: str = "op") -> None:
    """An op of tensors on the CPU."""
    right = calls(ON_CPU)
    arguments = right.arguments(op, ctx.rank, group.group_name)
    if how == "compiled":
        result = torch.compile(getattr(torch.ops.deep_ep, op).default, backend="aot_eager", fullgraph=True)(**arguments)
    elif how == "started":
        ticket = run(f"{op}_start", "default", arguments)
        sent = [value for value in arguments.values() if isinstance(value, torch.Tensor)]
        result = torch.ops.deep_ep.wait(ticket, op, sent, ON_CPU.E, SIZE, 0, group.group_name)
    else:
        result = run(op, "default", arguments)
    right.check(op, ctx.rank, result)


def windows() -> int:
    """How many on CPU this process maps."""
    with open("/proc/self/maps") as maps:
        return sum("deep_ep_window" in line for line in maps)


def come_late(ctx: RankContext, how: str) -> None:
    group, before = make_group(ctx), windows()
    deep_ep.init(group, num_bytes=SMALL)
    on_npu(ctx, group)
    assert windows() == before
    on_cpu(ctx, group, how=how)
    assert windows() == before + SIZE
    assert deep_ep.groups.op_log(group) == (["dispatch"], 1)
    check_ops(ON_CPU, ctx.rank, group.group_name, "default")
    on_npu(ctx, group)
    deep_ep.init(group, num_bytes=2 * SMALL)  # makes both anew
    check_ops(ON_CPU, ctx.rank, group.group_name, "default")
    on_npu(ctx, group)
    deep_ep.destroy(group)
    assert windows() == before


@pytest.mark.parametrize("how", ["op", "compiled", "started"])
def test_windows_on_cpu_come_with_the_first_tensor_there(npus: RankPool, how: str) -> None:
    npus.run(SIZE, come_late, how)


def asked_for(ctx: RankContext) -> list[str]:
    group, before = make_group(ctx), windows()
    errors = [error_of(deep_ep.init, group, device="cuda")]
    errors.append(error_of(deep_ep.init, group, num_bytes=SMALL, device=("cpu", "npu")[ctx.rank]))
    deep_ep.init(group, num_bytes=SMALL, device=torch.device("cpu"))
    assert windows() == before + SIZE
    check_ops(ON_CPU, ctx.rank, group.group_name, "default")
    errors.append(error_of(deep_ep.npu.check, group))
    deep_ep.init(group, num_bytes=SMALL)
    on_npu(ctx, group)
    deep_ep.destroy(group)
    return [f"{kind}: {message}" for kind, message in errors]


def test_windows_of_a_device_are_asked_for(npus: RankPool) -> None:
    for unknown, differ, without in npus.run(SIZE, asked_for):
        assert unknown.startswith("ValueError: device must be one that the group has, cpu, npu; got 'cuda'"), unknown
        assert re.search("RuntimeError: .*rank 1 wants npu for the group '.*', rank 0 cpu; give all ranks", differ), (
            differ
        )
        assert "there are no windows on the NPU" in without


def too_small(ctx: RankContext) -> list[str]:
    """What init says to windows with a byte less than they must have, on all ranks and on one of them."""
    sizes = model.Sizes(SIZE, 0, 0, 1, SIZE)
    least = model.slots_begin(sizes) + 2 * SIZE * model.LINE
    group = make_group(ctx)
    texts = []
    for num_bytes in (least - 1, least - 1 if ctx.rank == 1 else SMALL):
        kind, text = error_of(deep_ep.init, group, num_bytes=num_bytes)
        assert kind == "RuntimeError"
        assert f"{SIZE} ranks need {least} bytes each" in text
        assert f"gives {least - 1}; ask for more with num_nvl_bytes, num_bytes or HCCL_BUFFSIZE" in text
        texts.append(text)
    deep_ep.init(group, num_bytes=least)
    deep_ep.init(group, num_bytes=SMALL)
    deep_ep.init(group, num_bytes=1)  # what there is has room
    on_npu(ctx, group)
    deep_ep.destroy(group)
    return texts


def test_windows_that_are_too_small_are_refused(npus: RankPool) -> None:
    texts = npus.run(SIZE, too_small)
    assert texts[0] == texts[1]
    assert "and rank 0 gives" in texts[0][0]
    assert "and rank 1 gives" in texts[0][1]


def on_hosts(ctx: RankContext, apart: bool) -> tuple[list[str], str]:
    """What calls on CPU say where every rank is on a host of its own, and works on NPUs."""
    if apart:
        new_host_name = 0x04000000
        assert ctypes.CDLL(None).unshare(new_host_name) == 0
        socket.sethostname(f"host{ctx.rank}")
    group = make_group(ctx)
    deep_ep.init(group, num_bytes=SMALL)
    on_npu(ctx, group)
    x, ids = torch.ones(2, 8), torch.zeros(2, 1, dtype=torch.int64)
    errors = [
        error_of(on_cpu, ctx, group),
        error_of(deep_ep.dispatch, x, ids, num_experts=SIZE, group=group),
        error_of(deep_ep.init, group, device="cpu"),
    ]
    on_npu(ctx, group)
    deep_ep.Buffer(group)
    return [f"{kind}: {message}" for kind, message in errors], group.group_name


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has host names of its own")
def test_ranks_on_several_hosts_have_npus() -> None:
    with spawn_ranks(SIZE, on_hosts, True) as ranks:
        outcomes = ranks.outcomes()
    raise_failures(outcomes)
    for outcome in outcomes:
        errors, name = outcome.value
        apart = (
            rf"the group '{name}' spans several hosts \(rank 0: host0 \(.*\), rank 1: host1 .*DEEP_USE_MODE=alltoall"
        )
        for call, error in zip(("deep_ep.dispatch", "deep_ep.dispatch", "deep_ep"), errors, strict=True):
            assert re.match(f"RuntimeError: {call}: {apart}", error), error


def apart(ctx: RankContext, theirs: str) -> list[str]:
    """Rank 0 has a tensor on CPU, rank 1 is elsewhere; then all is well."""
    group = make_group(ctx)
    deep_ep.init(group, num_bytes=SMALL, timeout=SHORT)
    key = f"{theirs} {os.getppid()}"
    if ctx.rank == 0:
        errors = [error_of(on_cpu, ctx, group)]
        ctx.store.set(key, "")
    elif theirs == "comes late":
        ctx.store.wait([key])
        errors = [error_of(on_cpu, ctx, group)]
    elif theirs == "init":
        errors = [error_of(deep_ep.init, group, num_bytes=SMALL)]
    else:
        errors = [error_of(on_cpu, ctx, group, op="combine")]
    on_npu(ctx, group)
    check_ops(ON_CPU, ctx.rank, group.group_name, "default")
    # From here on, a rank whose call fails tells the others.
    x, ids = torch.ones(2, 8), torch.zeros(2, 1, dtype=torch.int64)
    call = {"num_experts": SIZE, "group": group, "num_worst_tokens": -1 if ctx.rank else 4}
    errors.append(error_of(deep_ep.dispatch, x, ids, **call))
    check_ops(ON_CPU, ctx.rank, group.group_name, "default")
    deep_ep.destroy(group)
    return [f"{kind}: {message}" for kind, message in errors]


@pytest.mark.parametrize(
    "theirs, says",
    [
        ("combine", ["meet in different calls, rank 0 is in deep_ep.dispatch, rank 1 is in deep_ep.combine"] * 2),
        ("init", ["meet in different calls, rank 0 is in deep_ep.dispatch, rank 1 is in deep_ep.init"] * 2),
        ("comes late", ["rank 0 waited 1 s for rank 1 .* must make this deep_ep.dispatch on CPU", "rank 0 gave up"]),
    ],
)
def test_ranks_that_do_not_come_to_the_same_op(npus: RankPool, theirs: str, says: list[str]) -> None:
    for rank, (error, refused) in enumerate(npus.run(SIZE, apart, theirs)):
        assert re.match(f"RuntimeError: deep_ep.*{says[rank]}", error), error
        assert "num_worst_tokens" in refused and ("rank 1" in refused or rank == 1), refused


def is_in_meeting() -> bool:
    frame = sys._current_frames()[threading.main_thread().ident]
    while frame is not None:
        if frame.f_code.co_name == "_wait" and os.path.basename(frame.f_code.co_filename) == "meeting.py":
            return True
        frame = frame.f_back
    return False


def interrupted(ctx: RankContext) -> str:
    """Rank 0 is interrupted while it waits for rank 1 to make windows, which hears of it when it comes."""
    group = make_group(ctx)
    deep_ep.init(group, num_bytes=SMALL)
    if ctx.rank == 1:
        ctx.store.wait(["interrupted"])
        message = error_of(on_cpu, ctx, group)[1]
        ctx.store.set("heard", "")
        return message
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def send() -> None:
        while not is_in_meeting():
            os.sched_yield()
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=send).start()
    with pytest.raises(KeyboardInterrupt):
        on_cpu(ctx, group)
    ctx.store.set("interrupted", "")
    ctx.store.wait(["heard"])
    return ""


def test_an_interrupt_ends_the_wait_for_windows() -> None:
    with spawn_ranks(SIZE, interrupted) as ranks:
        outcomes = ranks.outcomes()
    raise_failures(outcomes)
    assert "rank 0 was interrupted" in outcomes[1].value, outcomes[1].value


def forked(ctx: RankContext) -> Any:
    """What a child of rank 0, with a tensor on CPU, is told; and that the rank does not mind."""
    group = make_group(ctx)
    deep_ep.init(group, num_bytes=SMALL)
    told = ""
    if ctx.rank == 0:
        receiver, sender = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(sender, error_of(on_cpu, ctx, group)[1].encode())
            deep_ep.destroy(group)
            os._exit(0)
        os.close(sender)
        with open(receiver) as answer:
            told = answer.read()
        assert os.waitpid(child, 0)[1] == 0
    on_npu(ctx, group)
    on_cpu(ctx, group)
    deep_ep.destroy(group)
    return told


def test_a_forked_child_has_no_windows(npus: RankPool) -> None:
    told, _ = npus.run(SIZE, forked)
    assert "this process was forked from a rank" in told, told
