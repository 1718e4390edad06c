"""The harness itself: a failure on a rank must never pass unseen or stop the session."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import (
    WORLD_SIZE,
    RankContext,
    RankDied,
    RankError,
    RankHung,
    RankPool,
    raise_failures,
    spawn_ranks,
    vector_units,
)


def sum_of_ranks(ctx: RankContext) -> int:
    total = torch.tensor(ctx.rank)
    dist.all_reduce(total, group=ctx.group)
    return int(total)


def fail(ctx: RankContext) -> None:
    if ctx.rank > 0:
        raise ValueError(f"bad value on rank {ctx.rank}")


def wait_for_rank_0(ctx: RankContext) -> None:
    if ctx.rank > 0:
        ctx.store.get("a key that nobody sets")


def die(ctx: RankContext) -> None:
    if ctx.rank == 1:
        os.kill(os.getpid(), signal.SIGSEGV)


def wait_for_a_signal(ctx: RankContext) -> int:
    ctx.store.set(f"rank {ctx.rank} waits", "")
    if ctx.rank == 1:
        signal.pause()
    return os.getpid()


def make_world_twice(ctx: RankContext) -> list[int]:
    ctx.init_process_group()
    before = sum_of_ranks(ctx)
    dist.destroy_process_group()
    ctx.init_process_group()
    return [before, sum_of_ranks(ctx)]


@pytest.mark.parametrize("R", [1, 2, 3, 4])
def test_results_by_rank(pool: RankPool, R: int) -> None:
    assert pool.run(R, sum_of_ranks) == [R * (R - 1) // 2] * R


def test_failures_of_all_ranks_are_told(pool: RankPool) -> None:
    with pytest.raises(RankError, match=r"(?s)bad value on rank 1.*bad value on rank 2") as raised:
        pool.run(3, fail)
    assert [type(error) for error in raised.value.exceptions] == [type(None), ValueError, ValueError]
    errors = pool.run(3, fail, expect_errors=True)
    assert [str(error) for error in errors] == ["None", "bad value on rank 1", "bad value on rank 2"]


def find_something_wrong(ctx: RankContext) -> str | None:
    wait_for_rank_0(ctx)
    return "wrong"


def test_nobody_waits_long_for_a_rank_that_has_found_something_wrong(pool: RankPool) -> None:
    with pytest.raises(RankError) as raised:
        pool.run(3, find_something_wrong, timeout=float("inf"), is_wrong=bool)
    assert [type(error) for error in raised.value.exceptions] == [type(None), RankHung, RankHung]


def make_group(ctx: RankContext) -> None:
    dist.new_group(list(range(ctx.size)))


def test_all_ranks_of_a_pool_give_groups_the_same_names(pool: RankPool) -> None:
    pool.run(WORLD_SIZE, make_group)
    with pytest.raises(RankError, match="must be made on all ranks of the pool"):
        pool.run(2, make_group)


@pytest.mark.slow
@pytest.mark.parametrize("expect_errors", [False, True])
def test_a_hang_is_a_failure_that_shows_the_stack(pool: RankPool, expect_errors: bool) -> None:
    with pytest.raises(RankError, match=r"(?s)rank 1.*in wait_for_rank_0.*rank 2.*in wait_for_rank_0") as raised:
        pool.run(3, wait_for_rank_0, expect_errors=expect_errors, timeout=1.0)
    assert [type(error) for error in raised.value.exceptions] == [type(None), RankHung, RankHung]
    assert pool.run(2, sum_of_ranks) == [1, 1]


def stopped(ctx: RankContext) -> int:
    """Rank 1 stands still, and rank 0 waits for it, for longer than ranks may that wait for nobody."""
    if ctx.rank == 1:
        ctx.store.set("stops", str(os.getpid()))
        os.kill(os.getpid(), signal.SIGSTOP)
    else:
        pid = int(ctx.store.get("stops"))
        while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
            os.sched_yield()
        time.sleep(2.0)
        os.kill(pid, signal.SIGCONT)
    return ctx.rank


@pytest.mark.slow
def test_a_rank_that_is_kept_from_work_is_none() -> None:
    with spawn_ranks(2, stopped, init=False) as ranks:
        outcomes = ranks.outcomes(timeout=1.0)
    raise_failures(outcomes)
    assert [outcome.value for outcome in outcomes] == [0, 1]


def with_vector_units(ctx: RankContext) -> list[bool]:
    """Whether there are any before, meanwhile and afterwards."""
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    found = [bool(pick_vec_isa())]
    with vector_units():
        found.append(bool(pick_vec_isa()))
    return [*found, bool(pick_vec_isa())]


@pytest.mark.slow
def test_vector_units_are_there_for_ranks_that_have_compiled_without(pool: RankPool) -> None:
    assert pool.run(2, with_vector_units) == [[False, True, False]] * 2


def test_a_dead_rank_is_a_failure(pool: RankPool) -> None:
    with pytest.raises(RankError, match="in die") as raised:
        pool.run(2, die)
    assert [type(error) for error in raised.value.exceptions] == [type(None), RankDied]


def test_spawned_ranks_can_be_killed() -> None:
    with spawn_ranks(2, wait_for_a_signal) as ranks:
        ranks.wait_for("rank 1 waits")
        ranks.kill(1)
        survivor, victim = ranks.outcomes()
    assert survivor.value == ranks.pids[0]
    assert isinstance(victim.exception, RankDied)
    assert "exit code -9" in str(victim.exception)


def test_who_waits_for_a_key_hears_of_failures() -> None:
    with spawn_ranks(2, fail, init=False) as ranks, pytest.raises(RankError, match="bad value on rank 1"):
        ranks.wait_for("a key that nobody sets")


def test_spawned_ranks_can_make_world_again() -> None:
    with spawn_ranks(3, make_world_twice, init=False) as ranks:
        outcomes = ranks.outcomes()
    raise_failures(outcomes)
    assert [outcome.value for outcome in outcomes] == [[3, 3]] * 3
