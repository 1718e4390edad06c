"""The AscendC kernels of ops/, executed on the twin by several ranks of several cores each, against the reference.

T local tokens, H hidden, K top-k, E experts, R ranks, L = E/R local experts, M num_max_dispatch_tokens_per_rank,
N = R·M·min(K, L) packed rows.
"""

import uuid
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import native
import pytest
import torch
import twin_kernels
from cases import Case, assert_close, assert_same, expert_outputs, make_inputs
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import RankContext, RankPool
from torch import Tensor
from twin_kernels import ARCHS, Group, Setup, Twin

from deep_ep import reference

pytestmark = pytest.mark.skipif(
    native.torch_npu_dir() is None, reason="no torch-npu wheel, whose headers ops/ is compiled with"
)

SIZES = (2, 4, 8)
CORES = (2, 3, 5, 8)
SEEDS = (None, 0, 1, 2, 3, 4)
"""None is fast mode."""
TIMEOUT_MS = 20_000
WINDOW_BYTES = 64 << 20
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

_SESSION = uuid.uuid4().hex
_groups: dict[int, Group] = {}


def twin() -> Twin:
    return Twin(twin_kernels.build())


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankPool]:
    pool = RankPool(max(SIZES), init=False)
    yield pool
    pool.close()


def group_of(ctx: RankContext, session: str, num_bytes: int = WINDOW_BYTES) -> Group:
    """The windows of the ranks 0 .. size-1, made once."""
    if ctx.size not in _groups:
        _groups[ctx.size] = Group(twin(), f"{session}-{ctx.size}", ctx.rank, ctx.size, num_bytes, TIMEOUT_MS)
    return _groups[ctx.size]


class Expected(NamedTuple):
    """What the kernels must do on every rank, with experts that multiply each row by a factor of its own."""

    xs: list[Tensor]
    ids: list[Tensor]
    weights: list[Tensor]
    dispatched: list[tuple[Tensor, ...]]
    ys: list[Tensor]
    combined: list[Tensor]
    tolerances: list[Tensor]


def expect(case: Case, M: int) -> Expected:
    xs, ids, weights, _ = make_inputs(case)
    N = case.R * M * min(case.K, case.local_experts)
    received = reference.dispatch(xs, ids, weights, case.E, [N] * case.R)
    dispatched = [
        (d.recv_x, d.num_recv_tokens_per_expert, d.recv_src_idx, d.recv_channel_prefix_matrix.view(-1), d.send_head)
        for d in received
    ]
    ys = [expert_outputs(d.recv_x, d.recv_src_idx) for d in received]
    src = [d.recv_src_idx for d in received]
    exact = reference.combine([y.double() for y in ys], weights, src)
    size = reference.combine([y.double().abs() for y in ys], [w.abs() for w in weights], src)
    # A rank's rows are summed up in fp32 and rounded to the dtype; then so are the sums of all ranks.
    epsilon = torch.finfo(case.dtype).eps + case.K * torch.finfo(torch.float32).eps
    tolerances = [2 * epsilon * s.double() + 2 * torch.finfo(case.dtype).tiny for s in size]
    return Expected(xs, ids, weights, dispatched, ys, [e.to(case.dtype) for e in exact], tolerances)


NAMES = ("recv_x", "recv_count", "recv_src_idx", "layout_range", "send_head")


def check(ctx: RankContext, session: str, case: Case, M: int, setup: Setup) -> None:
    group = group_of(ctx, session)
    group.twin.configure(setup)
    expected, r = expect(case, M), ctx.rank
    ids = expected.ids[r]
    num_rows = group.notify_dispatch(ids, case.E)
    rows = sum(int((i // case.local_experts == r).logical_and(i >= 0).sum()) for i in expected.ids)
    assert num_rows.item() == rows
    out = group.low_latency_dispatch(expected.xs[r], ids, M, case.E)
    for name, actual, wanted in zip(NAMES, out, expected.dispatched[r], strict=True):
        assert_same(name, actual, wanted)
    combined = group.low_latency_combine(expected.ys[r], ids, expected.weights[r], out[2:], case.E)
    assert_close("combined_x", combined, expected.combined[r], expected.tolerances[r])
    assert group.status() == [0] * 8


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
    if case.ids == "one rank":
        case = replace(case, K=min(case.K, case.local_experts))
    setup = Setup(draw(st.sampled_from(ARCHS)), draw(st.sampled_from(CORES)), draw(st.sampled_from(SEEDS)))
    return case, max(1, *tokens) + draw(st.sampled_from((0, 1, 7))), setup


@pytest.mark.timeout(0)  # every run has its own
@given(run=runs())
@settings(max_examples=60)
def test_any_sizes(ranks: RankPool, run: tuple[Case, int, Setup]) -> None:
    case, M, setup = run
    ranks.run(case.R, check, _SESSION, case, M, setup)
