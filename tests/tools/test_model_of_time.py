"""The model of time by itself: its page, its errors, and that it goes the right way."""

import itertools
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tools.twin import __main__ as command
from tools.twin import model
from tools.twin.model import FITTED, HELD_OUT, OPS, SOCS, Point, Sizes, error, fit, op_time

DOCS = Path(__file__).parents[2] / "docs"
SIZES = Sizes(8, 128, 7168, 8, 256)


def test_page_has_the_tables() -> None:
    page = (DOCS / "time_model.md").read_text()
    assert model.with_tables(page) == page, 'make time-model ARGS="--write docs"'


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command.main(["model"])
    printed = capsys.readouterr().out
    assert all(table() in printed for table in model.TABLES.values())
    page = (DOCS / "time_model.md").read_text()
    (tmp_path / "time_model.md").write_text(page.replace(model.parts(), "an old table"))
    command.main(["model", "--write", str(tmp_path)])
    assert (tmp_path / "time_model.md").read_text() == page
    assert (tmp_path / "time_model.svg").exists()


def test_plot(tmp_path: Path) -> None:
    model.plot(tmp_path / "plot.svg")
    texts = [
        re.findall(r">([^<>]+)</text>", path.read_text()) for path in (tmp_path / "plot.svg", DOCS / "time_model.svg")
    ]
    assert texts[0] == texts[1]
    assert {"low_latency_dispatch_int8", "low_latency_combine", "dispatch", "combine"} <= set(texts[0])


def test_errors() -> None:
    """What docs/time_model.md says of them, and that no point is on both sides."""
    assert not set(FITTED) & set(HELD_OUT)

    def largest(points: list[Point]) -> float:
        return max(abs(error(point, fit())) for point in points)

    assert largest(FITTED) < 0.09
    assert largest([point for point in HELD_OUT if point.soc == "A3"]) == pytest.approx(0.16, abs=0.005)
    a2 = [error(point, fit()) for point in HELD_OUT if point.soc == "A2"]
    assert max(a2) < 0
    assert min(a2) == pytest.approx(-0.37, abs=0.005)


def test_fit_is_the_best_nearby() -> None:
    for name, factor in itertools.product(fit()._fields, (0.98, 1.02)):
        other = fit()._replace(**{name: getattr(fit(), name) * factor})
        assert sum(math.log1p(error(point, other)) ** 2 for point in FITTED) > sum(
            math.log1p(error(point, fit())) ** 2 for point in FITTED
        ), name


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("soc", SOCS)
def test_more_takes_longer(op: str, soc: str) -> None:
    for name, values in {"T": (1, 47, 128, 129, 4096), "H": (256, 1024, 7168, 8192), "K": (1, 2, 8)}.items():
        given = [replace(SIZES, cores=SOCS[soc].cores, **{name: value}) for value in values]
        times = [op_time(op, SOCS[soc], s, fit()) for s in given]
        assert times == sorted(times), name
        assert all(time > model.roof(op, SOCS[soc], s) for time, s in zip(times, given, strict=True))


def test_uniform_routing() -> None:
    """By counting all sets of K experts."""
    s = Sizes(4, 10, 8, 3, 8)
    sets = list(itertools.combinations(range(s.E), s.K))
    ranks = sum(len({expert // s.L for expert in chosen}) for chosen in sets) / len(sets)
    far = sum(len({expert // s.L for expert in chosen} - {0}) for chosen in sets) / len(sets)
    routing = s.uniform()
    assert (routing.sent, routing.sent_far, routing.rows) == pytest.approx((s.T * ranks, s.T * far, s.T * s.K))


def test_rounds_are_as_long_as_slots_allow() -> None:
    """Each token goes to the ranks of a set."""
    of = model.Rounds.of
    # All to one rank: what a slot has room for. All are counted at first, then twice as many as in the round before.
    assert of([{3}] * 16, 4) == ((4, 4, 4, 4), (16, 4, 8, 4, 8, 4, 4), (16, 8, 8))
    assert of([{t % 4} for t in range(40)], 5) == ((20, 20), (40, 20, 20), (40,))  # in turn
    assert of([{t % 4, (t + 1) % 4} for t in range(40)], 5).tokens == (9, 9, 9, 9, 4)
    assert of([{0}] * 2 + [{t % 4} for t in range(40)], 2).tokens == (2, 4, 8, 8, 8, 8, 4)  # no longer than twice
    assert of([{0}, set(), set(), {0}, {1}, {0}], 1).tokens == (3, 2, 1)
    assert of([set()] * 9, 1) == ((9,), (9,), ())
    assert of([], 3) == ((0,), (0,), ())
    assert of([{0}] * 3, 2).until(4) == ((2, 1, 0, 0), (3, 2, 1, 0, 0), (3,))


def test_rounds_of_the_tables() -> None:
    """With a slot for each token there is one round; else no more than fit nearly always."""
    assert replace(SIZES, slot_tokens=128).uniform_rounds() == ((128,), (128,), ())
    assert SIZES.uniform_rounds() == ((128,), (128,), ())
    all_hit = replace(SIZES, K=8, E=8, slot_tokens=32)  # each token goes to all ranks
    assert all_hit.uniform_rounds().tokens == (32, 32, 32, 32)
    s = replace(SIZES, R=2, E=2, K=1, T=100, slot_tokens=3)
    # Of 4 tokens all go to one rank with a chance of 1/8, and so do 4 of 3 with none.
    assert s.uniform_rounds().tokens[0] == 3


@pytest.mark.parametrize("op", model.NORMAL)
def test_rounds_take_little_time(op: str) -> None:
    for R in model.EPS:
        soc = SOCS["A3"]
        one = op_time(op, soc, model.sizes(op, soc, R), fit())
        assert model.in_default_window(op, soc, R, fit())[1] <= 1.15 * one, R


def test_links() -> None:
    a3, a5 = SOCS["A3"], SOCS["A5"]
    assert model.link_time(a3, 2, 224e9, 1.0) == pytest.approx(1)  # the other die alone
    assert model.link_time(a3, 8, 7 * 196e9, 0.5) == pytest.approx(12)  # 6 of 7 ranks are beyond it
    assert model.link_time(a5, 8, 840e9, 1.0) == pytest.approx(1)
    assert model.link_time(a5, 128, 127 * 224e9, 1.0) == pytest.approx(64)  # beyond 64 ranks


@pytest.mark.slow
def test_deep_ep_does_not_import_it() -> None:
    program = "import sys, deep_ep; sys.exit('tools' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
