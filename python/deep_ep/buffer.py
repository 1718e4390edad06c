"""deep_ep.Buffer: the calls of DeepEP-Ascend's Buffer over the ops of this library. Dynamo traces through its methods.

T local tokens · H hidden · K top-k · E experts · R ranks · L = E/R local experts · N received rows.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from .config import Config
from .groups import init
from .ops import combine as combine_op
from .ops import dispatch as dispatch_op
from .ops import get_dispatch_layout as layout_op
from .ops.dispatch import DispatchHandle
from .utils import EventHandle, EventOverlap


class Buffer:
    """Expert-parallel communication for one group of ranks.

    Making a Buffer is collective and happens outside of compiled code. Several may exist at once, also of one group;
    they share the group's windows.

    Args:
        group: the expert-parallel group.
        num_nvl_bytes: bytes of each rank's window, 0 for the default (256 MiB). Larger messages go in rounds.
        num_rdma_bytes: as num_nvl_bytes, for clients that size the buffer with it; the larger one counts.
        low_latency_mode, num_qps_per_rank, allow_nvlink_for_low_latency_mode, allow_mnnvl, meta_addr: accepted for
            compatibility; they concern links that a CPU does not have.

    The strategy is DEEP_USE_MODE (default, alltoall or ops), read here; anything else is a ValueError.
    """

    num_sms: int = 20

    def __init__(
        self,
        group: dist.ProcessGroup,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 12,
        allow_nvlink_for_low_latency_mode: bool = True,
        allow_mnnvl: bool = False,
        meta_addr: int = 0,
    ) -> None:
        for name, value in (("num_nvl_bytes", num_nvl_bytes), ("num_rdma_bytes", num_rdma_bytes)):
            if value < 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        self.group = group
        self.rank = group.rank()
        self.group_size = group.size()
        self.num_nvl_bytes = num_nvl_bytes
        self.num_rdma_bytes = num_rdma_bytes
        self.low_latency_mode = low_latency_mode
        self._info = init(group, num_bytes=max(num_nvl_bytes, num_rdma_bytes) or None)

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
        """The work issued so far, as an event for `previous_event`."""
        return EventOverlap(EventHandle())

    def get_dispatch_layout(
        self,
        topk_idx: Tensor,
        num_experts: int,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor, EventOverlap]:
        """As `deep_ep.get_dispatch_layout`, with an event behind its results."""
        per_rank, _, per_expert, in_rank = layout_op.call(self._info, topk_idx, num_experts)
        return per_rank, None, per_expert, in_rank, _event(async_finish)

    def dispatch(
        self,
        x: Tensor,
        handle: DispatchHandle | None = None,
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
    ) -> tuple[Tensor, Tensor, Tensor, list[int] | Tensor, DispatchHandle, EventOverlap]:
        """Sends every token once to each of its experts; see `deep_ep.dispatch`.

        Args:
            x, topk_idx, topk_weights, num_worst_tokens: as in `deep_ep.dispatch`.
            num_tokens_per_rank, is_token_in_rank, num_tokens_per_expert: from get_dispatch_layout of the same topk_idx;
                num_tokens_per_expert's length is E. What travels depends on topk_idx alone.
            previous_event, async_finish, allocate_on_comm_stream: on CPU the call is finished when it returns.
            config: see Config.
            handle, expert_alignment other than 1, dispatch_wait_recv_cost_stats: not in this version.

        Returns:
            recv_x [N, H], recv_topk_idx int64 [N, K], recv_topk_weights fp32 [N, K],
            the number of rows of each local expert (a list; a tensor int64 [L] under torch.compile and with
            num_worst_tokens, where a list would need the values on the host), handle, event.

            With num_worst_tokens, handle.num_dropped is the number of rows for this rank that did not fit.

        Raises:
            ValueError: a missing argument, or one that this version does not have.
            RuntimeError: as `deep_ep.dispatch`.
        """
        if handle is not None:
            raise ValueError("handle: dispatch with the layout of another dispatch is not in this version")
        if expert_alignment != 1:
            raise ValueError(f"expert_alignment must be 1 in this version, got {expert_alignment}")
        if dispatch_wait_recv_cost_stats is not None:
            raise ValueError("dispatch_wait_recv_cost_stats is not in this version; it must be None")
        for name, value in (
            ("topk_idx", topk_idx),
            ("num_tokens_per_rank", num_tokens_per_rank),
            ("is_token_in_rank", is_token_in_rank),
            ("num_tokens_per_expert", num_tokens_per_expert),
        ):
            if value is None:
                raise ValueError(f"{name} is missing; get_dispatch_layout gives the layout of topk_idx")
        assert topk_idx is not None and is_token_in_rank is not None and num_tokens_per_expert is not None
        out = dispatch_op.call(
            self._info,
            x,
            topk_idx,
            topk_weights,
            num_tokens_per_expert.shape[0],
            num_worst_tokens,
            is_token_in_rank,
        )
        counts: list[int] | Tensor = out.num_recv_tokens_per_expert
        if num_worst_tokens == 0 and not torch.compiler.is_compiling():
            counts = out.num_recv_tokens_per_expert.tolist()
        return out.recv_x, out.recv_topk_idx, out.recv_topk_weights, counts, out.handle, _event(async_finish)

    def combine(
        self,
        x: Tensor,
        handle: DispatchHandle,
        topk_weights: Tensor | None = None,
        bias: Tensor | tuple[Tensor, Tensor] | None = None,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
        combine_send_cost_stats: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, EventOverlap]:
        """Sums up each token's rows with the weights given to dispatch; see `deep_ep.combine`.

        Args:
            x: [N, H], the experts' results in the row order of recv_x.
            handle: of that dispatch.
            topk_weights: None, or the weights in the handle.
            bias, combine_send_cost_stats: not in this version.

        Returns:
            combined_x [T, H], None, event.

        Raises:
            ValueError: topk_weights are not those in the handle, or an argument that this version does not have.
            RuntimeError: as `deep_ep.combine`.
        """
        if bias is not None:
            raise ValueError("bias is not in this version; it must be None")
        if combine_send_cost_stats is not None:
            raise ValueError("combine_send_cost_stats is not in this version; it must be None")
        if topk_weights is not None and topk_weights is not handle[7]:
            raise ValueError("topk_weights must be None or the weights in the handle, handle[7]")
        combined = combine_op.call(self._info, x, DispatchHandle(*handle))
        return combined, None, _event(async_finish)


def _config(num_ranks: int) -> Config:
    if num_ranks < 1:
        raise ValueError(f"num_ranks must be positive, got {num_ranks}")
    return Config(num_sms=Buffer.num_sms)


def _event(async_finish: bool) -> EventOverlap:
    return EventOverlap(EventHandle() if async_finish else None)
