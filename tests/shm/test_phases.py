"""deep_ep.debug.phases: where the time of ops goes, and the profiler's names of them."""

import time

import pytest
import torch
import torch.distributed as dist
from patience import pace
from ranks import RankContext, RankPool
from test_liveness import Entries
from torch.profiler import ProfilerActivity, profile

import deep_ep
from deep_ep.debug import phases

T, H, K, E = 64, 256, 2, 4


def check_phases(ctx: RankContext, late: float) -> None:
    group = ctx.prepared_group("default")
    before = phases(group)
    generator = torch.Generator().manual_seed(ctx.rank)
    x, ids = torch.randn(T, H, generator=generator), torch.randint(E, (T, K), generator=generator)
    seconds = 0.0
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for call in range(2):
            entries = Entries(group)
            dist.barrier(ctx.group)
            if ctx.rank == 1 and call == 0:
                entries.wait_for(1)
                time.sleep(late)
            begin = time.perf_counter()
            out = deep_ep.dispatch(x, ids, num_experts=E, group=group)
            seconds += time.perf_counter() - begin
        deep_ep.combine(out.recv_x, out.handle, group=group)
    spent = {
        op: {name: value - before.get(op, {}).get(name, 0) for name, value in values.items()}
        for op, values in phases(group).items()
    }
    assert (spent["dispatch"].pop("calls"), spent["combine"].pop("calls")) == (2, 1)
    assert spent["dispatch"].keys() == {"counts", "wait", "allocate", "copy", "reduce", "finish"}
    assert all(value >= 0 for value in spent["dispatch"].values())
    assert 0 < sum(spent["dispatch"].values()) <= seconds
    assert all(spent["dispatch"][phase] > 0 for phase in ("counts", "allocate", "copy"))
    assert spent["combine"]["reduce"] > 0
    assert ctx.rank == 1 or spent["dispatch"]["wait"] >= 0.9 * late
    names = {event.key for event in profiler.key_averages()}
    assert names >= {"deep_ep::dispatch", "deep_ep::combine"}


def test_phases(pool: RankPool) -> None:
    pool.run(2, check_phases, 0.3 * pace())


def check_little_goes_away(ctx: RankContext) -> None:
    """3 MB of rows of which half stay: what goes away is attached to what ranks meet with, and nothing is exchanged."""
    group = ctx.prepared_group("default")
    x = torch.randn(T, 6144, generator=torch.Generator().manual_seed(ctx.rank))
    ids = torch.tensor([[0, 2], [3, 1]]).repeat(T // 2, 1)
    out = deep_ep.dispatch(x, ids, num_experts=E, group=group)
    before = phases(group).get("combine", {}).get("copy", 0.0)
    assert torch.equal(deep_ep.combine(out.recv_x, out.handle, group=group), 2 * x)
    assert phases(group)["combine"]["copy"] == before


def test_little_goes_away(pool: RankPool) -> None:
    pool.run(2, check_little_goes_away)


def check_alltoall(ctx: RankContext) -> None:
    with pytest.raises(RuntimeError, match="alltoall keeps neither log nor times"):
        phases(ctx.prepared_group("alltoall"))


def test_no_windows_no_phases(pool: RankPool) -> None:
    pool.run(1, check_alltoall)
