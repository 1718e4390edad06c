"""fused_deep_moe of deep_ep.Buffer. Dynamo traces through it.

T local tokens · H hidden · K top-k · E experts · R ranks · L = E/R local experts · I intermediate size.
"""

import torch
from torch import Tensor

from .checks import FLOATS
from .collective import collective
from .fused_options import FORMATS, quant_mode_of
from .groups import GroupInfo
from .ops import fused_deep_moe as fused_op
from .weights import FusedWeights, FuseMode, as_fuse_mode


class FusedCalls:
    """What Buffer inherits for MoE layers in one call."""

    def _live(self) -> GroupInfo:
        raise NotImplementedError

    @collective(fused_op.ops_of)
    def fused_deep_moe(
        self,
        x: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor,
        gmm1_permuted_weight: Tensor,
        gmm1_permuted_weight_scale: Tensor | None,
        gmm2_weight: Tensor,
        gmm2_weight_scale: Tensor | None,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        quant_mode: int = 1,
        fuse_mode: FuseMode = FuseMode.FUSED_DEEP_MOE,
        profile_enable: bool = False,
        *,
        gmm1_bias: Tensor | None = None,
        gmm2_bias: Tensor | None = None,
        swiglu_limit: float | None = None,
        swiglu_alpha: float | None = None,
        swiglu_beta: float | None = None,
        shared_weights: FusedWeights | None = None,
        x_active_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As `deep_ep.fused_deep_moe`, whose arguments these are, with what DeepEP-Ascend's callers may give besides.

        `rows` and low_latency_strategy of the Buffer play no part; the strategy is that of normal mode.

        Args:
            gmm1_permuted_weight, gmm2_weight: int8, fp8 and fp4 weights mean their format whether quant_mode is 0 or 1,
                as in DeepEP-Ascend, whose kernels go by the weights; others need quant_mode 0.
            gmm1_permuted_weight_scale, gmm2_weight_scale: of int8 under FUSED_DEEP_MOE of any float dtype; under
                DISPATCH_FFN_COMBINE also [L·2I] and [L·H].
            fuse_mode: FuseMode, 1 or 2.
            profile_enable: accepted for compatibility: `begin_profile` traces every call.

        Returns:
            output [T, H], and ep_recv_count int32 [L·R] (FUSED_DEEP_MOE with float or int8 weights, as on A3) or
            expert_token_nums int32 [L] (fp8 and fp4 weights, as on A5, and DISPATCH_FFN_COMBINE).

        Raises:
            ValueError, RuntimeError: as `deep_ep.fused_deep_moe`; RuntimeError after `destroy`.
        """
        info, fuse_mode = self._live(), as_fuse_mode(fuse_mode)
        number = quant_mode_of(gmm1_permuted_weight)
        if quant_mode == 0 and number != 0:
            quant_mode = 1
        scales = [gmm1_permuted_weight_scale, gmm2_weight_scale]
        if not FORMATS[number].is_mx:
            scales = [_scale(scale, gmm1_permuted_weight.shape[0], fuse_mode) for scale in scales]
        return fused_op.call(
            *(info, x, topk_idx, topk_weights),
            *(gmm1_permuted_weight, scales[0], gmm2_weight, scales[1]),
            *(num_max_dispatch_tokens_per_rank, num_experts, quant_mode, fuse_mode),
            fused_op.options_of(
                gmm1_bias, gmm2_bias, swiglu_limit, swiglu_alpha, swiglu_beta, shared_weights, x_active_mask
            ),
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
