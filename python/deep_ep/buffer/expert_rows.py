"""rows="expert": the rows of DeepEP-Ascend, one per (token, expert), as the ops give them.

T local tokens · H hidden · K top-k · E experts · R ranks · L = E/R local experts · N received rows.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checks, quantization
from ..env import Rounds
from ..ep_strategy import Rows
from ..groups import GroupInfo
from ..handles import copy_in_graph, readable_by_name
from ..ops import combine as combine_op
from ..ops import dispatch as dispatch_op
from ..ops import low_latency_combine as low_latency_combine_op
from ..ops import low_latency_dispatch as low_latency_dispatch_op
from ..ops import low_latency_dispatch_int8 as dispatch_int8_op
from ..ops.dispatch import AsInt8, DispatchHandle
from ..ops.low_latency_dispatch import LowLatencyHandle, LowLatencyOutput
from .rows import Routing, capacity_of, hidden_of, same_rows
from .two_steps import Plan


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


class ExpertRows:
    """The contract. A token's rows are summed up with the weights given to dispatch.

    Args:
        rounds: of num_tokens_per_expert.
        has_running_counts: the rows of local experts are listed as running sums.
        spans_servers: the group does, so that handles are in the order of DeepEP-Ascend's there.
    """

    name = "expert"
    is_of_ascend = True
    goes_on = False
    needs: tuple[str, ...] = ("num_tokens_per_rank", "is_token_in_rank", "num_tokens_per_expert", "topk_idx")

    def __init__(self, rounds: Rounds, has_running_counts: bool, spans_servers: bool) -> None:
        self.rounds = rounds
        self._has_running_counts = has_running_counts
        self._spans_servers = spans_servers

    # Normal mode

    def ops_of_dispatch(self, given: dict[str, Any]) -> Sequence[str]:
        return ("dispatch",) if given.get("handle") is None else ("combine", "dispatch")

    def ops_of_combine(self, given: dict[str, Any]) -> Sequence[str]:
        return ("combine",)

    def layout(self, topk_idx: Tensor, per_expert: Tensor, in_rank: Tensor) -> tuple[Tensor, Tensor]:
        if self.rounds.number > 1:
            per_expert = _per_round(topk_idx, per_expert.shape[0], self.rounds)
        return per_expert, in_rank

    def dispatch(self, info: GroupInfo, x: Tensor | AsInt8, routing: Routing) -> Plan:
        topk_idx, num_tokens_per_expert = routing.topk_idx, routing.num_tokens_per_expert
        assert topk_idx is not None and num_tokens_per_expert is not None
        E, num_worst_tokens = self.rounds.num_experts(num_tokens_per_expert), routing.num_worst_tokens

        def received(out: dispatch_op.DispatchOutput) -> tuple[Any, ...]:
            return self._as_clients_get(out, routing.expert_alignment, exact=num_worst_tokens == 0)

        call = info, x, topk_idx, routing.topk_weights, E, num_worst_tokens, routing.is_token_in_rank
        return Plan(dispatch_op, [call], received, (num_worst_tokens,))

    def cached_dispatch(self, info: GroupInfo, x: Tensor | AsInt8, handle: tuple[Tensor, ...]) -> Plan:
        aligned = _as_aligned(handle)
        known = self.op_handle(handle)
        N = known.recv_src_idx.shape[0]
        E = info.size * known.channel_prefix_matrix.shape[1]
        # Known here, so that a list of them needs no rows.
        end = known.recv_channel_prefix_matrix[:, -1].long().clamp(max=(known.recv_src_idx[:, 0] >= 0).sum())
        counts = aligned.num_rows if aligned is not None else end.diff(prepend=end.new_zeros(1))
        listed = self._listed(counts, True)

        def received(out: dispatch_op.DispatchOutput) -> tuple[Any, ...]:
            same_rows(out.recv_x, N)
            results: tuple[Any, ...] = out.recv_x, out.recv_topk_idx, out.recv_topk_weights
            if aligned is not None:
                results = _spread(out, aligned.position, aligned.recv_src_idx.shape[0])[:3]
            return *results, listed, handle

        call = info, x, known.topk_idx, known.topk_weights, E, capacity_of(N), known.is_token_in_rank
        return Plan(dispatch_op, [call], received, (N,))

    def op_handle(self, handle: tuple[Tensor, ...]) -> DispatchHandle:
        known = _named(handle)
        if isinstance(known, InternodeHandle):
            *first, inner, outer, count, _ = known
            return DispatchHandle(count, outer, inner, *first)
        if isinstance(known, AlignedHandle):
            rows = known.recv_src_idx.index_select(0, known.position)
            return DispatchHandle(*known[:8])._replace(recv_src_idx=rows)
        return known

    def tokens(self, handle: tuple[Tensor, ...]) -> torch.Size:
        return _named(handle).topk_idx.shape[:-1]

    def form_of_combine(self, topk_weights: Tensor | None) -> str:
        return f'rows="{self.name}"'

    def combine(self, info: GroupInfo, x: Tensor, handle: tuple[Tensor, ...], topk_weights: Tensor | None) -> Plan:
        known = _with_weights(self.op_handle(handle), topk_weights)
        aligned = _as_aligned(handle)
        if aligned is not None:
            x = x.index_select(0, aligned.position)
        return Plan(combine_op, [(info, x, known)], lambda combined: (combined, None))

    def scales(self, scales: Tensor) -> Tensor:
        return quantization.in_one_row(scales)

    def _as_clients_get(self, out: dispatch_op.DispatchOutput, expert_alignment: int, exact: bool) -> tuple[Any, ...]:
        """recv_x, recv_topk_idx, recv_topk_weights, counts and handle."""
        counts = out.num_recv_tokens_per_expert
        results: tuple[Any, ...] = out.recv_x, out.recv_topk_idx, out.recv_topk_weights, out.handle
        if expert_alignment != 1:
            results = _align(out, expert_alignment, exact)
            counts = results[3].num_rows
        elif self._spans_servers:
            results = *results[:3], _across_servers(out)
        return *results[:3], self._listed(counts, exact), results[3]

    def _listed(self, counts: Tensor, exact: bool) -> list[int] | Tensor:
        if self._has_running_counts:
            counts = counts.cumsum(0)
        return counts.tolist() if exact and not torch.compiler.is_compiling() else counts

    # Low latency

    def fp8_mode(self, use_ue8m0: bool) -> str:
        return "mx_fp8_e4m3" if use_ue8m0 else "int8"

    def is_quantised_by_kernel(self, info: GroupInfo, x: Tensor, quant_mode: str) -> bool:
        return quant_mode == "int8" and dispatch_int8_op.is_for(info, x)

    def low_latency_dispatch(
        self,
        info: GroupInfo,
        x: Tensor,
        topk_idx: Tensor,
        sent: tuple[Tensor, Tensor] | None,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
    ) -> Plan:
        hidden = hidden_of(x, sent)

        def received(out: LowLatencyOutput) -> tuple[Rows, Tensor, LowLatencyHandle]:
            rows: Rows = out.recv_x
            if sent is not None:
                data, scales = quantization.unpack(out.recv_x, *sent)
                rows = data, quantization.in_one_row(scales)
            return rows, out.recv_count, out.handle._replace(hidden=hidden)

        call = info, x, topk_idx, num_max_dispatch_tokens_per_rank, num_experts
        return Plan(low_latency_dispatch_op, [call], received)

    @staticmethod
    def low_latency_shape(handle: Any, num_ranks: int) -> tuple[int, ...]:
        return handle.src_info.shape[0], handle[3]

    @staticmethod
    def low_latency_combine(info: GroupInfo, x: Tensor, topk_idx: Tensor, topk_weights: Tensor, handle: Any) -> Plan:
        call = info, x, topk_idx, topk_weights, LowLatencyHandle(*handle)
        return Plan(low_latency_combine_op, [call], lambda result: result)


def _named(handle: tuple[Tensor, ...]) -> DispatchHandle | AlignedHandle | InternodeHandle:
    """ValueError: not 8 tensors, 9 across servers or 10 with padding rows."""
    for kind in (DispatchHandle, InternodeHandle, AlignedHandle):
        if len(handle) == len(kind._fields):
            return kind(*handle)
    raise ValueError(
        f'handle must be of a dispatch under rows="expert", with {len(DispatchHandle._fields)} tensors; '
        f"got {len(handle)}"
    )


def _as_aligned(handle: tuple[Tensor, ...]) -> AlignedHandle | None:
    return AlignedHandle(*handle) if len(handle) == len(AlignedHandle._fields) else None


def _per_round(topk_idx: Tensor, num_experts: int, rounds: Rounds) -> Tensor:
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


def _across_servers(out: dispatch_op.DispatchOutput) -> InternodeHandle:
    known = out.handle
    return InternodeHandle(
        *known[3:],
        known.recv_channel_prefix_matrix,
        known.channel_prefix_matrix,
        known.rank_prefix_matrix,
        out.recv_topk_weights.detach().sum(1),
    )


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
