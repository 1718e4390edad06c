"""The AscendC kernels of ops/, executed on the twin by several ranks of several cores each, against the reference.

T local tokens, H hidden, K top-k, E experts, R ranks, L = E/R local experts, M num_max_dispatch_tokens_per_rank,
N = R·M·min(K, L) packed rows.
"""

import os
import signal
import threading
import uuid
from dataclasses import replace
from typing import Any

import probes
import pytest
import reference
import torch
from cases import Case, assert_same
from hypothesis import given
from hypothesis import strategies as st
from ranks import RankContext, RankDied, RankPool, raise_failures, spawn_ranks
from torch import Tensor

from tools.twin import kernels as twin_kernels
from tools.twin.kernels import A2, ARCHS, VECTOR_CORES, Group, Setup, Twin

pytestmark = pytest.mark.torch_npu

SIZES = (2, 4, 8)
CORES = (2, 3, 5, 8)
SEEDS = (None, *range(8))
"""None is fast mode."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SETUPS = [Setup(arch, 3, seed) for arch in ARCHS for seed in (None, 0, 1, 2, 3, 4)]

_SESSION = uuid.uuid4().hex
_groups: dict[int, Group] = {}


def check(ctx: RankContext, session: str, case: Case, M: int, setup: Setup) -> None:
    """On windows that launches of all kinds have used before."""
    if ctx.size not in _groups:
        twin = Twin(twin_kernels.build())
        _groups[ctx.size] = Group(twin, f"{session}-{ctx.size}", ctx.rank, ctx.size, 64 << 20, timeout_ms=probes.DAY)
    group = _groups[ctx.size]
    group.twin.configure(setup)
    try:
        probes.check_round(group, case, M, ctx.rank)
    except AssertionError as wrong:
        raise AssertionError(f"{wrong}; status {group.status()}") from None


@st.composite
def runs(draw: st.DrawFn) -> tuple[Case, int, Setup]:
    R, local_experts = draw(st.sampled_from(SIZES)), draw(st.integers(1, 8))
    most = draw(st.sampled_from((1, 8, 40)))
    tokens = tuple(draw(st.lists(st.integers(0, most), min_size=R, max_size=R)))
    case = Case(
        tokens,
        H=draw(st.sampled_from((8, 17, 250, 600))),
        K=draw(st.integers(1, min(8, R * local_experts))),
        local_experts=local_experts,
        dtype=draw(st.sampled_from(DTYPES)),
        ids=draw(st.sampled_from(("distinct", "distinct", "one rank", "none"))),
        absent=draw(st.sampled_from((0.0, 0.1, 0.5, 0.99))),
        seed=draw(st.integers(0, 2**32 - 1)),
    )
    if case.ids == "one rank":  # ids of a token may be equal, so that only one of them has a place for sure
        case = replace(case, K=1)
    setup = Setup(draw(st.sampled_from(ARCHS)), draw(st.sampled_from(CORES)), draw(st.sampled_from(SEEDS)))
    return case, max(1, *tokens) + draw(st.sampled_from((0, 1, 7))), setup


@given(run=runs())
def test_any_sizes(ranks: RankPool, run: tuple[Case, int, Setup]) -> None:
    case, M, setup = run
    ranks.run(case.R, check, _SESSION, case, M, setup, timeout=250)


@pytest.mark.parametrize("setup", SETUPS, ids=str)
@pytest.mark.parametrize("R", SIZES)
def test_every_setup(ranks: RankPool, R: int, setup: Setup) -> None:
    """Little unified buffer: rows go in tiles, and tokens in chunks."""
    tokens = tuple((5 * r + 3) % 17 for r in range(R))
    case = Case(tokens, H=2100, K=3, local_experts=3, dtype=torch.bfloat16, ids="distinct", absent=0.1, seed=R)
    ranks.run(R, check, _SESSION, case, 17, setup._replace(unified_buffer=9 << 10, cores=2 + R % 7))


@st.composite
def normal_runs(draw: st.DrawFn) -> tuple[Case, int, Setup]:
    """A case of normal mode, and how many tokens go in a round."""
    R, K = draw(st.sampled_from(SIZES)), draw(st.integers(1, 6))
    most = draw(st.sampled_from((1, 8, 40)))
    case = Case(
        tuple(draw(st.lists(st.integers(0, most), min_size=R, max_size=R))),
        H=draw(st.sampled_from((8, 17, 257, 600))),
        K=K,
        local_experts=draw(st.integers(1, 8)),
        dtype=draw(st.sampled_from(DTYPES)),
        ids=draw(st.sampled_from(("any", "distinct", "repeated", "one expert", "one rank", "none"))),
        absent=draw(st.sampled_from((0.0, 0.1, 0.5, 0.99))),
        capacity=draw(st.one_of(st.none(), st.tuples(*[st.sampled_from((0.3, 1.0, 1.5))] * R))),
        seed=draw(st.integers(0, 2**32 - 1)),
    )
    if draw(st.integers(0, 4)) == 0:  # as rows="rank" uses the ops
        case = replace(case, K=R, local_experts=1, ids="columns")
    setup = Setup(draw(st.sampled_from(ARCHS)), draw(st.sampled_from(CORES)), draw(st.sampled_from(SEEDS)))
    return case, draw(st.sampled_from((1, 3, 7, 64))), setup


@given(run=normal_runs())
def test_normal_mode(ranks: RankPool, run: tuple[Case, int, Setup]) -> None:
    run_probe(ranks, (probes.normal, (*run, 1)), run[0].R)


@pytest.mark.parametrize("setup", SETUPS, ids=str)
@pytest.mark.parametrize("R", SIZES)
def test_normal_mode_in_every_setup(ranks: RankPool, R: int, setup: Setup) -> None:
    """Little unified buffer, and most tokens to one expert, some of whose rows are dropped."""
    tokens = tuple((5 * r + 3) % 17 for r in range(R))
    case = Case(tokens, H=2100, K=3, local_experts=3, dtype=torch.bfloat16, ids="one expert", absent=0.3, seed=R)
    case = replace(case, ids="any" if R == 4 else case.ids, capacity=tuple((0.6, 1.4, 1.0)[r % 3] for r in range(R)))
    run_probe(ranks, (probes.normal, (case, 5, setup._replace(unified_buffer=10 << 10, cores=2 + R % 7))), R)


ROUNDS = {
    "even": (Case((40, 31, 0, 13), H=40, K=2, local_experts=4, ids="distinct", absent=0.0, seed=1), 5),
    "one rank": (Case((16, 3, 16, 9), H=40, K=2, ids="one rank", absent=0.0, seed=2), 4),
    "many without an expert": (Case((30, 7, 1, 40), H=40, K=3, absent=0.6, seed=3), 2),
    "one token": (Case((23, 0, 5, 12), H=40, K=4, local_experts=1, ids="distinct", absent=0.2, seed=4), 1),
}
"""A case, and the tokens that a slot has room for."""


@pytest.mark.parametrize("setup", [Setup(arch, 3, seed) for arch in ARCHS for seed in (None, 1)], ids=str)
@pytest.mark.parametrize("name", ROUNDS)
def test_rounds(ranks: RankPool, name: str, setup: Setup) -> None:
    """As many as probes.rounds_of says, whose ranks have different numbers of them."""
    run_probe(ranks, (probes.normal, (*ROUNDS[name], setup, 1)))


NORMAL_LARGE = [
    (Case((4096, 100), H=64, K=8, local_experts=8, dtype=torch.bfloat16, absent=0.05, seed=1), 1500),
    (Case((24, 0, 7, 12), H=7168, K=4, local_experts=2, dtype=torch.float16, capacity=(1.0, 0.7, 1.2, 1.0)), 9),
]


@pytest.mark.parametrize("setup", [Setup(arch, 8, seed) for arch in ARCHS for seed in (None, 1)], ids=str)
@pytest.mark.parametrize("large", NORMAL_LARGE, ids=["4096 tokens", "H 7168"])
def test_normal_mode_large(ranks: RankPool, large: tuple[Case, int], setup: Setup) -> None:
    run_probe(ranks, (probes.normal, (*large, setup, 1)), large[0].R)


@pytest.mark.parametrize("arch", ARCHS)
def test_131072_tokens(ranks: RankPool, arch: int) -> None:
    case = Case((131072, 1000), H=8, dtype=torch.bfloat16, absent=0.05)
    run_probe(ranks, (probes.normal, (case, 20_000, Setup(arch, 8, None), 1)), 2)


LARGE = [
    (Case((512, 0, 100, 300), H=64, K=8, local_experts=8, dtype=torch.bfloat16, ids="distinct", absent=0.05), 512),
    (Case((8, 0, 3, 5), H=7168, K=8, local_experts=8, dtype=torch.bfloat16, ids="distinct", absent=0.0), 8),
]


@pytest.mark.parametrize("setup", [Setup(arch, 8, seed) for arch in ARCHS for seed in (None, 0, 5)], ids=str)
@pytest.mark.parametrize("large", LARGE, ids=["512 tokens", "H 7168"])
def test_large(ranks: RankPool, large: tuple[Case, int], setup: Setup) -> None:
    run_probe(ranks, (probes.rounds, ([large], setup)))


def test_512_tokens_of_7168(ranks: RankPool) -> None:
    case = Case((512, 511), H=7168, K=2, local_experts=1, dtype=torch.bfloat16, ids="distinct", absent=0.0)
    run_probe(ranks, (probes.rounds, ([(case, 512)], Setup(A2, 8, None))), 2)


def run_probe(ranks: RankPool, probe: probes.Probe, size: int = 4) -> None:
    said = ranks.run(size, probes.run_probe, twin_kernels.build(), None, uuid.uuid4().hex, probe)
    assert not any(said), "\n".join(filter(None, said))


@pytest.mark.parametrize("what", ["op", "hidden", "top_k", "experts", "max_tokens", "element_bytes"])
def test_launches_that_do_not_fit_together(ranks: RankPool, what: str) -> None:
    run_probe(ranks, (probes.different, (what,)))


@pytest.mark.parametrize("seed", [None, 0], ids=str)
def test_many_ranks(ranks: RankPool, seed: int | None) -> None:
    run_probe(ranks, (probes.many_ranks, (Setup(cores=1, seed=seed),)))


@pytest.mark.parametrize("setup", [Setup(arch, 2, seed) for arch in ARCHS for seed in (None, 0)], ids=str)
def test_rows_that_a_graph_in_exact_mode_has_no_memory_for(ranks: RankPool, setup: Setup) -> None:
    run_probe(ranks, (probes.exact, (probes.EXACT, 5, setup)))


FAILURES = [
    *(probes.bad_id, probes.bad_row, probes.late, probes.slow, probes.unsent, probes.lost, probes.wrapped),
    *(probes.aborted, probes.too_small, probes.begun),
]


@pytest.mark.parametrize("setup", [Setup(arch, 2, seed) for arch in ARCHS for seed in (None, 1, 2)], ids=str)
@pytest.mark.parametrize("probe", FAILURES, ids=lambda probe: probe.__name__)
def test_launches_that_fail(ranks: RankPool, probe: Any, setup: Setup) -> None:
    run_probe(ranks, (probe, (setup,)))


def check_all_cores(ctx: RankContext, key: str, case: Case, M: int, setup: Setup) -> None:
    twin = Twin(twin_kernels.build())
    twin.configure(setup)
    with Group(twin, key, ctx.rank, ctx.size, 8 << 20, timeout_ms=probes.DAY) as group:
        probes.check_round(group, case, M, ctx.rank)
        group.notify_dispatch(probes.expect(case, M).ids[ctx.rank], case.E)
    assert len(twin.take_report()[-1]["cores"]) == setup.cores


@pytest.mark.parametrize(
    "setup", [Setup(arch, cores) for arch, numbers in VECTOR_CORES.items() for cores in numbers], ids=str
)
def test_every_number_of_cores(ranks: RankPool, setup: Setup) -> None:
    """A block for each vector core that the SoC has."""
    case = Case((80, 75), H=40, K=2, local_experts=3, dtype=torch.float16, ids="distinct", absent=0.1)
    ranks.run(2, check_all_cores, uuid.uuid4().hex, case, 80, setup)


def die(ctx: RankContext, key: str) -> None:
    """Rank 2 dies while the others wait for it."""
    twin = Twin(twin_kernels.build())
    ids, r = probes.expect(probes.CASE, probes.M).ids[ctx.rank], ctx.rank
    with Group(twin, key, r, ctx.size, 1 << 20, timeout_ms=probes.DAY) as group:
        group.notify_dispatch(ids, probes.CASE.E)
        if r == 2:
            while any(list(probes.control(group, peer)) != [1, 2] for peer in (0, 1, 3)):
                pass
            os.kill(os.getpid(), signal.SIGKILL)
        group.notify_dispatch(ids, probes.CASE.E)
        probes.check_status(group, [probes.LATE, 2, 2, 0, 2, 0, probes.NOTIFY])


def test_nobody_waits_for_the_dead() -> None:
    twin_kernels.build()
    with spawn_ranks(4, die, uuid.uuid4().hex, init=False) as ranks:
        outcomes = ranks.outcomes()
    assert isinstance(outcomes.pop(2).exception, RankDied)
    raise_failures(outcomes)


# How work is split over cores, and what goes over links.

OPS = (
    "dispatch",
    "dispatch_int8",
    "combine",
    "dispatch_backward",
    "combine_backward",
    "low_latency_dispatch",
    "low_latency_combine",
)


def routing(T: int, K: int, E: int, rank: int, hot: float) -> Tensor:
    """int64 [T, K]: distinct experts; the first one is expert 1 for a part of the tokens."""
    generator = torch.Generator().manual_seed(rank)
    ids = torch.rand(T, E, generator=generator).argsort(1)[:, :K].contiguous()
    is_hot = (torch.rand(T, 1, generator=generator) < hot) & (ids != 1).all(1, keepdim=True)
    ids[:, :1] = torch.where(is_hot, 1, ids[:, :1])
    return ids


def check_moved(
    ctx: RankContext, key: str, setup: Setup, sizes: tuple[int, int, int, int], hot: float, ops: tuple[str, ...]
) -> dict[str, tuple[int, list[int], tuple[int, int, int]]]:
    """By op: bytes over links, bytes that each core has moved; and (token, rank) that this rank has sent and that it
    has got over links, and its (token, k)."""
    (T, H, K, E), R, r = sizes, ctx.size, ctx.rank
    all_ids = [routing(T, K, E, rank, hot) for rank in range(R)]
    to = torch.stack([reference.get_dispatch_layout(ids, E, R, 1)[0] for ids in all_ids]).fill_diagonal_(0)
    xs = [torch.zeros(T, H, dtype=torch.bfloat16) for _ in range(R)]
    weights = [torch.ones(T, K) for _ in range(R)]
    wanted = reference.dispatch([x[:, :1] for x in xs], all_ids, weights, E, [0] * R)[r]
    ids, N = all_ids[r], wanted.recv_x.shape[0]
    y, packed = torch.zeros(N, H, dtype=torch.bfloat16), torch.zeros(R * T * min(K, E // R), H, dtype=torch.bfloat16)
    handle = wanted.recv_src_idx, wanted.send_head
    in_slots = reference.dispatch([x[:, :1] for x in xs], all_ids, weights, E, [len(packed)] * R)[r]
    low_latency = in_slots.recv_src_idx, in_slots.recv_channel_prefix_matrix.view(-1), in_slots.send_head
    twin = Twin(twin_kernels.build())
    twin.configure(setup)
    moved = {}
    num_bytes = probes.window_bytes(Case((T,) * R, H=H, K=K, local_experts=E // R, dtype=torch.bfloat16), T)
    with Group(twin, key, r, R, num_bytes + (1 << 20), timeout_ms=probes.DAY) as group:
        calls: dict[str, Any] = {
            "dispatch": lambda: group.dispatch(xs[r], ids, weights[r], N, E),
            "dispatch_int8": lambda: group.dispatch_int8(xs[r], ids, weights[r], N, E),
            "combine": lambda: group.combine(y, ids, weights[r], handle, E),
            "dispatch_backward": lambda: group.dispatch_backward(y, torch.zeros(N, K), ids, handle, E),
            "combine_backward": lambda: group.combine_backward(xs[r], y, ids, weights[r], handle, E),
            "low_latency_dispatch": lambda: group.low_latency_dispatch(xs[r], ids, T, E),
            "low_latency_combine": lambda: group.low_latency_combine(packed, ids, weights[r], low_latency, E),
        }
        for op in ops:
            twin.take_traffic()
            calls[op]()
            (_, written), cores = twin.take_traffic(setup.cores)
            assert group.status() == [0] * 8
            moved[op] = written, [read + sent for read, sent in cores], (int(to[r].sum()), int(to[:, r].sum()), T * K)
    return moved


@pytest.mark.parametrize("hot, most", [(0.0, 1.10), (0.5, 1.25)], ids=["uniform", "half to one expert"])
@pytest.mark.parametrize("arch", ARCHS)
def test_cores_share_the_work(ranks: RankPool, arch: int, hot: float, most: float) -> None:
    """The core that moves most, against the one that moves least; in low-latency combine of those that gather, and of
    those that push."""
    sizes = 768, 512, 8, 64
    for of_rank in ranks.run(4, check_moved, uuid.uuid4().hex, Setup(arch, 8, None), sizes, hot, OPS):
        for op, (_, cores, _) in of_rank.items():
            gather = len(cores) // 4
            for part in (cores[:gather], cores[gather:]) if op == "low_latency_combine" else (cores,):
                assert max(part) <= most * min(part), f"{op}: {cores}"


def test_bytes_over_links(ranks: RankPool) -> None:
    """Top-8 of 256 experts on 8 ranks: one row per (token, rank), in int8 of half the bytes, and 3 % at most for all
    else. One row per (token, expert), which is what DeepEP-Ascend sends, would be half as much again."""
    sizes, row = (128, 7168, 8, 256), 2 * 7168
    for of_rank in ranks.run(8, check_moved, uuid.uuid4().hex, Setup(A2, 8, None), sizes, 0.0, OPS):
        for op, (written, _, (sent, received, pairs)) in of_rank.items():
            is_sent = op in ("dispatch", "dispatch_int8", "combine_backward", "low_latency_dispatch")
            rows = row // (2 if op == "dispatch_int8" else 1) * (sent if is_sent else received)
            assert rows <= written <= 1.03 * rows, op
            assert written < 0.7 * pairs * 7 / 8 * row, op


@given(data=st.data())
def test_get_dispatch_layout(data: st.DataObject) -> None:
    R, S = data.draw(st.sampled_from([(1, 1), (2, 1), (4, 2), (8, 2), (16, 16)]))
    E, K = R * data.draw(st.integers(1, 9)), data.draw(st.integers(1, 8))
    T, cores = data.draw(st.sampled_from([0, 1, 5, 70, 300])), data.draw(st.sampled_from(CORES))
    topk_idx = torch.randint(-1, E, (T, K), generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    twin = Twin(twin_kernels.build())
    setup = data.draw(st.sampled_from(SETUPS))
    twin.configure(setup._replace(cores=cores, unified_buffer=data.draw(st.sampled_from([0, 8 << 10]))))
    wanted = reference.get_dispatch_layout(topk_idx, E, R, S)
    for i, (a, b) in enumerate(zip(twin_kernels.get_dispatch_layout(twin, topk_idx, E, R, S), wanted, strict=True)):
        assert_same(f"output {i}", a, b)


def test_an_op_without_a_kernel() -> None:
    twin = Twin(twin_kernels.build())
    x = torch.zeros(1, 1)
    with pytest.raises(twin_kernels.Failed, match="there is no AscendC kernel for this op yet"):
        twin.launch("fused_deep_moe", "", [x], [], [x])


def test_windows_that_a_rank_does_not_open() -> None:
    with pytest.raises(twin_kernels.Failed, match="only 1 of 2 ranks have opened windows in 50 ms"):
        Group(Twin(twin_kernels.build()), uuid.uuid4().hex, 0, 2, 4096, timeout_ms=50)


def test_windows_of_other_sizes() -> None:
    """Ranks that would not find each other's flags: whoever comes second is told."""
    key, errors = uuid.uuid4().hex, []

    def opened(num_bytes: int) -> None:
        with pytest.raises(twin_kernels.Failed) as failed:
            Group(Twin(twin_kernels.build()), key, 0, 2, num_bytes, timeout_ms=2000)
        errors.append(str(failed.value))

    ranks = [threading.Thread(target=opened, args=(num_bytes,)) for num_bytes in (4096, 8192)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert "of another size or number, or with another version of the twin" in errors[0]
    assert "only 1 of 2 ranks have opened windows" in errors[1]


def test_less_unified_buffer_than_a_kernel_needs(capfd: pytest.CaptureFixture[str]) -> None:
    twin = Twin(twin_kernels.build())
    twin.configure(Setup(A2, 2, None, 1024))
    with pytest.raises(twin_kernels.Failed, match="DeepEpGetDispatchLayout refuses the call"):
        twin_kernels.get_dispatch_layout(twin, torch.zeros(3, 2, dtype=torch.int64), 256, 4, 1)
    assert "more than the unified buffer has: 1024" in capfd.readouterr().err
