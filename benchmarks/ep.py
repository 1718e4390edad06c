"""Times dispatch and combine of deep_ep against what else does the same, and against memory, on local processes.

    python -m benchmarks.ep                       what the goals are about, a subset of 8 minutes
    python -m benchmarks.ep --full                every configuration that fits into memory, an hour
    python -m benchmarks.ep --ranks 2 4 --tokens 4096 --hidden 7168 --backward --out FOLDER

T local tokens · H hidden · K top-k · E experts · R ranks · L = E/R local experts · N received rows.

In every repetition each competitor runs once, in an order that rotates from one repetition to the next. All ranks
meet in a barrier before each stage, and the time of a stage is the largest over the ranks; with few tokens it is
that of a call among many in a row. Dispatch and combine are timed apart, since experts run between them: combine
gets a copy of recv_x in ordinary memory, as an expert's output would be, and the copy is not timed. Ratios are taken
between times of the same repetition. Before anything is timed, the result of every competitor is compared with the
expected one.

Where OpenMPI is installed (Debian: libopenmpi-dev, openmpi-bin) its mpirun starts the ranks, and MPI competes. MPI is
called from C++. So are, for low latency and for T <= 256 under rows="expert", all without backward, deep_ep through
torch's dispatcher and gloo as frameworks use it through c10d, in inference mode. All other ops of deep_ep are called
through torch.ops and gloo through torch.distributed, both from Python; for T <= 256 the table has both.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

import torch

from benchmarks import goals
from benchmarks.dispatchers import COPY, DEEP_EP, GLOO, GLOO_TUNED, MPI, MPI_MERGED, NAMES, needed_bytes
from benchmarks.plot import plot
from benchmarks.points import DTYPES, FEW, MODES, ROWS, Point
from benchmarks.rank import num_cores, run
from benchmarks.report import Results, summarize, table

AXES = {
    "ranks": "R, local processes",
    "tokens": "T per rank",
    "hidden": "H",
    "topk": "K",
    "experts": "E",
    "dtype": "of x",
    "rows": "the contract; low latency has expert only",
    "mode": "of the ops",
}
CHOICES = {"dtype": tuple(DTYPES), "rows": ROWS, "mode": MODES}
RANKS = (2, 4, 8)


def quick() -> list[Point]:
    """What the goals are about, and nothing that takes minutes."""
    points = []
    for ranks in RANKS:
        point = Point(ranks, only=(DEEP_EP, GLOO, GLOO_TUNED, MPI, MPI_MERGED, COPY))
        points += [point, replace(point, hidden=7168), replace(point, backward=True)]
        points += [replace(point, tokens=tokens) for tokens in FEW]
        few = replace(point, from_python=True, only=(DEEP_EP, MPI, MPI_MERGED))
        points += [replace(few, tokens=tokens) for tokens in FEW]
        points += [replace(point, tokens=tokens, hidden=7168, mode="low_latency") for tokens in (1, 8)]
    return points + growth((2,), (1024, 32768))


def growth(ranks: tuple[int, ...], tokens: tuple[int, ...]) -> list[Point]:
    """Time over T, of single calls: of calls in a row those with little data find it in the last-level cache, which
    makes even memcpy 1.5 times as fast per byte.
    """
    return [Point(r, tokens=t, only=(DEEP_EP,), repeats=15, seconds=0) for r, t in product(ranks, tokens)]


def full() -> list[Point]:
    """Every axis around what the goals are about."""
    points = []
    for point in (Point(ranks) for ranks in RANKS):
        sizes = product((*FEW, 1024, 4096), (2048, 7168))
        points += [replace(point, tokens=tokens, hidden=hidden) for tokens, hidden in sizes]
        points += [replace(point, topk=topk, experts=experts) for topk, experts in ((1, 64), (2, 8), (8, 256))]
        points += [replace(point, dtype=dtype) for dtype in ("fp16", "fp32")]
        points += [replace(point, rows="rank", hidden=hidden) for hidden in (2048, 7168)]
        points += [replace(point, tokens=t, hidden=7168, mode="low_latency") for t in (1, 2, 4, 8, 64)]
        points += [replace(point, backward=True, **other) for other in ({}, {"hidden": 7168}, {"dtype": "fp32"})]
    return points + growth((2, 4), (1024, 4096, 16384, 32768))


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[Point]]:
    """The options and the points that they ask for."""
    summary, *_ = __doc__.split("\n\n")
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ep", description=summary)
    parser.add_argument("--full", action="store_true", help="every configuration")
    axes = parser.add_argument_group("one configuration for every combination of these")
    for name, text in AXES.items():
        default = getattr(Point(), name)
        kind = {"type": type(default), "choices": CHOICES.get(name), "nargs": "+"}
        axes.add_argument(f"--{name.replace('_', '-')}", help=f"{text} ({default})", **kind)
    names = f"competitors, of {', '.join(NAMES)} (all)"
    axes.add_argument("--only", nargs="+", default=(), choices=NAMES, metavar="NAME", help=names)
    axes.add_argument("--repeats", type=int, default=7, help="repetitions, at least 7 (%(default)s)")
    axes.add_argument("--backward", action="store_true", help="time the backward pass as well")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/benchmarks"), help="folder of results.json and results.png (%(default)s)"
    )
    parser.add_argument("--seconds", type=float, default=0.1, help="of calls in a row in a repetition (%(default)s)")
    args = parser.parse_args(argv)
    if args.repeats < 7:
        parser.error(f"--repeats must be at least 7, got {args.repeats}")
    common = {"repeats": args.repeats, "seconds": args.seconds, "backward": args.backward, "only": tuple(args.only)}
    chosen = {name: getattr(args, name) for name in AXES if getattr(args, name) is not None}
    args.overhead = "" if chosen or args.backward or args.only else "full" if args.full else "quick"
    if args.overhead:
        return args, [
            replace(point, repeats=max(point.repeats, args.repeats), seconds=min(point.seconds, args.seconds))
            for point in (full() if args.full else quick())
        ]
    points = [Point(**common, **dict(zip(chosen, values, strict=True))) for values in product(*chosen.values())]
    for point in points:
        if point.ranks < 1 or point.experts % point.ranks:
            parser.error(f"--experts must be a multiple of --ranks, got {point.experts} and {point.ranks}")
        if not 1 <= point.topk <= point.experts:
            parser.error(f"--topk must be in 1..{point.experts} (--experts), got {point.topk}")
        if point.mode == "low_latency" and point.rows != "expert":
            parser.error("--mode low_latency has --rows expert only")
    if args.only and DEEP_EP not in args.only:
        parser.error(f"--only must name {DEEP_EP}, with which others are compared, got {' '.join(args.only)}")
    return args, points


def available_bytes() -> int:
    """Memory that the host has left."""
    (line,) = (line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable:"))
    return int(line.split()[1]) << 10


def fitting(points: list[Point], available: int) -> tuple[list[Point], list[str]]:
    """The points that so many bytes of memory are enough for, and what is to be said of the others."""
    fit, others = [], []
    for point in points:
        needed = needed_bytes(point)
        if needed <= available:
            fit.append(point)
        else:
            sizes = f"takes about {needed / 2**30:.0f} GiB of memory, {available / 2**30:.0f} GiB are available"
            others.append(f"{point}: {sizes}")
    return fit, others


def main(argv: list[str]) -> None:
    args, points = parse(argv)
    results = Results()
    left_out: list[str] = []
    for ranks in sorted({point.ranks for point in points} | ({1} if args.overhead else set())):
        fit, others = fitting([point for point in points if point.ranks == ranks], available_bytes())
        left_out += others
        for text in others:
            print(f"\nleft out: {text}", flush=True)
        if not fit and not args.overhead:
            continue
        measured = run(ranks, fit, args.overhead)
        for point, samples in measured.points:
            print(f"\n{point}, {point.repeats} repetitions, {num_cores()} cores")
            print(table(summarize(samples, DEEP_EP), DEEP_EP), flush=True)
        for value in measured.values:
            print(f"\n{value.name}: {value.value:.3g} at {value.config}", flush=True)
        results.points.extend(measured.points)
        results.values.extend(measured.values)
    if not results.points and not results.values:
        sys.exit("nothing of what was asked for fits into memory")
    print(f"\n{goals.table(results)}")
    args.out.mkdir(parents=True, exist_ok=True)
    environment = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": num_cores(),
    }
    document = {
        "environment": environment,
        "points": [{"point": asdict(point), "samples": samples} for point, samples in results.points],
        "left_out": left_out,
        "values": [asdict(value) for value in results.values],
        "goals": goals.as_json(results),
    }
    (args.out / "results.json").write_text(json.dumps(document, indent=1) + "\n")
    plot(results, args.out / "results.png")


if __name__ == "__main__":
    main(sys.argv[1:])
