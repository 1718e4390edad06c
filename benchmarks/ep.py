"""Times dispatch and combine of deep_ep against a gloo dispatcher, on local processes.

    python -m benchmarks.ep --quick             the configuration that ratios are quoted for, and a small one
    python -m benchmarks.ep --ranks 2 --tokens 4096 --backward --json FILE

T local tokens · H hidden · K top-k · E experts · R ranks · L = E/R local experts · N received rows.

In every repetition each competitor runs once, in an order that rotates from one repetition to the next. All
ranks meet in a barrier before each stage, and the time of a stage is the largest over the ranks. Dispatch and
combine are timed apart, since experts run between them: combine gets a copy of recv_x in ordinary memory, as
an expert's output would be, and the copy is not timed. Ratios are taken between times of the same repetition.
Before anything is timed, the result of every competitor is compared with the expected one.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from benchmarks.dispatchers import DeepEPDispatcher, Dispatcher, GlooDispatcher
from benchmarks.report import Samples, as_json, summarize, table, with_totals

BASELINE = "gloo"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
WARMUP = 2


@dataclass(frozen=True)
class Point:
    """One configuration to measure; tokens and topk are per rank."""

    tokens: int = 1024
    hidden: int = 2048
    topk: int = 8
    experts: int = 64
    dtype: str = "bf16"
    repeats: int = 15
    backward: bool = False

    @property
    def stages(self) -> list[str]:
        return ["dispatch", "combine", "backward"] if self.backward else ["dispatch", "combine"]


@dataclass(frozen=True)
class Inputs:
    """What a rank brings: uniform routing to K distinct experts, weights that sum to one."""

    x: Tensor  # [T, H]
    topk_idx: Tensor  # int64 [T, K]
    topk_weights: Tensor  # float32 [T, K]
    grad_out: Tensor  # [T, H]


def make_inputs(point: Point, rank: int) -> Inputs:
    """The inputs of a rank; every rank can make those of every other."""
    generator = torch.Generator().manual_seed(1000 + rank)
    shape, dtype = (point.tokens, point.hidden), DTYPES[point.dtype]
    x = torch.randn(shape, generator=generator).to(dtype)
    topk_idx = torch.rand(point.tokens, point.experts, generator=generator).topk(point.topk).indices
    topk_weights = torch.randn(point.tokens, point.topk, generator=generator).softmax(1)
    grad_out = torch.randn(shape, generator=generator).to(dtype)
    return Inputs(x, topk_idx, topk_weights, grad_out)


def check(dispatcher: Dispatcher, point: Point, rank: int, num_ranks: int) -> None:
    """Compare one round of a dispatcher with the expected rows, outputs and gradients.

    Expert e multiplies its rows by 2 ** (e % 4), exact in every dtype, so that rows that come back to the
    wrong place do not go unnoticed.

    Raises:
        AssertionError: a result differs, named with the dispatcher and the tensor.
    """

    def assert_close(what: str, actual: Tensor, expected: Tensor, rtol: float = 0.0, atol: float = 0.0) -> None:
        torch.testing.assert_close(
            actual, expected, rtol=rtol, atol=atol, msg=lambda m: f"{dispatcher.name}: {what}: {m}"
        )

    # Rows in the order of (expert, source rank, token, k).
    everyone = [make_inputs(point, r) for r in range(num_ranks)]
    ids = torch.cat([inputs.topk_idx for inputs in everyone]).flatten()
    local = torch.arange(point.experts).view(num_ranks, -1)[rank]
    order = ids.argsort(stable=True)
    order = order[torch.isin(ids[order], local)]
    expected_rows = torch.cat([inputs.x for inputs in everyone])[order // point.topk]
    row_scale = (2.0 ** (ids[order] % 4)).to(expected_rows.dtype).unsqueeze(1)

    mine = everyone[rank]
    x = mine.x.clone().requires_grad_(point.backward)
    topk_weights = mine.topk_weights.clone().requires_grad_(point.backward)
    recv_x, state = dispatcher.dispatch(x, mine.topk_idx, topk_weights)
    assert_close("recv_x", recv_x, expected_rows)
    out = dispatcher.combine(recv_x * row_scale, state)

    # All terms of a sum over k have the same sign, so the error is relative to the result.
    eps, sum_eps = torch.finfo(x.dtype).eps, torch.finfo(dispatcher.sum_dtype).eps
    tiny = point.topk * torch.finfo(x.dtype).smallest_normal * eps
    scale = 2.0 ** (mine.topk_idx % 4)
    total = (mine.topk_weights * scale).double().sum(1, keepdim=True)
    expected = (mine.x.double() * total).to(x.dtype)
    assert_close("combined x", out.detach(), expected, rtol=max(eps, point.topk * sum_eps), atol=tiny)
    if not point.backward:
        return
    out.backward(mine.grad_out)
    assert x.grad is not None and topk_weights.grad is not None
    expected = (mine.grad_out.double() * total).to(x.dtype)
    assert_close("x.grad", x.grad, expected, rtol=point.topk * eps, atol=tiny)
    dot = (mine.x.double() * mine.grad_out.double()).sum(1, keepdim=True)
    atol = 1e-5 * point.hidden**0.5 * scale.max().item()
    assert_close("topk_weights.grad", topk_weights.grad, (dot * scale).float(), rtol=4 * sum_eps, atol=atol)


def make_dispatchers(group: dist.ProcessGroup, point: Point) -> list[Dispatcher]:
    """The competitors of a point, the baseline first."""
    dispatchers: list[Dispatcher] = [GlooDispatcher(group, point.experts, BASELINE)]
    if point.dtype != "fp32":
        dispatchers.append(GlooDispatcher(group, point.experts, f"{BASELINE}.lowp", DTYPES[point.dtype]))
    dispatchers.append(DeepEPDispatcher(group, point.experts, "default"))
    dispatchers.append(DeepEPDispatcher(group, point.experts, "alltoall"))
    return dispatchers


def run_once(dispatcher: Dispatcher, inputs: Inputs, backward: bool) -> list[float]:
    """Seconds that this rank spent in every stage of one round."""
    seconds: list[float] = []

    def timed(stage: Callable[..., Any], *args: Any) -> Any:
        dist.barrier()
        start = time.perf_counter()
        result = stage(*args)
        seconds.append(time.perf_counter() - start)
        return result

    x = inputs.x.detach().requires_grad_(backward)
    topk_weights = inputs.topk_weights.detach().requires_grad_(backward)
    recv_x, state = timed(dispatcher.dispatch, x, inputs.topk_idx, topk_weights)
    out = timed(dispatcher.combine, recv_x.clone(), state)
    if backward:
        timed(out.backward, inputs.grad_out)
    return seconds


def measure(dispatchers: list[Dispatcher], point: Point, rank: int) -> Samples:
    """Times of all competitors over interleaved repetitions, the largest over the ranks."""
    inputs = make_inputs(point, rank)
    seconds = torch.zeros(len(dispatchers), len(point.stages), WARMUP + point.repeats, dtype=torch.float64)
    for repetition in range(WARMUP + point.repeats):
        for turn in range(len(dispatchers)):
            i = (repetition + turn) % len(dispatchers)
            seconds[i, :, repetition] = torch.tensor(run_once(dispatchers[i], inputs, point.backward))
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    kept = seconds[:, :, WARMUP:].tolist()
    return {
        dispatcher.name: dict(zip(point.stages, times, strict=True))
        for dispatcher, times in zip(dispatchers, kept, strict=True)
    }


def num_cores() -> int:
    return len(os.sched_getaffinity(0))


def worker(rank: int, num_ranks: int, points: list[Point], folder: str) -> None:
    """One rank: check and measure every point; rank 0 writes the samples to the folder."""
    import deep_ep

    torch.set_num_threads(max(1, num_cores() // num_ranks))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=num_ranks)
    group = dist.group.WORLD
    assert group is not None
    deep_ep.init(group, strategy="default")
    results = []
    for point in points:
        dispatchers = make_dispatchers(group, point)
        for dispatcher in dispatchers:
            check(dispatcher, point, rank, num_ranks)
        results.append(measure(dispatchers, point, rank))
    if rank == 0:
        Path(folder, "samples.json").write_text(json.dumps(results))
    deep_ep.destroy(group)
    dist.destroy_process_group()


def run(num_ranks: int, points: list[Point]) -> list[Samples]:
    """Samples of every point, measured by fresh processes."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(worker, args=(num_ranks, points, folder), nprocs=num_ranks)
        results: list[Samples] = json.loads(Path(folder, "samples.json").read_text())
    return results


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[Point]]:
    """The options and the points that they ask for."""
    default = Point()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ep", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--quick",
        action="store_true",
        help="R=4, T=1024 and T=16, H=2048, K=8, E=64, bf16 (only --backward and --json count)",
    )
    parser.add_argument("--ranks", type=int, default=4, help="R, local processes (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=default.tokens, help="T per rank (%(default)s)")
    parser.add_argument("--hidden", type=int, default=default.hidden, help="H (%(default)s)")
    parser.add_argument("--topk", type=int, default=default.topk, help="K (%(default)s)")
    parser.add_argument("--experts", type=int, default=default.experts, help="E (%(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default=default.dtype, help="of x (%(default)s)")
    parser.add_argument("--repeats", type=int, default=default.repeats, help="repetitions (%(default)s)")
    parser.add_argument("--backward", action="store_true", help="time the backward pass as well")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all samples to FILE")
    args = parser.parse_args(argv)
    if args.quick:
        args.ranks = 4
        return args, [
            Point(repeats=9, backward=args.backward),
            Point(tokens=16, repeats=51, backward=args.backward),
        ]
    if args.ranks < 1 or args.experts % args.ranks:
        parser.error(f"--experts must be a multiple of --ranks, got {args.experts} and {args.ranks}")
    if not 1 <= args.topk <= args.experts:
        parser.error(f"--topk must be in 1..{args.experts} (--experts), got {args.topk}")
    if args.repeats < 7:
        parser.error(f"--repeats must be at least 7, got {args.repeats}")
    fields = {field: getattr(args, field) for field in asdict(default)}
    return args, [Point(**fields)]


def main(argv: list[str]) -> None:
    args, points = parse(argv)
    records = []
    for point, measured in zip(points, run(args.ranks, points), strict=True):
        samples = with_totals(measured)
        summary = summarize(samples, BASELINE)
        print(
            f"\nR={args.ranks} T={point.tokens} H={point.hidden} K={point.topk} E={point.experts} "
            f"{point.dtype}, {point.repeats} repetitions, {num_cores()} cores"
        )
        print(table(summary, BASELINE))
        records.append({"point": asdict(point), "summary": as_json(summary), "samples": samples})
    if args.json:
        environment = {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
            "cores": num_cores(),
            "ranks": args.ranks,
            "baseline": BASELINE,
        }
        args.json.write_text(json.dumps({"environment": environment, "points": records}, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
