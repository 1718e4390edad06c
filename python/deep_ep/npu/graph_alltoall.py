"""The `.alltoall` overloads for graphs: the same results out of torch's operators and three collectives.

torchair takes these functions as decompositions. Nothing here brings a value to the host: where the number of rows is
static (capacity mode, low latency), ranks exchange equal splits, padded to the most rows that can be meant for a rank;
where it is not (exact mode), the numbers of rows are tensors.

T local tokens · H hidden · K top-k · E experts · R ranks · L = E/R local experts · N received rows ·
W num_worst_tokens, the same on all ranks · S = T·K slots, a slot is t * K + k · C rows that a rank can send to another.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from . import ge

# Collectives


_library = torch.library.Library("deep_ep", "FRAGMENT")
_library.define("_all_gather(Tensor x, int num_ranks, str group) -> Tensor")
_library.define("_all_to_all(Tensor x, int num_ranks, str group) -> Tensor")
_library.define("_all_to_all_v(Tensor x, Tensor send_counts, Tensor recv_counts, SymInt num_rows, str group) -> Tensor")


def _all_gather(x: Tensor, num_ranks: int, group: str) -> Tensor:
    """[R·n] of every rank's [n]."""
    out = x.new_empty((num_ranks * x.shape[0],))
    dist.all_gather(list(out.chunk(num_ranks)), x, group=ge.process_group(group))
    return out


def _all_to_all(x: Tensor, num_ranks: int, group: str) -> Tensor:
    """[R·C, ...], of which part d goes to rank d, gives [R·C, ...], of which part s is of rank s."""
    out = torch.empty_like(x)
    dist.all_to_all_single(out, x, group=ge.process_group(group))
    return out


def _all_to_all_v(x: Tensor, send_counts: Tensor, recv_counts: Tensor, num_rows: int, group: str) -> Tensor:
    """[num_rows, ...]: the recv_counts[s] rows of every rank s; the first send_counts[0] rows of x go to rank 0, the
    next send_counts[1] to rank 1, ... num_rows is the sum of recv_counts, or -1 if that is not known."""
    to, of = send_counts.tolist(), recv_counts.tolist()
    out = x.new_empty((sum(of), *x.shape[1:]))
    dist.all_to_all_single(out, x[: sum(to)].contiguous(), of, to, group=ge.process_group(group))
    return out


def _fake_all_to_all_v(x: Tensor, send_counts: Tensor, recv_counts: Tensor, num_rows: Any, group: str) -> Tensor:
    ge.check_exact("dispatch")
    is_known = not (isinstance(num_rows, int) and num_rows == -1)
    return x.new_empty((num_rows if is_known else torch.library.get_ctx().new_dynamic_size(min=0), *x.shape[1:]))


def _fake_all_gather(x: Tensor, num_ranks: int, group: str) -> Tensor:
    return x.new_empty((num_ranks * x.shape[0],))


def _fake_all_to_all(x: Tensor, num_ranks: int, group: str) -> Tensor:
    return torch.empty_like(x)


_ops = torch.ops.deep_ep


def _register(name: str, kernel: Callable[..., Any], fake: Callable[..., Any], convert: Callable[..., Any]) -> None:
    op = getattr(_ops, name).default
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(op, fake, lib=_library)
    torch.fx.node.has_side_effect(op)
    ge.converter(op, convert, communicates=True)


_register("_all_gather", _all_gather, _fake_all_gather, ge.all_gather)
_register("_all_to_all", _all_to_all, _fake_all_to_all, ge.all_to_all)
_register("_all_to_all_v", _all_to_all_v, _fake_all_to_all_v, ge.all_to_all_v)


class _Pairs(NamedTuple):
    """The rows that this rank exchanges with every other: how many, and where those of a rank begin."""

    send_counts: Tensor  # int64 [R]
    recv_counts: Tensor  # int64 [R]
    capacity: Any  # C, or None: exactly as many as the counts say
    group: str

    def begin(self, counts: Tensor) -> Tensor:
        """int64 [R]: where the rows of each rank begin in a buffer of them."""
        if self.capacity is None:
            return counts.cumsum(0) - counts
        return torch.arange(counts.shape[0], device=counts.device) * self.capacity

    def reversed(self) -> "_Pairs":
        return self._replace(send_counts=self.recv_counts, recv_counts=self.send_counts)

    def exchange(self, rows: Tensor, num_rows: Any = -1) -> Tensor:
        """What the ranks send to this one for its `rows`; num_rows, if it is known how many these are."""
        if self.capacity is None:
            return _ops._all_to_all_v(rows, self.send_counts, self.recv_counts, num_rows, self.group)
        return _ops._all_to_all(rows, self.send_counts.shape[0], self.group)


# Slots of this rank


class _Slots(NamedTuple):
    """This rank's slots, and their order by (expert, slot)."""

    expert: Tensor  # int64 [S], -1 for none
    order: Tensor  # int64 [S]: slots in that order, those without an expert last
    place: Tensor  # int64 [S]: where a slot is in `order`
    first: Tensor  # int64 [E + 1]: where an expert's slots begin in `order`


def _slots(topk_idx: Tensor, num_experts: int) -> _Slots:
    expert = topk_idx.reshape(-1)
    S = expert.shape[0]
    slot = torch.arange(S, device=expert.device)
    # Keys differ, so any sort is stable.
    keys, order = torch.sort(torch.where(expert >= 0, expert, num_experts) * S + slot)
    place = torch.zeros_like(order).scatter(0, order, slot)
    first = torch.searchsorted(keys, torch.arange(num_experts + 1, device=expert.device) * S)
    return _Slots(expert, order, place, first)


def _in_pair_order(counts: Tensor, begin: Tensor, slots: _Slots, pairs: _Pairs) -> Tensor:
    """int64 [rows of the send buffer]: the slot that each row holds, S for none.

    Rank d gets the first counts[d] slots of `order` from begin[d] on.
    """
    S = slots.order.shape[0]
    order = torch.cat([slots.order, slots.order.new_full((1,), S)])
    if pairs.capacity is None:
        return order[:S]
    c = torch.arange(pairs.capacity, device=order.device)
    place = _where(c < counts.unsqueeze(1), begin.unsqueeze(1) + c, S)
    return order.index_select(0, place.reshape(-1))


def _where(condition: Tensor, x: Tensor, number: Any) -> Tensor:
    """torch.where, for a number that may be a symbol. torchair makes one node of the symbol and torch.where's scalar
    tensor: among the results of a forward graph, the symbol would be a tensor, which autograd refuses."""
    return torch.where(condition, x, torch.full_like(x, number))


def _with_one_more(rows: Tensor) -> Tensor:
    """The rows, and one of zeros."""
    return torch.cat([rows, rows.new_zeros((1, *rows.shape[1:]))])


# Ops


def dispatch(
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    num_experts: int,
    num_ranks: int,
    num_worst_tokens: Any,
    group: str,
) -> tuple[Tensor, ...]:
    """As deep_ep.dispatch."""
    exact = isinstance(num_worst_tokens, int) and num_worst_tokens == 0
    capacity = None if exact else num_worst_tokens
    return _dispatch(x, topk_idx, topk_weights, num_experts, num_ranks, capacity, capacity, group)


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
    """As deep_ep.low_latency_dispatch."""
    C = num_max_dispatch_tokens_per_rank * min(topk_idx.shape[1], num_experts // num_ranks)
    weights = torch.ones_like(topk_idx, dtype=torch.float32)
    recv_x, _, _, counts, _, _, _, recv_prefix, recv_src_idx, send_head = _dispatch(
        x, topk_idx, weights, num_experts, num_ranks, num_ranks * C, C, group
    )
    return recv_x, counts, recv_src_idx, recv_prefix.view(-1), send_head


def _dispatch(
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    num_experts: int,
    num_ranks: int,
    W: Any,
    C: Any,
    group: str,
) -> tuple[Tensor, ...]:
    (T, K), R, L = topk_idx.shape, num_ranks, num_experts // num_ranks
    rank = ge.process_group(group).rank()
    slots = _slots(topk_idx, num_experts)
    asked_here = slots.first[1:] - slots.first[:-1]
    asked = _ops._all_gather(asked_here, R, group).view(R, R, L)  # [source, destination, local expert]

    # A rank's rows are ordered by local expert and source; those from W on are dropped.
    in_row_order = asked.permute(1, 2, 0).reshape(R, L * R)
    end = in_row_order.cumsum(1)
    start = end - in_row_order
    kept = in_row_order if W is None else end.clamp(max=W) - start.clamp(max=W)
    kept = kept.view(R, L, R)  # [destination, local expert, source]

    expert = slots.expert.clamp(min=0)
    first_row = start.view(R, L, R)[:, :, rank].reshape(-1)
    head = first_row[expert] + slots.place - slots.first[expert]
    has_row = slots.expert >= 0
    if W is not None:
        has_row = has_row & (head < W)
    send_head = torch.where(has_row, head, -1).to(torch.int32).view(T, K)

    # Rows go in the order of (local expert, slot), so what is dropped is what comes last.
    kept_here = kept[rank]  # [local expert, source]
    pairs = _Pairs(kept[:, :, rank].sum(1), kept_here.sum(0), C, group)
    slot = _in_pair_order(pairs.send_counts, slots.first[:-1:L], slots, pairs)
    arrived_slot = pairs.exchange(slot)
    num_arrived = arrived_slot.shape[0]
    arrived_x = pairs.exchange(_with_one_more(x).index_select(0, slot // K), num_arrived)
    arrived_weights = pairs.exchange(_with_one_more(topk_weights.reshape(-1)).index_select(0, slot), num_arrived)

    # Where every row of recv_x has arrived.
    N = num_arrived if W is None else W
    row = torch.arange(N, device=x.device)
    segment = torch.searchsorted(end[rank], row, right=True).clamp(max=L * R - 1)
    local_expert, source = segment // R, segment % R
    before = (kept_here.cumsum(0) - kept_here).reshape(-1) - start[rank]  # [L·R]
    at = pairs.begin(pairs.recv_counts)[source] + before[segment] + row
    is_used = row < kept_here.sum()
    if W is not None:
        at = torch.where(is_used, at, 0)
    used = is_used.unsqueeze(1)
    arrived_slot = arrived_slot.index_select(0, at)
    k = arrived_slot % K
    brought = used & (torch.arange(K, device=x.device) == k.unsqueeze(1))
    source_index = torch.stack([source, arrived_slot // K, k], 1)

    def to_int32(table: Tensor) -> Tensor:
        return table.to(torch.int32)

    return (
        torch.where(used, arrived_x.index_select(0, at), 0),
        torch.where(brought, local_expert.unsqueeze(1), -1),
        torch.where(brought, arrived_weights.index_select(0, at).unsqueeze(1), 0),
        kept_here.sum(1),
        in_row_order[rank].sum() - kept_here.sum(),
        to_int32(kept.sum(1).t().cumsum(0)),
        to_int32(asked[rank].cumsum(1)),
        to_int32(end[rank].view(L, R)),
        to_int32(torch.where(used, source_index, -1)),
        send_head,
    )


class _Returns(NamedTuple):
    """The ways of expert rows to the slots they came from, of one handle."""

    pairs: _Pairs  # from experts to tokens
    rows: Tensor  # int64 [rows of the send buffer]: the expert row that each holds, N for none
    at: Tensor  # int64 [S]: where a slot's row arrives, 0 if none does
    arrives: Tensor  # bool [S]
    slots: _Slots
    source: Tensor  # int64 [N]: the rank that a row came from
    place: Tensor  # int64 [N]: which of that rank's rows it is
    used: Tensor  # bool [N]


def _returns(
    topk_idx: Tensor,
    recv_src_idx: Tensor,
    send_head: Tensor,
    num_experts: int,
    num_ranks: int,
    group: str,
    C: Any,
) -> _Returns:
    N, R, L, device = recv_src_idx.shape[0], num_ranks, num_experts // num_ranks, topk_idx.device
    ranks = torch.arange(R, device=device)
    source = recv_src_idx[:, 0].to(torch.int64)
    used = source >= 0
    is_of = source.unsqueeze(1) == ranks  # [N, R]
    source = source.clamp(min=0)
    place = (is_of.to(torch.int64).cumsum(0) * is_of).sum(1) - 1

    slots = _slots(topk_idx, num_experts)
    arrives = send_head.reshape(-1) >= 0
    destination = slots.expert.clamp(min=0) // L
    arriving = ((destination.unsqueeze(1) == ranks) & arrives.unsqueeze(1)).sum(0)
    pairs = _Pairs(is_of.sum(0), arriving, C, group)

    size = N if C is None else R * C
    to = _where(used, pairs.begin(pairs.send_counts)[source] + place, size)
    rows = to.new_full((size + 1,), N).scatter(0, to, torch.arange(N, device=device))[:size]
    at = pairs.begin(pairs.recv_counts)[destination] + slots.place - slots.first[:-1:L][destination]
    return _Returns(pairs, rows, torch.where(arrives, at, 0), arrives, slots, source, place, used)


def _sum_up(returns: _Returns, x: Tensor, T: Any, K: int, weights: Tensor | None) -> Tensor:
    """[T, H]: each token's rows of x [N, H] times its weights, in fp32, in the order of k, rounded once."""
    arrived = _with_one_more(returns.pairs.exchange(_with_one_more(x).index_select(0, returns.rows)))
    at, arrives = returns.at.view(T, K), returns.arrives.view(T, K)
    total = x.new_zeros((T, x.shape[1]), dtype=torch.float32)
    for k in range(K):
        row = arrived.index_select(0, at[:, k]).to(torch.float32)
        if weights is not None:
            row = row * weights[:, k : k + 1]
        total = total + torch.where(arrives[:, k : k + 1], row, 0)
    return total.to(x.dtype)


def _bring_scalars(returns: _Returns, scalars: Tensor, T: Any, K: int) -> Tensor:
    """fp32 [T, K]: the scalar of each slot's row, of fp32 [N]; 0 for none."""
    arrived = _with_one_more(returns.pairs.exchange(_with_one_more(scalars).index_select(0, returns.rows)))
    return torch.where(returns.arrives, arrived.index_select(0, returns.at), 0).view(T, K)


def _capacity(rows: Tensor) -> Any:
    """C for rows of a dispatch, of which any number may be of one rank; None if their number depends on data."""
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    return None if free_unbacked_symbols(rows.shape[0]) else rows.shape[0]


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
    """As deep_ep.combine."""
    returns = _returns(topk_idx, recv_src_idx, send_head, num_experts, num_ranks, group, _capacity(x))
    T, K = topk_idx.shape
    return _sum_up(returns, x, T, K, topk_weights)


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
    """As deep_ep.low_latency_combine."""
    C = x.shape[0] // num_ranks
    returns = _returns(topk_idx, recv_src_idx, send_head, num_experts, num_ranks, group, C)
    T, K = topk_idx.shape
    return _sum_up(returns, x, T, K, topk_weights)


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
    """As the op."""
    T, K = topk_idx.shape
    returns = _returns(topk_idx, recv_src_idx, send_head, num_experts, num_ranks, group, _capacity(grad_recv_x))
    k = recv_src_idx[:, 2:].clamp(min=0).to(torch.int64)
    scalars = grad_recv_topk_weights.gather(1, k).squeeze(1)
    return _sum_up(returns, grad_recv_x, T, K, None), _bring_scalars(returns, scalars, T, K)


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
    """As the op: grad_out goes where dispatch sent x, and meets the experts' rows."""
    (T, K), L = topk_idx.shape, num_experts // num_ranks
    returns = _returns(topk_idx, recv_src_idx, send_head, num_experts, num_ranks, group, _capacity(x))
    sends = returns.pairs.reversed()
    slot = _in_pair_order(sends.send_counts, returns.slots.first[:-1:L], returns.slots, sends)
    N = x.shape[0]
    arrived = sends.exchange(_with_one_more(grad_out).index_select(0, slot // K), N)
    weights = sends.exchange(_with_one_more(topk_weights.reshape(-1)).index_select(0, slot), N)

    at = torch.where(returns.used, sends.begin(sends.recv_counts)[returns.source] + returns.place, 0)
    used = returns.used.unsqueeze(1)
    grad = _with_one_more(arrived).index_select(0, at).to(torch.float32)
    products = torch.where(returns.used, (grad * x).sum(1), 0)
    weight = _with_one_more(weights).index_select(0, at).unsqueeze(1)
    grad_x = torch.where(used, grad * weight, 0).to(x.dtype)
    return grad_x, _bring_scalars(returns, products, T, K)
