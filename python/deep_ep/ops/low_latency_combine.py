"""low_latency_combine: brings the rows of a low_latency_dispatch back to their tokens and sums them up.

low_latency_combine_start begins a call and does not wait for peers; low_latency_combine with its ticket completes it.

T local tokens · H hidden · K top-k · E experts · R ranks · L = E/R local experts ·
M num_max_dispatch_tokens_per_rank · N = R·M·min(K, L) rows.
"""

from typing import Any

import torch
from torch import Tensor

from .. import alltoall, checks, npu_ops
from ..groups import Group, GroupInfo, info_of
from ..npu import alltoall as graph_alltoall
from ..npu import ge
from ._registration import register, reject
from .low_latency_dispatch import LowLatencyHandle


def low_latency_combine(
    x: Tensor, topk_idx: Tensor, topk_weights: Tensor, handle: LowLatencyHandle, *, group: Group = None
) -> Tensor:
    """Sums up each token's rows with its weights. Collective over the group; differentiable in x and topk_weights.

    Args:
        x: [N, H] bf16, fp16 or fp32, contiguous: the experts' results, in the row order of low_latency_dispatch.
        topk_idx: int64 [T, K], as given to low_latency_dispatch.
        topk_weights: fp32 [T, K].
        handle: of the low_latency_dispatch that brought the rows.
        group: the group of that dispatch.

    Returns:
        [T, H] in x's dtype: sum over k of topk_weights[t, k] * row, in fp32, in the order of k, rounded once. Tokens
        without rows are 0.

    Raises:
        RuntimeError: as `deep_ep.combine`.
    """
    return call(info_of(group), x, topk_idx, topk_weights, handle)


def call(
    info: GroupInfo,
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    handle: LowLatencyHandle,
    started: Tensor | None = None,
) -> Tensor:
    """The op's overload for `info`. `started`: what `start` gave for the same arguments."""
    op = getattr(torch.ops.deep_ep.low_latency_combine, info.low_latency.value)
    return op(*_arguments(info, x, topk_idx, topk_weights, handle), started)


def start(info: GroupInfo, x: Tensor, topk_idx: Tensor, topk_weights: Tensor, handle: LowLatencyHandle) -> Tensor:
    """Begins a call: int64 [1], for `call`. The tensors may be written to as soon as this returns."""
    op = getattr(torch.ops.deep_ep.low_latency_combine_start, info.low_latency.value)
    return op(*_arguments(info, x, topk_idx, topk_weights, handle))


def _arguments(
    info: GroupInfo, x: Tensor, topk_idx: Tensor, topk_weights: Tensor, handle: LowLatencyHandle
) -> tuple[Any, ...]:
    rows = handle.src_info, handle.layout_range, handle.send_head
    return x, topk_idx, topk_weights, *rows, handle.num_experts, info.size, info.name, info.comm_alg


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
    started: Tensor | None,
    *,
    overload: str,
) -> Tensor:
    arguments = x, topk_idx, topk_weights, recv_src_idx, layout_range, send_head, num_experts, num_ranks
    reject("low_latency_combine", _error(overload, comm_alg, *arguments) or checks.ticket(started))
    return x.new_empty((topk_idx.shape[0], x.shape[1]))


def _error(overload: str, comm_alg: str, *arguments: Any) -> str | None:
    if overload == "ops":  # whose record of where rows came from is torch_npu's own
        return npu_ops.check_comm_alg(comm_alg) or npu_ops.check_x(arguments[0])
    return npu_ops.check_comm_alg(comm_alg) or checks.low_latency_combine(*arguments)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, topk_idx, topk_weights, recv_src_idx, _, send_head, num_experts, num_ranks, group, *_ = inputs
    ctx.save_for_backward(x, topk_idx, topk_weights, recv_src_idx, send_head)
    ctx.arguments = num_experts, num_ranks, group


def backward(ctx: Any, grad_out: Tensor, *, overload: str) -> Any:
    """The transpose of the weighted sum: each row gets its token's gradient times its weight."""
    if overload == "ops":
        raise RuntimeError("deep_ep.low_latency_combine.ops has no gradient; use the strategy default or alltoall")
    op = getattr(torch.ops.deep_ep.combine_backward, overload)
    grad_x, grad_topk_weights = op(grad_out.contiguous(), *ctx.saved_tensors, *ctx.arguments)
    return grad_x, None, grad_topk_weights, *[None] * 8


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
    started: Any,
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


def fake_start(
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
    reject("low_latency_combine_start", _error(overload, comm_alg, *arguments))
    return x.new_empty((1,), dtype=torch.int64, device="cpu")


register(
    "low_latency_combine",
    fake=fake,
    alltoall=alltoall.low_latency_combine,
    ops=npu_ops.low_latency_combine,
    setup_context=setup_context,
    backward=backward,
    convert={"default": convert, "ops": npu_ops.convert_combine},
    decompose=graph_alltoall.low_latency_combine,
)

register(
    "low_latency_combine_start",
    fake=fake_start,
    alltoall=alltoall.low_latency_combine_start,
    ops=npu_ops.low_latency_start,
    convert=dict.fromkeys(("default", "ops"), ge.ticket),
    decompose=graph_alltoall.low_latency_start,
)
