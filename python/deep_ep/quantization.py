"""Quantised rows in plain torch: the formats that dispatch can carry, and rows that hold data and scales together.

Symbols: T tokens, H hidden, N received rows, S scales per row, B bytes per packed row.

Nothing here looks at values to decide what to do, so that everything traces under torch.compile, whatever the number
of rows. Powers of two are made and taken apart as bits: log2, exp2 and ldexp round differently from device to device.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .checks import FLOATS, differ

MODES: tuple[str, ...] = (
    "none",
    "int8",
    "pertoken_fp8_e4m3",
    "mx_fp8_e4m3",
    "mx_fp8_e5m2",
    "mx_fp4_e2m1",
    "block_fp8_e4m3",
)
"""`block_fp8_e4m3` is the fp8 of upstream DeepEP, with one fp32 scale per 128 channels."""

MX_BLOCK = 32
BLOCK = 128
E4M3_MAX = 448.0

# Data type, exponent of the largest number, largest number.
_MX: dict[str, tuple[torch.dtype, int, float]] = {
    "mx_fp8_e4m3": (torch.float8_e4m3fn, 8, E4M3_MAX),
    "mx_fp8_e5m2": (torch.float8_e5m2, 15, 57344.0),
    "mx_fp4_e2m1": (torch.float4_e2m1fn_x2, 2, 6.0),
}

_NAMED: dict[torch.dtype, str] = {torch.int8: "int8"} | {dtype: mode for mode, (dtype, _, _) in _MX.items()}


def check_mode(mode: str) -> str:
    """`mode`; ValueError unless it is one of `MODES`, or bf16, which DeepEP-Ascend's clients say for none."""
    if mode == "bf16":
        return "none"
    if mode not in MODES:
        raise ValueError(f"quant_mode must be one of {', '.join(MODES)}, got {mode!r}")
    return mode


def named_by(marker: Tensor, x: Tensor) -> str | None:
    """The mode that the dtype of `marker` names, if x is not quantised, so that marker cannot be its scales.

    ValueError: marker names nothing, and its shape is not that of scales of x's rows [T, H] either.
    """
    if x.dtype not in FLOATS or x.dim() != 2:
        return None
    mode = _NAMED.get(marker.dtype)
    if mode is None and (marker.dim() not in (1, 2) or differ(marker.shape[0], x.shape[0])):
        raise ValueError(
            f"x[1] must be scales [T] or [T, S] of x's rows with T = {x.shape[0]}, or have the dtype that x is to be "
            f"quantised to, one of {', '.join(map(str, _NAMED))}; got {marker.dtype} {list(marker.shape)}"
        )
    return mode


def quantize(
    x: Tensor, mode: str, *, low_latency: bool = False, round_scale: bool = False, use_ue8m0: bool = False
) -> tuple[Tensor, Tensor]:
    """Data and scales of x [T, H] in bf16, fp16 or fp32; no gradient flows. All arithmetic is in fp32.

    - `int8`: s = 127 / absmax of the row (low_latency) or 127 / (absmax + 1e-12), data int8 [T, H] = rint(x * s),
      scales fp32 [T] = 1 / s.
    - `pertoken_fp8_e4m3`: the same with 448, data float8_e4m3fn [T, H].
    - `mx_*`: per block of 32 channels, byte = max(0, biased exponent of the largest magnitude - emax) with emax = 8 for
      e4m3, 15 for e5m2 and 2 for e2m1; data = x / 2^(byte - 127), in float8_e4m3fn or float8_e5m2 [T, H], or
      float4_e2m1fn_x2 [T, H/2] with the even channel in the low four bits; scales float8_e8m0fnu [T, H/32] = byte.
    - `block_fp8_e4m3`: per block of 128 channels, amax = max(absmax, 1e-4), data float8_e4m3fn [T, H] =
      x * (448 / amax), scales fp32 [T, H/128] = amax / 448. round_scale: the scale is rounded up to a power of two,
      and data = x / scale. use_ue8m0: the biased exponents of four such scales in one int32, the first in the lowest
      byte, scales int32 [T, H/512].

    Data are rounded to the nearest, ties to even, and saturate at the largest number of the format.

    Zeros give data 0 and a finite scale: 1 for int8 and per-token fp8 in low latency, where rows so small that s
    would be infinite (absmax below about 3.7e-37 for int8, 1.3e-36 for fp8) count as zeros, too; 1e-12 / 127 or
    1e-12 / 448 in normal mode; byte 0 for MX; 1e-4 / 448 for block fp8, which round_scale makes 2^-22. A row (int8,
    per-token fp8) or block (the others) with an Inf or NaN has data 0 and the scale NaN (0xFF as an exponent byte),
    so all of it dequantises to NaN.

    ValueError: unknown mode, or `none`; shape or dtype of x; H not divisible by 32 (MX), 128 (block fp8) or 512
    (use_ue8m0); round_scale in another mode than block fp8; use_ue8m0 without round_scale.
    """
    check_mode(mode)
    if mode == "none":
        raise ValueError("quant_mode none leaves nothing to quantize; it must be one of the other modes")
    _check_x(x)
    if round_scale and mode != "block_fp8_e4m3":
        raise ValueError(f"round_scale must be False unless quant_mode is block_fp8_e4m3, got quant_mode {mode!r}")
    if use_ue8m0 and not round_scale:
        raise ValueError("use_ue8m0 must be False unless round_scale is True")
    x = x.detach().to(torch.float32).contiguous()
    if mode in _MX:
        _check_hidden(x, MX_BLOCK, mode)
        return _quantize_mx(x, *_MX[mode])
    if mode == "block_fp8_e4m3":
        _check_hidden(x, 4 * BLOCK if use_ue8m0 else BLOCK, "use_ue8m0" if use_ue8m0 else mode)
        return _quantize_block(x, round_scale, use_ue8m0)
    largest = 127.0 if mode == "int8" else E4M3_MAX
    absmax = x.abs().amax(1)
    finite = absmax.isfinite()
    s = _over(largest, absmax if low_latency else absmax + 1e-12)
    s = torch.where(s.isfinite(), s, 1.0)
    values = torch.where(finite.unsqueeze(1), x * s.unsqueeze(1), 0.0).clamp(-largest, largest)
    scales = torch.where(finite, s.reciprocal(), torch.nan)
    return values.round().to(torch.int8) if mode == "int8" else values.to(torch.float8_e4m3fn), scales


def dequantize(data: Tensor, scales: Tensor) -> Tensor:
    """fp32 [N, H] = number * scale, in the format that the dtypes and shapes of quantize's results tell.

    scales: fp32 [N] (one per row), float8_e8m0fnu [N, H/32] or [N·H/32], fp32 [N, H/128] or int32 [N, H/512] (see
    use_ue8m0).
    Numbers at the very top of fp32's range may have become Inf by rounding.

    ValueError: another dtype or shape.
    """
    values = _numbers(data)
    N, H = values.shape
    scales = by_rows(scales, data)
    if scales.dim() == 1 and scales.dtype == torch.float32 and not differ(scales.shape[0], N):
        return values * scales.unsqueeze(1)
    if scales.dim() == 2 and not differ(scales.shape[0], N):
        S = scales.shape[1]
        if scales.dtype == torch.float8_e8m0fnu and not differ(MX_BLOCK * S, H):
            return _scale_blocks(values, _power_of_two(_view(scales, torch.uint8)))
        if scales.dtype == torch.float32 and not differ(BLOCK * S, H):
            return _scale_blocks(values, scales)
        if scales.dtype == torch.int32 and not differ(4 * BLOCK * S, H):
            return _scale_blocks(values, _power_of_two(_bytes(scales)))
    raise ValueError(
        f"scales must be float32 [N], float8_e8m0fnu [N, H/{MX_BLOCK}], float32 [N, H/{BLOCK}] or int32 "
        f"[N, H/{4 * BLOCK}] with N = {N} and H = {H}, got {scales.dtype} {list(scales.shape)}"
    )


def by_rows(scales: Tensor, data: Tensor) -> Tensor:
    """Scales of MX formats [T·H/32] as [T, H/32]; others as they are."""
    if scales.dim() != 1 or scales.dtype != torch.float8_e8m0fnu or data.dim() != 2:
        return scales
    T, S = data.shape[0], data.shape[1] * (2 if data.dtype == torch.float4_e2m1fn_x2 else 1) // MX_BLOCK
    return scales if differ(scales.shape[0], T * S) else scales.view(T, S)


def in_one_row(scales: Tensor) -> Tensor:
    """The other way, which is how DeepEP-Ascend gives them out."""
    return scales.view(-1) if scales.dtype == torch.float8_e8m0fnu else scales


def dequantize_columns(data: Tensor, scales: Tensor) -> Tensor:
    """fp32 [K, N] of a matrix in one of the MX formats whose blocks of 32 numbers lie along K.

    data: [K, N], or float4_e2m1fn_x2 [K, N/2]; scales: float8_e8m0fnu [K/32, N].
    """
    values, powers = _numbers(data), _power_of_two(_view(scales, torch.uint8))
    K, N = values.shape
    return (values.view(K // MX_BLOCK, MX_BLOCK, N) * powers.unsqueeze(1)).view(K, N)


def pack(data: Tensor, scales: Tensor) -> Tensor:
    """bf16 [T, B/2]: in each row the bytes of data [T, D] and then of scales [T] or [T, S], of any dtypes, and zeros
    up to B, a multiple of 64.

    The rows are for carrying only: as bf16 numbers they mean nothing.

    ValueError: data without two dimensions, scales without one or two, or with another number of rows.
    """
    _check_data(data, scales)
    if differ(scales.shape[0], data.shape[0]):
        raise ValueError(f"scales must have T = {data.shape[0]} rows like data, got {list(scales.shape)}")
    D, S, B = _widths(data, scales)
    padding = data.new_zeros((data.shape[0], B - D - S), dtype=torch.uint8)
    scales = scales.unsqueeze(1) if scales.dim() == 1 else scales
    return torch.cat([_bytes(data), _bytes(scales), padding], 1).view(torch.bfloat16)


def described(x: Tensor | tuple[Tensor, Tensor]) -> str:
    """What receivers have to know to understand rows of x, in words; nothing in a graph, where sizes may be symbols."""
    if torch.compiler.is_compiling():
        return ""
    if isinstance(x, Tensor):
        return "x as it is"
    data, scales = x
    widths = ", ".join(map(str, ("T", *scales.shape[1:])))
    return f"x as {data.dtype} [T, {data.shape[1]}] with scales {scales.dtype} [{widths}]"


def unpack(rows: Tensor, data: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Data [N, D] and scales [N] or [N, S] of rows bf16 [N, B/2], the inverse of pack.

    Only the dtypes and the row widths of `data` and `scales`, the arguments of pack, are used.

    ValueError: rows of another shape or dtype; data or scales that pack refuses.
    """
    _check_data(data, scales)
    D, S, B = _widths(data, scales)
    if rows.dim() != 2 or rows.dtype != torch.bfloat16 or differ(rows.shape[1], B // 2):
        raise ValueError(f"rows must be torch.bfloat16 [N, {B // 2}], got {rows.dtype} {list(rows.shape)}")
    row_bytes = _bytes(rows)
    # A slice may start where a view as a wider dtype is not aligned.
    unpacked_data = _view(row_bytes[:, :D].clone(memory_format=torch.contiguous_format), data.dtype)
    unpacked_scales = _view(row_bytes[:, D : D + S].clone(memory_format=torch.contiguous_format), scales.dtype)
    return unpacked_data, unpacked_scales.squeeze(1) if scales.dim() == 1 else unpacked_scales


def around(
    send: Callable[..., tuple[Tensor, ...]], wrong: Callable[..., str | None], *, low_latency: bool = False
) -> Callable[..., tuple[Tensor, ...]]:
    """A function that sends rows as int8: `send(x, *arguments)` sends any rows, and its first result has those
    received, in whose place are data and scales. `wrong(x, *arguments)` says what is wrong, if anything.
    """

    def send_int8(x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        # What is wrong on this rank must not keep it from taking part: `send` refuses it on all.
        sent = None if wrong(x, *arguments) else quantize(x, "int8", low_latency=low_latency)
        out = send(x if sent is None else pack(*sent), *arguments)
        assert sent is not None
        data, scales = unpack(out[0], *sent)
        return data, scales, *out[1:]

    return send_int8


def straight_through(
    x: Tensor, mode: str, *, low_latency: bool = False, round_scale: bool = False, use_ue8m0: bool = False
) -> Tensor:
    """dequantize(quantize(x)) in the dtype of x [T, H], with the identity as its gradient.

    The arguments and errors are those of quantize.
    """
    return _StraightThrough.apply(x, mode, low_latency, round_scale, use_ue8m0)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mode: str, low_latency: bool, round_scale: bool, use_ue8m0: bool) -> Tensor:
        data, scales = quantize(x, mode, low_latency=low_latency, round_scale=round_scale, use_ue8m0=use_ue8m0)
        values = dequantize(data, scales)
        # Torch 2.11 compiles a result that `to` gives back as it is without a gradient.
        return values if values.dtype == x.dtype else values.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        return grad, None, None, None, None


def _check_x(x: Tensor) -> None:
    if x.dim() != 2 or x.dtype not in FLOATS:
        allowed = ", ".join(map(str, FLOATS))
        raise ValueError(f"x must have the shape [T, H] and be one of {allowed}, got {x.dtype} {list(x.shape)}")
    if not differ(x.shape[1], 0):
        raise ValueError("x must have a hidden size of at least 1")


def _check_hidden(x: Tensor, multiple: int, what: str) -> None:
    if x.shape[1] % multiple:
        raise ValueError(f"H must be divisible by {multiple} for {what}, got H = {x.shape[1]}")


def _check_data(data: Tensor, scales: Tensor) -> None:
    if data.dim() != 2:
        raise ValueError(f"data must have the shape [T, D], got {list(data.shape)}")
    if scales.dim() not in (1, 2):
        raise ValueError(f"scales must have the shape [T] or [T, S], got {list(scales.shape)}")


def _over(number: float, x: Tensor) -> Tensor:
    """number / x, rounded once."""
    # The operator / takes a number to be number * x.reciprocal().
    return torch.full_like(x, number) / x


def _quantize_mx(x: Tensor, dtype: torch.dtype, emax: int, largest: float) -> tuple[Tensor, Tensor]:
    T, H = x.shape
    blocks = x.view(T, H // MX_BLOCK, MX_BLOCK)
    exponent = (blocks.view(torch.int32) & 0x7FFFFFFF).amax(2) >> 23
    finite = exponent < 255
    byte = torch.where(finite, (exponent - emax).clamp(min=0), 255)
    # 254 - byte is the biased exponent of 2^(127 - byte). It is at least 2, so that no factor is subnormal.
    factor = torch.where(finite, (254 - byte) << 23, 0).view(torch.float32)
    values = torch.where(finite.unsqueeze(2), blocks * factor.unsqueeze(2), 0.0).clamp(-largest, largest).view(T, H)
    data = _to_fp4(values) if dtype == torch.float4_e2m1fn_x2 else values.to(dtype)
    return data, _view(byte.to(torch.uint8), torch.float8_e8m0fnu)


def _quantize_block(x: Tensor, round_scale: bool, use_ue8m0: bool) -> tuple[Tensor, Tensor]:
    T, H = x.shape
    blocks = x.view(T, H // BLOCK, BLOCK)
    absmax = blocks.abs().amax(2)
    finite = absmax.isfinite()
    amax = torch.where(finite, absmax.clamp(min=1e-4), 1.0)
    s, scales = _over(E4M3_MAX, amax), amax / E4M3_MAX
    exponent = (scales.view(torch.int32) + 0x7FFFFF) >> 23
    if round_scale:
        s, scales = ((254 - exponent) << 23).view(torch.float32), (exponent << 23).view(torch.float32)
    values = torch.where(finite.unsqueeze(2), blocks * s.unsqueeze(2), 0.0).clamp(-E4M3_MAX, E4M3_MAX)
    data = values.view(T, H).to(torch.float8_e4m3fn)
    if use_ue8m0:
        return data, torch.where(finite, exponent, 255).to(torch.uint8).view(torch.int32)
    return data, torch.where(finite, scales, torch.nan)


def _to_fp4(values: Tensor) -> Tensor:
    """float4_e2m1fn_x2 [T, H/2] of values [T, H] within -6..6."""
    a = values.abs()
    # Numbers lie 1/2 apart below 2, 1 apart below 4 and 2 apart above.
    code = torch.where(a < 2, (2 * a).round(), torch.where(a < 4, a.round() + 2, (a / 2).round() + 4))
    nibbles = code.to(torch.uint8) | (torch.signbit(values).to(torch.uint8) << 3)
    return _view(nibbles[:, 0::2] | (nibbles[:, 1::2] << 4), torch.float4_e2m1fn_x2)


def _numbers(data: Tensor) -> Tensor:
    """The numbers in data, fp32 [N, H], before scaling."""
    if data.dim() == 2 and data.dtype in (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2):
        return data.to(torch.float32)
    if data.dim() == 2 and data.dtype == torch.float4_e2m1fn_x2:
        pairs = _view(data, torch.uint8)
        nibbles = torch.stack([pairs & 15, pairs >> 4], 2).flatten(1)
        exponent, mantissa = (nibbles >> 1) & 3, (nibbles & 1).to(torch.float32)
        powers = torch.where(exponent == 3, 4.0, torch.where(exponent == 2, 2.0, 1.0))
        a = torch.where(exponent == 0, mantissa / 2, (1 + mantissa / 2) * powers)
        return torch.where(nibbles >= 8, -a, a)
    raise ValueError(
        "data must be torch.int8, torch.float8_e4m3fn, torch.float8_e5m2 or torch.float4_e2m1fn_x2 with two "
        f"dimensions, got {data.dtype} {list(data.shape)}"
    )


def _power_of_two(byte: Tensor) -> Tensor:
    """fp32 2^(byte - 127), which is subnormal for byte 0, and NaN for byte 255."""
    bits = byte.to(torch.int32) << 23
    return torch.where(byte == 255, 0x7FC00000, torch.where(byte == 0, 0x00400000, bits)).view(torch.float32)


def _scale_blocks(values: Tensor, scales: Tensor) -> Tensor:
    N, S = scales.shape
    return (values.view(N, S, values.shape[1] // S) * scales.unsqueeze(2)).flatten(1)


@torch.library.custom_op("deep_ep::_reinterpret", mutates_args=())
def _reinterpret(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of the bytes of x as another dtype of the same size."""
    return x.view(dtype).clone(memory_format=torch.contiguous_format)


@_reinterpret.register_fake
def _(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


def _view(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x.view(dtype)."""
    # Inductor has no C++ type for these two, not even to view them as bytes.
    untyped = (torch.float8_e8m0fnu, torch.float4_e2m1fn_x2)
    if torch.compiler.is_compiling() and x.dtype != dtype and (x.dtype in untyped or dtype in untyped):
        return _reinterpret(x, dtype)
    return x.view(dtype)


def _bytes(rows: Tensor) -> Tensor:
    """uint8 [N, bytes per row] of rows [N, width]."""
    # A view as a narrower dtype needs a last dimension with stride 1, which even contiguous rows of width 1 may lack.
    return _view(rows.unsqueeze(2), torch.uint8).flatten(1)


def _widths(data: Tensor, scales: Tensor) -> tuple[int, int, int]:
    """Bytes per row of data, of scales, and of both with padding."""
    D = data.shape[1] * data.element_size()
    S = (scales.shape[1] if scales.dim() == 2 else 1) * scales.element_size()
    return D, S, (D + S + 63) // 64 * 64
