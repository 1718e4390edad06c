"""rows="rank": the rows of upstream DeepEP, one per (token, rank), over the ops that send one per (token, expert).

A rank stands for its only expert: E' = R, K' = R, and a token has id d in column d where it goes to rank d, else -1.
The weights are ones, so combine is the plain sum. What a rank needs to know of its tokens' experts travels as further
rows of the same routing.

T local tokens · H hidden · K top-k · E experts · R ranks · L = E/R local experts · N received rows.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks
from .groups import GroupInfo
from .handles import readable_by_name
from .ops import combine as combine_op
from .ops import dispatch as dispatch_op
from .ops.dispatch import AsInt8, DispatchHandle, DispatchOutput
from .overlap import Plan

MAX_EXPERTS = 1 << 24
"""Ids travel as fp32, which is exact below this."""


@readable_by_name
class RankHandle(NamedTuple):
    """What combine and a cached dispatch need, as tensors only. The order is that of upstream DeepEP's handle.

    For both prefix matrices per channel there is one channel.
    """

    rank_prefix_matrix: Tensor
    """int32 [R, R]: [i, j] is the number of rows that ranks 0..i deliver to rank j."""
    channel_prefix_matrix: Tensor
    """int32 [R, 1]: the rows that this rank has for rank d."""
    recv_channel_prefix_matrix: Tensor
    """int32 [1, R]: running count over s of the rows that rank s has for this rank, before any are dropped."""
    recv_src_idx: Tensor
    """int32 [N, 3]: source rank, token and this rank of every row, -1 in rows that hold nothing."""
    is_token_in_rank: Tensor
    """bool [T, R]: whether a token goes to a rank."""
    send_head: Tensor
    """int32 [T, R]: the row at each rank, -1 if there is none."""

    @property
    def num_dropped(self) -> Tensor:
        """int64 []: rows for this rank that did not fit into num_worst_tokens."""
        return self.recv_channel_prefix_matrix[-1, -1] - (self.recv_src_idx[:, 0] >= 0).sum()


def _ids(is_token_in_rank: Tensor) -> Tensor:
    """int64 [T, R]: d in column d where the token goes to rank d, else -1."""
    ranks = torch.arange(is_token_in_rank.shape[1], device=is_token_in_rank.device)
    return torch.where(is_token_in_rank, ranks, -1)


def same_rows(rows: Any, num_rows: int) -> Any:
    """`rows`, a tensor or data and scales, whose number is known to be num_rows from here on."""
    for part in (rows,) if isinstance(rows, Tensor) else rows:
        torch._check(part.shape[0] == num_rows)
    return rows


def capacity_of(num_rows: int) -> int:
    """The num_worst_tokens with which the routing that once gave num_rows rows gives as many again.

    An unbacked number of rows comes from an exact dispatch in the same graph; every other is known, and repeats
    whatever it dropped.
    """
    if not torch.compiler.is_compiling():
        return num_rows
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    return num_rows if guard_or_false(num_rows > 0) else 0


def check_handle(handle: tuple[Tensor, ...]) -> RankHandle:
    """The handle as a RankHandle; ValueError unless it has 6 tensors."""
    if len(handle) != len(RankHandle._fields):
        raise ValueError(
            f'handle must be of a dispatch under rows="rank", with {len(RankHandle._fields)} tensors; got {len(handle)}'
        )
    known = RankHandle(*handle)
    if known.is_token_in_rank.dtype != torch.bool:
        raise ValueError(f"handle.is_token_in_rank must be torch.bool, got {known.is_token_in_rank.dtype}")
    return known


def op_handle(handle: tuple[Tensor, ...]) -> DispatchHandle:
    """The handle as the ops take it; ValueError: not a handle of this contract."""
    known = check_handle(handle)
    ids = _ids(known.is_token_in_rank)
    return DispatchHandle(*known, ids, torch.ones_like(ids, dtype=torch.float32))


def _check_mask(is_token_in_rank: Tensor, num_ranks: int) -> None:
    if is_token_in_rank.dtype != torch.bool:
        raise ValueError(f'is_token_in_rank must be torch.bool under rows="rank", got {is_token_in_rank.dtype}')
    if is_token_in_rank.dim() != 2 or is_token_in_rank.shape[1] != num_ranks:
        raise ValueError(
            f"is_token_in_rank must have the shape [T, R] with R = {num_ranks}, got {list(is_token_in_rank.shape)}"
        )


def dispatch(
    info: GroupInfo,
    rank: int,
    x: Tensor | AsInt8,
    is_token_in_rank: Tensor,
    num_tokens_per_expert: Tensor,
    topk_idx: Tensor | None,
    topk_weights: Tensor | None,
    expert_alignment: int,
    num_worst_tokens: int,
) -> Plan:
    """Sends every token once to each of its ranks. Differentiable in x and topk_weights.

    Args:
        x: [T, H] bf16, fp16 or fp32.
        is_token_in_rank: bool [T, R].
        num_tokens_per_expert: int32 [E].
        topk_idx: int64 [T, K] with ids of 0..E-1 or -1, or None for no metadata.
        topk_weights: fp32 [T, K]; None means ones.
        expert_alignment: the counts are rounded up to multiples of it.
        num_worst_tokens: 0 for exact shapes, or N.

    Returns:
        recv_x [N, H], rows ordered by source rank, token; recv_topk_idx int64 [N, K], local ids, -1 where the expert
        is not of this rank; recv_topk_weights fp32 [N, K], 0 there; pairs of (token, expert) per local expert (a
        list; int64 [L] under torch.compile; an empty list with num_worst_tokens); handle.

    Raises:
        ValueError: an argument of another dtype or shape.
        RuntimeError: as `deep_ep.dispatch`.
    """
    _check_mask(is_token_in_rank, info.size)
    E = num_tokens_per_expert.shape[0]
    if E == 0 or E % info.size or E > MAX_EXPERTS:
        raise ValueError(
            f"num_tokens_per_expert must have E entries, a multiple of R = {info.size} and at most {MAX_EXPERTS}, "
            f"got {E}"
        )
    L = E // info.size
    metadata = None
    if topk_idx is not None:
        if topk_idx.dim() != 2:
            raise ValueError(f"topk_idx must have the shape [T, K], got {list(topk_idx.shape)}")
        weights = torch.ones_like(topk_idx, dtype=torch.float32) if topk_weights is None else topk_weights
        if weights.dim() != 2 or weights.shape[1] != topk_idx.shape[1]:
            raise ValueError(
                f"topk_weights must have the shape [T, K] with K = {topk_idx.shape[1]}, got {list(weights.shape)}"
            )
        for name, tensor in (("topk_idx", topk_idx), ("topk_weights", weights)):
            if checks.differ(tensor.shape[0], is_token_in_rank.shape[0]):
                raise ValueError(
                    f"{name} must have T = {is_token_in_rank.shape[0]} rows like is_token_in_rank, "
                    f"got {list(tensor.shape)}"
                )
        metadata = torch.cat([topk_idx.to(torch.float32), weights], 1)
    elif topk_weights is not None:
        raise ValueError("topk_idx is missing; topk_weights mean nothing without it")

    ids = _ids(is_token_in_rank)
    if topk_idx is not None and checks.has_values(topk_idx):
        if error := checks.ids_error(topk_idx, E):
            raise ValueError(error)
    elif topk_idx is not None:
        # The op finds ids that there are not, and refuses them on all ranks.
        least, most = topk_idx.amin(1, keepdim=True), topk_idx.amax(1, keepdim=True)
        ids = torch.where(most >= E, most, torch.where(least < -1, least, ids))
    sent = [x] if metadata is None else [x, metadata]

    def received(rows: DispatchOutput, of_metadata: DispatchOutput | None = None) -> tuple[object, ...]:
        recv_x, handle = rows.recv_x, RankHandle(*rows.handle[:6])
        recv_topk_idx, recv_topk_weights = None, None
        if of_metadata is not None:
            K = of_metadata.recv_x.shape[1] // 2
            data = same_rows(of_metadata.recv_x, rows.recv_topk_idx.shape[0])
            recv_topk_idx = data[:, :K].detach().to(torch.int64) - rank * L
            is_local = (recv_topk_idx >= 0) & (recv_topk_idx < L) & (handle.recv_src_idx[:, :1] >= 0)
            recv_topk_idx = torch.where(is_local, recv_topk_idx, -1)
            recv_topk_weights = torch.where(is_local, data[:, K:], 0.0)
        if num_worst_tokens != 0:
            return recv_x, recv_topk_idx, recv_topk_weights, [], handle
        if recv_topk_idx is not None:
            # Column 0 takes the ids of other ranks.
            column = recv_topk_idx.flatten() + 1
            counts = column.new_zeros(L + 1).scatter_add(0, column, torch.ones_like(column))[1:]
        else:
            counts = _exchange_counts(info, num_tokens_per_expert)
        counts = (counts + (expert_alignment - 1)) // expert_alignment * expert_alignment
        listed = counts if torch.compiler.is_compiling() else counts.tolist()
        return recv_x, recv_topk_idx, recv_topk_weights, listed, handle

    calls = [(info, rows, ids, None, info.size, num_worst_tokens, is_token_in_rank) for rows in sent]
    return Plan(dispatch_op, calls, received, (num_worst_tokens,))


def _exchange_counts(info: GroupInfo, num_tokens_per_expert: Tensor) -> Tensor:
    """int64 [L]: what all ranks together have for this rank's experts, from their num_tokens_per_expert [E]."""
    R = info.size
    # Row d holds the counts of rank d's experts and goes there; each number in two parts that fp32 holds exactly.
    counts = num_tokens_per_expert.to(torch.int64).view(R, -1)
    parts = torch.cat([counts >> 16, counts & 0xFFFF], 1).to(torch.float32)
    ids = torch.arange(R, device=counts.device).unsqueeze(1)
    mask = torch.eye(R, dtype=torch.int32, device=counts.device)
    high, low = dispatch_op.call(info, parts, ids, None, R, R, mask).recv_x.to(torch.int64).sum(0).chunk(2)
    return (high << 16) + low


def cached_dispatch(info: GroupInfo, x: Tensor | AsInt8, handle: tuple[Tensor, ...]) -> Plan:
    """recv_x [N, H] of x [T, H], sent as the tokens of the dispatch that gave `handle`, three times None, and the
    handle. Differentiable in x.

    ValueError: not a handle of this contract. RuntimeError: as `deep_ep.dispatch`.
    """
    known = check_handle(handle)
    N = known.recv_src_idx.shape[0]
    mask = known.is_token_in_rank

    def received(rows: DispatchOutput, *_: Tensor) -> tuple[object, ...]:
        return same_rows(rows.recv_x, N), None, None, None, handle

    calls = [(info, x, _ids(mask), None, info.size, capacity_of(N), mask)]
    return Plan(dispatch_op, calls, received, (N,), tuple(handle))


def combine(info: GroupInfo, x: Tensor, handle: tuple[Tensor, ...], topk_weights: Tensor | None) -> Plan:
    """Sums up each token's rows, and what the ranks have for its weights. Differentiable in both.

    Args:
        x: [N, H] bf16, fp16 or fp32, in the row order of recv_x.
        handle: of that dispatch.
        topk_weights: fp32 [N, K], or None.

    Returns:
        combined_x [T, H] in x's dtype: the sum in fp32, in the order of ranks, rounded once; combined_topk_weights
        fp32 [T, K], or None without topk_weights.

    Raises:
        ValueError: not a handle of this contract, or topk_weights of another dtype or shape.
        RuntimeError: as `deep_ep.combine`.
    """
    if topk_weights is not None and topk_weights.dim() != 2:
        raise ValueError(f"topk_weights must have the shape [N, K], got {list(topk_weights.shape)}")
    known = op_handle(handle)
    calls = [(info, x, known)]
    if topk_weights is not None:
        calls.append((info, topk_weights, known))
    return Plan(combine_op, calls, lambda combined, of_weights=None: (combined, of_weights))
