"""low_latency_dispatch and low_latency_combine: the ops and Buffer's calls, against the reference on 1 to 4 ranks.

T local tokens, H hidden, K top-k, E experts, R ranks, L = E/R local experts, M num_max_dispatch_tokens_per_rank,
N = R·M·min(K, L) packed rows.
"""

import math
import mmap
import os
import resource
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest
import reference
import torch
import torch.distributed as dist
from cases import DTYPES, Case, assert_same, bits, expert_outputs, make_inputs
from hypothesis import given, settings
from hypothesis import strategies as st
from meeting import prepare
from op_calls import error_of
from ranks import ALLTOALL_IS_SLOW, STRATEGIES, WINDOW_BYTES, RankContext, RankPool
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

import deep_ep
from deep_ep import quantization
from deep_ep.groups import info_of, spoil
from deep_ep.kernels.torch_npu_ops import COMM_ALGS
from deep_ep.ops import low_latency_combine as combine_op
from deep_ep.ops import low_latency_combine_padded as padded_combine_op
from deep_ep.ops import low_latency_dispatch as dispatch_op
from deep_ep.ops import low_latency_dispatch_padded as padded_dispatch_op

QUANT_MODES = quantization.MODES
THRESHOLDS = {"none": 1e-5, "int8": 3e-3, "mx_fp4_e2m1": 4e-2}  # of calc_diff; fp8: 2e-3


def overload(name: str, strategy: str) -> Any:
    return getattr(getattr(torch.ops.deep_ep, name), strategy)


def num_rows(case: Case, M: int) -> int:
    return case.R * M * min(case.K, case.local_experts)


class Expected:
    """What the ops must do on every rank, with experts that multiply each row by a factor of its own."""

    def __init__(self, case: Case, M: int) -> None:
        self.xs, self.ids, self.weights, _ = make_inputs(case)
        N = num_rows(case, M)
        self.dispatched = reference.dispatch(self.xs, self.ids, self.weights, case.E, [N] * case.R)
        assert all(d.num_dropped == 0 for d in self.dispatched)
        self.src = [d.recv_src_idx for d in self.dispatched]
        self.ys = [expert_outputs(d.recv_x, d.recv_src_idx) for d in self.dispatched]
        self.outs = reference.combine(self.ys, self.weights, self.src)
        generator = torch.Generator().manual_seed(case.seed + 1)
        self.grad_outs = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in self.xs]
        self.grad_ys, self.grad_weights = reference.combine_backward(self.grad_outs, self.ys, self.weights, self.src)
        zeros = [torch.zeros(N, case.K) for _ in self.xs]
        self.grad_xs, _ = reference.dispatch_backward(self.grad_ys, zeros, self.src, list(case.tokens))

    def outputs(self, rank: int) -> tuple[Tensor, ...]:
        """Of low_latency_dispatch."""
        d = self.dispatched[rank]
        layout_range = d.recv_channel_prefix_matrix.view(-1)
        return d.recv_x, d.num_recv_tokens_per_expert, d.recv_src_idx, layout_range, d.send_head


NAMES = ("recv_x", "recv_count", "recv_src_idx", "layout_range", "send_head")


def poison(group: str, strategy: str, case: Case) -> None:
    """Fills memory that is given out again with NaN: an unwritten or stale row would show."""
    nan = torch.full((num_rows(case, max(1, *case.tokens)), case.H), float("nan"), dtype=case.dtype)
    ids, weights = torch.zeros(len(nan), 1, dtype=torch.int64), torch.ones(len(nan), 1)
    overload("dispatch", strategy)(nan, ids, weights, case.R, case.R, 0, group)
    private = [torch.full_like(nan, float("nan")) for _ in range(4)]
    del private


def check_ops(ctx: RankContext, case: Case, M: int, strategy: str) -> None:
    group = ctx.prepared_group(strategy)
    expected, r = Expected(case, M), ctx.rank
    x, ids, weights = expected.xs[r], expected.ids[r], expected.weights[r]
    poison(group.group_name, strategy, case)
    sizes = (case.E, case.R, group.group_name, "")
    out = overload("low_latency_dispatch", strategy)(x, ids, M, *sizes)
    y = expected.ys[r]
    combined = overload("low_latency_combine", strategy)(y, ids, weights, out[2], out[3], out[4], *sizes)

    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    received = deep_ep.low_latency_dispatch(x, ids, M, case.E, group=group)
    rows = expected.ys[r].clone().requires_grad_()
    result = deep_ep.low_latency_combine(rows, ids, weights, received.handle, group=group)
    grad_y, grad_weights = torch.autograd.grad(result, [rows, weights], expected.grad_outs[r])
    (grad_x,) = torch.autograd.grad(received.recv_x, x, expected.grad_ys[r])

    for name, actual, wanted in zip(NAMES, out, expected.outputs(r), strict=True):
        assert_same(name, actual, wanted)
    assert_same("combined_x", combined, expected.outs[r])
    assert_same("public combined_x", result, expected.outs[r])
    assert_same("public recv_x", received.recv_x, expected.dispatched[r].recv_x)
    assert_same("grad_y", grad_y, expected.grad_ys[r])
    assert_same("grad_x", grad_x, expected.grad_xs[r])
    norms = expected.grad_outs[r].double().norm(dim=1) * max(
        [0.0, *torch.cat([y.double().norm(dim=1) for y in expected.ys]).nan_to_num().tolist()]
    )
    error = (grad_weights.double() - expected.grad_weights[r].double()).abs()
    assert (error <= 1e-6 * norms.unsqueeze(1)).all()


def unused_rows(ctx: RankContext) -> None:
    """Rows that hold nothing, and what combine makes of them, on windows whose memory is filled with NaN."""
    case, M = Case((5, 0, 7, 3), H=24, K=3, local_experts=2, dtype=torch.bfloat16, ids="distinct", seed=4), 9
    group = dist.new_group(list(range(ctx.size)))
    deep_ep.init(group)
    spoil(info_of(group))
    expected, r = Expected(case, M), ctx.rank
    x, ids, weights = expected.xs[r], expected.ids[r], expected.weights[r]
    zeros, unused = expected.dispatched[r].recv_x, expected.src[r][:, :1] < 0

    def send(x: Tensor) -> tuple[Tensor, dispatch_op.LowLatencyHandle]:
        out = deep_ep.low_latency_dispatch(x, ids, M, case.E, group=group)
        return out.recv_x, out.handle

    for is_training in (True, False):
        for sends in (send, torch.compile(send, backend="aot_eager", fullgraph=True))[: 2 - is_training]:
            with torch.set_grad_enabled(is_training):
                rows, handle = sends(x)
                assert_same("recv_x", rows, zeros if is_training else zeros.masked_fill(unused, torch.nan))
                results = expected.ys[r].masked_fill(unused, torch.nan)
                combined = deep_ep.low_latency_combine(results, ids, weights, handle, group=group)
                assert_same("combined_x", combined, expected.outs[r])
        sizes = M, case.E, case.R, group.group_name, is_training
        data, scales, *_ = torch.ops.deep_ep.low_latency_dispatch_int8(x, ids, *sizes)
        left = data.masked_fill(~unused, 0), scales.masked_fill(~unused[:, 0], 0)
        assert all(((part == 0) | ~unused.view(-1, *[1] * (part.dim() - 1))).all() == is_training for part in left)
    deep_ep.destroy(group)


def test_rows_that_hold_nothing(pool: RankPool) -> None:
    pool.run(4, unused_rows)


@st.composite
def small_cases(draw: st.DrawFn) -> tuple[Case, int]:
    """A case with distinct ids, and M: 0 to 512 tokens, some, all or none of the ids absent."""
    R, local_experts = draw(st.integers(1, 4)), draw(st.integers(1, 16))
    most = draw(st.sampled_from((1, 8, 64, 512)))
    tokens = tuple(draw(st.lists(st.integers(0, most), min_size=R, max_size=R)))
    case = Case(
        tokens,
        H=draw(st.sampled_from((8, 24, 128))),
        K=draw(st.integers(1, min(8, R * local_experts))),
        local_experts=local_experts,
        dtype=draw(st.sampled_from(DTYPES)),
        ids=draw(st.sampled_from(("distinct", "distinct", "distinct", "none"))),
        absent=draw(st.sampled_from((0.0, 0.1, 0.5, 0.99))),
        seed=draw(st.integers(0, 2**32 - 1)),
    )
    return case, max(1, *tokens) + draw(st.sampled_from((0, 0, 1, 7)))


@pytest.mark.parametrize("strategy", ALLTOALL_IS_SLOW)
@given(drawn=small_cases())
def test_any_sizes(pool: RankPool, strategy: str, drawn: tuple[Case, int]) -> None:
    case, M = drawn
    pool.run(case.R, check_ops, case, M, strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("H", [2048, 7168])
def test_large_rows(pool: RankPool, strategy: str, H: int) -> None:
    pool.run(
        4, check_ops, Case((8, 0, 3, 5), H=H, K=8, local_experts=4, dtype=torch.bfloat16, ids="distinct"), 8, strategy
    )


# Buffer


@dataclass(frozen=True)
class Settings:
    strategy: str
    rows: str
    quant_mode: str = "none"
    backend: str = "eager"


def make_buffer(ctx: RankContext, settings: Settings, **kwargs: Any) -> deep_ep.Buffer:
    group = ctx.prepared_group(settings.strategy)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEEP_USE_MODE", settings.strategy)
        return deep_ep.Buffer(group, rows=settings.rows, low_latency_mode=True, **kwargs)


def padded(packed: Tensor, counts: list[int], size: int) -> Tensor:
    """[L, size, ...]: each expert's rows, then zeros."""
    raw = packed.view(torch.uint8) if packed.element_size() == 1 else packed
    out = raw.new_zeros(len(counts), size, *raw.shape[1:])
    begin = 0
    for l, count in enumerate(counts):
        out[l, :count] = raw[begin : begin + count]
        begin += count
    return out.view(packed.dtype)


def as_bytes(tensor: Tensor) -> Tensor:
    # A tensor without rows counts as contiguous with any strides.
    return tensor.clone(memory_format=torch.contiguous_format).view(torch.uint8)


def check_buffer(ctx: RankContext, case: Case, M: int, settings: Settings) -> float:
    """Returns calc_diff of combine after dispatch to an unquantised one, or -1 if there is nothing to compare."""
    torch._dynamo.reset()
    buffer = make_buffer(ctx, settings)
    poison(buffer.group.group_name, settings.strategy, case)
    expected, r = Expected(case, M), ctx.rank
    L, R = case.local_experts, case.R
    mode = settings.quant_mode
    x, ids, weights = expected.xs[r], expected.ids[r], expected.weights[r].abs()
    stats = torch.arange(L, dtype=torch.int32)
    into = torch.full_like(x, float("nan"))

    def step(x: Tensor, ids: Tensor, weights: Tensor, stats: Tensor, into: Tensor) -> tuple[Any, ...]:
        recv_x, count, handle, _, hook = buffer.low_latency_dispatch(
            x, ids, M, case.E, cumulative_local_expert_recv_stats=stats, return_recv_hook=True, quant_mode=mode
        )
        hook()
        y = recv_x
        if isinstance(recv_x, tuple):
            data, scales = recv_x
            if settings.rows == "rank":
                flat = quantization.dequantize(data.flatten(0, 1), scales.flatten(0, 1))
                y = flat.view(L, R * M, case.H).to(x.dtype)
            else:
                y = quantization.dequantize(data, scales).to(x.dtype)
        out, _, hook = buffer.low_latency_combine(y, ids, weights, handle, out=into, return_recv_hook=True)
        hook()
        return recv_x, count, tuple(handle[:2]), out

    run = step if settings.backend == "eager" else torch.compile(step, backend=settings.backend, fullgraph=True)
    recv_x, count, (src_info, layout_range), out = run(x, ids, weights, stats, into)

    d = expected.dispatched[r]
    counts = d.num_recv_tokens_per_expert.tolist()
    if mode == "none":
        wanted, actual = (d.recv_x,), (recv_x,)
    else:
        parts = [quantization.quantize(x, mode, low_latency=True) for x in expected.xs]
        source, token, _ = d.recv_src_idx[d.recv_src_idx[:, 0] >= 0].long().unbind(1)
        wanted = []
        for part in (0, 1):
            rows = [as_bytes(p[part].view(p[part].shape[0], *p[part].shape[1:2] or (1,))) for p in parts]
            out_rows = torch.zeros(num_rows(case, M), rows[0].shape[1], dtype=torch.uint8)
            for n, (s, t) in enumerate(zip(source.tolist(), token.tolist(), strict=True)):
                out_rows[n] = rows[s][t]
            wanted.append(out_rows)
        actual = recv_x
        assert [part.dtype for part in actual] == [part.dtype for part in parts[0]]
    for what, a, w in zip(("recv_x", "scales"), actual, wanted, strict=False):
        w = padded(w, counts, R * M) if settings.rows == "rank" else w
        if settings.rows == "expert":
            assert a.dim() == (1 if what == "scales" and mode[:3] in ("mx_", "int", "per") else 2)
            a = a.reshape(w.shape[0], -1)
        a = as_bytes(a.reshape(*w.shape[:-1], -1))
        assert_same(what, a.to(torch.int16), as_bytes(w).to(torch.int16))
    assert count.tolist() == counts
    assert stats.tolist() == [l + c for l, c in enumerate(counts)]
    if settings.rows == "rank":
        assert_same("src_info", src_info, padded(d.recv_src_idx[:, 1] + 1, counts, R * M) - 1)
        per_rank = torch.stack([(d.recv_topk_idx == l).any(1) for l in range(L)])
        for l in range(L):
            begin = 0
            for s in range(R):
                c = int((per_rank[l] & (d.recv_src_idx[:, 0] == s)).sum())
                assert layout_range[l, s] == begin << 32 | c
                begin += c
    assert out is into or torch.equal(bits(out), bits(into))
    exact = x.double() * (weights * (ids >= 0)).double().sum(1, keepdim=True)
    if mode == "none":
        assert torch.allclose(out.double(), exact, rtol=2**-7, atol=1e-4 if x.dtype != torch.float16 else 1e-3)
    denominator = (out.double() ** 2 + exact**2).sum()
    return float(1 - 2 * (out.double() * exact).sum() / denominator) if denominator > 0 else -1.0


@pytest.mark.parametrize("mode", QUANT_MODES)
@pytest.mark.parametrize("rows", ["expert", "rank"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_buffer(pool: RankPool, strategy: str, rows: str, mode: str) -> None:
    settings = Settings(strategy, rows, mode)
    case = Case((9, 0, 32), H=256, K=3, local_experts=4, dtype=torch.bfloat16, ids="distinct", seed=7)
    threshold = THRESHOLDS.get(mode, 2e-3)
    for diff in pool.run(3, check_buffer, case, 33, settings):
        assert diff < threshold


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("rows", ["expert", "rank"])
@settings(max_examples=40)
@given(drawn=small_cases(), mode=st.sampled_from(QUANT_MODES))
def test_any_buffer(pool: RankPool, strategy: str, rows: str, drawn: tuple[Case, int], mode: str) -> None:
    case, _ = drawn
    tokens = tuple(T % 65 for T in case.tokens)
    small = replace(case, tokens=tokens, H=128 * (1 + case.seed % 3))
    for diff in pool.run(case.R, check_buffer, small, max(1, *tokens), Settings(strategy, rows, mode)):
        assert diff < THRESHOLDS.get(mode, 2e-3)


@pytest.mark.parametrize(
    "mode", ["none", "int8", *(pytest.param(m, marks=pytest.mark.slow) for m in ("mx_fp4_e2m1", "block_fp8_e4m3"))]
)
@pytest.mark.parametrize("rows", [pytest.param("expert", marks=pytest.mark.slow), "rank"])
@pytest.mark.parametrize("strategy", ["default", pytest.param("alltoall", marks=pytest.mark.slow)])
def test_compiled_buffer(pool: RankPool, strategy: str, rows: str, mode: str) -> None:
    settings = Settings(strategy, rows, mode, "aot_eager")
    pool.run(2, check_buffer, Case((6, 9), H=128, dtype=torch.bfloat16, ids="distinct"), 9, settings)


@pytest.mark.slow
@pytest.mark.parametrize("rows", ["expert", "rank"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_buffer_under_inductor(pool: RankPool, strategy: str, rows: str) -> None:
    settings = Settings(strategy, rows, "int8", "inductor")
    pool.run(2, check_buffer, Case((6, 9), H=128, dtype=torch.bfloat16, ids="distinct"), 9, settings)


def gradients(ctx: RankContext, rows: str, backend: str, straight_through: bool) -> list[Tensor]:
    torch._dynamo.reset()
    buffer = make_buffer(ctx, Settings("default", rows), straight_through=straight_through)
    case = Case((6, 9), H=128, ids="distinct")
    x, ids, weights, _ = (given[ctx.rank] for given in make_inputs(case))
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()

    def step(x: Tensor, weights: Tensor) -> Tensor:
        mode = "int8" if straight_through else "none"
        recv_x, _, handle, _, _ = buffer.low_latency_dispatch(x, ids, 9, case.E, quant_mode=mode)
        return buffer.low_latency_combine(2 * recv_x, ids, weights, handle)[0]

    run = step if backend == "eager" else torch.compile(step, backend=backend, fullgraph=True)
    out = run(x, weights)
    return [out, *torch.autograd.grad(out.sum(), [x, weights]), (weights * (ids >= 0)).sum(1, keepdim=True)]


@pytest.mark.parametrize("straight_through", [False, True])
@pytest.mark.parametrize("rows", ["expert", "rank"])
def test_gradients(pool: RankPool, rows: str, straight_through: bool) -> None:
    eager = pool.run(2, gradients, rows, "eager", straight_through)
    compiled = pool.run(2, gradients, rows, "aot_eager", straight_through)
    for (out, grad_x, grad_weights, total), again in zip(eager, compiled, strict=True):
        # out = 2 · x · Σ w, as far as tokens have experts.
        torch.testing.assert_close(grad_x, (2 * total).expand_as(grad_x).detach())
        for a, b in zip((out, grad_x, grad_weights), again[:3], strict=True):
            assert_same("compiled", b, a)


# Rows with gaps cost what has come, whatever there is room for


PAGE = os.sysconf("SC_PAGE_SIZE")


def pages(tensor: Tensor) -> int:
    """How many pages of its memory have been touched."""
    first, last = tensor.data_ptr() // PAGE, (tensor.data_ptr() + tensor.nbytes - 1) // PAGE
    with open("/proc/self/pagemap", "rb") as file:
        file.seek(8 * first)
        entries = file.read(8 * (last - first + 1))
    return sum(entry >> 62 > 0 for entry in memoryview(entries).cast("Q"))


def untouched(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def touched_pages(ctx: RankContext, strategy: str, mode: str, hooks: bool, tokens: int) -> list[tuple[int, int]]:
    """By call, the pages that were touched, and the most that the rows that have come can lie in."""
    buffer, M, H = make_buffer(ctx, Settings(strategy, "rank")), 256, 4096
    case = Case((tokens, tokens), H=H, K=4, local_experts=8, dtype=torch.bfloat16, ids="distinct", absent=0.0)
    x, ids, weights, _ = (given[ctx.rank] for given in make_inputs(case))
    found = []
    for _ in range(3):  # the second one may get memory of the first
        recv_x, count, handle, _, hook = buffer.low_latency_dispatch(
            x, ids, M, case.E, quant_mode=mode, return_recv_hook=hooks
        )
        if hook is not None:
            hook()
        rows = int(count.sum())
        for part in recv_x if isinstance(recv_x, tuple) else (recv_x,):
            row_bytes = part.nbytes // (case.local_experts * 2 * M)
            found.append((pages(part), rows * (row_bytes // PAGE + 2)))
        if isinstance(recv_x, Tensor):
            out, *_ = buffer.low_latency_combine(recv_x, ids, weights, handle)
            torch.testing.assert_close(out.float(), x.float() * weights.sum(1, keepdim=True), rtol=0.02, atol=0.05)
        del recv_x, part
        y = untouched((case.local_experts, 2 * M, H), torch.bfloat16)
        for l, n in enumerate(count.tolist()):
            y[l, :n] = 1
        before = pages(y)
        out, _, hook = buffer.low_latency_combine(y, ids, weights, handle, return_recv_hook=hooks)
        if hook is not None:
            hook()
        found.append((pages(y), before))
        torch.testing.assert_close(out, weights.sum(1, keepdim=True).expand(tokens, H).bfloat16())
    return found


@pytest.mark.parametrize("tokens", [1, 256], ids=["few tokens", "more than is attached"])
@pytest.mark.parametrize("hooks", [False, True])
@pytest.mark.parametrize("mode", ["none", "block_fp8_e4m3"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_only_rows_that_have_come_are_touched(
    pool: RankPool, strategy: str, mode: str, hooks: bool, tokens: int
) -> None:
    for found in pool.run(2, touched_pages, strategy, mode, hooks, tokens):
        assert all(touched <= most for touched, most in found), found


def fresh_pages(ctx: RankContext, hooks: bool, alternates: bool) -> int:
    """The pages that the kernel has made for ten calls whose rows come to where those of the call before were; with
    `alternates`, calls of other sizes lie between.
    """
    buffer, M, H = make_buffer(ctx, Settings("default", "rank")), 256, 4096
    x = torch.tensor([1.0, 2.0]).unsqueeze(1).expand(2, H).contiguous()
    ids = torch.tensor([[0, 2, 4, 6]] * 2)
    expected, faults = torch.zeros(8, 6, H), 0
    expected[::2, :2] = x
    for step in range(12):
        if alternates:
            buffer.low_latency_dispatch(x, ids, M // 2, 8, use_fp8=False)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        rows, counts, _, _, hook = buffer.low_latency_dispatch(x, ids, M, 8, use_fp8=False, return_recv_hook=hooks)
        hook()
        faults += resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before if step >= 2 else 0
        assert_same("rows", rows[:, :6], expected)
        assert_same("counts", counts, torch.tensor([2, 0] * 4, dtype=torch.int32))
        rows[0, 5] = 7  # which is in no later result
        del rows, hook
    return faults


@pytest.mark.parametrize(("hooks", "alternates"), [(False, False), (True, False), (False, True)])
def test_rows_come_to_pages_that_are_there(pool: RankPool, hooks: bool, alternates: bool) -> None:
    """In ten calls, 8 rows of 4 pages each. What the program touches besides is made anew."""
    (faults,) = pool.run(1, fresh_pages, hooks, alternates)
    assert faults < 10 * 8 * 4 / 2, faults


def touched_by_backward(ctx: RankContext, strategy: str, hooks: bool) -> list[tuple[int, int]]:
    """The pages that backward has touched of gradients and saved rows, or anywhere, and the most that may be."""
    buffer, M, H, L, tokens = make_buffer(ctx, Settings(strategy, "rank")), 256, 4096, 8, 3
    case = Case((tokens, tokens), H=H, K=4, local_experts=L, dtype=torch.bfloat16, ids="distinct", absent=0.2)
    x, ids, *_ = (given[ctx.rank] for given in make_inputs(case))
    weights = torch.full(ids.shape, 0.5)
    num_experts = (ids >= 0).sum(1, keepdim=True)
    how, found, faults = {"return_recv_hook": hooks}, [], []

    def ones(count: Tensor) -> Tensor:
        rows = untouched((L, 2 * M, H), torch.bfloat16)
        for l, n in enumerate(count.tolist()):
            rows[l, :n] = 1
        return rows

    for _ in range(3):
        leaf, leaf_weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
        recv_x, count, handle, _, hook = buffer.low_latency_dispatch(leaf, ids, M, case.E, use_fp8=False, **how)
        hook()
        most = int(count.sum()) * (2 * H // PAGE + 2)
        gradient, y = ones(count), ones(count).requires_grad_()
        before = [pages(one) for one in (gradient, y)]
        faults.append(-resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
        recv_x.backward(gradient)
        faults[-1] += resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        assert_same("gradient of x", leaf.grad, num_experts.expand(tokens, H).bfloat16())
        out, _, hook = buffer.low_latency_combine(y, ids, leaf_weights, handle, **how)
        hook()
        upstream = torch.ones_like(out)
        faults[-1] -= resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        out.backward(upstream)
        faults[-1] += resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        assert leaf_weights.grad is not None and y.grad is not None
        assert_same("gradient of weights", leaf_weights.grad, (ids >= 0) * float(H))
        found += [(pages(gradient), before[0]), (pages(y), before[1]), (pages(y.grad), most)]
        for l, n in enumerate(count.tolist()):
            assert y.grad[l, :n].eq(0.5).all() and y.grad[l, n : n + 1].eq(0).all()
    return [*found, (min(faults), 2 * M * 4 * 2 * H // PAGE // 2)]


@pytest.mark.parametrize("hooks", [False, True])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_backward_touches_only_rows_that_have_come(pool: RankPool, strategy: str, hooks: bool) -> None:
    for found in pool.run(2, touched_by_backward, strategy, hooks):
        assert all(touched <= most for touched, most in found), found


def repeated_ids(ctx: RankContext, strategy: str) -> tuple[str, str]:
    buffer = make_buffer(ctx, Settings(strategy, "rank"))
    ids = torch.tensor([[0, 1, 0 if ctx.rank == 1 else 2]])
    error = error_of(buffer.low_latency_dispatch, torch.ones(1, 8), ids, 1, 8, use_fp8=False)
    rows, *_ = buffer.low_latency_dispatch(torch.ones(1, 8), ids[:, :2], 1, 8, use_fp8=False)
    assert rows.sum() == (32 if ctx.rank == 0 else 0)
    return error


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_ids_that_repeat_are_refused_on_all_ranks(pool: RankPool, strategy: str) -> None:
    for kind, message in pool.run(2, repeated_ids, strategy):
        assert kind == "RuntimeError" and "topk_idx has the id 0 of token 0 twice" in message, message


# Tokens that are masked


def masked(ctx: RankContext, settings: Settings) -> None:
    torch._dynamo.reset()
    buffer, M, r = make_buffer(ctx, settings), 9, ctx.rank
    case = Case((6, 9), H=128, K=3, local_experts=4, ids="distinct")
    x, ids, weights, _ = (given[r] for given in make_inputs(case))
    mask = torch.arange(len(x)) % 3 != r
    leaf, weights = x.clone().requires_grad_(settings.quant_mode == "none"), weights.clone().requires_grad_()

    def step(x: Tensor, ids: Tensor, weights: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        recv_x, count, handle, *_ = buffer.low_latency_dispatch(
            x, ids, M, case.E, quant_mode=settings.quant_mode, x_active_mask=mask
        )
        y = recv_x
        if isinstance(recv_x, tuple):
            flat = [part.flatten(0, 1) if settings.rows == "rank" else part for part in recv_x]
            y = quantization.dequantize(*flat).view(*recv_x[0].shape[:-1], case.H).to(x.dtype)
        out = buffer.low_latency_combine(2 * y, ids, weights, handle, x_active_mask=mask)[0]
        return out, count, y

    run = step if settings.backend == "eager" else torch.compile(step, backend=settings.backend, fullgraph=True)
    out, count, rows = run(leaf, ids, weights, mask)
    wanted, wanted_count, wanted_rows = step(leaf, ids.where(mask.unsqueeze(1), -1), weights, None)
    assert_same("count", count, wanted_count)
    assert_same("rows", rows.detach(), wanted_rows.detach())
    assert_same("out", out.detach(), wanted.detach())
    assert not out[~mask].any() and out[mask & (ids >= 0).any(1)].any()
    needed = [leaf, weights] if leaf.requires_grad else [weights]
    grads = torch.autograd.grad(out.sum(), needed)
    for grad, expected in zip(grads, torch.autograd.grad(wanted.sum(), needed), strict=True):
        assert_same("grad", grad, expected)
        assert not grad[~mask].any() and grad[mask & (ids >= 0).any(1)].any()


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
@pytest.mark.parametrize("mode", ["none", "int8"])
@pytest.mark.parametrize("rows", ["expert", "rank"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_masked_tokens_send_nothing_and_come_back_as_zeros(
    pool: RankPool, strategy: str, rows: str, mode: str, backend: str
) -> None:
    pool.run(2, masked, Settings(strategy, rows, mode, backend))


def masked_functions(ctx: RankContext, strategy: str) -> list[tuple[str, str]]:
    group, last = ctx.prepared_group(strategy), ctx.rank == ctx.size - 1
    x, ids, mask = torch.ones(3, 8), torch.tensor([[0, 1]]).repeat(3, 1), torch.tensor([True, False, True])
    buffer = make_buffer(ctx, Settings(strategy, "rank"))
    sends = (
        partial(deep_ep.low_latency_dispatch, x, ids, 3, 2, group=group),
        partial(buffer.low_latency_dispatch, x, ids, 3, 2, use_fp8=False),
    )
    errors = []
    for wrong in (mask[1:], mask.int(), mask.unsqueeze(1)):
        errors += [error_of(send, x_active_mask=wrong if last else mask) for send in sends]
    out = sends[0](x_active_mask=mask)
    combine = partial(deep_ep.low_latency_combine, out.recv_x, ids, torch.ones(3, 2), out.handle, group=group)
    errors += [error_of(combine, x_active_mask=mask[1:] if last else mask), error_of(combine)]
    assert_same("combined", combine(x_active_mask=mask), 2 * x * mask.unsqueeze(1))
    return errors


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_wrong_mask_is_refused_on_all_ranks(pool: RankPool, strategy: str) -> None:
    says = ["[2]"] * 2 + ["torch.int32 [3]"] * 2 + ["[3, 1]"] * 2 + ["[2]"]
    for *errors, (kind, without) in pool.run(2, masked_functions, strategy):
        assert kind == "RuntimeError" and "not dispatched" in without, without
        for (_, message), got in zip(errors, says, strict=True):
            assert "x_active_mask must" in message and f"got {got}" in message, message


def composed(ctx: RankContext, quant_mode: str) -> None:
    """Where there is no kernel for rows with gaps, they are made of others: the same, to the bit."""
    group, M = ctx.prepared_group("default").group_name, 9
    case = Case((6, 9), H=128, K=3, local_experts=4, dtype=torch.bfloat16, ids="distinct")
    x, ids, weights, _ = (given[ctx.rank] for given in make_inputs(case))
    parts: list[Tensor] = []
    if quant_mode != "none":
        parts = list(quantization.quantize(x, quant_mode, low_latency=True))
        x = quantization.pack(*parts)
    sizes = case.E, case.R, group
    names = ("recv_x", "recv_scales", "recv_count", "src_info", "layout", "recv_src_idx", "layout_range", "send_head")
    results = overload("low_latency_dispatch_padded", "default")(x, ids, parts, M, *sizes)
    again = padded_dispatch_op._around("default")(x, ids, parts, M, *sizes)
    for name, a, wanted in zip(names, again, results, strict=True):
        assert a.dtype == wanted.dtype and a.shape == wanted.shape, name
        assert_same(name, as_bytes(a).to(torch.int16), as_bytes(wanted).to(torch.int16))
    y = torch.randn(case.local_experts, 2 * M, case.H)
    rest = ids, weights, *results[5:], *sizes
    combined = overload("low_latency_combine_padded", "default")(y, *rest)
    assert_same("combined", padded_combine_op._around("default")(y, *rest), combined)


@pytest.mark.parametrize("quant_mode", ["none", "int8", "block_fp8_e4m3", "mx_fp4_e2m1"])
def test_rows_with_gaps_out_of_those_without(pool: RankPool, quant_mode: str) -> None:
    pool.run(2, composed, quant_mode)


def under_another_default_dtype(ctx: RankContext, strategy: str) -> None:
    """Clients set torch's default dtype to bf16; nothing may depend on it."""
    buffer = make_buffer(ctx, Settings(strategy, "expert"))
    case = Case((6, 9), H=128, K=3, local_experts=4, dtype=torch.bfloat16, ids="distinct")
    x, ids, weights, _ = (given[ctx.rank] for given in make_inputs(case))

    def results() -> list[Tensor]:
        found = []
        for mode in ("bf16", "int8", "mx_fp8_e4m3"):
            recv_x, _, handle, _, _ = buffer.low_latency_dispatch(
                x, ids, 9, case.E, topk_weights=weights, quant_mode=mode
            )
            y = recv_x
            if isinstance(recv_x, tuple):
                y = quantization.dequantize(*recv_x).bfloat16()
            found.append(buffer.low_latency_combine(y, ids, weights, handle, out=x.new_empty(12, 128))[0])
        rows = deep_ep.dispatch(x.clone().requires_grad_(), ids, weights, num_experts=case.E, group=buffer.group)
        out = deep_ep.combine(rows.recv_x, rows.handle, group=buffer.group)
        return [*found, rows.recv_topk_weights, out, *torch.autograd.grad(out.sum(), rows.recv_x)]

    expected = results()
    torch.set_default_dtype(torch.bfloat16)
    try:
        actual = results()
    finally:
        torch.set_default_dtype(torch.float32)
    for i, (a, wanted) in enumerate(zip(actual, expected, strict=True)):
        assert_same(f"result {i}", a, wanted)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_default_dtype_does_not_matter(pool: RankPool, strategy: str) -> None:
    pool.run(2, under_another_default_dtype, strategy)


def strategy_of_buffer(ctx: RankContext) -> None:
    group = ctx.prepared_group("default")
    buffer = deep_ep.Buffer(group, low_latency_strategy="ops", comm_alg="ccu")
    ids = torch.zeros(2, 1, dtype=torch.int64)
    kind, message = error_of(buffer.low_latency_dispatch, torch.ones(2, 8), ids, 2, ctx.size, use_fp8=False)
    assert kind == "RuntimeError" and "low_latency_dispatch.ops" in message
    kind, message = error_of(deep_ep.Buffer, group, low_latency_strategy="ring")
    assert kind == "ValueError" and "low_latency_strategy must be one of default, alltoall, ops" in message
    deep_ep.init(group, strategy="default")


def test_low_latency_strategy_of_a_buffer(pool: RankPool) -> None:
    pool.run(2, strategy_of_buffer)


def quantised_gradient(ctx: RankContext) -> tuple[str, str]:
    buffer = make_buffer(ctx, Settings("default", "expert"))
    x = torch.ones(2, 32, requires_grad=True)
    return error_of(buffer.low_latency_dispatch, x, torch.zeros(2, 1, dtype=torch.int64), 4, 2)


def test_quantised_dispatch_has_no_gradient(pool: RankPool) -> None:
    for kind, message in pool.run(2, quantised_gradient):
        assert kind == "RuntimeError" and "straight_through" in message


def wrong_calls(ctx: RankContext, strategy: str) -> list[tuple[str, str]]:
    group = ctx.prepared_group(strategy)
    x, ids, last = torch.ones(3, 8), torch.tensor([[0, 1]]).repeat(3, 1), ctx.rank == ctx.size - 1
    call = partial(deep_ep.low_latency_dispatch, group=group)
    errors = [
        error_of(call, x, ids, 2 if last else 3, ctx.size),
        error_of(call, x, ids, 4 if last else 3, ctx.size),
        error_of(call, x, ids + 7 * last, 3, ctx.size),
        error_of(call, x, torch.zeros_like(ids) if last else ids, 3, ctx.size),
        error_of(call, x, ids, 0 if last else 3, ctx.size),
    ]
    out = deep_ep.low_latency_dispatch(x, ids, 3, ctx.size, group=group)
    weights = torch.ones(3, 2)
    errors.append(
        error_of(
            deep_ep.low_latency_combine, out.recv_x[1:] if last else out.recv_x, ids, weights, out.handle, group=group
        )
    )
    wrong = out.handle._replace(layout_range=out.handle.layout_range[1:]) if last else out.handle
    errors.append(error_of(deep_ep.low_latency_combine, out.recv_x, ids, weights, wrong, group=group))
    combined = deep_ep.low_latency_combine(out.recv_x, ids, weights, out.handle, group=group)
    assert_same("afterwards", combined, 2 * x)
    return errors


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_wrong_arguments_raise_on_all_ranks(pool: RankPool, strategy: str) -> None:
    says = (
        ("x has 3 tokens", "num_max_dispatch_tokens_per_rank = 2"),
        ("num_max_dispatch_tokens_per_rank must be the same on all ranks",),
        ("topk_idx has the id 7", "0..1"),
        ("topk_idx sends token 0 to rank 0 2 times", "allowed are 1"),
        ("num_max_dispatch_tokens_per_rank must be 1..", "got 0"),
        ("recv_src_idx", "shape"),
        ("layout_range", "shape"),
    )
    for errors in pool.run(2, wrong_calls, strategy):
        for (kind, message), wanted in zip(errors, says, strict=True):
            assert kind == "RuntimeError" and all(text in message for text in wanted), message


# Receive hooks: calls that do not wait for peers


def finish(event: deep_ep.EventOverlap, hook: Callable[[], None]) -> None:
    if event.event is not None:
        event.current_stream_wait()
        event.current_stream_wait()  # it is over
    else:
        hook()


def split(ctx: RankContext, strategy: str, rows: str, backend: str, quant_mode: str, way: str) -> None:
    """Rank 0 issues dispatch and combine before, the other ranks after rank 0 has been told to go on: a call that waits
    for its peers cannot pass."""
    torch._dynamo.reset()
    buffer, case, M, r = make_buffer(ctx, Settings(strategy, rows)), Case((6, 9), H=128, ids="distinct"), 9, ctx.rank
    keys = prepare(ctx, "dispatch", "combine")
    x, ids, weights, _ = (given[r] for given in make_inputs(case))

    def step(x: Tensor, ids: Tensor, weights: Tensor, stats: Tensor, hooks: bool) -> tuple[Any, ...]:
        later = {way: True} if hooks else {}
        kwargs = {"cumulative_local_expert_recv_stats": stats, "quant_mode": quant_mode, **later}
        if hooks and r > 0:
            x = torch.ops.deep_ep_tests.meet(x, r == 0, keys[0])
        received = buffer.low_latency_dispatch(x, ids, M, case.E, **kwargs)
        recv_x, count, handle, *ways = received
        if hooks:
            if r == 0:
                weights = torch.ops.deep_ep_tests.meet(weights, r == 0, keys[0])
            finish(*ways)
        y = recv_x
        if isinstance(recv_x, tuple):
            flat = [part.flatten(0, 1) if rows == "rank" else part for part in recv_x]
            y = quantization.dequantize(*flat).view(*recv_x[0].shape[:-1], case.H).to(x.dtype)
        if hooks and r > 0:
            y = torch.ops.deep_ep_tests.meet(y, r == 0, keys[1])
        out, *ways = buffer.low_latency_combine(2 * y, ids, weights, handle, **later)
        if hooks:
            if r == 0:
                stats = stats + torch.ops.deep_ep_tests.meet(stats, r == 0, keys[1])
            finish(*ways)
        return recv_x, count, handle, out, stats

    run = step if backend == "eager" else torch.compile(step, backend=backend, fullgraph=True)
    zeros = torch.zeros(case.local_experts, dtype=torch.int32)
    expected = step(x, ids, weights, zeros.clone(), False)
    actual = run(x, ids, weights, stats := zeros.clone(), True)
    assert_same("stats", stats, expected[4])
    for a, wanted in zip(tree_leaves(actual[:4]), tree_leaves(expected[:4]), strict=True):
        if isinstance(a, Tensor):
            assert_same("with hooks", as_bytes(a).to(torch.int16), as_bytes(wanted).to(torch.int16))
        else:
            assert a == wanted


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
@pytest.mark.parametrize("quant_mode", ["none", "int8", pytest.param("mx_fp4_e2m1", marks=pytest.mark.slow)])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_call_with_a_hook_does_not_wait(pool: RankPool, strategy: str, quant_mode: str, backend: str) -> None:
    pool.run(2, split, strategy, "rank", backend, quant_mode, "return_recv_hook")


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("strategy", ALLTOALL_IS_SLOW)
def test_a_call_with_an_event_does_not_wait(pool: RankPool, strategy: str, backend: str) -> None:
    pool.run(2, split, strategy, "rank", backend, "int8", "async_finish")


def interleaved_calls(ctx: RankContext, strategy: str) -> None:
    """Two micro-batches at once, of inputs that nobody else keeps, in between a plain call, and gradients."""
    info, M, r = info_of(ctx.prepared_group(strategy)), 16, ctx.rank
    expected = [Expected(Case((6, 9, 0), H=32, ids="distinct", seed=seed), M) for seed in (1, 2)]
    (x0, x1), (ids0, ids1) = ([getattr(e, what)[r] for e in expected] for what in ("xs", "ids"))
    E = 6

    first = dispatch_op.start(info, x0.clone(), ids0.clone(), M, E)
    leaf = x1.clone().requires_grad_()
    second = dispatch_op.start(info, leaf, ids1, M, E)
    out1 = dispatch_op.arriving(second)
    between = dispatch_op.call(info, x0, ids0, M, E)
    second.join()
    out0 = dispatch_op.complete(first)
    for e, (recv, count, handle) in zip(expected, (out0, out1), strict=True):
        outputs = recv.detach(), count, handle.src_info, handle.layout_range, handle.send_head
        for name, actual, wanted in zip(NAMES, outputs, e.outputs(r), strict=True):
            assert_same(name, actual, wanted)
    assert_same("between", between[0], expected[0].dispatched[r].recv_x)
    (grad_x,) = torch.autograd.grad(out1.recv_x, leaf, expected[1].grad_ys[r])
    assert_same("grad_x", grad_x, expected[1].grad_xs[r])

    y, weights = expected[1].ys[r].clone().requires_grad_(), expected[1].weights[r].clone().requires_grad_()
    started = combine_op.start(info, y, ids1, weights, out1.handle)
    out = combine_op.arriving(started)
    started.join()
    assert_same("combined_x", out, expected[1].outs[r])
    grad_y, _ = torch.autograd.grad(out, [y, weights], expected[1].grad_outs[r])
    assert_same("grad_y", grad_y, expected[1].grad_ys[r])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_interleaved_calls(pool: RankPool, strategy: str) -> None:
    pool.run(3, interleaved_calls, strategy)


def wrong_hooks(ctx: RankContext, strategy: str) -> list[tuple[str, str]]:
    buffer, last = make_buffer(ctx, Settings(strategy, "rank")), ctx.rank == ctx.size - 1
    group = ctx.prepared_group(strategy).group_name
    x, ids = torch.ones(3, 8), torch.tensor([[0, 1]]).repeat(3, 1)
    dispatch = partial(buffer.low_latency_dispatch, use_fp8=False, return_recv_hook=True)
    errors = [
        error_of(dispatch, x, ids, 2 if last else 3, ctx.size) if last else error_of(hook_of, dispatch(x, ids, 3, 2))
    ]
    wrong = partial(dispatch, x, ids + 7 * last, 3, ctx.size)
    errors.append(error_of(wrong) if last else error_of(hook_of, wrong()))

    recv_x, _, handle, _, hook = dispatch(x, ids, 3, ctx.size)
    hook()
    hook()
    packed = handle.packed
    ticket = overload("low_latency_dispatch_start", strategy)(x, ids, 3, ctx.size, ctx.size, group, "")
    rows = [torch.ones(12, 8), ids, torch.ones(3, 2), packed.src_info, packed.layout_range, packed.send_head]
    sizes = ctx.size, ctx.size, 0
    errors.append(error_of(overload("wait", strategy), ticket, "low_latency_combine", rows, *sizes, group))
    out = buffer.low_latency_combine(recv_x, ids, rows[2], handle, return_recv_hook=True)
    dispatch(x, ids, 3, ctx.size)  # nobody calls its hook
    hook_of(out)
    assert_same("afterwards", out[0], 2 * x)
    return errors


def hook_of(results: tuple[Any, ...]) -> None:
    results[-1]()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_wrong_calls_with_hooks(pool: RankPool, strategy: str) -> None:
    says = (
        ("rank 1: x has 3 tokens",),
        ("rank 1: topk_idx has the id 7",),
        ("deep_ep.wait: ticket must be what low_latency_combine_start", "got that of low_latency_dispatch_start"),
    )
    for errors in pool.run(2, wrong_hooks, strategy):
        for (kind, message), wanted in zip(errors, says, strict=True):
            assert kind == "RuntimeError" and all(text in message for text in wanted), message


def opcheck(ctx: RankContext, strategy: str) -> None:
    group = ctx.prepared_group(strategy)
    case = Case((3, 5), ids="distinct")
    x, ids, weights, _ = (given[ctx.rank] for given in make_inputs(case))
    sizes = (case.E, case.R, group.group_name, "")
    check = partial(torch.library.opcheck, raise_exception=True)
    op = overload("low_latency_dispatch", strategy)
    out = op(x, ids, 5, *sizes)
    check(op, (x.requires_grad_(), ids, 5, *sizes))
    y = torch.randn(out[0].shape)
    combine = overload("low_latency_combine", strategy)
    check(combine, (y.requires_grad_(), ids, weights.requires_grad_(), *out[2:], *sizes))
    # The number of a ticket is another one each time, which the test of autograd's effect on results cannot know.
    tests = ("test_schema", "test_faketensor")
    check(overload("low_latency_dispatch_start", strategy), (x.detach(), ids, 5, *sizes), test_utils=tests)
    rest = (y.detach(), ids, weights.detach(), *out[2:], *sizes)
    check(overload("low_latency_combine_start", strategy), rest, test_utils=tests)


def opcheck_padded(ctx: RankContext, strategy: str) -> None:
    group = ctx.prepared_group(strategy).group_name
    case = Case((3, 5), H=32, ids="distinct")
    x, ids, weights, _ = (given[ctx.rank] for given in make_inputs(case))
    sizes = case.E, case.R, group
    check = partial(torch.library.opcheck, raise_exception=True)
    op, tests = overload("low_latency_dispatch_padded", strategy), ("test_schema", "test_faketensor")
    out = op(x, ids, [], 5, *sizes)
    check(op, (x.requires_grad_(), ids, [], 5, *sizes))
    x = x.detach()
    data, scales = quantization.quantize(x, "int8", low_latency=True)
    rows = quantization.pack(data, scales)
    check(op, (rows, ids, [data, scales], 5, *sizes), test_utils=tests)
    y = torch.randn(out[0].shape)
    combine = overload("low_latency_combine_padded", strategy)
    check(combine, (y.requires_grad_(), ids, weights.requires_grad_(), *out[5:], *sizes))
    check(overload("low_latency_dispatch_padded_start", strategy), (x, ids, [], 5, *sizes), test_utils=tests)
    rest = (y.detach(), ids, weights.detach(), *out[5:], *sizes)
    check(overload("low_latency_combine_padded_start", strategy), rest, test_utils=tests)


@pytest.mark.parametrize("strategy", ALLTOALL_IS_SLOW)
def test_opcheck_of_rows_with_gaps(pool: RankPool, strategy: str) -> None:
    pool.run(2, opcheck_padded, strategy)


@pytest.mark.parametrize("strategy", ALLTOALL_IS_SLOW)
def test_opcheck(pool: RankPool, strategy: str) -> None:
    pool.run(2, opcheck, strategy)


def check_int8(ctx: RankContext, strategy: str) -> None:
    """low_latency_dispatch_int8: what Buffer makes of quantised rows, eager and compiled."""
    group, r = ctx.prepared_group(strategy), ctx.rank
    case = Case((3, 0, 5), H=40, K=2, local_experts=2, dtype=torch.bfloat16, ids="distinct")
    x, ids, _, _ = (given[r] for given in make_inputs(case))
    x[1:2] = 0
    buffer = deep_ep.Buffer(group, low_latency_mode=True)
    (data, scales), count, handle, _, _ = buffer.low_latency_dispatch(x, ids, 6, case.E, quant_mode="int8")
    wanted = data, scales, count, handle.src_info, handle.layout_range, handle.send_head
    op = overload("low_latency_dispatch_int8", strategy)
    sizes = 6, case.E, case.R, group.group_name
    compiled = torch.compile(lambda x, ids: op(x, ids, *sizes), backend="aot_eager", fullgraph=True)
    for results in (op(x, ids, *sizes), compiled(x, ids)):
        for name, actual, expected in zip(("data", "scales", *NAMES[1:]), results, wanted, strict=True):
            assert_same(name, actual, expected)
    torch.library.opcheck(op, (x, ids, *sizes), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_int8_rows_of_the_kernel(pool: RankPool, strategy: str) -> None:
    pool.run(3, check_int8, strategy)


def wrong_int8(ctx: RankContext, strategy: str) -> tuple[str, str]:
    """Rank 1 has too many tokens: all ranks say so, and the group stays usable."""
    group = ctx.prepared_group(strategy)
    op = overload("low_latency_dispatch_int8", strategy)
    x, ids = torch.ones(3 if ctx.rank == 1 else 1, 8), torch.zeros(3 if ctx.rank == 1 else 1, 1, dtype=torch.int64)
    error = error_of(op, x, ids, 2, 2, 2, group.group_name)
    check_usable = op(x[:1], ids[:1], 2, 2, 2, group.group_name)
    assert check_usable[2].tolist() == ([2] if ctx.rank == 0 else [0])
    return error


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_int8_rows_of_too_many_tokens(pool: RankPool, strategy: str) -> None:
    for error in pool.run(2, wrong_int8, strategy):
        assert error[0] == "RuntimeError" and "x has 3 tokens" in error[1], error


@pytest.mark.parametrize("comm_alg", ["", *COMM_ALGS])
def test_ops_traces_without_a_device_and_says_what_is_missing(comm_alg: str) -> None:
    """The shapes are those of torch_npu's npu_moe_distribute_dispatch_v2."""
    T, H, K, M, E, R = 3, 8, 2, 4, 8, 2
    arguments = (M, E, R, "a group", comm_alg)
    with FakeTensorMode():
        x, ids = torch.empty(T, H, dtype=torch.bfloat16), torch.empty(T, K, dtype=torch.int64)
        out = torch.ops.deep_ep.low_latency_dispatch.ops(x, ids, *arguments)
        back = torch.ops.deep_ep.low_latency_combine.ops(
            out[0], ids, torch.empty(T, K), *out[2:], E, R, "a group", comm_alg
        )
    N = R * M * min(K, E // R)
    assert [tuple(tensor.shape) for tensor in out] == [(N, H), (E // R,), (128 * N,), (E,), (T, K)]
    assert back.shape == (T, H) and back.dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match="torch_npu is not loaded"):
        torch.ops.deep_ep.low_latency_dispatch.ops(torch.ones(T, H), torch.zeros(T, K, dtype=torch.int64), *arguments)


def mode_ops(ctx: RankContext) -> tuple[str, str]:
    group = ctx.prepared_group("default")
    deep_ep.destroy(group)
    info = deep_ep.init(group, strategy="ops", comm_alg="fullmesh_v2", num_bytes=WINDOW_BYTES)
    try:
        assert (info.low_latency.value, info.comm_alg) == ("ops", "fullmesh_v2")
        ids = torch.zeros(2, 1, dtype=torch.int64)
        return error_of(deep_ep.low_latency_dispatch, torch.ones(2, 8), ids, 2, ctx.size, group=group)
    finally:
        deep_ep.destroy(group)
        deep_ep.init(group, strategy="default", num_bytes=WINDOW_BYTES)


def test_the_strategy_ops_takes_the_overload_ops(pool: RankPool) -> None:
    for kind, message in pool.run(2, mode_ops):
        assert kind == "RuntimeError" and "low_latency_dispatch.ops" in message
    with pytest.raises(ValueError, match="comm_alg must be one of hierarchy"):
        deep_ep.init(comm_alg="ring")


def private_bytes() -> int:
    """Resident memory without that of windows, which is reserved from the start."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) << 10


def alternate(ctx: RankContext, strategy: str, num_calls: int) -> tuple[int, int]:
    """Normal and low-latency calls of random sizes. Returns the growth in memory, and in the number of files that the
    process has open, over the last four fifths of them."""
    group = ctx.prepared_group(strategy).group_name
    random = Random(5)
    early, before, r = 0, 0, ctx.rank
    for n in range(num_calls // 2):
        if n == num_calls // 10:
            early, before = private_bytes(), len(os.listdir("/proc/self/fd"))
        tokens = tuple(random.randint(0, 24) for _ in range(ctx.size))
        case = Case(tokens, H=8 * random.randint(1, 16), K=random.randint(1, 4), ids="distinct", seed=n)
        M = max(1, *tokens)
        xs, all_ids, all_weights, _ = make_inputs(case)
        dispatched = reference.dispatch(xs, all_ids, all_weights, case.E, [num_rows(case, M)] * case.R)
        src = [d.recv_src_idx for d in dispatched]
        ys = [expert_outputs(d.recv_x, d.recv_src_idx) for d in dispatched]
        x, ids, weights, y = xs[r], all_ids[r], all_weights[r], ys[r]
        sizes = (case.E, case.R, group)
        if n % 2:
            out = overload("low_latency_dispatch", strategy)(x, ids, M, *sizes, "")
            combined = overload("low_latency_combine", strategy)(y, ids, weights, *out[2:], *sizes, "")
        else:
            out = overload("dispatch", strategy)(x, ids, weights, case.E, case.R, num_rows(case, M), group)
            combined = overload("combine", strategy)(y, ids, weights, *out[8:], *sizes)
        assert_same("recv_x", out[0], dispatched[r].recv_x)
        assert_same("combined_x", combined, reference.combine(ys, all_weights, src)[r])
    return private_bytes() - early, len(os.listdir("/proc/self/fd")) - before


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_thousand_alternating_calls(pool: RankPool, strategy: str) -> None:
    for growth, files in pool.run(4, alternate, strategy, 1000):
        assert growth < 16 << 20 and files <= 0
