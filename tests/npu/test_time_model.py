"""The model of time against the twin: bytes over links, to the byte, and through the unified buffers."""

import uuid
from collections.abc import Callable, Iterator
from typing import NamedTuple

import native
import probes
import pytest
import torch
import twin_kernels
from cases import Case
from ranks import RankContext, RankPool
from torch import Tensor
from twin_kernels import ARCHS, Group, Setup, Twin

from deep_ep import reference
from deep_ep.twin import model

pytestmark = pytest.mark.skipif(
    native.torch_npu_dir() is None, reason="no torch-npu wheel, whose headers ops/ is compiled with"
)

SIZES, CORES = (2, 4, 8), 5


class Given(NamedTuple):
    """What a rank gives to the ops."""

    case: Case
    T: int
    x: Tensor
    ids: Tensor
    weights: Tensor
    y: Tensor
    handle: list[Tensor]


LAUNCHES: dict[str, Callable[[Group, Given], object]] = {
    "low_latency_dispatch": lambda g, a: g.low_latency_dispatch(a.x, a.ids, a.T, a.case.E),
    "low_latency_dispatch_int8": lambda g, a: g.low_latency_dispatch_int8(a.x, a.ids, a.T, a.case.E),
    "low_latency_combine": lambda g, a: g.low_latency_combine(a.y, a.ids, a.weights, a.handle, a.case.E),
    "combine": lambda g, a: g.combine(a.y, a.ids, a.weights, [a.handle[0], a.handle[2]], a.case.E),
}


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankPool]:
    twin_kernels.build()
    pool = RankPool(max(SIZES), init=False)
    yield pool
    pool.close()


def count(
    ctx: RankContext, key: str, case: Case, arch: int, ops: list[str], num_bytes: int
) -> dict[str, model.Counters]:
    """What the twin counts of one launch of each of `ops`, on windows of so many bytes."""
    twin, T, r = Twin(twin_kernels.build()), max(case.tokens), ctx.rank
    twin.configure(Setup(arch, CORES))
    expected = probes.expect(case, T)
    handle = list(expected.dispatched[r][2:])
    given = Given(case, T, expected.xs[r], expected.ids[r], expected.weights[r], expected.ys[r], handle)
    found = {}
    with Group(twin, key, r, ctx.size, num_bytes, timeout_ms=20_000) as group:
        for op in ops:
            twin.take_traffic()
            LAUNCHES[op](group, given)
            (read, written), by_core = twin.take_traffic(CORES)
            assert read == 0
            found[op] = model.Counters(written, sum(core[0] for core in by_core), sum(core[1] for core in by_core))
    return found


def routings(case: Case) -> list[model.Routing]:
    """What ranks really send, which differs from rank to rank."""
    ids = probes.expect(case, max(case.tokens)).ids
    pairs = torch.stack([reference.get_dispatch_layout(i, case.E, case.R, 1)[3].sum(0) for i in ids])
    owners = torch.cat(ids).flatten()
    rows = torch.bincount(owners[owners >= 0] // case.local_experts, minlength=case.R)
    own = pairs.diagonal()
    sent, arrived = pairs.sum(1), pairs.sum(0)
    lists = (values.tolist() for values in (sent, sent - own, arrived, arrived - own, rows))
    return [model.Routing(*numbers) for numbers in zip(*lists, strict=True)]


def check(ranks: RankPool, case: Case, arch: int, ops: list[str], num_bytes: int, slot_tokens: int = 0) -> None:
    """The formulas know what a rank sends by its sums alone, not which block has which part of it."""
    sizes = model.Sizes(case.R, max(case.tokens), case.H, case.K, case.E, cores=CORES, slot_tokens=slot_tokens)
    found = ranks.run(case.R, count, uuid.uuid4().hex, case, arch, ops, num_bytes)
    for routing, counters in zip(routings(case), found, strict=True):
        for op, counted in counters.items():
            wanted = model.counters(model.OPS[op](sizes, routing))
            assert counted.link == wanted.link, op
            assert counted.load == pytest.approx(wanted.load, rel=0.01), op
            assert counted.store == pytest.approx(wanted.store, rel=0.01), op


def make_case(R: int) -> Case:
    return Case((24,) * R, H=512, K=3, local_experts=4, dtype=torch.bfloat16, ids="distinct", absent=0.0, seed=R)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("R", SIZES)
def test_counters(ranks: RankPool, R: int, arch: int) -> None:
    check(ranks, make_case(R), arch, list(LAUNCHES), 8 << 20)


def test_rounds(ranks: RankPool) -> None:
    case, M = make_case(4), 7
    num_bytes = probes.window_bytes(case, M) + 1024 * case.R  # and what aligns the records
    sizes = model.Sizes(case.R, 24, case.H, case.K, case.E)
    assert model.slot_tokens(sizes, num_bytes) == M
    check(ranks, case, ARCHS[0], ["combine"], num_bytes, M)
