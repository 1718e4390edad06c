"""Low latency of Buffer over the ops of this library. Dynamo traces through it.

T local tokens · H hidden · K top-k · E experts · R ranks · L = E/R local experts ·
M num_max_dispatch_tokens_per_rank · N = R·M·min(K, L) packed rows.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .. import calls, quantization
from ..arguments import flat
from ..collective import collective
from ..ep_strategy import LowLatencyEPCommStrategy, Rows
from ..groups import GroupInfo
from ..ops import low_latency_dispatch as dispatch_op
from ..ops import low_latency_dispatch_int8 as dispatch_int8_op
from ..ops.low_latency_dispatch import LowLatencyHandle
from ..ops.low_latency_dispatch_padded import PaddedHandle
from ..utils import EventOverlap
from . import cost
from .events import event_and_hook
from .expert_rows import ExpertRows
from .rank_rows import RankRows
from .runtime import OfOps
from .two_steps import issue

Handle = LowLatencyHandle | PaddedHandle


def rows_of(handle: Handle) -> type[ExpertRows] | type[RankRows]:
    """The contract of the rows that came with the handle."""
    return RankRows if isinstance(handle, PaddedHandle) else ExpertRows


class LowLatencyOfOps(OfOps, LowLatencyEPCommStrategy):
    """Low latency over one overload of the ops."""

    def get_supported_modes(self) -> list[str]:
        return ["low_latency"]

    @collective("low_latency_dispatch")
    def low_latency_dispatch(
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
        dispatch_wait_recv_cost_stats: Tensor | None = None,
        x_active_mask: Tensor | None = None,
    ) -> tuple[Rows, Tensor, Handle, EventOverlap, Callable[[], None]]:
        """As `Buffer.low_latency_dispatch`."""
        info = self._live()
        cost.check("dispatch_wait_recv_cost_stats", dispatch_wait_recv_cost_stats, self.group_size)
        x, topk_idx = flat(x, dispatch_op.active(topk_idx, x_active_mask))
        _check_one_way(async_finish, return_recv_hook)
        quant_mode = self.runtime.low_latency_mode(quant_mode, use_fp8, use_ue8m0, use_mxfp4)
        stats, L = cumulative_local_expert_recv_stats, num_experts // info.size
        if stats is not None and (stats.dtype != torch.int32 or stats.shape != (L,)):
            raise ValueError(
                f"cumulative_local_expert_recv_stats must be torch.int32 [{L}], got {stats.dtype} {list(stats.shape)}"
            )
        options = {"low_latency": True}
        if quant_mode == "block_fp8_e4m3":
            options |= {"round_scale": round_scale, "use_ue8m0": use_ue8m0}
        sent: tuple[Tensor, Tensor] | None = None
        if quant_mode != "none":
            if self._straight_through:
                x = quantization.straight_through(x, quant_mode, **options)
            elif x.requires_grad and torch.is_grad_enabled():
                raise RuntimeError(
                    f"low_latency_dispatch: x requires a gradient, and quantised rows ({quant_mode}) have none; make "
                    'the Buffer with straight_through=True, or pass quant_mode="none"'
                )
            elif self.contract.is_quantised_by_kernel(info, x, quant_mode):
                return self._dispatch_int8(
                    *(info, x, topk_idx, num_max_dispatch_tokens_per_rank, num_experts, stats),
                    *(async_finish, return_recv_hook),
                )
            else:
                sent = quantization.quantize(x, quant_mode, **options)
                x = quantization.pack(*sent)
        calls.form(quantization.described(x if sent is None else sent))
        sizes = num_max_dispatch_tokens_per_rank, num_experts
        plan = self.contract.low_latency_dispatch(info, x, topk_idx, sent, *sizes)
        overlaps, cost_stats = self._goes_on(x, async_finish or return_recv_hook), dispatch_wait_recv_cost_stats
        results, wait = issue(plan, overlaps, None, cost_stats, self.rank)

        def complete() -> None:
            if wait is not None:
                wait()
            if stats is not None:
                stats.add_(results[1].to(torch.int32))

        if wait is None:
            complete()
        return *results, *event_and_hook(async_finish, None if wait is None else complete)

    def _dispatch_int8(
        self,
        info: GroupInfo,
        x: Tensor,
        topk_idx: Tensor,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        stats: Tensor | None,
        async_finish: bool,
        return_recv_hook: bool,
    ) -> tuple[Rows, Tensor, Handle, EventOverlap, Callable[[], None]]:
        """Where the kernel quantises. The host waits for nothing, so that a hook has nothing left to receive."""
        out, scales = dispatch_int8_op.call(info, x, topk_idx, num_max_dispatch_tokens_per_rank, num_experts)
        if stats is not None:
            stats.add_(out.recv_count.to(torch.int32))
        return (out.recv_x, scales), out.recv_count, out.handle, *event_and_hook(async_finish, None)

    @collective("low_latency_combine")
    def low_latency_combine(
        self,
        x: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor,
        handle: Handle,
        zero_copy: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        out: Tensor | None = None,
        use_logfmt: bool = False,
        combine_wait_recv_cost_stats: Tensor | None = None,
        x_active_mask: Tensor | None = None,
    ) -> tuple[Tensor, EventOverlap, Callable[[], None]]:
        """As `Buffer.low_latency_combine`."""
        topk_idx = dispatch_op.active(topk_idx, x_active_mask)
        _check_one_way(async_finish, return_recv_hook)
        plan = rows_of(handle).low_latency_combine(self._live(), x, topk_idx, topk_weights, handle)
        stats = combine_wait_recv_cost_stats
        cost.check("combine_wait_recv_cost_stats", stats, self.group_size)
        if out is not None:
            T, *others = *topk_idx.shape[:-1], x.shape[-1]
            if out.dim() == 0 or out.shape[0] < T or list(out.shape[1:]) != others or out.dtype != x.dtype:
                raise ValueError(f"out must be {x.dtype} {[T, *others]}, got {out.dtype} {list(out.shape)}")
            if out.requires_grad and out.is_leaf and torch.is_grad_enabled():
                raise ValueError("out must not be a leaf that requires a gradient: it is written to")
        overlaps = self._goes_on(x, async_finish or return_recv_hook)
        into = None if out is None else out[: topk_idx.shape[0]]
        combined, wait = issue(plan, overlaps, into, stats, self.rank)
        return combined, *event_and_hook(async_finish, wait)

    def _goes_on(self, x: Tensor, is_asked: bool) -> bool:
        """Whether a call goes on when it returns. On an NPU no call waits for peers."""
        return self._overlaps(is_asked) and x.device.type != "npu"


def _check_one_way(async_finish: bool, return_recv_hook: bool) -> None:
    if async_finish and return_recv_hook:
        raise ValueError("async_finish and return_recv_hook must not both be True: a call has an event or a hook")


def window_bytes(num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int) -> int:
    """As `Buffer.get_low_latency_rdma_size_hint`."""
    _check_positive(
        num_max_dispatch_tokens_per_rank=num_max_dispatch_tokens_per_rank,
        hidden=hidden,
        num_ranks=num_ranks,
        num_experts=num_experts,
    )
    if num_experts % num_ranks:
        raise ValueError(f"num_experts ({num_experts}) must be divisible by num_ranks ({num_ranks})")
    num_bytes = 2 * num_experts * num_max_dispatch_tokens_per_rank * (2 * hidden + 16)
    return (num_bytes + 127) // 128 * 128


def _check_positive(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name} must be positive, got {number}")
