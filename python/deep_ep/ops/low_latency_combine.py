"""low_latency_combine: brings the rows of a low_latency_dispatch back to their tokens and sums them up.

low_latency_combine_start begins it, wait completes it.

T local tokens · H hidden · K top-k · E experts · R ranks · L = E/R local experts ·
M num_max_dispatch_tokens_per_rank · N = R·M·min(K, L) rows.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..arguments import flat, like_tokens
from ..collective import collective
from ..groups import GroupInfo, info_of
from ..kernels import alltoall, torch_npu_ops
from ..npu import ge, graph_alltoall
from ..process_groups import Group
from ._registration import Start, register, reject
from .low_latency_dispatch import LowLatencyHandle, active
from .wait import Completion, Started, as_issued, completes, issued, no_rows


@collective("low_latency_combine")
def low_latency_combine(
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    handle: LowLatencyHandle,
    *,
    x_active_mask: Tensor | None = None,
    group: Group = None,
) -> Tensor:
    """Sums up each token's rows with its weights. Collective over the group; differentiable in x and topk_weights.

    Args:
        x: [N, H] bf16, fp16 or fp32: the experts' results, in the row order of low_latency_dispatch.
        topk_idx: [T, K], as given to low_latency_dispatch; others are an error.
        topk_weights: [T, K] fp32, bf16 or fp16, which becomes fp32.
        handle: of the low_latency_dispatch that brought the rows.
        x_active_mask: as given to low_latency_dispatch.
        group: the group of that dispatch.

    Returns:
        [T, H] in x's dtype: sum over k of topk_weights[t, k] * row, in fp32, in the order of k, rounded once. Tokens
        without rows are 0. T is the dimensions of topk_idx.

    Raises:
        RuntimeError: as `deep_ep.combine`.
        ValueError: x_active_mask has another shape or dtype.
    """
    topk_idx = active(topk_idx, x_active_mask)
    return call(info_of(group), x, topk_idx, topk_weights, handle)


def call(info: GroupInfo, x: Tensor, topk_idx: Tensor, topk_weights: Tensor, handle: LowLatencyHandle) -> Tensor:
    """The op's overload for `info`."""
    op = getattr(torch.ops.deep_ep.low_latency_combine, info.low_latency.value)
    tensors = x, *flat(topk_idx, topk_weights), handle.src_info, handle.layout_range, handle.send_head
    combined = op(*tensors, handle.num_experts, info.size, info.name, info.comm_alg)
    return like_tokens(combined, topk_idx.shape[:-1])


def start(info: GroupInfo, x: Tensor, topk_idx: Tensor, topk_weights: Tensor, handle: LowLatencyHandle) -> Started:
    """As `call`, for `complete`. The tensors must not be written to before."""
    overload = info.low_latency.value
    op = getattr(torch.ops.deep_ep.low_latency_combine_start, overload)
    sent = map(as_issued, (x, *flat(topk_idx, topk_weights)))
    tensors = *sent, handle.src_info, handle.layout_range, handle.send_head
    ticket = op(*tensors, handle.num_experts, info.size, info.name, info.comm_alg)
    return issued(ticket, info, overload, "low_latency_combine", tensors, handle.num_experts, 0, topk_idx.shape[:-1])


def complete(started: Started) -> Tensor:
    return like_tokens(started.results()[0], started.tokens)


def arriving(started: Started) -> Tensor:
    """The same, which is there once started.join() has returned."""
    return like_tokens(started.arriving()[0], started.tokens)


def wrong(info: GroupInfo, *tensors: Any) -> str | None:
    """What is wrong with the arguments of `call`, as far as that needs no values."""
    x, *routing, handle = tensors
    rows = handle.src_info, handle.layout_range, handle.send_head
    sizes = handle.num_experts, info.size, info.comm_alg
    return _error(x, *flat(*routing), *rows, *sizes, overload=info.low_latency.value)


def nothing_yet(info: GroupInfo, x: Tensor, topk_idx: Tensor, *_: Any) -> Tensor:
    """What `call` gives, without a value in it."""
    return like_tokens(no_rows(x, flat(topk_idx)[0].shape[0]), topk_idx.shape[:-1])


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
    comm_alg: str,
    *,
    overload: str,
) -> Tensor:
    arguments = x, topk_idx, topk_weights, recv_src_idx, layout_range, send_head, num_experts, num_ranks
    reject("low_latency_combine", _error(*arguments, comm_alg, overload=overload))
    return _result(x, topk_idx)


def _error(*arguments: Any, overload: str) -> str | None:
    *arguments, comm_alg = arguments  # type: ignore[assignment]
    if overload == "ops":  # whose record of where rows came from is torch_npu's own
        return torch_npu_ops.check_comm_alg(comm_alg) or torch_npu_ops.check_x(arguments[0])
    return torch_npu_ops.check_comm_alg(comm_alg) or checks.low_latency_combine(*arguments)


def _result(x: Tensor, topk_idx: Tensor) -> Tensor:
    return x.new_empty((topk_idx.shape[0], x.shape[1]))


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*_saved(inputs))
    ctx.arguments = inputs[6:9]


def _saved(arguments: Sequence[Any], results: Any = None) -> tuple[Tensor, ...]:
    x, topk_idx, topk_weights, recv_src_idx, _, send_head, *_ = arguments
    return x, topk_idx, topk_weights, recv_src_idx, send_head


def _transpose(op: Any, overload: str, saved: Sequence[Tensor], grad_out: Tensor, arguments: tuple[Any, ...]) -> Any:
    """The transpose of the weighted sum: each row gets its token's gradient times its weight."""
    if overload == "ops":
        raise RuntimeError("deep_ep.low_latency_combine.ops has no gradient; use the strategy default or alltoall")
    return getattr(op, overload)(grad_out.contiguous(), *saved, *arguments)


def backward(ctx: Any, grad_out: Tensor, *, overload: str) -> Any:
    op = torch.ops.deep_ep.combine_backward
    grad_x, grad_topk_weights = _transpose(op, overload, ctx.saved_tensors, grad_out, ctx.arguments)
    return grad_x, None, grad_topk_weights, *[None] * 7


def backward_wait(overload: str, saved: Sequence[Tensor], grads: Sequence[Tensor], arguments: tuple[Any, ...]) -> Any:
    return _transpose(torch.ops.deep_ep.combine_backward_start, overload, saved, grads[0], arguments)


def backward_start(ctx: Any, ticket: Tensor, *, overload: str) -> Any:
    # As in combine.py.
    x, _, topk_weights, _, _ = ctx.saved_tensors
    num_experts, num_ranks, group = ctx.arguments
    op = getattr(torch.ops.deep_ep.wait, overload)
    grads = op(ticket, "combine_backward", [x, topk_weights], num_experts, num_ranks, 0, group)
    return grads[0], None, grads[1], *[None] * 7


def convert(
    x: Any,
    topk_idx: Any,
    topk_weights: Any,
    recv_src_idx: Any,
    layout_range: Any,
    send_head: Any,
    num_experts: int,
    num_ranks: int,
    group: str,
    comm_alg: str,
) -> Any:
    """DeepEpLowLatencyCombine."""
    inputs = {
        "x": x,
        "topk_idx": topk_idx,
        "topk_weights": topk_weights,
        "recv_src_idx": recv_src_idx,
        "layout_range": layout_range,
        "send_head": send_head,
    }
    return ge.node("low_latency_combine", inputs, {"num_experts": num_experts, "num_ranks": num_ranks}, group)


register(
    "low_latency_combine",
    fake=fake,
    alltoall=alltoall.low_latency_combine,
    ops=torch_npu_ops.low_latency_combine,
    setup_context=setup_context,
    backward=backward,
    convert={"default": convert, "ops": torch_npu_ops.convert_combine},
    decompose=graph_alltoall.low_latency_combine,
    start=Start(_error, backward_start, setup_context),
)

completes(
    "low_latency_combine",
    Completion(
        fake=lambda _, x, topk_idx, *rest: (_result(x, topk_idx),),
        complete=complete,
        saved=_saved,
        backward=backward_wait,
    ),
)
