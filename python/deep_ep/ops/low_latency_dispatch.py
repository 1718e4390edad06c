"""low_latency_dispatch: sends a few tokens per rank to the ranks of their experts, with static shapes, for decoding.

low_latency_dispatch_start begins it, wait completes it.

T local tokens · H hidden · K top-k · E experts · R ranks · L = E/R local experts ·
M num_max_dispatch_tokens_per_rank · N = R·M·min(K, L) rows.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..arguments import flat
from ..collective import collective
from ..groups import GroupInfo, info_of
from ..handles import readable_by_name
from ..kernels import alltoall, torch_npu_ops
from ..npu import ge, graph_alltoall
from ..process_groups import Group
from ._registration import Start, register, reject
from .wait import Completion, Started, as_issued, completes, issued, no_rows


@readable_by_name
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
    """[N, H] in x's dtype: rows ordered by local expert, source rank, token, k, without gaps. Those behind are 0 in
    grad mode; else they hold anything, which low_latency_combine never reads."""
    recv_count: Tensor
    """int64 [L]: rows of each local expert."""
    handle: LowLatencyHandle


@collective("low_latency_dispatch")
def low_latency_dispatch(
    x: Tensor,
    topk_idx: Tensor,
    num_max_dispatch_tokens_per_rank: int,
    num_experts: int,
    *,
    x_active_mask: Tensor | None = None,
    group: Group = None,
) -> LowLatencyOutput:
    """Sends every token once to each of its experts. Collective over the group; differentiable in x.

    Args:
        x: [T, H] bf16, fp16 or fp32, 0 <= T <= M. T may be several dimensions, which topk_idx has, too.
        topk_idx: [T, K] of any integer dtype, expert ids 0..E-1, or -1 for none. A token may have at most min(K, L)
            ids of one rank: distinct ids always do.
        num_max_dispatch_tokens_per_rank: M, the same on all ranks.
        num_experts: E, a multiple of R.
        x_active_mask: bool [T], None for all: the tokens that are sent. With it, low_latency_combine wants it, too.
        group: a group prepared with `deep_ep.init`.

    Raises:
        RuntimeError: as `deep_ep.dispatch`; under the strategy ops, if torch_npu or an NPU is missing.
        ValueError: x_active_mask has another shape or dtype.
    """
    topk_idx = active(topk_idx, x_active_mask)
    return call(info_of(group), x, topk_idx, num_max_dispatch_tokens_per_rank, num_experts)


def active(topk_idx: Tensor, x_active_mask: Tensor | None) -> Tensor:
    """topk_idx [T, K] with no expert for tokens that x_active_mask, bool [T], leaves out. T may be several dimensions.

    ValueError: x_active_mask has another shape or dtype.
    """
    if x_active_mask is None:
        return topk_idx
    shape, tokens = x_active_mask.shape, topk_idx.shape[:-1]
    if x_active_mask.dtype != torch.bool or len(shape) == 0:
        raise ValueError(f"x_active_mask must be torch.bool [T], got {x_active_mask.dtype} {list(shape)}")
    if len(shape) != len(tokens) or any(checks.differ(*sizes) for sizes in zip(shape, tokens, strict=True)):
        raise ValueError(f"x_active_mask must have T entries like topk_idx {list(topk_idx.shape)}, got {list(shape)}")
    return torch.where(x_active_mask.unsqueeze(-1), topk_idx, -1)


def zero_unused() -> bool:
    """Whether rows that hold nothing must be 0: the gradient of an expert's weights sums up over all rows."""
    return torch.is_grad_enabled()


def call(
    info: GroupInfo, x: Tensor, topk_idx: Tensor, num_max_dispatch_tokens_per_rank: int, num_experts: int
) -> LowLatencyOutput:
    """The op's overload for `info`."""
    op = getattr(torch.ops.deep_ep.low_latency_dispatch, info.low_latency.value)
    M = num_max_dispatch_tokens_per_rank
    results = op(*flat(x, topk_idx), M, num_experts, info.size, info.name, info.comm_alg, zero_unused())
    return _in_order(results, x, M, num_experts)


def start(
    info: GroupInfo, x: Tensor, topk_idx: Tensor, num_max_dispatch_tokens_per_rank: int, num_experts: int
) -> Started:
    """As `call`, for `complete`. The tensors must not be written to before."""
    overload = info.low_latency.value
    op = getattr(torch.ops.deep_ep.low_latency_dispatch_start, overload)
    M, arguments = num_max_dispatch_tokens_per_rank, tuple(map(as_issued, flat(x, topk_idx)))
    ticket = op(*arguments, M, num_experts, info.size, info.name, info.comm_alg, zero_unused())
    return issued(ticket, info, overload, "low_latency_dispatch", arguments, num_experts, M, topk_idx.shape[:-1])


def complete(started: Started) -> LowLatencyOutput:
    return _in_order(started.results(), started.arguments[0], started.num_max, started.num_experts)


def arriving(started: Started) -> LowLatencyOutput:
    """The same, which is there once started.join() has returned."""
    return _in_order(started.arriving(), started.arguments[0], started.num_max, started.num_experts)


def wrong(info: GroupInfo, x: Tensor, topk_idx: Tensor, M: int, num_experts: int) -> str | None:
    """What is wrong with the arguments of `call`, as far as this rank alone can tell."""
    x, topk_idx = flat(x, topk_idx)
    sizes = M, num_experts, info.size, info.comm_alg
    error = _error(x, topk_idx, *sizes, overload=info.low_latency.value)
    if error or not checks.has_values(topk_idx):
        return error
    return checks.ids_error(topk_idx, num_experts) or checks.crowded_error(topk_idx, num_experts // info.size)


def nothing_yet(
    info: GroupInfo, x: Tensor, topk_idx: Tensor, num_max_dispatch_tokens_per_rank: int, num_experts: int
) -> LowLatencyOutput:
    """What `call` gives when no rank sends anything."""
    M, overload = num_max_dispatch_tokens_per_rank, info.low_latency.value
    x, topk_idx = flat(x, topk_idx)
    recv_x, *others = _results(overload, x, topk_idx, num_experts, info.size, M)
    results = [no_rows(x, recv_x.shape[0]), *(tensor.zero_() for tensor in others)]
    for places in (results[2], results[4]):
        places.fill_(-1)
    return _in_order(results, x, M, num_experts)


def _in_order(
    results: Sequence[Tensor], x: Tensor, num_max_dispatch_tokens_per_rank: int, num_experts: int
) -> LowLatencyOutput:
    recv_x, recv_count, src_info, layout_range, send_head = results
    sizes = num_max_dispatch_tokens_per_rank, x.shape[-1], num_experts
    return LowLatencyOutput(recv_x, recv_count, LowLatencyHandle(src_info, layout_range, *sizes, recv_count, send_head))


def fake(
    x: Tensor,
    topk_idx: Tensor,
    num_max_dispatch_tokens_per_rank: int,
    num_experts: int,
    num_ranks: int,
    group: str,
    comm_alg: str,
    zero_unused: bool = True,
    *,
    overload: str,
) -> tuple[Tensor, ...]:
    M = num_max_dispatch_tokens_per_rank
    reject("low_latency_dispatch", _error(x, topk_idx, M, num_experts, num_ranks, comm_alg, overload=overload))
    return _results(overload, x, topk_idx, num_experts, num_ranks, M)


def _error(
    x: Tensor, topk_idx: Tensor, M: int, E: int, R: int, comm_alg: str, zero_unused: bool = True, *, overload: str
) -> Any:
    return (
        checks.low_latency_dispatch(x, topk_idx, M, E, R)
        or torch_npu_ops.check_comm_alg(comm_alg)
        or (torch_npu_ops.check_x(x) if overload == "ops" else None)
    )


def _results(overload: str, x: Tensor, topk_idx: Tensor, num_experts: int, num_ranks: int, M: int) -> Any:
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
    _, _, _, num_experts, num_ranks, group, *_ = inputs
    ctx.save_for_backward(*_saved(inputs, output))
    ctx.arguments = num_experts, num_ranks, group


def _saved(arguments: Sequence[Any], results: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return results[2], arguments[1], results[4]


def setup_context_start(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, topk_idx, _, num_experts, num_ranks, group, *_ = inputs
    # Of x only its dtype, its device and H are needed.
    ctx.save_for_backward(x.new_empty((0, x.shape[1])), topk_idx)
    ctx.arguments = num_experts, num_ranks, 0, group


def _transpose(op: Any, overload: str, saved: Sequence[Tensor], grad_recv_x: Tensor, arguments: tuple[Any, ...]) -> Any:
    """The transpose of sending rows: each token sums up what its rows bring back, unweighted."""
    if overload == "ops":
        raise RuntimeError("deep_ep.low_latency_dispatch.ops has no gradient; use the strategy default or alltoall")
    K = saved[1].shape[1]
    no_weights = grad_recv_x.new_zeros((grad_recv_x.shape[0], K), dtype=torch.float32)
    return getattr(op, overload)(grad_recv_x.contiguous(), no_weights, *saved, *arguments)


def backward(ctx: Any, grad_recv_x: Tensor, *_: Any, overload: str) -> Any:
    op = torch.ops.deep_ep.dispatch_backward
    grad_x, _ = _transpose(op, overload, ctx.saved_tensors, grad_recv_x, ctx.arguments)
    return grad_x, *[None] * 7


def backward_wait(overload: str, saved: Sequence[Tensor], grads: Sequence[Tensor], arguments: tuple[Any, ...]) -> Any:
    return _transpose(torch.ops.deep_ep.dispatch_backward_start, overload, saved, grads[0], arguments)


def backward_start(ctx: Any, ticket: Tensor, *, overload: str) -> Any:
    op = getattr(torch.ops.deep_ep.wait, overload)
    grad_x, _ = op(ticket, "dispatch_backward", list(ctx.saved_tensors), *ctx.arguments)
    return grad_x, *[None] * 7


def convert(
    x: Any,
    topk_idx: Any,
    num_max_dispatch_tokens_per_rank: int,
    num_experts: int,
    num_ranks: int,
    group: str,
    comm_alg: str,
    zero_unused: bool = True,
) -> Any:
    """DeepEpLowLatencyDispatch."""
    sizes = num_max_dispatch_tokens_per_rank, num_experts, num_ranks
    return node("low_latency_dispatch", x, topk_idx, *sizes, group, zero_unused)


def node(
    op: str,
    x: Any,
    topk_idx: Any,
    num_max_dispatch_tokens_per_rank: int,
    num_experts: int,
    num_ranks: int,
    group: str,
    zero_unused: bool = True,
) -> Any:
    """That of a low-latency dispatch."""
    integers = {
        "num_experts": num_experts,
        "num_ranks": num_ranks,
        "num_max_dispatch_tokens_per_rank": num_max_dispatch_tokens_per_rank,
        "zero_unused": int(zero_unused),
    }
    return ge.node(op, {"x": x, "topk_idx": topk_idx}, integers, group)


register(
    "low_latency_dispatch",
    fake=fake,
    alltoall=alltoall.low_latency_dispatch,
    ops=torch_npu_ops.low_latency_dispatch,
    setup_context=setup_context,
    backward=backward,
    convert={"default": convert, "ops": torch_npu_ops.convert_dispatch},
    decompose=graph_alltoall.low_latency_dispatch,
    start=Start(_error, backward_start, setup_context_start),
)

completes("low_latency_dispatch", Completion(fake=_results, complete=complete, saved=_saved, backward=backward_wait))
