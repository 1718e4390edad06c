"""The example: four ranks train the model that one rank with all experts trains."""

from typing import Any

import pytest
import torch
from ranks import STRATEGIES, RankContext, RankPool, vector_units
from train_moe import Config, train

SMALL = {"steps": 20, "batch": 8, "seq": 32, "dim": 32, "quiet": True}


def run(ctx: RankContext, options: dict[str, Any]) -> dict[str, Any]:
    with vector_units():
        metrics = train(Config(**SMALL, **options), ctx.group)
    torch.set_num_threads(1)
    return metrics


@pytest.fixture(scope="module")
def one_rank(pool: RankPool) -> dict[str, Any]:
    [metrics] = pool.run(1, run, {"compile": "none"})
    assert metrics["losses"][-1] < metrics["losses"][0] - 0.5
    return metrics


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("backend", ["none", "aot_eager", "inductor"])
def test_four_ranks_train_as_one(pool: RankPool, one_rank: dict[str, Any], backend: str, strategy: str) -> None:
    of_ranks = pool.run(4, run, {"compile": backend, "strategy": strategy})
    losses = [metrics["losses"] for metrics in of_ranks]
    for metrics in of_ranks:
        torch.testing.assert_close(
            metrics["losses"], one_rank["losses"], rtol=1e-4, atol=0, msg=lambda text: f"{text}\nby rank: {losses}"
        )
        torch.testing.assert_close(metrics["held_out_loss"], one_rank["held_out_loss"], rtol=1e-4, atol=0)
        assert (metrics["graphs"], metrics["graph_breaks"]) == (0 if backend == "none" else 1, 0)
        if backend != "none":
            suffixes = {"forward": "", "backward": "_backward"}
            assert metrics["overloads"] == {
                direction: [f"deep_ep.{op}{suffix}.{strategy}" for op in ("combine", "dispatch")]
                for direction, suffix in suffixes.items()
            }


@pytest.mark.slow
def test_rows_that_do_not_fit_are_counted(pool: RankPool) -> None:
    for metrics in pool.run(2, run, {"compile": "aot_eager", "num_worst_tokens": 200}):
        assert metrics["graphs"] == 1
        assert metrics["num_dropped"] > 0
        assert metrics["losses"][-1] < metrics["losses"][0]
