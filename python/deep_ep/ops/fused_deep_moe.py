"""fused_deep_moe: an MoE layer's experts in one op: dispatch, gmm1, SwiGLU, gmm2 and combine.

T local tokens · H hidden · K top-k · E experts · R ranks · L = E/R local experts · I intermediate size ·
M num_max_dispatch_tokens_per_rank.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from .. import checks, fused_kernel
from ..arguments import flat, like_tokens
from ..collective import collective
from ..fused_weights import FuseMode, as_fuse_mode
from ..groups import Group, GroupInfo, info_of
from ..npu import ge
from ._registration import register, reject

OVERLOADS = {FuseMode.FUSED_DEEP_MOE: "default", FuseMode.DISPATCH_FFN_COMBINE: "dispatch_ffn_combine"}


def ops_of(given: dict[str, Any]) -> tuple[str, ...]:
    """Of a call with these arguments, whether they are right or not."""
    mode = given.get("fuse_mode")
    is_second = isinstance(mode, int) and mode == FuseMode.DISPATCH_FFN_COMBINE
    return "fused_deep_moe" + ".dispatch_ffn_combine" * is_second, "dispatch", "combine"


@collective(ops_of)
def fused_deep_moe(
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    gmm1_weight: Tensor,
    gmm1_weight_scale: Tensor | None,
    gmm2_weight: Tensor,
    gmm2_weight_scale: Tensor | None,
    num_max_dispatch_tokens_per_rank: int,
    num_experts: int,
    *,
    quant_mode: int = 1,
    fuse_mode: FuseMode | int = FuseMode.FUSED_DEEP_MOE,
    group: Group = None,
) -> tuple[Tensor, Tensor]:
    """Each token's sum over k of topk_weights[t, k] * SwiGLU expert topk_idx[t, k]. Collective over the group.

    `deep_ep.fused_weights` makes weights and scales, `FusedWeights`, which stand in the order of these arguments.
    Rows travel as normal mode sends them, with the strategy of normal mode, and only those that arrive are computed.

    Differentiable in x, topk_weights, gmm1_weight and gmm2_weight with quant_mode 0; nothing but arguments is kept for
    backward, which sends and computes rows once more.

    Args:
        x: [T, H] bf16, fp16 or fp32; T >= 0 may differ between ranks, and be several dimensions, which topk_idx and
            topk_weights have, too.
        topk_idx: [T, K] of any integer dtype, expert ids 0..E-1, or -1 for none.
        topk_weights: [T, K] fp32, bf16 or fp16, which becomes fp32.
        gmm1_weight: [L, H, 2I], of any strides, in the layout of fuse_mode; x's dtype (quant_mode 0) or int8 (1).
        gmm1_weight_scale: [L, 2I], fp32 under FUSED_DEEP_MOE and int64 under DISPATCH_FFN_COMBINE, contiguous; None
            (or empty) with quant_mode 0.
        gmm2_weight: [L, H, I] under FUSED_DEEP_MOE, [L, I, H] under DISPATCH_FFN_COMBINE; as gmm1_weight.
        gmm2_weight_scale: [L, H], as gmm1_weight_scale.
        num_max_dispatch_tokens_per_rank: the same on all ranks. FUSED_DEEP_MOE: M, which T must not exceed.
            DISPATCH_FFN_COMBINE: how many rows a rank may receive in all.
        num_experts: E, a multiple of R.
        quant_mode: 0, or 1 for int8 with exact sums in int32 (`fused_kernel` has the formulas).
        fuse_mode: FuseMode, or its number.
        group: a group prepared with `deep_ep.init`.

    Returns:
        combined_x [T, H] in x's dtype, summed up in fp32 in the order of k and rounded once; 0 for tokens without
        experts.
        num_recv_tokens, rows that this rank received: int32 [L·R] by (local expert, source rank) under FUSED_DEEP_MOE,
        int32 [L] under DISPATCH_FFN_COMBINE.

    Raises:
        ValueError: an unknown fuse_mode.
        RuntimeError: on all ranks, a bad argument of one of them, with its number; a rank would receive more rows than
            DISPATCH_FFN_COMBINE allows. quant_mode 1 where something requires a gradient.
    """
    return call(
        *(info_of(group), x, topk_idx, topk_weights),
        *(gmm1_weight, gmm1_weight_scale, gmm2_weight, gmm2_weight_scale),
        *(num_max_dispatch_tokens_per_rank, num_experts, quant_mode, fuse_mode),
    )


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
    fuse_mode: FuseMode | int,
) -> tuple[Tensor, Tensor]:
    """The op's overload for `fuse_mode`, with the strategy of `info`. A scale that is None becomes an empty one."""
    fuse_mode = as_fuse_mode(fuse_mode)
    needs_grad = any(one.requires_grad for one in (x, topk_weights, gmm1_weight, gmm2_weight))
    if quant_mode != 0 and needs_grad and torch.is_grad_enabled():
        raise RuntimeError(f"deep_ep.fused_deep_moe: {_no_gradient(quant_mode)}")
    scale_dtype = torch.float32 if fuse_mode is FuseMode.FUSED_DEEP_MOE else torch.int64
    scales = [
        x.new_empty((0, 0), dtype=scale_dtype) if scale is None else scale
        for scale in (gmm1_weight_scale, gmm2_weight_scale)
    ]
    op = getattr(torch.ops.deep_ep.fused_deep_moe, OVERLOADS[fuse_mode])
    combined, counts = op(
        *(*flat(x, topk_idx, topk_weights), gmm1_weight, scales[0], gmm2_weight, scales[1]),
        *(num_max_dispatch_tokens_per_rank, num_experts, info.size, quant_mode, info.name, info.normal.value),
    )
    return like_tokens(combined, topk_idx.shape[:-1]), counts


def _no_gradient(quant_mode: int) -> str:
    return (
        f"an argument requires a gradient, which quant_mode {quant_mode} does not have; use quant_mode 0, or "
        "torch.no_grad()"
    )


def fake(
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    gmm1_weight: Tensor,
    gmm1_weight_scale: Tensor,
    gmm2_weight: Tensor,
    gmm2_weight_scale: Tensor,
    num_max_dispatch_tokens_per_rank: int,
    num_experts: int,
    num_ranks: int,
    quant_mode: int,
    group: str,
    strategy: str,
    *,
    overload: str,
) -> tuple[Tensor, Tensor]:
    weights = gmm1_weight, gmm1_weight_scale, gmm2_weight, gmm2_weight_scale
    sizes = num_max_dispatch_tokens_per_rank, num_experts, num_ranks
    error = checks.fused_deep_moe(x, topk_idx, topk_weights, *weights, *sizes, quant_mode, strategy, overload)
    reject("fused_deep_moe", error)
    counted = num_experts if overload == "default" else num_experts // num_ranks
    return x.new_empty(x.shape), x.new_empty((counted,), dtype=torch.int32)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, topk_idx, topk_weights, gmm1_weight, _, gmm2_weight, _, M, num_experts, num_ranks, quant_mode, *rest = inputs
    if quant_mode != 0:
        raise RuntimeError(f"deep_ep.fused_deep_moe: {_no_gradient(quant_mode)}")
    ctx.save_for_backward(x, topk_idx, topk_weights, gmm1_weight, gmm2_weight)
    ctx.arguments = M, num_experts, num_ranks, *rest


def backward(ctx: Any, grad_combined_x: Tensor, *_: Any, overload: str) -> Any:
    """The transposes of combine, the experts and dispatch."""
    op = getattr(torch.ops.deep_ep.fused_deep_moe_backward, overload)
    grad_x, grad_topk_weights, grad_gmm1, grad_gmm2 = op(
        grad_combined_x.contiguous(), *ctx.saved_tensors, *ctx.arguments
    )
    return grad_x, None, grad_topk_weights, grad_gmm1, None, grad_gmm2, *[None] * 7


def convert(
    x: Any,
    topk_idx: Any,
    topk_weights: Any,
    gmm1_weight: Any,
    gmm1_weight_scale: Any,
    gmm2_weight: Any,
    gmm2_weight_scale: Any,
    num_max_dispatch_tokens_per_rank: int,
    num_experts: int,
    num_ranks: int,
    quant_mode: int,
    group: str,
    strategy: str,
    *,
    overload: str,
) -> Any:
    """DeepEpFusedDeepMoe, or DeepEpFusedDeepMoeDispatchFfnCombine."""
    inputs = {
        "x": x,
        "topk_idx": topk_idx,
        "topk_weights": topk_weights,
        "gmm1_weight": gmm1_weight,
        "gmm1_weight_scale": gmm1_weight_scale,
        "gmm2_weight": gmm2_weight,
        "gmm2_weight_scale": gmm2_weight_scale,
    }
    sizes = num_max_dispatch_tokens_per_rank, num_experts, num_ranks
    return node("fused_deep_moe", inputs, *sizes, {"quant_mode": quant_mode}, group, strategy, overload)


def node(
    op: str,
    inputs: dict[str, Any],
    num_max_dispatch_tokens_per_rank: int,
    num_experts: int,
    num_ranks: int,
    numbers: dict[str, int],
    group: str,
    strategy: str,
    overload: str,
) -> Any:
    """That of a fused op or of its backward."""
    if strategy != "default":
        raise RuntimeError(
            f"deep_ep.{op}: NPU graphs hold it under the strategy default only, got {strategy!r}; call dispatch, the "
            "experts and combine one by one"
        )
    if inputs["x"].meta.device.type == "npu":
        raise RuntimeError(
            f"deep_ep.{op}: the operator has no AscendC kernel yet (ops/{op}/op_kernel), so no NPU can run a graph "
            "that holds it; call dispatch, the experts and combine one by one"
        )
    integers = {
        "num_experts": num_experts,
        "num_ranks": num_ranks,
        "num_max_dispatch_tokens_per_rank": num_max_dispatch_tokens_per_rank,
        **numbers,
    }
    return ge.node(op, inputs, integers, group, "" if overload == "default" else "DispatchFfnCombine")


register(
    "fused_deep_moe",
    fake=fake,
    kernel=fused_kernel.forward,
    setup_context=setup_context,
    backward=backward,
    convert={overload: functools.partial(convert, overload=overload) for overload in OVERLOADS.values()},
)
