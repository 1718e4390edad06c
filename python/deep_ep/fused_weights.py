"""The layouts of fused_deep_moe's weights, and functions that make them out of ordinary ones.

L local experts · H hidden · I intermediate size. Ordinary weights are those of torch.nn.Linear, one per expert: gate
and up in one [L, 2I, H], the I rows of gate first, and down [L, H, I].

| fuse mode | gmm1_weight | gmm2_weight | scales, for int8 weights |
|---|---|---|---|
| FUSED_DEEP_MOE | [L, H, 2I], columns in tiles of 64 of gate and the same 64 of up | [L, H, I] | fp32 |
| DISPATCH_FFN_COMBINE | [L, H, 2I], the columns of gate, then those of up | [L, I, H] | int64, the bits of fp32 |

gmm1_weight_scale is [L, 2I], in the order of gmm1's columns, and gmm2_weight_scale [L, H]. On a CPU tensors are plain
(ND). DeepEP-Ascend's kernels want both weights in NZ format, which does not change shapes: on an NPU cast what these
functions return with `torch_npu.npu_format_cast(weight, 29)`, and set `torch_npu.npu.config.allow_internal_format`.
"""

import ctypes
import functools
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from ._library import library
from .checks import FLOATS, TILE


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


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [L, N, K] and scales fp32 [L, N] of weight [L, N, K] in bf16, fp16 or fp32: one scale per output channel.

    scale = absmax / 127, and 1 for a channel of zeros; int8 = rint(weight / scale). No gradient flows.

    ValueError: another dtype or number of dimensions.
    """
    if weight.dim() != 3 or weight.dtype not in FLOATS:
        raise ValueError(f"weight must be [L, N, K] of {FLOATS}, got {weight.dtype} {list(weight.shape)}")
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
        gate_up: [L, 2I, H]: bf16, fp16 or fp32 for quant_mode 0, int8 for quant_mode 1.
        down: [L, H, I] of the same dtype.
        gate_up_scale, down_scale: for int8, [L, 2I] and [L, H], or with a last dimension of 1; None otherwise.
            `quantize_weight` gives both from float weights.

    Raises:
        ValueError: an unknown fuse_mode, another shape or dtype, a scale that is missing or has nothing to scale, 2I
            that is not a multiple of 128 under FUSED_DEEP_MOE.
    """
    fuse_mode = as_fuse_mode(fuse_mode)
    if gate_up.dim() != 3 or gate_up.shape[1] % 2 or gate_up.dtype not in (*FLOATS, torch.int8):
        raise ValueError(f"gate_up must be [L, 2I, H] of floats or int8, got {gate_up.dtype} {list(gate_up.shape)}")
    L, columns, H = gate_up.shape
    if down.shape != (L, H, columns // 2) or down.dtype != gate_up.dtype:
        raise ValueError(
            f"down must be {gate_up.dtype} {[L, H, columns // 2]} to fit gate_up, got {down.dtype} {list(down.shape)}"
        )
    permuted = fuse_mode is FuseMode.FUSED_DEEP_MOE
    if permuted and columns % TILE:
        raise ValueError(f"gate_up must have a multiple of {TILE} rows (2I) under FUSED_DEEP_MOE, got {columns}")
    scales: list[Tensor | None] = []
    for name, scale, N in (("gate_up_scale", gate_up_scale, columns), ("down_scale", down_scale, H)):
        if gate_up.dtype != torch.int8:
            if scale is not None:
                raise ValueError(f"{name} must be None for weights of {gate_up.dtype}")
            scales.append(None)
            continue
        if scale is None or scale.dtype not in FLOATS or scale.shape not in ((L, N), (L, N, 1)):
            given = "None" if scale is None else f"{scale.dtype} {list(scale.shape)}"
            raise ValueError(f"{name} must be {[L, N]} of floats for int8 weights, got {given}")
        scales.append(scale.to(torch.float32).reshape(L, N))
    gmm1_weight, gmm2_weight, (gmm1_scale, gmm2_scale) = gate_up.transpose(1, 2), down, scales
    if permuted:
        order = places(columns).argsort().to(gate_up.device)
        gmm1_weight = gmm1_weight.index_select(2, order)
        gmm1_scale = None if gmm1_scale is None else gmm1_scale.index_select(1, order)
    else:
        gmm2_weight = down.transpose(1, 2)
        gmm1_scale, gmm2_scale = (None if scale is None else scale_to_bits(scale) for scale in scales)
    return FusedWeights(gmm1_weight.contiguous(), gmm1_scale, gmm2_weight.contiguous(), gmm2_scale)


_MODES = {int(mode): mode for mode in FuseMode}


def as_fuse_mode(fuse_mode: FuseMode | int) -> FuseMode:
    """ValueError unless it is a FuseMode or its number."""
    number = int(fuse_mode) if isinstance(fuse_mode, int) else None  # under torch.compile it may be a symbol
    if number not in _MODES:
        allowed = ", ".join(f"{mode.name} ({number})" for number, mode in _MODES.items())
        raise ValueError(f"fuse_mode must be one of {allowed}; got {fuse_mode!r}")
    return _MODES[number]
