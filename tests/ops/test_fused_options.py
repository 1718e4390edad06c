"""fused_deep_moe with fp8 and fp4 weights, biases, other activations, a mask and a shared expert, against a dense model
in fp64 that spells out the formats: values, counts, gradients, errors, and compiled against eager.

T local tokens · H hidden · K top-k · E experts · R ranks · L = E/R local experts · I intermediate size.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from cases import assert_same
from op_calls import error_of
from ranks import ALLTOALL_IS_SLOW, STRATEGIES, RankContext, RankPool
from torch import Tensor

import deep_ep
from deep_ep import FusedWeights, FuseMode
from deep_ep.fused_options import FusedOptions
from deep_ep.ops import fused_deep_moe as fused_op
from deep_ep.ops import fused_deep_moe_options_backward as backward_op
from deep_ep.weights import scale_to_bits

MODES = tuple(FuseMode)


# The formats, spelled out


def fp8(exponent_bits: int, mantissa_bits: int, bias: int, largest: float) -> Tensor:
    """The magnitudes up to `largest`, by their codes."""
    steps = 1 << mantissa_bits
    normal = [
        2.0 ** (exponent - bias) * (1 + m / steps) for exponent in range(1, 1 << exponent_bits) for m in range(steps)
    ]
    values = [2.0 ** (1 - bias) * m / steps for m in range(steps)] + normal
    return torch.tensor([value for value in values if value <= largest], dtype=torch.float64)


@dataclass(frozen=True)
class Mx:
    dtype: torch.dtype
    magnitudes: Tensor
    emax: int
    sign: int  # the bit

    def quantise(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes [n, K], exponent bytes [n, K/32] and the numbers that they mean, fp64 [n, K], of rows [n, K]."""
        blocks = rows.double().view(rows.shape[0], -1, 32)
        largest = blocks.abs().amax(2, keepdim=True)
        exponent = torch.tensor(
            [[[math.frexp(v)[1] - 1 if v else -999] for v in row] for row in largest[..., 0].tolist()]
        )
        exponent = (exponent.view(largest.shape) - self.emax).clamp(min=-127)
        scaled = (blocks.abs() / 2.0**exponent).clamp(max=self.magnitudes[-1].item())
        above = torch.searchsorted(self.magnitudes, scaled).clamp(1, len(self.magnitudes) - 1)
        down, up = scaled - self.magnitudes[above - 1], self.magnitudes[above] - scaled
        code = torch.where((down < up) | ((down == up) & (above % 2 == 1)), above - 1, above)
        numbers = self.magnitudes[code] * blocks.sign() * 2.0**exponent
        codes = code | (blocks.signbit().long() << self.sign)
        return (
            codes.flatten(1).to(torch.uint8),
            (exponent + 127)[..., 0].to(torch.uint8),
            numbers.flatten(1),
        )

    def weights(self, ordinary: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As DeepEP-Ascend has them on A5, of [L, N, K]: data [L, K, N], scales [L, ceil(K/64), N, 2], and the numbers
        [L, N, K]."""
        L, N, K = ordinary.shape
        codes, exponents, numbers = self.quantise(ordinary.reshape(L * N, K))
        codes, exponents = codes.view(L, N, K).transpose(1, 2), exponents.view(L, N, K // 32)
        if self.sign == 3:
            codes = codes[..., 0::2] + 16 * codes[..., 1::2]
        scales = torch.full((L, -(-K // 64), N, 2), 77, dtype=torch.uint8)
        for block in range(K // 32):
            scales[:, block // 2, :, block % 2] = exponents[..., block]
        return codes.contiguous().view(self.dtype), scales.view(torch.float8_e8m0fnu), numbers.view(L, N, K)

    def rows(self, rows: Tensor) -> Tensor:
        return self.quantise(rows)[2] if rows.shape[0] else rows.double()


class Int8:
    def weights(self, ordinary: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """int8 [L, N, K], scales [L, N], and the numbers."""
        scale = (ordinary.float().abs().amax(2) / 127).clamp(min=1e-30)
        data = (ordinary.float() / scale.unsqueeze(2)).round()
        return data.to(torch.int8), scale, data.double() * scale.double().unsqueeze(2)

    def rows(self, rows: Tensor) -> Tensor:
        scale = 127 / rows.float().abs().amax(1, keepdim=True).clamp(min=1e-30)
        return (rows.float() * scale).round().double() / scale.double()


class Plain:
    def weights(self, ordinary: Tensor) -> tuple[Tensor, None, Tensor]:
        return ordinary, None, ordinary.double()

    def rows(self, rows: Tensor) -> Tensor:
        return rows


FORMATS: dict[str, Any] = {
    "none": Plain(),
    "int8": Int8(),
    "mx_fp8_e4m3": Mx(torch.float8_e4m3fn, fp8(4, 3, 7, 448), 8, 7),
    "mx_fp8_e5m2": Mx(torch.float8_e5m2, fp8(5, 2, 15, 57344), 15, 7),
    "mx_fp4_e2m1": Mx(torch.float4_e2m1fn_x2, torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6]).double(), 2, 3),
}
MX = tuple(name for name in FORMATS if name.startswith("mx"))


# A layer


@dataclass(frozen=True)
class Layer:
    tokens: tuple[int, ...] = (5, 0, 9)
    H: int = 96  # an odd number of blocks
    I: int = 64
    K: int = 3
    L: int = 2
    mode: FuseMode = FuseMode.FUSED_DEEP_MOE
    format: str = "none"
    dtype: torch.dtype = torch.float32
    has_bias: bool = False
    mask: bool = False
    shared: int = 0  # its I
    act: dict[str, float] = field(default_factory=dict)

    @property
    def R(self) -> int:
        return len(self.tokens)

    @property
    def E(self) -> int:
        return self.R * self.L


ALL = {
    "has_bias": True,
    "mask": True,
    "shared": 128,
    "act": {"swiglu_limit": 0.7, "swiglu_alpha": 1.702, "swiglu_beta": 1.0},
}
EACH: dict[str, dict[str, Any]] = {
    "bias": {"has_bias": True},
    "mask": {"mask": True},
    "shared": {"shared": 128},
    "limit": {"act": {"swiglu_limit": 0.5}},
    "alpha": {"act": {"swiglu_alpha": 1.702}},
    "beta": {"act": {"swiglu_beta": 1.0}},
    "all": ALL,
}


class Inputs:
    """By rank: tensors as the model's user has them, and `numbers`, what they mean, in fp64."""

    def __init__(self, layer: Layer) -> None:
        self.layer, form = layer, FORMATS[layer.format]
        generator = torch.Generator().manual_seed(3)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        self.xs = [random(T, layer.H).to(layer.dtype) for T in layer.tokens]
        self.ids = [torch.randint(-1, layer.E, (T, layer.K), generator=generator) for T in layer.tokens]
        self.topk_weights = [random(T, layer.K) for T in layer.tokens]
        self.masks = [torch.rand(T, generator=generator) < 0.7 for T in layer.tokens]
        for x, ids in zip(self.xs, self.ids, strict=True):
            x[:1] = 0
            ids[1:2] = -1
        ordinary: dict[str, list[Tensor]] = {"gate_up": [], "down": [], "shared_gate_up": [], "shared_down": []}
        self.biases: list[list[Tensor]] = [[], []]
        for _ in layer.tokens:
            for name, L, N, K in (
                ("gate_up", layer.L, 2 * layer.I, layer.H),
                ("down", layer.L, layer.H, layer.I),
                ("shared_gate_up", 1, 2 * layer.shared, layer.H),
                ("shared_down", 1, layer.H, layer.shared),
            ):
                if K:
                    ordinary[name].append((random(L, N, K) * 2 * K**-0.5).to(layer.dtype))
            for biases, N in zip(self.biases, (2 * layer.I, layer.H), strict=True):
                biases.append(random(layer.L, N) / 4)
        self.data: dict[str, list[Tensor]] = {}
        self.scales: dict[str, list[Any]] = {}
        self.numbers: dict[str, list[Tensor]] = {}
        for name, by_rank in ordinary.items():
            made = [form.weights(weight) for weight in by_rank if weight.numel()]
            self.data[name], self.scales[name], self.numbers[name] = ([m[i] for m in made] for i in range(3))
        if layer.mask:  # what is masked may hold anything
            for x, ids, mask in zip(self.xs, self.ids, self.masks, strict=True):
                x[~mask], ids[~mask] = torch.nan, 1 << 40

    def fused(self, gate_up: str, down: str, rank: int) -> FusedWeights:
        """In the layout of the call."""
        w1, w2 = self.data[gate_up][rank], self.data[down][rank]
        s1, s2 = self.scales[gate_up][rank], self.scales[down][rank]
        if self.layer.format in MX:
            return FusedWeights(w1, s1, w2, s2)
        w1 = w1.transpose(1, 2)
        if self.layer.mode is FuseMode.DISPATCH_FFN_COMBINE:
            bits = [scale if scale is None else scale_to_bits(scale) for scale in (s1, s2)]
            return FusedWeights(w1, bits[0], w2.transpose(1, 2), bits[1])
        return FusedWeights(tiled(w1), None if s1 is None else tiled(s1), w2, s2)

    def positional(self, rank: int) -> list[Any]:
        layer = self.layer
        limit = max(layer.tokens) if layer.mode is FuseMode.FUSED_DEEP_MOE else sum(layer.tokens) * (layer.K + 1)
        own = [self.xs[rank], self.ids[rank], self.topk_weights[rank]]
        return [*own, *self.fused("gate_up", "down", rank), limit, layer.E]

    def options(self, rank: int) -> dict[str, Any]:
        layer = self.layer
        given: dict[str, Any] = dict(layer.act)
        if layer.has_bias:
            bias1, bias2 = (biases[rank] for biases in self.biases)
            is_tiled = layer.mode is FuseMode.FUSED_DEEP_MOE and layer.format not in MX
            given |= {"gmm1_bias": tiled(bias1) if is_tiled else bias1, "gmm2_bias": bias2}
        if layer.mask:
            given["x_active_mask"] = self.masks[rank]
        if layer.shared:
            given["shared_weights"] = self.fused("shared_gate_up", "shared_down", rank)
        return given

    def call(self, rank: int, group: Any) -> tuple[Tensor, Tensor]:
        keywords = {"quant_mode": int(self.layer.format != "none"), "fuse_mode": self.layer.mode, "group": group}
        return deep_ep.fused_deep_moe(*self.positional(rank), **keywords, **self.options(rank))

    def dense(self, rank: int) -> Tensor:
        """fp64 [T, H]: what this rank must get."""
        layer, form = self.layer, FORMATS[self.layer.format]

        def rounded(values: Tensor) -> Tensor:
            return values if layer.format == "int8" else values.to(layer.dtype).double()

        def ffn(
            row: Tensor, gate_up: Tensor, down: Tensor, b1: Tensor | None = None, b2: Tensor | None = None
        ) -> Tensor:
            h = rounded(gate_up @ row)
            h = h if b1 is None else h + b1.double()
            gate, up = h[: len(h) // 2], h[len(h) // 2 :]
            if limit := layer.act.get("swiglu_limit", 0):
                gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
            a = (
                gate
                / (1 + torch.exp(-layer.act.get("swiglu_alpha", 1) * gate))
                * (up + layer.act.get("swiglu_beta", 0))
            )
            y = down @ form.rows(rounded(a)[None])[0]
            return y if b2 is None else y + b2.double()

        x = self.xs[rank].double()
        rows = form.rows(x.nan_to_num(0) if layer.mask else x)
        out = []
        for t in range(len(x)):
            total = torch.zeros(layer.H, dtype=torch.float64)
            if layer.mask and not self.masks[rank][t]:
                out.append(total)
                continue
            for k, e in enumerate(self.ids[rank][t].tolist()):
                if e < 0:
                    continue
                d, expert = divmod(e, layer.L)
                biases = [by_rank[d][expert] if layer.has_bias else None for by_rank in self.biases]
                y = ffn(rows[t], self.numbers["gate_up"][d][expert], self.numbers["down"][d][expert], *biases)
                total = total + self.topk_weights[rank][t, k].double() * y
            if layer.shared:
                total = total + ffn(
                    rows[t], self.numbers["shared_gate_up"][rank][0], self.numbers["shared_down"][rank][0]
                )
            out.append(total)
        return torch.stack(out) if out else x

    def counts(self, rank: int) -> Tensor:
        """int32 [L, R] of rank: rows by expert and source."""
        layer = self.layer
        counts = torch.zeros(layer.L, layer.R, dtype=torch.int32)
        for source, ids in enumerate(self.ids):
            ids = ids[self.masks[source]] if layer.mask else ids
            for e in ids[ids >= 0].tolist():
                if e // layer.L == rank:
                    counts[e % layer.L, source] += 1
        return counts


def tiled(columns: Tensor) -> Tensor:
    """[..., 2I]: 64 columns of gate and the same of up, in turns."""
    gate, up = columns.unflatten(-1, (2, -1, 64)).unbind(-3)
    return torch.stack([gate, up], -2).flatten(-3)


def difference(actual: Tensor, expected: Tensor) -> float:
    """1 - 2Σxy/Σ(x² + y²), in double."""
    x, y = actual.double(), expected.double()
    total = (x * x + y * y).sum()
    return 0.0 if total == 0 else float(1 - 2 * (x * y).sum() / total)


WITH_OPTIONS = [
    pytest.param(what, strategy, marks=[pytest.mark.slow] * (strategy != "default"))
    for strategy in STRATEGIES
    for what in EACH
]

CLOSE = {torch.float32: 1e-10, torch.bfloat16: 3e-5, torch.float16: 1e-6}
"""For what is not quantised. A number on the border of two quantised ones may become the other one."""


def check(layer: Layer, rank: int, inputs: Inputs, out: Tensor, counts: Tensor) -> None:
    expected = inputs.dense(rank)
    assert out.dtype == layer.dtype and out.shape == expected.shape and out.isfinite().all()
    limit = max(CLOSE[layer.dtype], {"none": 0, "mx_fp4_e2m1": 1e-3}.get(layer.format, 3e-5))
    assert difference(out, expected) < limit, difference(out, expected)
    wanted = inputs.counts(rank)
    by_source = layer.mode is FuseMode.FUSED_DEEP_MOE and layer.format not in MX
    assert_same("counts", counts, wanted.flatten() if by_source else wanted.sum(1, dtype=torch.int32))
    if layer.mask:
        assert not out[~inputs.masks[rank]].any()


def values(ctx: RankContext, layers: list[Layer], strategy: str) -> None:
    for layer in layers:
        inputs = Inputs(layer)
        check(layer, ctx.rank, inputs, *inputs.call(ctx.rank, ctx.prepared_group(strategy)))


@pytest.mark.parametrize("strategy", ALLTOALL_IS_SLOW)
@pytest.mark.parametrize("form", MX)
def test_fp8_and_fp4_weights(pool: RankPool, form: str, strategy: str) -> None:
    """In both fuse modes and all dtypes of x; with odd and even numbers of blocks."""
    first = Layer(format=form)
    pool.run(
        3,
        values,
        [
            *(replace(first, mode=mode, dtype=dtype) for mode in MODES for dtype in CLOSE),
            replace(first, H=32, I=32),
            replace(first, H=64, I=96, L=1),
        ],
        strategy,
    )


def rounding(ctx: RankContext, form: str) -> None:
    middle = {"mx_fp8_e4m3": 1 + 1 / 16, "mx_fp8_e5m2": 1 + 1 / 8, "mx_fp4_e2m1": 1 + 1 / 4}[form]
    H, I = 192, 64
    gate_up, down = torch.zeros(1, 2 * I, H), torch.zeros(1, H, I)
    for neuron, gate, up in ((0, 32, middle + 2**-10), (32, 32 + 2**-2, middle - 2**-7)):
        for row, value in ((neuron, gate), (I + neuron, up)):  # the powers of 2 in value, each in a block of its own
            powers = [2.0**p for p in range(5, -11, -1) if int(value * 2**10) >> (p + 10) & 1]
            gate_up[0, row, : 32 * len(powers) : 32] = torch.tensor(powers)
        down[0, neuron, neuron] = 1
    (w1, s1, _), (w2, s2, _) = (FORMATS[form].weights(weight) for weight in (gate_up, down))
    x = torch.zeros(1, H)
    x[:, ::32] = 1
    ids, topk_weights, group = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1), ctx.prepared_group("default")
    for dtype, number in ((torch.bfloat16, 1), (torch.float32, 2 * middle - 1)):
        expected = torch.zeros(1, H, dtype=dtype)
        expected[:, [0, 32]] = 32 * number
        for mode in MODES:
            arguments = x.to(dtype), ids, topk_weights, w1, s1, w2, s2, 1, 1
            out, _ = deep_ep.fused_deep_moe(*arguments, quant_mode=1, fuse_mode=mode, group=group)
            assert_same(f"{mode.name}, {dtype}", out, expected)


@pytest.mark.parametrize("form", MX)
def test_rounding_between_products(pool: RankPool, form: str) -> None:
    """x @ W1 of one neuron, and the activation of another, are just above the middle of two neighbours of the format.
    Rounded to bf16, as DeepEP-Ascend rounds both, they are the middle itself, and become the even neighbour."""
    pool.run(1, rounding, form)


@pytest.mark.parametrize(("what", "strategy"), WITH_OPTIONS)
def test_options(pool: RankPool, what: str, strategy: str) -> None:
    """One by one and together, with weights of every format, in both fuse modes."""
    forms = FORMATS if what == "all" else ("none", "int8", "mx_fp8_e4m3")
    dtypes = tuple(CLOSE) if what == "all" else (torch.float32,)
    layers = [
        Layer(mode=mode, format=form, dtype=dtype, **EACH[what]) for mode in MODES for form in forms for dtype in dtypes
    ]
    pool.run(3, values, layers, strategy)


def test_one_rank(pool: RankPool) -> None:
    pool.run(1, values, [Layer(tokens=(7,), format=form, **ALL) for form in FORMATS], "default")


def peer_calls(ctx: RankContext, form: str) -> None:
    """As programs for A5 call Buffer: ids in int32, any quant_mode or none, no fuse_mode, tokens below capacity."""
    buffer = deep_ep.Buffer(ctx.prepared_group("default"), low_latency_mode=True)
    layer = Layer(tokens=(4, 6), H=64, format=form, dtype=torch.bfloat16)
    inputs = Inputs(layer)
    x, ids, topk_weights, w1, s1, w2, s2, M, E = inputs.positional(ctx.rank)
    for quant_mode in ([], [0], [1]):
        out, counts = buffer.fused_deep_moe(x, ids.int(), topk_weights, w1, s1, w2, s2, M + 3, E, *quant_mode)
        check(layer, ctx.rank, inputs, out, counts)
    with pytest.raises(ValueError, match=r"quant_mode must be 0 \(none\) or 1 .*, got 2"):
        buffer.fused_deep_moe(x, ids, topk_weights, w1, s1, w2, s2, M, E, 2)
    layer = replace(layer, **ALL)
    inputs = Inputs(layer)
    options = inputs.options(ctx.rank)
    # Masks of int8, biases in the model's dtype
    exact = [options[name].bfloat16() for name in ("gmm1_bias", "gmm2_bias")]
    options |= dict(zip(("gmm1_bias", "gmm2_bias"), (bias.float() for bias in exact), strict=True))
    wanted = buffer.fused_deep_moe(*inputs.positional(ctx.rank), **options)
    options |= {"gmm1_bias": exact[0], "gmm2_bias": exact[1], "x_active_mask": options["x_active_mask"].to(torch.int8)}
    for name, one, other in zip(
        ("out", "counts"), buffer.fused_deep_moe(*inputs.positional(ctx.rank), **options), wanted, strict=True
    ):
        assert_same(name, one, other)


@pytest.mark.parametrize("form", MX)
def test_buffer(pool: RankPool, form: str) -> None:
    pool.run(2, peer_calls, form)


# Weights


@pytest.mark.parametrize("form", MX)
@pytest.mark.parametrize("K", [32, 96, 128])
def test_weights_of_the_peer(form: str, K: int) -> None:
    """What quantize_weight and fused_weights make, byte by byte."""
    generator = torch.Generator().manual_seed(0)
    gate_up, down = torch.randn(2, 64, K, generator=generator), torch.randn(2, K, 32, generator=generator)
    gate_up[0, 1], gate_up[1, :, :32] = 0, 1e-30
    (gate_up8, gate_up_scale), (down8, down_scale) = (deep_ep.quantize_weight(w, form) for w in (gate_up, down))
    assert gate_up_scale.shape == (2, 64, K // 32) and down_scale.shape == (2, K, 1)
    for mode in MODES:
        w1, s1, w2, s2 = deep_ep.fused_weights(gate_up8, down8, gate_up_scale, down_scale, fuse_mode=mode)
        for weight, scale, ordinary in ((w1, s1, gate_up), (w2, s2, down)):
            data, scales, _ = FORMATS[form].weights(ordinary)
            blocks = ordinary.shape[2] // 32
            assert weight.dtype == data.dtype and scale.dtype == scales.dtype and scale.shape == scales.shape
            assert torch.equal(weight.view(torch.uint8), data.view(torch.uint8))
            for block in range(blocks):
                one, other = (s.view(torch.uint8)[:, block // 2, :, block % 2] for s in (scale, scales))
                assert torch.equal(one, other)


def test_bias_in_the_order_of_columns() -> None:
    bias, down = torch.arange(2 * 384).view(2, 384), torch.ones(2, 32, 192)
    for form in FORMATS:
        data, scales = [torch.ones(2, 384, 32), down], [None, None]
        if form != "none":
            data, scales = zip(*(deep_ep.quantize_weight(weight, form) for weight in data), strict=True)
        for mode in MODES:
            weights = deep_ep.fused_weights(*data, *scales, fuse_mode=mode)
            is_tiled = form in ("none", "int8") and mode is FuseMode.FUSED_DEEP_MOE
            assert torch.equal(deep_ep.fused_bias(bias, weights, fuse_mode=mode), tiled(bias) if is_tiled else bias)
            with pytest.raises(ValueError, match=r"gate_up_bias must be \[2, 384\] to fit weights, got \[2, 64\]"):
                deep_ep.fused_bias(bias[:, :64], weights, fuse_mode=mode)


def test_wrong_weights() -> None:
    gate_up, down = torch.ones(2, 64, 32), torch.ones(2, 32, 32)
    (data, scale), (down8, down_scale) = (deep_ep.quantize_weight(w, "mx_fp8_e4m3") for w in (gate_up, down))
    for arguments, says in (
        ((data, down8.view(torch.float8_e5m2), scale, down_scale), "down must be torch.float8_e4m3fn [2, 32, 32]"),
        (
            (data, down8, scale),
            "down_scale must be torch.float8_e8m0fnu [2, 32, 1] for torch.float8_e4m3fn weights, got",
        ),
        ((data, down8, scale.view(torch.uint8), down_scale), "gate_up_scale must be torch.float8_e8m0fnu [2, 64, 1]"),
        ((data[..., :16], down8[:, :16], scale, down_scale), "gate_up must have H and I that are multiples of 32"),
    ):
        with pytest.raises(ValueError) as error:
            deep_ep.fused_weights(*arguments)
        assert says in str(error.value), error.value
    with pytest.raises(ValueError, match="quant_mode must be one of int8, mx_fp8_e4m3, mx_fp8_e5m2, mx_fp4_e2m1, got"):
        deep_ep.quantize_weight(gate_up, "fp8")


# Gradients


def leaves_of(inputs: Inputs) -> list[list[Tensor]]:
    """By argument and rank."""
    layer = inputs.layer
    leaves = [inputs.xs, inputs.topk_weights, inputs.data["gate_up"], inputs.data["down"]]
    leaves += inputs.biases if layer.has_bias else []
    leaves += [inputs.data["shared_gate_up"], inputs.data["shared_down"]] if layer.shared else []
    return leaves


def gradients(ctx: RankContext, layers: list[Layer], strategy: str) -> None:
    for layer in layers:
        inputs, r = Inputs(layer), ctx.rank
        grads = [torch.randn(x.shape, generator=torch.Generator().manual_seed(s)) for s, x in enumerate(inputs.xs)]
        leaves = leaves_of(inputs)
        for tensor in (tensor for by_rank in leaves for tensor in by_rank):
            tensor.requires_grad_()
        for name, by_rank in inputs.data.items():
            inputs.numbers[name] = [tensor.double() for tensor in by_rank]
        total = sum((inputs.dense(s) * grad.double()).sum() for s, grad in enumerate(grads))
        mine = [by_rank[r] for by_rank in leaves]
        expected = torch.autograd.grad(total, mine, materialize_grads=True)
        out, _ = inputs.call(r, ctx.prepared_group(strategy))
        actual = torch.autograd.grad(out, mine, grads[r].to(out.dtype))
        for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
            assert a.dtype == e.dtype and a.shape == e.shape and a.isfinite().all(), i
            assert not e.numel() or e.any() or layer.mask or (layer.shared and not layer.tokens[r]), i
            assert difference(a, e) < (1e-10 if layer.dtype == torch.float32 else 1e-4), (i, difference(a, e))


@pytest.mark.parametrize(("what", "strategy"), WITH_OPTIONS)
def test_gradients(pool: RankPool, what: str, strategy: str) -> None:
    """Of everything that is not quantised, as autograd has them for the dense model."""
    layers = [Layer(mode=mode, **EACH[what]) for mode in MODES]
    layers += [Layer(dtype=torch.bfloat16, **ALL)] if what == "all" else []
    pool.run(3, gradients, layers, strategy)


def no_gradient(ctx: RankContext, form: str) -> None:
    layer = Layer(tokens=(3,), format=form, has_bias=True)
    inputs = Inputs(layer)
    inputs.biases[1][0].requires_grad_()
    with pytest.raises(RuntimeError, match="requires a gradient, which quant_mode 1 does not have"):
        inputs.call(0, ctx.prepared_group("default"))
    with torch.no_grad():
        inputs.call(0, ctx.prepared_group("default"))


@pytest.mark.parametrize("form", ["int8", "mx_fp4_e2m1"])
def test_no_gradient_of_quantised_weights(pool: RankPool, form: str) -> None:
    pool.run(1, no_gradient, form)


# Compiled


def compiled(ctx: RankContext, layer: Layer, strategy: str, backend: str, dynamic: bool) -> None:
    group = ctx.prepared_group(strategy)
    name, keywords = group.group_name, {"quant_mode": int(layer.format != "none"), "fuse_mode": layer.mode}

    def step(arguments: list[Any], options: dict[str, Any]) -> tuple[Tensor, Tensor]:
        return deep_ep.fused_deep_moe(*arguments, **keywords, **options, group=name)

    torch._dynamo.reset()
    run = torch.compile(step, backend=backend, fullgraph=True, dynamic=dynamic or None)
    for tokens in (layer.tokens, layer.tokens[::-1]):
        inputs = Inputs(replace(layer, tokens=tokens))
        leaves = [by_rank[ctx.rank] for by_rank in leaves_of(inputs)] if layer.format == "none" else []
        for leaf in leaves:
            leaf.requires_grad_()
        results = []
        for call in (step, run):
            out, counts = call(inputs.positional(ctx.rank), inputs.options(ctx.rank))
            results.append([out, counts, *(torch.autograd.grad(out.float().pow(2).sum(), leaves) if leaves else ())])
        for i, (wanted, actual) in enumerate(zip(*results, strict=True)):
            assert_same(f"result {i}", actual, wanted)


@pytest.mark.parametrize(
    ("form", "mode", "strategy", "backend"),
    [
        ("none", 1, "default", "aot_eager"),
        ("mx_fp8_e4m3", 1, "default", "aot_eager"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("none", 1, "default", "dynamic aot_eager"),
                ("mx_fp4_e2m1", 2, "alltoall", "aot_eager"),
                ("none", 2, "alltoall", "aot_eager"),
                ("none", 1, "default", "inductor"),
                ("mx_fp8_e5m2", 1, "default", "dynamic aot_eager"),
                ("none", 1, "default", "dynamic inductor"),
                ("mx_fp8_e4m3", 1, "default", "inductor"),
                ("mx_fp4_e2m1", 1, "default", "inductor"),
            )
        ),
    ],
)
def test_compiled(pool: RankPool, form: str, mode: int, strategy: str, backend: str) -> None:
    layer = Layer(tokens=(5, 3), format=form, mode=FuseMode(mode), dtype=torch.bfloat16, **ALL)
    *dynamic, backend = backend.split()
    pool.run(2, compiled, layer, strategy, backend, bool(dynamic))


def opcheck(ctx: RankContext, layer: Layer) -> None:
    group, inputs = ctx.prepared_group("default"), Inputs(replace(layer, mask=False))
    x, ids, weights, w1, s1, w2, s2, M, E = inputs.positional(ctx.rank)
    given = inputs.options(ctx.rank)
    shared = given.pop("shared_weights")
    options = FusedOptions(
        **given,
        **{f"shared_{name}": part for name, part in shared._asdict().items()},
        x_active_mask=inputs.masks[ctx.rank],
    )
    rest = (M, E, ctx.size)
    if layer.format == "none":
        s1 = s2 = torch.empty(0, 0)
        backward = torch.ops.deep_ep.fused_deep_moe_options_backward.default
        arguments = torch.randn_like(x), x, ids, weights, w1, w2, *rest, group.group_name, "default", *options
        torch.library.opcheck(backward, arguments)
        for leaf in (x, weights, w1, w2, *options[:3], options[4]):
            leaf.requires_grad_()
    number = list(FORMATS).index(layer.format)
    op = torch.ops.deep_ep.fused_deep_moe.default
    arguments = x, ids, weights, w1, s1, w2, s2, *rest, number, group.group_name, "default", *options
    # torch cannot tell whether fp8 tensors have changed, nor reckon with gradients where there are none.
    checks = {"test_utils": ("test_autograd_registration", "test_faketensor")} if layer.format in MX else {}
    torch.library.opcheck(op, arguments, **checks)


@pytest.mark.parametrize("form", ["none", "mx_fp8_e5m2"])
def test_opcheck(pool: RankPool, form: str) -> None:
    pool.run(2, opcheck, Layer(tokens=(3, 4), H=32, I=64, format=form, **ALL))


# Wrong arguments. Rank 1 gives them, all ranks say so, and the group stays usable.

ARGUMENTS = ("x", "topk_idx", "topk_weights", "w1", "s1", "w2", "s2", "M", "E")
Given = dict[str, Any]
WRONG: dict[str, tuple[str, Callable[[Given], Given], str]] = {
    # By what is wrong: the format of weights, what changes, what the error says.
    "quant_mode": ("none", lambda a: {"quant_mode": 2}, "quant_mode must be 0 (none) or 1 (rows in the format of the"),
    "floats": (
        "none",
        lambda a: {"quant_mode": 1},
        "gmm1_weight must be one of torch.int8, torch.float8_e4m3fn, torch.float8_e5m2, torch.float4_e2m1fn_x2 with "
        "quant_mode 1, got torch.float32",
    ),
    "0 for fp8": (
        "mx_fp8_e4m3",
        lambda a: {"quant_mode": 0},
        "gmm1_weight must be torch.float32, got torch.float8_e4m3fn",
    ),
    "two formats": (
        *("mx_fp8_e4m3", lambda a: {"w2": a["w2"].view(torch.float8_e5m2)}),
        "gmm2_weight must be torch.float8_e4m3fn, got torch.float8_e5m2",
    ),
    "tiles for fp8": (
        *("mx_fp8_e4m3", lambda a: {"w2": a["w2"].transpose(1, 2)}),
        "gmm2_weight must have the shape [L, I, H] with I = 64, got [2, 96, 64]",
    ),
    "packed rows": (
        *("mx_fp4_e2m1", lambda a: {"w2": a["w2"].view(torch.uint8)[:, :32].view(torch.float4_e2m1fn_x2)}),
        "gmm2_weight must have the shape [L, I, H/2] with I = 64, got [2, 32, 48]",
    ),
    "width": (
        *("mx_fp8_e4m3", lambda a: {"w1": a["w1"][..., :96].contiguous()}),
        "gmm1_weight must have a multiple of 64 columns (2I), in blocks of 32, got 96",
    ),
    "no scale": (
        *("mx_fp8_e4m3", lambda a: {"s1": None}),
        "gmm1_weight_scale is missing: weights of torch.float8_e4m3fn need torch.float8_e8m0fnu [2, 2, 128, 2]",
    ),
    "bytes": (
        *("mx_fp8_e4m3", lambda a: {"s2": a["s2"].view(torch.uint8)}),
        "gmm2_weight_scale must be torch.float8_e8m0fnu, got torch.uint8",
    ),
    "flat scale": (
        *("mx_fp8_e4m3", lambda a: {"s2": a["s2"].flatten(2)}),
        "gmm2_weight_scale must have the shape [L, I/64, H, 2], got [2, 1, 192]",
    ),
    "bias": (
        *("none", lambda a: {"gmm1_bias": torch.ones(2, 64)}),
        "gmm1_bias must have the shape [L, 2I] with 2I = 128, got [2, 64]",
    ),
    "second bias": (
        *("mx_fp8_e4m3", lambda a: {"gmm2_bias": torch.ones(96)}),
        "gmm2_bias must have the shape [L, H], got [96]",
    ),
    "no bias": ("none", lambda a: {"gmm1_bias": 1.0}, "gmm1_bias must be a torch.Tensor, got float"),
    "mask's length": (
        *("none", lambda a: {"x_active_mask": torch.ones(9, dtype=torch.bool)}),
        "x_active_mask must have the shape [T] with T = 3, got [9]",
    ),
    "mask's dtype": (
        *("none", lambda a: {"x_active_mask": torch.ones(3)}),
        "x_active_mask must be torch.bool, got torch.float32",
    ),
    "ids of active tokens": (
        *("none", lambda a: {"topk_idx": a["topk_idx"] + 99, "x_active_mask": torch.tensor([False, True, True])}),
        "at [1, 0]; allowed are -1 and 0..3",
    ),
    "limit": (
        *("none", lambda a: {"swiglu_limit": -1.0}),
        "swiglu_limit must be 0 (none) or a positive number, got -1.0",
    ),
    "limit's type": ("none", lambda a: {"swiglu_limit": "7"}, "swiglu_limit must be a number, got str"),
    "alpha": ("none", lambda a: {"swiglu_alpha": math.nan}, "swiglu_alpha must be a finite number, got nan"),
    "beta": ("none", lambda a: {"swiglu_beta": math.inf}, "swiglu_beta must be a finite number, got inf"),
    "shared H": (
        *("none", lambda a: {"shared_weights": FusedWeights(torch.ones(1, 9, 128), None, torch.ones(1, 9, 64), None)}),
        "shared_gmm1_weight must have the shape [L, H, 2I] with H = 96, got [1, 9, 128]",
    ),
    "two shared": (
        *("none", lambda a: {"shared_weights": FusedWeights(a["w1"], None, a["w2"], None)}),
        "shared_gmm1_weight must have the shape [L, H, 2I] with L = 1",
    ),
    "shared format": (
        *("mx_fp8_e4m3", lambda a: {"shared_weights": FusedWeights(torch.ones(1, 96, 64), None, a["w2"], None)}),
        "shared_gmm1_weight must be torch.float8_e4m3fn, got torch.float32",
    ),
    "shared scale": (
        *("mx_fp8_e4m3", lambda a: {"shared_weights": FusedWeights(a["w1"][:1], None, a["w2"][:1], a["s2"][:1])}),
        "shared_gmm1_weight_scale is missing",
    ),
    "half of it": (
        *("none", lambda a: {"shared_weights": FusedWeights(a["w1"][:1], None, None, None)}),
        "shared_weights.gmm2_weight must be a torch.Tensor, got NoneType",
    ),
    "weights for it": (
        "none",
        lambda a: {"shared_weights": a["w1"]},
        "shared_weights must be a FusedWeights, got Tensor",
    ),
}


def wrong(ctx: RankContext, what: str, strategy: str) -> str:
    form, change, _ = WRONG[what]
    layer = Layer(tokens=(4, 3), format=form)
    inputs, group = Inputs(layer), ctx.prepared_group(strategy)
    given = dict(zip(ARGUMENTS, inputs.positional(ctx.rank), strict=True)) | {"quant_mode": int(form != "none")}
    given |= change(given) if ctx.rank == 1 else {}
    arguments = [given.pop(name) for name in ARGUMENTS]
    _, message = error_of(deep_ep.fused_deep_moe, *arguments, **given, group=group)
    values(ctx, [layer], strategy)
    return message


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("what", WRONG)
def test_wrong_arguments(pool: RankPool, what: str, strategy: str) -> None:
    for message in pool.run(2, wrong, what, strategy):
        assert WRONG[what][2] in message, message


def different(ctx: RankContext, what: str, strategy: str) -> str:
    """Ranks do different things, each by itself correct."""
    first = Layer(tokens=(4, 3))
    by_rank = {
        "formats": (replace(first, format="mx_fp8_e4m3"), replace(first, format="mx_fp8_e5m2")),
        "shared": (replace(first, shared=64), first),
        "limits": (replace(first, act={"swiglu_limit": 7.0}), first),
    }[what]
    layer = by_rank[ctx.rank]
    _, message = error_of(Inputs(layer).call, ctx.rank, ctx.prepared_group(strategy))
    values(ctx, [first], strategy)
    return message


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("formats", ("quant_mode must be the same on all ranks: rank 0 has 2, rank 1 has 3",)),
        ("shared", ("rank 0 has SwiGLU", "a shared expert, rank 1 has SwiGLU", "no shared expert")),
        ("limits", ("the limit 7.0", "the limit 0.0")),
    ],
)
def test_ranks_that_differ(pool: RankPool, what: str, says: tuple[str, ...], strategy: str) -> None:
    for message in pool.run(2, different, what, strategy):
        assert all(text in message for text in says), message


def test_what_npu_graphs_do_not_hold() -> None:
    """Each is named when the graph is made. (That they hold the rest is in tests/npu.)"""
    plain = [None] * 7 + [4, 2, 1]
    for quant_mode, form in ((2, "float8_e4m3fn"), (4, "float4_e2m1fn_x2")):
        with pytest.raises(RuntimeError, match=f"NPU graphs cannot hold weights of torch.{form}: the operator of ops/"):
            fused_op.convert(*plain, quant_mode, "group", "default", *FusedOptions(), overload="default")
    one = torch.ones(1)
    options = FusedOptions(gmm1_bias=one, shared_gmm1_weight=one, x_active_mask=one, swiglu_alpha=1.702)
    names = "gmm1_bias, shared_gmm1_weight, x_active_mask, swiglu_alpha"
    with pytest.raises(RuntimeError, match=f"deep_ep.fused_deep_moe: NPU graphs cannot hold {names}: "):
        fused_op.convert(*plain, 0, "group", "default", *options, overload="default")
    with pytest.raises(RuntimeError, match=f"deep_ep.fused_deep_moe_backward: NPU graphs cannot hold {names}: "):
        backward_op.convert(*[None] * 6, 4, 2, 1, "group", "default", *options)
