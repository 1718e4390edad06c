"""combine: brings the experts' rows back to their tokens and sums them up. combine_start begins it, wait completes it.

T local tokens · H hidden · K top-k · E experts · R ranks · N received rows.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..arguments import flat, like_tokens
from ..collective import collective
from ..groups import GroupInfo, info_of
from ..kernels import alltoall
from ..npu import ge, graph_alltoall
from ..process_groups import Group
from ._registration import Start, refuse, register, reject
from .dispatch import DispatchHandle
from .wait import Completion, Started, as_issued, completes, issued, no_rows


@collective("combine")
def combine(x: Tensor, handle: DispatchHandle, *, group: Group = None) -> Tensor:
    """Sums up each token's rows with its weights. Collective over the group; differentiable in x and in the weights.

    Args:
        x: [N, H] bf16, fp16 or fp32: the experts' results, in the row order of dispatch's recv_x.
        handle: of the dispatch that brought the rows; its topk_weights are the weights.
        group: the group of that dispatch.

    Returns:
        [T, H] in x's dtype: sum over k of topk_weights[t, k] * row, in fp32, in the order of k, rounded once. Tokens
        without rows are 0. T is the dimensions that dispatch's x had.

    Raises:
        RuntimeError: as `deep_ep.dispatch`; also if the ranks' handles are not of one dispatch.
    """
    return call(info_of(group), x, handle)


@collective("combine")
def combine_start(x: Tensor, handle: DispatchHandle, *, group: Group = None) -> Started:
    """Begins a combine and does not wait for peers; `deep_ep.wait` completes it and gives its result.

    The arguments are those of `deep_ep.combine`; for the rest see `deep_ep.dispatch_start`.
    """
    arguments = info_of(group), x, handle
    refuse(call, wrong, *arguments)
    return start(*arguments)


def call(info: GroupInfo, x: Tensor, handle: DispatchHandle) -> Tensor:
    """The op's overload for `info`."""
    op = getattr(torch.ops.deep_ep.combine, info.normal.value)
    combined = op(*_tensors(x, handle), _num_experts(info, handle), info.size, info.name)
    return like_tokens(combined, handle.topk_idx.shape[:-1])


def start(info: GroupInfo, x: Tensor, handle: DispatchHandle) -> Started:
    """As `call`, for `complete`."""
    op = getattr(torch.ops.deep_ep.combine_start, info.normal.value)
    tensors, num_experts = _tensors(as_issued(x), handle), _num_experts(info, handle)
    ticket = op(*tensors, num_experts, info.size, info.name)
    return issued(ticket, info, info.normal.value, "combine", tensors, num_experts, 0, handle.topk_idx.shape[:-1])


def complete(started: Started) -> Tensor:
    return like_tokens(started.results()[0], started.tokens)


def arriving(started: Started) -> Tensor:
    """The same, which is there once started.join() has returned."""
    return like_tokens(started.arriving()[0], started.tokens)


def wrong(info: GroupInfo, x: Tensor, handle: DispatchHandle) -> str | None:
    """What is wrong with the arguments of `call`, as far as that needs no values."""
    return checks.combine(*_tensors(x, handle), _num_experts(info, handle), info.size)


def nothing_yet(info: GroupInfo, x: Tensor, handle: DispatchHandle) -> Tensor:
    """What `call` gives, without a value in it."""
    return like_tokens(no_rows(x, handle.send_head.shape[0]), handle.topk_idx.shape[:-1])


def _tensors(x: Tensor, handle: DispatchHandle) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    topk_idx, topk_weights = flat(handle.topk_idx, handle.topk_weights)
    return x, topk_idx, topk_weights, handle.recv_src_idx, handle.send_head


def _num_experts(info: GroupInfo, handle: DispatchHandle) -> int:
    return info.size * handle.channel_prefix_matrix.shape[1]


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


def _transpose(op: Any, saved: Sequence[Tensor], grad_out: Tensor, arguments: tuple[Any, ...]) -> Any:
    """The transpose of the weighted sum: each row gets its token's gradient times its weight."""
    return op(grad_out.contiguous(), *saved, *arguments)


def backward(ctx: Any, grad_out: Tensor, *, overload: str) -> Any:
    op = getattr(torch.ops.deep_ep.combine_backward, overload)
    grad_x, grad_topk_weights = _transpose(op, ctx.saved_tensors, grad_out, ctx.arguments)
    return grad_x, None, grad_topk_weights, None, None, None, None, None


def backward_wait(overload: str, saved: Sequence[Tensor], grads: Sequence[Tensor], arguments: tuple[Any, ...]) -> Any:
    return _transpose(getattr(torch.ops.deep_ep.combine_backward_start, overload), saved, grads[0], arguments)


def backward_start(ctx: Any, ticket: Tensor, *, overload: str) -> Any:
    # All are saved, though two suffice, so that one that was written to after the start is noticed.
    x, _, topk_weights, _, _ = ctx.saved_tensors
    num_experts, num_ranks, group = ctx.arguments
    op = getattr(torch.ops.deep_ep.wait, overload)
    grads = op(ticket, "combine_backward", [x, topk_weights], num_experts, num_ranks, 0, group)
    return grads[0], None, grads[1], None, None, None, None, None


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
    start=Start(checks.combine, backward_start, setup_context),
)

completes(
    "combine",
    Completion(
        fake=lambda _, x, topk_idx, *rest: (x.new_empty((topk_idx.shape[0], x.shape[1])),),
        complete=complete,
        saved=lambda arguments, results: tuple(arguments),
        backward=backward_wait,
    ),
)
