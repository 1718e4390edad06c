"""deep_ep.Buffer: the calls of DeepEP's and DeepEP-Ascend's Buffer over the ops of this library.

Dynamo traces through its methods.

T local tokens · H hidden · K top-k · E experts · R ranks · L = E/R local experts · N received rows.
"""

import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import call_log, calls, checks, cost, env, quantization, rank_rows
from .arguments import adapted
from .collective import collective
from .config import Config
from .ep_strategy import (
    MODES,
    NormalEPCommStrategy,
    Rows,
    get_low_latency_strategy,
    get_normal_strategy,
)
from .fused import FusedCalls
from .fused_weights import FuseMode  # noqa: F401  (where DeepEP-Ascend's callers look for it)
from .groups import Group, GroupInfo, spoil
from .handles import copy_in_graph, readable_by_name
from .low_latency import LowLatencyCalls
from .ops import combine as combine_op
from .ops import dispatch as dispatch_op
from .ops import dispatch_int8 as dispatch_int8_op
from .ops import get_dispatch_layout as layout_op
from .ops.dispatch import DispatchHandle
from .other_calls import OtherCalls
from .overlap import Plan, begin_after, event_of, issue
from .rank_rows import RankHandle
from .runtime import OfOps, Runtime, is_of_ops, of_strategy
from .utils import EventHandle, EventOverlap
from .windows import finalize_here


@readable_by_name
class AlignedHandle(NamedTuple):
    """A DispatchHandle of a dispatch with expert_alignment: N counts the padding rows, too."""

    rank_prefix_matrix: Tensor
    channel_prefix_matrix: Tensor
    recv_channel_prefix_matrix: Tensor
    recv_src_idx: Tensor
    is_token_in_rank: Tensor
    send_head: Tensor
    topk_idx: Tensor
    topk_weights: Tensor
    position: Tensor
    """int64 [N without padding]: where each row lies among the N rows."""
    num_rows: Tensor
    """int64 [L]: rows of each local expert, padding included."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy_in_graph(self, memo)

    @property
    def num_dropped(self) -> Tensor:
        """int64 []: rows for this rank that did not fit into num_worst_tokens."""
        return self.recv_channel_prefix_matrix[-1, -1] - (self.recv_src_idx[:, 0] >= 0).sum()


@readable_by_name
class InternodeHandle(NamedTuple):
    """A DispatchHandle where the group spans servers, in the order of DeepEP-Ascend's handle there."""

    recv_src_idx: Tensor
    is_token_in_rank: Tensor
    send_head: Tensor
    topk_idx: Tensor
    topk_weights: Tensor
    offset_inner: Tensor
    """int32 [L, R]: recv_channel_prefix_matrix of a DispatchHandle."""
    offset_outer: Tensor
    """int32 [R, L]: its channel_prefix_matrix."""
    count_outer: Tensor
    """int32 [R, R]: its rank_prefix_matrix."""
    expand_scales: Tensor
    """fp32 [N]: the weight of every row."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy_in_graph(self, memo)

    @property
    def num_dropped(self) -> Tensor:
        """int64 []: rows for this rank that did not fit into num_worst_tokens."""
        return self.offset_inner[-1, -1] - (self.recv_src_idx[:, 0] >= 0).sum()


Handle = DispatchHandle | AlignedHandle | InternodeHandle | RankHandle


def _ops_of_dispatch(given: dict[str, Any]) -> tuple[str, ...]:
    """Of a call with these arguments, whether they are right or not."""
    if given.get("handle") is not None:
        return "combine", "dispatch"
    worst = given.get("num_worst_tokens", 0)
    is_static = isinstance(worst, int) and worst != 0
    is_alone = given["self"]._rows == "expert" or (given.get("topk_idx") is None and is_static)
    return ("dispatch",) * (1 if is_alone else 2)


def _ops_of_combine(given: dict[str, Any]) -> tuple[str, ...]:
    return ("combine",) * (2 if given["self"]._rows == "rank" and given.get("topk_weights") is not None else 1)


class Buffer(LowLatencyCalls, FusedCalls, OtherCalls):
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
        normal = _class_of(normal_strategy, get_normal_strategy, 0)
        low_latency = _class_of(low_latency_strategy, get_low_latency_strategy, 1)
        num_bytes = max(num_nvl_bytes, num_rdma_bytes) or None
        self.runtime: Runtime | None = Runtime(group, rows, straight_through, comm_alg, num_bytes)
        self.group = self.runtime.group
        self.rank = self.runtime.rank
        self.group_size = self.runtime.size
        self._rows = self.runtime.rows
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

    def _live(self) -> GroupInfo:
        if self.runtime is None:
            raise RuntimeError("deep_ep: this Buffer was pickled, and has no group since; make another one")
        self.runtime.check()
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
        self._normal = self._strategy("normal_strategy", strategy, get_normal_strategy, methods)
        if is_of_ops(self._normal):
            self._info = replace(self._info, normal=self._normal.info.normal)

    @property
    def low_latency_strategy(self) -> Any:
        """The same of low_latency_dispatch and low_latency_combine."""
        return self._low_latency

    @low_latency_strategy.setter
    def low_latency_strategy(self, strategy: Any) -> None:
        methods = "low_latency_dispatch", "low_latency_combine"
        self._low_latency = self._strategy("low_latency_strategy", strategy, get_low_latency_strategy, methods)
        if is_of_ops(self._low_latency):
            info = self._low_latency.info
            self._info = replace(self._info, low_latency=info.low_latency, comm_alg=info.comm_alg)

    def _strategy(self, argument: str, given: Any, get: Callable[[str], type[Any]], methods: tuple[str, ...]) -> Any:
        """The strategy that is given for `argument`, which has these methods."""
        self._live()
        if isinstance(given, str):
            given = get(given)
        if isinstance(given, type):
            make: Any = given.of_buffer if issubclass(given, OfOps) else given
            given = make(runtime=self.runtime, group=self.group)
        for method in methods:
            if not callable(getattr(given, method, None)):
                raise ValueError(f"{argument} must be a strategy, or the name of one; got {given!r} without {method}")
        if getattr(given, "group", self.group) is not self.group:
            raise ValueError(
                f"{argument} must be of the group '{self.group.group_name}', got one of '{given.group.group_name}'"
            )
        if is_of_ops(given) and given.runtime.rows != self._rows:
            raise ValueError(f'{argument} must have rows="{self._rows}", got one with rows="{given.runtime.rows}"')
        return given

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

    @collective(of_strategy("normal_strategy", _ops_of_dispatch), is_typed=False)
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

    @collective(of_strategy("normal_strategy", _ops_of_combine), is_typed=False)
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
        if self._rows == "rank":
            in_rank = in_rank.to(torch.bool)
        if self.runtime.rounds.number > 1:
            per_expert = _per_round(topk_idx, num_experts, self.runtime.rounds)
        self.runtime.keep_layout(topk_idx, num_experts)
        return per_rank, None, per_expert, in_rank, event_of(async_finish)

    @collective(_ops_of_dispatch)
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
        given = {
            "num_tokens_per_rank": num_tokens_per_rank,
            "is_token_in_rank": is_token_in_rank,
            "num_tokens_per_expert": num_tokens_per_expert,
        }
        if handle is not None:
            for name, value in (given | {"topk_idx": topk_idx, "topk_weights": topk_weights}).items():
                if value is not None:
                    raise ValueError(f"{name} must be None with a handle, which has the routing")
            if num_worst_tokens != 0:
                raise ValueError(f"num_worst_tokens must be 0 with a handle, whose rows count; got {num_worst_tokens}")
            if expert_alignment != 1:
                raise ValueError(f"expert_alignment must be 1 with a handle, whose rows count; got {expert_alignment}")
        else:
            if self._rows == "expert":
                given["topk_idx"] = topk_idx
            for name, value in given.items():
                if value is None:
                    raise ValueError(f"{name} is missing; get_dispatch_layout gives the layout of topk_idx")
        rows, packed = self._rows_to_send(info, x, quant_mode, handle is not None)
        routing = "of a handle" if handle is not None else "without topk_idx" if topk_idx is None else "with topk_idx"
        if topk_idx is None and num_worst_tokens != 0:
            routing += ", with num_worst_tokens"
        calls.form(f'{quantization.described(x if packed is None else packed)} under rows="{self._rows}" {routing}')
        if handle is not None:
            self._check_handles(info, handle, self._overlaps(async_finish))

        if self._rows == "rank":
            if handle is not None:
                plan = rank_rows.cached_dispatch(info, rows, handle)
            else:
                assert is_token_in_rank is not None and num_tokens_per_expert is not None
                plan = rank_rows.dispatch(
                    info,
                    self.rank,
                    rows,
                    is_token_in_rank,
                    num_tokens_per_expert,
                    topk_idx,
                    topk_weights,
                    expert_alignment,
                    num_worst_tokens,
                )
        elif handle is not None:
            plan = self._cached_dispatch(info, rows, handle)
        else:
            assert topk_idx is not None and num_tokens_per_expert is not None
            E, exact = self.runtime.rounds.num_experts(num_tokens_per_expert), num_worst_tokens == 0

            def expert_rows(out: dispatch_op.DispatchOutput) -> tuple[Any, ...]:
                return self._expert_rows(out, expert_alignment, exact)

            call = info, rows, topk_idx, topk_weights, E, num_worst_tokens, is_token_in_rank
            plan = Plan(dispatch_op, [call], expert_rows, (num_worst_tokens,))

        def received(*outs: Any) -> tuple[Any, ...]:
            recv_x, *others = plan.received(*outs)
            if packed is None:
                return recv_x, *others
            data, scales = quantization.unpack(recv_x, *packed)
            return (data, quantization.in_one_row(scales) if self._rows == "expert" else scales), *others

        # Where the kernel quantises, the host waits for nothing anyway.
        goes_on = (handle is not None or num_worst_tokens != 0) and isinstance(rows, Tensor)
        sends = plan._replace(received=received)
        return self._issue(sends, async_finish, dispatch_wait_recv_cost_stats, goes_on)

    def _check_handles(self, info: GroupInfo, handle: Handle, overlaps: bool) -> None:
        """All ranks must have handles of one dispatch, which combine finds out, of rows of the least size that an NPU
        moves.
        """
        known = rank_rows.op_handle(handle) if self._rows == "rank" else _expert_handle(handle)
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

    def _expert_rows(self, out: dispatch_op.DispatchOutput, expert_alignment: int, exact: bool) -> tuple[Any, ...]:
        """recv_x, recv_topk_idx, recv_topk_weights, counts and handle as a client gets them."""
        counts = out.num_recv_tokens_per_expert
        results: tuple[Any, ...] = out.recv_x, out.recv_topk_idx, out.recv_topk_weights, out.handle
        if expert_alignment != 1:
            results = _align(out, expert_alignment, exact)
            counts = results[3].num_rows
        elif self.runtime.get_num_rdma_ranks() > 1:
            results = *results[:3], _across_servers(out)
        return *results[:3], self._listed(counts, exact), results[3]

    def _listed(self, counts: Tensor, exact: bool) -> list[int] | Tensor:
        if self._running_counts:
            counts = counts.cumsum(0)
        return counts.tolist() if exact and not torch.compiler.is_compiling() else counts

    def _cached_dispatch(self, info: GroupInfo, x: Tensor | dispatch_op.AsInt8, handle: tuple[Tensor, ...]) -> Plan:
        aligned = _as_aligned(handle)
        known = _expert_handle(handle)
        N = known.recv_src_idx.shape[0]
        E = info.size * known.channel_prefix_matrix.shape[1]
        # Known here, so that a list of them needs no rows.
        end = known.recv_channel_prefix_matrix[:, -1].long().clamp(max=(known.recv_src_idx[:, 0] >= 0).sum())
        counts = aligned.num_rows if aligned is not None else end.diff(prepend=end.new_zeros(1))
        listed = self._listed(counts, True)

        def received(out: dispatch_op.DispatchOutput) -> tuple[Any, ...]:
            rank_rows.same_rows(out.recv_x, N)
            results: tuple[Any, ...] = out.recv_x, out.recv_topk_idx, out.recv_topk_weights
            if aligned is not None:
                results = _spread(out, aligned.position, aligned.recv_src_idx.shape[0])[:3]
            return *results, listed, handle

        capacity = rank_rows.capacity_of(N)
        call = info, x, known.topk_idx, known.topk_weights, E, capacity, known.is_token_in_rank
        return Plan(dispatch_op, [call], received, (N,))

    @collective(_ops_of_combine)
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
        known = rank_rows.check_handle(handle) if self._rows == "rank" else _expert_handle(handle)
        biases = () if bias is None else bias if isinstance(bias, tuple) else (bias,)
        of_tokens = known.is_token_in_rank if isinstance(known, RankHandle) else known.topk_idx
        _check_biases(biases, x, of_tokens.shape[:-1])
        summed = ", with topk_weights" if topk_weights is not None and self._rows == "rank" else ""
        calls.form(f'rows="{self._rows}"{summed}')
        if isinstance(known, RankHandle):
            plan = rank_rows.combine(info, x, known, topk_weights)
        else:
            known = _with_weights(known, topk_weights)
            aligned = _as_aligned(handle)
            if aligned is not None:
                x = x.index_select(0, aligned.position)
            plan = Plan(combine_op, [(info, x, known)], lambda combined: (combined, None))

        def received(*outs: Tensor) -> tuple[Any, ...]:
            combined, combined_weights = plan.received(*outs[: len(plan.calls)])
            if biases:
                total = combined.to(torch.float32)
                for one in outs[len(plan.calls) :]:
                    total = total + one
                combined = total.to(x.dtype)
            return combined, combined_weights

        return self._issue(plan._replace(received=received, inputs=biases), async_finish, combine_send_cost_stats)


def _per_round(topk_idx: Tensor, num_experts: int, rounds: env.Rounds) -> Tensor:
    """int32 [rounds·E]: the counts of each round's tokens, one round after the other."""
    T, most = topk_idx.shape[0], rounds.number * rounds.tokens
    if checks.exceeds(T, most):
        raise ValueError(
            f"topk_idx must have at most {most} tokens, {rounds.number} rounds of {rounds.tokens} (of "
            f"DEEPEP_NORMAL_LONG_SEQ_ROUND and DEEPEP_NORMAL_LONG_SEQ_PER_ROUND_TOKENS), got {T}"
        )
    first = torch.arange(T, device=topk_idx.device) // rounds.tokens * num_experts
    # Those of no expert are counted behind the others.
    places = torch.where(topk_idx < 0, rounds.number * num_experts, topk_idx + first.unsqueeze(1)).view(-1)
    counts = topk_idx.new_zeros(rounds.number * num_experts + 1, dtype=torch.int32)
    return counts.scatter_add(0, places, torch.ones_like(places, dtype=torch.int32))[:-1]


def _as_aligned(handle: tuple[Tensor, ...]) -> AlignedHandle | None:
    return AlignedHandle(*handle) if len(handle) == len(AlignedHandle._fields) else None


def _across_servers(out: dispatch_op.DispatchOutput) -> InternodeHandle:
    known = out.handle
    return InternodeHandle(
        *known[3:],
        known.recv_channel_prefix_matrix,
        known.channel_prefix_matrix,
        known.rank_prefix_matrix,
        out.recv_topk_weights.detach().sum(1),
    )


def _expert_handle(handle: tuple[Tensor, ...]) -> DispatchHandle:
    """The handle that the ops know; ValueError unless it has 8 tensors, 9 across servers or 10 with padding rows."""
    if len(handle) == len(DispatchHandle._fields):
        return DispatchHandle(*handle)
    if len(handle) == len(InternodeHandle._fields):
        *known, inner, outer, count, _ = handle
        return DispatchHandle(count, outer, inner, *known)
    aligned = _as_aligned(handle)
    if aligned is None:
        raise ValueError(
            f'handle must be of a dispatch under rows="expert", with {len(DispatchHandle._fields)} tensors; '
            f"got {len(handle)}"
        )
    return DispatchHandle(*aligned[:8])._replace(recv_src_idx=aligned.recv_src_idx.index_select(0, aligned.position))


def _with_weights(handle: DispatchHandle, topk_weights: Tensor | None) -> DispatchHandle:
    """The handle with the weights that are given for combine, which get their gradients; they must equal its own."""
    own = handle.topk_weights
    if topk_weights is None or topk_weights is own:
        return handle
    sizes = zip(topk_weights.shape, own.shape, strict=False)
    if topk_weights.dtype != own.dtype or topk_weights.dim() != 2 or any(checks.differ(a, b) for a, b in sizes):
        raise ValueError(
            f"topk_weights must be None or those given to dispatch, {own.dtype} {list(own.shape)}; "
            f"got {topk_weights.dtype} {list(topk_weights.shape)}"
        )
    # In graphs their values are not known; those that are given count.
    if checks.has_values(own):
        is_same = torch.isclose(topk_weights.detach(), own.detach(), rtol=0, atol=0, equal_nan=True)
        if not is_same.all():
            raise ValueError("topk_weights must be None or those given to dispatch, handle.topk_weights; got others")
    return handle._replace(topk_weights=topk_weights)


def _align(out: dispatch_op.DispatchOutput, alignment: int, exact: bool) -> tuple[Rows, Tensor, Tensor, AlignedHandle]:
    """recv_x, recv_topk_idx, recv_topk_weights and handle with each expert's block padded to a multiple of alignment.

    Rows that hold nothing follow the last block.
    """
    counts = out.num_recv_tokens_per_expert
    padded = (counts + (alignment - 1)) // alignment * alignment
    before = torch.cat([counts.new_zeros(1), (padded - counts).cumsum(0)])
    n = out.recv_topk_idx.shape[0]
    row = torch.arange(n, device=counts.device)
    position = row + before[torch.searchsorted(counts.cumsum(0), row, right=True)]
    if exact:
        N = int(padded.sum().item())
        torch._check(n <= N)
    else:
        N = n + counts.shape[0] * (alignment - 1)
    recv_x, recv_topk_idx, recv_topk_weights, src = _spread(out, position, N)
    handle = AlignedHandle(*out.handle._replace(recv_src_idx=src), position, padded)
    return recv_x, recv_topk_idx, recv_topk_weights, handle


def _spread(out: dispatch_op.DispatchOutput, position: Tensor, N: int) -> tuple[Rows, Tensor, Tensor, Tensor]:
    """recv_x, recv_topk_idx, recv_topk_weights and recv_src_idx of N rows, with padding where no row has its place."""

    def spread(rows: Tensor, padding: int) -> Tensor:
        return rows.new_full((N, *rows.shape[1:]), padding).index_copy(0, position, rows)

    rows: Rows = out.recv_x
    return (
        spread(rows, 0) if isinstance(rows, Tensor) else (spread(rows[0], 0), spread(rows[1], 0)),
        spread(out.recv_topk_idx, -1),
        spread(out.recv_topk_weights, 0),
        spread(out.handle.recv_src_idx, -1),
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


def _check_positive(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name} must be positive, got {number}")


def _check_biases(biases: tuple[Tensor, ...], x: Tensor, tokens: torch.Size) -> None:
    if len(biases) > 2:
        raise ValueError(f"bias must be a tensor or two of them, got {len(biases)}")
    for one in biases:
        if one.dtype != x.dtype or one.shape != (*tokens, x.shape[1]):
            raise ValueError(
                f"bias must be {x.dtype} [T, H] = {[*tokens, x.shape[1]]}, got {one.dtype} {list(one.shape)}"
            )


def _config(num_ranks: int) -> Config:
    if num_ranks < 1:
        raise ValueError(f"num_ranks must be positive, got {num_ranks}")
    return Config(num_sms=Buffer.num_sms)
