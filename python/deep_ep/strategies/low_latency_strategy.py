"""Strategies of low-latency mode: one for each overload of the ops.

T local tokens · H hidden · K top-k · E experts · R ranks · L = E/R local experts ·
M num_max_dispatch_tokens_per_rank · N = R·M·min(K, L) packed rows.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import differ
from ..collective import collective
from ..ep_strategy import LowLatencyStrategy, Rows, register_low_latency_strategy
from ..groups import Group
from ..handles import readable_by_name
from ..low_latency import LowLatencyOfOps
from ..ops.low_latency_dispatch import LowLatencyHandle
from ..runtime import OfOps, Runtime
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
        self.packed = packed or self.runtime.rows == "rank"

    @classmethod
    def of_buffer(cls, runtime: Runtime, group: Group) -> OfOps:
        own = {"packed": True} if cls is AllToAllLowLatencyCommStrategy else {}
        return cls(runtime=runtime, group=group, **own)

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
        with_room, indices = _with_room(handle, self.group_size)
        N = handle.src_info.shape[0]
        rows: Rows
        if isinstance(recv_x, tuple):
            rows = _spread(recv_x[0], N, indices), _spread(recv_x[1], N, indices)
        else:
            rows = _spread(recv_x, N, indices)
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


def _with_room(packed: LowLatencyHandle, R: int) -> tuple[CapacityHandle, Tensor]:
    """The handle with room for M rows of each (local expert, source rank), and the packed row that each of these places
    takes: int64 [L·R·M], N for none.
    """
    M, N, blocks = packed.num_max_dispatch_tokens_per_rank, packed.src_info.shape[0], packed.layout_range.shape[0]
    end = packed.layout_range.long()
    before = torch.cat([end.new_zeros(1), end[:-1]])
    torch._assert_async(
        (end - before <= M).all(),
        "low_latency_dispatch: a rank has more than M rows for an expert: a token's ids must be distinct",
    )
    row = before.unsqueeze(1) + torch.arange(M, device=end.device)
    indices = row.where(row < end.unsqueeze(1), N).flatten()
    number = torch.arange(N, device=end.device)
    block = torch.searchsorted(end, number, right=True).clamp(max=blocks - 1)
    place = (block * M + number - before[block]).where(packed.src_info[:, 0] >= 0, 0)
    src_info = torch.cat([packed.src_info, packed.src_info.new_full((1, 3), -1)])[indices]
    sizes = M, packed.hidden, packed.num_experts
    counts = torch.full_like(packed.recv_count, R * M)
    return CapacityHandle(src_info, packed.layout_range, *sizes, counts, packed, place), indices


def _spread(rows: Tensor, N: int, indices: Tensor) -> Tensor:
    """N packed rows, or what belongs to them in one dimension, in their places of L·R·M; the others are 0."""
    if rows.dtype.itemsize == 1 and rows.dtype != torch.uint8:  # torch has no index_select of its small floats
        return _spread(rows.view(torch.uint8), N, indices).view(rows.dtype)
    by_row = rows.view(N, -1)
    with_zero = torch.cat([by_row, by_row.new_zeros((1, by_row.shape[1]))])
    return with_zero.index_select(0, indices).view(-1, *rows.shape[1:])


@register_low_latency_strategy("ops")
class OpsLowLatencyCommStrategy(LowLatencyOfOps):
    """torch_npu's own MoE operators."""

    overload = LowLatencyStrategy.OPS
