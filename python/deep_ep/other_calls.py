"""Calls of DeepEP's and DeepEP-Ascend's Buffer that mean little or nothing here: what they do, or why they cannot."""

from typing import Any

import torch
from torch import Tensor

from . import calls, notify
from .collective import collective
from .config import Config
from .groups import GroupInfo
from .profile import Profiling
from .runtime import Runtime
from .utils import EventOverlap


class OtherCalls(Profiling):
    """What Buffer inherits for the rest of the peers' surface."""

    group_size: int
    runtime: Runtime | None

    def _live(self) -> GroupInfo:
        raise NotImplementedError

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
        return self.dispatch(  # type: ignore[attr-defined]
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
        return self.combine(  # type: ignore[attr-defined]
            x, handle, topk_weights, bias, config, previous_event, async_finish, allocate_on_comm_stream
        )

    def get_comm_stream(self) -> torch.Stream:
        """The stream that communication is issued on, which is the current stream of this rank's NPU.

        RuntimeError: the group has no NPU. On CPU there are no streams to wait for: the event of a call is.
        """
        self._live()
        if self._has_npu():
            return torch.npu.current_stream()  # type: ignore[attr-defined]
        raise RuntimeError(
            "deep_ep: get_comm_stream needs an NPU; on CPU communication has no stream, wait with the event of the call"
        )

    def _has_npu(self) -> bool:
        return "npu" in {device.type for device in self.group._device_types}

    def get_local_buffer_tensor(
        self, dtype: torch.dtype, size: torch.Size | None = None, offset: int = 0, use_rdma_buffer: bool = False
    ) -> Tensor:
        """RuntimeError: there is no raw buffer. A rank's window is memory that received tensors themselves lie in."""
        raise RuntimeError(
            "deep_ep: get_local_buffer_tensor: there is no raw buffer; windows hold the tensors that were received"
        )

    def low_latency_update_mask_buffer(self, rank_to_mask: int, mask: bool = False) -> None:
        """RuntimeError: a rank is to be masked. All ranks of a group take part in every call; none is masked."""
        if mask:
            raise RuntimeError(
                f"deep_ep: low_latency_update_mask_buffer: rank {rank_to_mask} cannot be masked, since all ranks of a "
                "group take part in every call; make a Buffer of a group without it"
            )

    def low_latency_query_mask_buffer(self, mask_status: Tensor) -> None:
        """Fills mask_status, int32 [R], with 0: no rank is masked.

        ValueError: another dtype or shape.
        """
        if mask_status.dtype != torch.int32 or mask_status.shape != (self.group_size,):
            raise ValueError(
                f"mask_status must be torch.int32 [R] with R = {self.group_size}, "
                f"got {mask_status.dtype} {list(mask_status.shape)}"
            )
        mask_status.zero_()

    def low_latency_clean_mask_buffer(self) -> None:
        """Nothing to do: no rank is masked."""

    def get_notify_send_data(self) -> Tensor:
        """What DeepEP-Ascend's kernel for A2 makes of the newest `get_dispatch_layout` outside of compiled code: int32,
        see `deep_ep.notify.send_data`.

        RuntimeError: there was none, or its topk_idx has been written to since. ValueError: more than 4096 tokens.
        """
        self._live()
        assert self.runtime is not None
        return self.runtime.get_notify_send_data()

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
        assert self.runtime is not None
        self.runtime.rounds.num_experts(num_tokens_per_expert)
        return notify.verify(info, self.rank, num_tokens_per_expert, topk_idx.shape[0], self.runtime.rounds)
