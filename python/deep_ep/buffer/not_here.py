"""Calls of DeepEP's and DeepEP-Ascend's Buffer that no machine here can have: why they cannot be made.

R ranks.
"""

from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor


def comm_stream(group: dist.ProcessGroup) -> torch.Stream:
    """As `Buffer.get_comm_stream`."""
    if "npu" in {device.type for device in group._device_types}:
        return torch.npu.current_stream()  # type: ignore[attr-defined]
    raise RuntimeError(
        "deep_ep: get_comm_stream needs an NPU; on CPU communication has no stream, wait with the event of the call"
    )


def local_buffer() -> NoReturn:
    """As `Buffer.get_local_buffer_tensor`."""
    raise RuntimeError(
        "deep_ep: get_local_buffer_tensor: there is no raw buffer; windows hold the tensors that were received"
    )


def mask(rank: int) -> NoReturn:
    """As `Buffer.low_latency_update_mask_buffer` of a rank that is to be masked."""
    raise RuntimeError(
        f"deep_ep: low_latency_update_mask_buffer: rank {rank} cannot be masked, since all ranks of a "
        "group take part in every call; make a Buffer of a group without it"
    )


def query_masks(mask_status: Tensor, num_ranks: int) -> None:
    """As `Buffer.low_latency_query_mask_buffer`."""
    if mask_status.dtype != torch.int32 or mask_status.shape != (num_ranks,):
        raise ValueError(
            f"mask_status must be torch.int32 [R] with R = {num_ranks}, "
            f"got {mask_status.dtype} {list(mask_status.shape)}"
        )
    mask_status.zero_()
