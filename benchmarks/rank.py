"""One rank: checks and measures every point it is given.

    python -m benchmarks.rank FOLDER            as a process of mpirun

The folder has plan.json, points and whether to measure overhead, and gets results.json from rank 0.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

import deep_ep
from benchmarks import native
from benchmarks.dispatchers import Dispatcher, Memory, make_dispatchers
from benchmarks.overhead import measure as measure_overhead
from benchmarks.points import Inputs, Point, check, make_inputs
from benchmarks.report import Results, Samples, Value, with_totals

WARMUP = 2  # repetitions, which also tell how many calls to make in a row

# Ranks may outnumber cores, and all of them are on this host.
MPIRUN = ("mpirun", "--oversubscribe", "--bind-to", "none", "--mca", "mpi_yield_when_idle", "1")
MPIRUN += ("--mca", "pml", "ob1", "--mca", "btl", "vader,self")


def num_cores() -> int:
    return len(os.sched_getaffinity(0))


def with_mpirun() -> bool:
    """Whether ranks are processes of OpenMPI's mpirun; asked after native.make()."""
    return native.has_mpi() and all(map(shutil.which, (MPIRUN[0], "ompi_info")))


def run_once(dispatcher: Dispatcher | Memory, inputs: Inputs, point: Point, calls: list[int]) -> list[float]:
    """Seconds of a call that this rank spent in every stage of one round, of so many calls in a row."""
    seconds: list[float] = []

    def timed(stage: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        count = loops = calls[len(seconds)]
        if hasattr(dispatcher, "in_a_row"):
            dispatcher.in_a_row, loops = count, 1
        dist.barrier()
        start = time.perf_counter()
        for _ in range(loops):
            result = None  # gives memory back before the next call
            result = stage(*args, **kwargs)
        seconds.append((time.perf_counter() - start) / count)
        return result

    x = inputs.x.detach().requires_grad_(point.backward)
    topk_weights = inputs.topk_weights.detach().requires_grad_(point.backward)
    recv_x, state = timed(dispatcher.dispatch, x, inputs.topk_idx, topk_weights)
    out = timed(dispatcher.combine, recv_x.clone(), state)
    if point.backward:
        timed(out.backward, inputs.grad_out, retain_graph=True)
    return seconds


def measure(dispatchers: list[Dispatcher | Memory], point: Point, rank: int) -> Samples:
    """Times of all competitors over interleaved repetitions, the largest over the ranks."""
    inputs = make_inputs(point, rank)
    calls = torch.ones(len(dispatchers), len(point.stages), dtype=torch.int64)
    kept: list[torch.Tensor] = []
    for repetition in range(WARMUP + point.repeats):
        seconds = torch.zeros(calls.shape, dtype=torch.float64)
        for turn in range(len(dispatchers)):
            i = (repetition + turn) % len(dispatchers)
            seconds[i] = torch.tensor(run_once(dispatchers[i], inputs, point, calls[i].tolist()))
        least = seconds.clone()  # of the rank that was the last to leave the barrier
        dist.all_reduce(least, dist.ReduceOp.MIN)
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
        if repetition < WARMUP:
            calls = (point.seconds / least).ceil().long().clamp(min=1)
        else:
            kept.append(seconds)
    times = torch.stack(kept, dim=2).tolist()
    return {
        dispatcher.name: dict(zip(point.stages, of_stages, strict=True))
        for dispatcher, of_stages in zip(dispatchers, times, strict=True)
    }


def main(rank: int, num_ranks: int, folder: str) -> None:
    """Check and measure what the plan says; rank 0 writes the results. The process may be one of mpirun."""
    with_mpi = "OMPI_COMM_WORLD_RANK" in os.environ
    if with_mpi:
        native.library().mpi_start()
    torch.set_num_threads(max(1, num_cores() // num_ranks))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=num_ranks)
    group = dist.group.WORLD
    assert group is not None
    # Ops are called by their overloads, of both strategies.
    deep_ep.init(group, strategy="default", low_latency_strategy="alltoall")
    plan = json.loads(Path(folder, "plan.json").read_text())
    samples = []
    for fields in plan["points"]:
        point = Point(**fields | {"only": tuple(fields["only"])})
        dispatchers = make_dispatchers(group, point)
        for dispatcher in dispatchers:
            if not isinstance(dispatcher, Memory):
                check(dispatcher, point, rank)
        samples.append(measure(dispatchers, point, rank))
        del dispatchers, dispatcher
    values = measure_overhead(group, plan["overhead"] == "full") if plan["overhead"] else []
    if rank == 0:
        results = {"samples": samples, "values": [asdict(value) for value in values]}
        Path(folder, "results.json").write_text(json.dumps(results))
    deep_ep.destroy(group)
    dist.destroy_process_group()
    if with_mpi:
        native.library().mpi_stop()


def run(num_ranks: int, points: list[Point], overhead: str = "") -> Results:
    """All points, and overhead if it is "quick" or "full", by fresh processes: of mpirun, where MPI is installed."""
    native.make()
    with tempfile.TemporaryDirectory() as folder:
        plan = {"points": [asdict(point) for point in points], "overhead": overhead}
        Path(folder, "plan.json").write_text(json.dumps(plan))
        if with_mpirun():
            allowed = {f"OMPI_ALLOW_RUN_AS_ROOT{suffix}": "1" for suffix in ("", "_CONFIRM")}
            command = [*MPIRUN, "-n", str(num_ranks), sys.executable, "-m", "benchmarks.rank", folder]
            root = Path(__file__).parents[1]
            subprocess.run(command, cwd=root, env=os.environ | allowed, stdin=subprocess.DEVNULL, check=True)
        else:
            spawn(main, args=(num_ranks, folder), nprocs=num_ranks)
        results = json.loads(Path(folder, "results.json").read_text())
    measured = [with_totals(samples) for samples in results["samples"]]
    return Results(list(zip(points, measured, strict=True)), [Value(**value) for value in results["values"]])


if __name__ == "__main__":
    main(int(os.environ["OMPI_COMM_WORLD_RANK"]), int(os.environ["OMPI_COMM_WORLD_SIZE"]), sys.argv[1])
