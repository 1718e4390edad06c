"""quantize, dequantize, pack, unpack and straight_through against formulas written in NumPy, bit by bit.

Symbols: T tokens, H hidden.
"""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from deep_ep.quantization import MODES, check_mode, dequantize, pack, quantize, straight_through, unpack

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CASES: dict[str, tuple[str, dict[str, bool], int]] = {
    "int8": ("int8", {}, 1),
    "int8 low latency": ("int8", {"low_latency": True}, 1),
    "pertoken_fp8_e4m3": ("pertoken_fp8_e4m3", {}, 1),
    "pertoken_fp8_e4m3 low latency": ("pertoken_fp8_e4m3", {"low_latency": True}, 1),
    "mx_fp8_e4m3": ("mx_fp8_e4m3", {}, 32),
    "mx_fp8_e5m2": ("mx_fp8_e5m2", {}, 32),
    "mx_fp4_e2m1": ("mx_fp4_e2m1", {}, 32),
    "block_fp8_e4m3": ("block_fp8_e4m3", {}, 128),
    "block_fp8_e4m3 round_scale": ("block_fp8_e4m3", {"round_scale": True}, 128),
    "block_fp8_e4m3 use_ue8m0": ("block_fp8_e4m3", {"round_scale": True, "use_ue8m0": True}, 512),
}
"""Mode, options, and what H must be a multiple of."""

each_case = pytest.mark.parametrize("case", CASES)


class Format:
    """A small floating-point format, as the table of its finite numbers >= 0 in the order of their codes."""

    def __init__(self, exponent_bits: int, mantissa_bits: int, bias: int, codes: int) -> None:
        self.sign_shift = exponent_bits + mantissa_bits
        e, m = np.divmod(np.arange(codes), 1 << mantissa_bits)
        fraction = m / (1 << mantissa_bits)
        self.table = np.where(e == 0, np.ldexp(fraction, 1 - bias), np.ldexp(1 + fraction, e - bias))
        self.emax = int(e[-1]) - bias
        self.half_ulp = 2.0 ** -(mantissa_bits + 1)
        self.half_step = self.table[1] / 2

    def encode(self, values: np.ndarray) -> np.ndarray:
        """Codes of the nearest numbers, the even code in a tie."""
        values = values.astype(np.float64)
        middles = (self.table[:-1] + self.table[1:]) / 2
        code = np.searchsorted(middles, np.abs(values), side="left")
        tie = np.append(middles, np.inf)[code] == np.abs(values)
        code = code + (tie & (code % 2 == 1))
        return (code | (np.signbit(values).astype(np.int64) << self.sign_shift)).astype(np.uint8)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        sign = 1 << self.sign_shift
        return np.where(codes & sign, -1.0, 1.0) * self.table[codes & (sign - 1)]


E4M3 = Format(4, 3, 7, 0x7F)
E5M2 = Format(5, 2, 15, 0x7C)
E2M1 = Format(2, 1, 1, 8)
MX = {"mx_fp8_e4m3": E4M3, "mx_fp8_e5m2": E5M2, "mx_fp4_e2m1": E2M1}


def oracle(
    x: np.ndarray, mode: str, low_latency: bool = False, round_scale: bool = False, use_ue8m0: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Bytes of data and of scales, dequantised fp32 [T, H], and each element's scale in fp64, for x fp32 [T, H]."""
    T, H = x.shape
    f32 = np.float32
    width = 32 if mode in MX else 128 if mode == "block_fp8_e4m3" else H
    blocks = x.reshape(T, H // width, width)
    finite = np.isfinite(blocks).all(2)
    blocks = np.where(finite[:, :, None], blocks, f32(0))
    absmax = np.abs(blocks).max(2)
    if mode in MX:
        form = MX[mode]
        # frexp's fraction is in [1/2, 1), and all numbers below 2^-126 have the biased exponent 0.
        biased = np.where(absmax == 0, 0, np.maximum(np.frexp(absmax.astype(np.float64))[1] - 1 + 127, 0))
        byte = np.maximum(biased - form.emax, 0)
        scale = np.ldexp(1.0, byte - 127)
        codes = form.encode(blocks / scale[:, :, None])
        stored = np.where(finite, byte, 255).astype(np.uint8)
    elif mode == "block_fp8_e4m3":
        form = E4M3
        amax = np.maximum(absmax, f32(1e-4))
        s, scale = f32(448) / amax, amax / f32(448)
        if round_scale:
            fraction, exponent = np.frexp(scale)
            exponent = exponent - (fraction == 0.5)
            s, scale = np.ldexp(f32(1), -exponent), np.ldexp(f32(1), exponent)
            if use_ue8m0:
                stored = np.where(finite, exponent + 127, 255).astype(np.uint8)
        codes = form.encode(blocks * s[:, :, None])
        if not use_ue8m0:
            stored = np.where(finite, scale, f32("nan"))
    else:
        largest = f32(127 if mode == "int8" else 448)
        with np.errstate(divide="ignore", over="ignore"):
            s = largest / (absmax if low_latency else absmax + f32(1e-12))
        s = np.where(np.isfinite(s), s, f32(1))
        scale = f32(1) / s
        values = blocks * s[:, :, None]
        form = E4M3
        codes = np.rint(values).astype(np.int8).view(np.uint8) if mode == "int8" else E4M3.encode(values)
        stored = np.where(finite, scale, f32("nan"))[:, 0]
    numbers = codes.view(np.int8).astype(np.float64) if mode == "int8" else form.decode(codes)
    assert stored.dtype in (np.uint8, np.float32)
    scale = np.where(finite, scale.astype(np.float64), np.nan)[:, :, None]
    with np.errstate(over="ignore"):
        dequantised = (numbers * scale).astype(f32).reshape(T, H)
    codes = np.where(finite[:, :, None], codes, 0).astype(np.uint8).reshape(T, H)
    if mode == "mx_fp4_e2m1":
        codes = codes[:, 0::2] | codes[:, 1::2] << 4
    stored = stored if stored.ndim == 2 else stored[:, None]
    return (
        codes,
        np.ascontiguousarray(stored).view(np.uint8),
        dequantised,
        np.broadcast_to(scale, blocks.shape).reshape(T, H),
    )


def to_bytes(tensor: Tensor) -> Tensor:
    """uint8 [T, bytes per row]."""
    return (tensor.unsqueeze(1) if tensor.dim() == 1 else tensor).unsqueeze(2).view(torch.uint8).flatten(1)


def same(a: Tensor, b: Tensor) -> bool:
    """Dtype, shape and bits."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(to_bytes(a), to_bytes(b))


KINDS = ("zero", "bits", "normal", "ties", "inf", "nan")


def make_rows(kinds: list[tuple[str, int]], H: int, dtype: torch.dtype, seed: int) -> Tensor:
    """x [T, H]: one row per (kind, exponent)."""
    rng = np.random.default_rng(seed)
    rows = np.zeros((len(kinds), H), np.float32)
    for row, (kind, exponent) in zip(rows, kinds, strict=True):
        if kind == "bits":
            bits = rng.integers(0, 1 << 32, H, np.uint32).view(np.float32)
            row[:] = np.where(np.isfinite(bits), bits, 0)
        elif kind != "zero":
            # The eighths are exactly between two numbers of a format more often.
            draws = rng.integers(-64, 65, H) / 8 if kind == "ties" else rng.standard_normal(H)
            with np.errstate(over="ignore"):
                row[:] = np.ldexp(draws, exponent)
        if kind in ("inf", "nan"):
            row[rng.integers(H)] = rng.choice([-np.inf, np.inf]) if kind == "inf" else np.nan
    return torch.from_numpy(rows).to(dtype)


@st.composite
def inputs(draw: st.DrawFn, multiple: int) -> Tensor:
    H = multiple * draw(st.integers(1, 70 if multiple == 1 else 4 if multiple < 512 else 1))
    dtype = draw(st.sampled_from(DTYPES))
    low, high = (-26, 16) if dtype == torch.float16 else (-151, 127)
    exponents = st.integers(low, high) | st.integers(-3, 3)
    kinds = draw(st.lists(st.tuples(st.sampled_from(KINDS), exponents), max_size=4))
    return make_rows(kinds, H, dtype, draw(st.integers(0, 1 << 32)))


@each_case
@given(data=st.data())
def test_quantize_and_dequantize_match_the_formulas(case: str, data: st.DataObject) -> None:
    mode, options, multiple = CASES[case]
    x = data.draw(inputs(multiple))
    T, H = x.shape
    codes, stored, dequantised, _ = oracle(x.float().numpy(), mode, **options)
    quantised, scales = quantize(x, mode, **options)
    expected = {
        "int8": ((T, H), torch.int8, (T,), torch.float32),
        "pertoken_fp8_e4m3": ((T, H), torch.float8_e4m3fn, (T,), torch.float32),
        "mx_fp8_e4m3": ((T, H), torch.float8_e4m3fn, (T, H // 32), torch.float8_e8m0fnu),
        "mx_fp8_e5m2": ((T, H), torch.float8_e5m2, (T, H // 32), torch.float8_e8m0fnu),
        "mx_fp4_e2m1": ((T, H // 2), torch.float4_e2m1fn_x2, (T, H // 32), torch.float8_e8m0fnu),
        "block_fp8_e4m3": ((T, H), torch.float8_e4m3fn, (T, H // 128), torch.float32),
    }[mode]
    if options.get("use_ue8m0"):
        expected = (*expected[:2], (T, H // 512), torch.int32)
    assert (quantised.shape, quantised.dtype, scales.shape, scales.dtype) == expected
    np.testing.assert_array_equal(to_bytes(quantised).numpy(), codes)
    np.testing.assert_array_equal(to_bytes(scales).numpy(), stored)
    actual = dequantize(quantised, scales).numpy()
    assert actual.dtype == np.float32
    nan = np.isnan(dequantised)
    np.testing.assert_array_equal(np.isnan(actual), nan)
    np.testing.assert_array_equal(actual.view(np.uint32)[~nan], dequantised.view(np.uint32)[~nan])

    rows = pack(quantised, scales)
    assert rows.dtype == torch.bfloat16 and rows.shape[1] % 32 == 0
    content = np.concatenate([codes, stored], 1)
    np.testing.assert_array_equal(to_bytes(rows).numpy()[:, : content.shape[1]], content)
    assert not to_bytes(rows)[:, content.shape[1] :].any() and 2 * rows.shape[1] - content.shape[1] < 64
    for actual_part, part in zip(unpack(rows, quantised, scales), (quantised, scales), strict=True):
        assert same(actual_part, part)


@each_case
def test_every_finite_number_of_the_format_comes_back(case: str) -> None:
    mode, options, _ = CASES[case]
    form = MX.get(mode, E4M3)
    numbers = np.arange(128.0) if mode == "int8" else form.table
    x = torch.zeros(2, 512)
    x[0, : len(numbers)] = torch.from_numpy(numbers)
    x[1] = -x[0]
    # Each block has the largest number, so that its scale is 1.
    x[:, 31::32] = torch.tensor([[numbers[-1]], [-numbers[-1]]], dtype=torch.float32)
    torch.testing.assert_close(dequantize(*quantize(x, mode, **options)), x, rtol=1e-6, atol=0)


@pytest.mark.parametrize("low_latency", [False, True])
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "none"])
def test_zeros_and_numbers_that_are_not_finite(mode: str, low_latency: bool) -> None:
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(0))
    x[0] = 0
    x[1, 200] = torch.inf
    x[2, 200] = torch.nan
    data, scales = quantize(x, mode, low_latency=low_latency)
    y = dequantize(data, scales)
    width = 32 if mode in MX else 128 if mode == "block_fp8_e4m3" else 256
    bad = torch.zeros(4, 256, dtype=torch.bool)
    bad[1:3, 200 // width * width : (200 // width + 1) * width] = True
    assert not to_bytes(data)[0].any() and not y[0].any()
    assert torch.equal(y.isnan(), bad) and not y.isinf().any()
    scale_of_zeros = {
        "int8": 1.0 if low_latency else 1e-12 / 127,
        "pertoken_fp8_e4m3": 1.0 if low_latency else 1e-12 / 448,
        "block_fp8_e4m3": 1e-4 / 448,
    }.get(mode, 2.0**-127)
    assert scales[0].float().flatten()[0].item() == pytest.approx(scale_of_zeros, rel=1e-6)


def test_rows_too_small_for_a_finite_factor_count_as_zeros() -> None:
    x = torch.tensor([[3.7e-37, -1e-45], [3.8e-37, -1e-45]])
    data, scales = quantize(x, "int8", low_latency=True)
    assert data.tolist() == [[0, 0], [127, 0]]
    assert scales[0] == 1 and dequantize(data, scales)[1, 0].item() == pytest.approx(3.8e-37, rel=1e-6)


def test_rounding_to_a_power_of_two() -> None:
    x = torch.zeros(3, 512)
    x[0, 0], x[1, 0], x[2, 0] = 448.0, 448.1, torch.nan
    _, scales = quantize(x, "block_fp8_e4m3", round_scale=True)
    assert scales[:2, 0].tolist() == [1.0, 2.0] and scales[2, 0].isnan() and (scales[:, 1:] == 2.0**-22).all()
    _, packed = quantize(x, "block_fp8_e4m3", round_scale=True, use_ue8m0=True)
    assert packed.view(torch.uint8).tolist() == [[first, 105, 105, 105] for first in (127, 128, 255)]


@each_case
@pytest.mark.parametrize("dtype", DTYPES)
def test_errors_are_bounded(case: str, dtype: torch.dtype) -> None:
    mode, options, _ = CASES[case]
    x = torch.randn(16, 512, generator=torch.Generator().manual_seed(1)).to(dtype)
    y = dequantize(*quantize(x, mode, **options)).double().numpy()
    scale = oracle(x.float().numpy(), mode, **options)[3]
    exact = x.double().numpy()
    form = MX.get(mode, E4M3)
    # An MX block's largest number may lie above the format's.
    relative = 0.0 if mode == "int8" else max(form.half_ulp, 1 - form.table[-1] / 2.0 ** (form.emax + 1))
    absolute = 0.5 if mode == "int8" else form.half_step
    assert (np.abs(y - exact) <= (relative * np.abs(exact) + absolute * scale) * (1 + 1e-5)).all()
    diff = 1 - 2 * (exact * y).sum() / (exact**2 + y**2).sum()
    assert diff < (3e-3 if mode == "int8" else 4e-2 if mode == "mx_fp4_e2m1" else 2e-3)


@pytest.mark.parametrize("T", [0, 1, 3])
@pytest.mark.parametrize("scale_shape", [(), (1,), (3,)])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float8_e8m0fnu, torch.int64])
@pytest.mark.parametrize("data_dtype", [torch.int8, torch.bfloat16, torch.float4_e2m1fn_x2, torch.float32])
def test_pack_takes_any_dtype(
    T: int, scale_shape: tuple[int, ...], scale_dtype: torch.dtype, data_dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(T)

    def draw(dtype: torch.dtype, *shape: int) -> Tensor:
        shape = (*shape[:-1], shape[-1] * dtype.itemsize)
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).view(dtype)

    # 33 bytes of data leave the scales unaligned.
    data = draw(data_dtype, T, 33)
    scales = draw(scale_dtype, T, *scale_shape)
    rows = pack(data, scales)
    picked = torch.tensor([2, 0, 2, 1]) if T == 3 else torch.arange(T)
    unpacked_data, unpacked_scales = unpack(rows[picked], data[:0], scales[:0])
    assert torch.equal(to_bytes(unpacked_data), to_bytes(data)[picked])
    assert torch.equal(to_bytes(unpacked_scales), to_bytes(scales)[picked])
    assert unpacked_data.dtype == data_dtype and unpacked_scales.dtype == scale_dtype
    assert unpacked_scales.shape[1:] == scale_shape


def test_x_need_not_be_contiguous() -> None:
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(2)).t()
    for mode in ("int8", "mx_fp4_e2m1"):
        for a, b in zip(quantize(x, mode), quantize(x.contiguous(), mode), strict=True):
            assert a.is_contiguous() and same(a, b)


def all_steps(x: Tensor, mode: str, options: dict[str, bool]) -> tuple[Tensor, ...]:
    data, scales = quantize(x, mode, **options)
    rows = pack(data, scales)
    unpacked = unpack(rows, data, scales)
    return data, scales, rows, *unpacked, dequantize(*unpacked)


def check_compiled(case: str, backend: str) -> None:
    """Rows of all kinds, for numbers of rows that the compiler does not know."""
    mode, options, _ = CASES[case]
    exponents = (-150, -140, -127, -126, -20, 0, 1, 100, 126)
    x = make_rows([(kind, exponent) for kind in KINDS for exponent in exponents], 512, torch.float32, 3)
    compiled = torch.compile(all_steps, fullgraph=True, backend=backend)
    for T in (len(x), 0, 1):
        rows = x[len(x) - T :].clone()
        torch._dynamo.decorators.mark_unbacked(rows, 0)
        for actual, expected in zip(compiled(rows, mode, options), all_steps(rows, mode, options), strict=True):
            nan = expected.isnan() if expected.dtype == torch.float32 else None
            if nan is not None:
                # Which NaN it is says nothing.
                assert torch.equal(actual.isnan(), nan)
                actual, expected = actual.nan_to_num(0), expected.nan_to_num(0)
            assert same(actual, expected)


@pytest.mark.slow
@each_case
def test_aot_eager_equals_eager(case: str) -> None:
    torch.compiler.reset()
    check_compiled(case, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", ["int8 low latency", "pertoken_fp8_e4m3", "mx_fp8_e5m2", "mx_fp4_e2m1", "block_fp8_e4m3 use_ue8m0"]
)
def test_inductor_equals_eager(case: str) -> None:
    torch.compiler.reset()
    check_compiled(case, "inductor")


@pytest.mark.slow
def test_inductor_with_quantised_tensors_as_arguments() -> None:
    torch.compiler.reset()
    data, scales = quantize(torch.randn(5, 64, generator=torch.Generator().manual_seed(4)), "mx_fp4_e2m1")
    for function, arguments in ((dequantize, (data, scales)), (pack, (data, scales))):
        compiled = torch.compile(function, fullgraph=True, backend="inductor")
        assert same(compiled(*arguments), function(*arguments))
    actual = torch.compile(unpack, fullgraph=True, backend="inductor")(pack(data, scales), data, scales)
    assert same(actual[0], data) and same(actual[1], scales)


@each_case
@pytest.mark.parametrize("dtype", DTYPES)
def test_straight_through(case: str, dtype: torch.dtype) -> None:
    mode, options, _ = CASES[case]
    x = torch.randn(3, 512, generator=torch.Generator().manual_seed(5)).to(dtype).requires_grad_()
    y = straight_through(x, mode, **options)
    data, scales = quantize(x, mode, **options)
    assert not scales.requires_grad and same(y.detach(), dequantize(data, scales).to(dtype))
    weights = torch.randn(3, 512, generator=torch.Generator().manual_seed(6)).to(dtype)
    (grad,) = torch.autograd.grad(y, x, weights)
    assert same(grad, weights)


def test_straight_through_compiles() -> None:
    torch.compiler.reset()
    compiled = torch.compile(straight_through, fullgraph=True, backend="aot_eager")
    for mode in ("int8", "mx_fp4_e2m1"):
        x = torch.randn(3, 64, generator=torch.Generator().manual_seed(7)).requires_grad_()
        y = compiled(x, mode)
        assert same(y.detach(), straight_through(x, mode).detach())
        y.backward(2 * torch.ones_like(y))
        assert x.grad is not None and (x.grad == 2).all()


X = torch.zeros(2, 512)
E8M0 = torch.zeros(2, 16, dtype=torch.uint8).view(torch.float8_e8m0fnu)
I8 = torch.zeros(2, 512, dtype=torch.int8)
BAD: dict[str, tuple[Any, str]] = {
    "unknown mode": (lambda: check_mode("fp8"), r"quant_mode must be one of none, int8, .*, got 'fp8'"),
    "unknown mode in quantize": (lambda: quantize(X, "fp8"), r"quant_mode must be one of none, int8, .*, got 'fp8'"),
    "none": (lambda: quantize(X, "none"), "quant_mode none leaves nothing to quantize"),
    "none, straight through": (lambda: straight_through(X, "none"), "quant_mode none leaves nothing to quantize"),
    "x of one dimension": (lambda: quantize(X[0], "int8"), r"x must have the shape \[T, H\] .*, got .* \[512\]"),
    "x in fp64": (lambda: quantize(X.double(), "int8"), r"x must .*, got torch.float64 \[2, 512\]"),
    "no channels": (lambda: quantize(X[:, :0], "int8"), "x must have a hidden size of at least 1"),
    "H for MX": (lambda: quantize(X[:, :48], "mx_fp4_e2m1"), "H must be divisible by 32 for mx_fp4_e2m1, got H = 48"),
    "H for blocks": (
        lambda: quantize(X[:, :64], "block_fp8_e4m3"),
        "H must be divisible by 128 for block_fp8_e4m3, got H = 64",
    ),
    "H for ue8m0": (
        lambda: quantize(X[:, :256], "block_fp8_e4m3", round_scale=True, use_ue8m0=True),
        "H must be divisible by 512 for use_ue8m0, got H = 256",
    ),
    "ue8m0 alone": (
        lambda: quantize(X, "block_fp8_e4m3", use_ue8m0=True),
        "use_ue8m0 must be False unless round_scale",
    ),
    "round_scale": (lambda: quantize(X, "int8", round_scale=True), "round_scale must be False unless .* got .* 'int8'"),
    "dtype of data": (lambda: dequantize(X, X[:, 0]), "data must be torch.int8, .*, got torch.float32"),
    "shape of data": (lambda: dequantize(I8[0], X[:, 0]), r"data must be torch.int8, .*, got torch.int8 \[512\]"),
    "dtype of scales": (lambda: dequantize(I8, X[:, 0].double()), r"scales must be .*, got torch.float64 \[2\]"),
    "scales of other rows": (
        lambda: dequantize(I8, torch.zeros(3)),
        r"scales must be .* N = 2 and H = 512, got .* \[3\]",
    ),
    "width of scales": (lambda: dequantize(I8, E8M0[:, :5]), r"scales must be .*, got torch.float8_e8m0fnu \[2, 5\]"),
    "packed data": (lambda: pack(I8[0], X[:, 0]), r"data must have the shape \[T, D\], got \[512\]"),
    "packed scales": (lambda: pack(I8, X.view(2, 2, 256)), r"scales must have the shape \[T\] or \[T, S\], got"),
    "packed rows": (lambda: pack(I8, torch.zeros(3)), r"scales must have T = 2 rows like data, got \[3\]"),
    "unpacked width": (lambda: unpack(X.bfloat16(), I8, X[:, 0]), r"rows must be torch.bfloat16 \[N, 288\], got"),
    "unpacked dtype": (lambda: unpack(X[:, :288], I8, X[:, 0]), r"rows must be torch.bfloat16 \[N, 288\], got"),
    "unpacked data": (lambda: unpack(X.bfloat16(), I8[0], X[:, 0]), r"data must have the shape \[T, D\], got"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name: str) -> None:
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()
