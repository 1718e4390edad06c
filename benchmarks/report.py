"""Paired statistics of interleaved repetitions, and their table."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from statistics import median

Samples = dict[str, dict[str, list[float]]]
"""Seconds by competitor and stage; position i of every list belongs to repetition i."""

TOTAL = "dispatch+combine"


@dataclass(frozen=True)
class Summary:
    """One competitor in one stage, against the baseline."""

    seconds: float  # median
    ratio: float  # median over repetitions of baseline / competitor
    ratio_min: float
    ratio_max: float


def with_totals(samples: Samples) -> Samples:
    """Put sums per repetition in front of the stages: of dispatch and combine, and of all of them."""
    totals: Samples = {}
    for name, stages in samples.items():
        totals[name] = {TOTAL: [d + c for d, c in zip(stages["dispatch"], stages["combine"], strict=True)]}
        if len(stages) > 2:
            totals[name]["+".join(stages)] = [sum(times) for times in zip(*stages.values(), strict=True)]
        totals[name] |= stages
    return totals


def summarize(samples: Samples, baseline: str) -> dict[str, dict[str, Summary]]:
    """Medians and paired ratios baseline / competitor of every competitor and stage."""
    summary: dict[str, dict[str, Summary]] = {}
    for name, stages in samples.items():
        summary[name] = {}
        for stage, times in stages.items():
            ratios = [b / t for b, t in zip(samples[baseline][stage], times, strict=True)]
            summary[name][stage] = Summary(median(times), median(ratios), min(ratios), max(ratios))
    return summary


def table(summary: dict[str, dict[str, Summary]], baseline: str) -> str:
    """One line per stage and competitor: the median time, the median paired ratio and its spread."""
    width = max(map(len, summary))
    lines = [f"  {'':{width}}  {'median ms':>10}  {baseline + ' / it':>12}  {'min – max':>17}"]
    for stage in summary[baseline]:
        lines.append(f"  {stage}")
        for name, stages in summary.items():
            s = stages[stage]
            line = f"  {name:{width}}  {s.seconds * 1e3:10.3f}"
            if name != baseline:
                line += f"  {s.ratio:12.2f}  {s.ratio_min:7.2f} – {s.ratio_max:7.2f}"
            lines.append(line)
    return "\n".join(lines)


def as_json(summary: dict[str, dict[str, Summary]]) -> dict[str, dict[str, dict[str, float]]]:
    """The summary as plain dictionaries."""
    return {name: {stage: asdict(s) for stage, s in stages.items()} for name, stages in summary.items()}
