"""The AscendC kernels of ops/, executed on the twin by several ranks of several cores each, against the reference.

T local tokens, H hidden, K top-k, E experts, R ranks, L = E/R local experts, M num_max_dispatch_tokens_per_rank,
N = R·M·min(K, L) packed rows.
"""

import uuid
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import probes
import pytest
import torch
from cases import Case, assert_same
from hypothesis import given
from hypothesis import strategies as st
from ranks import RankContext, RankPool

from deep_ep import reference
from deep_ep.twin import kernels as twin_kernels
from deep_ep.twin import native
from deep_ep.twin.kernels import A2, ARCHS, Group, Setup, Twin

pytestmark = pytest.mark.skipif(
    native.torch_npu_dir() is None, reason="no torch-npu wheel, whose headers ops/ is compiled with"
)

SIZES = (2, 4, 8)
CORES = (2, 3, 5, 8)
SEEDS = (None, *range(8))
"""None is fast mode."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SETUPS = [Setup(arch, 3, seed) for arch in ARCHS for seed in (None, 0, 1, 2, 3, 4)]

_SESSION = uuid.uuid4().hex
_groups: dict[int, Group] = {}


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankPool]:
    twin_kernels.build()
    pool = RankPool(max(SIZES), init=False)
    yield pool
    pool.close()


def check(ctx: RankContext, session: str, case: Case, M: int, setup: Setup) -> None:
    """On windows that launches of all kinds have used before."""
    if ctx.size not in _groups:
        twin = Twin(twin_kernels.build())
        _groups[ctx.size] = Group(twin, f"{session}-{ctx.size}", ctx.rank, ctx.size, 64 << 20, timeout_ms=20_000)
    group = _groups[ctx.size]
    group.twin.configure(setup)
    probes.check_round(group, case, M, ctx.rank)


@st.composite
def runs(draw: st.DrawFn) -> tuple[Case, int, Setup]:
    R, local_experts = draw(st.sampled_from(SIZES)), draw(st.integers(1, 8))
    most = draw(st.sampled_from((1, 8, 40)))
    tokens = tuple(draw(st.lists(st.integers(0, most), min_size=R, max_size=R)))
    case = Case(
        tokens,
        H=draw(st.sampled_from((8, 24, 250, 600))),
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


@pytest.mark.timeout(0)  # every run has its own
@given(run=runs())
def test_any_sizes(ranks: RankPool, run: tuple[Case, int, Setup]) -> None:
    case, M, setup = run
    ranks.run(case.R, check, _SESSION, case, M, setup)


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
        H=draw(st.sampled_from((8, 250, 600))),
        K=K,
        local_experts=draw(st.integers(1, 8)),
        dtype=draw(st.sampled_from(DTYPES)),
        ids=draw(st.sampled_from(("any", "distinct", "repeated", "one expert", "one rank", "none"))),
        absent=draw(st.sampled_from((0.0, 0.1, 0.5, 0.99))),
        capacity=draw(st.one_of(st.none(), st.tuples(*[st.sampled_from((0.3, 1.0, 1.5))] * R))),
        seed=draw(st.integers(0, 2**32 - 1)),
    )
    setup = Setup(draw(st.sampled_from(ARCHS)), draw(st.sampled_from(CORES)), draw(st.sampled_from(SEEDS)))
    return case, draw(st.sampled_from((1, 3, 7, 64))), setup


@pytest.mark.timeout(0)
@given(run=normal_runs())
def test_normal_mode(ranks: RankPool, run: tuple[Case, int, Setup]) -> None:
    run_probe(ranks, (probes.normal, (*run, 1)), run[0].R)


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


FAILURES = [
    *(probes.bad_id, probes.bad_row, probes.late, probes.lost, probes.wrapped),
    *(probes.aborted, probes.too_small, probes.begun),
]


@pytest.mark.parametrize("setup", [Setup(arch, 2, seed) for arch in ARCHS for seed in (None, 1, 2)], ids=str)
@pytest.mark.parametrize("probe", FAILURES, ids=lambda probe: probe.__name__)
def test_launches_that_fail(ranks: RankPool, probe: Any, setup: Setup) -> None:
    run_probe(ranks, (probe, (setup,)))


# One rank sends all, to one expert.


def check_split(ctx: RankContext, key: str, setup: Setup) -> list[tuple[int, int]]:
    """What each core has moved in dispatch and in combine."""
    case, M = Case((0, 64), H=512, K=1, local_experts=4, dtype=torch.float32, ids="one expert", absent=0.0, seed=6), 64
    expected, r = probes.expect(case, M), ctx.rank
    twin = Twin(twin_kernels.build())
    twin.configure(setup)
    moved = []
    with Group(twin, key, r, ctx.size, probes.window_bytes(case, M), timeout_ms=20_000) as group:
        twin.take_traffic()
        group.low_latency_dispatch(expected.xs[r], expected.ids[r], M, case.E)
        moved.append(twin.take_traffic(setup.cores)[1])
        handle = expected.dispatched[r][2:]
        group.low_latency_combine(expected.ys[r], expected.ids[r], expected.weights[r], handle, case.E)
        moved.append(twin.take_traffic(setup.cores)[1])
    return moved


@pytest.mark.parametrize("setup", [Setup(arch, cores, None) for arch in ARCHS for cores in (3, 8)], ids=str)
def test_cores_share_the_work_of_skewed_routing(ranks: RankPool, setup: Setup) -> None:
    row = 512 * 4
    for of_rank in ranks.run(2, check_split, uuid.uuid4().hex, setup):
        for by_core in of_rank:
            for moved in zip(*by_core, strict=True):  # read, written
                assert max(moved) - min(moved) <= 3 * row, by_core
                assert max(moved) < 2 * sum(moved) / setup.cores, by_core


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


def test_less_unified_buffer_than_a_kernel_needs(capfd: pytest.CaptureFixture[str]) -> None:
    twin = Twin(twin_kernels.build())
    twin.configure(Setup(A2, 2, None, 1024))
    with pytest.raises(twin_kernels.Failed, match="DeepEpGetDispatchLayout refuses the call"):
        twin_kernels.get_dispatch_layout(twin, torch.zeros(3, 2, dtype=torch.int64), 256, 4, 1)
    assert "more than the unified buffer has: 1024" in capfd.readouterr().err
