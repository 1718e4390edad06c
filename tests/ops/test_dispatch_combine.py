"""dispatch, combine and their backward ops against the reference, on 1 to 4 ranks.

Everything is compared bit by bit but the gradient of topk_weights, an inner product over H whose order of
summation is free.
"""

from dataclasses import replace

import pytest
import reference
import torch
import torch.distributed as dist
from cases import (
    DTYPES,
    Case,
    Inputs,
    assert_close,
    assert_dispatched,
    assert_same,
    bits,
    cases,
    expert_outputs,
    make_inputs,
)
from hypothesis import given
from ranks import ALLTOALL_IS_SLOW, STRATEGIES, WINDOW_BYTES, RankContext, RankPool
from torch import Tensor

import deep_ep


def overload(name: str, strategy: str):
    return getattr(getattr(torch.ops.deep_ep, name), strategy)


class Expected:
    """What a rank needs of the reference: what every rank sends, by rank, and what comes back to this one."""

    def __init__(self, case: Case, rank: int) -> None:
        self.inputs: Inputs = make_inputs(case)
        xs, ids, weights, worst = self.inputs
        generator = torch.Generator().manual_seed(case.seed + 1)
        self.dispatched = reference.dispatch(xs, ids, weights, case.E, worst)
        self.src = [d.recv_src_idx for d in self.dispatched]
        self.ys = [expert_outputs(d.recv_x, d.recv_src_idx) for d in self.dispatched]
        self.out = reference.combine_on(rank, self.ys, weights[rank], self.src)
        self.grad_outs = [torch.randn(x.shape, generator=generator).to(case.dtype) for x in xs]
        self.grad_recv_weights = [torch.randn(d.recv_topk_weights.shape, generator=generator) for d in self.dispatched]
        self.grad_ys, self.combine_grad_weights = reference.combine_backward(self.grad_outs, self.ys, weights, self.src)
        self.grad_recv_xs = [expert_outputs(g, s) for g, s in zip(self.grad_ys, self.src, strict=True)]
        self.grad_x, self.dispatch_grad_weights = reference.dispatch_backward_on(
            rank, self.grad_recv_xs, self.grad_recv_weights, self.src, case.tokens[rank]
        )


def weight_tolerance(expected: Expected, rank: int) -> Tensor:
    """For the rounding errors of <row, grad_out>: 1e-6 of the product of the norms."""
    grad_norm = expected.grad_outs[rank].double().norm(dim=1, keepdim=True)
    row_norms = torch.cat([y.double().norm(dim=1) for y in expected.ys]).nan_to_num()
    return 1e-6 * grad_norm * max([0.0, *row_norms.tolist()])


def check_case(ctx: RankContext, case: Case, strategy: str, num_bytes: int = WINDOW_BYTES) -> None:
    """The ops by themselves, and the public functions forward and through autograd.

    Nothing is compared before the last collective, so that a rank with a wrong result stops no other.
    """
    group = ctx.prepared_group(strategy, num_bytes)
    expected = Expected(case, ctx.rank)
    ops = OpResults(ctx.rank, case, strategy, group.group_name, expected)
    public = PublicResults(ctx.rank, case, group, expected)
    ops.compare(ctx.rank, expected)
    public.compare(ctx.rank, case, expected)


class OpResults:
    """What the four ops return on rank r, called with the handles that the reference gives."""

    def __init__(self, r: int, case: Case, strategy: str, group: str, expected: Expected) -> None:
        x, ids, weights = (tensors[r] for tensors in expected.inputs[:3])
        src, send_head = expected.src[r], expected.dispatched[r].send_head
        y, grad_out = expected.ys[r], expected.grad_outs[r]
        sizes = (case.E, case.R, group)
        combine = overload("combine", strategy)
        self.dispatched = overload("dispatch", strategy)(
            x, ids, weights, case.E, case.R, expected.inputs.num_worst_tokens[r], group
        )
        recv_x, own_src, own_head = self.dispatched[0], *self.dispatched[8:]
        self.returned = combine(recv_x, ids, weights, own_src, own_head, *sizes)
        self.out = combine(y, ids, weights, src, send_head, *sizes)
        self.grad_y, self.combine_grad_weights = overload("combine_backward", strategy)(
            grad_out, y, ids, weights, src, send_head, *sizes
        )
        self.grad_x, self.dispatch_grad_weights = overload("dispatch_backward", strategy)(
            expected.grad_recv_xs[r], expected.grad_recv_weights[r], src, ids, send_head, *sizes
        )

    def compare(self, r: int, expected: Expected) -> None:
        assert_dispatched(self.dispatched, expected.dispatched[r])
        x, _, weights, _ = (given[r] for given in expected.inputs)
        assert_weighted(self.returned, x, weights, expected.dispatched[r].send_head)
        assert_same("combine", self.out, expected.out)
        assert_same("combine_backward's grad_x", self.grad_y, expected.grad_ys[r])
        assert_close(
            "combine_backward's grad_topk_weights",
            self.combine_grad_weights,
            expected.combine_grad_weights[r],
            weight_tolerance(expected, r),
        )
        assert_same("dispatch_backward's grad_x", self.grad_x, expected.grad_x)
        assert_same(
            "dispatch_backward's grad_topk_weights",
            self.dispatch_grad_weights,
            expected.dispatch_grad_weights,
        )


class PublicResults:
    """What the public functions return on rank r, and the gradients that autograd gives."""

    def __init__(self, r: int, case: Case, group: dist.ProcessGroup, expected: Expected) -> None:
        x, ids, weights, num_worst_tokens = (given[r] for given in expected.inputs)
        self.x, self.weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
        self.output = deep_ep.dispatch(
            self.x,
            ids,
            self.weights,
            num_experts=case.E,
            group=group,
            num_worst_tokens=num_worst_tokens,
        )
        y = expert_outputs(self.output.recv_x, expected.src[r])
        self.out = deep_ep.combine(y, self.output.handle, group=group)
        torch.autograd.backward(
            [self.out, self.output.recv_topk_weights], [expected.grad_outs[r], expected.grad_recv_weights[r]]
        )

    def compare(self, r: int, case: Case, expected: Expected) -> None:
        ids = expected.inputs.topk_idxs[r]
        output, handle = self.output, self.output.handle
        assert_dispatched(
            (
                output.recv_x,
                output.recv_topk_idx,
                output.recv_topk_weights,
                output.num_recv_tokens_per_expert,
                output.num_dropped,
                handle.rank_prefix_matrix,
                handle.channel_prefix_matrix,
                handle.recv_channel_prefix_matrix,
                handle.recv_src_idx,
                handle.send_head,
            ),
            expected.dispatched[r],
        )
        assert_same("handle's topk_idx", handle.topk_idx, ids)
        assert_same("handle's topk_weights", handle.topk_weights, self.weights)
        layout = reference.get_dispatch_layout(ids, case.E, case.R, 1)
        assert_same("handle's is_token_in_rank", handle.is_token_in_rank, layout[3])
        assert_same("combine", self.out, expected.out)
        assert_same("x.grad", self.x.grad, expected.grad_x)
        assert_close(
            "topk_weights.grad",
            self.weights.grad,
            expected.combine_grad_weights[r] + expected.dispatch_grad_weights,
            weight_tolerance(expected, r) + 1e-6 * expected.dispatch_grad_weights.abs(),
        )


def assert_weighted(returned: Tensor, x: Tensor, weights: Tensor, send_head: Tensor) -> None:
    """combine(dispatch(x)) = x · Σ w over what was delivered: K roundings in fp32 and one to the dtype."""
    delivered = weights.double() * (send_head >= 0)
    wanted = x.double() * delivered.sum(1, keepdim=True)
    terms = x.double().abs() * delivered.abs().sum(1, keepdim=True)
    finfo = torch.finfo(x.dtype)
    subnormal = finfo.smallest_normal * finfo.eps
    tolerance = finfo.eps * wanted.abs() + 2 * weights.shape[1] * 2**-24 * terms + subnormal
    assert_close("combine(dispatch(x))", returned, wanted.to(x.dtype), tolerance)


MODES = ("exact", "capacity")

EXTREMES = {
    "T=4096": Case((4096, 7), K=1),
    "K=16": Case((5, 3, 4), K=16, local_experts=8),
    "E=1024": Case((40, 0, 17, 33), local_experts=256, ids="distinct"),
    "H=7168": Case((5, 6), H=7168, dtype=torch.bfloat16),
    "H=8": Case((5, 6, 7, 8), H=8, dtype=torch.float16),
    "T=0 on all": Case((0, 0, 0)),
    "T=0 on some": Case((0, 9, 0, 4)),
    "all to one expert": Case((11, 7, 5), K=1, ids="one expert", absent=0.0),
    "all to one rank": Case((11, 7, 5), ids="one rank", absent=0.0),
    "no expert anywhere": Case((6, 5), ids="none"),
    "repeated ids": Case((6, 5, 3), K=5, ids="repeated"),
    "one rank": Case((13,), K=3),
}


@pytest.mark.parametrize("strategy", ALLTOALL_IS_SLOW)
@pytest.mark.parametrize("mode", MODES)
@given(case=cases())
def test_any_sizes(pool: RankPool, strategy: str, mode: str, case: Case) -> None:
    if mode == "exact":
        case = replace(case, capacity=None)
    pool.run(case.R, check_case, case, strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", EXTREMES)
def test_extremes(pool: RankPool, strategy: str, mode: str, name: str) -> None:
    case = EXTREMES[name]
    if mode == "capacity":
        case = replace(case, capacity=(0.5,) * case.R)
    pool.run(case.R, check_case, case, strategy)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ids", ["any", "one rank"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_payload_larger_than_the_window(pool: RankPool, dtype: torch.dtype, ids: str, mode: str) -> None:
    capacity = (0.7, 0.9, 1.2) if mode == "capacity" else None
    case = Case((300, 40, 510), H=1024, K=4, dtype=dtype, ids=ids, capacity=capacity)
    pool.run(case.R, check_case, case, "default", 1 << 20)


@pytest.mark.slow
@pytest.mark.parametrize("dtype, H", [(torch.bfloat16, 1027), (torch.float32, 520)], ids=str)
def test_payload_larger_than_the_caches(pool: RankPool, dtype: torch.dtype, H: int) -> None:
    """Of up to 4 cores: rows are copied past them, from and to addresses of any alignment."""
    case = Case((4000, 4200), H=H, K=8, dtype=dtype, ids="distinct", absent=0.05)
    pool.run(2, check_case, case, "default", 512 << 20)


def check_bit_patterns(ctx: RankContext, strategy: str, dtype: torch.dtype) -> None:
    """Every 16-bit pattern (fp32: in the upper half), NaN payloads included, to the next rank and back."""
    group = ctx.prepared_group(strategy).group_name
    patterns = torch.arange(1 << 16, dtype=torch.int32)
    patterns = patterns << 16 | 0x155 if dtype == torch.float32 else patterns.to(torch.int16)
    x = patterns.view(dtype).view(256, 256)
    ids = torch.full((256, 1), (ctx.rank + 1) % ctx.size)
    weights = torch.ones(256, 1)
    recv_x, _, _, _, _, _, _, _, src, send_head = overload("dispatch", strategy)(
        x, ids, weights, ctx.size, ctx.size, 0, group
    )
    out = overload("combine", strategy)(recv_x, ids, weights, src, send_head, ctx.size, ctx.size, group)
    assert_same("recv_x", bits(recv_x), bits(x))
    # 0 + 1·(-0) is +0.
    assert_same("combine", out, torch.where(x == 0, 0.0, x))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_bit_pattern_travels(pool: RankPool, strategy: str, dtype: torch.dtype) -> None:
    pool.run(2, check_bit_patterns, strategy, dtype)


def check_several_alive(ctx: RankContext, strategy: str, batches: list[Case]) -> None:
    """All dispatches before any combine, combines in another order, some results freed in between."""
    group = ctx.prepared_group(strategy).group_name
    r = ctx.rank
    expected = [Expected(case, r) for case in batches]
    dispatched = []
    for case, wanted in zip(batches, expected, strict=True):
        x, ids, weights = (tensors[r] for tensors in wanted.inputs[:3])
        worst = wanted.inputs.num_worst_tokens[r]
        dispatched.append(overload("dispatch", strategy)(x, ids, weights, case.E, case.R, worst, group))
    for i in reversed(range(len(batches))):
        case, wanted = batches[i], expected[i]
        y = expert_outputs(dispatched[i][0], dispatched[i][8])
        _, ids, weights = (tensors[r] for tensors in wanted.inputs[:3])
        out = overload("combine", strategy)(y, ids, weights, dispatched[i][8], dispatched[i][9], case.E, case.R, group)
        assert_same(f"combine {i}", out, wanted.out)
        if i % 2:
            dispatched[i] = None
    for i, wanted in enumerate(expected):
        if dispatched[i] is not None:
            assert_dispatched(dispatched[i], wanted.dispatched[r])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_several_dispatches_alive(pool: RankPool, strategy: str) -> None:
    batches = [
        Case((4, 4096), H=16, seed=1),
        Case((4096, 4), H=16, seed=2),
        Case((9, 9), H=512, dtype=torch.bfloat16, seed=3),
        Case((50, 70), K=6, capacity=(0.5, 2.0), seed=4),
        Case((0, 3), seed=5),
    ]
    for _ in range(3):
        pool.run(2, check_several_alive, strategy, batches)


def check_used_again(ctx: RankContext) -> None:
    """A result that is replaced by the next one: both live for a moment, and then the first one's memory is free."""
    group = ctx.prepared_group("default", 64 << 20)
    generator = torch.Generator().manual_seed(ctx.rank)
    addresses = []
    for _ in range(20):
        x, ids = torch.randn(300, 512, generator=generator), torch.randint(4, (300, 2), generator=generator)
        out = deep_ep.dispatch(x, ids, num_experts=4, group=group)
        addresses.append(out.recv_x.data_ptr())
    # About 600 rows of 2 KiB each, in a pool of 64 MiB.
    assert max(addresses) - min(addresses) < 4 << 20, "memory that was given back is not used again"


def test_memory_is_used_again(pool: RankPool) -> None:
    pool.run(2, check_used_again)


def check_without_weights(ctx: RankContext, strategy: str) -> None:
    """topk_weights=None means ones: every token comes back once per expert that it has."""
    group = ctx.prepared_group(strategy)
    x = torch.arange(4.0).view(4, 1).repeat(1, 8) + ctx.rank
    ids = torch.tensor([[0, 1, 2], [-1, 2, 2], [-1, -1, -1], [1, -1, 0]])
    output = deep_ep.dispatch(x, ids, num_experts=2 * ctx.size, group=group)
    out = deep_ep.combine(output.recv_x, output.handle, group=group)
    assert_same("handle's topk_weights", output.handle.topk_weights, torch.ones(4, 3))
    assert_same("recv_topk_weights", output.recv_topk_weights, (output.recv_topk_idx >= 0).float())
    assert_same("combine", out, x * torch.tensor([[3.0], [2.0], [0.0], [2.0]]))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_weights_are_ones_where_none_are_given(pool: RankPool, strategy: str) -> None:
    pool.run(3, check_without_weights, strategy)


def check_exact_beside_capacity(ctx: RankContext, strategy: str) -> None:
    """W is each receiver's own: rank 0 takes all rows of its expert, rank 1 the first three."""
    group = ctx.prepared_group(strategy)
    x = (torch.arange(5.0) + 10 * ctx.rank).view(5, 1).repeat(1, 8)
    ids = torch.tensor([[0, 1]]).repeat(5, 1)
    output = deep_ep.dispatch(x, ids, num_experts=2, group=group, num_worst_tokens=(0, 3)[ctx.rank])
    out = deep_ep.combine(output.recv_x, output.handle, group=group)
    values = ([0.0, 1, 2, 3, 4, 10, 11, 12, 13, 14], [0.0, 1, 2])[ctx.rank]
    assert output.recv_x[:, 0].tolist() == values
    assert output.num_dropped.item() == (0, 7)[ctx.rank]
    delivered = ([2.0, 2, 2, 1, 1], [1.0, 1, 1, 1, 1])[ctx.rank]
    assert_same("combine", out, x * torch.tensor(delivered).unsqueeze(1))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_exact_rank_beside_one_with_capacity(pool: RankPool, strategy: str) -> None:
    pool.run(2, check_exact_beside_capacity, strategy)
