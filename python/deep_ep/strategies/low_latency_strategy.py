"""Strategies of low-latency mode: one for each overload of the ops.

T local tokens · H hidden · K top-k · E experts · R ranks · L = E/R local experts ·
M num_max_dispatch_tokens_per_rank · N = R·M·min(K, L) packed rows.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import quantization
from ..buffer.events import event_of
from ..buffer.low_latency import LowLatencyOfOps
from ..buffer.runtime import OfOps, Runtime
from ..checks import differ
from ..collective import collective
from ..ep_strategy import LowLatencyStrategy, Rows, register_low_latency_strategy
from ..groups import GroupInfo
from ..handles import readable_by_name
from ..ops import moe_distribute_combine as combine_op
from ..ops import moe_distribute_dispatch as dispatch_op
from ..ops.low_latency_dispatch import LowLatencyHandle
from ..ops.low_latency_dispatch_padded import pad, places
from ..process_groups import Group
from ..utils import EventOverlap


@register_low_latency_strategy("default")
class DefaultLowLatencyCommStrategy(LowLatencyOfOps):
    """The library's own kernels, over shared memory on CPU."""

    overload = LowLatencyStrategy.DEFAULT


@readable_by_name
class CapacityHandle(NamedTuple):
    """The handle of rows that lie where there is room for M of each (local expert, source rank)."""

    src_info: Tensor
    """int32 [L·R·M, 3]: source rank, token and k of every row, -1 in rows that hold nothing."""
    layout_range: Tensor
    """int32 [L·R]: running count over (local expert, source rank) of the received rows."""
    num_max_dispatch_tokens_per_rank: int
    hidden: int
    num_experts: int
    recv_count: Tensor
    """int64 [L]: R·M of every local expert."""
    packed: LowLatencyHandle
    place: Tensor
    """int64 [N]: where each packed row is among the L·R·M; 0 for unused rows."""


@register_low_latency_strategy("alltoall")
class AllToAllLowLatencyCommStrategy(LowLatencyOfOps):
    """Collectives of torch.distributed, with DeepEP-Ascend's layout under rows="expert": rows of local expert l of rank
    q from row (l·R + q)·M on, zeros in between, L·R·M rows in all, and a recv_count of R·M for every expert.

    Args:
        runtime, group: as in the others.
        packed: the results are those of `default`, bit for bit. So they are in a Buffer that is given the name
            "alltoall".
    """

    overload = LowLatencyStrategy.ALLTOALL

    def __init__(self, runtime: Runtime | None = None, group: Group = None, packed: bool = False) -> None:
        super().__init__(runtime, group)
        self.packed = packed or not self.contract.is_of_ascend

    @classmethod
    def of_buffer(cls, runtime: Runtime, group: Group) -> OfOps:
        if cls is AllToAllLowLatencyCommStrategy:
            return cls(runtime, group, packed=True)
        return cls(runtime=runtime, group=group)

    @collective("low_latency_dispatch", is_typed=False)
    def low_latency_dispatch(  # type: ignore[override]
        self,
        x: Tensor,
        topk_idx: Tensor,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        cumulative_local_expert_recv_stats: Tensor | None = None,
        use_fp8: bool = True,
        round_scale: bool = False,
        use_ue8m0: bool = False,
        use_mxfp4: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        topk_weights: Tensor | None = None,
        quant_mode: str | None = None,
        **more: Any,
    ) -> tuple[Rows, Tensor, Any, EventOverlap, Callable[[], None]]:
        """As `Buffer.low_latency_dispatch`."""
        more |= {"use_fp8": use_fp8, "round_scale": round_scale, "use_ue8m0": use_ue8m0, "use_mxfp4": use_mxfp4}
        more |= {"async_finish": async_finish, "return_recv_hook": return_recv_hook}
        more |= {"topk_weights": topk_weights, "quant_mode": quant_mode}
        stats = cumulative_local_expert_recv_stats
        recv_x, recv_count, handle, event, hook = super().low_latency_dispatch(
            x, topk_idx, num_max_dispatch_tokens_per_rank, num_experts, stats, **more
        )
        if self.packed:
            return recv_x, recv_count, handle, event, hook
        # Under rows="expert" calls are finished when they return.
        assert isinstance(handle, LowLatencyHandle)
        with_room = _with_room(handle, self.group_size)
        rows: Rows
        if isinstance(recv_x, tuple):
            rows = _spread(recv_x[0], handle), _spread(recv_x[1], handle)
        else:
            rows = _spread(recv_x, handle)
        return rows, with_room.recv_count, with_room, event, hook

    @collective("low_latency_combine", is_typed=False)
    def low_latency_combine(  # type: ignore[override]
        self,
        x: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor,
        handle: Any,
        zero_copy: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        out: Tensor | None = None,
        **more: Any,
    ) -> tuple[Tensor, EventOverlap, Callable[[], None]]:
        """As `Buffer.low_latency_combine`."""
        if isinstance(handle, CapacityHandle):
            rows = handle.src_info.shape[0]
            if x.dim() != 2 or differ(x.shape[0], rows):
                raise ValueError(
                    f"x must have the shape [L·R·M, H] of low_latency_dispatch's recv_x with L·R·M = {rows}, "
                    f"got {list(x.shape)}"
                )
            x, handle = x.index_select(0, handle.place), handle.packed
        return super().low_latency_combine(
            x, topk_idx, topk_weights, handle, zero_copy, async_finish, return_recv_hook, out, **more
        )


def _with_room(packed: LowLatencyHandle, R: int) -> CapacityHandle:
    """The handle with room for M rows of each (local expert, source rank): as if each had one rank's rows for an expert
    of their own.
    """
    M, layout_range = packed.num_max_dispatch_tokens_per_rank, packed.layout_range
    torch._assert_async(
        (layout_range.diff(prepend=layout_range.new_zeros(1)) <= M).all(),
        "low_latency_dispatch: a rank has more than M rows for an expert: a token's ids must be distinct",
    )
    src_info = pad(packed.src_info, layout_range, 1, M, -1).flatten(0, 1)
    place = places(layout_range, packed.src_info, 1, M)
    sizes = M, packed.hidden, packed.num_experts
    counts = torch.full_like(packed.recv_count, R * M)
    return CapacityHandle(src_info, layout_range, *sizes, counts, packed, place)


def _spread(rows: Tensor, packed: LowLatencyHandle) -> Tensor:
    """Packed rows, or what belongs to them in one dimension, in their places of L·R·M; the others are 0."""
    by_row = rows.view(packed.src_info.shape[0], -1)
    padded = pad(by_row, packed.layout_range, 1, packed.num_max_dispatch_tokens_per_rank)
    return padded.view(-1, *rows.shape[1:])


@readable_by_name
class OpsHandle(NamedTuple):
    """The handle of torch_npu's operators, in DeepEP-Ascend's order."""

    src_info: Tensor
    """int32: their record of where rows came from, which they call assist_info."""
    layout_range: Tensor
    """int32, the first L·R: running count over (local expert, source rank) of the received rows."""
    num_max_dispatch_tokens_per_rank: int
    hidden: int
    num_experts: int
    recv_count: Tensor
    """int64 [L]: rows of each local expert."""
    expand_scales: Tensor | None
    """fp32 [N]: the rows' weights; None without topk_weights."""
    x_active_mask: Tensor | None
    """bool: the tokens that were sent; None for all."""
    topk_idx: Tensor
    """int64, with the padding."""
    topk_weights: Tensor | None
    """fp32, with the padding, as given to the dispatch."""


@register_low_latency_strategy("ops")
class OpsLowLatencyCommStrategy(LowLatencyOfOps):
    """torch_npu's own MoE operators, which get under rows="expert" all that they take.

    Args:
        runtime, group: as in the others.
        comm_alg: hierarchy, fullmesh_v1, fullmesh_v2, ccu, or empty to leave it to torch_npu. Under hierarchy tokens
            are padded to M, and low_latency_dispatch needs topk_weights.
        smooth_scales: fp32 [E, H], by which rows are multiplied when the operators quantise them to int8.

    With MOE_SHARED_EXPERT_RANK_NUM the first ranks have a shared expert, to one of which every token goes as well: rows
    are [M·ceil(R/S), H] and counts [1] there, L = E/(R - S) on the others, and combine adds its result with weight 1.

    There is no gradient.
    """

    overload = LowLatencyStrategy.OPS

    def __init__(
        self,
        runtime: Runtime | None = None,
        group: Group = None,
        comm_alg: str = "hierarchy",
        smooth_scales: Tensor | None = None,
    ) -> None:
        self.comm_alg = comm_alg
        self.smooth_scales = smooth_scales
        super().__init__(runtime, group)
        shared = self.runtime.shared_ranks
        self._shared = dispatch_op.Shared(shared, self.runtime.rank < shared)

    @classmethod
    def of_buffer(cls, runtime: Runtime, group: Group) -> OfOps:
        if cls is OpsLowLatencyCommStrategy and runtime.comm_alg is not None:
            return cls(runtime, group, runtime.comm_alg)
        return cls(runtime=runtime, group=group)

    def _prepare(self) -> GroupInfo:
        return self.runtime.prepare(None, self.overload, self.comm_alg)

    @collective("low_latency_dispatch")
    def low_latency_dispatch(  # type: ignore[override]
        self,
        x: Tensor,
        topk_idx: Tensor,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        cumulative_local_expert_recv_stats: Tensor | None = None,
        use_fp8: bool = True,
        round_scale: bool = False,
        use_ue8m0: bool = False,
        use_mxfp4: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        topk_weights: Tensor | None = None,
        quant_mode: str | None = None,
        x_active_mask: Tensor | None = None,
        **more: Any,
    ) -> tuple[Rows, Tensor, Any, EventOverlap, Callable[[], None]]:
        """As `Buffer.low_latency_dispatch`; the call is finished when it returns.

        x_active_mask: bool [T] or [T, K], which torch_npu wants to have no True behind a False.
        """
        stats = cumulative_local_expert_recv_stats
        if not self.contract.is_of_ascend:
            more |= {"use_fp8": use_fp8, "round_scale": round_scale, "use_ue8m0": use_ue8m0, "use_mxfp4": use_mxfp4}
            more |= {"async_finish": async_finish, "return_recv_hook": return_recv_hook, "quant_mode": quant_mode}
            if x_active_mask is not None:
                more["x_active_mask"] = x_active_mask
            sizes = num_max_dispatch_tokens_per_rank, num_experts
            return super().low_latency_dispatch(x, topk_idx, *sizes, stats, **more)
        info, M = self._live(), num_max_dispatch_tokens_per_rank
        mode = self.runtime.low_latency_mode(quant_mode, use_fp8, use_ue8m0, use_mxfp4)
        if self.smooth_scales is not None and mode != "int8":
            raise ValueError(f'smooth_scales are for quant_mode="int8", got {mode!r}')
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError("low_latency_dispatch: x requires a gradient, which the strategy ops does not have")
        hidden, sent = x.shape[1], None
        if mode != "none" and self.smooth_scales is None:
            sent = quantization.quantize(x, mode, low_latency=True)
            x = quantization.pack(*sent)
        if self.comm_alg == "hierarchy":
            T = x.shape[0]
            if x_active_mask is None:
                x_active_mask = torch.ones_like(topk_idx[:, 0], dtype=torch.bool)
            x, topk_idx, x_active_mask = (_padded(one, M - T) for one in (x, topk_idx, x_active_mask))
            topk_weights = None if topk_weights is None else _padded(topk_weights, M - T)
        tensors = x, topk_idx, topk_weights, self.smooth_scales, x_active_mask
        out = dispatch_op.call(info, *tensors, M, num_experts, self._shared)
        rows: Rows = out.recv_x
        if sent is not None:
            data, scales = quantization.unpack(out.recv_x, *sent)
            rows = data, quantization.in_one_row(scales)
        elif self.smooth_scales is not None:
            rows = out.recv_x, out.recv_scales
        if stats is not None:
            stats.add_(out.recv_count.to(torch.int32))
        handle = OpsHandle(
            *(out.assist_info, out.layout_range, M, hidden, num_experts, out.recv_count),
            None if topk_weights is None else out.expand_scales,
            *(x_active_mask, topk_idx, topk_weights),
        )
        return rows, out.recv_count, handle, event_of(async_finish), _nothing

    @collective("low_latency_combine")
    def low_latency_combine(  # type: ignore[override]
        self,
        x: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor,
        handle: Any,
        zero_copy: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        out: Tensor | None = None,
        **more: Any,
    ) -> tuple[Tensor, EventOverlap, Callable[[], None]]:
        """As `Buffer.low_latency_combine`; the call is finished when it returns."""
        if len(handle) != len(OpsHandle._fields):
            return super().low_latency_combine(
                x, topk_idx, topk_weights, handle, zero_copy, async_finish, return_recv_hook, out, **more
            )
        known = OpsHandle(*handle)
        if (x.requires_grad or topk_weights.requires_grad) and torch.is_grad_enabled():
            raise RuntimeError("low_latency_combine: a gradient is required, which the strategy ops does not have")
        T, padding = topk_idx.shape[0], known.topk_idx.shape[0] - topk_idx.shape[0]
        if padding:
            topk_idx, topk_weights = _padded(topk_idx, padding), _padded(topk_weights, padding)
        tensors = known.src_info, known.layout_range, known.expand_scales, known.x_active_mask
        sizes = known.num_max_dispatch_tokens_per_rank, known.num_experts
        combined = combine_op.call(self._live(), x, topk_idx, topk_weights, *tensors, *sizes, self._shared)[:T]
        if known.x_active_mask is not None:  # what torch_npu leaves undefined
            is_sent = known.x_active_mask[:T].view(T, -1).any(1, keepdim=True)
            combined = torch.where(is_sent, combined, 0)
        if out is not None:
            combined = out[:T].copy_(combined)
        return combined, event_of(async_finish), _nothing


def _padded(given: Tensor, rows: int) -> Tensor:
    """With so many rows of 0 behind."""
    return torch.cat([given, given.new_zeros((rows, *given.shape[1:]))])


def _nothing() -> None:
    """The hook of a call that is finished."""
