"""The `.alltoall` overloads: the normal-mode ops over torch.distributed, any device, any number of hosts.

Each function is the kernel of the op of its name and has its schema's arguments. Symbols: T local tokens,
H hidden, K top-k, E experts, R ranks, L = E/R local experts, N received rows, W num_worst_tokens (0 = exact
mode). A slot is t * K + k, one (token, k) of its source rank.

Every communicating op starts with an all-gather of one header per rank (`_Call.agree`). All ranks judge the
same headers by the same rule, so a bad argument on one rank, or ranks in different ops, raise on every rank,
and the group is ready for the next call. Collectives after the header, on the group's `Communicator`:

    dispatch           counts [E]; slots with their weights; each token once per destination
    combine            rows, one per slot: the sum is taken in k order, so there are no partial sums
    dispatch_backward  rows; gradients of the weights
    combine_backward   weights; each token's gradient once per destination; gradients of the weights
"""

import time
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .. import calls, checks, communicator, profile
from .results import DispatchResult

_OPS = (
    "dispatch",
    "combine",
    "dispatch_backward",
    "combine_backward",
    "low_latency_dispatch",
    "low_latency_combine",
    "fused_deep_moe",
    "fused_deep_moe.dispatch_ffn_combine",
    "fused_deep_moe_backward",
)
_TEXT_BYTES = 512
# Elements of a block of rows whose fp32 sums stay in a core's cache.
_BLOCK = 1 << 16


def _handle_error(
    topk_idx: Tensor,
    recv_src_idx: Tensor,
    send_head: Tensor,
    num_experts: int,
    num_ranks: int,
    is_low_latency: bool = False,
) -> str | None:
    error = (
        checks.ids_error(topk_idx, num_experts)
        or checks.range_error("recv_src_idx[:, 0]", "source rank", recv_src_idx[:, 0], num_ranks)
        or checks.range_error("recv_src_idx[:, 2]", "k", recv_src_idx[:, 2], topk_idx.shape[1])
    )
    if error:
        return error
    partial = (recv_src_idx >= 0).any(1) & (recv_src_idx < 0).any(1)
    if partial.any():
        row = int(partial.nonzero()[0])
        return f"recv_src_idx[{row}] must be three values >= 0 or three -1, got {recv_src_idx[row].tolist()}"
    stray = (send_head >= 0) & (topk_idx < 0)
    if stray.any():
        return f"send_head has a row at {stray.nonzero()[0].tolist()}, where topk_idx has no expert"
    if is_low_latency and (unsent := (send_head < 0) & (topk_idx >= 0)).any():
        at = unsent.nonzero()[0].tolist()
        return (
            f"topk_idx has the id {int(topk_idx[tuple(at)])} at {at}, which was not dispatched; it must be that of "
            "low_latency_dispatch"
        )
    return None


# Agreement and collectives


class _Routes(NamedTuple):
    """Which rows go back to which slots, from a dispatch's recv_src_idx and send_head."""

    rows: Tensor  # this rank's used rows, ordered by (source rank, row)
    slots: Tensor  # this rank's delivered slots, ordered by (destination, row there)
    rows_per_rank: list[int]
    slots_per_rank: list[int]
    row_marks: list[int]  # per source rank: a hash of its set of (slot, row), in low latency with the expert
    slot_marks: list[int]  # per destination: the same


class _Header(NamedTuple):
    """What every rank tells the others before an op."""

    op: int
    failed: int
    form: int  # a hash of that of the call, 0 for none
    gradient: int  # ThreadCalls::gradient, src/shm/thread_calls.h
    T: int
    W: int
    common: list[int]  # the values of _COMMON
    rows_per_rank: list[int]
    slots_per_rank: list[int]
    row_marks: list[int]
    slot_marks: list[int]


# Their values are numbers, a dtype's place in checks.FLOATS, and the first letters of a device's type.
_COMMON = ("the hidden size", "the number of ids per token", "num_experts", "the dtype", "the device")


class _Call:
    """One op in its group, as this rank takes part in it: a context manager.

    An error before `agree` is one of the arguments: it is raised on all ranks. What ends the op on this rank alone
    afterwards ends the use of the group.
    """

    def __init__(self, op: str, group: str, tensor: Tensor) -> None:
        self.op = op
        self.group = communicator.of(op, group)
        self.group.join()
        self.rank, self.size = self.group.rank, self.group.size
        # A tensor that the group cannot send, or that is on another device than those of other ranks, must not keep
        # this rank's header from arriving.
        self.device_error = None
        if tensor.device.type not in self.group.devices:
            allowed = " or ".join(sorted(self.group.devices))
            self.device_error = f"tensors must be on {allowed} as their group, got {tensor.device}"
        self._has_entered = False
        self._is_rejected = False
        self._begin = time.monotonic_ns()

    def __enter__(self) -> "_Call":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        if error is None:
            profile.note(self.group.name, self.op, self._begin)
        if error is None or self._is_rejected:
            return
        if not isinstance(error, Exception):
            self.group.give_up(f"was interrupted ({type(error).__name__})")
        elif self._has_entered:
            self.group.give_up(f"gave up: {error}")
        else:
            nothing = torch.empty(0, 0)
            self.agree(str(error), nothing, nothing, 0)

    def rejected(self, message: str) -> RuntimeError:
        """The error that all ranks raise."""
        self._is_rejected = True
        return RuntimeError(message)

    def agree(
        self,
        error: str | None,
        x: Tensor,
        topk_idx: Tensor,
        num_experts: int,
        num_worst_tokens: int = 0,
        routes: _Routes | None = None,
    ) -> list[_Header]:
        """Returns all ranks' headers, or raises the same error on all ranks.

        error: what is wrong with this rank's arguments. x's columns are H.
        """
        if calls.mine.failed is not None and calls.mine.failed.error is not None:
            raise calls.mine.failed.error
        self._has_entered = True
        calls.mine.enter()
        R = self.size
        form = "" if error else calls.mine.form
        gradient = calls.mine.take_gradient()
        header = [_OPS.index(self.op), 1] + [0] * (4 + len(_COMMON) + 4 * R)
        if not error:
            device_type = int.from_bytes(x.device.type.encode()[:7], "big")
            common = [x.shape[1], topk_idx.shape[1], num_experts, checks.FLOATS.index(x.dtype), device_type]
            own = [zlib.crc32(form.encode()), gradient, topk_idx.shape[0], num_worst_tokens]
            header[1 : 6 + len(common)] = [0, *own, *common]
        if routes:
            header[-4 * R :] = [value for per_rank in routes[2:] for value in per_rank]
        gathered = self.all_gather("headers", torch.tensor(header, dtype=torch.int64))
        headers = []
        for op, failed, form_hash, needed, T, W, *values in gathered.tolist():
            per_rank = [values[i : i + R] for i in range(len(_COMMON), len(values), R)]
            headers.append(_Header(op, failed, form_hash, needed, T, W, values[: len(_COMMON)], *per_rank))
        # A rank that failed before it knew its op may name another one than its peers: its reason counts.
        if any(h.failed for h in headers):
            self._raise_reasons(error)
        self._check_ops(headers)
        if len({h.form for h in headers} - {0}) > 1:
            self._raise_forms(form)
        self._check_gradients([h.gradient for h in headers])
        self._check_common(headers)
        self._check_routes(headers)
        return headers

    def _check_ops(self, headers: list[_Header]) -> None:
        ranks_in: dict[int, list[str]] = {}
        for rank, header in enumerate(headers):
            ranks_in.setdefault(header.op, []).append(str(rank))
        if len(ranks_in) > 1:
            where = "; ".join(f"{_OPS[op]} on rank {', '.join(ranks)}" for op, ranks in ranks_in.items())
            raise self.rejected(f"deep_ep: the ranks are in different ops: {where}")

    def _raise_reasons(self, error: str | None) -> None:
        """Raises what is wrong on which ranks."""
        reasons = self._texts(error or "")
        told = "; ".join(f"rank {rank}: {reason}" for rank, reason in enumerate(reasons) if reason)
        if self.size > 1 and len(set(reasons)) == 1:
            told = f"all ranks: {reasons[0]}"
        raise self.rejected(f"deep_ep.{self.op}: {told}")

    def _raise_forms(self, form: str) -> None:
        told = ", ".join(f"rank {rank} has {text}" for rank, text in enumerate(self._texts(form)) if text)
        raise self.rejected(f"deep_ep.{self.op}: the calls differ: {told}; it must be the same on all ranks")

    def _check_gradients(self, gradients: list[int]) -> None:
        if 1 in gradients and 2 in gradients:
            raise self.rejected(
                f"deep_ep.{self.op}: rank {gradients.index(2)} needs a gradient of what it sends, rank "
                f"{gradients.index(1)} does not, and would not take part in backward; it must be the same on all ranks"
            )

    def _texts(self, text: str) -> list[str]:
        """Every rank's."""
        row = list(text.encode()[:_TEXT_BYTES].ljust(_TEXT_BYTES, b"\0"))
        texts = self.all_gather("errors", torch.tensor(row, dtype=torch.uint8))
        return [bytes(row.tolist()).rstrip(b"\0").decode(errors="ignore") for row in texts]

    def _check_common(self, headers: list[_Header]) -> None:
        def text(what: str, value: int) -> str:
            if what == "the dtype":
                return str(checks.FLOATS[value])
            return value.to_bytes(7, "big").strip(b"\0").decode() if what == "the device" else str(value)

        for rank, header in enumerate(headers):
            for what, given, first in zip(_COMMON, header.common, headers[0].common, strict=True):
                if given != first:
                    raise self.rejected(
                        f"deep_ep.{self.op}: rank {rank}: {what} is {text(what, given)}, but on rank 0 it is "
                        f"{text(what, first)}; it must be equal on all ranks"
                    )

    def _check_routes(self, headers: list[_Header]) -> None:
        for d, at in enumerate(headers):
            for s, to in enumerate(headers):
                has, expected = at.rows_per_rank[s], to.slots_per_rank[d]
                if has != expected:
                    difference = f"recv_src_idx has {has} rows of rank {s}, whose send_head has {expected}"
                elif at.row_marks[s] != to.slot_marks[d]:
                    difference = f"recv_src_idx and the send_head of rank {s} differ in their {has} rows"
                else:
                    continue
                raise self.rejected(
                    f"deep_ep.{self.op}: rank {d}: {difference}; all ranks must pass one dispatch's handle"
                    + (", and its topk_idx" if self.op == "low_latency_combine" else "")
                )

    def all_gather(self, what: str, row: Tensor) -> Tensor:
        """Returns [R, n] on the host, from every rank's [n]."""
        return self.group.all_gather(self.op, what, row.cpu())

    def all_to_all(self, what: str, rows: Tensor, to: list[int], of: list[int], out: Tensor | None = None) -> Tensor:
        """Sends to[i] rows to rank i and returns the of[i] rows of every rank i, ordered by i."""
        if out is None:
            out = rows.new_empty(sum(of), *rows.shape[1:])
        self.group.all_to_all(self.op, what, out, rows, of, to)
        return out


def _routes(
    recv_src_idx: Tensor,
    topk_idx: Tensor,
    send_head: Tensor,
    num_experts: int,
    num_ranks: int,
    layout_range: Tensor | None = None,
) -> _Routes:
    """layout_range: of low latency, where ranks compare experts, too."""
    K, L = topk_idx.shape[1], num_experts // num_ranks
    source, token, k = recv_src_idx.long().unbind(1)
    rows, rows_per_rank = _sort_by_rank(source, source, num_ranks)
    head = send_head.view(-1).long()
    destination = (topk_idx.view(-1) // L).where(head >= 0, -1)
    slots, slots_per_rank = _sort_by_rank(destination, (destination << 32) + head, num_ranks)
    to_slot, of_slot = token[rows] * K + k[rows], slots
    if layout_range is not None:
        ends = layout_range.view(L, num_ranks)[:, -1].contiguous()
        to_slot = to_slot * L + torch.searchsorted(ends, rows.to(torch.int32), right=True).clamp(max=L - 1)
        of_slot = slots * L + topk_idx.view(-1)[slots] % L
    return _Routes(
        rows,
        slots,
        rows_per_rank,
        slots_per_rank,
        _marks(to_slot, rows, source[rows], num_ranks),
        _marks(of_slot, head[slots], destination[slots], num_ranks),
    )


def _sort_by_rank(rank: Tensor, key: Tensor, num_ranks: int) -> tuple[Tensor, list[int]]:
    """The entries with rank >= 0, ordered by key, which grows with rank; and their count per rank."""
    unused, *counts = torch.bincount(rank + 1, minlength=num_ranks + 1).tolist()
    return torch.argsort(key, stable=True)[unused:], counts


def _marks(slot: Tensor, row: Tensor, rank: Tensor, num_ranks: int) -> list[int]:
    """Per rank, a hash of the set of its (slot, row), in which order they may be given."""
    # Odd multipliers and shifts as in splitmix64: every bit of the pair reaches every bit of the sum.
    mark = slot * 0x1E3779B97F4A7C15 + row * 0x3F58476D1CE4E5B9
    mark = (mark ^ (mark >> 31)) * 0x14D049BB133111EB
    mark = mark ^ (mark >> 29)
    return torch.zeros(num_ranks, dtype=torch.int64, device=slot.device).index_add_(0, rank, mark).tolist()


def _distinct_tokens(rank: Tensor, token: Tensor, num_ranks: int, T: int) -> tuple[Tensor, Tensor]:
    """Which tokens occur per rank, bool [R, T], and the place of each entry's token among all of them."""
    occurs = torch.zeros(num_ranks, T, dtype=torch.bool, device=rank.device)
    occurs[rank, token] = True
    place = occurs.view(-1).cumsum(0).view(num_ranks, T) - 1
    return occurs, place[rank, token]


def _blocks(n: int, H: int) -> Iterator[slice]:
    step = max(1, _BLOCK // max(1, H))
    return (slice(i, min(i + step, n)) for i in range(0, n, step))


def _exclusive_cumsum(counts: Tensor) -> Tensor:
    return counts.cumsum(0) - counts


# Ops


def reject(op: str, group: str, error: str) -> None:
    """Enters `op` as one that this rank cannot take part in. Raises RuntimeError, as on all ranks."""
    nothing = torch.empty(0, 0)
    _Call(op, group, nothing).agree(error, nothing, nothing, 0)


@calls.completing
def agree(
    op: str, group: str, error: str | None, x: Tensor, topk_idx: Tensor, num_experts: int, M: int, quant_mode: int
) -> None:
    """All ranks issue `op` with the same dtype, sizes, M and quant_mode, or RuntimeError on all of them.

    error: what is wrong with the arguments of this rank, if anything.
    """
    with _Call(op, group, x) as call:
        # A header has one number to spare, for both.
        headers = call.agree(call.device_error or error, x, topk_idx, num_experts, 8 * M + quant_mode)
        for rank, header in enumerate(headers):
            given = zip(
                ("num_max_dispatch_tokens_per_rank", "quant_mode"),
                divmod(headers[0].W, 8),
                divmod(header.W, 8),
                strict=True,
            )
            for what, first, other in given:
                if first != other:
                    raise call.rejected(
                        f"deep_ep.{op}: {what} must be the same on all ranks: rank 0 has {first}, rank {rank} has "
                        f"{other}"
                    )


def get_dispatch_layout(
    topk_idx: Tensor, num_experts: int, num_ranks: int, num_nodes: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Counts of one rank's tokens; a token counts once per rank and once per node.

    topk_idx: int64 [T, K]. Returns num_tokens_per_rank int32 [R], num_tokens_per_rdma_rank int32 [num_nodes],
    num_tokens_per_expert int32 [E] (repeated ids count each time) and is_token_in_rank int32 [T, R]. Node n
    has the ranks from n * R / num_nodes on.
    """
    error = checks.get_dispatch_layout(topk_idx, num_experts, num_ranks, num_nodes) or checks.ids_error(
        topk_idx, num_experts
    )
    if error:
        raise RuntimeError(f"deep_ep.get_dispatch_layout: {error}")
    T = topk_idx.shape[0]
    has_expert = topk_idx >= 0
    rank = topk_idx // (num_experts // num_ranks)
    # Column R takes the slots without an expert.
    in_rank = torch.zeros(T, num_ranks + 1, dtype=torch.int32, device=topk_idx.device)
    in_rank.scatter_(1, rank.where(has_expert, num_ranks), 1)
    is_token_in_rank = in_rank[:, :num_ranks].contiguous()
    in_node = is_token_in_rank.view(T, num_nodes, num_ranks // num_nodes).amax(2)
    return (
        is_token_in_rank.sum(0, dtype=torch.int32),
        in_node.sum(0, dtype=torch.int32),
        torch.bincount(topk_idx[has_expert], minlength=num_experts).to(torch.int32),
        is_token_in_rank,
    )


def dispatch(
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    num_experts: int,
    num_ranks: int,
    num_worst_tokens: int,
    group: str,
) -> DispatchResult:
    """Sends every (token, k) row to the rank of its expert. See DispatchResult.

    x: [T, H]; topk_idx: int64 [T, K]; topk_weights: fp32 [T, K].
    Raises RuntimeError, on all ranks, for a bad argument of any rank and for ranks in different ops; and for
    a failed exchange, such as with a peer that has died.
    """
    with _Call("dispatch", group, x) as call:
        error = checks.dispatch(x, topk_idx, topk_weights, num_experts, num_ranks, num_worst_tokens)
        return _dispatch(call, error, x, topk_idx, topk_weights, num_experts, num_ranks, num_worst_tokens)


def low_latency_dispatch(
    x: Tensor,
    topk_idx: Tensor,
    num_max_dispatch_tokens_per_rank: int,
    num_experts: int,
    num_ranks: int,
    group: str,
    comm_alg: str,
    zero_unused: bool = True,
) -> tuple[Tensor, ...]:
    """Sends every (token, k) row to the rank of its expert, in R·M·min(K, L) rows; x: [T, H], T <= M.

    Returns recv_x, recv_count, recv_src_idx, layout_range and send_head. Raises as dispatch does.
    """
    with _Call("low_latency_dispatch", group, x) as call:
        M = num_max_dispatch_tokens_per_rank
        error = checks.low_latency_dispatch(x, topk_idx, M, num_experts, num_ranks) or checks.crowded_error(
            topk_idx, num_experts // num_ranks
        )
        num_rows = 0 if error else num_ranks * M * min(topk_idx.shape[1], num_experts // num_ranks)
        weights = torch.ones_like(topk_idx, dtype=torch.float32)
        out = _dispatch(call, error, x, topk_idx, weights, num_experts, num_ranks, num_rows, same_rows=True)
        layout_range = out.recv_channel_prefix_matrix.view(-1)
        return out.recv_x, out.num_recv_tokens_per_expert, out.recv_src_idx, layout_range, out.send_head


def _dispatch(
    call: _Call,
    error: str | None,
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    num_experts: int,
    num_ranks: int,
    num_worst_tokens: int,
    same_rows: bool = False,
) -> DispatchResult:
    """`error`: what is wrong with the arguments. same_rows: num_worst_tokens must be equal on all ranks."""
    error = (
        call.device_error or checks.group_size(num_ranks, call.size) or error or checks.ids_error(topk_idx, num_experts)
    )
    headers = call.agree(error, x, topk_idx, num_experts, num_worst_tokens)
    for rank, header in enumerate(headers):
        if same_rows and header.W != headers[0].W:
            raise call.rejected(
                f"deep_ep.{call.op}: num_max_dispatch_tokens_per_rank must be the same on all ranks: rank 0 makes room "
                f"for {headers[0].W} rows, rank {rank} for {header.W}"
            )
    device = x.device
    (T, H), K, R, L = x.shape, topk_idx.shape[1], num_ranks, num_experts // num_ranks

    # Who asks which expert to take how many rows, hence where every row goes: small tables, on the host.
    expert = topk_idx.view(-1)
    asked_here = torch.bincount(expert + 1, minlength=num_experts + 1)[1:]
    asked = call.all_gather("counts", asked_here).view(R, R, L)  # [source, destination, local expert]
    asked_in_row_order = asked.permute(1, 2, 0).reshape(R, L * R)
    end = asked_in_row_order.cumsum(1)
    start = end - asked_in_row_order
    capacity = torch.tensor([[h.W or torch.iinfo(torch.int64).max] for h in headers])
    # [destination, local expert, source]
    kept = (end.minimum(capacity) - start.minimum(capacity)).view(R, L, R)

    most, rank = (int(v) for v in kept.sum((1, 2)).max(0))
    if most > checks.MAX_ROWS:
        raise call.rejected(f"deep_ep.{call.op}: rank {rank} would receive {most} rows; allowed are {checks.MAX_ROWS}")

    # This rank's slots in the order in which their destinations take them.
    asked_here = asked[call.rank].view(-1)
    first_row = start.view(R, L, R)[:, :, call.rank].reshape(-1)
    num_asked = int(asked_here.sum())
    slots = torch.argsort(expert, stable=True)[T * K - num_asked :]
    offset = (first_row - _exclusive_cumsum(asked_here)).to(device)
    head = torch.arange(num_asked, device=device) + offset.repeat_interleave(
        asked_here.to(device), output_size=num_asked
    )
    kept_per_rank = kept[:, :, call.rank].sum(1)
    if int(kept_per_rank.sum()) < num_asked:
        fits = head < capacity.view(-1).to(device)[expert[slots] // L]
        slots, head = slots[fits], head[fits]
    send_head = torch.full((T * K,), -1, dtype=torch.int32, device=device)
    send_head[slots] = head.to(torch.int32)

    # One entry per row: its slot and the bits of its weight.
    entries = torch.stack([slots.to(torch.int32), topk_weights.view(-1)[slots].view(torch.int32)], dim=1)
    kept_here = kept[call.rank]  # [local expert, source]
    N = int(kept_here.sum())
    entries = call.all_to_all("slots", entries, kept_per_rank.tolist(), kept_here.sum(0).tolist())
    # They arrive by (source, local expert) and stand by (local expert, source).
    arrived_at = _exclusive_cumsum(kept_here.t().reshape(-1)).view(R, L).t().reshape(-1)
    per_group = kept_here.reshape(-1).to(device)
    shift = (arrived_at - _exclusive_cumsum(kept_here.reshape(-1))).to(device)
    entries = entries[torch.arange(N, device=device) + shift.repeat_interleave(per_group, output_size=N)]
    slot = entries[:, 0].long()
    token, k = slot // K, slot % K
    source = torch.arange(R, device=device).repeat(L).repeat_interleave(per_group, output_size=N)
    local_expert = torch.arange(L, device=device).repeat_interleave(kept_here.sum(1).to(device), output_size=N)

    # Each token goes to a rank once and is copied there to its rows.
    leaves, _ = _distinct_tokens(expert[slots] // L, slots // K, R, T)
    comes, place = _distinct_tokens(source, token, R, max(h.T for h in headers))
    arrived = call.all_to_all(
        "tokens", x.index_select(0, leaves.nonzero()[:, 1]), leaves.sum(1).tolist(), comes.sum(1).tolist()
    )
    rows = num_worst_tokens or N
    recv_x = x.new_empty(rows, H)
    torch.index_select(arrived, 0, place, out=recv_x[:N])
    recv_x[N:].zero_()

    recv_topk_idx = torch.full((rows, K), -1, dtype=torch.int64, device=device)
    recv_topk_weights = torch.zeros(rows, K, dtype=torch.float32, device=device)
    recv_src_idx = torch.full((rows, 3), -1, dtype=torch.int32, device=device)
    row = torch.arange(N, device=device)
    recv_topk_idx[row, k] = local_expert
    recv_topk_weights[row, k] = entries[:, 1].contiguous().view(torch.float32)
    torch.stack([source, token, k], dim=1, out=recv_src_idx[:N])

    def to_int32(table: Tensor) -> Tensor:
        return table.to(device, torch.int32)

    return DispatchResult(
        recv_x,
        recv_topk_idx,
        recv_topk_weights,
        kept_here.sum(1).to(device),
        torch.tensor(int(asked[:, call.rank].sum()) - N, device=device),
        to_int32(kept.sum(1).t().cumsum(0)),
        to_int32(asked[call.rank].cumsum(1)),
        to_int32(end[call.rank].view(L, R)),
        recv_src_idx,
        send_head.view(T, K),
    )


def combine(
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    recv_src_idx: Tensor,
    send_head: Tensor,
    num_experts: int,
    num_ranks: int,
    group: str,
) -> Tensor:
    """Returns [T, H], the weighted sum of each token's rows x [N, H] in k order in fp32, rounded once.

    The other tensors are those of the dispatch that made the rows. Raises as dispatch does.
    """
    with _Call("combine", group, x) as call:
        error = checks.combine(x, topk_idx, topk_weights, recv_src_idx, send_head, num_experts, num_ranks)
        return _combine(call, error, x, topk_idx, topk_weights, recv_src_idx, send_head, num_experts, num_ranks)


def low_latency_combine(
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    recv_src_idx: Tensor,
    layout_range: Tensor,
    send_head: Tensor,
    num_experts: int,
    num_ranks: int,
    group: str,
    comm_alg: str,
) -> Tensor:
    """As combine, for the rows of a low_latency_dispatch."""
    with _Call("low_latency_combine", group, x) as call:
        error = checks.low_latency_combine(
            x, topk_idx, topk_weights, recv_src_idx, layout_range, send_head, num_experts, num_ranks
        )
        return _combine(
            call, error, x, topk_idx, topk_weights, recv_src_idx, send_head, num_experts, num_ranks, layout_range
        )


def low_latency_combine_padded(
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    recv_src_idx: Tensor,
    layout_range: Tensor,
    send_head: Tensor,
    num_experts: int,
    num_ranks: int,
    group: str,
) -> Tensor:
    """As low_latency_combine, with x [L, R·M, H]: each local expert's rows from the first of its R·M on."""
    with _Call("low_latency_combine", group, x) as call:
        handle = topk_idx, topk_weights, recv_src_idx, send_head
        error = checks.low_latency_combine_padded(
            x, topk_idx, topk_weights, recv_src_idx, layout_range, send_head, num_experts, num_ranks
        )
        if error:
            return _combine(call, error, x, *handle, num_experts, num_ranks, layout_range)
        block = x.shape[1]
        error = _blocks_error(layout_range, num_ranks, block)
        return _combine(call, error, x.flatten(0, 1), *handle, num_experts, num_ranks, layout_range, block)


def _blocks_error(layout_range: Tensor, num_ranks: int, block: int) -> str | None:
    """Without one, and with all rows at the experts that their senders name, each block begins where it should."""
    ends = layout_range.view(-1, num_ranks)[:, -1]
    counts = ends.diff(prepend=ends.new_zeros(1))
    wrong = ((counts < 0) | (counts > block)).nonzero()
    if not wrong.numel():
        return None
    l = int(wrong[0])
    return f"layout_range says {int(counts[l])} rows of local expert {l}; x has {block} for each expert"


def _combine(
    call: _Call,
    error: str | None,
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    recv_src_idx: Tensor,
    send_head: Tensor,
    num_experts: int,
    num_ranks: int,
    layout_range: Tensor | None = None,
    block: int = 0,
) -> Tensor:
    """`error`: what is wrong with the arguments by themselves. layout_range: of low latency, with `block` rows of x for
    each local expert, unless that is 0."""
    error = (
        call.device_error
        or checks.group_size(num_ranks, call.size)
        or error
        or _handle_error(topk_idx, recv_src_idx, send_head, num_experts, num_ranks, layout_range is not None)
    )
    routes = None if error else _routes(recv_src_idx, topk_idx, send_head, num_experts, num_ranks, layout_range)
    call.agree(error, x, topk_idx, num_experts, routes=routes)
    assert routes
    if block:
        assert layout_range is not None
        ends = layout_range.view(-1, num_ranks)[:, -1].long()
        expert = torch.searchsorted(ends, routes.rows, right=True)
        begins = torch.cat([ends.new_zeros(1), ends])
        routes = routes._replace(rows=expert * block + routes.rows - begins[expert])
    return _return_rows(call, x, routes, topk_idx, topk_weights)


def dispatch_backward(
    grad_recv_x: Tensor,
    grad_recv_topk_weights: Tensor,
    recv_src_idx: Tensor,
    topk_idx: Tensor,
    send_head: Tensor,
    num_experts: int,
    num_ranks: int,
    group: str,
) -> tuple[Tensor, Tensor]:
    """The gradients of dispatch: grad_x [T, H], a combine with weights 1, and grad_topk_weights fp32 [T, K].

    grad_recv_x: [N, H]; grad_recv_topk_weights: fp32 [N, K]. Raises as dispatch does.
    """
    with _Call("dispatch_backward", group, grad_recv_x) as call:
        error = (
            call.device_error
            or checks.group_size(num_ranks, call.size)
            or checks.dispatch_backward(
                grad_recv_x, grad_recv_topk_weights, recv_src_idx, topk_idx, send_head, num_experts, num_ranks
            )
            or _handle_error(topk_idx, recv_src_idx, send_head, num_experts, num_ranks)
        )
        routes = None if error else _routes(recv_src_idx, topk_idx, send_head, num_experts, num_ranks)
        call.agree(error, grad_recv_x, topk_idx, num_experts, routes=routes)
        assert routes
        grad_x = _return_rows(call, grad_recv_x, routes, topk_idx, None)
        grads = grad_recv_topk_weights[routes.rows, recv_src_idx[routes.rows, 2].long()]
        return grad_x, _return_scalars(call, grads, routes, topk_idx)


def combine_backward(
    grad_out: Tensor,
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    recv_src_idx: Tensor,
    send_head: Tensor,
    num_experts: int,
    num_ranks: int,
    group: str,
) -> tuple[Tensor, Tensor]:
    """The gradients of combine: grad_x [N, H], a weighted dispatch, and grad_topk_weights fp32 [T, K].

    grad_out: [T, H]; the other arguments are combine's. Raises as dispatch does.
    """
    with _Call("combine_backward", group, x) as call:
        error = (
            call.device_error
            or checks.group_size(num_ranks, call.size)
            or checks.combine_backward(
                grad_out, x, topk_idx, topk_weights, recv_src_idx, send_head, num_experts, num_ranks
            )
            or _handle_error(topk_idx, recv_src_idx, send_head, num_experts, num_ranks)
        )
        routes = None if error else _routes(recv_src_idx, topk_idx, send_head, num_experts, num_ranks)
        headers = call.agree(error, x, topk_idx, num_experts, routes=routes)
        assert routes
        (T, H), K = grad_out.shape, topk_idx.shape[1]
        rows, slots = routes.rows, routes.slots

        weights = call.all_to_all(
            "weights", topk_weights.view(-1)[slots], routes.slots_per_rank, routes.rows_per_rank
        ).unsqueeze(1)
        source, token, _ = recv_src_idx[rows].long().unbind(1)
        destination = topk_idx.view(-1)[slots] // (num_experts // num_ranks)
        leaves, _ = _distinct_tokens(destination, slots // K, num_ranks, T)
        comes, place = _distinct_tokens(source, token, num_ranks, max(h.T for h in headers))
        arrived = call.all_to_all(
            "gradients",
            grad_out.index_select(0, leaves.nonzero()[:, 1]),
            leaves.sum(1).tolist(),
            comes.sum(1).tolist(),
        )

        grad_x = torch.empty_like(x)
        grad_x[recv_src_idx[:, 0] < 0] = 0
        grads = torch.empty(rows.numel(), dtype=torch.float32, device=x.device)
        for block in _blocks(rows.numel(), H):
            grad = arrived.index_select(0, place[block]).float()
            grads[block] = (grad * x.index_select(0, rows[block])).sum(1)
            grad_x[rows[block]] = grad.mul_(weights[block]).to(x.dtype)
        return grad_x, _return_scalars(call, grads, routes, topk_idx)


def _return_rows(call: _Call, x: Tensor, routes: _Routes, topk_idx: Tensor, weights: Tensor | None) -> Tensor:
    """Sends every row of x to its slot and returns [T, H], the sums over k; weights None means ones."""
    (T, K), H, n = topk_idx.shape, x.shape[1], routes.slots.numel()
    # Slots without a row add row n, which is 0.
    arrived = x.new_empty(n + 1, H)
    arrived[n] = 0
    call.all_to_all("rows", x.index_select(0, routes.rows), routes.rows_per_rank, routes.slots_per_rank, arrived[:n])
    place = torch.full((T * K,), n, device=x.device)
    place[routes.slots] = torch.arange(n, device=x.device)
    place = place.view(T, K).t().contiguous()
    if weights is not None:
        weights = weights.t().where(place < n, 0).unsqueeze(2)
    out = x.new_empty(T, H)
    for block in _blocks(T, H):
        total = torch.zeros(block.stop - block.start, H, dtype=torch.float32, device=x.device)
        for k in range(K):
            rows = arrived.index_select(0, place[k, block])
            total += rows if weights is None else rows * weights[k, block]
        out[block] = total
    return out


def _return_scalars(call: _Call, scalars: Tensor, routes: _Routes, topk_idx: Tensor) -> Tensor:
    """Sends every row's scalar, ordered as routes.rows, to its slot and returns fp32 [T, K]."""
    out = torch.zeros(topk_idx.shape, dtype=torch.float32, device=scalars.device)
    out.view(-1)[routes.slots] = call.all_to_all(
        "weight gradients", scalars, routes.rows_per_rank, routes.slots_per_rank
    )
    return out
