"""What deep_ep costs beside moving rows: calls, graphs, compilation, memory.

T local tokens · H hidden · K top-k · E experts · R ranks.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import deep_ep
from benchmarks.dispatchers import DeepEP
from benchmarks.points import Point, make_inputs
from benchmarks.report import Value

REPEATS = 15
CALLS = 200  # of one op, in one repetition
# Of the graph that is timed against eager calls, as many as a model has: to enter a graph, whatever is in it, takes
# torch 50 µs, and several hundred where rows have displaced its code and data from the caches.
LAYERS = 16

EAGER_CALL = "eager call, µs"
GRAPH_CALL = "call in a graph, µs"
GRAPH_ADDS = "dispatch+combine in a graph / eager"
TWO_STEPS = "dispatch_start and wait / dispatch"
HIDDEN = "of the shorter of dispatch and computation, hidden"
RANK_ROWS = 'low latency, rows="rank" / rows="expert"'
RANK_ROWS_HOOK = f"{RANK_ROWS}, with a hook"
WINDOWS = "memory of windows / live recv_x"
COMPILE = "compile time of examples/train_moe.py, s"


def _seconds(fn: Callable[..., Any], *args: Any, calls: int = 1) -> float:
    dist.barrier()
    start = time.perf_counter()
    for _ in range(calls):
        fn(*args)
    return (time.perf_counter() - start) / calls


def calls(group: dist.ProcessGroup) -> list[Value]:
    """Microseconds of a dispatch that sends nothing, T = 1 with ids of -1 only: eager, and one of 8 in a graph of
    inductor. For one rank.
    """
    point = Point(1, tokens=1)
    inputs = make_inputs(point, 0)
    ids = torch.full_like(inputs.topk_idx, -1)
    dispatch = DeepEP(group, point.experts, "default").dispatch

    def many(x: Tensor, ids: Tensor, weights: Tensor) -> list[Tensor]:
        return [dispatch(x, ids, weights)[0] for _ in range(8)]

    compiled = torch.compile(many, fullgraph=True, dynamic=False)
    found = []
    for name, fn, ops in ((EAGER_CALL, dispatch, 1), (GRAPH_CALL, compiled, 8)):
        fn(inputs.x, ids, inputs.topk_weights)
        times = [_seconds(fn, inputs.x, ids, inputs.topk_weights, calls=CALLS) / ops for _ in range(REPEATS)]
        found.append(Value(name, 1, str(point), median(times) * 1e6))
    return found


def graph(group: dist.ProcessGroup) -> list[Value]:
    """Time of a graph of inductor with LAYERS times dispatch and combine over that of the same calls made eagerly,
    paired. An eager call is that of the C++ op by PyTorch's dispatcher.
    """
    point = Point(group.size())
    inputs = make_inputs(point, group.rank())
    ops = DeepEP(group, point.experts, "default")

    def layers(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        for _ in range(LAYERS):
            x = ops.combine(*ops.dispatch(x, ids, weights))
        return x

    ways = layers, torch.compile(layers, fullgraph=True, dynamic=False)
    arguments = inputs.x, inputs.topk_idx, inputs.topk_weights
    if not torch.equal(ways[0](*arguments), ways[1](*arguments)):
        raise AssertionError("the graph gives another result than eager calls")
    seconds = torch.zeros(REPEATS, 2, dtype=torch.float64)
    for repetition in range(REPEATS):
        for turn in (0, 1):
            way = (repetition + turn) % 2
            seconds[repetition, way] = _seconds(ways[way], *arguments)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return [Value(GRAPH_ADDS, point.ranks, str(point), (seconds[:, 1] / seconds[:, 0]).median().item())]


def overlap(group: dist.ProcessGroup) -> list[Value]:
    """What it costs to make a dispatch in two steps, with nothing between them, over a plain one; and how much of the
    shorter of the two is hidden where a thread computes about as long between them. All paired.
    """
    point = Point(group.size(), hidden=2048)
    inputs = make_inputs(point, group.rank())
    sizes = {"num_experts": point.experts, "group": group}
    given = inputs.x, inputs.topk_idx, inputs.topk_weights
    matrix = torch.randn(512, 512)
    times = 1

    def compute() -> None:
        result = matrix
        for _ in range(times):
            result = torch.tanh(result @ matrix)

    def plain() -> deep_ep.DispatchOutput:
        return deep_ep.dispatch(*given, **sizes)

    def in_two_steps(between: Callable[[], None] = lambda: None) -> deep_ep.DispatchOutput:
        started = deep_ep.dispatch_start(*given, **sizes)
        between()
        return deep_ep.wait(started)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    if not torch.equal(plain().recv_x, in_two_steps().recv_x):
        raise AssertionError("a dispatch that was started gives another result")

    def measured(*ways: Callable[[], Any]) -> Tensor:
        """[REPEATS, ways], of the slowest rank."""
        seconds = torch.zeros(REPEATS, len(ways), dtype=torch.float64)
        for repetition in range(REPEATS):
            for turn in range(len(ways)):
                way = (repetition + turn) % len(ways)
                seconds[repetition, way] = _seconds(ways[way])
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
        return seconds

    alone = measured(plain, compute).median(0).values
    times = max(1, round(float(alone[0] / alone[1])))
    seconds = measured(plain, in_two_steps, compute, partial(in_two_steps, compute))
    torch.set_num_threads(threads)
    of_plain, in_two, of_compute, beside = seconds.unbind(1)
    hidden = (of_plain + of_compute - beside) / torch.minimum(of_plain, of_compute)
    return [
        Value(TWO_STEPS, point.ranks, str(point), (in_two / of_plain).median().item()),
        Value(HIDDEN, point.ranks, str(point), max(hidden.median().item(), 0.01)),
    ]


def rank_rows(group: dist.ProcessGroup) -> list[Value]:
    """Times of low-latency dispatch and combine of one token under rows="rank", where there is room for 128 of each
    rank, over those under rows="expert", paired; with a hook, those of call and hook. Of the slowest rank.
    """
    point, M, E = Point(group.size(), tokens=1, hidden=4096, mode="low_latency"), 128, 64
    x = torch.randn(point.tokens, point.hidden, dtype=torch.bfloat16)
    ids = torch.rand(point.tokens, E).topk(8).indices
    weights = torch.rand(ids.shape)
    buffers = {rows: deep_ep.Buffer(group, rows=rows, low_latency_mode=True) for rows in ("expert", "rank")}
    ways = [("expert", False), ("rank", False), ("rank", True)]

    def step(rows: str, hooks: bool) -> tuple[float, float, Tensor]:
        buffer, begun = buffers[rows], time.perf_counter()
        recv_x, _, handle, _, hook = buffer.low_latency_dispatch(x, ids, M, E, use_fp8=False, return_recv_hook=hooks)
        hook()
        between = time.perf_counter()
        out, _, hook = buffer.low_latency_combine(recv_x, ids, weights, handle, return_recv_hook=hooks)
        hook()
        return between - begun, time.perf_counter() - between, out

    seconds = torch.zeros(CALLS, len(ways), 2, dtype=torch.float64)
    with torch.no_grad():
        results = [step(*way)[-1] for way in ways]
        if not all(torch.equal(result, results[0]) for result in results):
            raise AssertionError("the row contracts give different results")
        for call in range(CALLS):
            for turn in range(len(ways)):
                way = (call + turn) % len(ways)
                seconds[call, way] = torch.tensor(step(*ways[way])[:2])
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    ratios = (seconds[:, 1:] / seconds[:, :1]).median(0).values.tolist()
    return [
        Value(name, point.ranks, f"{stage} of {point}", ratio)
        for name, of_way in zip((RANK_ROWS, RANK_ROWS_HOOK), ratios, strict=True)
        for stage, ratio in zip(("dispatch", "combine"), of_way, strict=True)
    ]


def _windows() -> dict[Path, list[int]]:
    """Where the windows of all ranks are mapped, by their files below /proc/self/map_files."""
    found = {}
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, *_, name = line.split(maxsplit=5)
        if name.startswith("/memfd:deep_ep_window"):
            found[Path("/proc/self/map_files", addresses)] = [int(address, 16) for address in addresses.split("-")]
    return found


def memory(group: dist.ProcessGroup, point: Point) -> list[Value]:
    """Memory of all windows, touched or not, and of recv_x where it lies elsewhere, over the bytes of recv_x of all
    ranks; measured after some rounds of dispatch and combine, of which one recv_x at a time is alive. The kernel tells
    root alone.
    """
    inputs = make_inputs(point, group.rank())
    ops = DeepEP(group, point.experts, "default")
    deep_ep.destroy(group)
    deep_ep.init(group, strategy="default")  # windows that have not grown for what was measured before
    for _ in range(3):
        recv_x = state = None  # gives memory back before the next call
        recv_x, state = ops.dispatch(inputs.x, inputs.topk_idx, inputs.topk_weights)
        ops.combine(recv_x, state)
    windows = _windows()
    inside = any(begin <= recv_x.data_ptr() < end for begin, end in windows.values())
    payload = torch.tensor([recv_x.nbytes, 0 if inside else recv_x.nbytes], dtype=torch.float64)
    dist.all_reduce(payload)
    try:
        files = {status.st_ino: status.st_blocks * 512 for status in map(os.stat, windows)}
    except PermissionError:
        return []
    return [Value(WINDOWS, point.ranks, str(point), (sum(files.values()) + payload[1].item()) / payload[0].item())]


def compilation(group: dist.ProcessGroup) -> list[Value]:
    """Seconds of the first forward and backward of the example's model, nothing cached, less those of the second."""
    sys.path.append(str(Path(__file__).parents[1] / "examples"))
    import train_moe

    config = train_moe.Config()
    model = train_moe.build_model(config, group)
    compiled = torch.compile(model, fullgraph=True, dynamic=False)
    batches = train_moe.Batches(train_moe.load_text()[0], config, group)

    def step() -> None:
        compiled(*batches()).backward()

    with torch.compiler.config.patch(force_disable_caches=True):
        first, second = _seconds(step), _seconds(step)
    return [Value(COMPILE, group.size(), "its defaults", first - second)]


def measure(group: dist.ProcessGroup, full: bool) -> list[Value]:
    """What there is to measure on this number of ranks; if not full, nothing that compiles for long. Collective."""
    R = group.size()
    if R == 1:
        return calls(group) + (compilation(group) if full else [])
    values = (graph(group) if full or R == 2 else []) + (overlap(group) + rank_rows(group) if R in (2, 4) else [])
    return values + [value for H in (2048, 7168) for value in memory(group, Point(R, hidden=H))]
