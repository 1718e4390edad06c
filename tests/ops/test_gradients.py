"""Gradients of an expert-parallel MoE layer in fp32 against a dense one in fp64 that knows nothing of ranks.

The loss of the whole group is Σ_r <out_r, a_r> + Σ_rows b · recv_topk_weights: the second term sends
gradients through recv_topk_weights as well. Every expert is a two-layer FFN. Symbols: T local tokens,
H hidden, F hidden size of the FFN, K top-k, E experts, R ranks, L = E/R local experts, N received rows.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
from cases import Case, make_inputs
from op_calls import OPS, calls, check_ops, error_of, run
from ranks import STRATEGIES, RankContext, RankPool
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.functional import silu

import deep_ep

F = 24


class Problem:
    """A case with experts and the coefficients of the loss, in fp32 on every rank."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.inputs = make_inputs(case)
        generator = torch.Generator().manual_seed(case.seed + 1)
        self.up = torch.randn(case.E, case.H, F, generator=generator) / case.H**0.5
        self.down = torch.randn(case.E, F, case.H, generator=generator) / F**0.5
        self.a = [torch.randn(T, case.H, generator=generator) for T in case.tokens]
        self.b = [torch.randn(T, case.K, generator=generator) for T in case.tokens]
        self.dispatched = reference.dispatch(*self.inputs[:3], case.E, self.inputs.num_worst_tokens)


def ffn(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return silu(x @ up) @ down


def dense_gradients(problem: Problem) -> dict[str, list[Tensor]]:
    """By rank, in fp64: out, and the gradients of x, topk_weights, up, down and the experts' output rows."""
    case = problem.case
    xs = [x.double().requires_grad_() for x in problem.inputs.xs]
    weights = [w.double().requires_grad_() for w in problem.inputs.topk_weights]
    up, down = problem.up.double().requires_grad_(), problem.down.double().requires_grad_()
    outs, slot_rows, loss = [], [], torch.zeros((), dtype=torch.float64)
    for r, (x, w, ids) in enumerate(zip(xs, weights, problem.inputs.topk_idxs, strict=True)):
        delivered = (problem.dispatched[r].send_head >= 0).double()
        rows = torch.zeros(*ids.shape, case.H, dtype=torch.float64)
        for e in range(case.E):
            rows = rows + (ids == e).unsqueeze(2) * ffn(x, up[e], down[e]).unsqueeze(1)
        rows.retain_grad()
        out = ((w * delivered).unsqueeze(2) * rows).sum(1)
        loss = loss + (out * problem.a[r].double()).sum() + (w * delivered * problem.b[r].double()).sum()
        outs.append(out.detach())
        slot_rows.append(rows)
    loss.backward()
    row_grads = []
    for d in problem.dispatched:
        used = d.recv_src_idx[:, 0] >= 0
        grads = [slot_rows[s].grad[t, k] for s, t, k in d.recv_src_idx[used].tolist()]
        row_grads.append(torch.zeros(*d.recv_x.shape, dtype=torch.float64))
        if grads:
            row_grads[-1][used] = torch.stack(grads)
    return {
        "out": outs,
        "x": [x.grad for x in xs],
        "topk_weights": [w.grad for w in weights],
        "rows": row_grads,
        "up": list(up.grad.chunk(case.R)),
        "down": list(down.grad.chunk(case.R)),
    }


def check_gradients(ctx: RankContext, case: Case, strategy: str) -> None:
    group = ctx.prepared_group(strategy)
    problem, r, L = Problem(case), ctx.rank, case.local_experts
    x = problem.inputs.xs[r].clone().requires_grad_()
    weights = problem.inputs.topk_weights[r].clone().requires_grad_()
    up = problem.up[r * L : (r + 1) * L].clone().requires_grad_()
    down = problem.down[r * L : (r + 1) * L].clone().requires_grad_()

    received = deep_ep.dispatch(
        x,
        problem.inputs.topk_idxs[r],
        weights,
        num_experts=case.E,
        group=group,
        num_worst_tokens=problem.inputs.num_worst_tokens[r],
    )
    counts = received.num_recv_tokens_per_expert.tolist()
    unused = received.recv_x.shape[0] - sum(counts)
    *blocks, tail = received.recv_x.split([*counts, unused])
    rows = torch.cat([*(ffn(block, up[l], down[l]) for l, block in enumerate(blocks)), tail])
    rows.retain_grad()
    out = deep_ep.combine(rows, received.handle, group=group)
    loss = (out * problem.a[r]).sum()
    for n, (s, t, k) in enumerate(received.handle.recv_src_idx.tolist()):
        if s >= 0:
            loss = loss + problem.b[s][t, k] * received.recv_topk_weights[n, k]
    loss.backward()

    expected = dense_gradients(problem)
    for name, actual, tolerance in (
        ("out", out, 1e-6),
        ("x", x.grad, 1e-6),
        ("rows", rows.grad, 1e-6),
        ("topk_weights", weights.grad, 1e-5),
        ("up", up.grad, 1e-5),
        ("down", down.grad, 1e-5),
    ):
        wanted = expected[name][r]
        error = (actual.double() - wanted).norm()
        assert error <= tolerance * wanted.norm(), f"{name}: error {error}, norm {wanted.norm()}"


TOKENS = {1: (23,), 2: (17, 40), 3: (0, 31, 12), 4: (19, 1, 26, 33)}
IDS = ("any", "distinct", "repeated", "one rank")


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("mode", ["exact", "capacity"])
@pytest.mark.parametrize("ids", IDS)
@pytest.mark.parametrize("R", TOKENS)
def test_gradients(pool: RankPool, strategy: str, mode: str, ids: str, R: int) -> None:
    capacity = (0.6, 1.3, 0.8, 0.4)[:R] if mode == "capacity" else None
    case = Case(TOKENS[R], H=16, K=4, ids=ids, capacity=capacity, seed=R)
    if mode == "capacity":
        assert any(d.num_dropped > 0 for d in Problem(case).dispatched)
    pool.run(R, check_gradients, case, strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_gradient_is_lost_where_nothing_is_sent(pool: RankPool, strategy: str) -> None:
    """Ranks without tokens and experts without rows get zeros, not None."""
    pool.run(3, check_gradients, Case((0, 0, 5), H=16, K=2, ids="one expert"), strategy)
    pool.run(2, check_gradients, Case((4, 5), H=16, K=2, ids="none"), strategy)


def other_derivatives(fn: Callable[[Tensor], Any], x: Tensor) -> dict[str, tuple[str, str]]:
    """What ways to a derivative of fn other than backward say."""

    def dual(grad_mode: bool) -> None:
        with forward_ad.dual_level(), torch.set_grad_enabled(grad_mode):
            fn(forward_ad.make_dual(x, torch.ones_like(x)))

    def total(x: Tensor) -> Tensor:
        results = fn(x)
        return (results if isinstance(results, Tensor) else results[0]).sum()

    return {
        "dual": error_of(dual, True),
        "dual without gradients": error_of(dual, False),
        "jvp": error_of(torch.func.jvp, fn, (x,), (torch.ones_like(x),)),
        "jacfwd": error_of(torch.func.jacfwd(total), x),
        "grad": error_of(torch.func.grad(total), x),
        "vjp": error_of(torch.func.vjp, total, x),
        "jacrev": error_of(torch.func.jacrev(total), x),
    }


def check_other_derivatives(ctx: RankContext, strategy: str) -> None:
    case = Case(tokens=(3,) * ctx.size)
    group = ctx.prepared_group(strategy).group_name
    told = {}
    for op in OPS:
        arguments = calls(case).arguments(op, ctx.rank, group)
        for name, value in arguments.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                fn = lambda x, op=op, name=name, arguments=arguments: run(op, strategy, arguments | {name: x})  # noqa: E731
                told[op, name] = other_derivatives(fn, value)
    x, ids = torch.ones(3, 32), torch.zeros(3, 2, dtype=torch.int64)
    sizes: dict[str, Any] = {"num_experts": case.E, "group": group}
    told["low_latency_dispatch", "x"] = other_derivatives(
        lambda x: deep_ep.low_latency_dispatch(x, ids, 4, case.E, group=group), x
    )
    told["dispatch_start", "x"] = other_derivatives(lambda x: deep_ep.dispatch_start(x, ids, **sizes).ticket, x)
    fused = torch.ones(2, 32, 2 * F), None, torch.ones(2, 32, F), None, 4, case.E
    told["fused_deep_moe", "x"] = other_derivatives(
        lambda x: deep_ep.fused_deep_moe(x, ids, torch.ones(3, 2), *fused, quant_mode=0, group=group), x
    )
    for (op, _), errors in told.items():
        for way, (kind, message) in errors.items():
            kind_of_way = "forward-mode" if way[:3] in ("dua", "jvp", "jac") and way != "jacrev" else "torch.func's"
            expected = f"deep_ep.{op}: {kind_of_way} derivatives are not supported; use torch.autograd.grad"
            assert (kind, message) == ("RuntimeError", expected), (op, way)
    check_ops(case, ctx.rank, group, strategy)

    # What does not go through an op may be differentiated in any way around it, and vmap makes the calls one by one.
    constant = deep_ep.combine(*with_handle(deep_ep.dispatch(x, ids, **sizes)), group=group)

    def beside(y: Tensor) -> Tensor:
        return y * deep_ep.combine(*with_handle(deep_ep.dispatch(x, ids, **sizes)), group=group)

    for value in (torch.func.jvp(beside, (x,), (x,))[1], torch.func.grad(lambda y: beside(y).sum())(x)):
        torch.testing.assert_close(value, constant, rtol=0, atol=0)
    several = torch.stack([x, 3 * x])
    sums = torch.func.vmap(lambda x: deep_ep.combine(*with_handle(deep_ep.dispatch(x, ids, **sizes)), group=group))
    torch.testing.assert_close(sums(several), 2 * several, rtol=0, atol=0)


def with_handle(out: deep_ep.DispatchOutput) -> tuple[Tensor, deep_ep.DispatchHandle]:
    return out.recv_x, out.handle


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_other_ways_to_a_derivative_are_refused(pool: RankPool, strategy: str) -> None:
    pool.run(2, check_other_derivatives, strategy)


def normalising_experts(ctx: RankContext, strategy: str, mode: str) -> None:
    """Experts that divide each row by its norm, which rows that hold nothing do not have, against the dense model."""
    group, R, L, H, K, M = ctx.prepared_group(strategy), ctx.size, 2, 16, 2, 8
    E = R * L
    generator = torch.Generator().manual_seed(0)
    xs = [torch.randn(T, H, generator=generator) for T in (5, 0, 7)[:R]]
    ids = [torch.rand(len(x), E, generator=generator).argsort(1)[:, :K].contiguous() for x in xs]
    weights = [torch.rand(len(x), K, generator=generator) for x in xs]
    gain = torch.rand(E, H, generator=generator)

    dense_gain, dense_x = gain.clone().requires_grad_(), xs[ctx.rank].clone().requires_grad_()
    dense = [(dense_x if rank == ctx.rank else x)[:, None] for rank, x in enumerate(xs)]
    for x, i, w in zip(dense, ids, weights, strict=True):
        (x / x.norm(dim=-1, keepdim=True) * dense_gain[i] * w[..., None]).sum(1).pow(2).sum().backward()

    mine = slice(ctx.rank * L, ctx.rank * L + L)
    local_gain, x = gain[mine].clone().requires_grad_(), xs[ctx.rank].clone().requires_grad_()
    my_ids, my_weights = ids[ctx.rank], weights[ctx.rank]
    if mode == "low latency":
        received, counts, handle = deep_ep.low_latency_dispatch(x, my_ids, M, E, group=group)
        rows = received.reshape(-1, H)
    else:
        dispatched = deep_ep.dispatch(x, my_ids, my_weights, num_experts=E, num_worst_tokens=64, group=group)
        rows, handle, counts = dispatched.recv_x, dispatched.handle, dispatched.num_recv_tokens_per_expert
    held = torch.arange(len(rows))[:, None] < counts.sum()
    rows = torch.where(held, rows, 1.0)
    expert = torch.repeat_interleave(torch.arange(L), counts)
    expert = torch.cat([expert, expert.new_zeros(len(rows) - len(expert))])
    y = rows / rows.norm(dim=1, keepdim=True) * local_gain[expert]
    if mode == "low latency":
        out = deep_ep.low_latency_combine(y.view_as(received), my_ids, my_weights, handle, group=group)
    else:
        out = deep_ep.combine(y, handle, group=group)
    out.pow(2).sum().backward()
    torch.testing.assert_close(local_gain.grad, dense_gain.grad[mine])
    torch.testing.assert_close(x.grad, dense_x.grad)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("mode", ["capacity", "low latency"])
def test_experts_that_normalise_rows(pool: RankPool, strategy: str, mode: str) -> None:
    pool.run(3, normalising_experts, strategy, mode)


def check_gradients_on_some_ranks(ctx: RankContext, strategy: str) -> list[tuple[str, str]]:
    """Rank 1 needs a gradient, the others do not. Returns what calls say."""
    case = Case(tokens=(3,) * ctx.size)
    group = ctx.prepared_group(strategy).group_name
    x, ids = torch.ones(3, 8), torch.arange(6).view(3, 2) % case.E
    needy, weights = x.clone().requires_grad_(ctx.rank == 1), torch.ones(3, 2).requires_grad_(ctx.rank == 1)
    sizes: dict[str, Any] = {"num_experts": case.E, "group": group}
    out = deep_ep.dispatch(x, ids, **sizes)
    rows = out.recv_x.clone().requires_grad_(ctx.rank == 1)
    low = deep_ep.low_latency_dispatch(x, ids, 4, case.E, group=group)
    errors = [
        error_of(deep_ep.dispatch, needy, ids, **sizes),
        error_of(deep_ep.dispatch, x, ids, weights, **sizes),
        error_of(lambda: deep_ep.wait(deep_ep.dispatch_start(needy, ids, **sizes))),
        error_of(deep_ep.combine, rows, out.handle, group=group),
        error_of(deep_ep.low_latency_dispatch, needy, ids, 4, case.E, group=group),
        error_of(deep_ep.low_latency_combine, low.recv_x, ids, weights, low.handle, group=group),
    ]

    # So does another grad mode: where it is off, nothing needs a gradient.
    y = x.clone().requires_grad_()
    for mode in (torch.no_grad, torch.inference_mode):

        def in_mode(call: Callable[[], Any], mode: Any = mode) -> Any:
            with contextlib.nullcontext() if ctx.rank == 1 else mode():
                return call()

        for call in (
            lambda: deep_ep.dispatch(y, ids, **sizes),
            lambda: deep_ep.wait(deep_ep.dispatch_start(y, ids, **sizes)),
            lambda: deep_ep.combine(out.recv_x + y[:1], out.handle, group=group),
            lambda: deep_ep.low_latency_dispatch(y, ids, 4, case.E, group=group),
        ):
            errors.append(error_of(in_mode, call))

    # Without grad mode nobody needs one; and where all do, what does not need it beside x makes no difference.
    with torch.no_grad():
        deep_ep.dispatch(needy, ids, **sizes)
    y = x.clone().requires_grad_()
    received = deep_ep.dispatch(y, ids, weights, **sizes)
    deep_ep.combine(received.recv_x, received.handle, group=group).backward(x)
    assert torch.equal(y.grad, 2 * x)
    # What compiled code needs is known when it is compiled: it goes with either.
    compiled = torch.compile(lambda x: deep_ep.dispatch(x, ids, **sizes).recv_x, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(y) if ctx.rank == 1 else deep_ep.dispatch(y, ids, **sizes).recv_x, out.recv_x)
    check_ops(case, ctx.rank, group, strategy)
    return errors


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradients_on_some_ranks(pool: RankPool, strategy: str) -> None:
    ops = ("dispatch",) * 3 + ("combine", "low_latency_dispatch", "low_latency_combine")
    ops += ("dispatch", "dispatch", "combine", "low_latency_dispatch") * 2
    for errors in pool.run(3, check_gradients_on_some_ranks, strategy):
        for op, (kind, message) in zip(ops, errors, strict=True):
            assert kind == "RuntimeError"
            assert message.startswith(f"deep_ep.{op}: ")
            assert "rank 1 needs a gradient of what it sends, rank 0 does not" in message
