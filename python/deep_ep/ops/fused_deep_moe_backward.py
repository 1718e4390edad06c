"""fused_deep_moe_backward: the gradients of fused_deep_moe without quantisation.

T local tokens · H hidden · K top-k · L local experts · I intermediate size.
"""

import functools
from typing import Any

from torch import Tensor

from .. import checks
from ..fused_options import FusedOptions
from ..kernels import fused_deep_moe as fused_kernel
from ._registration import no_second_derivative, register, reject
from .fused_deep_moe import OVERLOADS, node


def fake(
    grad_out: Tensor,
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    gmm1_weight: Tensor,
    gmm2_weight: Tensor,
    num_max_dispatch_tokens_per_rank: int,
    num_experts: int,
    num_ranks: int,
    group: str,
    strategy: str,
    *given: Any,
    overload: str,
) -> tuple[Tensor, ...]:
    """grad_x [T, H], grad_topk_weights fp32 [T, K], and the gradients of weights and given options, like these."""
    options = FusedOptions(*given)
    sizes = num_max_dispatch_tokens_per_rank, num_experts, num_ranks
    error = checks.fused_deep_moe_backward(
        grad_out, x, topk_idx, topk_weights, gmm1_weight, gmm2_weight, *sizes, strategy, overload, options
    )
    reject("fused_deep_moe_backward", error)
    likes = x, topk_weights, gmm1_weight, gmm2_weight, *options.differentiable
    return tuple(like.new_empty(like.shape) for like in likes if like is not None)


def convert(
    grad_out: Any,
    x: Any,
    topk_idx: Any,
    topk_weights: Any,
    gmm1_weight: Any,
    gmm2_weight: Any,
    num_max_dispatch_tokens_per_rank: int,
    num_experts: int,
    num_ranks: int,
    group: str,
    strategy: str,
    *,
    overload: str,
) -> Any:
    """DeepEpFusedDeepMoeBackward, or DeepEpFusedDeepMoeBackwardDispatchFfnCombine."""
    inputs = {
        "grad_out": grad_out,
        "x": x,
        "topk_idx": topk_idx,
        "topk_weights": topk_weights,
        "gmm1_weight": gmm1_weight,
        "gmm2_weight": gmm2_weight,
    }
    sizes = num_max_dispatch_tokens_per_rank, num_experts, num_ranks
    return node("fused_deep_moe_backward", inputs, *sizes, {}, group, strategy, overload)


register(
    "fused_deep_moe_backward",
    fake=fake,
    kernel=fused_kernel.backward,
    backward=no_second_derivative("fused_deep_moe_backward"),
    convert={overload: functools.partial(convert, overload=overload) for overload in OVERLOADS.values()},
)
