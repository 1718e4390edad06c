"""deep_ep.Buffer: what its calls take and give. What they do is in the other files of this folder.

Dynamo traces through its methods.

T local tokens · H hidden · K top-k · E experts · R ranks · L = E/R local experts · N received rows.
"""

import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from .. import calls, env, profile
from ..collective import collective
from ..config import Config
from ..ep_strategy import MODES, Rows, get_low_latency_strategy, get_normal_strategy
from ..groups import GroupInfo, spoil
from ..ops import fused_deep_moe as fused_op
from ..process_groups import Group
from ..utils import EventHandle, EventOverlap
from ..weights import FusedWeights, FuseMode
from ..windows import finalize_here
from . import call_log, fused_deep_moe, not_here, notify
from .low_latency import Handle as LowHandle
from .low_latency import rows_of, window_bytes
from .normal import Handle
from .runtime import Runtime, is_of_ops, of_strategy, ops_of_combine, ops_of_dispatch


class Buffer:
    """Expert-parallel communication for one group of ranks.

    Making a Buffer is collective and happens outside of compiled code. Several may exist at once, also of one group;
    they share the group's windows. Strategies are for the Buffer's own calls, and for functions only where nothing else
    has prepared the group.

    There are two contracts of what a row is. Under rows="expert" (that of DeepEP-Ascend) dispatch gives one row per
    (token, expert), ordered by local expert, source rank, token, k, and combine weights them. Under rows="rank" (that
    of upstream DeepEP) it gives one row per (token, rank), ordered by source rank, token, and combine is the plain
    sum, of weights as well if they are given.

    Args:
        group: the expert-parallel group: a ProcessGroup, a DeviceMesh of one dimension, or a group's name.
        num_nvl_bytes: most bytes of each rank's window, 0 for the default (`num_bytes` of `deep_ep.init`). Larger
            messages go in rounds.
        num_rdma_bytes: as num_nvl_bytes, for clients that size the buffer with it; the larger one counts.
        low_latency_mode, num_qps_per_rank, allow_nvlink_for_low_latency_mode, allow_mnnvl, meta_addr, use_fabric:
            accepted for compatibility; they concern links that a CPU does not have.
        normal_strategy, low_latency_strategy: the name of one, which is "default", "alltoall", "ops" for low latency,
            or registered by the program (`deep_ep.ep_strategy`); None is what DEEP_USE_MODE says. The attributes of
            these names are the strategies themselves.
        explicitly_destroy: the caller will call `destroy`, or leave a `with` block; a Buffer that goes without is told
            of in a RuntimeWarning. Others may be destroyed, and need not be.
        enable_shrink: must be False: all ranks of a group take part in every call.
        comm: must be None: ranks meet in a ProcessGroup.
        rows: "expert" or "rank"; None is what DEEP_EP_ROWS says.
        comm_alg: as in `deep_ep.init`, for the strategy ops; None is hierarchy, as in DeepEP-Ascend.
        straight_through: quantised dispatch gives one tensor of dequantised rows, with the identity as its gradient.

    A copy of a Buffer, as in a deepcopy of a module that has one, is the Buffer itself, since it stands for a group.
    One that was pickled comes back without its group: a module with it can be saved and loaded, and gets a new Buffer
    before it communicates again.

    What no argument says is read from the environment when the Buffer is made: see `deep_ep.env`.

    Raises:
        ValueError: a negative size, a choice that does not exist, with its name, or a wrong value in the environment.
        RuntimeError: as `deep_ep.init`.
    """

    num_sms: int = 20

    def __init__(
        self,
        group: Group,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 12,
        allow_nvlink_for_low_latency_mode: bool = True,
        allow_mnnvl: bool = False,
        normal_strategy: Any = None,
        low_latency_strategy: Any = None,
        *,
        meta_addr: int = 0,
        explicitly_destroy: bool = False,
        use_fabric: bool = False,
        enable_shrink: bool = False,
        comm: Any = None,
        rows: str | None = None,
        straight_through: bool = False,
        comm_alg: str | None = None,
    ) -> None:
        _check_arguments(group, num_nvl_bytes, num_rdma_bytes, enable_shrink, comm)
        normal = _class_of(normal_strategy, get_normal_strategy, 0)
        low_latency = _class_of(low_latency_strategy, get_low_latency_strategy, 1)
        num_bytes = max(num_nvl_bytes, num_rdma_bytes) or None
        self.runtime: Runtime | None = Runtime(group, rows, straight_through, comm_alg, num_bytes)
        self.group = self.runtime.group
        self.rank = self.runtime.rank
        self.group_size = self.runtime.size
        self.explicitly_destroy = explicitly_destroy
        self.enable_shrink = enable_shrink
        is_logged = env.value("DEBUG_MODE").upper() == "ON"
        self.num_nvl_bytes = num_nvl_bytes
        self.num_rdma_bytes = num_rdma_bytes
        self.low_latency_mode = low_latency_mode
        self._info = self.runtime.prepare(_overload_of(normal, 0), _overload_of(low_latency, 1))
        self.normal_strategy, self.low_latency_strategy = normal, low_latency
        if explicitly_destroy:
            self._undestroyed = finalize_here(self, _warn_of_undestroyed, self.group.group_name, *_caller())
        if is_logged:
            call_log.start(self, self.group.group_name)
            spoil(self._info)

    @staticmethod
    def set_num_sms(new_num_sms: int) -> None:
        """Sets the num_sms of the configs that get_dispatch_config and get_combine_config return; even, positive."""
        if new_num_sms <= 0 or new_num_sms % 2:
            raise ValueError(f"new_num_sms must be positive and even, got {new_num_sms}")
        Buffer.num_sms = new_num_sms

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        """A config for dispatch among num_ranks ranks, any number of them."""
        return _config(num_ranks)

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        """A config for combine among num_ranks ranks, any number of them."""
        return _config(num_ranks)

    @staticmethod
    def capture() -> EventOverlap:
        """The work issued so far, as an event for `previous_event`. A call with async_finish is no part of it before
        its own event has been waited for."""
        return EventOverlap(EventHandle())

    @staticmethod
    def get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
    ) -> int:
        """Bytes of a window that holds a low-latency dispatch and its combine in one round, in bf16.

        Every one of the E/R local experts may get M = num_max_dispatch_tokens_per_rank rows of each of R ranks, on
        the way there and on the way back: 2 * E * M * (2 * hidden + 16) bytes, with 16 for a row's source, rounded up
        to a multiple of 128.

        ValueError: a number is not positive, or num_experts is not divisible by num_ranks.
        """
        return window_bytes(num_max_dispatch_tokens_per_rank, hidden, num_ranks, num_experts)

    def clean_low_latency_buffer(self, num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int) -> None:
        """Nothing to clean: no op leaves anything in a window that the next one could take for its own.

        ValueError: a number is not positive, or num_experts is not divisible by R. RuntimeError: after `destroy`.
        """
        self._live()
        self.get_low_latency_rdma_size_hint(num_max_dispatch_tokens_per_rank, hidden, self.group_size, num_experts)

    def destroy(self) -> None:
        """Ends the use of this Buffer; its methods that communicate raise RuntimeError from here on.

        The windows stay, for other users of the group, until the group goes or `deep_ep.destroy`.
        """
        if self.runtime is not None:
            self.runtime.is_destroyed = True
        if self.explicitly_destroy:
            self._undestroyed.detach()

    def __enter__(self) -> "Buffer":
        return self

    def __exit__(self, *_: object) -> None:
        self.destroy()

    def _used(self) -> Runtime:
        """RuntimeError: this Buffer has no group any more."""
        if self.runtime is None:
            raise RuntimeError("deep_ep: this Buffer was pickled, and has no group since; make another one")
        self.runtime.check()
        return self.runtime

    def _live(self) -> GroupInfo:
        self._used()
        return self._info

    @property
    def normal_strategy(self) -> Any:
        """What get_dispatch_layout, dispatch and combine go by. May be assigned, on all ranks, between calls: an object
        with these methods, or the class or the name of one. ValueError: it is none, or of another group or of other
        rows.
        """
        return self._normal

    @normal_strategy.setter
    def normal_strategy(self, strategy: Any) -> None:
        methods = "get_dispatch_layout", "dispatch", "combine"
        self._normal = self._used().strategy("normal_strategy", strategy, get_normal_strategy, methods)
        if is_of_ops(self._normal):
            self._info = replace(self._info, normal=self._normal.info.normal)

    @property
    def low_latency_strategy(self) -> Any:
        """The same of low_latency_dispatch and low_latency_combine."""
        return self._low_latency

    @low_latency_strategy.setter
    def low_latency_strategy(self, strategy: Any) -> None:
        methods = "low_latency_dispatch", "low_latency_combine"
        self._low_latency = self._used().strategy("low_latency_strategy", strategy, get_low_latency_strategy, methods)
        if is_of_ops(self._low_latency):
            info = self._low_latency.info
            self._info = replace(self._info, low_latency=info.low_latency, comm_alg=info.comm_alg)

    def _begin(self, strategy: Any) -> Any:
        """The strategy, for a call. What fails in a program's own is for that to tell the other ranks."""
        self._live()
        if not is_of_ops(strategy):
            calls.leave()
        return strategy

    def __copy__(self) -> "Buffer":
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "Buffer":
        return self

    def __getstate__(self) -> dict[str, Any]:
        """What a pickle has of it: all that is of no group, of no other object and of no process."""
        plain = {name: value for name, value in vars(self).items() if isinstance(value, bool | int | str | Enum)}
        gone = dict.fromkeys(("group", "runtime", "_info", "_normal", "_low_latency"))
        return plain | gone | {"explicitly_destroy": False}

    def get_dispatch_layout(
        self,
        topk_idx: Tensor,
        num_experts: int,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor, EventOverlap]:
        """As `deep_ep.get_dispatch_layout`, with an event behind its results.

        is_token_in_rank [T, R] is int32 under rows="expert" and bool under rows="rank". num_tokens_per_expert is
        [rounds·E] under rows="expert" with DEEPEP_NORMAL_LONG_SEQ_ROUND. Ranks do not communicate: after previous_event
        has been waited for, the call is finished when it returns.

        ValueError: allocate_on_comm_stream without previous_event or without async_finish; T is larger than the rounds.
        """
        return self._begin(self._normal).get_dispatch_layout(
            topk_idx=topk_idx,
            num_experts=num_experts,
            previous_event=previous_event,
            async_finish=async_finish,
            allocate_on_comm_stream=allocate_on_comm_stream,
        )

    @collective(of_strategy("normal_strategy", ops_of_dispatch), is_typed=False)
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
        """Sends every token once to each of its experts (rows="expert") or to each of their ranks (rows="rank").

        Differentiable in x and topk_weights.

        Args:
            x: [T, H] bf16, fp16 or fp32; or (data [T, D], scales [T], [T, S] or, for MX formats, [T·H/32])
                of any dtypes, rows that are quantised already; or (x, marker), where x is not quantised and the dtype
                of marker, whose values and shape do not matter, says to what it is to be: torch.int8, or that of the
                data of an MX format.
            topk_idx, topk_weights, num_worst_tokens: as in `deep_ep.dispatch`. Under rows="rank", topk_idx=None
                sends rows without metadata.
            num_tokens_per_rank, is_token_in_rank, num_tokens_per_expert: from get_dispatch_layout of the same topk_idx;
                num_tokens_per_expert's length is E, times the rounds of DEEPEP_NORMAL_LONG_SEQ_ROUND under
                rows="expert". What travels depends on topk_idx alone under rows="expert", and rows travel by
                is_token_in_rank under rows="rank".
            handle: of an earlier dispatch, one for all ranks: x takes the ways of its tokens, into as many rows.
                Nothing else that describes the routing may be given.
            expert_alignment: under rows="rank" the counts are rounded up to multiples of it. Under rows="expert" so
                are the blocks of rows of each local expert: padding rows are 0 with ids of -1, combine passes over
                them, and N grows by at most L * (expert_alignment - 1), which is by how much it does grow with
                num_worst_tokens.
            previous_event: the call begins after it, and waits for it.
            async_finish: under rows="rank" the call does not wait for peers; the event does. What the call returned is
                undefined until then. Its gradients are those of a call where this one was made, in whatever grad mode
                or thread the event is waited for. x must not be written to before, which is a RuntimeError of the
                event; in inference mode a copy is sent. What is wrong on other ranks is raised by the event, too. Every
                rank waits for its events in the order of the calls; other calls of the group wait for a call that has
                been started. Without a handle and with num_worst_tokens=0 the number of rows has to be known first:
                then the call is finished when it returns. Under rows="expert" it always is, as programs that never wait
                expect.
            allocate_on_comm_stream: accepted for compatibility; as upstream, it needs previous_event and async_finish.
            config: see Config.
            dispatch_wait_recv_cost_stats: int32 or int64 [R]; the call adds to every peer's entry the microseconds
                that it took, or those that its event was waited for. Unchanged under torch.compile.
            quant_mode: rows travel quantised, one of `quantization.MODES`. None is what the environment says, or
                "none" with a handle, since that is how gradients travel.

        Returns:
            recv_x [N, H], or (data, scales) of N rows where x is quantised; but if the Buffer has straight_through,
            quant_mode gives the dequantised rows [N, H] in x's dtype.
            recv_topk_idx int64 [N, K] and recv_topk_weights fp32 [N, K]: rows="expert" has the expert in the column
            that brought the row; rows="rank" has all experts of the token that are local, -1 and 0 elsewhere.
            The rows of each local expert (rows="expert": a list; a tensor int64 [L] under torch.compile and with
            num_worst_tokens, where a list would need the values on the host; a list with any handle) or its pairs
            of (token, expert) (rows="rank": a list; a tensor under torch.compile; an empty list with num_worst_tokens).
            handle, event.

            Under rows="rank" a dispatch with a handle gives None for the three in the middle, and without topk_idx
            there is neither recv_topk_idx nor recv_topk_weights.
            With num_worst_tokens, handle.num_dropped is the number of rows for this rank that did not fit.

        Raises:
            ValueError: an argument is missing, or has another dtype, shape or value than it may have.
            RuntimeError: as `deep_ep.dispatch`; x requires a gradient but is quantised, and the Buffer has no
                straight_through; after `destroy`.
        """
        if config is None and not is_of_ops(self._normal):
            config = self.get_dispatch_config(self.group_size)
        return self._begin(self._normal).dispatch(
            x=x,
            handle=handle,
            num_tokens_per_rank=num_tokens_per_rank,
            num_tokens_per_rdma_rank=num_tokens_per_rdma_rank,
            is_token_in_rank=is_token_in_rank,
            num_tokens_per_expert=num_tokens_per_expert,
            topk_idx=topk_idx,
            topk_weights=topk_weights,
            expert_alignment=expert_alignment,
            num_worst_tokens=num_worst_tokens,
            config=config,
            previous_event=previous_event,
            async_finish=async_finish,
            allocate_on_comm_stream=allocate_on_comm_stream,
            dispatch_wait_recv_cost_stats=dispatch_wait_recv_cost_stats,
            quant_mode=quant_mode,
        )

    @collective(of_strategy("normal_strategy", ops_of_combine), is_typed=False)
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
        """Sums up each token's rows: with the weights given to dispatch (rows="expert") or as they are (rows="rank").

        Differentiable in x, in the weights and in bias.

        Args:
            x: [N, H], the experts' results in the row order of recv_x.
            handle: of that dispatch.
            topk_weights: rows="expert": None, or fp32 [T, K] equal to those given to dispatch, which then get the
                gradient. rows="rank": None, or fp32 [N, K], which are summed up as well.
            bias: [T, H] in x's dtype, or two of them, added to the result in fp32. Unlike upstream, which rounds
                once, the sum of rows is rounded before. With async_finish it is read when the event is waited for.
            previous_event, async_finish, allocate_on_comm_stream: as in dispatch; the call never waits for peers.
            combine_send_cost_stats: int32 or int64 [R]; the call adds to every peer's entry the microseconds that it
                took, or those that its event was waited for. Unchanged under torch.compile.

        Returns:
            combined_x [T, H], combined_topk_weights fp32 [T, K] (None under rows="expert" and without topk_weights),
            event.

        Raises:
            ValueError: topk_weights differ from those given to dispatch (in compiled code and on NPUs they count as
                they are), or an argument of another dtype or shape.
            RuntimeError: as `deep_ep.combine`; after `destroy`.
        """
        if config is None and not is_of_ops(self._normal):
            config = self.get_combine_config(self.group_size)
        return self._begin(self._normal).combine(
            x=x,
            handle=handle,
            topk_weights=topk_weights,
            bias=bias,
            config=config,
            previous_event=previous_event,
            async_finish=async_finish,
            allocate_on_comm_stream=allocate_on_comm_stream,
            combine_send_cost_stats=combine_send_cost_stats,
        )

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
    ) -> tuple[Rows, Tensor, LowHandle, EventOverlap, Callable[[], None]]:
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
        more = _given(dispatch_wait_recv_cost_stats=dispatch_wait_recv_cost_stats, x_active_mask=x_active_mask)
        strategy = self._begin(self._low_latency)
        if not is_of_ops(strategy):
            mode = self._used().low_latency_mode(quant_mode, use_fp8, use_ue8m0, use_mxfp4)
            quant_mode = None if mode == "none" else mode
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
        handle: LowHandle,
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
        more = _given(
            use_logfmt=use_logfmt or None,
            combine_wait_recv_cost_stats=combine_wait_recv_cost_stats,
            x_active_mask=x_active_mask,
        )
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

    def get_next_low_latency_combine_buffer(self, handle: LowHandle) -> Tensor:
        """An uninitialised bf16 tensor for the experts' results, of the shape that low_latency_combine takes.

        It belongs to the caller: nothing else writes to it.
        """
        shape = rows_of(handle).low_latency_shape(handle, self.group_size)
        return handle.src_info.new_empty(shape, dtype=torch.bfloat16)

    @collective(fused_op.ops_of)
    def fused_deep_moe(
        self,
        x: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor,
        gmm1_permuted_weight: Tensor,
        gmm1_permuted_weight_scale: Tensor | None,
        gmm2_weight: Tensor,
        gmm2_weight_scale: Tensor | None,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        quant_mode: int = 1,
        fuse_mode: FuseMode = FuseMode.FUSED_DEEP_MOE,
        profile_enable: bool = False,
        *,
        gmm1_bias: Tensor | None = None,
        gmm2_bias: Tensor | None = None,
        swiglu_limit: float | None = None,
        swiglu_alpha: float | None = None,
        swiglu_beta: float | None = None,
        shared_weights: FusedWeights | None = None,
        x_active_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As `deep_ep.fused_deep_moe`, whose arguments these are, with what DeepEP-Ascend's callers may give besides.

        `rows` and low_latency_strategy of the Buffer play no part; the strategy is that of normal mode.

        Args:
            gmm1_permuted_weight, gmm2_weight: int8, fp8 and fp4 weights mean their format whether quant_mode is 0 or 1,
                as in DeepEP-Ascend, whose kernels go by the weights; others need quant_mode 0.
            gmm1_permuted_weight_scale, gmm2_weight_scale: of int8 under FUSED_DEEP_MOE of any float dtype; under
                DISPATCH_FFN_COMBINE also [L·2I] and [L·H].
            fuse_mode: FuseMode, 1 or 2.
            profile_enable: accepted for compatibility: `begin_profile` traces every call.

        Returns:
            output [T, H], and ep_recv_count int32 [L·R] (FUSED_DEEP_MOE with float or int8 weights, as on A3) or
            expert_token_nums int32 [L] (fp8 and fp4 weights, as on A5, and DISPATCH_FFN_COMBINE).

        Raises:
            ValueError, RuntimeError: as `deep_ep.fused_deep_moe`; RuntimeError after `destroy`.
        """
        return fused_deep_moe.call(
            *(self._live(), x, topk_idx, topk_weights),
            *(gmm1_permuted_weight, gmm1_permuted_weight_scale, gmm2_weight, gmm2_weight_scale),
            *(num_max_dispatch_tokens_per_rank, num_experts, quant_mode, fuse_mode),
            fused_op.options_of(
                gmm1_bias, gmm2_bias, swiglu_limit, swiglu_alpha, swiglu_beta, shared_weights, x_active_mask
            ),
        )

    def begin_profile(
        self, num_profile_skip_launches: int, num_profile_active_launches: int, profile_trace_dir: str | None = ""
    ) -> None:
        """From here on, the calls of this rank's group are noted, whoever makes them, until `end_profile`.

        Args:
            num_profile_skip_launches: so many are left out at first.
            num_profile_active_launches: so many are noted then.
            profile_trace_dir: the folder under which `end_profile` writes; "" or None is the current one.

        Raises:
            ValueError: a number is negative, or both are 0. RuntimeError: the group has been begun with already; it
            has kernels on an NPU, which torch_npu.profiler shows.
        """
        profile.begin(self.group, num_profile_skip_launches, num_profile_active_launches, profile_trace_dir)

    def end_profile(self) -> None:
        """Writes what was noted since `begin_profile`, to rank<rank>/trace_view.json in its folder, in the JSON format
        of Chrome's trace events; nothing without `begin_profile`.

        An event is a call of the group that has finished, in eager and compiled code, forward and backward; its
        arguments have sizes and where the time went (`deep_ep.debug.phases`). The clocks of all ranks of a host are
        one. What a call such as fused_deep_moe calls itself lies within it, and is not counted.

        OSError: the file cannot be written. RuntimeError: the group's windows have been made since, so that what was
        noted is lost.
        """
        profile.end(self.group)

    @staticmethod
    def is_sm90_compiled() -> bool:
        """Whether there are kernels for NVIDIA's SM90: False."""
        return False

    def internode_dispatch(
        self,
        x: Any,
        handle: Any = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        expert_alignment: int = 1,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Any, ...]:
        """`dispatch`: where ranks are makes no difference to a call. Across hosts it needs the strategy alltoall."""
        return self.dispatch(
            *(x, handle, num_tokens_per_rank, num_tokens_per_rdma_rank, is_token_in_rank, num_tokens_per_expert),
            *(topk_idx, topk_weights, expert_alignment, 0, config),
            *(previous_event, async_finish, allocate_on_comm_stream),
        )

    def internode_combine(
        self,
        x: Tensor,
        handle: Any,
        topk_weights: Tensor | None = None,
        bias: Tensor | tuple[Tensor, Tensor] | None = None,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, EventOverlap]:
        """`combine`: where ranks are makes no difference to a call. Across hosts it needs the strategy alltoall."""
        return self.combine(
            x, handle, topk_weights, bias, config, previous_event, async_finish, allocate_on_comm_stream
        )

    def get_comm_stream(self) -> torch.Stream:
        """The stream that communication is issued on, which is the current stream of this rank's NPU.

        RuntimeError: the group has no NPU. On CPU there are no streams to wait for: the event of a call is.
        """
        self._live()
        return not_here.comm_stream(self.group)

    def get_local_buffer_tensor(
        self, dtype: torch.dtype, size: torch.Size | None = None, offset: int = 0, use_rdma_buffer: bool = False
    ) -> Tensor:
        """RuntimeError: there is no raw buffer. A rank's window is memory that received tensors themselves lie in."""
        not_here.local_buffer()

    def low_latency_update_mask_buffer(self, rank_to_mask: int, mask: bool = False) -> None:
        """RuntimeError: a rank is to be masked. All ranks of a group take part in every call; none is masked."""
        if mask:
            not_here.mask(rank_to_mask)

    def low_latency_query_mask_buffer(self, mask_status: Tensor) -> None:
        """Fills mask_status, int32 [R], with 0: no rank is masked.

        ValueError: another dtype or shape.
        """
        not_here.query_masks(mask_status, self.group_size)

    def low_latency_clean_mask_buffer(self) -> None:
        """Nothing to do: no rank is masked."""

    def get_notify_send_data(self) -> Tensor:
        """What DeepEP-Ascend's kernel for A2 makes of the newest `get_dispatch_layout` outside of compiled code: int32,
        see `deep_ep.notify.send_data`.

        RuntimeError: there was none, or its topk_idx has been written to since. ValueError: more than 4096 tokens.
        """
        return self._used().get_notify_send_data()

    @collective("dispatch")
    def notify_verify(
        self,
        x: Any,
        handle: Any = None,
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
    ) -> notify.Notified:
        """What a `dispatch` with these arguments would tell this rank of the rows that it will get. Nothing else moves.

        Args:
            num_tokens_per_expert, topk_idx: as in dispatch. The others change nothing.

        ValueError: handle is given, or one of these is not. RuntimeError: as `dispatch`.
        """
        info = self._live()
        if handle is not None or num_tokens_per_expert is None or topk_idx is None:
            raise ValueError(
                "handle must be None, and num_tokens_per_expert and topk_idx given, as by get_dispatch_layout"
            )
        calls.form("notify_verify")
        rounds = self._used().rounds
        rounds.num_experts(num_tokens_per_expert)
        return notify.verify(info, self.rank, num_tokens_per_expert, topk_idx.shape[0], rounds)


def _check_arguments(group: Group, num_nvl_bytes: int, num_rdma_bytes: int, enable_shrink: bool, comm: Any) -> None:
    for name, value in (("num_nvl_bytes", num_nvl_bytes), ("num_rdma_bytes", num_rdma_bytes)):
        if value < 0:
            raise ValueError(f"{name} must not be negative, got {value}")
    if enable_shrink:
        raise ValueError("enable_shrink must be False: all ranks of a group take part; make a group of fewer ranks")
    if comm is not None or group is None:
        raise ValueError(
            f"group must be a ProcessGroup, and comm None; got {group!r} (which torch.distributed gives to ranks "
            f"outside of a group) and {comm!r}"
        )


def _class_of(given: Any, get: Callable[[str], type[Any]], place: int) -> Any:
    """The class of the strategy that is given by name; None is what DEEP_USE_MODE says in that place."""
    if given is None:
        given = MODES[env.value("DEEP_USE_MODE")][place]
    return get(given) if isinstance(given, str) else given


def _overload_of(strategy: Any, place: int) -> Any:
    """That of the strategy; besides a program's own the Buffer has what DEEP_USE_MODE says."""
    return getattr(strategy, "overload", None) or MODES[env.value("DEEP_USE_MODE")][place]


def _caller() -> tuple[str, int]:
    """File and line where this library was called."""
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_globals["__name__"].startswith("deep_ep."):
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno


def _warn_of_undestroyed(group: str, file: str, line: int) -> None:
    warnings.warn_explicit(
        f"deep_ep: a Buffer of the group '{group}' was made with explicitly_destroy=True and went without destroy()",
        RuntimeWarning,
        file,
        line,
    )


def _given(**options: Any) -> dict[str, Any]:
    """Those that are not None: a program's own strategy need not know the others."""
    return {name: value for name, value in options.items() if value is not None}


def _config(num_ranks: int) -> Config:
    if num_ranks < 1:
        raise ValueError(f"num_ranks must be positive, got {num_ranks}")
    return Config(num_sms=Buffer.num_sms)
