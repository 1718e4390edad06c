"""dispatch: sends each token to the ranks of its experts. dispatch_start begins it, wait completes it.

T local tokens · H hidden · K top-k · E experts · R ranks · L = E/R local experts · N received rows ·
W num_worst_tokens.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..arguments import flat, like_tokens
from ..collective import collective
from ..groups import GroupInfo, info_of
from ..handles import copy_in_graph, readable_by_name
from ..kernels import alltoall
from ..npu import ge, graph_alltoall
from ..process_groups import Group
from . import get_dispatch_layout
from ._registration import Start, refuse, register, reject
from .wait import Completion, Started, as_issued, completes, issued, no_rows


@readable_by_name
class DispatchHandle(NamedTuple):
    """What combine needs to send rows back, as tensors only. The order is that of DeepEP-Ascend's handle.

    For both prefix matrices per channel, a channel is a local expert, and rows count before any are dropped.
    """

    rank_prefix_matrix: Tensor
    """int32 [R, R]: [i, j] is the number of rows that ranks 0..i deliver to rank j."""
    channel_prefix_matrix: Tensor
    """int32 [R, L]: running count over l of the rows that this rank has for local expert l of rank d."""
    recv_channel_prefix_matrix: Tensor
    """int32 [L, R]: running count over (l, s) of the rows that rank s has for this rank's local expert l."""
    recv_src_idx: Tensor
    """int32 [N, 3]: source rank, token and k of every row, -1 in rows that hold nothing."""
    is_token_in_rank: Tensor
    """int32 [T, R]: whether a token has an expert at a rank."""
    send_head: Tensor
    """int32 [T, K]: the row at the expert's rank, -1 if there is none."""
    topk_idx: Tensor
    """int64 [T, K]: that of dispatch, with the dimensions it was given in, which are those of combine's result."""
    topk_weights: Tensor
    """fp32 [T, K], as topk_idx; ones if none were given."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy_in_graph(self, memo)

    @property
    def num_dropped(self) -> Tensor:
        """int64 []: rows for this rank that did not fit into W (as DispatchOutput.num_dropped)."""
        wanted = self.recv_channel_prefix_matrix[-1, -1]
        return wanted - (self.recv_src_idx[:, 0] >= 0).sum()


class DispatchOutput(NamedTuple):
    """What dispatch returns."""

    recv_x: Tensor
    """[N, H] in x's dtype: rows ordered by local expert, source rank, token, k."""
    recv_topk_idx: Tensor
    """int64 [N, K]: the local expert in the column k that brought the row, else -1."""
    recv_topk_weights: Tensor
    """fp32 [N, K]: the weight in that column, else 0. Gradients flow back to topk_weights."""
    num_recv_tokens_per_expert: Tensor
    """int64 [L]: rows of each local expert."""
    handle: DispatchHandle
    num_dropped: Tensor
    """int64 []: rows for this rank that did not fit into W; 0 in exact mode."""


class AsInt8(NamedTuple):
    """Rows in whose place `call` gives data and scales, as dispatch_int8 does."""

    x: Tensor


@collective("dispatch")
def dispatch(
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor | None = None,
    *,
    num_experts: int,
    group: Group = None,
    num_worst_tokens: int = 0,
) -> DispatchOutput:
    """Sends every token once to each of its experts. Collective over the group; differentiable in x and topk_weights.

    Args:
        x: [T, H] bf16, fp16 or fp32. T may differ between ranks and be 0. It may be several dimensions, such as
            [batch, sequence, H], which come back from combine; topk_idx and topk_weights have them, too.
        topk_idx: [T, K] of any integer dtype, expert ids 0..E-1, or -1 for none. Expert e lives on rank e // L.
        topk_weights: [T, K] fp32, bf16 or fp16, which becomes fp32; None means ones.
        num_experts: E, a multiple of R.
        group: a group prepared with `deep_ep.init`.
        num_worst_tokens: 0 for exact shapes (N is known once counts have been exchanged), or W for static
            shapes: N = W, rows from W on are dropped and counted in num_dropped, unused rows are 0 with ids of -1.
            Dropped rows add 0 to combine and to gradients. W may differ between ranks.

    Raises:
        RuntimeError: on all ranks, if an argument of any rank is wrong or ranks do not fit together; on all ranks
            that wait, if a peer has died or the deadline has passed.
        ValueError: on this rank, an argument of another type; RuntimeError on the others, with this rank and the
            reason. So does every call: one that fails on a rank, for whatever reason, before ranks talk to each other
            in it fails on all, and the group is usable afterwards.
    """
    return call(info_of(group), x, topk_idx, topk_weights, num_experts, num_worst_tokens)


@collective("dispatch")
def dispatch_start(
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor | None = None,
    *,
    num_experts: int,
    group: Group = None,
    num_worst_tokens: int = 0,
) -> Started:
    """Begins a dispatch and does not wait for peers; `deep_ep.wait` completes it and gives the DispatchOutput.

    The arguments are those of `deep_ep.dispatch`. x must not be written to before the wait, which raises a RuntimeError
    if it was (in inference mode a copy of it is sent); topk_idx and topk_weights may. In exact mode the number of rows
    is known at the wait. What is wrong on this rank is raised here, what is wrong on others at the wait. Gradients are
    those of a call where this one stands, in whatever grad mode or thread the wait is. Other calls of the group run
    behind this one, in the order of the program. Every rank waits for its calls, in the same order.
    """
    arguments = info_of(group), x, topk_idx, topk_weights, num_experts, num_worst_tokens
    refuse(call, wrong, *arguments)
    return start(*arguments)


def _own(topk_idx: Tensor, topk_weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both for the handle, which nothing that the caller writes to later changes."""
    if topk_weights is None:
        topk_weights = torch.ones_like(topk_idx, dtype=torch.float32)
    else:
        topk_weights = topk_weights.clone()
    return topk_idx.clone(), topk_weights


def call(
    info: GroupInfo,
    x: Tensor | AsInt8,
    topk_idx: Tensor,
    topk_weights: Tensor | None,
    num_experts: int,
    num_worst_tokens: int,
    is_token_in_rank: Tensor | None = None,
) -> DispatchOutput:
    """The op's overload for `info`, with its results put in order."""
    topk_idx, topk_weights = _own(topk_idx, topk_weights)
    packet = torch.ops.deep_ep.dispatch
    if isinstance(x, AsInt8):
        packet, (x,) = torch.ops.deep_ep.dispatch_int8, x
    op = getattr(packet, info.normal.value)
    results = op(*flat(x, topk_idx, topk_weights), num_experts, info.size, num_worst_tokens, info.name)
    if packet is torch.ops.deep_ep.dispatch_int8:
        data, scales, *others = results
        results = (data, scales), *others
    return _in_order(info, results, topk_idx, topk_weights, num_experts, is_token_in_rank)


def start(
    info: GroupInfo,
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor | None,
    num_experts: int,
    num_worst_tokens: int,
    is_token_in_rank: Tensor | None = None,
) -> Started:
    """As `call`, for `complete`."""
    topk_idx, topk_weights = _own(topk_idx, topk_weights)
    x = as_issued(x)
    op = getattr(torch.ops.deep_ep.dispatch_start, info.normal.value)
    tokens, arguments = topk_idx.shape[:-1], flat(x, topk_idx, topk_weights)
    ticket = op(*arguments, num_experts, info.size, num_worst_tokens, info.name)
    sizes = num_experts, num_worst_tokens
    return issued(ticket, info, info.normal.value, "dispatch", arguments, *sizes, tokens, is_token_in_rank)


def complete(started: Started) -> DispatchOutput:
    return _of(started, started.results())


def arriving(started: Started) -> DispatchOutput:
    """The same, which is there once started.join() has returned."""
    return _of(started, started.arriving())


def _of(started: Started, results: list[Tensor]) -> DispatchOutput:
    topk_idx, topk_weights = (like_tokens(one, started.tokens) for one in started.arguments[1:])
    return _in_order(started.info, results, topk_idx, topk_weights, started.num_experts, started.is_token_in_rank)


def wrong(info: GroupInfo, x: Tensor, topk_idx: Tensor, topk_weights: Tensor | None, *sizes: Any) -> str | None:
    """What is wrong with the arguments of `call`, as far as this rank alone can tell."""
    num_experts, num_worst_tokens, *_ = sizes
    if topk_weights is None:
        topk_weights = torch.ones_like(topk_idx, dtype=torch.float32)
    x, topk_idx, topk_weights = flat(x, topk_idx, topk_weights)
    error = checks.dispatch(x, topk_idx, topk_weights, num_experts, info.size, num_worst_tokens)
    return error or (checks.ids_error(topk_idx, num_experts) if checks.has_values(topk_idx) else None)


def nothing_yet(
    info: GroupInfo,
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor | None,
    num_experts: int,
    num_worst_tokens: int,
    is_token_in_rank: Tensor,
    num_rows: int,
) -> DispatchOutput:
    """What `call` gives, without a value in it. num_rows: N, also where num_worst_tokens is 0."""
    if topk_weights is None:
        topk_weights = torch.ones_like(topk_idx, dtype=torch.float32)
    rows, ids = flat(x, topk_idx)
    _, *others = _empty(rows, ids, num_experts, info.size, num_rows)
    results = [no_rows(rows, num_rows), *(tensor.zero_() for tensor in others)]
    return _in_order(info, results, topk_idx, topk_weights, num_experts, is_token_in_rank)


def _in_order(
    info: GroupInfo,
    results: Sequence[Any],
    topk_idx: Tensor,
    topk_weights: Tensor,
    num_experts: int,
    is_token_in_rank: Tensor | None,
) -> DispatchOutput:
    (
        recv_x,
        recv_topk_idx,
        recv_topk_weights,
        counts,
        num_dropped,
        rank_prefix,
        channel_prefix,
        recv_channel_prefix,
        recv_src_idx,
        send_head,
    ) = results
    if is_token_in_rank is None:
        # After the exchange: a bad id must not keep this rank from taking part in it.
        is_token_in_rank = get_dispatch_layout.call(info, topk_idx, num_experts)[3]
    handle = DispatchHandle(
        rank_prefix,
        channel_prefix,
        recv_channel_prefix,
        recv_src_idx,
        is_token_in_rank,
        send_head,
        topk_idx,
        topk_weights,
    )
    return DispatchOutput(recv_x, recv_topk_idx, recv_topk_weights, counts, handle, num_dropped)


def fake(
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    num_experts: int,
    num_ranks: int,
    num_worst_tokens: int,
    group: str,
) -> tuple[Tensor, ...]:
    reject("dispatch", checks.dispatch(x, topk_idx, topk_weights, num_experts, num_ranks, num_worst_tokens))
    return results(x, topk_idx, num_experts, num_ranks, num_worst_tokens)


def results(x: Tensor, topk_idx: Tensor, num_experts: int, num_ranks: int, num_worst_tokens: int) -> tuple[Tensor, ...]:
    """Those of the op, without values."""
    N: Any = num_worst_tokens
    if num_worst_tokens == 0:
        ge.check_exact("dispatch")
        N = torch.library.get_ctx().new_dynamic_size(min=0)
        torch._check(N <= checks.MAX_ROWS)
    return _empty(x, topk_idx, num_experts, num_ranks, N)


def _empty(x: Tensor, topk_idx: Tensor, num_experts: int, num_ranks: int, N: Any) -> tuple[Tensor, ...]:
    T, H = x.shape
    K, L = topk_idx.shape[1], num_experts // num_ranks

    def empty(dtype: torch.dtype, *shape: Any) -> Tensor:
        return x.new_empty(shape, dtype=dtype)

    return (
        empty(x.dtype, N, H),
        empty(torch.int64, N, K),
        empty(torch.float32, N, K),
        empty(torch.int64, L),
        empty(torch.int64),
        empty(torch.int32, num_ranks, num_ranks),
        empty(torch.int32, num_ranks, L),
        empty(torch.int32, L, num_ranks),
        empty(torch.int32, N, 3),
        empty(torch.int32, T, K),
    )


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, _, _, num_experts, num_ranks, _, group = inputs
    ctx.save_for_backward(*_saved(inputs, output))
    ctx.arguments = num_experts, num_ranks, group


def _saved(arguments: Sequence[Any], results: Sequence[Tensor]) -> tuple[Tensor, ...]:
    recv_src_idx, send_head = results[8:]
    return recv_src_idx, arguments[1], send_head


def setup_context_start(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, topk_idx, _, num_experts, num_ranks, _, group = inputs
    # Of x only its dtype, its device and H are needed.
    ctx.save_for_backward(x.new_empty((0, x.shape[1])), topk_idx)
    ctx.arguments = num_experts, num_ranks, 0, group


def _transpose(op: Any, saved: Sequence[Tensor], grads: Sequence[Tensor], arguments: tuple[Any, ...]) -> Any:
    """The transpose of sending rows: each token sums up what its rows bring back, unweighted."""
    return op(grads[0].contiguous(), grads[2].contiguous(), *saved, *arguments)


def backward(ctx: Any, *grads: Tensor, overload: str) -> Any:
    op = getattr(torch.ops.deep_ep.dispatch_backward, overload)
    grad_x, grad_topk_weights = _transpose(op, ctx.saved_tensors, grads, ctx.arguments)
    return grad_x, None, grad_topk_weights, None, None, None, None


def backward_wait(overload: str, saved: Sequence[Tensor], grads: Sequence[Tensor], arguments: tuple[Any, ...]) -> Any:
    return _transpose(getattr(torch.ops.deep_ep.dispatch_backward_start, overload), saved, grads, arguments)


def backward_start(ctx: Any, ticket: Tensor, *, overload: str) -> Any:
    op = getattr(torch.ops.deep_ep.wait, overload)
    grad_x, grad_topk_weights = op(ticket, "dispatch_backward", list(ctx.saved_tensors), *ctx.arguments)
    return grad_x, None, grad_topk_weights, None, None, None, None


def convert(
    x: Any,
    topk_idx: Any,
    topk_weights: Any,
    num_experts: int,
    num_ranks: int,
    num_worst_tokens: Any,
    group: str,
    op: str = "dispatch",
) -> Any:
    """DeepEpDispatch, whose number of rows is an input since it may be symbolic; DeepEpDispatchExact without one. The
    same for dispatch_int8."""
    inputs = {"x": x, "topk_idx": topk_idx, "topk_weights": topk_weights}
    integers = {"num_experts": num_experts, "num_ranks": num_ranks}
    if isinstance(num_worst_tokens, int) and num_worst_tokens == 0:
        return ge.node(op, inputs, integers, group, "Exact")
    return ge.node(op, inputs | {"num_worst_tokens": ge.number(num_worst_tokens)}, integers, group)


register(
    "dispatch",
    fake=fake,
    alltoall=alltoall.dispatch,
    setup_context=setup_context,
    backward=backward,
    convert={"default": convert},
    decompose=graph_alltoall.dispatch,
    start=Start(checks.dispatch, backward_start, setup_context_start),
)

completes(
    "dispatch",
    Completion(
        fake=lambda _, x, topk_idx, topk_weights, *sizes: results(x, topk_idx, *sizes),
        complete=complete,
        saved=_saved,
        backward=backward_wait,
    ),
)
