"""The layouts of fused_deep_moe's weights, and functions that make them out of ordinary ones.

L local experts · H hidden · I intermediate size. Ordinary weights are those of torch.nn.Linear, one per expert: gate
and up in one [L, 2I, H], the I rows of gate first, and down [L, H, I]. Quantised ones have scales per row, or, in the
MX formats, per 32 numbers of a row; float4_e2m1fn_x2 has two neighbours of a row in one element.

| fuse mode, weights | gmm1_weight | gmm2_weight | scales |
|---|---|---|---|
| FUSED_DEEP_MOE, float or int8 | [L, H, 2I], columns in tiles of 64 of gate and the same 64 of up | [L, H, I] | fp32 |
| DISPATCH_FFN_COMBINE, float or int8 | [L, H, 2I], the columns of gate, then those of up | [L, I, H] | int64 |
| both, fp8 or fp4 | [L, H, 2I], the columns of gate, then those of up | [L, I, H] | float8_e8m0fnu |

int8: gmm1_weight_scale is [L, 2I], in the order of gmm1's columns, and gmm2_weight_scale [L, H]; int64 has the bits of
fp32. fp8 and fp4, as DeepEP-Ascend has them on A5: [L, ceil(H/64), 2I, 2] and [L, ceil(I/64), H, 2], of each column for
the rows 64·i to 64·i + 31, and for the 32 behind them. fp4 has two neighbouring columns in one element, so that weights
are [L, H, I] and [L, I, H/2].

On a CPU tensors are plain (ND). DeepEP-Ascend's kernels want int8 weights in NZ format, which does not change shapes:
on an NPU cast what these functions return with `torch_npu.npu_format_cast(weight, 29)`, and set
`torch_npu.npu.config.allow_internal_format`.
"""

import ctypes
import functools
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from . import quantization
from ._library import library
from .checks import FLOATS, TILE
from .fused_options import FORMATS, Format, in_tiles, quant_mode_of


class FuseMode(IntEnum):
    """The two forms of fused_deep_moe, by DeepEP-Ascend's numbers. They compute the same."""

    FUSED_DEEP_MOE = 1
    """The op's overload `.default`: counts received rows by local expert and source rank."""
    DISPATCH_FFN_COMBINE = 2
    """The overload `.dispatch_ffn_combine`: counts them by local expert, and bounds their number."""


class FusedWeights(NamedTuple):
    """What fused_deep_moe takes, in its order."""

    gmm1_weight: Tensor
    gmm1_weight_scale: Tensor | None
    gmm2_weight: Tensor
    gmm2_weight_scale: Tensor | None


@functools.lru_cache(maxsize=16)
def places(columns: int) -> Tensor:
    """int64 [columns]: where each of the 2I columns [gate | up] stands under FUSED_DEEP_MOE."""
    result = torch.empty(columns, dtype=torch.int64, device="cpu")
    library.deep_ep_fused_places(columns, ctypes.c_void_p(result.data_ptr()))
    return result


def scale_to_bits(scale: Tensor) -> Tensor:
    """int64 of the same shape: the bits of an fp32 scale, as DISPATCH_FFN_COMBINE takes it."""
    return scale.to(torch.float32).contiguous().view(torch.int32).to(torch.int64)


def bits_to_scale(bits: Tensor) -> Tensor:
    """The inverse of scale_to_bits."""
    return bits.to(torch.int32).view(torch.float32)


def quantize_weight(weight: Tensor, quant_mode: str = "int8") -> tuple[Tensor, Tensor]:
    """Data and scales of weight [L, N, K] in bf16, fp16 or fp32. No gradient flows.

    - `int8`: data int8 [L, N, K] = rint(weight / scale), scales fp32 [L, N], one per output channel: absmax / 127, and
      1 for a channel of zeros.
    - `mx_fp8_e4m3`, `mx_fp8_e5m2`, `mx_fp4_e2m1`: as `quantization.quantize` does with rows of K numbers. Data
      float8_e4m3fn or float8_e5m2 [L, N, K], or float4_e2m1fn_x2 [L, N, K/2], scales float8_e8m0fnu [L, N, K/32].

    ValueError: another quant_mode, dtype or number of dimensions; K not divisible by 32 in an MX format.
    """
    modes = [form.quant_mode for form in FORMATS if form.dtype is not None]
    if quant_mode not in modes:
        raise ValueError(f"quant_mode must be one of {', '.join(modes)}, got {quant_mode!r}")
    if weight.dim() != 3 or weight.dtype not in FLOATS:
        raise ValueError(f"weight must be [L, N, K] of {FLOATS}, got {weight.dtype} {list(weight.shape)}")
    L, N, K = weight.shape
    if quant_mode != "int8":
        data, scale = quantization.quantize(weight.reshape(L * N, K), quant_mode)
        return data.view(L, N, -1), scale.view(L, N, -1)
    values = weight.detach().to(torch.float32)
    scale = values.abs().amax(2) / 127
    scale = torch.where(scale > 0, scale, 1.0)
    return (values / scale.unsqueeze(2)).round().clamp(-127, 127).to(torch.int8), scale


def fused_weights(
    gate_up: Tensor,
    down: Tensor,
    gate_up_scale: Tensor | None = None,
    down_scale: Tensor | None = None,
    *,
    fuse_mode: FuseMode | int = FuseMode.FUSED_DEEP_MOE,
) -> FusedWeights:
    """The layout of `fuse_mode` for ordinary weights. Differentiable in float weights.

    Args:
        gate_up: [L, 2I, H]: bf16, fp16 or fp32 for quant_mode 0; int8, float8_e4m3fn, float8_e5m2, or float4_e2m1fn_x2
            [L, 2I, H/2], for quant_mode 1.
        down: [L, H, I] of the same dtype, or [L, H, I/2].
        gate_up_scale, down_scale: for int8, [L, 2I] and [L, H] of floats, or with a last dimension of 1; for fp8 and
            fp4, float8_e8m0fnu [L, 2I, H/32] and [L, H, I/32]; None otherwise. `quantize_weight` gives both from float
            weights.

    Raises:
        ValueError: an unknown fuse_mode, another shape or dtype, a scale that is missing or has nothing to scale, H or
            I that is not a multiple of 32 for fp8 and fp4, 2I that is not a multiple of 128 under FUSED_DEEP_MOE for
            others.
    """
    fuse_mode = as_fuse_mode(fuse_mode)
    form = FORMATS[quant_mode_of(gate_up)]
    if gate_up.dim() != 3 or gate_up.shape[1] % 2 or gate_up.dtype not in (*FLOATS, form.dtype):
        raise ValueError(
            f"gate_up must be [L, 2I, H] of floats, int8, fp8 or fp4, got {gate_up.dtype} {list(gate_up.shape)}"
        )
    L, columns, H = gate_up.shape[0], gate_up.shape[1], gate_up.shape[2] * form.packed
    wanted = [L, H, columns // 2 // form.packed]
    if list(down.shape) != wanted or down.dtype != gate_up.dtype:
        raise ValueError(f"down must be {gate_up.dtype} {wanted} to fit gate_up, got {down.dtype} {list(down.shape)}")
    if form.is_mx and (H % 32 or columns % 64):
        raise ValueError(
            f"gate_up must have H and I that are multiples of 32 for {form.dtype}, got {H} and {columns // 2}"
        )
    tiles = _in_tiles(fuse_mode, form)
    if tiles and columns % TILE:
        raise ValueError(f"gate_up must have a multiple of {TILE} rows (2I) under FUSED_DEEP_MOE, got {columns}")
    scales = [
        _checked_scale("gate_up_scale", gate_up_scale, form, gate_up.dtype, L, columns, H),
        _checked_scale("down_scale", down_scale, form, gate_up.dtype, L, H, columns // 2),
    ]
    gmm1_scale, gmm2_scale = scales
    if form.is_mx:
        gmm1_scale, gmm2_scale = (None if scale is None else _mx_scale(scale) for scale in scales)
        return FusedWeights(_transposed(gate_up, form), gmm1_scale, _transposed(down, form), gmm2_scale)
    gmm1_weight, gmm2_weight = gate_up.transpose(1, 2), down
    if tiles:
        order = places(columns).argsort().to(gate_up.device)
        gmm1_weight = gmm1_weight.index_select(2, order)
        gmm1_scale = None if gmm1_scale is None else gmm1_scale.index_select(1, order)
    else:
        gmm2_weight = down.transpose(1, 2)
        gmm1_scale, gmm2_scale = (None if scale is None else scale_to_bits(scale) for scale in scales)
    return FusedWeights(gmm1_weight.contiguous(), gmm1_scale, gmm2_weight.contiguous(), gmm2_scale)


def fused_bias(
    gate_up_bias: Tensor, weights: FusedWeights, *, fuse_mode: FuseMode | int = FuseMode.FUSED_DEEP_MOE
) -> Tensor:
    """gmm1_bias [L, 2I] of gate_up_bias [L, 2I], the I of gate first: in the order of gmm1's columns. Differentiable.

    weights: what `fused_weights` has made for fuse_mode.

    ValueError: an unknown fuse_mode, another shape.
    """
    form = FORMATS[quant_mode_of(weights.gmm1_weight)]
    shape = weights.gmm1_weight.shape[0], weights.gmm1_weight.shape[2] * form.packed
    if gate_up_bias.shape != shape:
        raise ValueError(f"gate_up_bias must be {list(shape)} to fit weights, got {list(gate_up_bias.shape)}")
    if not _in_tiles(as_fuse_mode(fuse_mode), form):
        return gate_up_bias
    return gate_up_bias.index_select(1, places(shape[1]).argsort().to(gate_up_bias.device))


def _in_tiles(fuse_mode: FuseMode, form: Format) -> bool:
    return in_tiles("default" if fuse_mode is FuseMode.FUSED_DEEP_MOE else "dispatch_ffn_combine", form)


def _checked_scale(
    name: str, scale: Tensor | None, form: Format, dtype: torch.dtype, L: int, N: int, K: int
) -> Tensor | None:
    """That of ordinary weights [L, N, K]: fp32 [L, N], or float8_e8m0fnu [L, N, K/32]."""
    given = "None" if scale is None else f"{scale.dtype} {list(scale.shape)}"
    if form.dtype is None:
        if scale is not None:
            raise ValueError(f"{name} must be None for weights of {dtype}")
        return None
    if form.is_mx:
        if scale is None or scale.dtype != torch.float8_e8m0fnu or scale.shape != (L, N, K // 32):
            raise ValueError(f"{name} must be torch.float8_e8m0fnu {[L, N, K // 32]} for {dtype} weights, got {given}")
        return scale
    if scale is None or scale.dtype not in FLOATS or scale.shape not in ((L, N), (L, N, 1)):
        raise ValueError(f"{name} must be {[L, N]} of floats for int8 weights, got {given}")
    return scale.to(torch.float32).reshape(L, N)


def _mx_scale(scale: Tensor) -> Tensor:
    """float8_e8m0fnu [L, ceil(K/64), N, 2] of [L, N, K/32]."""
    data = scale.view(torch.uint8)
    data = torch.nn.functional.pad(data, (0, data.shape[2] % 2))
    return data.unflatten(2, (-1, 2)).transpose(1, 2).contiguous().view(torch.float8_e8m0fnu)


def _transposed(weight: Tensor, form: Format) -> Tensor:
    """[L, K, N] of [L, N, K] in fp8; in fp4 [L, K, N/2] of [L, N, K/2]."""
    data = weight.view(torch.uint8)
    if form.packed == 2:
        data = torch.stack([data & 15, data >> 4], 3).flatten(2).transpose(1, 2)
        data = data[..., 0::2] | (data[..., 1::2] << 4)
    else:
        data = data.transpose(1, 2)
    return data.contiguous().view(weight.dtype)


_MODES = {int(mode): mode for mode in FuseMode}


def as_fuse_mode(fuse_mode: FuseMode | int) -> FuseMode:
    """ValueError unless it is a FuseMode or its number."""
    number = int(fuse_mode) if isinstance(fuse_mode, int) else None  # under torch.compile it may be a symbol
    if number not in _MODES:
        allowed = ", ".join(f"{mode.name} ({number})" for number, mode in _MODES.items())
        raise ValueError(f"fuse_mode must be one of {allowed}; got {fuse_mode!r}")
    return _MODES[number]
