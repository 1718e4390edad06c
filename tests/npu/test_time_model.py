"""The model of time against the twin, to the byte: over links, and through the unified buffers."""

import uuid
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import probes
import pytest
import reference
import torch
from cases import Case
from ranks import RankContext, RankPool
from torch import Tensor

from tools.twin import kernels, model
from tools.twin.kernels import ARCHS, Group, Setup, Twin

pytestmark = pytest.mark.torch_npu

SIZES, CORES = (2, 4, 8), 5


class Given(NamedTuple):
    """What a rank gives to the ops. Rows are those of normal mode, in low latency with some that are not used."""

    T: int
    E: int
    x: Tensor
    ids: Tensor
    weights: Tensor
    y: Tensor
    handle: tuple[Tensor, Tensor]
    row_weights: Tensor
    low_latency_y: Tensor
    low_latency_handle: list[Tensor]
    zero_unused: bool


LAUNCHES: dict[str, Callable[[Group, Given], object]] = {
    "low_latency_dispatch": lambda g, a: g.low_latency_dispatch(a.x, a.ids, a.T, a.E, a.zero_unused),
    "low_latency_dispatch_int8": lambda g, a: g.low_latency_dispatch_int8(a.x, a.ids, a.T, a.E, a.zero_unused),
    "low_latency_combine": lambda g, a: g.low_latency_combine(
        a.low_latency_y, a.ids, a.weights, a.low_latency_handle, a.E
    ),
    "dispatch": lambda g, a: g.dispatch(a.x, a.ids, a.weights, len(a.y), a.E),
    "dispatch_int8": lambda g, a: g.dispatch_int8(a.x, a.ids, a.weights, len(a.y), a.E),
    "combine": lambda g, a: g.combine(a.y, a.ids, a.weights, a.handle, a.E),
    "dispatch_backward": lambda g, a: g.dispatch_backward(a.y, a.row_weights, a.ids, a.handle, a.E),
    "combine_backward": lambda g, a: g.combine_backward(a.x, a.y, a.ids, a.weights, a.handle, a.E),
}


def count(
    ctx: RankContext, key: str, case: Case, arch: int, ops: list[str], num_bytes: int, zero_unused: bool
) -> dict[str, model.Counters]:
    """What the twin counts of one launch of each of `ops`, on windows of so many bytes."""
    twin, T, r = Twin(kernels.build()), max(case.tokens), ctx.rank
    twin.configure(Setup(arch, CORES))
    low_latency, normal = probes.expect(case, T), probes.expect_normal(case)
    received = normal.received[r]
    given = Given(
        *(T, case.E, normal.xs[r], normal.ids[r], normal.weights[r]),
        *(normal.ys[r], (received.recv_src_idx, received.send_head), received.recv_topk_weights),
        *(low_latency.ys[r], list(low_latency.dispatched[r][2:]), zero_unused),
    )
    found = {}
    with Group(twin, key, r, ctx.size, num_bytes, timeout_ms=20_000) as group:
        for op in ops:
            twin.take_traffic()
            LAUNCHES[op](group, given)
            (read, written), by_core = twin.take_traffic(CORES)
            assert (read, group.status()) == (0, [0] * 8)
            found[op] = model.Counters(written, sum(core[0] for core in by_core), sum(core[1] for core in by_core))
    return found


def routings(case: Case, slot_tokens: int) -> list[model.Routing]:
    """What ranks really send, which differs from rank to rank."""
    ids = probes.expect(case, max(case.tokens)).ids
    pairs = torch.stack([reference.get_dispatch_layout(i, case.E, case.R, 1)[3].sum(0) for i in ids])
    rows = torch.stack([torch.bincount(i[i >= 0] // case.local_experts, minlength=case.R) for i in ids])
    sent, arrived, arrived_rows = pairs.sum(1), pairs.sum(0), rows.sum(0)
    own, own_rows = pairs.diagonal(), rows.diagonal()
    far = sent - own, arrived - own, arrived_rows - own_rows
    at = torch.stack([_experts_at(i, case) for i in ids])  # [source, token, rank]
    asked_rows = at.where(at > 1, 0).sum(1)
    asked = (at > 1).sum(1)
    asks = [(kind.sum(1), kind.sum(1) - kind.diagonal()) for kind in (asked, asked_rows)]
    some = [values.tolist() for values in (sent, far[0], arrived, far[1], arrived_rows, far[2])]
    others = [values.tolist() for values in (*asks[0], *asks[1], asked.sum(0))]
    lists = *some, probes.rounds_of(probes.ranks_of(case, ids), slot_tokens), *others
    return [model.Routing(*values) for values in zip(*lists, strict=True)]


def _experts_at(ids: Tensor, case: Case) -> Tensor:
    """[T, R]: experts of each token at each rank."""
    return torch.stack([((ids >= 0) & (ids // case.local_experts == r)).sum(1) for r in range(case.R)], 1)


def check(ranks: RankPool, case: Case, arch: int, ops: list[str], num_bytes: int, zero_unused: bool = False) -> None:
    """The formulas know what a rank sends by its sums alone, not which block has which part of it."""
    sizes = model.Sizes(case.R, max(case.tokens), case.H, case.K, case.E, cores=CORES, zero_unused=zero_unused)
    found = ranks.run(case.R, count, uuid.uuid4().hex, case, arch, ops, num_bytes, zero_unused)
    for op in ops:
        slot_tokens = max(case.tokens) if op in model.LOW_LATENCY else model.slot_tokens(op, sizes, num_bytes)
        for routing, counters in zip(routings(case, slot_tokens), found, strict=True):
            assert counters[op] == model.counters(op, sizes, routing), op


def make_case(R: int) -> Case:
    return Case((24,) * R, H=512, K=3, local_experts=4, dtype=torch.bfloat16, ids="distinct", absent=0.0, seed=R)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("R", SIZES)
def test_counters(ranks: RankPool, R: int, arch: int) -> None:
    check(ranks, make_case(R), arch, list(LAUNCHES), 8 << 20)


@pytest.mark.parametrize("op", ["low_latency_dispatch", "low_latency_dispatch_int8"])
def test_rows_that_become_0(ranks: RankPool, op: str) -> None:
    check(ranks, make_case(4), ARCHS[0], [op], 8 << 20, zero_unused=True)


@pytest.mark.parametrize("ids", ["distinct", "one rank"])
def test_rounds(ranks: RankPool, ids: str) -> None:
    case, M, int8, with_answers = replace(make_case(4), ids=ids), 7, 13, 4
    num_bytes = probes.window_bytes(case, M) + 1024 * case.R  # and what aligns the records
    sizes = model.Sizes(case.R, 24, case.H, case.K, case.E)
    assert [model.slot_tokens(op, sizes, num_bytes) for op in model.NORMAL] == [M, int8, M, with_answers, with_answers]
    check(ranks, case, ARCHS[0], list(model.NORMAL), num_bytes)
