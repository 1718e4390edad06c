"""low_latency_dispatch: sends a few tokens per rank to the ranks of their experts, with static shapes, for decoding.

low_latency_dispatch_start begins a call and does not wait for peers; low_latency_dispatch with its ticket completes it.

T local tokens · H hidden · K top-k · E experts · R ranks · L = E/R local experts ·
M num_max_dispatch_tokens_per_rank · N = R·M·min(K, L) rows.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import alltoall, checks, npu_ops
from ..groups import Group, GroupInfo, info_of
from ..npu import alltoall as graph_alltoall
from ..npu import ge
from ._registration import register, reject


class LowLatencyHandle(NamedTuple):
    """What low_latency_combine needs to send rows back. The first six are DeepEP-Ascend's."""

    src_info: Tensor
    """int32 [N, 3]: source rank, token and k of every row, -1 in rows that hold nothing."""
    layout_range: Tensor
    """int32 [L·R]: running count over (local expert, source rank) of the received rows."""
    num_max_dispatch_tokens_per_rank: int
    hidden: int
    num_experts: int
    recv_count: Tensor
    """int64 [L]: rows of each local expert."""
    send_head: Tensor
    """int32 [T, K]: the row at the expert's rank, -1 if there is none."""


class LowLatencyOutput(NamedTuple):
    """What low_latency_dispatch returns."""

    recv_x: Tensor
    """[N, H] in x's dtype: rows ordered by local expert, source rank, token, k, without gaps; then rows of 0."""
    recv_count: Tensor
    """int64 [L]: rows of each local expert."""
    handle: LowLatencyHandle


def low_latency_dispatch(
    x: Tensor,
    topk_idx: Tensor,
    num_max_dispatch_tokens_per_rank: int,
    num_experts: int,
    *,
    group: Group = None,
) -> LowLatencyOutput:
    """Sends every token once to each of its experts. Collective over the group; differentiable in x.

    Args:
        x: [T, H] bf16, fp16 or fp32, contiguous, 0 <= T <= M.
        topk_idx: int64 [T, K], expert ids 0..E-1, or -1 for none. A token may have at most min(K, L) ids of one rank:
            distinct ids always do.
        num_max_dispatch_tokens_per_rank: M, the same on all ranks.
        num_experts: E, a multiple of R.
        group: a group prepared with `deep_ep.init`.

    Raises:
        RuntimeError: as `deep_ep.dispatch`; under the strategy ops, if torch_npu or an NPU is missing.
    """
    return call(info_of(group), x, topk_idx, num_max_dispatch_tokens_per_rank, num_experts)


def call(
    info: GroupInfo,
    x: Tensor,
    topk_idx: Tensor,
    num_max_dispatch_tokens_per_rank: int,
    num_experts: int,
    started: Tensor | None = None,
) -> LowLatencyOutput:
    """The op's overload for `info`. `started`: what `start` gave for the same arguments."""
    op = getattr(torch.ops.deep_ep.low_latency_dispatch, info.low_latency.value)
    M = num_max_dispatch_tokens_per_rank
    recv_x, recv_count, src_info, layout_range, send_head = op(
        x, topk_idx, M, num_experts, info.size, info.name, info.comm_alg, started
    )
    handle = LowLatencyHandle(src_info, layout_range, M, x.shape[1], num_experts, recv_count, send_head)
    return LowLatencyOutput(recv_x, recv_count, handle)


def start(
    info: GroupInfo, x: Tensor, topk_idx: Tensor, num_max_dispatch_tokens_per_rank: int, num_experts: int
) -> Tensor:
    """Begins a call: int64 [1], for `call`. The tensors may be written to as soon as this returns."""
    op = getattr(torch.ops.deep_ep.low_latency_dispatch_start, info.low_latency.value)
    return op(x, topk_idx, num_max_dispatch_tokens_per_rank, num_experts, info.size, info.name, info.comm_alg)


def fake(
    x: Tensor,
    topk_idx: Tensor,
    num_max_dispatch_tokens_per_rank: int,
    num_experts: int,
    num_ranks: int,
    group: str,
    comm_alg: str,
    started: Tensor | None,
    *,
    overload: str,
) -> tuple[Tensor, ...]:
    M = num_max_dispatch_tokens_per_rank
    error = (
        checks.low_latency_dispatch(x, topk_idx, M, num_experts, num_ranks)
        or npu_ops.check_comm_alg(comm_alg)
        or checks.ticket(started)
        or (npu_ops.check_x(x) if overload == "ops" else None)
    )
    reject("low_latency_dispatch", error)
    (T, H), K, L = x.shape, topk_idx.shape[1], num_experts // num_ranks
    N = num_ranks * M * min(K, L)
    # The strategy ops has torch_npu's own record of where rows came from.
    src_info: tuple[Any, ...] = (N, 3) if overload != "ops" else (torch.sym_max(T * K, 128 * N),)
    return (
        x.new_empty((N, H)),
        x.new_empty((L,), dtype=torch.int64),
        x.new_empty(src_info, dtype=torch.int32),
        x.new_empty((num_experts,), dtype=torch.int32),
        x.new_empty((T, K), dtype=torch.int32),
    )


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, topk_idx, _, num_experts, num_ranks, group, *_ = inputs
    ctx.save_for_backward(output[2], topk_idx, output[4])
    ctx.arguments = num_experts, num_ranks, group


def backward(ctx: Any, grad_recv_x: Tensor, *_: Any, overload: str) -> Any:
    """The transpose of sending rows: each token sums up what its rows bring back, unweighted."""
    if overload == "ops":
        raise RuntimeError("deep_ep.low_latency_dispatch.ops has no gradient; use the strategy default or alltoall")
    src_info, topk_idx, send_head = ctx.saved_tensors
    op = getattr(torch.ops.deep_ep.dispatch_backward, overload)
    no_weights = grad_recv_x.new_zeros((grad_recv_x.shape[0], topk_idx.shape[1]), dtype=torch.float32)
    grad_x, _ = op(grad_recv_x.contiguous(), no_weights, src_info, topk_idx, send_head, *ctx.arguments)
    return grad_x, None, None, None, None, None, None, None


def convert(
    x: Any,
    topk_idx: Any,
    num_max_dispatch_tokens_per_rank: int,
    num_experts: int,
    num_ranks: int,
    group: str,
    comm_alg: str,
    started: Any,
) -> Any:
    """DeepEpLowLatencyDispatch. Whether the call was started makes no difference: GE runs nodes as it sees fit."""
    sizes = num_max_dispatch_tokens_per_rank, num_experts, num_ranks
    return node("low_latency_dispatch", x, topk_idx, *sizes, group)


def node(
    op: str, x: Any, topk_idx: Any, num_max_dispatch_tokens_per_rank: int, num_experts: int, num_ranks: int, group: str
) -> Any:
    """That of a low-latency dispatch."""
    integers = {
        "num_experts": num_experts,
        "num_ranks": num_ranks,
        "num_max_dispatch_tokens_per_rank": num_max_dispatch_tokens_per_rank,
    }
    return ge.node(op, {"x": x, "topk_idx": topk_idx}, integers, group)


def fake_start(
    x: Tensor,
    topk_idx: Tensor,
    num_max_dispatch_tokens_per_rank: int,
    num_experts: int,
    num_ranks: int,
    group: str,
    comm_alg: str,
    *,
    overload: str,
) -> Tensor:
    M = num_max_dispatch_tokens_per_rank
    error = checks.low_latency_dispatch(x, topk_idx, M, num_experts, num_ranks) or npu_ops.check_comm_alg(comm_alg)
    reject("low_latency_dispatch_start", error)
    return x.new_empty((1,), dtype=torch.int64, device="cpu")


register(
    "low_latency_dispatch",
    fake=fake,
    alltoall=alltoall.low_latency_dispatch,
    ops=npu_ops.low_latency_dispatch,
    setup_context=setup_context,
    backward=backward,
    convert={"default": convert, "ops": npu_ops.convert_dispatch},
    decompose=graph_alltoall.low_latency_dispatch,
)

register(
    "low_latency_dispatch_start",
    fake=fake_start,
    alltoall=alltoall.low_latency_dispatch_start,
    ops=npu_ops.low_latency_start,
    convert=dict.fromkeys(("default", "ops"), ge.ticket),
    decompose=graph_alltoall.low_latency_start,
)
