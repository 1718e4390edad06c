"""combine: brings the experts' rows back to their tokens and sums them up.

T local tokens · H hidden · K top-k · E experts · R ranks · N received rows.
"""

from typing import Any

import torch
from torch import Tensor

from .. import alltoall, checks
from ..groups import Group, GroupInfo, info_of
from ..npu import alltoall as graph_alltoall
from ..npu import ge
from ._registration import register, reject
from .dispatch import DispatchHandle


def combine(x: Tensor, handle: DispatchHandle, *, group: Group = None) -> Tensor:
    """Sums up each token's rows with its weights. Collective over the group; differentiable in x and in the weights.

    Args:
        x: [N, H] bf16, fp16 or fp32, contiguous: the experts' results, in the row order of dispatch's recv_x.
        handle: of the dispatch that brought the rows; its topk_weights are the weights.
        group: the group of that dispatch.

    Returns:
        [T, H] in x's dtype: sum over k of topk_weights[t, k] * row, in fp32, in the order of k, rounded once. Tokens
        without rows are 0.

    Raises:
        RuntimeError: as `deep_ep.dispatch`; also if the ranks' handles are not of one dispatch.
    """
    return call(info_of(group), x, handle)


def call(info: GroupInfo, x: Tensor, handle: DispatchHandle) -> Tensor:
    """The op's overload for `info`."""
    num_experts = info.size * handle.channel_prefix_matrix.shape[1]
    op = getattr(torch.ops.deep_ep.combine, info.normal.value)
    return op(
        x,
        handle.topk_idx,
        handle.topk_weights,
        handle.recv_src_idx,
        handle.send_head,
        num_experts,
        info.size,
        info.name,
    )


def fake(
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    recv_src_idx: Tensor,
    send_head: Tensor,
    num_experts: int,
    num_ranks: int,
    group: str,
) -> Tensor:
    error = checks.combine(x, topk_idx, topk_weights, recv_src_idx, send_head, num_experts, num_ranks)
    reject("combine", error)
    return x.new_empty((topk_idx.shape[0], x.shape[1]))


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.arguments = inputs[5:]


def backward(ctx: Any, grad_out: Tensor, *, overload: str) -> Any:
    """The transpose of the weighted sum: each row gets its token's gradient times its weight."""
    op = getattr(torch.ops.deep_ep.combine_backward, overload)
    grad_x, grad_topk_weights = op(grad_out.contiguous(), *ctx.saved_tensors, *ctx.arguments)
    return grad_x, None, grad_topk_weights, None, None, None, None, None


def convert(
    x: Any,
    topk_idx: Any,
    topk_weights: Any,
    recv_src_idx: Any,
    send_head: Any,
    num_experts: int,
    num_ranks: int,
    group: str,
) -> Any:
    """DeepEpCombine."""
    inputs = {
        "x": x,
        "topk_idx": topk_idx,
        "topk_weights": topk_weights,
        "recv_src_idx": recv_src_idx,
        "send_head": send_head,
    }
    return ge.node("combine", inputs, {"num_experts": num_experts, "num_ranks": num_ranks}, group)


register(
    "combine",
    fake=fake,
    alltoall=alltoall.combine,
    setup_context=setup_context,
    backward=backward,
    convert={"default": convert},
    decompose=graph_alltoall.combine,
)
