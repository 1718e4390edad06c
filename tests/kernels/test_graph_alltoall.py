"""The `.alltoall` overloads as NPU graphs have them, out of torch's operators and three collectives, against the
overloads themselves: bit for bit, on any sizes.

T local tokens, H hidden, K top-k, E experts, R ranks, N received rows, W num_worst_tokens, M
num_max_dispatch_tokens_per_rank.
"""

from dataclasses import replace
from unittest import mock

import pytest
import reference
import torch
from cases import Case, assert_close, assert_dispatched, assert_same, cases, expert_outputs, make_inputs
from hypothesis import given, settings
from ranks import RankContext, RankPool

from deep_ep.npu import graph_alltoall as graphs

ops = torch.ops.deep_ep


def check(ctx: RankContext, case: Case, exact: bool) -> None:
    group, r = ctx.prepared_group("alltoall").group_name, ctx.rank
    xs, ids, weights, worst = make_inputs(case)
    sizes = (case.E, case.R)
    routed = (xs[r], ids[r], weights[r], *sizes, 0 if exact else max(worst), group)
    wanted = ops.dispatch.alltoall(*routed)
    assert_dispatched(graphs.dispatch(*routed), reference.DispatchResult(*wanted))

    y, src, head = expert_outputs(wanted[0], wanted[8]), wanted[8], wanted[9]
    generator = torch.Generator().manual_seed(case.seed)
    grad_out = torch.randn(xs[r].shape, generator=generator).to(case.dtype)
    grad_weights = torch.randn(wanted[2].shape, generator=generator)
    combine = (y, ids[r], weights[r], src, head, *sizes, group)
    returning = (y, grad_weights, src, ids[r], head, *sizes, group)
    # In a graph this is told by the number of rows being a symbol.
    with mock.patch.object(graphs, "_capacity", lambda rows: None if exact else rows.shape[0]):
        assert_same("combined_x", graphs.combine(*combine), ops.combine.alltoall(*combine))
        results = graphs.dispatch_backward(*returning), ops.dispatch_backward.alltoall(*returning)
        for name, actual, expected in zip(("grad_x", "grad_topk_weights"), *results, strict=True):
            assert_same(name, actual, expected)
        actual, expected = (
            graphs.combine_backward(grad_out, *combine),
            ops.combine_backward.alltoall(grad_out, *combine),
        )
    assert_same("grad_y", actual[0], expected[0])
    norms = grad_out.double().norm(dim=1) * max([0.0, *y.double().nan_to_num().norm(dim=1).tolist()])
    # A product of rows is a sum in another order; its rows are on any rank.
    largest = torch.tensor([float(norms.max()) if len(norms) else 0.0])
    torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group=ctx.prepared_group("alltoall"))
    assert_close("grad_topk_weights", actual[1], expected[1], 1e-5 * largest.double() + 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("exact", [False, True], ids=["capacity", "exact"])
@settings(max_examples=60)
@given(case=cases())
def test_normal_mode(pool: RankPool, exact: bool, case: Case) -> None:
    small = replace(
        case,
        tokens=tuple(T % 33 for T in case.tokens),
        H=case.H % 64 + 1,
        local_experts=min(case.local_experts, 8),
    )
    pool.run(case.R, check, small, exact)


def check_low_latency(ctx: RankContext, case: Case, M: int) -> None:
    group, r = ctx.prepared_group("alltoall").group_name, ctx.rank
    xs, ids, weights, _ = make_inputs(case)
    tail = (case.E, case.R, group, "")
    dispatch = (xs[r], ids[r], M, *tail)
    wanted = ops.low_latency_dispatch.alltoall(*dispatch)
    names = ("recv_x", "recv_count", "recv_src_idx", "layout_range", "send_head")
    for name, actual, expected in zip(names, graphs.low_latency_dispatch(*dispatch), wanted, strict=True):
        assert_same(name, actual, expected)
    combine = (expert_outputs(wanted[0], wanted[2]), ids[r], weights[r], *wanted[2:], *tail)
    assert_same("combined_x", graphs.low_latency_combine(*combine), ops.low_latency_combine.alltoall(*combine))


@pytest.mark.slow
@settings(max_examples=40)
@given(case=cases())
def test_low_latency(pool: RankPool, case: Case) -> None:
    local_experts = min(case.local_experts, 8)
    small = replace(
        case,
        tokens=tuple(T % 33 for T in case.tokens),
        H=case.H % 64 + 1,
        K=min(case.K, case.R * local_experts),
        local_experts=local_experts,
        ids="distinct",
        capacity=None,
    )
    pool.run(case.R, check_low_latency, small, max(1, *small.tokens))
