"""fused_deep_moe: values and counts against the reference, gradients, errors, compiled against eager, and against the
parts that it fuses.

T local tokens · H hidden · K top-k · E experts · R ranks · L = E/R local experts · I intermediate size.
"""

import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import reference
import torch
from cases import IDS, Case, assert_same, make_inputs
from hypothesis import given, settings
from hypothesis import strategies as st
from op_calls import error_of
from ranks import STRATEGIES, RankContext, RankPool
from torch import Tensor

import deep_ep
from deep_ep import FuseMode
from deep_ep._library import library
from deep_ep.fused_options import FusedOptions
from deep_ep.kernels.fused_deep_moe import int8_product
from deep_ep.ops import fused_deep_moe as fused_op
from deep_ep.weights import bits_to_scale, scale_to_bits

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MODES = tuple(FuseMode)


@dataclass(frozen=True)
class Layer:
    """An MoE layer on all ranks: its routing, and the width of its experts."""

    case: Case
    I: int = 64
    mode: FuseMode = FuseMode.FUSED_DEEP_MOE
    quant_mode: int = 0


class Inputs:
    """Of all ranks, by rank; `weights` are ordinary ones."""

    def __init__(self, layer: Layer) -> None:
        case, self.layer = layer.case, layer
        self.xs, self.ids, self.topk_weights, _ = make_inputs(case)
        for x in self.xs:
            x[:1] = 0  # which has no scale of its own
        generator = torch.Generator().manual_seed(case.seed + 1)

        def weights(*shape: int) -> list[Tensor]:
            scale = shape[-1] ** -0.5
            return [
                (torch.randn(case.local_experts, *shape, generator=generator) * scale).to(case.dtype)
                for _ in range(case.R)
            ]

        gate_ups, downs = weights(2 * layer.I, case.H), weights(case.H, layer.I)
        self.weights: tuple[list[Tensor], ...] = gate_ups, downs
        if layer.quant_mode:
            quantised = [[deep_ep.quantize_weight(w) for w in ws] for ws in self.weights]
            self.weights = tuple([pair[i] for pair in pairs] for i in (0, 1) for pairs in quantised)

    def arguments(self, rank: int) -> list[Any]:
        """Of the function, for this rank."""
        layer, case = self.layer, self.layer.case
        fused = deep_ep.fused_weights(*(by_rank[rank] for by_rank in self.weights), fuse_mode=layer.mode)
        own = [self.xs[rank], self.ids[rank], self.topk_weights[rank]]
        return [*own, *fused, self.limit(), case.E]

    def limit(self) -> int:
        """num_max_dispatch_tokens_per_rank: just enough."""
        if self.layer.mode is FuseMode.FUSED_DEEP_MOE:
            return max(1, *self.layer.case.tokens)
        return max(1, int(self.counts().sum((1, 2)).max()))

    def counts(self) -> Tensor:
        """int32 [R, L, R]: rows by destination, local expert and source."""
        case = self.layer.case
        counts = torch.stack([torch.bincount(ids[ids >= 0], minlength=case.E) for ids in self.ids])
        return counts.view(case.R, case.R, case.local_experts).permute(1, 2, 0).to(torch.int32)

    def outputs(self) -> list[Tensor]:
        return reference.fused_deep_moe(self.xs, self.ids, self.topk_weights, *self.weights)

    def recv_count(self, rank: int) -> Tensor:
        counts = self.counts()[rank]
        return counts.reshape(-1) if self.layer.mode is FuseMode.FUSED_DEEP_MOE else counts.sum(1, dtype=torch.int32)


def difference(actual: Tensor, expected: Tensor) -> float:
    """1 - 2Σxy/Σ(x² + y²), in double."""
    x, y = actual.double(), expected.double()
    total = (x * x + y * y).sum()
    return 0.0 if total == 0 else float(1 - 2 * (x * y).sum() / total)


def check(layer: Layer, rank: int, out: Tensor, counts: Tensor, inputs: Inputs) -> None:
    expected = inputs.outputs()[rank]
    assert out.dtype == expected.dtype and out.shape == expected.shape
    assert out.isfinite().all()
    assert difference(out, expected) < 1e-5, difference(out, expected)
    tolerance = 0.05 * expected.float().abs().max() if expected.numel() else 0
    assert ((out.float() - expected.float()).abs() <= tolerance).all()
    assert torch.equal(counts, inputs.recv_count(rank))
    assert not out[(inputs.ids[rank] < 0).all(1)].any()


def one(ctx: RankContext, layer: Layer, strategy: str) -> None:
    group, inputs = ctx.prepared_group(strategy), Inputs(layer)
    out, counts = deep_ep.fused_deep_moe(
        *inputs.arguments(ctx.rank), quant_mode=layer.quant_mode, fuse_mode=layer.mode, group=group
    )
    check(layer, ctx.rank, out, counts, inputs)


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    R, mode = draw(st.integers(1, 4)), draw(st.sampled_from(MODES))
    case = Case(
        tokens=tuple(draw(st.lists(st.integers(0, 20), min_size=R, max_size=R))),
        H=draw(st.integers(1, 80)),
        K=draw(st.integers(1, 6)),
        local_experts=draw(st.integers(1, 5)),
        dtype=draw(st.sampled_from(DTYPES)),
        ids=draw(st.sampled_from(IDS)),
        absent=draw(st.sampled_from((0.0, 0.25, 0.9))),
        seed=draw(st.integers(0, 2**32 - 1)),
    )
    widths = st.sampled_from((64, 128, 192)) if mode is FuseMode.FUSED_DEEP_MOE else st.integers(1, 100)
    return Layer(case, draw(widths), mode, draw(st.integers(0, 1)))


@pytest.mark.parametrize("strategy", ["default", pytest.param("alltoall", marks=pytest.mark.slow)])
@settings(max_examples=40)
@given(layer=layers())
def test_any_layer(pool: RankPool, strategy: str, layer: Layer) -> None:
    pool.run(layer.case.R, one, layer, strategy)


# Layouts


@pytest.mark.parametrize("I", [64, 192])
def test_layouts_of_weights(I: int) -> None:
    L, H = 2, 5
    gate_up, down = torch.arange(L * 2 * I * H).view(L, 2 * I, H).float(), torch.arange(L * H * I).view(L, H, I).float()
    gate, up = gate_up.chunk(2, 1)
    fused = deep_ep.fused_weights(gate_up, down, fuse_mode=FuseMode.FUSED_DEEP_MOE)
    assert fused.gmm1_weight.shape == (L, H, 2 * I) and torch.equal(fused.gmm2_weight, down)
    for tile, columns in enumerate(fused.gmm1_weight.split(128, 2)):
        i = slice(64 * tile, 64 * tile + 64)
        assert torch.equal(columns.transpose(1, 2), torch.cat([gate[:, i], up[:, i]], 1))
    fused = deep_ep.fused_weights(gate_up, down, fuse_mode=FuseMode.DISPATCH_FFN_COMBINE)
    assert torch.equal(fused.gmm1_weight, gate_up.transpose(1, 2))
    assert torch.equal(fused.gmm2_weight, down.transpose(1, 2))


def test_scales() -> None:
    """In the order of gmm1's columns; and as bits, which C++ reads back."""
    L, H, I = 2, 3, 64
    weights = torch.ones(L, 2 * I, H, dtype=torch.int8), torch.ones(L, H, I, dtype=torch.int8)
    scales = torch.rand(L, 2 * I), torch.rand(L, H)
    for scale in scales:
        scale[0, :2] = torch.tensor([0.0, 1e-40])
    fused = deep_ep.fused_weights(*weights, *scales)
    assert torch.equal(fused.gmm1_weight_scale, scales[0]) and torch.equal(
        fused.gmm2_weight_scale, scales[1]
    )  # one tile
    fused = deep_ep.fused_weights(*weights, scales[0].unsqueeze(2), scales[1], fuse_mode=2)
    for scale, bits in ((scales[0], fused.gmm1_weight_scale), (scales[1], fused.gmm2_weight_scale)):
        assert bits.dtype == torch.int64
        assert bits.flatten().tolist() == [library.deep_ep_fused_bits_of(value) for value in scale.flatten().tolist()]
        assert scale.flatten().tolist() == [library.deep_ep_fused_scale_of(value) for value in bits.flatten().tolist()]
        assert torch.equal(bits_to_scale(bits), scale)


def test_quantised_weights() -> None:
    weight = torch.randn(2, 6, 40)
    weight[0, 1] = 0
    data, scale = deep_ep.quantize_weight(weight)
    assert data.dtype == torch.int8 and scale.dtype == torch.float32 and scale.shape == (2, 6)
    assert ((data * scale.unsqueeze(2) - weight).abs() <= scale.unsqueeze(2) * 0.5001).all()
    assert (data.abs().amax(2) == torch.where(weight.abs().amax(2) > 0, 127, 0)).all() and scale[0, 1] == 1


def test_wrong_weights() -> None:
    gate_up, down = torch.ones(2, 128, 3), torch.ones(2, 3, 64)
    data, scale = gate_up.to(torch.int8), torch.ones(2, 128)
    for arguments, options, says in (
        ((gate_up[0], down), {}, "gate_up must be [L, 2I, H]"),
        ((gate_up, down.bfloat16()), {}, "down must be torch.float32 [2, 3, 64]"),
        ((gate_up, down[..., :5]), {}, "down must be torch.float32 [2, 3, 64] to fit gate_up"),
        ((gate_up[:, :6], down[..., :3]), {}, "gate_up must have a multiple of 128 rows"),
        ((gate_up, down, scale), {}, "gate_up_scale must be None"),
        ((data, down.to(torch.int8), scale), {}, "down_scale must be [2, 3] of floats for int8 weights, got None"),
        ((gate_up, down), {"fuse_mode": 3}, "fuse_mode must be one of FUSED_DEEP_MOE (1), DISPATCH_FFN_COMBINE (2)"),
    ):
        with pytest.raises(ValueError, match=re.escape(says)):
            deep_ep.fused_weights(*arguments, **options)


EXACT = """
import itertools, torch
from deep_ep.kernels import fused_deep_moe
generator = torch.Generator().manual_seed(0)
for (n, K, N), least in itertools.product(((1, 1, 2), (3, 2049, 40), (17, 7168, 64)), (-128, 120)):
    a, w = (torch.randint(least, 128, shape, dtype=torch.int8, generator=generator) for shape in ((n, K), (K, N)))
    for given in (w, w.t().contiguous().t()):
        product = fused_deep_moe.int8_product(a, given)
        assert product.dtype == torch.int32 and torch.equal(product.double(), a.double() @ w.double()), (n, K, N, least)
print(fused_deep_moe._int_mm_is_exact())
"""


@pytest.mark.slow
def test_int8_products_are_exact() -> None:
    """On older CPUs as well, whose products torch gets wrong."""
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    result = subprocess.run([sys.executable, "-c", EXACT], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert platform.machine() != "x86_64" or result.stdout == "False\n"


# Buffer


def buffer_calls(ctx: RankContext, strategy: str) -> None:
    """What callers of DeepEP-Ascend may give gives what the function gives."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEEP_USE_MODE", strategy)
        buffer = deep_ep.Buffer(ctx.prepared_group(strategy), low_latency_mode=True)
    for mode in MODES:
        layer = Layer(Case((5, 3), H=48, dtype=torch.bfloat16), 64, mode, 1)
        x, ids, topk_weights, w1, s1, w2, s2, M, E = Inputs(layer).arguments(ctx.rank)
        s1, s2 = (s.bfloat16().float() if mode is FuseMode.FUSED_DEEP_MOE else s for s in (s1, s2))
        wanted = deep_ep.fused_deep_moe(
            *(x, ids, topk_weights, w1, s1, w2, s2, M, E), fuse_mode=mode, group=buffer.group
        )
        given = [s.bfloat16() if mode is FuseMode.FUSED_DEEP_MOE else s.flatten() for s in (s1, s2)]
        for quant_mode in (0, 1):
            for number in (int(mode), mode):
                results = buffer.fused_deep_moe(
                    x, ids.int(), topk_weights, w1, given[0], w2, given[1], M, E, quant_mode, number
                )
                for name, actual, expected in zip(("output", "counts"), results, wanted, strict=True):
                    assert_same(name, actual, expected)
    with pytest.raises(ValueError, match="fuse_mode must be one of"):
        buffer.fused_deep_moe(x, ids, topk_weights, w1, s1, w2, s2, M, E, fuse_mode=0)
    buffer.destroy()
    with pytest.raises(RuntimeError, match="destroyed"):
        buffer.fused_deep_moe(x, ids, topk_weights, w1, s1, w2, s2, M, E)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_buffer(pool: RankPool, strategy: str) -> None:
    pool.run(2, buffer_calls, strategy)


LAYER = Layer(Case((5, 0, 9), H=48, K=3, local_experts=3), I=64)


# Gradients


def gradients(ctx: RankContext, layer: Layer, strategy: str) -> None:
    group, inputs, r = ctx.prepared_group(strategy), Inputs(layer), ctx.rank
    grads = [
        torch.randn(x.shape, generator=torch.Generator().manual_seed(s)).to(x.dtype) for s, x in enumerate(inputs.xs)
    ]
    leaves = [inputs.xs, inputs.topk_weights, *inputs.weights]
    for tensor in (tensor for by_rank in leaves for tensor in by_rank):
        tensor.requires_grad_()
    total = sum((out.float() * grad).sum() for out, grad in zip(inputs.outputs(), grads, strict=True))
    expected = torch.autograd.grad(total, [by_rank[r] for by_rank in leaves], materialize_grads=True)
    out, _ = deep_ep.fused_deep_moe(*inputs.arguments(r), quant_mode=0, fuse_mode=layer.mode, group=group)
    actual = torch.autograd.grad(out, [by_rank[r] for by_rank in leaves], grads[r])
    for name, a, e in zip(("x", "topk_weights", "gate_up", "down"), actual, expected, strict=True):
        assert a.dtype == e.dtype and a.shape == e.shape
        assert a.numel() == 0 or e.any(), name
        assert difference(a, e) < (1e-10 if layer.case.dtype == torch.float32 else 1e-4), name


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients(pool: RankPool, dtype: torch.dtype, mode: FuseMode, strategy: str) -> None:
    pool.run(3, gradients, Layer(replace(LAYER.case, dtype=dtype), 128, mode), strategy)


def second_derivative(ctx: RankContext) -> None:
    inputs, group = Inputs(LAYER), ctx.prepared_group("default")
    arguments = inputs.arguments(ctx.rank)
    out, _ = deep_ep.fused_deep_moe(arguments[0].requires_grad_(), *arguments[1:], quant_mode=0, group=group)
    (grad,) = torch.autograd.grad(out.sum(), arguments[0], create_graph=True)
    with pytest.raises(RuntimeError, match="fused_deep_moe_backward: second derivatives are not supported"):
        grad.sum().backward()


def test_second_derivatives_are_an_error(pool: RankPool) -> None:
    pool.run(3, second_derivative)


def int8_has_no_gradient(ctx: RankContext, backend: str) -> None:
    layer = replace(LAYER, quant_mode=1)
    inputs, group = Inputs(layer), ctx.prepared_group("default")
    x, ids, weights, *rest = inputs.arguments(ctx.rank)

    def step(x: Tensor, weights: Tensor) -> Tensor:
        return deep_ep.fused_deep_moe(x, ids, weights, *rest, group=group)[0]

    run = torch.compile(step, backend=backend, fullgraph=True)
    for leaf in (x, weights):
        with pytest.raises(RuntimeError, match="requires a gradient, which quant_mode 1 does not have"):
            run(x.requires_grad_(leaf is x), weights.requires_grad_(leaf is weights))
        with torch.no_grad():
            run(x, weights)


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_int8_has_no_gradient(pool: RankPool, backend: str) -> None:
    pool.run(3, int8_has_no_gradient, backend)


# Compiled


def compiled(ctx: RankContext, layer: Layer, strategy: str, backend: str) -> None:
    """Two calls in one graph, the second one on what the first one gave; other T afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEEP_USE_MODE", strategy)
        buffer = deep_ep.Buffer(ctx.prepared_group(strategy), low_latency_mode=True)

    def step(x: Tensor, ids: Tensor, topk_weights: Tensor, *fused: Any) -> tuple[Tensor, ...]:
        out, _ = buffer.fused_deep_moe(x, ids, topk_weights, *fused, layer.quant_mode, layer.mode)
        return buffer.fused_deep_moe(out, ids, topk_weights, *fused, layer.quant_mode, layer.mode)

    torch._dynamo.reset()
    run = torch.compile(step, backend=backend, fullgraph=True)
    for tokens in (layer.case.tokens, layer.case.tokens[::-1]):
        inputs = Inputs(replace(layer, case=replace(layer.case, tokens=tokens)))
        results = []
        for call in (step, run):
            arguments = inputs.arguments(ctx.rank)
            leaves = [arguments[i] for i in (0, 2, 3, 5)] if layer.quant_mode == 0 else []
            for leaf in leaves:
                leaf.detach_().requires_grad_()
            out, counts = call(*arguments)
            results.append([out, counts, *(torch.autograd.grad(out.float().pow(2).sum(), leaves) if leaves else ())])
        for i, (wanted, actual) in enumerate(zip(*results, strict=True)):
            assert_same(f"result {i}", actual, wanted)


@pytest.mark.parametrize(
    ("mode", "quant_mode", "backend"),
    [
        (2, 1, "aot_eager"),
        *(pytest.param(m, q, "aot_eager", marks=pytest.mark.slow) for m, q in ((1, 0), (1, 1), (2, 0))),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((1, 0, "inductor"), (2, 1, "inductor"))),
    ],
)
def test_compiled(pool: RankPool, mode: int, quant_mode: int, backend: str) -> None:
    case = Case((5, 3, 9), H=32, local_experts=2, dtype=torch.bfloat16)
    layer = Layer(case, 64, FuseMode(mode), quant_mode)
    pool.run(3, compiled, layer, "default", backend)


@pytest.mark.slow
def test_compiled_alltoall(pool: RankPool) -> None:
    pool.run(3, compiled, LAYER, "alltoall", "aot_eager")


def opcheck(ctx: RankContext, layer: Layer, strategy: str) -> None:
    group, inputs = ctx.prepared_group(strategy), Inputs(layer)
    x, ids, weights, w1, s1, w2, s2, M, E = inputs.arguments(ctx.rank)
    overload = fused_op.OVERLOADS[layer.mode]
    dtype = torch.float32 if layer.mode is FuseMode.FUSED_DEEP_MOE else torch.int64
    s1, s2 = (torch.empty(0, 0, dtype=dtype) if s is None else s for s in (s1, s2))
    rest = (group.group_name, strategy)
    options = FusedOptions()
    if layer.quant_mode == 0:
        backward = getattr(torch.ops.deep_ep.fused_deep_moe_backward, overload)
        torch.library.opcheck(backward, (torch.randn_like(x), x, ids, weights, w1, w2, M, E, ctx.size, *rest))
        for leaf in (x, weights, w1, w2):
            leaf.requires_grad_()
    op = getattr(torch.ops.deep_ep.fused_deep_moe, overload)
    torch.library.opcheck(op, (x, ids, weights, w1, s1, w2, s2, M, E, ctx.size, layer.quant_mode, *rest, *options))


@pytest.mark.parametrize(
    ("mode", "quant_mode", "strategy"),
    [(MODES[0], 0, "default"), (MODES[1], 0, "alltoall"), (MODES[0], 1, "alltoall"), (MODES[1], 1, "default")],
)
def test_opcheck(pool: RankPool, mode: FuseMode, quant_mode: int, strategy: str) -> None:
    layer = Layer(Case((3, 5), H=16), 64, mode, quant_mode)
    pool.run(2, opcheck, layer, strategy)


# Wrong arguments. Rank 1 gives them, all ranks say so, and the group stays usable.

ARGUMENTS = ("x", "topk_idx", "topk_weights", "w1", "s1", "w2", "s2", "M", "E")
WRONG: dict[str, tuple[int, int, Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    # By what is wrong: fuse mode, quant_mode, what changes, what the error says.
    "ids": (1, 0, lambda a: {"topk_idx": a["topk_idx"] + a["E"]}, "topk_idx has the id"),
    "x's dtype": (1, 0, lambda a: {"x": a["x"].double()}, "got torch.float64"),
    "topk_weights": (
        *(1, 0, lambda a: {"topk_weights": a["topk_weights"][:1]}),
        "topk_weights must have the shape [T, K] with T = 3, got [1, 2]",
    ),
    "T > M": (1, 0, lambda a: {"M": 2}, "x has 3 tokens; allowed are at most num_max_dispatch_tokens_per_rank = 2"),
    "M": (2, 0, lambda a: {"M": 0}, "num_max_dispatch_tokens_per_rank must be 1..2147483647, got 0"),
    "other M": (1, 0, lambda a: {"M": 99}, "num_max_dispatch_tokens_per_rank must be the same on all ranks"),
    "E": (1, 0, lambda a: {"E": 5}, "num_experts (5) must be divisible by num_ranks (2)"),
    "w1's dtype": (1, 0, lambda a: {"w1": a["w1"].bfloat16()}, "gmm1_weight must be torch.float32, got torch.bfloat16"),
    "w2 not int8": (1, 1, lambda a: {"w2": a["w2"].float()}, "gmm2_weight must be torch.int8, got torch.float32"),
    "w1's experts": (1, 0, lambda a: {"w1": a["w1"][:1]}, "gmm1_weight must have the shape [L, H, 2I] with L = 2"),
    "w1's H": (1, 0, lambda a: {"w1": a["w1"][:, :9]}, "gmm1_weight must have the shape [L, H, 2I] with H = 16"),
    "w1's tiles": (1, 0, lambda a: {"w1": a["w1"][..., :64]}, "gmm1_weight must have a multiple of 128 columns (2I)"),
    "w1's halves": (2, 0, lambda a: {"w1": a["w1"][..., :63]}, "gmm1_weight must have an even number of columns (2I)"),
    "w2 of the other mode": (
        *(1, 0, lambda a: {"w2": a["w2"].transpose(1, 2)}),
        "gmm2_weight must have the shape [L, H, I] with H = 16, got [2, 64, 16]",
    ),
    "w2 of this mode": (
        *(2, 0, lambda a: {"w2": a["w2"].transpose(1, 2)}),
        "gmm2_weight must have the shape [L, I, H] with I = 64, got [2, 16, 64]",
    ),
    "no scale": (
        1,
        1,
        lambda a: {"s1": None},
        "gmm1_weight_scale is missing: weights of torch.int8 need torch.float32 [2, 128]",
    ),
    "scale for floats": (1, 0, lambda a: {"s2": torch.ones(2, 16)}, "gmm2_weight_scale must be None or empty"),
    "bits in mode 1": (
        1,
        1,
        lambda a: {"s2": a["s2"].long()},
        "gmm2_weight_scale must be torch.float32, got torch.int64",
    ),
    "fp32 in mode 2": (
        2,
        1,
        lambda a: {"s1": a["s1"].float()},
        "gmm1_weight_scale must be torch.int64, got torch.float32",
    ),
    "scale's width": (
        *(1, 1, lambda a: {"s1": a["s1"][:, :64].contiguous()}),
        "gmm1_weight_scale must have the shape [L, 2I] with 2I = 128",
    ),
}


def wrong(ctx: RankContext, what: str, strategy: str) -> tuple[str, str]:
    mode, quant_mode, change, _ = WRONG[what]
    layer = Layer(Case((4, 3), H=16, absent=0), 64, FuseMode(mode), quant_mode)
    inputs, group = Inputs(layer), ctx.prepared_group(strategy)
    given = dict(zip(ARGUMENTS, inputs.arguments(ctx.rank), strict=True)) | {"quant_mode": quant_mode}
    changed = given | change(given) if ctx.rank == 1 else given
    arguments, quant = [changed[name] for name in ARGUMENTS], changed["quant_mode"]
    error = error_of(deep_ep.fused_deep_moe, *arguments, quant_mode=quant, fuse_mode=mode, group=group)
    one(ctx, layer, strategy)
    return error


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("what", WRONG)
def test_wrong_arguments(pool: RankPool, what: str, strategy: str) -> None:
    first, second = pool.run(2, wrong, what, strategy)
    kind, message = second
    assert first == second and kind == "RuntimeError" and WRONG[what][3] in message, (first, second)
    assert "deep_ep.fused_deep_moe" in message


def wrong_in_a_graph(ctx: RankContext, what: str) -> str:
    mode, quant_mode, change, _ = WRONG[what]
    inputs = Inputs(Layer(Case((4,), H=16), 64, FuseMode(mode), quant_mode))
    given = dict(zip(ARGUMENTS, inputs.arguments(0), strict=True)) | {"quant_mode": quant_mode}
    given |= change(given)
    quant, group = given.pop("quant_mode"), ctx.prepared_group("default")
    torch._dynamo.reset()  # else sizes are symbols, also in messages
    run = torch.compile(deep_ep.fused_deep_moe, backend="aot_eager", fullgraph=True)
    return error_of(run, *given.values(), quant_mode=quant, fuse_mode=mode, group=group.group_name)[1]


@pytest.mark.parametrize("what", ["w2 of the other mode", "no scale", "fp32 in mode 2"])
def test_wrong_arguments_in_a_graph(pool: RankPool, what: str) -> None:
    (message,) = pool.run(1, wrong_in_a_graph, what)
    assert f"deep_ep.fused_deep_moe: {WRONG[what][3]}" in message, message


def different(ctx: RankContext, what: str, strategy: str) -> tuple[str, str]:
    """Rank 1 does something else than rank 0, each by itself correct."""
    group, first = ctx.prepared_group(strategy), Layer(Case((4, 3), H=32, dtype=torch.bfloat16), 64)
    other = {
        "quant_mode": replace(first, quant_mode=1),
        "mode": replace(first, mode=FuseMode.DISPATCH_FFN_COMBINE),
        "E": replace(first, case=replace(first.case, local_experts=3)),
    }
    if ctx.rank == 1 and what == "op":
        x, ids, topk_weights, *_ = Inputs(first).arguments(1)
        error = error_of(deep_ep.dispatch, x, ids, topk_weights, num_experts=first.case.E, group=group)
    else:
        layer = other[what] if ctx.rank == 1 else first
        options = {"quant_mode": layer.quant_mode, "fuse_mode": layer.mode, "group": group}
        error = error_of(deep_ep.fused_deep_moe, *Inputs(layer).arguments(ctx.rank), **options)
    one(ctx, first, strategy)
    return error


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("op", ("dispatch", "fused_deep_moe")),
        ("mode", ("fused_deep_moe", "fused_deep_moe.dispatch_ffn_combine")),
        ("quant_mode", ("quant_mode must be the same on all ranks: rank 0 has 0, rank 1 has 1",)),
        ("E", ("num_experts", "4", "6")),
    ],
)
def test_ranks_that_differ(pool: RankPool, what: str, says: tuple[str, ...], strategy: str) -> None:
    for kind, message in pool.run(2, different, what, strategy):
        assert kind == "RuntimeError" and all(text in message for text in says), message


def too_many_rows(ctx: RankContext, strategy: str) -> tuple[str, str]:
    layer = Layer(Case((4, 3), H=16, absent=0), 64, FuseMode.DISPATCH_FFN_COMBINE)
    inputs, group = Inputs(layer), ctx.prepared_group(strategy)
    *arguments, M, E = inputs.arguments(ctx.rank)
    error = error_of(deep_ep.fused_deep_moe, *arguments, M - 1, E, quant_mode=0, fuse_mode=layer.mode, group=group)
    one(ctx, layer, strategy)
    return error[0], error[1].replace(str(M), "M").replace(str(M - 1), "M-1")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_more_rows_than_allowed(pool: RankPool, strategy: str) -> None:
    for kind, message in pool.run(2, too_many_rows, strategy):
        assert kind == "RuntimeError"
        assert "would compute M rows; allowed are at most num_max_dispatch_tokens_per_rank = M-1" in message, message


# Against the parts that it fuses, in DeepEP-Ascend's sizes


def experts_in_shared_memory(L: int, rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """int8 [L, rows, columns], each expert's matrix 64 elements behind the one before: 128 experts of these sizes would
    take 5.6 GB."""
    memory = torch.randint(-16, 16, (rows * columns + 64 * L,), dtype=torch.int8, generator=generator)
    return memory.as_strided((L, rows, columns), (64, columns, 1))


def fused_and_unfused(ctx: RankContext, T: int, K: int, mode: FuseMode) -> tuple[float, float]:
    """The mean absolute difference, and the mean of absolute values."""
    R, H, I, E = ctx.size, 7168, 2048, 256
    L, group, permuted = E // R, ctx.prepared_group("default"), mode is FuseMode.FUSED_DEEP_MOE
    generator = torch.Generator().manual_seed(ctx.rank)
    x = torch.randn(T, H, generator=generator).bfloat16()
    ids = (torch.randn(T, E, generator=generator).abs() + 1).topk(K, -1)[1]
    topk_weights = torch.randn(T, K, generator=generator).abs()
    w1 = experts_in_shared_memory(L, H, 2 * I, generator)
    w2 = experts_in_shared_memory(L, *((H, I) if permuted else (I, H)), generator)
    s1, s2 = (torch.rand(L, n, generator=generator) * 0.0004 + 0.0015 for n in (2 * I, H))
    scales = (s1, s2) if permuted else (scale_to_bits(s1), scale_to_bits(s2))

    buffer = deep_ep.Buffer(group, low_latency_mode=True)
    (data, data_scale), count, handle, *_ = buffer.low_latency_dispatch(x, ids, T, E, use_fp8=True)
    rows = torch.zeros(data.shape, dtype=torch.bfloat16)
    begin = 0
    for expert, n in enumerate(count.tolist()):
        if n:
            block = slice(begin, begin + n)
            h = int8_product(data[block], w1[expert]) * s1[expert] * data_scale[block].unsqueeze(1)
            gate, up = h.view(n, -1, 2, 64).unbind(2) if permuted else h.view(n, 2, I).unbind(1)
            a = (gate * torch.sigmoid(gate) * up).reshape(n, I)
            a_scale = a.abs().amax(1, keepdim=True) / 127
            product = int8_product((a / a_scale).round().to(torch.int8), w2[expert].t() if permuted else w2[expert])
            rows[block] = (product * s2[expert] * a_scale).bfloat16()
        begin += n
    unfused, *_ = buffer.low_latency_combine(rows, ids, topk_weights, handle)

    limit = T if permuted else R * T * K
    out, counts = buffer.fused_deep_moe(x, ids, topk_weights, w1, scales[0], w2, scales[1], limit, E, 1, mode)
    by_source = torch.diff(handle.layout_range, prepend=torch.zeros(1, dtype=torch.int32))
    assert torch.equal(counts, by_source if permuted else count.int())
    return float((out - unfused).abs().float().mean()), float(unfused.abs().float().mean())


@pytest.mark.slow
@pytest.mark.parametrize(("T", "K", "mode"), [(256, 8, 1), (48, 12, 2), (2, 1, 1)])
def test_fused_against_unfused(pool: RankPool, T: int, K: int, mode: int) -> None:
    for off, mean in pool.run(2, fused_and_unfused, T, K, FuseMode(mode)):
        assert off < 4e-4 and mean > 0.1, (off, mean)
