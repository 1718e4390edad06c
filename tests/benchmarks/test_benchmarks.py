"""The benchmarks: every competitor computes what it should, the report says what the samples say."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import ep, goals
from benchmarks.dispatchers import COPY, DEEP_EP, GLOO, GLOO_TUNED, MPI, MPI_MERGED, NAMES
from benchmarks.points import Point
from benchmarks.rank import with_mpirun
from benchmarks.report import TOTAL, Results, Value

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_smallest_run(tmp_path: Path) -> None:
    """Competitors are checked against expected values before they are timed; a wrong one fails the run."""
    sizes = {"ranks": "2", "tokens": "16", "hidden": "72", "topk": "3", "experts": "6", "dtype": "fp16"}
    options = [word for name, size in sizes.items() for word in (f"--{name}", size)]
    options += ["--mode", "normal", "low_latency", "--seconds", "0.001", "--out", str(tmp_path)]
    command = [sys.executable, "-m", "benchmarks.ep", *options]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    document = json.loads((tmp_path / "results.json").read_text())
    assert set(document) == {"environment", "points", "left_out", "values", "goals"}
    assert document["left_out"] == []
    competitors = {DEEP_EP, "deep_ep.alltoall", GLOO, "gloo.lowp", GLOO_TUNED, COPY, "write+read"}
    assert set(NAMES) == competitors | {MPI, MPI_MERGED}
    competitors |= {MPI, MPI_MERGED} if with_mpirun() else set()
    assert [record["point"]["mode"] for record in document["points"]] == ["normal", "low_latency"]
    for record in document["points"]:
        assert Point(**record["point"] | {"only": ()}).tokens == 16
        assert set(record["samples"]) == competitors
        for stages in record["samples"].values():
            assert stages[TOTAL] == [d + c for d, c in zip(stages["dispatch"], stages["combine"], strict=True)]
            assert len(stages[TOTAL]) == 7 and min(stages["dispatch"] + stages["combine"]) > 0
    assert [goal["title"] for goal in document["goals"]] == [goal.title.strip() for goal in goals.GOALS]
    assert (tmp_path / "results.png").stat().st_size > 0


def test_goals_take_paired_medians() -> None:
    def samples(**seconds: list[float]) -> dict[str, dict[str, list[float]]]:
        return {name.replace("_ep", "_ep.default"): {TOTAL: times} for name, times in seconds.items()}

    point, other = Point(2), Point(4, hidden=7168)
    results = Results(
        [
            (point, samples(deep_ep=[1.0, 2.0, 4.0], gloo=[20.0, 20.0, 200.0], memcpy=[2.0, 2.0, 2.0])),
            (other, samples(deep_ep=[1.0, 1.0, 1.0], gloo=[40.0, 10.0, 40.0])),
        ],
        [Value("eager call, µs", 1, "x", 30.0)],
    )
    by_title = {goal.title: goal for goal in goals.GOALS}
    gloo = by_title["T ≥ 1024, K=8, bf16: gloo as written / deep_ep"]
    assert [(value.ranks, value.value) for value in gloo.values(results)] == [(2, 20.0), (4, 40.0)]
    assert gloo.worst(gloo.values(results)).config == str(point)
    assert [verdict(gloo, value) for value in (30, 29, 14)] == ["goal", "floor", "below"]
    eager = by_title["eager call of dispatch, R=1, T=1"]
    assert eager.verdict(eager.values(results)) == "floor"
    (line,) = (line for line in goals.table(results).splitlines() if line.startswith(gloo.title))
    assert "28.28" in line and line.endswith(f"floor  20.00 at {point}")


def verdict(goal: goals.Goal, *values: float) -> str:
    return goal.verdict([Value(DEEP_EP, 2, "x", value) for value in values])


def test_a_floor_may_hold_for_each_configuration() -> None:
    few = next(goal for goal in goals.GOALS if goal.title.startswith("T = 16, 64, 256"))
    assert [verdict(few, 2.0, worst) for worst in (0.86, 0.84)] == ["goal", "below"]
    assert verdict(few, 1.0, 0.9) == "floor"
    of_mean = replace(few, floor_of_each=False)
    assert verdict(of_mean, 2.0, 0.84) == "goal"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--repeats", "3"], "--repeats must be at least 7, got 3"),
        (["--ranks", "3"], "--experts must be a multiple of --ranks, got 64 and 3"),
        (["--topk", "65"], "--topk must be in 1..64 (--experts), got 65"),
        (["--mode", "low_latency", "--rows", "rank"], "--mode low_latency has --rows expert only"),
        (["--only", "gloo"], "--only must name deep_ep.default, with which others are compared, got gloo"),
        (["--only", "glue"], "argument --only: invalid choice: 'glue'"),
    ],
)
def test_options_that_cannot_be(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        ep.parse(arguments)
    assert said in capsys.readouterr().err


def test_what_does_not_fit_is_left_out() -> None:
    small, large = Point(4), Point(4, tokens=4096, hidden=7168)
    available = 16 << 30
    fit, others = ep.fitting([large, small], available)
    assert fit == [small]
    (said,) = others
    assert said == f"{large}: takes about 22 GiB of memory, 16 GiB are available"
    # deep_ep alone takes less than half of it.
    alone = replace(large, only=(DEEP_EP,))
    assert ep.fitting([alone], available) == ([alone], [])
    # In low latency a rank has room for all rows of all ranks.
    padded = replace(small, mode="low_latency", tokens=4096)
    assert padded.payload == 4 * replace(padded, mode="normal").payload


def test_nothing_fits(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """No ranks are started for it."""
    monkeypatch.setattr(ep, "available_bytes", lambda: 0)
    monkeypatch.delattr(ep, "run")
    with pytest.raises(SystemExit, match="nothing of what was asked for fits into memory"):
        ep.main(["--ranks", "2", "4"])
    assert capsys.readouterr().out.count("left out: ") == 2
