"""What calls take of the host's memory, what they leave in it, and what they give back.

M num_max_dispatch_tokens_per_rank · T local tokens · H hidden · K top-k · E experts · R ranks · N rows of recv_x.
"""

import ctypes
import gc
import os
import re
import resource

import pytest
import torch
import torch.distributed as dist
from cases import Case
from op_calls import check_ops, error_of
from ranks import RankContext, RankPool, raise_failures, spawn_ranks

import deep_ep
from deep_ep import groups
from deep_ep._library import library

SMALL = 1 << 20  # bytes, the smallest window
CASES = {R: Case((5, 0, 7, 3)[:R], seed=R) for R in (1, 2, 3, 4)}
ATTACHMENTS = 4 << 20  # bytes that a window may have for what goes with posts
MCL_CURRENT_AND_FUTURE = 3


def reserved(group: dist.ProcessGroup) -> int:
    """Bytes of memory that this rank's window has."""
    windows = groups._parts[group.group_name]["cpu"]
    return os.fstat(library.deep_ep_group_fd(windows._handle)).st_blocks * 512


def private() -> int:
    """Bytes of memory that this process has for itself."""
    gc.collect()
    with open("/proc/self/status") as status:
        (anonymous,) = (int(line.split()[1]) << 10 for line in status if line.startswith("RssAnon"))
    return anonymous


def sweep() -> None:
    """As if nobody had called anything for a long time."""
    for _ in range(3):
        library.deep_ep_sweep()


# Rows that hold nothing


def with_locked_memory(ctx: RankContext) -> None:
    M, H, K, E = 64, 512, 2, 2 * ctx.size
    deep_ep.init(ctx.group, num_bytes=SMALL)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mlockall(MCL_CURRENT_AND_FUTURE) != 0:
        raise OSError(ctypes.get_errno(), "mlockall")
    generator = torch.Generator().manual_seed(ctx.rank)
    for i in range(12):
        T = int(torch.randint(M + 1, (), generator=generator))
        ids = (torch.arange(K) + i % 2 * K).expand(T, K).contiguous()
        x = torch.full((T, H), 1.0 + i)
        recv_x, counts, handle = deep_ep.low_latency_dispatch(x, ids, M, E, group=ctx.group)
        received = int(counts.sum())
        rows = recv_x.view(-1, H)
        assert rows[:received].eq(1.0 + i).all()
        assert rows[received:].eq(0.0).all(), f"{int(rows[received:].ne(0).any(1).sum())} of {len(rows) - received}"
        del recv_x, rows, handle
    deep_ep.destroy(ctx.group)


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root may lock so much")
def test_rows_behind_are_zeros_in_locked_memory() -> None:
    with spawn_ranks(2, with_locked_memory) as ranks:
        raise_failures(ranks.outcomes())


# Memory that is not in use


def vary(ctx: RankContext) -> None:
    """Calls with ever other numbers of tokens, and then none."""
    gc.freeze()  # the collector need not look at all of torch every time
    group, H, most = ctx.group, 1024, 4096
    deep_ep.init(group)
    generator = torch.Generator().manual_seed(0)
    x = torch.ones(most, H)
    ids = torch.zeros(most, 1, dtype=torch.int64) + ctx.rank
    check_ops(CASES[ctx.size], ctx.rank, group.group_name, "default")
    empty, before = reserved(group), private()
    grown = 0
    for T in torch.randint(most // 4, most, (60,), generator=generator).tolist():
        received = deep_ep.dispatch(x[:T], ids[:T], num_experts=ctx.size, group=group)
        out = deep_ep.combine(received.recv_x, received.handle, group=group)
        grown = max(grown, private() - before)
    assert grown < 3 * x.nbytes, f"{grown >> 20} MiB"
    window = reserved(group) - empty
    assert window < 4 * x.nbytes, f"{window >> 20} MiB"
    del received, out
    sweep()
    assert reserved(group) <= empty and private() - before < x.nbytes // 4
    # Both come again.
    received = deep_ep.dispatch(x, ids, num_experts=ctx.size, group=group)
    assert deep_ep.combine(received.recv_x, received.handle, group=group).eq(1.0).all()
    deep_ep.destroy(group)


@pytest.mark.slow
def test_memory_that_is_not_used_goes_back() -> None:
    with spawn_ranks(2, vary) as ranks:
        raise_failures(ranks.outcomes())


def keep_some(ctx: RankContext) -> None:
    """What goes back is memory between rows that are alive, and not theirs."""
    group, H, T = ctx.group, 512, 1024
    deep_ep.init(group)
    ids = torch.zeros(T, 1, dtype=torch.int64) + ctx.rank
    received = [
        deep_ep.dispatch(torch.full((T, H), float(i)), ids, num_experts=ctx.size, group=group).recv_x for i in range(12)
    ]
    full = reserved(group)
    kept = {i: received[i] for i in (2, 7, 11)}
    size = received[0].nbytes
    del received
    sweep()
    assert reserved(group) < full - 6 * size
    for i, recv_x in kept.items():
        assert recv_x.shape == (T, H) and recv_x.eq(float(i)).all()
    more = [
        deep_ep.dispatch(torch.full((T, H), float(-i)), ids, num_experts=ctx.size, group=group).recv_x
        for i in range(12)
    ]
    for i, recv_x in (*kept.items(), *((-i, recv_x) for i, recv_x in enumerate(more))):
        assert recv_x.eq(float(i)).all()
    deep_ep.destroy(group)


@pytest.mark.slow
def test_memory_between_rows_goes_back(pool: RankPool) -> None:
    pool.run(2, keep_some)


# Calls that are refused


def low_latency(ctx: RankContext, M: int) -> tuple[str, str]:
    x, ids = torch.ones(3, 64), torch.zeros(3, 1, dtype=torch.int64)
    return error_of(deep_ep.low_latency_dispatch, x, ids, M, ctx.size, group=ctx.group)


def available() -> int:
    with open("/proc/meminfo") as file:
        (kilobytes,) = (int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
    return kilobytes << 10


def normal(ctx: RankContext, share: float) -> tuple[str, str]:
    """Asks for as many rows as that share of the memory that is available has room for."""
    H, E = 1024, ctx.size
    x, ids = torch.ones(3, H), torch.zeros(3, 1, dtype=torch.int64)
    W = int(share * available() / (4 * H + 24)) if share else 8
    return error_of(deep_ep.dispatch, x, ids, num_experts=E, num_worst_tokens=W, group=ctx.group)


def refused(ctx: RankContext, how: str) -> tuple[str, str]:
    group, last = ctx.group, ctx.rank == ctx.size - 1
    deep_ep.init(group)
    check_ops(CASES[ctx.size], ctx.rank, group.group_name, "default")
    before = reserved(group)
    dist.barrier(group)  # all have what they need of this
    if how == "M differs":
        error = low_latency(ctx, 1 << 20 if last else 8)
    elif how == "M":
        error = low_latency(ctx, (1 << 30) // ctx.size if last else 8)
    else:
        error = normal(ctx, {"together": 0.7, "one": 1.5 * last}[how])
    assert reserved(group) <= before + ATTACHMENTS
    check_ops(CASES[ctx.size], ctx.rank, group.group_name, "default")
    deep_ep.destroy(group)
    return error


@pytest.mark.parametrize(
    "how, says",
    [
        ("M differs", "num_max_dispatch_tokens_per_rank must be the same on all ranks"),
        ("M", "num_max_dispatch_tokens_per_rank"),
        ("together", r"the host has too little memory, \d+ bytes: rank 0 makes room for .* with num_worst_tokens"),
        ("one", r"the host has too little memory, .* rank 1 makes room for .* with num_worst_tokens"),
    ],
)
def test_refused_before_anything_is_taken(pool: RankPool, how: str, says: str) -> None:
    for kind, message in pool.run(2, refused, how):
        assert kind == "RuntimeError"
        assert re.search(says, message), message


def with_little_address_space(ctx: RankContext) -> tuple[str, str]:
    """Rank 1 may have no memory for the rows that it receives, and cannot know before."""
    deep_ep.init(ctx.group, num_bytes=SMALL)
    check_ops(CASES[ctx.size], ctx.rank, ctx.group.group_name, "default")
    x, ids = torch.ones(20_000, 1024), torch.ones(20_000, 1, dtype=torch.int64)
    if ctx.rank == 1:
        x, ids = x[:0], ids[:0]
        with open("/proc/self/statm") as file:
            pages = int(file.read().split()[0])
        limit = pages * os.sysconf("SC_PAGESIZE") + x.element_size() * 8 * 1024**2
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    return error_of(deep_ep.dispatch, x, ids, num_experts=2, group=ctx.group)


@pytest.mark.slow
def test_peers_hear_that_there_was_no_memory() -> None:
    with spawn_ranks(2, with_little_address_space) as ranks:
        outcomes = ranks.outcomes()
    raise_failures(outcomes)
    for outcome in outcomes:
        kind, message = outcome.value
        assert kind == "RuntimeError"
        assert re.search(r"rank 1 failed in the middle of the operation: cannot allocate \d+ bytes", message), message
