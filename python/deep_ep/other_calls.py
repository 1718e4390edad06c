"""Calls of DeepEP's and DeepEP-Ascend's Buffer that mean little or nothing here: what they do, or why they cannot."""

from typing import Any

import torch
from torch import Tensor

from .config import Config
from .groups import GroupInfo
from .utils import EventOverlap


class OtherCalls:
    """What Buffer inherits for the rest of the peers' surface."""

    group_size: int

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
        return "npu" in {device.type for device in self.group._device_types}  # type: ignore[attr-defined]

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
        """RuntimeError: a Buffer keeps nothing of get_dispatch_layout, which returns all that it knows."""
        raise RuntimeError("deep_ep: get_notify_send_data: a Buffer keeps nothing of get_dispatch_layout between calls")

    def notify_verify(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """RuntimeError: ranks tell each other their counts within dispatch; `handle` and its counts are the result."""
        raise RuntimeError("deep_ep: notify_verify: ranks exchange counts within dispatch, whose results have them")

    def begin_profile(
        self, num_profile_skip_launches: int, num_profile_active_launches: int, profile_trace_dir: str | None = ""
    ) -> None:
        """RuntimeError: torch.profiler and torch_npu.profiler show these ops as all others."""
        raise RuntimeError(
            "deep_ep: begin_profile: use torch.profiler or torch_npu.profiler, or deep_ep.groups.phases(group) on CPU"
        )

    def end_profile(self) -> None:
        """As begin_profile."""
        self.begin_profile(0, 0)
