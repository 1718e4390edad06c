"""The low-latency calls of deep_ep.Buffer. Dynamo traces through them.

T local tokens · H hidden · K top-k · E experts · R ranks · L = E/R local experts ·
M num_max_dispatch_tokens_per_rank · N = R·M·min(K, L) packed rows.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import calls, cost, quantization
from .arguments import flat
from .checks import differ
from .collective import collective
from .ep_strategy import LowLatencyEPCommStrategy, Rows
from .groups import GroupInfo
from .ops import low_latency_combine as combine_op
from .ops import low_latency_combine_padded as padded_combine_op
from .ops import low_latency_dispatch as dispatch_op
from .ops import low_latency_dispatch_int8 as dispatch_int8_op
from .ops import low_latency_dispatch_padded as padded_dispatch_op
from .ops.low_latency_dispatch import LowLatencyHandle
from .ops.low_latency_dispatch_padded import PaddedHandle, PaddedOutput
from .overlap import Plan, issue
from .runtime import OfOps, Runtime, is_of_ops, of_strategy
from .utils import EventHandle, EventOverlap

Handle = LowLatencyHandle | PaddedHandle


class LowLatencyCalls:
    """What Buffer inherits for decoding."""

    _low_latency: Any
    runtime: Runtime | None
    _rows: str

    def _live(self) -> GroupInfo:
        raise NotImplementedError

    def _begin(self, strategy: Any) -> Any:
        raise NotImplementedError

    @collective(of_strategy("low_latency_strategy", "low_latency_dispatch"), is_typed=False)
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
        """Sends every token once to each of its experts, with static shapes.

        Args:
            x: [T, H] bf16, fp16 or fp32, 0 <= T <= M.
            topk_idx: [T, K] of any integer dtype, expert ids 0..E-1, or -1 for none; a token's ids must be distinct.
            num_max_dispatch_tokens_per_rank: M, the same on all ranks.
            num_experts: E, a multiple of R.
            cumulative_local_expert_recv_stats: int32 [L]; the rows of each local expert are added to it.
            use_fp8: send quantised rows: under rows="expert" int8 with one scale per row, or mx_fp8_e4m3 with
                use_ue8m0; under rows="rank" float8_e4m3fn with one scale per 128 channels. No effect with
                SGLANG_DEEPEP_BF16_DISPATCH=1.
            round_scale, use_ue8m0: scales of the latter, see `deep_ep.quantization.quantize`; other modes have their
                own.
            use_mxfp4: send mx_fp4_e2m1 rows instead.
            async_finish: under rows="rank" the call does not wait for peers; the event does. What the call returned is
                undefined until then, in any grad mode and thread; cumulative_local_expert_recv_stats is added to there.
                x and topk_idx must not be written to before, which is a RuntimeError of the event; in inference mode
                copies are sent. What is wrong on other ranks is raised by the event, too. Every rank waits for it
                before it uses what the call returned; other calls of the group wait for a call that has been started.
                Under rows="expert" the call is finished when it returns, as programs that never wait expect.
            return_recv_hook: the same with a hook instead of an event; only one of the two may be asked for.
            topk_weights: accepted for compatibility; low_latency_combine takes them.
            quant_mode: one of deep_ep.quantization.MODES instead of what use_fp8, use_mxfp4 and
                SGLANG_DEEPEP_BF16_DISPATCH say.
            dispatch_wait_recv_cost_stats: as in `dispatch`. Unchanged where the op itself quantises.
            x_active_mask: bool [T], None for all: the tokens that are sent. With it, low_latency_combine wants it, too.

        Returns:
            recv_x: under rows="expert" [N, H], ordered by local expert, source rank, token, without gaps; under
                rows="rank" [L, R·M, H]. Rows that hold nothing are 0; under rows="expert" without grad mode they hold
                anything. Quantised: (data, scales) with scales [N], [N·H/32] (MX) or [N, H/128]; rows="rank":
                [L, R·M], [L, R·M, H/32] or [L, R·M, H/128].
            recv_count: int64 [L] (rows="rank": int32 [L]).
            handle: for low_latency_combine.
            event, and hook, which waits for the same and may always be called.

        Raises:
            RuntimeError: as `deep_ep.low_latency_dispatch`; x requires a gradient, rows are quantised and the Buffer
                was not made with straight_through=True (with it, recv_x is always one tensor in x's dtype, of
                dequantised values); after `destroy`.
            ValueError: an unknown quant_mode; H does not suit it; cumulative_local_expert_recv_stats or x_active_mask
                has another shape or dtype; both async_finish and return_recv_hook.
        """
        more: dict[str, Any] = {}
        if dispatch_wait_recv_cost_stats is not None:
            more["dispatch_wait_recv_cost_stats"] = dispatch_wait_recv_cost_stats
        if x_active_mask is not None:
            more["x_active_mask"] = x_active_mask
        strategy = self._begin(self._low_latency)
        if not is_of_ops(strategy):
            assert self.runtime is not None
            flags = use_fp8, use_ue8m0, use_mxfp4
            quant_mode = mode_of(quant_mode, *flags, rows=self._rows, as_bf16=self.runtime.bf16_low_latency)
            quant_mode = None if quant_mode == "none" else quant_mode
        return strategy.low_latency_dispatch(
            x=x,
            topk_idx=topk_idx,
            num_max_dispatch_tokens_per_rank=num_max_dispatch_tokens_per_rank,
            num_experts=num_experts,
            cumulative_local_expert_recv_stats=cumulative_local_expert_recv_stats,
            use_fp8=use_fp8,
            round_scale=round_scale,
            use_ue8m0=use_ue8m0,
            use_mxfp4=use_mxfp4,
            async_finish=async_finish,
            return_recv_hook=return_recv_hook,
            topk_weights=topk_weights,
            quant_mode=quant_mode,
            **more,
        )

    @collective(of_strategy("low_latency_strategy", "low_latency_combine"), is_typed=False)
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
        """Sums up each token's rows with its weights, in fp32, in the order of k, rounded once.

        Args:
            x: the experts' results in the shape and row order of low_latency_dispatch's recv_x; bf16, fp16 or fp32.
            topk_idx: [T, K], as given to low_latency_dispatch.
            topk_weights: [T, K] fp32, bf16 or fp16, which becomes fp32.
            handle: of that low_latency_dispatch.
            zero_copy: x is, or equals, what get_next_low_latency_combine_buffer gave. On CPU rows go from any x
                straight into the windows of their tokens' ranks, so that there is no copy to be saved.
            async_finish, return_recv_hook: as in low_latency_dispatch; under rows="rank" combined_x is there after
                the event or hook.
            out: [T, H] in x's dtype, to be written to and returned; of a longer one the first T rows are.
            use_logfmt: accepted for compatibility; upstream may then send rows in 10 bits a value, here they travel as
                they are.
            combine_wait_recv_cost_stats: as dispatch_wait_recv_cost_stats.
            x_active_mask: as given to low_latency_dispatch. combined_x is 0 for tokens that it leaves out.

        Returns:
            combined_x [T, H], event, hook.

        Raises:
            RuntimeError: as `deep_ep.low_latency_combine`.
            ValueError: out or x_active_mask has another shape or dtype; both async_finish and return_recv_hook.
        """
        more: dict[str, Any] = {}
        if use_logfmt:
            more["use_logfmt"] = use_logfmt
        if combine_wait_recv_cost_stats is not None:
            more["combine_wait_recv_cost_stats"] = combine_wait_recv_cost_stats
        if x_active_mask is not None:
            more["x_active_mask"] = x_active_mask
        return self._begin(self._low_latency).low_latency_combine(
            x=x,
            topk_idx=topk_idx,
            topk_weights=topk_weights,
            handle=handle,
            zero_copy=zero_copy,
            async_finish=async_finish,
            return_recv_hook=return_recv_hook,
            out=out,
            **more,
        )

    def get_next_low_latency_combine_buffer(self, handle: Handle) -> Tensor:
        """An uninitialised bf16 tensor for the experts' results, of the shape that low_latency_combine takes.

        It belongs to the caller: nothing else writes to it.
        """
        M, H, E = handle[2], handle[3], handle[4]
        shape: tuple[int, ...] = (handle.src_info.shape[0], H)
        if isinstance(handle, PaddedHandle):
            R = self._live().size
            shape = (E // R, R * M, H)
        return handle.src_info.new_empty(shape, dtype=torch.bfloat16)


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
        flags = use_fp8, use_ue8m0, use_mxfp4
        quant_mode = mode_of(quant_mode, *flags, rows=self._rows, as_bf16=self.runtime.bf16_low_latency)
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
            elif quant_mode == "int8" and self._rows == "expert" and dispatch_int8_op.is_for(info, x):
                return self._dispatch_int8(
                    *(info, x, topk_idx, num_max_dispatch_tokens_per_rank, num_experts, stats),
                    *(async_finish, return_recv_hook),
                )
            else:
                sent = quantization.quantize(x, quant_mode, **options)
                x = quantization.pack(*sent)
        calls.form(quantization.described(x if sent is None else sent))
        plan = self._dispatch_plan(info, x, topk_idx, sent, num_max_dispatch_tokens_per_rank, num_experts)
        overlaps, cost_stats = self._goes_on(x, async_finish or return_recv_hook), dispatch_wait_recv_cost_stats
        results, wait = issue(plan, overlaps, None, cost_stats, self.rank)

        def complete() -> None:
            if wait is not None:
                wait()
            if stats is not None:
                stats.add_(results[1].to(torch.int32))

        if wait is None:
            complete()
        return *results, *_event_and_hook(async_finish, None if wait is None else complete)

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
        return (out.recv_x, scales), out.recv_count, out.handle, *_event_and_hook(async_finish, None)

    def _dispatch_plan(
        self, info: GroupInfo, x: Tensor, topk_idx: Tensor, sent: tuple[Tensor, Tensor] | None, M: int, num_experts: int
    ) -> Plan:
        """`sent`: the (data, scales) that rows of x hold. The results are recv_x, recv_count and handle."""
        hidden = x.shape[-1]
        if sent is not None:
            data = sent[0]
            hidden = data.shape[1] * (2 if data.dtype == torch.float4_e2m1fn_x2 else 1)
        if self._rows == "expert":

            def received(out: dispatch_op.LowLatencyOutput) -> tuple[Rows, Tensor, LowLatencyHandle]:
                rows: Rows = out.recv_x
                if sent is not None:
                    data, scales = quantization.unpack(out.recv_x, *sent)
                    rows = data, quantization.in_one_row(scales)
                return rows, out.recv_count, out.handle._replace(hidden=hidden)

            return Plan(dispatch_op, [(info, x, topk_idx, M, num_experts)], received)

        def padded(out: PaddedOutput) -> tuple[Rows, Tensor, PaddedHandle]:
            rows = out.recv_x if sent is None else (out.recv_x, out.recv_scales)
            return rows, out.recv_count, out.handle

        parts = [] if sent is None else list(sent)
        return Plan(padded_dispatch_op, [(info, x, topk_idx, parts, M, num_experts, hidden)], padded)

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
        op: Any = combine_op
        packed = handle
        if isinstance(handle, PaddedHandle):
            op, packed = padded_combine_op, handle.packed
            R, M, L = self.group_size, handle.num_max_dispatch_tokens_per_rank, handle.num_experts // self.group_size
            if x.dim() != 3 or differ(x.shape[0], L) or differ(x.shape[1], R * M):
                raise ValueError(
                    f"x must have the shape [L, R·M, H] of low_latency_dispatch's recv_x with L = {L} and "
                    f"R·M = {R * M}, got {list(x.shape)}"
                )
            x = x.contiguous()
        call = self._live(), x, topk_idx, topk_weights, LowLatencyHandle(*packed)
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
        combined, wait = issue(Plan(op, [call], lambda result: result), overlaps, into, stats, self.rank)
        return combined, *_event_and_hook(async_finish, wait)

    def _goes_on(self, x: Tensor, is_asked: bool) -> bool:
        """Whether a call goes on when it returns. On an NPU no call waits for peers."""
        return self._overlaps(is_asked) and x.device.type != "npu"


def mode_of(
    quant_mode: str | None, use_fp8: bool, use_ue8m0: bool, use_mxfp4: bool, *, rows: str, as_bf16: bool
) -> str:
    """One of quantization.MODES: quant_mode, or what the flags mean under the row contract; as_bf16: rows as they
    are."""
    if quant_mode is None:
        quantised = "mx_fp8_e4m3" if use_ue8m0 else "int8"
        if use_mxfp4:
            quantised = "mx_fp4_e2m1"
        elif rows == "rank":
            quantised = "block_fp8_e4m3"
        quant_mode = quantised if (use_fp8 or use_mxfp4) and not as_bf16 else "none"
    return quantization.check_mode(quant_mode)


def _check_one_way(async_finish: bool, return_recv_hook: bool) -> None:
    if async_finish and return_recv_hook:
        raise ValueError("async_finish and return_recv_hook must not both be True: a call has an event or a hook")


def _event_and_hook(async_finish: bool, complete: Callable[[], None] | None) -> tuple[EventOverlap, Callable[[], None]]:
    """What a call returns for `complete`, which ends it if it goes on. Both may be called any number of times."""
    handle = EventHandle(complete)
    return EventOverlap(handle if async_finish else None), handle.current_stream_wait
