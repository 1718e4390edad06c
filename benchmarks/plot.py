"""Time over T, and how near it is to the time of copying the payload."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import median

from matplotlib.figure import Figure

from benchmarks.dispatchers import COPY
from benchmarks.points import Point
from benchmarks.report import TOTAL, Results, Samples


def plot(results: Results, file: Path) -> None:
    """A row of two panels for each configuration that memcpy was measured in: milliseconds of dispatch and combine, and
    bandwidth as a fraction of memcpy's, over T.
    """
    rows: dict[Point, dict[int, Samples]] = {}
    for point, samples in results.points:
        if COPY in samples:
            rows.setdefault(replace(point, tokens=0), {})[point.tokens] = samples
    if not rows:
        return
    figure = Figure(figsize=(11, 3 * len(rows)), layout="constrained")
    panels = figure.subplots(len(rows), 2, squeeze=False)
    for (left, right), (point, by_tokens) in zip(panels, rows.items(), strict=True):
        tokens = sorted(by_tokens)
        for name in by_tokens[tokens[0]]:
            seconds = [median(by_tokens[T][name][TOTAL]) for T in tokens]
            of_copies = [median(by_tokens[T][COPY][TOTAL]) / s for T, s in zip(tokens, seconds, strict=True)]
            left.plot(tokens, [s * 1e3 for s in seconds], marker=".", label=name)
            right.plot(tokens, of_copies, marker=".", label=name)
        for panel in (left, right):
            panel.set_xscale("log")
            panel.set_xticks(tokens, [str(T) for T in tokens])
            panel.set_xticks([], minor=True)
        left.set(yscale="log", xlabel="T", ylabel="dispatch + combine, ms")
        left.set_title(str(point).replace(" T=0", ""), fontsize="medium")
        right.set(xlabel="T", ylabel="bandwidth / memcpy's", ylim=(0, None))
        left.legend(fontsize="x-small")
    figure.savefig(file, dpi=100)
