"""rows="rank": the rows of upstream DeepEP, one per (token, rank), over the ops that send one per (token, expert).

A rank stands for its only expert: E' = R, K' = R, and a token has id d in column d where it goes to rank d, else -1.
The weights are ones, so combine is the plain sum. What a rank needs to know of its tokens' experts travels as further
rows of the same routing.

T local tokens · H hidden · K top-k · E experts · R ranks · L = E/R local experts · N received rows.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..env import Rounds
from ..ep_strategy import Rows
from ..groups import GroupInfo
from ..handles import readable_by_name
from ..ops import combine as combine_op
from ..ops import dispatch as dispatch_op
from ..ops import low_latency_combine_padded as low_latency_combine_op
from ..ops import low_latency_dispatch_padded as low_latency_dispatch_op
from ..ops.dispatch import AsInt8, DispatchHandle, DispatchOutput
from ..ops.low_latency_dispatch import LowLatencyHandle
from ..ops.low_latency_dispatch_padded import PaddedHandle, PaddedOutput
from .rows import Routing, capacity_of, hidden_of, same_rows
from .two_steps import Plan

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


class RankRows:
    """The contract, on the rank `rank`. A token's rows are summed up as they are."""

    name = "rank"
    is_of_ascend = False
    goes_on = True
    needs: tuple[str, ...] = ("num_tokens_per_rank", "is_token_in_rank", "num_tokens_per_expert")

    def __init__(self, rounds: Rounds, rank: int) -> None:
        self.rounds = rounds._replace(number=1)
        self._rank = rank

    # Normal mode

    def ops_of_dispatch(self, given: dict[str, Any]) -> Sequence[str]:
        if given.get("handle") is not None:
            return "combine", "dispatch"
        worst = given.get("num_worst_tokens", 0)
        is_static = isinstance(worst, int) and worst != 0
        return ("dispatch",) * (1 if given.get("topk_idx") is None and is_static else 2)

    def ops_of_combine(self, given: dict[str, Any]) -> Sequence[str]:
        return ("combine",) * (1 if given.get("topk_weights") is None else 2)

    def layout(self, topk_idx: Tensor, per_expert: Tensor, in_rank: Tensor) -> tuple[Tensor, Tensor]:
        return per_expert, in_rank.to(torch.bool)

    def dispatch(self, info: GroupInfo, x: Tensor | AsInt8, routing: Routing) -> Plan:
        """Sends every token once to each of its ranks: see `Buffer.dispatch`."""
        is_token_in_rank, num_tokens_per_expert = routing.is_token_in_rank, routing.num_tokens_per_expert
        topk_idx, topk_weights, num_worst_tokens = routing.topk_idx, routing.topk_weights, routing.num_worst_tokens
        assert is_token_in_rank is not None and num_tokens_per_expert is not None
        _check_mask(is_token_in_rank, info.size)
        E = num_tokens_per_expert.shape[0]
        if E == 0 or E % info.size or E > MAX_EXPERTS:
            raise ValueError(
                f"num_tokens_per_expert must have E entries, a multiple of R = {info.size} and at most {MAX_EXPERTS}, "
                f"got {E}"
            )
        L = E // info.size
        metadata = _metadata(is_token_in_rank, topk_idx, topk_weights)
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
                recv_topk_idx = data[:, :K].detach().to(torch.int64) - self._rank * L
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
            counts = (counts + (routing.expert_alignment - 1)) // routing.expert_alignment * routing.expert_alignment
            listed = counts if torch.compiler.is_compiling() else counts.tolist()
            return recv_x, recv_topk_idx, recv_topk_weights, listed, handle

        calls = [(info, rows, ids, None, info.size, num_worst_tokens, is_token_in_rank) for rows in sent]
        return Plan(dispatch_op, calls, received, (num_worst_tokens,), arranges=metadata is None)

    def cached_dispatch(self, info: GroupInfo, x: Tensor | AsInt8, handle: tuple[Tensor, ...]) -> Plan:
        known = check_handle(handle)
        N = known.recv_src_idx.shape[0]
        mask = known.is_token_in_rank

        def received(rows: DispatchOutput, *_: Tensor) -> tuple[object, ...]:
            return same_rows(rows.recv_x, N), None, None, None, handle

        calls = [(info, x, _ids(mask), None, info.size, capacity_of(N), mask)]
        return Plan(dispatch_op, calls, received, (N,), tuple(handle), arranges=True)

    def op_handle(self, handle: tuple[Tensor, ...]) -> DispatchHandle:
        known = check_handle(handle)
        ids = _ids(known.is_token_in_rank)
        return DispatchHandle(*known, ids, torch.ones_like(ids, dtype=torch.float32))

    def tokens(self, handle: tuple[Tensor, ...]) -> torch.Size:
        return check_handle(handle).is_token_in_rank.shape[:-1]

    def form_of_combine(self, topk_weights: Tensor | None) -> str:
        return f'rows="{self.name}"' + ("" if topk_weights is None else ", with topk_weights")

    def combine(self, info: GroupInfo, x: Tensor, handle: tuple[Tensor, ...], topk_weights: Tensor | None) -> Plan:
        if topk_weights is not None and topk_weights.dim() != 2:
            raise ValueError(f"topk_weights must have the shape [N, K], got {list(topk_weights.shape)}")
        known = self.op_handle(handle)
        calls = [(info, x, known)]
        if topk_weights is not None:
            calls.append((info, topk_weights, known))
        return Plan(combine_op, calls, lambda combined, of_weights=None: (combined, of_weights), arranges=True)

    def scales(self, scales: Tensor) -> Tensor:
        return scales

    # Low latency

    def fp8_mode(self, use_ue8m0: bool) -> str:
        return "block_fp8_e4m3"

    def is_quantised_by_kernel(self, info: GroupInfo, x: Tensor, quant_mode: str) -> bool:
        return False

    def low_latency_dispatch(
        self,
        info: GroupInfo,
        x: Tensor,
        topk_idx: Tensor,
        sent: tuple[Tensor, Tensor] | None,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
    ) -> Plan:
        def received(out: PaddedOutput) -> tuple[Rows, Tensor, PaddedHandle]:
            rows = out.recv_x if sent is None else (out.recv_x, out.recv_scales)
            return rows, out.recv_count, out.handle

        sizes = num_max_dispatch_tokens_per_rank, num_experts, hidden_of(x, sent)
        calls = [(info, x, topk_idx, list(sent or ()), *sizes)]
        return Plan(low_latency_dispatch_op, calls, received, arranges=True)

    @staticmethod
    def low_latency_shape(handle: Any, num_ranks: int) -> tuple[int, ...]:
        M, H, E = handle[2], handle[3], handle[4]
        return E // num_ranks, num_ranks * M, H

    @staticmethod
    def low_latency_combine(info: GroupInfo, x: Tensor, topk_idx: Tensor, topk_weights: Tensor, handle: Any) -> Plan:
        L, RM, _ = RankRows.low_latency_shape(handle, info.size)
        if x.dim() != 3 or checks.differ(x.shape[0], L) or checks.differ(x.shape[1], RM):
            raise ValueError(
                f"x must have the shape [L, R·M, H] of low_latency_dispatch's recv_x with L = {L} and "
                f"R·M = {RM}, got {list(x.shape)}"
            )
        call = info, x.contiguous(), topk_idx, topk_weights, LowLatencyHandle(*handle.packed)
        return Plan(low_latency_combine_op, [call], lambda result: result, arranges=True)


def _ids(is_token_in_rank: Tensor) -> Tensor:
    """int64 [T, R]: d in column d where the token goes to rank d, else -1."""
    ranks = torch.arange(is_token_in_rank.shape[1], device=is_token_in_rank.device)
    return torch.where(is_token_in_rank, ranks, -1)


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


def _check_mask(is_token_in_rank: Tensor, num_ranks: int) -> None:
    if is_token_in_rank.dtype != torch.bool:
        raise ValueError(f'is_token_in_rank must be torch.bool under rows="rank", got {is_token_in_rank.dtype}')
    if is_token_in_rank.dim() != 2 or is_token_in_rank.shape[1] != num_ranks:
        raise ValueError(
            f"is_token_in_rank must have the shape [T, R] with R = {num_ranks}, got {list(is_token_in_rank.shape)}"
        )


def _metadata(is_token_in_rank: Tensor, topk_idx: Tensor | None, topk_weights: Tensor | None) -> Tensor | None:
    """fp32 [T, 2·K]: what a rank needs to know of the tokens' experts. ValueError: one of another dtype or shape."""
    if topk_idx is None:
        if topk_weights is not None:
            raise ValueError("topk_idx is missing; topk_weights mean nothing without it")
        return None
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
                f"{name} must have T = {is_token_in_rank.shape[0]} rows like is_token_in_rank, got {list(tensor.shape)}"
            )
    return torch.cat([topk_idx.to(torch.float32), weights], 1)


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
