"""low_latency_dispatch_int8: low_latency_dispatch with rows that the kernel quantises, to int8 with one scale per row.

T local tokens · H hidden · K top-k · E experts · R ranks · L = E/R local experts ·
M num_max_dispatch_tokens_per_rank · N = R·M·min(K, L) rows.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from .. import checks, quantization
from ..ep_strategy import LowLatencyStrategy
from ..groups import GroupInfo
from ._registration import register, reject
from .low_latency_dispatch import LowLatencyHandle, LowLatencyOutput, node
from .low_latency_dispatch import zero_unused as zero_unused_now


def is_for(info: GroupInfo, x: Tensor) -> bool:
    """Whether rows like x are better quantised in the kernel than around it."""
    return x.device.type == "npu" and info.low_latency is LowLatencyStrategy.DEFAULT


def call(
    info: GroupInfo, x: Tensor, topk_idx: Tensor, num_max_dispatch_tokens_per_rank: int, num_experts: int
) -> tuple[LowLatencyOutput, Tensor]:
    """As low_latency_dispatch.call with x [T, H], whose recv_x is int8 here, and its scales fp32 [N].

    The formula is that of `deep_ep.quantization.quantize(x, "int8", low_latency=True)`, to the bit. Rows that hold
    nothing are 0 with the scale 0 in grad mode, and else anything. There is no gradient.
    """
    M = num_max_dispatch_tokens_per_rank
    data, scales, recv_count, src_info, layout_range, send_head = torch.ops.deep_ep.low_latency_dispatch_int8(
        x, topk_idx, M, num_experts, info.size, info.name, zero_unused_now()
    )
    handle = LowLatencyHandle(src_info, layout_range, M, x.shape[1], num_experts, recv_count, send_head)
    return LowLatencyOutput(data, recv_count, handle), scales


def fake(
    x: Tensor,
    topk_idx: Tensor,
    num_max_dispatch_tokens_per_rank: int,
    num_experts: int,
    num_ranks: int,
    group: str,
    zero_unused: bool = True,
) -> tuple[Tensor, ...]:
    M = num_max_dispatch_tokens_per_rank
    reject("low_latency_dispatch_int8", checks.low_latency_dispatch(x, topk_idx, M, num_experts, num_ranks))
    (T, H), K, L = x.shape, topk_idx.shape[1], num_experts // num_ranks
    N = num_ranks * M * min(K, L)
    return (
        x.new_empty((N, H), dtype=torch.int8),
        x.new_empty((N,), dtype=torch.float32),
        x.new_empty((L,), dtype=torch.int64),
        x.new_empty((N, 3), dtype=torch.int32),
        x.new_empty((num_experts,), dtype=torch.int32),
        x.new_empty((T, K), dtype=torch.int32),
    )


def _around(overload: str) -> Any:
    """The kernel out of low_latency_dispatch's."""
    op = getattr(torch.ops.deep_ep.low_latency_dispatch, overload)

    def send(rows: Tensor, topk_idx: Tensor, M: int, E: int, R: int, group: str, zero_unused: bool = True) -> Any:
        return op(rows, topk_idx, M, E, R, group, "", zero_unused)

    return quantization.around(send, lambda *arguments: checks.low_latency_dispatch(*arguments[:5]), low_latency=True)


register(
    "low_latency_dispatch_int8",
    fake=fake,
    cpu=_around("default"),
    alltoall=_around("alltoall"),
    convert={"default": functools.partial(node, "low_latency_dispatch_int8")},
)
