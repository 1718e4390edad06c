"""fused_deep_moe of Buffer: what DeepEP-Ascend's callers may give, brought to what the op takes.

Dynamo traces through it.

H hidden · L local experts · I intermediate size.
"""

import torch
from torch import Tensor

from ..checks import FLOATS
from ..fused_options import FORMATS, FusedOptions, quant_mode_of
from ..groups import GroupInfo
from ..ops import fused_deep_moe as fused_op
from ..weights import FuseMode, as_fuse_mode


def call(
    info: GroupInfo,
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    gmm1_weight: Tensor,
    gmm1_weight_scale: Tensor | None,
    gmm2_weight: Tensor,
    gmm2_weight_scale: Tensor | None,
    num_max_dispatch_tokens_per_rank: int,
    num_experts: int,
    quant_mode: int,
    fuse_mode: FuseMode,
    options: FusedOptions,
) -> tuple[Tensor, Tensor]:
    """As `Buffer.fused_deep_moe`."""
    fuse_mode = as_fuse_mode(fuse_mode)
    number = quant_mode_of(gmm1_weight)
    if quant_mode == 0 and number != 0:
        quant_mode = 1
    scales = [gmm1_weight_scale, gmm2_weight_scale]
    if not FORMATS[number].is_mx:
        scales = [_scale(scale, gmm1_weight.shape[0], fuse_mode) for scale in scales]
    return fused_op.call(
        *(info, x, topk_idx, topk_weights, gmm1_weight, scales[0], gmm2_weight, scales[1]),
        *(num_max_dispatch_tokens_per_rank, num_experts, quant_mode, fuse_mode),
        options,
    )


def _scale(scale: Tensor | None, L: int, fuse_mode: FuseMode) -> Tensor | None:
    """As the op takes it."""
    if scale is None or scale.numel() == 0:
        return None
    if fuse_mode == FuseMode.FUSED_DEEP_MOE and scale.dtype in FLOATS:
        return scale.to(torch.float32)
    if fuse_mode == FuseMode.DISPATCH_FFN_COMBINE and scale.dim() == 1 and L and scale.shape[0] % L == 0:
        return scale.view(L, -1)
    return scale
