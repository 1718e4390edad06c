"""The competitors of the expert-parallel benchmark: what turns tokens into expert rows and back.

T local tokens · H hidden · K top-k · E experts · R ranks · L = E/R local experts · N received rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class Dispatcher(Protocol):
    """One way of sending tokens to their experts; both methods are collective over the group."""

    name: str
    sum_dtype: torch.dtype  # in which combine multiplies and adds

    def dispatch(self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor) -> tuple[Tensor, Any]:
        """Send every (token, k) of x [T, H] to the rank of its expert.

        topk_idx is int64 [T, K] in 0..E-1, topk_weights is float32 [T, K]. Returns recv_x [N, H], its rows
        ordered by local expert, source rank, token and k, and the state that combine needs.
        """
        ...

    def combine(self, y: Tensor, state: Any) -> Tensor:
        """Send the expert outputs y [N, H] back; returns [T, H], a token's weighted sum of its rows."""
        ...


class _AllToAll(torch.autograd.Function):
    """all_to_all_single into a fresh tensor; its backward is the same exchange with the splits swapped."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, send_splits: list[int], recv_splits: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.send_splits, ctx.recv_splits, ctx.group = send_splits, recv_splits, group
        received = rows.new_empty(sum(recv_splits), *rows.shape[1:])
        dist.all_to_all_single(received, rows.contiguous(), recv_splits, send_splits, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _all_to_all(grads[0], ctx.recv_splits, ctx.send_splits, ctx.group), None, None, None


def _all_to_all(rows: Tensor, send_splits: list[int], recv_splits: list[int], group: dist.ProcessGroup) -> Tensor:
    return _AllToAll.apply(rows, send_splits, recv_splits, group)


def _reorder_chunks(rows: Tensor, sizes: list[int], order: list[int]) -> Tensor:
    chunks = rows.split(sizes)
    return torch.cat([chunks[i] for i in order])


@dataclass(frozen=True)
class GlooState:
    """What GlooDispatcher.combine needs of its dispatch."""

    topk_weights: Tensor  # [T, K]
    order: Tensor  # [T * K], the flat (token, k) of every row sent
    recv_weights: Tensor  # [N], what the experts would get beside recv_x
    send_splits: list[int]  # [R]
    recv_splits: list[int]  # [R]
    recv_counts: Tensor  # [R, L]


class GlooDispatcher:
    """The all-to-all token dispatcher of Megatron-LM and torchtitan, on torch.distributed.

    Exchange the counts, sort the tokens by expert, exchange rows and probabilities, and where a rank has
    several experts sort the received chunks by expert; combine does the same backwards and ends with the
    weighted sum, a batched matrix product in sum_dtype. In float32 that is what deep_ep computes, and on a
    CPU it is faster than the products and scatter_add that both frameworks have used as well. In the dtype of
    x it is less exact and faster: Megatron-LM's default, where the router's probabilities have that dtype.
    """

    def __init__(
        self, group: dist.ProcessGroup, num_experts: int, name: str, sum_dtype: torch.dtype = torch.float32
    ) -> None:
        self.name = name
        self.group = group
        self.sum_dtype = sum_dtype
        self.num_experts = num_experts
        self.num_ranks = group.size()
        self.num_local_experts = num_experts // self.num_ranks
        chunks = torch.arange(num_experts)
        self.to_expert_major = chunks.view(self.num_ranks, -1).t().flatten().tolist()
        self.to_rank_major = chunks.view(-1, self.num_ranks).t().flatten().tolist()

    def dispatch(self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor) -> tuple[Tensor, GlooState]:
        shape = (self.num_ranks, self.num_local_experts)
        send_counts = torch.bincount(topk_idx.flatten(), minlength=self.num_experts).view(shape)
        recv_counts = torch.empty_like(send_counts)
        dist.all_to_all_single(recv_counts, send_counts, group=self.group)
        send_splits = send_counts.sum(1).tolist()
        recv_splits = recv_counts.sum(1).tolist()

        order = topk_idx.flatten().argsort(stable=True)
        rows = x.index_select(0, order // topk_idx.size(1))
        weights = topk_weights.flatten().index_select(0, order)

        recv_x = _all_to_all(rows, send_splits, recv_splits, self.group)
        recv_weights = _all_to_all(weights, send_splits, recv_splits, self.group)
        if self.num_local_experts > 1:
            sizes = recv_counts.flatten().tolist()
            recv_x = _reorder_chunks(recv_x, sizes, self.to_expert_major)
            recv_weights = _reorder_chunks(recv_weights, sizes, self.to_expert_major)
        return recv_x, GlooState(topk_weights, order, recv_weights, send_splits, recv_splits, recv_counts)

    def combine(self, y: Tensor, state: GlooState) -> Tensor:
        if self.num_local_experts > 1:
            y = _reorder_chunks(y, state.recv_counts.t().flatten().tolist(), self.to_rank_major)
        rows = _all_to_all(y, state.recv_splits, state.send_splits, self.group)
        by_token = torch.empty_like(rows)
        by_token[state.order] = rows
        T, K = state.topk_weights.shape
        weights = state.topk_weights.unsqueeze(1).to(self.sum_dtype)
        return torch.bmm(weights, by_token.view(T, K, -1).to(self.sum_dtype)).squeeze(1).to(y.dtype)


@dataclass(frozen=True)
class DeepEPState:
    """What DeepEPDispatcher.combine needs of its dispatch."""

    topk_idx: Tensor  # [T, K]
    topk_weights: Tensor  # [T, K]
    recv_src_idx: Tensor  # [N, 3]
    send_head: Tensor  # [T, K]


class DeepEPDispatcher:
    """One overload of the deep_ep ops, called eagerly; the group must have been through deep_ep.init."""

    def __init__(self, group: dist.ProcessGroup, num_experts: int, overload: str) -> None:
        self.name = f"deep_ep.{overload}"
        self.sum_dtype = torch.float32
        self.group_name = group.group_name
        self.num_experts = num_experts
        self.num_ranks = group.size()
        self.dispatch_op = getattr(torch.ops.deep_ep.dispatch, overload)
        self.combine_op = getattr(torch.ops.deep_ep.combine, overload)

    def dispatch(self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor) -> tuple[Tensor, DeepEPState]:
        outputs = self.dispatch_op(x, topk_idx, topk_weights, self.num_experts, self.num_ranks, 0, self.group_name)
        recv_x, recv_src_idx, send_head = outputs[0], outputs[8], outputs[9]
        return recv_x, DeepEPState(topk_idx, topk_weights, recv_src_idx, send_head)

    def combine(self, y: Tensor, state: DeepEPState) -> Tensor:
        return self.combine_op(
            y,
            state.topk_idx,
            state.topk_weights,
            state.recv_src_idx,
            state.send_head,
            self.num_experts,
            self.num_ranks,
            self.group_name,
        )
