"""fused_deep_moe: an MoE layer's experts in one op: dispatch, gmm1, SwiGLU, gmm2 and combine.

T local tokens · H hidden · K top-k · E experts · R ranks · L = E/R local experts · I intermediate size ·
M num_max_dispatch_tokens_per_rank.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from .. import calls, checks
from ..arguments import flat, like_tokens
from ..collective import collective
from ..fused_options import FORMATS, FusedOptions, in_tiles, quant_mode_of
from ..groups import GroupInfo, info_of
from ..kernels import fused_deep_moe as fused_kernel
from ..npu import ge
from ..process_groups import Group
from ..weights import FusedWeights, FuseMode, as_fuse_mode
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
    gmm1_bias: Tensor | None = None,
    gmm2_bias: Tensor | None = None,
    swiglu_limit: float | None = None,
    swiglu_alpha: float | None = None,
    swiglu_beta: float | None = None,
    shared_weights: FusedWeights | None = None,
    x_active_mask: Tensor | None = None,
    group: Group = None,
) -> tuple[Tensor, Tensor]:
    """Each token's sum over k of topk_weights[t, k] * SwiGLU expert topk_idx[t, k]. Collective over the group.

    `deep_ep.fused_weights` makes weights and scales, `FusedWeights`, which stand in the order of these arguments.
    Rows travel as normal mode sends them, with the strategy of normal mode, and only those that arrive are computed.

    An expert's activation is gate * sigmoid(swiglu_alpha * gate) * (up + swiglu_beta), of gate at most swiglu_limit and
    up from -swiglu_limit to swiglu_limit. gpt-oss has the limit 7, alpha 1.702 and beta 1.

    Differentiable in x, topk_weights, gmm1_weight, gmm2_weight, both biases and the shared weights with quant_mode 0;
    nothing but arguments is kept for backward, which sends and computes rows once more.

    Args:
        x: [T, H] bf16, fp16 or fp32; T >= 0 may differ between ranks, and be several dimensions, which topk_idx and
            topk_weights have, too.
        topk_idx: [T, K] of any integer dtype, expert ids 0..E-1, or -1 for none.
        topk_weights: [T, K] fp32, bf16 or fp16, which becomes fp32.
        gmm1_weight: of any strides, in the layout of `fused_weights` for fuse_mode: [L, H, 2I] in x's dtype (quant_mode
            0), int8, float8_e4m3fn or float8_e5m2, or [L, H, I] float4_e2m1fn_x2 with two columns in an element.
        gmm1_weight_scale: of any strides. int8: [L, 2I], fp32 under FUSED_DEEP_MOE and int64 under
            DISPATCH_FFN_COMBINE. fp8 and fp4: float8_e8m0fnu [L, H/64 rounded up, 2I, 2], one for 32 rows of a column.
            None (or empty) with quant_mode 0.
        gmm2_weight: as gmm1_weight: [L, I, H], and [L, H, I] under FUSED_DEEP_MOE unless it is fp8 or fp4; [L, I, H/2]
            for fp4.
        gmm2_weight_scale: as gmm1_weight_scale: [L, H], or [L, I/64 rounded up, H, 2].
        num_max_dispatch_tokens_per_rank: the same on all ranks. FUSED_DEEP_MOE: M, which T must not exceed.
            DISPATCH_FFN_COMBINE: how many rows a rank may compute in all, for a shared expert as well.
        num_experts: E, a multiple of R.
        quant_mode: 0, or 1 for rows in the format of weights that are quantised: int8 with exact sums in int32, or MX
            (`deep_ep.kernels.fused_deep_moe` has the formulas).
        fuse_mode: FuseMode, or its number.
        gmm1_bias, gmm2_bias: [L, 2I], in the order of gmm1_weight's columns, as `deep_ep.fused_bias` gives it, and
            [L, H], of any float dtype and strides.
        swiglu_limit, swiglu_alpha, swiglu_beta: None for no limit (as 0), 1 and 0.
        shared_weights: those of an expert that all tokens of this rank go to with the weight 1, with L = 1 and any I,
            in the format and layout of the others. A rank computes its own tokens with its own shared weights, so that
            their gradients are those of its tokens. All ranks give some, or none does.
        x_active_mask: bool or int8 [T]. Where it is 0, a token is sent to no expert, whatever its ids are, and its
            result is 0.
        group: a group prepared with `deep_ep.init`.

    Returns:
        combined_x [T, H] in x's dtype, summed up in fp32 in the order of k, the shared expert last, and rounded once; 0
        for tokens without experts.
        num_recv_tokens, rows that experts of this rank received, without the shared one: int32 [L·R] by (local expert,
        source rank) under FUSED_DEEP_MOE with float or int8 weights, otherwise int32 [L].

    Raises:
        ValueError: an unknown fuse_mode or quant_mode, a number that is no number.
        RuntimeError: on all ranks, a bad argument of one of them, with its number; a rank would compute more rows than
            DISPATCH_FFN_COMBINE allows. quant_mode 1 where something requires a gradient.
    """
    return call(
        *(info_of(group), x, topk_idx, topk_weights),
        *(gmm1_weight, gmm1_weight_scale, gmm2_weight, gmm2_weight_scale),
        *(num_max_dispatch_tokens_per_rank, num_experts, quant_mode, fuse_mode),
        options_of(gmm1_bias, gmm2_bias, swiglu_limit, swiglu_alpha, swiglu_beta, shared_weights, x_active_mask),
    )


def options_of(
    gmm1_bias: Tensor | None,
    gmm2_bias: Tensor | None,
    swiglu_limit: float | None,
    swiglu_alpha: float | None,
    swiglu_beta: float | None,
    shared_weights: FusedWeights | None,
    x_active_mask: Tensor | None,
) -> FusedOptions:
    """As the op takes them, of what callers give."""
    shared = FusedWeights(None, None, None, None) if shared_weights is None else shared_weights  # type: ignore[arg-type]
    if x_active_mask is not None and x_active_mask.dtype == torch.int8:
        x_active_mask = x_active_mask.to(torch.bool)
    return FusedOptions(
        gmm1_bias if gmm1_bias is None else gmm1_bias.to(torch.float32),
        gmm2_bias if gmm2_bias is None else gmm2_bias.to(torch.float32),
        *shared,
        x_active_mask,
        # Constants in a graph, where a default of the function's would be a symbol with dynamic=True.
        0.0 if swiglu_limit is None else swiglu_limit,
        1.0 if swiglu_alpha is None else swiglu_alpha,
        0.0 if swiglu_beta is None else swiglu_beta,
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
    options: FusedOptions,
) -> tuple[Tensor, Tensor]:
    """The op's overload for `fuse_mode`, with the strategy of `info`. A scale that is None becomes an empty one."""
    fuse_mode = as_fuse_mode(fuse_mode)
    if quant_mode not in (0, 1):
        raise ValueError(
            "deep_ep.fused_deep_moe: quant_mode must be 0 (none) or 1 (rows in the format of the weights: int8, fp8 or "
            f"fp4), got {quant_mode}"
        )
    if quant_mode == 1:
        quant_mode = max(1, quant_mode_of(gmm1_weight))
    leaves = x, topk_weights, gmm1_weight, gmm2_weight, *options.differentiable
    needs_grad = any(leaf is not None and leaf.requires_grad for leaf in leaves)
    if quant_mode != 0 and needs_grad and torch.is_grad_enabled():
        raise RuntimeError(f"deep_ep.fused_deep_moe: {_no_gradient(quant_mode)}")
    if FORMATS[quant_mode].is_mx:
        scale_dtype = torch.float8_e8m0fnu
    else:
        scale_dtype = torch.float32 if fuse_mode is FuseMode.FUSED_DEEP_MOE else torch.int64
    scales = [
        x.new_empty((0, 0), dtype=scale_dtype) if scale is None else scale
        for scale in (gmm1_weight_scale, gmm2_weight_scale)
    ]
    if not torch.compiler.is_compiling():
        limit, alpha, beta = options.swiglu_limit, options.swiglu_alpha, options.swiglu_beta
        shared = "a" if options.has_shared_expert else "no"
        calls.form(f"SwiGLU with the limit {limit}, alpha {alpha} and beta {beta}, {shared} shared expert")
    op = getattr(torch.ops.deep_ep.fused_deep_moe, OVERLOADS[fuse_mode])
    combined, counts = op(
        *(*flat(x, topk_idx, topk_weights), gmm1_weight, scales[0], gmm2_weight, scales[1]),
        *(num_max_dispatch_tokens_per_rank, num_experts, info.size, quant_mode, info.name, info.normal.value),
        *options,
    )
    return like_tokens(combined, topk_idx.shape[:-1]), counts


def _no_gradient(quant_mode: int) -> str:
    return (
        f"an argument requires a gradient, which quant_mode {min(quant_mode, 1)} does not have; use quant_mode 0, or "
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
    *options: Any,
    overload: str,
) -> tuple[Tensor, Tensor]:
    weights = gmm1_weight, gmm1_weight_scale, gmm2_weight, gmm2_weight_scale
    sizes = num_max_dispatch_tokens_per_rank, num_experts, num_ranks
    error = checks.fused_deep_moe(
        *(x, topk_idx, topk_weights, *weights, *sizes, quant_mode, strategy, overload, FusedOptions(*options))
    )
    reject("fused_deep_moe", error)
    counted = num_experts if in_tiles(overload, FORMATS[quant_mode]) else num_experts // num_ranks
    return x.new_empty(x.shape), x.new_empty((counted,), dtype=torch.int32)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, topk_idx, topk_weights, gmm1_weight, _, gmm2_weight, _, M, num_experts, num_ranks, quant_mode, *rest = inputs
    if quant_mode != 0:
        raise RuntimeError(f"deep_ep.fused_deep_moe: {_no_gradient(quant_mode)}")
    group, strategy, *options = rest
    tensors, ctx.numbers = options[:-3], options[-3:]
    ctx.save_for_backward(x, topk_idx, topk_weights, gmm1_weight, gmm2_weight, *tensors)
    ctx.arguments = M, num_experts, num_ranks, group, strategy


def backward(ctx: Any, grad_combined_x: Tensor, *_: Any, overload: str) -> Any:
    """The transposes of combine, the experts and dispatch."""
    *saved, b1, b2, shared1, shared1_scale, shared2, shared2_scale, mask = ctx.saved_tensors
    options = FusedOptions(b1, b2, shared1, shared1_scale, shared2, shared2_scale, mask, *ctx.numbers)
    ops, arguments = torch.ops.deep_ep, (grad_combined_x.contiguous(), *saved, *ctx.arguments)
    if options.given():
        grads = getattr(ops.fused_deep_moe_options_backward, overload)(*arguments, *options)
    else:
        grads = getattr(ops.fused_deep_moe_backward, overload)(*arguments)
    grad_x, grad_topk_weights, grad_gmm1, grad_gmm2, *others = grads
    left = iter(others)
    b1, b2, shared1, shared2 = (None if one is None else next(left) for one in options.differentiable)
    by_option = b1, b2, shared1, None, shared2, *[None] * 5
    return grad_x, None, grad_topk_weights, grad_gmm1, None, grad_gmm2, *[None] * 7, *by_option


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
    *options: Any,
    overload: str,
) -> Any:
    """DeepEpFusedDeepMoe, or DeepEpFusedDeepMoeDispatchFfnCombine."""
    refuse_in_graphs("fused_deep_moe", quant_mode, FusedOptions(*options))
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


def refuse_in_graphs(op: str, quant_mode: int, options: FusedOptions) -> None:
    """RuntimeError for what the operators of ops/fused_deep_moe do not have."""
    form = FORMATS[quant_mode]
    missing = [f"weights of {form.dtype}"] * form.is_mx + options.given()
    if missing:
        raise RuntimeError(
            f"deep_ep.{op}: NPU graphs cannot hold {', '.join(missing)}: the operator of ops/{op}/op_host has none of "
            "it yet; call dispatch, the experts and combine one by one"
        )


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
