"""The competitors of the expert-parallel benchmark: what turns tokens into expert rows and back.

T local tokens · H hidden · K top-k · E experts · R ranks · L = E/R local experts · N received rows.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

import deep_ep
from benchmarks import native
from benchmarks.points import DTYPES, Point, num_rows

DEEP_EP = "deep_ep.default"
DEEP_EP_ALLTOALL = "deep_ep.alltoall"
GLOO = "gloo"
GLOO_LOWP = "gloo.lowp"  # weighted sums in the dtype of x
GLOO_TUNED = "gloo.tuned"
MPI = "mpi"  # a row for each (token, expert) on the wire
MPI_MERGED = "mpi.merged"  # one for each (token, rank)
COPY = "memcpy"
WRITE_READ = "write+read"
NAMES = (DEEP_EP, DEEP_EP_ALLTOALL, GLOO, GLOO_LOWP, GLOO_TUNED, MPI, MPI_MERGED, COPY, WRITE_READ)


class Dispatcher(Protocol):
    """One way of sending tokens to their experts; both methods are collective over the group.

    One that has `in_a_row` is called from C++: each method does its work as many times.
    """

    name: str
    sum_eps: float  # relative error of a product or a sum in combine

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
        self.sum_eps = torch.finfo(sum_dtype).eps
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


class Tuned:
    """All-to-all as one would write it for speed: buffers made once, the work around it in C++ (native/exchange.cpp).

    With merge a token goes to a rank once, is expanded there, and combine sums the rank's rows, with their weights and
    in fp32, before one row goes back. Without, a row of its own travels for every expert. Results are in memory that
    the next call writes to; there is no backward.
    """

    def __init__(self, name: str, point: Point, rank: int, buffers: native.Buffers, merge: bool) -> None:
        self.name = name
        # With merge a second rounding, to the dtype of x.
        self.sum_eps = torch.finfo(DTYPES[point.dtype] if merge else torch.float32).eps
        self.buffers = buffers
        self.expand = point.rows == "expert"
        self.merge = merge
        self.exchange = buffers.exchange(
            tokens=point.tokens,
            hidden=point.hidden,
            top_k=point.topk,
            experts=point.experts,
            ranks=point.ranks,
            rank=rank,
            dtype=("fp32", "fp16", "bf16").index(point.dtype),
            threads=torch.get_num_threads(),
            merge=merge,
            expand=self.expand,
        )

    def _received(self, num_rows: int) -> Tensor:
        return (self.buffers.recv_x if self.expand else self.buffers.recv_rows)[:num_rows]


class TunedMPI(Tuned):
    """Tuned over MPI_Alltoallv, called from C++."""

    in_a_row = 1

    def dispatch(self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor) -> tuple[Tensor, None]:
        pointers = x.data_ptr(), topk_idx.data_ptr(), topk_weights.data_ptr()
        return self._received(native.library().mpi_dispatch(self.exchange, *pointers, self.in_a_row)), None

    def combine(self, y: Tensor, state: None) -> Tensor:
        native.library().mpi_combine(self.exchange, y.data_ptr(), self.buffers.out.data_ptr(), self.in_a_row)
        return self.buffers.out


class TunedGloo(Tuned):
    """Tuned over all_to_all_single of torch.distributed's gloo."""

    def dispatch(self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor) -> tuple[Tensor, tuple[list[int], list[int]]]:
        library, buffers = native.library(), self.buffers
        library.exchange_pack(self.exchange, x.data_ptr(), topk_idx.data_ptr(), topk_weights.data_ptr())
        dist.all_to_all_single(buffers.recv_counts, buffers.send_counts)
        sent, received = buffers.send_counts[:, 0].tolist(), buffers.recv_counts[:, 0].tolist()
        S, M = sum(sent), sum(received)
        if self.merge:
            dist.all_to_all_single(buffers.recv_meta[:M], buffers.send_meta[:S], received, sent)
        dist.all_to_all_single(buffers.recv_rows[:M], buffers.send_rows[:S], received, sent)
        return self._received(library.exchange_unpack(self.exchange)), (sent, received)

    def combine(self, y: Tensor, state: tuple[list[int], list[int]]) -> Tensor:
        library, buffers, (sent, received) = native.library(), self.buffers, state
        if self.expand:
            library.exchange_pack_back(self.exchange, y.data_ptr())
            y = buffers.recv_rows[: sum(received)]
        dist.all_to_all_single(buffers.send_rows[: sum(sent)], y, sent, received)
        library.exchange_unpack_back(self.exchange, buffers.out.data_ptr())
        return buffers.out


class Memory:
    """Not a dispatcher, but the limit: its payload copied once by memcpy, or written once and read once.

    The payload of dispatch is recv_x, N rows of H elements, and that of combine the N rows that are read. All ranks
    do their share at once, each with as many threads as torch has there. `write_read` passes the caches by where the
    machine has stores for that.
    """

    def __init__(self, name: str, buffers: native.Buffers, num_rows: int) -> None:
        self.name = name
        self.sum_eps = 0.0
        self.to, self.source = buffers.recv_x[:num_rows], buffers.recv_rows[:num_rows]
        self.copies = name == COPY
        if self.copies:
            self.source.fill_(1)  # what was never written to is no memory

    def dispatch(self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor) -> tuple[Tensor, None]:
        num_bytes, threads = self.to.nbytes, torch.get_num_threads()
        if self.copies:
            native.library().memory_copy(self.to.data_ptr(), self.source.data_ptr(), num_bytes, threads)
        else:
            native.library().memory_write_read(self.to.data_ptr(), num_bytes // 64 * 64, threads)
        return self.to, None

    def combine(self, y: Tensor, state: None) -> Tensor:
        return self.dispatch(y, y, y)[0]


class DeepEP:
    """One overload of the deep_ep ops, called eagerly; the group must have been through deep_ep.init."""

    def __init__(self, group: dist.ProcessGroup, num_experts: int, overload: str) -> None:
        self.name = f"deep_ep.{overload}"
        self.sum_eps = torch.finfo(torch.float32).eps
        self.sizes = num_experts, group.size()
        self.group_name = group.group_name
        self.dispatch_op = getattr(torch.ops.deep_ep.dispatch, overload)
        self.combine_op = getattr(torch.ops.deep_ep.combine, overload)

    def dispatch(self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor) -> tuple[Tensor, Any]:
        recv_x, *_, source, head = self.dispatch_op(x, topk_idx, topk_weights, *self.sizes, 0, self.group_name)
        return recv_x, (topk_idx, topk_weights, source, head)

    def combine(self, y: Tensor, state: Any) -> Tensor:
        return self.combine_op(y, *state, *self.sizes, self.group_name)


class CalledFromCpp:
    """deep_ep's ops, low-latency ones with room for M = T tokens per rank, or GlooDispatcher, by C++ and without
    backward. Results live until the next call.
    """

    in_a_row = 1

    def __init__(self, name: str, group: dist.ProcessGroup, point: Point) -> None:
        self.name = name
        self.sum_eps = torch.finfo(torch.float32).eps
        sizes = point.tokens, point.hidden, point.topk, point.experts, point.ranks
        self.calls = native.Calls("gloo" if name == GLOO else point.mode, *sizes, DTYPES[point.dtype], group.group_name)

    def dispatch(self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor) -> tuple[Tensor, Any]:
        return self.calls.dispatch(x, topk_idx, topk_weights, self.in_a_row), (topk_idx, topk_weights)

    def combine(self, y: Tensor, state: Any) -> Tensor:
        return self.calls.combine(y, *state, self.in_a_row)


class DeepEPLowLatency:
    """One overload of deep_ep's low-latency ops, called from Python, with room for M = T tokens per rank."""

    def __init__(self, group: dist.ProcessGroup, point: Point, overload: str) -> None:
        self.name = f"deep_ep.{overload}"
        self.sum_eps = torch.finfo(torch.float32).eps
        self.max_tokens = point.tokens
        self.rest = point.experts, point.ranks, group.group_name, ""
        self.dispatch_op = getattr(torch.ops.deep_ep.low_latency_dispatch, overload)
        self.combine_op = getattr(torch.ops.deep_ep.low_latency_combine, overload)

    def dispatch(self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor) -> tuple[Tensor, Any]:
        recv_x, _, source, layout, head = self.dispatch_op(x, topk_idx, self.max_tokens, *self.rest)
        return recv_x, (topk_idx, topk_weights, source, layout, head)

    def combine(self, y: Tensor, state: Any) -> Tensor:
        return self.combine_op(y, *state, *self.rest)


class DeepEPBuffer:
    """deep_ep.Buffer with rows="rank"; the layout that its dispatch asks for belongs to the time of dispatch."""

    def __init__(self, group: dist.ProcessGroup, num_experts: int) -> None:
        self.name = DEEP_EP
        self.sum_eps = torch.finfo(torch.float32).eps
        self.num_experts = num_experts
        self.buffer = deep_ep.Buffer(group, rows="rank")

    def dispatch(self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor) -> tuple[Tensor, Any]:
        per_rank, _, per_expert, in_rank, _ = self.buffer.get_dispatch_layout(topk_idx, self.num_experts)
        recv_x, _, _, _, handle, _ = self.buffer.dispatch(
            x,
            num_tokens_per_rank=per_rank,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            topk_idx=topk_idx,
            topk_weights=topk_weights,
        )
        assert isinstance(recv_x, Tensor)
        return recv_x, handle

    def combine(self, y: Tensor, state: Any) -> Tensor:
        return self.buffer.combine(y, state)[0]


def needed_bytes(point: Point) -> int:
    """Memory that the ranks of a point take at their peak, about: measured, and rounded up.

    deep_ep alone has recv_x, the expert's output, what they are compared with and gradients; gloo has rows in several
    orders and in fp32, and what is tuned has three buffers that stay.
    """
    alone = 10 if point.backward else 5
    payloads = alone if point.only == (DEEP_EP,) else 12
    return payloads * point.payload + point.ranks * (200 << 20)


def make_dispatchers(group: dist.ProcessGroup, point: Point) -> list[Dispatcher | Memory]:
    """The competitors of a point. gloo as the frameworks write it has the rows of rows="expert" only, what is tuned
    has no backward, and MPI is there in processes of mpirun.
    """
    E, rank = point.experts, group.rank()
    competitors: list[Dispatcher | Memory] = []

    def overload(name: str) -> Dispatcher:
        if point.mode == "low_latency":
            return DeepEPLowLatency(group, point, name)
        return DeepEP(group, E, name)

    if point.rows == "rank":
        competitors += [DeepEPBuffer(group, E)]
    else:
        competitors += [CalledFromCpp(DEEP_EP, group, point) if point.from_cpp else overload("default")]
        competitors += [overload("alltoall")]
        competitors += [CalledFromCpp(GLOO, group, point) if point.from_cpp else GlooDispatcher(group, E, GLOO)]
        if point.dtype != "fp32":
            competitors += [GlooDispatcher(group, E, GLOO_LOWP, DTYPES[point.dtype])]
    if not point.backward:
        buffers = native.Buffers(point.tokens, point.hidden, point.topk, E, point.ranks, DTYPES[point.dtype])
        competitors += [TunedGloo(GLOO_TUNED, point, rank, buffers, merge=True)]
        if "OMPI_COMM_WORLD_RANK" in os.environ:
            competitors += [TunedMPI(MPI_MERGED, point, rank, buffers, merge=True)]
            if point.rows == "expert":
                competitors += [TunedMPI(MPI, point, rank, buffers, merge=False)]
        N = num_rows(point, rank)
        competitors += [Memory(name, buffers, N) for name in (COPY, WRITE_READ)]
    return [competitor for competitor in competitors if not point.only or competitor.name in point.only]
