"""dispatch_int8: dispatch with rows that the kernel quantises, to int8 with one scale per row.

T local tokens · H hidden · K top-k · E experts · R ranks · L = E/R local experts · N received rows ·
W num_worst_tokens.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from .. import checks, quantization
from ..ep_strategy import NormalStrategy
from ..groups import GroupInfo
from . import dispatch
from ._registration import register, reject


def is_for(info: GroupInfo, x: Tensor) -> bool:
    """Whether rows like x are better quantised in the kernel than around it."""
    return x.device.type == "npu" and info.normal is NormalStrategy.DEFAULT


def fake(
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    num_experts: int,
    num_ranks: int,
    num_worst_tokens: int,
    group: str,
) -> tuple[Tensor, ...]:
    sizes = num_experts, num_ranks, num_worst_tokens
    reject("dispatch_int8", checks.dispatch(x, topk_idx, topk_weights, *sizes))
    recv_x, *others = dispatch.results(x, topk_idx, *sizes)
    return (
        recv_x.new_empty(recv_x.shape, dtype=torch.int8),
        recv_x.new_empty(recv_x.shape[:1], dtype=torch.float32),
        *others,
    )


def _around(overload: str) -> Any:
    """The kernel out of dispatch's."""
    op = getattr(torch.ops.deep_ep.dispatch, overload)
    return quantization.around(op, lambda *arguments: checks.dispatch(*arguments[:-1]))


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, topk_idx, _, num_experts, num_ranks, _, group = inputs
    if x.requires_grad:
        raise RuntimeError("deep_ep.dispatch_int8: x requires a gradient, which rows of int8 do not have")
    recv_scales, recv_src_idx, send_head = output[1], *output[9:]
    ctx.mark_non_differentiable(recv_scales)
    ctx.save_for_backward(recv_src_idx, topk_idx, send_head)
    ctx.arguments = num_experts, num_ranks, group


def backward(ctx: Any, *grads: Tensor, overload: str) -> Any:
    """That of topk_weights, which dispatch_backward brings back with rows of the least size that an NPU moves."""
    op = getattr(torch.ops.deep_ep.dispatch_backward, overload)
    grad_weights = grads[3].contiguous()
    no_rows = grad_weights.new_zeros((grad_weights.shape[0], 8))
    _, grad_topk_weights = op(no_rows, grad_weights, *ctx.saved_tensors, *ctx.arguments)
    return None, None, grad_topk_weights, None, None, None, None


register(
    "dispatch_int8",
    fake=fake,
    cpu=_around("default"),
    alltoall=_around("alltoall"),
    setup_context=setup_context,
    backward=backward,
    convert={"default": functools.partial(dispatch.convert, op="dispatch_int8")},
)
