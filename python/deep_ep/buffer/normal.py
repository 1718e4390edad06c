"""Normal mode of Buffer over the ops of this library. Dynamo traces through it.

T local tokens · H hidden · K top-k · E experts · R ranks · N received rows.
"""

from typing import Any

import torch
from torch import Tensor

from .. import calls, quantization
from ..arguments import adapted
from ..collective import collective
from ..config import Config
from ..ep_strategy import NormalEPCommStrategy, Rows
from ..groups import GroupInfo
from ..ops import combine as combine_op
from ..ops import dispatch as dispatch_op
from ..ops import dispatch_int8 as dispatch_int8_op
from ..ops import get_dispatch_layout as layout_op
from ..ops.dispatch import DispatchHandle
from ..utils import EventOverlap
from . import cost
from .events import begin_after, event_of
from .expert_rows import AlignedHandle, InternodeHandle
from .rank_rows import RankHandle
from .rows import Routing
from .runtime import OfOps, ops_of_combine, ops_of_dispatch
from .two_steps import Plan, issue

Handle = DispatchHandle | AlignedHandle | InternodeHandle | RankHandle


class NormalOfOps(OfOps, NormalEPCommStrategy):
    """Normal mode over one overload of the ops."""

    def get_supported_modes(self) -> list[str]:
        return ["normal"]

    @adapted
    def get_dispatch_layout(
        self,
        topk_idx: Tensor,
        num_experts: int,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor, EventOverlap]:
        """As `Buffer.get_dispatch_layout`."""
        begin_after(previous_event, async_finish, allocate_on_comm_stream)
        per_rank, _, per_expert, in_rank = layout_op.call(self._live(), topk_idx, num_experts)
        per_expert, in_rank = self.contract.layout(topk_idx, per_expert, in_rank)
        self.runtime.keep_layout(topk_idx, num_experts)
        return per_rank, None, per_expert, in_rank, event_of(async_finish)

    @collective(ops_of_dispatch)
    def dispatch(
        self,
        x: Rows,
        handle: Handle | None = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
        dispatch_wait_recv_cost_stats: Tensor | None = None,
        quant_mode: str | None = None,
    ) -> tuple[Rows, Tensor | None, Tensor | None, list[int] | Tensor | None, Handle, EventOverlap]:
        """As `Buffer.dispatch`."""
        info = self._live()
        begin_after(previous_event, async_finish, allocate_on_comm_stream)
        if expert_alignment < 1:
            raise ValueError(f"expert_alignment must be at least 1, got {expert_alignment}")
        cost.check("dispatch_wait_recv_cost_stats", dispatch_wait_recv_cost_stats, self.group_size)
        routing = Routing(
            *(num_tokens_per_rank, is_token_in_rank, num_tokens_per_expert, topk_idx, topk_weights),
            *(expert_alignment, num_worst_tokens),
        )
        self._check_routing(routing, handle is not None)
        rows, packed = self._rows_to_send(info, x, quant_mode, handle is not None)
        routed = "of a handle" if handle is not None else "without topk_idx" if topk_idx is None else "with topk_idx"
        if topk_idx is None and num_worst_tokens != 0:
            routed += ", with num_worst_tokens"
        described = quantization.described(x if packed is None else packed)
        calls.form(f'{described} under rows="{self.contract.name}" {routed}')
        if handle is None:
            plan = self.contract.dispatch(info, rows, routing)
        else:
            self._check_handles(info, handle, self._overlaps(async_finish))
            plan = self.contract.cached_dispatch(info, rows, handle)

        def received(*outs: Any) -> tuple[Any, ...]:
            recv_x, *others = plan.received(*outs)
            if packed is None:
                return recv_x, *others
            data, scales = quantization.unpack(recv_x, *packed)
            return (data, self.contract.scales(scales)), *others

        # Where the kernel quantises, the host waits for nothing anyway.
        goes_on = (handle is not None or num_worst_tokens != 0) and isinstance(rows, Tensor)
        sends = plan._replace(received=received, arranges=plan.arranges and packed is None)
        return self._issue(sends, async_finish, dispatch_wait_recv_cost_stats, goes_on)

    @collective(ops_of_combine)
    def combine(
        self,
        x: Tensor,
        handle: Handle,
        topk_weights: Tensor | None = None,
        bias: Tensor | tuple[Tensor, Tensor] | None = None,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
        combine_send_cost_stats: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, EventOverlap]:
        """As `Buffer.combine`."""
        info = self._live()
        begin_after(previous_event, async_finish, allocate_on_comm_stream)
        cost.check("combine_send_cost_stats", combine_send_cost_stats, self.group_size)
        biases = () if bias is None else bias if isinstance(bias, tuple) else (bias,)
        _check_biases(biases, x, self.contract.tokens(handle))
        calls.form(self.contract.form_of_combine(topk_weights))
        plan = self.contract.combine(info, x, handle, topk_weights)

        def received(*outs: Tensor) -> tuple[Any, ...]:
            combined, combined_weights = plan.received(*outs[: len(plan.calls)])
            if biases:
                total = combined.to(torch.float32)
                for one in outs[len(plan.calls) :]:
                    total = total + one
                combined = total.to(x.dtype)
            return combined, combined_weights

        sums = plan._replace(received=received, inputs=biases, arranges=plan.arranges and len(biases) == 0)
        return self._issue(sums, async_finish, combine_send_cost_stats)

    def _check_routing(self, routing: Routing, is_cached: bool) -> None:
        """ValueError: it is said twice where the tokens go, or not at all."""
        if is_cached:
            for name in Routing._fields[:5]:
                if getattr(routing, name) is not None:
                    raise ValueError(f"{name} must be None with a handle, which has the routing")
            for name, only in (("num_worst_tokens", 0), ("expert_alignment", 1)):
                given = getattr(routing, name)
                if given != only:
                    raise ValueError(f"{name} must be {only} with a handle, whose rows count; got {given}")
            return
        for name in self.contract.needs:
            if getattr(routing, name) is None:
                raise ValueError(f"{name} is missing; get_dispatch_layout gives the layout of topk_idx")

    def _check_handles(self, info: GroupInfo, handle: Handle, overlaps: bool) -> None:
        """All ranks must have handles of one dispatch, which combine finds out, of rows of the least size that an NPU
        moves.
        """
        known = self.contract.op_handle(handle)
        known = known._replace(topk_weights=torch.ones_like(known.topk_idx, dtype=torch.float32))
        nothing = known.recv_src_idx.new_zeros((known.recv_src_idx.shape[0], 8), dtype=torch.float32)
        if overlaps and not torch.compiler.is_compiling():
            combine_op.start(info, nothing, known)  # where it fails, so does what is started next
        else:
            combine_op.call(info, nothing, known)

    def _issue(self, plan: Plan, async_finish: bool, stats: Tensor | None, goes_on: bool = True) -> tuple[Any, ...]:
        """The results and the event; stats get what was waited."""
        results, wait = issue(plan, self._overlaps(async_finish) and goes_on, None, stats, self.rank)
        return *results, event_of(async_finish, wait)

    def _rows_to_send(
        self, info: GroupInfo, x: Rows, quant_mode: str | None, cached: bool
    ) -> tuple[Tensor | dispatch_op.AsInt8, tuple[Tensor, Tensor] | None]:
        """What dispatch is to send for x, and the (data, scales) that it is packed from, if it is."""
        if quant_mode is not None:
            quant_mode = quantization.check_mode(quant_mode)
        if isinstance(x, tuple):
            data, scales = x
            named = quantization.named_by(scales, data)
            if quant_mode is not None and (named is not None or quant_mode != "none"):
                raise ValueError(
                    "quant_mode must be None for x that is quantised already, or names what it is to be quantised to; "
                    f"got {quant_mode!r}"
                )
            if named is None:
                if torch.is_grad_enabled() and (data.requires_grad or scales.requires_grad):
                    raise RuntimeError(
                        "deep_ep: quantised x has no gradient; give x itself to a Buffer made with "
                        "straight_through=True"
                    )
                scales = quantization.by_rows(scales, data)
                return quantization.pack(data, scales), (data, scales)
            x, quant_mode = data, named
        mode = quant_mode or ("none" if cached else self.runtime.quant_mode)
        if mode == "none":
            return x, None
        if self._straight_through:
            return quantization.straight_through(x, mode), None
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"deep_ep: x requires a gradient, which quant_mode {mode} does not have; "
                "make the Buffer with straight_through=True"
            )
        if mode == "int8" and dispatch_int8_op.is_for(info, x):
            return dispatch_op.AsInt8(x), None
        data, scales = quantization.quantize(x, mode)
        return quantization.pack(data, scales), (data, scales)


def _check_biases(biases: tuple[Tensor, ...], x: Tensor, tokens: torch.Size) -> None:
    if len(biases) > 2:
        raise ValueError(f"bias must be a tensor or two of them, got {len(biases)}")
    for one in biases:
        if one.dtype != x.dtype or one.shape != (*tokens, x.shape[1]):
            raise ValueError(
                f"bias must be {x.dtype} [T, H] = {[*tokens, x.shape[1]]}, got {one.dtype} {list(one.shape)}"
            )
