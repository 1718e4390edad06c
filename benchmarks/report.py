"""Paired statistics of interleaved repetitions, and their table."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median

from benchmarks.points import Point

Samples = dict[str, dict[str, list[float]]]
"""Seconds of a call by competitor and stage; position i of every list belongs to repetition i."""

TOTAL = "dispatch+combine"


@dataclass(frozen=True)
class Value:
    """One measured number: a ratio, or in the unit that the name says."""

    name: str
    ranks: int
    config: str
    value: float


@dataclass(frozen=True)
class Results:
    """All that a run has measured."""

    points: list[tuple[Point, Samples]] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)


@dataclass(frozen=True)
class Summary:
    """One competitor in one stage, against the baseline."""

    seconds: float  # median
    ratio: float  # median over repetitions of competitor / baseline
    ratio_min: float
    ratio_max: float


def with_totals(samples: Samples) -> Samples:
    """Put sums per repetition in front of the stages: of dispatch and combine, and of all of them."""
    totals: Samples = {}
    for name, stages in samples.items():
        totals[name] = {}
        for summed in (TOTAL.split("+"), list(stages)):
            totals[name]["+".join(summed)] = [sum(times) for times in zip(*(stages[s] for s in summed), strict=True)]
        totals[name] |= stages
    return totals


def paired(samples: Samples, name: str, baseline: str, stage: str) -> Summary:
    """A competitor's time in a stage, and its ratio to the baseline's in the same repetition."""
    times = samples[name][stage]
    ratios = [t / b for t, b in zip(times, samples[baseline][stage], strict=True)]
    return Summary(median(times), median(ratios), min(ratios), max(ratios))


def summarize(samples: Samples, baseline: str) -> dict[str, dict[str, Summary]]:
    """Of every competitor and stage."""
    return {name: {stage: paired(samples, name, baseline, stage) for stage in samples[name]} for name in samples}


def table(summary: dict[str, dict[str, Summary]], baseline: str) -> str:
    """One line per stage and competitor: the median time, the median paired ratio and its spread."""
    width = max(map(len, summary))
    lines = [f"  {'':{width}}  {'median ms':>10}  {'/ ' + baseline:>17}  {'min – max':>17}"]
    for stage in summary[baseline]:
        lines.append(f"  {stage}")
        for name, stages in summary.items():
            s = stages[stage]
            line = f"  {name:{width}}  {s.seconds * 1e3:10.3f}"
            if name != baseline:
                line += f"  {s.ratio:17.2f}  {s.ratio_min:7.2f} – {s.ratio_max:7.2f}"
            lines.append(line)
    return "\n".join(lines)
