"""low_latency_dispatch_padded: low_latency_dispatch with R·M rows for each local expert, as upstream DeepEP has them.

low_latency_dispatch_padded_start begins it, wait completes it. Where rows lie concerns the rank that has them alone:
its peers, and the handle, are those of low_latency_dispatch.

T local tokens · H hidden · K top-k · E experts · R ranks · L = E/R local experts ·
M num_max_dispatch_tokens_per_rank · N = R·M·min(K, L) packed rows.
"""

import math
import mmap
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from .. import checks, quantization
from ..ep_strategy import LowLatencyStrategy
from ..groups import GroupInfo
from ..handles import readable_by_name
from ..kernels import alltoall
from ..kernels.started import spoil, write
from . import low_latency_dispatch as packed_op
from ._registration import Start, past_autograd, register, reject
from .low_latency_dispatch import LowLatencyHandle
from .wait import Completion, Started, as_issued, completes, issued, says_itself

Parts = list[Tensor]
"""What rows are made of: (data, scales) as `deep_ep.quantization.pack` takes them, or nothing for rows as they are."""


@readable_by_name
class PaddedHandle(NamedTuple):
    """The handle under rows="rank", where every expert has R·M rows. The first five are upstream DeepEP's."""

    src_info: Tensor
    """int32 [L, R·M]: the token of every row, -1 in rows that hold nothing."""
    layout_range: Tensor
    """int64 [L, R]: begin << 32 | count of the rows of each rank."""
    num_max_dispatch_tokens_per_rank: int
    hidden: int
    num_experts: int
    packed: LowLatencyHandle
    """Of the same rows without gaps, with recv_count int32 [L]."""


class PaddedOutput(NamedTuple):
    """What low_latency_dispatch_padded returns."""

    recv_x: Tensor
    """[L, R·M, H] in x's dtype, or the data of rows in parts: rows ordered by source rank, token; then rows of 0."""
    recv_scales: Tensor
    """[L, R·M] or [L, R·M, S]: the scales of rows in parts; else [0]."""
    recv_count: Tensor
    """int32 [L]: rows of each local expert."""
    handle: PaddedHandle


def call(
    info: GroupInfo,
    x: Tensor,
    topk_idx: Tensor,
    parts: Parts,
    num_max_dispatch_tokens_per_rank: int,
    num_experts: int,
    hidden: int,
) -> PaddedOutput:
    """The op's overload for `info`. `hidden`: H of what rows stand for."""
    M = num_max_dispatch_tokens_per_rank
    results = _overload(info, "")(x, topk_idx, parts, M, num_experts, info.size, info.name)
    return _in_order(results, M, hidden, num_experts)


def start(
    info: GroupInfo,
    x: Tensor,
    topk_idx: Tensor,
    parts: Parts,
    num_max_dispatch_tokens_per_rank: int,
    num_experts: int,
    hidden: int,
) -> "_Started":
    """As `call`. The tensors must not be written to before it has been waited for."""
    x, topk_idx, M = as_issued(x), as_issued(topk_idx), num_max_dispatch_tokens_per_rank
    op = _overload(info, "_start")
    with past_autograd():
        ticket = op(x, topk_idx, parts, M, num_experts, info.size, info.name)
    tensors = x, topk_idx, *parts
    name = info.low_latency.value
    started = issued(ticket, info, name, "low_latency_dispatch_padded", tensors, num_experts, M, topk_idx.shape[:-1])
    return _Started(started, hidden)


def _overload(info: GroupInfo, suffix: str) -> Any:
    if info.low_latency is LowLatencyStrategy.OPS:
        raise RuntimeError(
            'deep_ep.low_latency_dispatch: rows="rank" is not for the strategy ops, whose operators have one row after '
            "the other; use the strategy default or alltoall (DEEP_USE_MODE) instead"
        )
    return getattr(getattr(torch.ops.deep_ep, f"low_latency_dispatch_padded{suffix}"), info.low_latency.value)


class _Started(NamedTuple):
    """A call that goes on."""

    started: Started
    hidden: int

    def join(self) -> None:
        """Returns when the results are there."""
        self.started.join()


def complete(one: _Started) -> PaddedOutput:
    return _in_order(one.started.results(), one.started.num_max, one.hidden, one.started.num_experts)


def arriving(one: _Started) -> PaddedOutput:
    """The same, which is there once one.join() has returned."""
    return _in_order(one.started.arriving(), one.started.num_max, one.hidden, one.started.num_experts)


def wrong(
    info: GroupInfo, x: Tensor, topk_idx: Tensor, parts: Parts, M: int, num_experts: int, hidden: int
) -> str | None:
    """What is wrong with the arguments of `call`, as far as this rank alone can tell, unless `arriving` says it."""
    if says_itself(info, x):
        return None
    error = _error(x, topk_idx, parts, M, num_experts, info.size)
    return error or (_ids_error(topk_idx, num_experts) if checks.has_values(topk_idx) else None)


def nothing_yet(
    info: GroupInfo, x: Tensor, topk_idx: Tensor, parts: Parts, M: int, num_experts: int, hidden: int
) -> PaddedOutput:
    """What `call` gives, without a value in it."""
    results = _results(x, topk_idx, parts, num_experts, info.size, M)
    if torch.compiler.is_compiling():
        for result in results:
            result.view(torch.uint8).fill_(0xFF)
    return _in_order(results, M, hidden, num_experts)


def _in_order(results: Sequence[Tensor], M: int, hidden: int, num_experts: int) -> PaddedOutput:
    recv_x, recv_scales, recv_count, src_info, layout, recv_src_idx, layout_range, send_head = results
    packed = LowLatencyHandle(recv_src_idx, layout_range, M, hidden, num_experts, recv_count, send_head)
    return PaddedOutput(recv_x, recv_scales, recv_count, PaddedHandle(src_info, layout, M, hidden, num_experts, packed))


def fake(
    x: Tensor,
    topk_idx: Tensor,
    parts: Parts,
    num_max_dispatch_tokens_per_rank: int,
    num_experts: int,
    num_ranks: int,
    group: str,
) -> tuple[Tensor, ...]:
    M = num_max_dispatch_tokens_per_rank
    reject("low_latency_dispatch", _error(x, topk_idx, parts, M, num_experts, num_ranks))
    return _results(x, topk_idx, parts, num_experts, num_ranks, M)


def _error(x: Tensor, topk_idx: Tensor, parts: Parts, M: int, E: int, R: int) -> str | None:
    if error := checks.low_latency_dispatch(x, topk_idx, M, E, R):
        return error
    if M > checks.MAX_ROWS // E:
        return f"num_max_dispatch_tokens_per_rank must be 1..{checks.MAX_ROWS // E}, got {M}"
    return None


def _ids_error(topk_idx: Tensor, num_experts: int) -> str | None:
    return checks.ids_error(topk_idx, num_experts) or checks.repeated_error(topk_idx)


def _results(x: Tensor, topk_idx: Tensor, parts: Parts, num_experts: int, num_ranks: int, M: int) -> tuple[Tensor, ...]:
    K, R, L = topk_idx.shape[1], num_ranks, num_experts // num_ranks
    N = R * M * min(K, L)
    rows, *scales = parts or [x]
    return (
        rows.new_empty((L, R * M, *rows.shape[1:])),
        scales[0].new_empty((L, R * M, *scales[0].shape[1:])) if scales else x.new_empty((0,)),
        x.new_empty((L,), dtype=torch.int32),
        x.new_empty((L, R * M), dtype=torch.int32),
        x.new_empty((L, R), dtype=torch.int64),
        x.new_empty((N, 3), dtype=torch.int32),
        x.new_empty((num_experts,), dtype=torch.int32),
        x.new_empty((topk_idx.shape[0], K), dtype=torch.int32),
    )


# Between packed rows and those with gaps, out of torch's operators.


def _ends(layout_range: Tensor, num_ranks: int) -> tuple[Tensor, Tensor]:
    """int64 [L]: where the packed rows of each local expert begin, and where they end."""
    ends = layout_range.view(-1, num_ranks)[:, -1].to(torch.int64)
    return torch.cat([ends.new_zeros(1), ends[:-1]]), ends


def places(layout_range: Tensor, recv_src_idx: Tensor, num_ranks: int, block: int) -> Tensor:
    """int64 [N]: where each packed row is among those with gaps, `block` for each expert; 0 for unused ones."""
    begins, ends = _ends(layout_range, num_ranks)
    row = torch.arange(recv_src_idx.shape[0], device=ends.device)
    expert = (row.unsqueeze(1) >= ends).sum(1).clamp(max=ends.shape[0] - 1)
    return (expert * block + row - begins[expert]).where(recv_src_idx[:, 0] >= 0, 0)


def pack(x: Tensor, layout_range: Tensor, recv_src_idx: Tensor, num_ranks: int) -> Tensor:
    """[N, H] of rows [L, R·M, H]; unused rows hold anything."""
    return x.flatten(0, 1).index_select(0, places(layout_range, recv_src_idx, num_ranks, x.shape[1]))


def used(recv_src_idx: Tensor, layout_range: Tensor) -> Tensor:
    """[n, 3]: recv_src_idx of the rows that have come, where their number can be looked at; else all of it.

    With it, backward touches no other rows.
    """
    if type(layout_range) is not Tensor or not checks.has_values(layout_range) or get_proxy_mode() is not None:
        return recv_src_idx
    return recv_src_idx[: int(layout_range[-1])]


def as_sent(x: Tensor, layout_range: Tensor, recv_src_idx: Tensor, num_ranks: int) -> Tensor:
    """What a call that goes on reads of x [L, R·M, H]: a copy of the rows sent, where torch counts no writes."""
    if torch.compiler.is_compiling() or not x.is_inference():
        return x
    place = places(layout_range, recv_src_idx, num_ranks, x.shape[1])[: int(layout_range[-1])]
    return _pad_used(x.flatten(0, 1).index_select(0, place), place, x.shape[1], x.shape[0])


def pad(rows: Tensor, layout_range: Tensor, num_ranks: int, block: int, value: int = 0) -> Tensor:
    """[L, R·M, ...] of packed rows [N, ...]; the other rows are of `value`."""
    dtype, rows = rows.dtype, _numbers(rows)
    begins, ends = _ends(layout_range, num_ranks)
    slot = torch.arange(block, device=ends.device)
    source = (begins.unsqueeze(1) + slot).where(slot < (ends - begins).unsqueeze(1), rows.shape[0])
    one_more = torch.cat([rows, rows.new_full((1, *rows.shape[1:]), value)])
    padded = one_more.index_select(0, source.view(-1)).view(*source.shape, *rows.shape[1:])
    return padded if rows.dtype == dtype else padded.view(dtype)  # which has no gradient


def pad_gradient(rows: Tensor, layout_range: Tensor, recv_src_idx: Tensor, num_ranks: int, shape: torch.Size) -> Tensor:
    """[L, R·M, H] of the gradient of the rows of `used`, 0 for the others."""
    sources = used(recv_src_idx, layout_range)
    if sources is recv_src_idx:
        return pad(rows, layout_range, num_ranks, shape[1])
    return _pad_used(rows, places(layout_range, sources, num_ranks, shape[1]), shape[1], shape[0])


def _pad_used(rows: Tensor, place: Tensor, block: int, num_blocks: int) -> Tensor:
    """The same for the rows [n, ...] that are used, whose places are known; nothing else is touched."""
    padded = zeros(rows, (num_blocks, block, *rows.shape[1:]))
    _numbers(padded).flatten(0, 1).index_copy_(0, place, _numbers(rows))
    return padded


def _numbers(rows: Tensor) -> Tensor:
    """For selecting and copying: torch has neither of its small floats."""
    return rows.view(torch.uint8) if rows.dtype.itemsize == 1 else rows


def zeros(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """On the CPU, in memory that takes neither time nor room until somebody writes to it."""
    if like.device.type != "cpu":
        return like.new_zeros(shape)
    memory = mmap.mmap(-1, math.prod(shape) * like.element_size(), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=torch.uint8).view(like.dtype).view(shape)


def _layout(layout_range: Tensor, num_ranks: int) -> Tensor:
    """int64 [L, R]: begin << 32 | count, in the block of the expert."""
    end = layout_range.view(-1, num_ranks).to(torch.int64)
    begin = torch.cat([end.new_zeros(1), end.view(-1)[:-1]]).view_as(end)
    return (begin - begin[:, :1]) << 32 | (end - begin)


def of_packed(packed: Sequence[Tensor], parts: Parts, num_ranks: int, M: int, knows_values: bool = False) -> Any:
    """The results, out of those of low_latency_dispatch.

    knows_values: values may be looked at, so that no row is touched that has not come.
    """
    recv_x, recv_count, recv_src_idx, layout_range, send_head = packed
    block = num_ranks * M
    if knows_values:
        used = int(recv_count.sum())
        place = places(layout_range, recv_src_idx, num_ranks, block)[:used]
        rows = quantization.unpack(recv_x[:used], *parts) if parts else (recv_x[:used],)
        padded = [_pad_used(part, place, block, recv_count.shape[0]) for part in rows]
    else:
        rows = quantization.unpack(recv_x, *parts) if parts else (recv_x,)
        padded = [pad(part, layout_range, num_ranks, block) for part in rows]
    return (
        padded[0],
        padded[1] if parts else recv_x.new_empty((0,)),
        recv_count.to(torch.int32),
        pad(recv_src_idx[:, 1], layout_range, num_ranks, block, -1),
        _layout(layout_range, num_ranks),
        recv_src_idx,
        layout_range,
        send_head,
    )


def _around(overload: str) -> Any:
    """The op out of low_latency_dispatch, where there is no kernel for it."""

    def composed(
        x: Tensor, topk_idx: Tensor, parts: Parts, M: int, num_experts: int, num_ranks: int, group: str
    ) -> Any:
        op = getattr(torch.ops.deep_ep.low_latency_dispatch, overload)
        return of_packed(op(x, topk_idx, M, num_experts, num_ranks, group, ""), parts, num_ranks, M)

    return composed


def alltoall_kernel(
    x: Tensor, topk_idx: Tensor, parts: Parts, M: int, num_experts: int, num_ranks: int, group: str
) -> Any:
    """Ids that repeat are refused on all ranks: they could be more than an expert has room for."""
    error = _error(x, topk_idx, parts, M, num_experts, num_ranks) or _ids_error(topk_idx, num_experts)
    if error:
        alltoall.reject("low_latency_dispatch", group, error)
    packed = alltoall.low_latency_dispatch(x, topk_idx, M, num_experts, num_ranks, group, "")
    return of_packed(packed, parts, num_ranks, M, knows_values=True)


# Autograd


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, topk_idx, parts, _, num_experts, num_ranks, group = inputs
    ctx.num_parts = len(parts)
    ctx.save_for_backward(*_saved((None, topk_idx), output))
    ctx.arguments = num_experts, num_ranks, group


def _saved(arguments: Sequence[Any], results: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return results[5], arguments[1], results[7], results[6]


def setup_context_start(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, topk_idx, parts, _, num_experts, num_ranks, group = inputs
    # Of x only its dtype, its device and H are needed.
    ctx.num_parts = len(parts)
    ctx.save_for_backward(x.new_empty((0, x.shape[1])), topk_idx)
    ctx.arguments = num_experts, num_ranks, 0, group


def _packed_gradient(saved: Sequence[Tensor], grad_recv_x: Tensor, num_ranks: int) -> tuple[Sequence[Tensor], Tensor]:
    """What low_latency_dispatch saves, and the gradient of its rows."""
    recv_src_idx, *others, layout_range = saved
    sources = used(recv_src_idx, layout_range)
    return (sources, *others), pack(grad_recv_x, layout_range, sources, num_ranks)


def backward(ctx: Any, grad_recv_x: Tensor, *_: Any, overload: str) -> Any:
    saved, grad_rows = _packed_gradient(ctx.saved_tensors, grad_recv_x, ctx.arguments[1])
    op = torch.ops.deep_ep.dispatch_backward
    grad_x, _ = packed_op._transpose(op, overload, saved, grad_rows, ctx.arguments)
    return grad_x, None, [None] * ctx.num_parts, None, None, None, None


def backward_wait(overload: str, saved: Sequence[Tensor], grads: Sequence[Tensor], arguments: tuple[Any, ...]) -> Any:
    saved, grad_rows = _packed_gradient(saved, grads[0], arguments[1])
    return packed_op.backward_wait(overload, saved, [grad_rows], arguments)


def backward_start(ctx: Any, ticket: Tensor, *, overload: str) -> Any:
    grad_x, *_ = packed_op.backward_start(ctx, ticket, overload=overload)
    return grad_x, None, [None] * ctx.num_parts, None, None, None, None


# Calls that go on


def _results_of_wait(overload: str, x: Tensor, topk_idx: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *parts, num_experts, num_ranks, M = rest
    return _results(x, topk_idx, parts, num_experts, num_ranks, M)


def _early(*arguments: Any) -> list[Tensor]:
    """Results that a call under .alltoall will write to, with rows of 0."""
    results = list(_results_of_wait(*arguments))
    spoil(results[2:])
    return [*(zeros(rows, tuple(rows.shape)) if rows.numel() else rows for rows in results[:2]), *results[2:]]


def _write(early: Sequence[Tensor], results: Sequence[Tensor]) -> None:
    """Of rows, those that have come."""
    for to, of in zip(early[2:], results[2:], strict=True):
        write(to, of)
    place = (results[3].view(-1) >= 0).nonzero().squeeze(1)
    with torch.inference_mode():
        for to, of in zip(early[:2], results[:2], strict=True):
            if to.numel():
                to, of = (_numbers(one.data).flatten(0, 1) for one in (to, of))
                to.index_copy_(0, place, of.index_select(0, place))


register(
    "low_latency_dispatch_padded",
    fake=fake,
    alltoall=alltoall_kernel,
    npu=_around("default"),
    setup_context=setup_context,
    backward=backward,
    convert={},
    decompose={"default": _around("default"), "alltoall": _around("alltoall")},
    start=Start(_error, backward_start, setup_context_start),
)

completes(
    "low_latency_dispatch_padded",
    Completion(
        fake=_results_of_wait,
        complete=lambda started: started.results(),
        saved=_saved,
        backward=backward_wait,
        early=_early,
        write=_write,
    ),
)
