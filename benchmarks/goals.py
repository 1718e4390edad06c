"""The goals: what is measured for each, over which configurations, and how far it is from there."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from statistics import geometric_mean, median

from benchmarks import overhead
from benchmarks.dispatchers import COPY, DEEP_EP, GLOO, GLOO_TUNED, MPI, MPI_MERGED
from benchmarks.points import FEW, Point
from benchmarks.report import TOTAL, Results, Value, paired


def mean_of(values: Iterable[Value]) -> float:
    return geometric_mean(value.value for value in values)


@dataclass(frozen=True)
class Goal:
    """A line of the table, for the mean over configurations. Where goal > floor more is better, otherwise less is."""

    title: str
    goal: float
    floor: float
    values: Callable[[Results], list[Value]]
    unit: str = "x"
    floor_of_each: bool = False  # no configuration may be below the floor

    def better(self, value: float, bound: float) -> bool:
        return value >= bound if self.goal > self.floor else value <= bound

    def verdict(self, values: list[Value]) -> str:
        mean = mean_of(values)
        if not self.better(self.worst(values).value if self.floor_of_each else mean, self.floor):
            return "below"
        return "goal" if self.better(mean, self.goal) else "floor"

    def worst(self, values: Iterable[Value]) -> Value:
        return (min if self.goal > self.floor else max)(values, key=lambda v: v.value)


def _plain(point: Point) -> bool:
    plain = point.topk == 8 and point.dtype == "bf16" and point.rows == "expert"
    return plain and point.mode == "normal" and not point.backward


def _normal(point: Point) -> bool:
    return _plain(point) and point.tokens >= 1024 and point.hidden in (2048, 7168)


def _few(point: Point) -> bool:
    return _plain(point) and point.tokens in FEW and point.hidden == 2048 and not point.from_python


def _few_from_python(point: Point) -> bool:
    return point.from_python and _few(replace(point, from_python=False))


def _low_latency(point: Point) -> bool:
    return point.mode == "low_latency" and point.tokens <= 8 and point.hidden == 7168 and not point.backward


def _backward(point: Point) -> bool:
    return point.backward and point.tokens >= 1024 and point.rows == "expert" and point.mode == "normal"


def _times(*names: str, where: Callable[[Point], bool], backward: bool = False) -> Callable[[Results], list[Value]]:
    """How many times deep_ep's time the best of these competitors takes."""

    def values(results: Results) -> list[Value]:
        found = []
        for point, samples in results.points:
            there = [name for name in names if name in samples]
            if where(point) and there:
                stage = "+".join(point.stages) if backward else TOTAL
                best = min(there, key=lambda name: median(samples[name][stage]))
                found.append(Value(best, point.ranks, str(point), paired(samples, best, DEEP_EP, stage).ratio))
        return found

    return values


def _of_copies(results: Results) -> list[Value]:
    return [
        Value(DEEP_EP, point.ranks, str(point), paired(samples, DEEP_EP, COPY, TOTAL).ratio)
        for point, samples in results.points
        if _normal(point) and COPY in samples
    ]


def _growth(results: Results) -> list[Value]:
    """Time per token at the largest T over that at T = 1024, where deep_ep was measured alone."""
    by_tokens: dict[Point, dict[int, float]] = {}
    for point, samples in results.points:
        if point.only == (DEEP_EP,) and point.tokens >= 1024:
            others = replace(point, tokens=0)
            by_tokens.setdefault(others, {})[point.tokens] = median(samples[DEEP_EP][TOTAL]) / point.tokens
    found = []
    for point, times in by_tokens.items():
        if 1024 in times and (most := max(times)) > 1024:
            found.append(Value(DEEP_EP, point.ranks, str(replace(point, tokens=most)), times[most] / times[1024]))
    return found


def _named(name: str) -> Callable[[Results], list[Value]]:
    return lambda results: [value for value in results.values if value.name == name]


GOALS = (
    Goal("T ≥ 1024, K=8, bf16: gloo as written / deep_ep", 30, 15, _times(GLOO, where=_normal)),
    Goal("  gloo tuned / deep_ep", 5, 2, _times(GLOO_TUNED, where=_normal)),
    Goal("  better MPI variant / deep_ep", 2.2, 1.3, _times(MPI, MPI_MERGED, where=_normal)),
    Goal("  deep_ep / memcpy of both payloads", 0.8, 1.1, _of_copies),
    Goal("T = 16, 64, 256: better MPI variant / deep_ep", 1.1, 0.85, _times(MPI, MPI_MERGED, where=_few), "x", True),
    Goal("  deep_ep called from Python", 1.1, 0.85, _times(MPI, MPI_MERGED, where=_few_from_python), "x", True),
    Goal("1 to 8 tokens, H=7168, low latency: gloo / deep_ep", 50, 25, _times(GLOO, where=_low_latency)),
    Goal("  better MPI variant / deep_ep", 1.5, 1.2, _times(MPI, MPI_MERGED, where=_low_latency)),
    Goal("with backward: gloo as written / deep_ep", 15, 8, _times(GLOO, where=_backward, backward=True)),
    Goal("in a compiled graph / eager", 1.02, 1.05, _named(overhead.GRAPH_ADDS)),
    Goal("dispatch_start and wait, nothing between / dispatch", 1, 1.1, _named(overhead.TWO_STEPS)),
    Goal("  hidden of the shorter, with computation between", 1, 0.8, _named(overhead.HIDDEN)),
    Goal('low latency of T=1, M=128: rows="rank" / rows="expert"', 1, 1.5, _named(overhead.RANK_ROWS)),
    Goal("  with a hook", 1, 1.5, _named(overhead.RANK_ROWS_HOOK)),
    Goal("eager call of dispatch, R=1, T=1", 25, 40, _named(overhead.EAGER_CALL), "µs"),
    Goal("memory of windows / live recv_x", 1.1, 1.25, _named(overhead.WINDOWS)),
    Goal("time per token, T=32768 / T=1024", 1, 1.15, _growth),
)


def table(results: Results) -> str:
    """One line per goal: goal, floor, geometric means over all configurations and those of each R, and the worst."""
    ranks = sorted({value.ranks for goal in GOALS for value in goal.values(results)})
    width = max(len(goal.title) for goal in GOALS)
    header = f"{'':{width}}  {'goal':>8} {'floor':>8}  {'mean':>7}" + "".join(f" {f'R={r}':>7}" for r in ranks)
    lines = [header + "         worst"]
    for goal in GOALS:
        values = goal.values(results)
        line = f"{goal.title:{width}}  {goal.goal:>6g}{goal.unit:2} {goal.floor:>6g}{goal.unit:2}"
        if not values:
            lines.append(line + "   not measured")
            continue
        line += f"  {mean_of(values):7.2f}"
        for r in ranks:
            of_ranks = [v for v in values if v.ranks == r]
            line += f" {mean_of(of_ranks):7.2f}" if of_ranks else f" {'':7}"
        worst = goal.worst(values)
        lines.append(f"{line}  {goal.verdict(values):5}  {worst.value:.2f} at {worst.config}")
    return "\n".join(lines)


def as_json(results: Results) -> list[dict[str, object]]:
    """Goals with all their values."""
    return [
        {
            "title": goal.title.strip(),
            "goal": goal.goal,
            "floor": goal.floor,
            "unit": goal.unit,
            "values": [vars(value) for value in goal.values(results)],
        }
        for goal in GOALS
    ]
