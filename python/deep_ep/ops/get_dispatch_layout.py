"""get_dispatch_layout: how many tokens go where, from topk_idx alone. Nothing is communicated.

T tokens · K top-k · E experts · R ranks · S nodes.
"""

from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..arguments import adapted, flat
from ..groups import GroupInfo, info_of
from ..kernels import alltoall
from ..npu import ge
from ..process_groups import Group
from ._registration import register, reject


@adapted
def get_dispatch_layout(
    topk_idx: Tensor, num_experts: int, *, group: Group = None
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Counts tokens per rank, node and expert, and marks which token goes to which rank.

    Args:
        topk_idx: [T, K] of any integer dtype, expert ids 0..E-1, or -1 for none. T may be several dimensions.
        num_experts: E, a multiple of R.
        group: a group prepared with `deep_ep.init`.

    Returns:
        num_tokens_per_rank int32 [R] (a token counts once per rank), num_tokens_per_rdma_rank (None: all ranks are
        on one node), num_tokens_per_expert int32 [E], is_token_in_rank int32 [T, R] of 0 and 1.

    Raises:
        RuntimeError: topk_idx has another shape, or an id out of range; E is not divisible by R.
        ValueError: topk_idx is not of an integer dtype.
    """
    per_rank, _, per_expert, is_token_in_rank = call(info_of(group), topk_idx, num_experts)
    return per_rank, None, per_expert, is_token_in_rank


def call(info: GroupInfo, topk_idx: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op's overload for `info`."""
    op = getattr(torch.ops.deep_ep.get_dispatch_layout, info.normal.value)
    return op(*flat(topk_idx), num_experts, info.size, 1)


def fake(topk_idx: Tensor, num_experts: int, num_ranks: int, num_nodes: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    error = checks.get_dispatch_layout(topk_idx, num_experts, num_ranks, num_nodes)
    reject("get_dispatch_layout", error)

    def empty(*shape: int | torch.SymInt) -> Tensor:
        return topk_idx.new_empty(shape, dtype=torch.int32)

    return empty(num_ranks), empty(num_nodes), empty(num_experts), empty(topk_idx.shape[0], num_ranks)


def convert(topk_idx: Any, num_experts: int, num_ranks: int, num_nodes: int) -> Any:
    """DeepEpGetDispatchLayout."""
    integers = {"num_experts": num_experts, "num_ranks": num_ranks, "num_nodes": num_nodes}
    return ge.node("get_dispatch_layout", {"topk_idx": topk_idx}, integers)


register(
    "get_dispatch_layout",
    fake=fake,
    alltoall=alltoall.get_dispatch_layout,
    convert={"default": convert, "alltoall": convert},
    communicates=False,
)
