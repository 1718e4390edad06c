"""low_latency_combine_padded: low_latency_combine of rows in the places of low_latency_dispatch_padded.

low_latency_combine_padded_start begins it, wait completes it.

T local tokens · H hidden · K top-k · E experts · R ranks · L = E/R local experts ·
M num_max_dispatch_tokens_per_rank · N = R·M·min(K, L) packed rows.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..arguments import flat, like_tokens
from ..groups import GroupInfo
from ..kernels import alltoall
from . import low_latency_combine as packed_op
from ._registration import Start, past_autograd, register, reject
from .low_latency_dispatch import LowLatencyHandle
from .low_latency_dispatch_padded import as_sent, pack, pad_gradient, used
from .wait import Completion, Started, as_issued, completes, issued, says_itself


def call(info: GroupInfo, x: Tensor, topk_idx: Tensor, topk_weights: Tensor, handle: LowLatencyHandle) -> Tensor:
    """The op's overload for `info`: low_latency_combine of x [L, R·M, H], whose other rows are not looked at."""
    op = getattr(torch.ops.deep_ep.low_latency_combine_padded, info.low_latency.value)
    combined = op(*_tensors(x, topk_idx, topk_weights, handle), handle.num_experts, info.size, info.name)
    return like_tokens(combined, topk_idx.shape[:-1])


def start(info: GroupInfo, x: Tensor, topk_idx: Tensor, topk_weights: Tensor, handle: LowLatencyHandle) -> Started:
    """As `call`, for `complete`. The tensors must not be written to before."""
    overload = info.low_latency.value
    op = getattr(torch.ops.deep_ep.low_latency_combine_padded_start, overload)
    x = as_sent(x, handle.layout_range, handle.src_info, info.size)
    tensors = _tensors(x, as_issued(topk_idx), as_issued(topk_weights), handle)
    with past_autograd():
        ticket = op(*tensors, handle.num_experts, info.size, info.name)
    tokens = topk_idx.shape[:-1]
    return issued(ticket, info, overload, "low_latency_combine_padded", tensors, handle.num_experts, 0, tokens)


def _tensors(
    x: Tensor, topk_idx: Tensor, topk_weights: Tensor, handle: LowLatencyHandle
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    topk_idx, topk_weights = flat(topk_idx, topk_weights)
    return x, topk_idx, topk_weights, handle.src_info, handle.layout_range, handle.send_head


complete, arriving = packed_op.complete, packed_op.arriving


def wrong(info: GroupInfo, x: Tensor, topk_idx: Tensor, topk_weights: Tensor, handle: LowLatencyHandle) -> str | None:
    """What is wrong with the arguments of `call`, as far as that needs no values, unless `arriving` says it."""
    if says_itself(info, x):
        return None
    tensors = _tensors(x, topk_idx, topk_weights, handle)
    return checks.low_latency_combine_padded(*tensors, handle.num_experts, info.size)


def nothing_yet(info: GroupInfo, x: Tensor, *others: Any) -> Tensor:
    """What `call` gives, without a value in it."""
    return packed_op.nothing_yet(info, x.flatten(0, 1), *others)


def fake(
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    recv_src_idx: Tensor,
    layout_range: Tensor,
    send_head: Tensor,
    num_experts: int,
    num_ranks: int,
    group: str,
) -> Tensor:
    arguments = x, topk_idx, topk_weights, recv_src_idx, layout_range, send_head, num_experts, num_ranks
    reject("low_latency_combine", checks.low_latency_combine_padded(*arguments))
    return _result(x, topk_idx)


def _result(x: Tensor, topk_idx: Tensor) -> Tensor:
    return x.new_empty((topk_idx.shape[0], x.shape[2]))


def _around(overload: str) -> Any:
    """The op out of low_latency_combine, where there is no kernel for it."""

    def composed(x: Tensor, *arguments: Any) -> Tensor:
        _, _, recv_src_idx, layout_range, _, _, num_ranks, _ = arguments
        op = getattr(torch.ops.deep_ep.low_latency_combine, overload)
        return op(pack(x, layout_range, recv_src_idx, num_ranks), *arguments, "")

    return composed


# Autograd


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*_saved(inputs))
    ctx.arguments = inputs[6:9]


def _saved(arguments: Sequence[Any], results: Any = None) -> tuple[Tensor, ...]:
    return tuple(arguments[:6])


def _packed(saved: Sequence[Tensor], num_ranks: int) -> tuple[Tensor, ...]:
    """What low_latency_combine saves."""
    x, topk_idx, topk_weights, recv_src_idx, layout_range, send_head = saved
    sources = used(recv_src_idx, layout_range)
    return pack(x, layout_range, sources, num_ranks), topk_idx, topk_weights, sources, send_head


def _padded(saved: Sequence[Tensor], grad_rows: Tensor, num_ranks: int) -> Tensor:
    x, _, _, recv_src_idx, layout_range, _ = saved
    return pad_gradient(grad_rows, layout_range, recv_src_idx, num_ranks, x.shape)


def backward(ctx: Any, grad_out: Tensor, *, overload: str) -> Any:
    R, saved = ctx.arguments[1], ctx.saved_tensors
    op = torch.ops.deep_ep.combine_backward
    grad_rows, grad_topk_weights = packed_op._transpose(op, overload, _packed(saved, R), grad_out, ctx.arguments)
    return _padded(saved, grad_rows, R), None, grad_topk_weights, *[None] * 6


def backward_wait(overload: str, saved: Sequence[Tensor], grads: Sequence[Tensor], arguments: tuple[Any, ...]) -> Any:
    return packed_op.backward_wait(overload, _packed(saved, arguments[1]), grads, arguments)


def backward_start(ctx: Any, ticket: Tensor, *, overload: str) -> Any:
    x, _, topk_weights, recv_src_idx, layout_range, _ = saved = ctx.saved_tensors
    num_experts, num_ranks, group = ctx.arguments
    op = getattr(torch.ops.deep_ep.wait, overload)
    like = [x.new_empty((used(recv_src_idx, layout_range).shape[0], x.shape[2])), topk_weights]
    grad_rows, grad_topk_weights = op(ticket, "combine_backward", like, num_experts, num_ranks, 0, group)
    return _padded(saved, grad_rows, num_ranks), None, grad_topk_weights, *[None] * 6


register(
    "low_latency_combine_padded",
    fake=fake,
    alltoall=alltoall.low_latency_combine_padded,
    npu=_around("default"),
    setup_context=setup_context,
    backward=backward,
    convert={},
    decompose={"default": _around("default"), "alltoall": _around("alltoall")},
    start=Start(checks.low_latency_combine_padded, backward_start, setup_context),
)

completes(
    "low_latency_combine_padded",
    Completion(
        fake=lambda _, x, topk_idx, *rest: (_result(x, topk_idx),),
        complete=complete,
        saved=_saved,
        backward=backward_wait,
    ),
)
