"""Random calls of functions and Buffers that are wrong on one or both of two ranks, in a random way.

Both ranks raise, or both succeed with right values; nobody waits for a deadline; the next call is right. All that a
call is given follows from its seed, so each rank knows what the other one gives, and what both must get.

T local tokens · H hidden · K top-k · E experts · R ranks · L = E/R local experts · N received rows ·
M num_max_dispatch_tokens_per_rank.
"""

import dataclasses
import random
import re
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy
import pytest
import reference
import torch
from ranks import STRATEGIES, RankContext, RankPool
from torch import Tensor

import deep_ep
from deep_ep import PaddedHandle, arguments, quantization
from deep_ep.buffer import RankHandle
from deep_ep.ops import low_latency_dispatch_padded as padded_op
from deep_ep.ops.dispatch import DispatchHandle
from deep_ep.ops.low_latency_dispatch import LowLatencyHandle

R, L, K, M = 2, 2, 2, 6
E = R * L
DEADLINE = re.compile(r"waited|[Tt]imed? ?out|given up|gave up")

Arguments = dict[str, Any]


class Invalid(Exception):
    """The reference knows no result for these arguments."""


# Inputs that all follow from a seed


class Routing:
    """Which token goes where, and the handles of a dispatch of it, by rank."""

    def __init__(self, draw: random.Random, tokens: list[int], worst: list[int] | None) -> None:
        drawn = [[draw.sample(range(-1, E), K) for _ in range(T)] for T in tokens]
        self.ids = [torch.tensor(ids, dtype=torch.int64).view(-1, K) for ids in drawn]
        self.weights = [torch.tensor([[draw.randint(1, 8) / 8] * K for _ in range(T)]).view(T, K) for T in tokens]
        self.masks = [
            torch.stack([((ids // L == r) & (ids >= 0)).any(1) for r in range(R)], 1).view(len(ids), R)
            for ids in self.ids
        ]
        ranks = [torch.where(mask, torch.arange(R), -1) for mask in self.masks]
        self.expert = self._dispatched(self.ids, E, worst or [0] * R)
        self.rank = self._dispatched(ranks, R, worst or [0] * R)
        self.low_latency = self._dispatched(self.ids, E, [R * M * min(K, L)] * R)

    def _dispatched(self, ids: list[Tensor], num_experts: int, worst: list[int]) -> list[reference.DispatchResult]:
        nothing = [torch.zeros(len(one), 1) for one in ids]
        ones = [torch.ones(one.shape) for one in ids]
        return reference.dispatch(nothing, ids, ones, num_experts, worst)

    def handle(self, rank: int, kind: str, hidden: int) -> tuple[Any, ...]:
        ids, weights = self.ids[rank].clone(), self.weights[rank].clone()
        if kind == "expert":
            of = self.expert[rank]
            matrices = of.rank_prefix_matrix, of.channel_prefix_matrix, of.recv_channel_prefix_matrix
            mask = self.masks[rank].to(torch.int32)
            return DispatchHandle(*matrices, of.recv_src_idx, mask, of.send_head, ids, weights)
        if kind == "rank":
            of = self.rank[rank]
            matrices = of.rank_prefix_matrix, of.channel_prefix_matrix, of.recv_channel_prefix_matrix
            return RankHandle(*matrices, of.recv_src_idx, self.masks[rank], of.send_head)
        of = self.low_latency[rank]
        counts, ends = of.num_recv_tokens_per_expert, of.recv_channel_prefix_matrix.reshape(-1)
        packed = LowLatencyHandle(of.recv_src_idx, ends, M, hidden, E, counts, of.send_head)
        if kind == "low_latency":
            return packed
        rows = torch.zeros(len(of.recv_src_idx), 1)
        padded = padded_op.of_packed((rows, counts, of.recv_src_idx, ends, of.send_head), [], R, M)
        return padded_op._in_order(padded, M, hidden, E).handle


class World:
    """The inputs of one call, by rank."""

    def __init__(self, seed: int) -> None:
        self.draw = draw = random.Random(seed)
        self.tokens = [draw.choice((0, 1, 3, 5)) for _ in range(R)]
        self.H = draw.choice((8, 32, 128))
        self.dtype = draw.choice((torch.float32, torch.bfloat16))
        self.worst = draw.choice((None, [draw.randint(3, 12) for _ in range(R)]))
        self.main = Routing(draw, self.tokens, self.worst)
        self.other = Routing(draw, self.tokens, self.worst)
        self.generator = torch.Generator().manual_seed(seed)
        self.xs = [self.values(T, self.H) for T in self.tokens]
        self.gates = [(self.values(L, 128, self.H) / 64).to(self.dtype) for _ in range(R)]
        self.downs = [(self.values(L, self.H, 64) / 64).to(self.dtype) for _ in range(R)]

    def values(self, *shape: int) -> Tensor:
        return (torch.randint(-8, 9, shape, generator=self.generator) / 4).to(self.dtype)

    def routing_of(self, handles: list[Any], kind: str) -> Routing:
        """That of which all ranks have the handles, as far as tensors in them tell."""
        found = []
        for routing in (self.main, self.other):
            of = {"expert": routing.expert, "rank": routing.rank}.get(kind, routing.low_latency)
            if all(self._is_of(handle, one) for handle, one in zip(handles, of, strict=True)):
                found.append(routing)
        demand(bool(found), "handle")
        # Both send the same rows to the same ranks if both are found. Then the weights tell.
        return max(found, key=lambda routing: sum(map(has, handles, routing.weights)))

    def _is_of(self, handle: Any, of: reference.DispatchResult) -> bool:
        packed = getattr(handle, "packed", None)
        given = [one for one in handle if isinstance(one, Tensor)] if packed is None else [packed.send_head]
        given = [one.clamp(min=-1) for one in given if one.dtype == torch.int32 and not one.is_meta]
        return any(same(one, of.send_head) for one in given)


def has(handle: Any, tensor: Tensor) -> bool:
    return any(same(one, tensor) for one in handle)


def same(a: Any, b: Any) -> bool:
    return (
        isinstance(a, Tensor)
        and a.layout == torch.strided
        and not a.is_meta
        and a.shape == b.shape
        and a.dtype == b.dtype
        and torch.equal(a, b)
    )


# What the calls must give


def demand(holds: bool, what: str) -> None:
    if not holds:
        raise Invalid(what)


def equal(values: list[Any], what: str) -> Any:
    demand(all(value == values[0] for value in values), f"{what} differs")
    return values[0]


def rows_of(x: Any) -> None:
    demand(isinstance(x, Tensor) and x.dim() == 2 and x.layout == torch.strided and not x.is_meta, "x")


def routed(sources: Tensor, values: list[Tensor]) -> Tensor:
    """Row n is that of token sources[n, 1] of rank sources[n, 0], or 0."""
    like = values[0].contiguous()
    as_bytes = [
        value.detach().contiguous().view(torch.uint8) if like.element_size() == 1 else value for value in values
    ]
    out = as_bytes[0].new_zeros((len(sources), *like.shape[1:])) if like.dim() else like
    for n, (source, token) in enumerate(sources[:, :2].tolist()):
        if source >= 0:
            out[n] = as_bytes[source][token].detach()
    return out.view(like.dtype)


def parts_of(x: Any, mode: str, low_latency: bool, **options: bool) -> tuple[Tensor, ...]:
    """What of x arrives as one tensor or two."""
    if isinstance(x, tuple):
        demand(len(x) == 2 and mode == "none", "x")
        return x
    rows_of(x)
    if mode == "none":
        return (x,)
    return quantization.quantize(x, mode, low_latency=low_latency, **options)


def routed_parts(sources: Tensor, by_rank: list[tuple[Tensor, ...]]) -> list[Tensor]:
    for parts in by_rank:
        for part, first in zip(parts, by_rank[0], strict=True):
            demand(part.dtype == first.dtype and part.shape[1:] == first.shape[1:], "x")
    return [routed(sources, list(parts)) for parts in zip(*by_rank, strict=True)]


def expert_rows(given: list[Arguments], parts: list[tuple[Tensor, ...]], num_experts: list[int]) -> list[Any]:
    for one, of_x in zip(given, parts, strict=True):
        demand(one["topk_idx"].dtype == torch.int64 and len(one["topk_idx"]) == len(of_x[0]), "topk_idx")
        demand(bool(((one["topk_idx"] >= -1) & (one["topk_idx"] < num_experts[0])).all()), "topk_idx")
        weights = one.get("topk_weights")
        demand(
            weights is None or (weights.shape == one["topk_idx"].shape and weights.dtype == torch.float32), "weights"
        )
    equal([one["topk_idx"].shape[1] for one in given], "K")
    ids = [one["topk_idx"] for one in given]
    weights = [
        torch.ones(i.shape) if one.get("topk_weights") is None else one["topk_weights"].detach()
        for i, one in zip(ids, given, strict=True)
    ]
    nothing = [torch.zeros(len(i), 1) for i in ids]
    worst = [one.get("num_worst_tokens", 0) for one in given]
    demand(all(isinstance(W, int) and W >= 0 for W in worst), "num_worst_tokens")
    results = reference.dispatch(nothing, ids, weights, equal(num_experts, "E"), worst)
    return [
        [
            *routed_parts(of.recv_src_idx, parts),
            of.recv_topk_idx,
            of.recv_topk_weights,
            of.num_recv_tokens_per_expert,
        ]
        for of in results
    ]


def dispatch_model(world: World, given: list[Arguments]) -> list[Any]:
    return expert_rows(
        given, [parts_of(one["x"], "none", False) for one in given], [one["num_experts"] for one in given]
    )


def combine_model(world: World, given: list[Arguments]) -> list[Any]:
    routing = world.routing_of([one["handle"] for one in given], "expert")
    return [[out] for out in weighted(routing.expert, given, routing.weights)]


def weighted(of: list[Any], given: list[Arguments], weights: list[Tensor]) -> list[Tensor]:
    xs = [one["x"].detach() for one in given]
    equal([(x.dtype, x.shape[1]) for x in xs], "x")
    for x, one in zip(xs, of, strict=True):
        demand(x.dim() == 2 and len(x) == len(one.recv_src_idx), "x")
    return reference.combine(xs, weights, [one.recv_src_idx for one in of])


def with_empty(recv_src_idx: Tensor, handle: Any) -> Tensor:
    """Of the handle where that has more rows, all of them empty, else as it is."""
    N = len(recv_src_idx)
    of_handle = [one for one in handle if isinstance(one, Tensor) and not one.is_meta and one.dim() == 2]
    return next((one for one in of_handle if same(one[:N], recv_src_idx) and bool((one[N:] < 0).all())), recv_src_idx)


def buffer_dispatch_model(world: World, given: list[Arguments]) -> list[Any]:
    rows, cached = world.rows, equal([one.get("handle") is not None for one in given], "handle")
    parts = [parts_of(one["x"], one.get("quant_mode") or "none", False) for one in given]
    if cached:
        routing = world.routing_of([one["handle"] for one in given], rows)
        for of_x, ids in zip(parts, routing.ids, strict=True):
            demand(len(of_x[0]) == len(ids), "x")
        results = routing.expert if rows == "expert" else routing.rank
        return [
            [*routed_parts(with_empty(of.recv_src_idx, one["handle"]), parts)]
            for of, one in zip(results, given, strict=True)
        ]
    if rows == "expert":
        out = expert_rows(given, parts, [len(one["num_tokens_per_expert"]) for one in given])
    else:
        out = rank_rows(given, parts)
    for one, of in zip(given, out, strict=True):
        of[-1] = "?" if one.get("num_worst_tokens", 0) else of[-1].tolist()
    return out


def rank_rows(given: list[Arguments], parts: list[tuple[Tensor, ...]]) -> list[Any]:
    masks = [one["is_token_in_rank"] for one in given]
    for mask, of_x in zip(masks, parts, strict=True):
        demand(mask.dtype == torch.bool and mask.shape == (len(of_x[0]), R), "mask")
    nothing, ones = [torch.zeros(len(mask), 1) for mask in masks], [torch.ones(mask.shape) for mask in masks]
    ids = [torch.where(mask, torch.arange(R), -1) for mask in masks]
    worst = [one.get("num_worst_tokens", 0) for one in given]
    num_local = equal([len(one["num_tokens_per_expert"]) for one in given], "E") // R
    has_ids = equal([one.get("topk_idx") is not None for one in given], "topk_idx")
    out = []
    for rank, of in enumerate(reference.dispatch(nothing, ids, ones, R, worst)):
        recv = routed_parts(of.recv_src_idx, parts)
        if not has_ids:
            counts = sum(one["num_tokens_per_expert"].view(R, num_local)[rank].long() for one in given)
            out.append([*recv, None, None, counts])
            continue
        for one, mask in zip(given, masks, strict=True):
            demand(one["topk_idx"].dtype == torch.int64 and len(one["topk_idx"]) == len(mask), "topk_idx")
            demand(bool(((one["topk_idx"] >= -1) & (one["topk_idx"] < R * num_local)).all()), "topk_idx")
        equal([one["topk_idx"].shape[1] for one in given], "K")
        weights = [
            torch.ones(one["topk_idx"].shape) if one.get("topk_weights") is None else one["topk_weights"].detach()
            for one in given
        ]
        empty = of.recv_src_idx[:, :1] < 0
        local = routed(of.recv_src_idx, [one["topk_idx"] for one in given]) - rank * num_local
        mine = (local >= 0) & (local < num_local) & ~empty
        counts = torch.bincount(local[mine], minlength=num_local)
        out.append([*recv, local.where(mine, -1), routed(of.recv_src_idx, weights).where(mine, 0), counts])
    return out


def buffer_combine_model(world: World, given: list[Arguments]) -> list[Any]:
    routing = world.routing_of([one["handle"] for one in given], world.rows)
    if world.rows == "expert":
        sums, weights = weighted(routing.expert, given, routing.weights), [None] * R
        for one in given:
            given_back, own = one.get("topk_weights"), one["handle"][7]
            demand(given_back is None or (given_back.dtype == own.dtype and torch.equal(given_back, own)), "weights")
    else:
        ones = [torch.ones(mask.shape) for mask in routing.masks]
        sums, weights = weighted(routing.rank, given, ones), [None] * R
        if equal([one.get("topk_weights") is not None for one in given], "weights"):
            weights = weighted(routing.rank, [{"x": one["topk_weights"]} for one in given], ones)
    for rank, one in enumerate(given):
        biases = one.get("bias")
        biases = () if biases is None else biases if isinstance(biases, tuple) else (biases,)
        total = sums[rank].float()
        for bias in biases:
            demand(bias.dtype == sums[rank].dtype and bias.shape == sums[rank].shape, "bias")
            total = total + bias.detach()
        sums[rank] = total.to(sums[rank].dtype)
    return [list(pair) for pair in zip(sums, weights, strict=True)]


def low_latency_parts(world: World, one: Arguments) -> tuple[Tensor, ...]:
    mode = one.get("quant_mode")
    options: dict[str, bool] = {}
    if mode is None:
        mode = "block_fp8_e4m3" if world.rows == "rank" else "mx_fp8_e4m3" if one.get("use_ue8m0") else "int8"
        mode = mode if one.get("use_fp8", True) else "none"
    if mode == "block_fp8_e4m3":
        options = {name: bool(one.get(name)) for name in ("round_scale", "use_ue8m0")}
    parts = parts_of(one["x"], quantization.check_mode(mode), True, **options)
    return parts


def low_latency_dispatch_model(world: World, given: list[Arguments]) -> list[Any]:
    most = equal([one["num_max_dispatch_tokens_per_rank"] for one in given], "M")
    demand(isinstance(most, int) and most >= 1, "M")
    parts = [low_latency_parts(world, one) for one in given]
    demand(all(len(of_x[0]) <= most for of_x in parts), "T")
    num_rows = R * most * min(given[0]["topk_idx"].shape[1], given[0]["num_experts"] // R)
    routes = [{"topk_idx": one["topk_idx"], "num_worst_tokens": num_rows} for one in given]
    out = []
    for *recv, _, _, counts in expert_rows(routes, parts, [one["num_experts"] for one in given]):
        if getattr(world, "rows", None) == "rank":
            padded = []
            for part in recv:
                to = torch.zeros((len(counts), R * most, *part.shape[1:]), dtype=torch.uint8).to(part.dtype)
                begin = 0
                for expert, count in enumerate(counts.tolist()):
                    to[expert, :count] = part[begin : begin + count]
                    begin += count
                padded.append(to)
            recv, counts = padded, counts.int()
        elif len(recv) == 2 and recv[1].dtype == torch.float8_e8m0fnu:
            recv[1] = recv[1].reshape(-1)
        out.append([*recv, counts])
    return out


def plain_low_latency_dispatch_model(world: World, given: list[Arguments]) -> list[Any]:
    world.rows = "expert"
    return low_latency_dispatch_model(world, [one | {"quant_mode": "none"} for one in given])


def low_latency_combine_model(world: World, given: list[Arguments]) -> list[Any]:
    kind = "low_latency" if getattr(world, "rows", "expert") == "expert" else "padded"
    routing = world.routing_of([one["handle"] for one in given], kind)
    given = [dict(one) for one in given]
    for rank, one in enumerate(given):
        demand(same(one["topk_idx"], routing.ids[rank]), "topk_idx")
        demand(one["topk_weights"].shape == one["topk_idx"].shape, "topk_weights")
        out = one.get("out")
        if kind == "padded":
            counts = routing.low_latency[rank].num_recv_tokens_per_expert.tolist()
            demand(one["x"].shape[:2] == (L, R * M), "x")
            packed = [one["x"][expert, :count] for expert, count in enumerate(counts)]
            spare = one["x"].new_zeros((R * M * min(K, L) - sum(counts), one["x"].shape[2]))
            one["x"] = torch.cat([*packed, spare])
        if out is not None:
            demand(out.dtype == one["x"].dtype and out.shape[1] == one["x"].shape[1], "out")
            demand(len(out) >= len(one["topk_idx"]), "out")
    return [[sums] for sums in weighted(routing.low_latency, given, [one["topk_weights"].detach() for one in given])]


def fused_model(world: World, given: list[Arguments]) -> list[Any]:
    for rank, one in enumerate(given):
        demand(same(one["gmm2_weight"], world.downs[rank]), "weights")
        demand(one["topk_idx"].dtype == torch.int64, "topk_idx")
        demand(bool(((one["topk_idx"] >= -1) & (one["topk_idx"] < E)).all()), "topk_idx")
        demand(one["topk_weights"].dtype == torch.float32, "topk_weights")
    for what in ("num_max_dispatch_tokens_per_rank", "num_experts"):
        equal([one[what] for one in given], what)
    equal([one["topk_idx"].shape[1] for one in given], "K")
    equal([one["x"].dtype for one in given], "dtype")
    sums = reference.fused_deep_moe(
        [one["x"].detach() for one in given],
        [one["topk_idx"].long() for one in given],
        [one["topk_weights"].detach() for one in given],
        world.gates,
        world.downs,
    )
    return [[out] for out in sums]


# The calls


class Call(NamedTuple):
    """`arguments(world, rank)` are right; `run` gives what `model` says for the arguments of both ranks."""

    arguments: Callable[[World, int], Arguments]
    run: Callable[[Any, Arguments], list[Any]]
    model: Callable[[World, list[Arguments]], list[Any]]
    buffer: bool = False


def dispatch_arguments(world: World, rank: int) -> Arguments:
    worst = {} if world.worst is None else {"num_worst_tokens": world.worst[rank]}
    return routed_arguments(world, rank) | {"num_experts": E} | worst


def routed_arguments(world: World, rank: int) -> Arguments:
    routing = world.main
    tensors = world.xs[rank], routing.ids[rank], routing.weights[rank]
    return dict(zip(("x", "topk_idx", "topk_weights"), (tensor.clone() for tensor in tensors), strict=True))


def combine_arguments(world: World, rank: int) -> Arguments:
    world.draw.random()
    N = len(world.main.expert[rank].recv_src_idx)
    return {"x": results_of(world, rank, N), "handle": world.main.handle(rank, "expert", world.H)}


def results_of(world: World, rank: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(world.H + rank)
    return (torch.randint(-8, 9, (*shape, world.H), generator=generator) / 4).to(world.dtype)


def low_latency_arguments(world: World, rank: int) -> Arguments:
    tensors = routed_arguments(world, rank)
    del tensors["topk_weights"]
    return tensors | {"num_max_dispatch_tokens_per_rank": M, "num_experts": E}


def low_latency_combine_arguments(world: World, rank: int) -> Arguments:
    given = routed_arguments(world, rank)
    given["x"] = results_of(world, rank, R * M * min(K, L))
    return given | {"handle": world.main.handle(rank, "low_latency", world.H)}


def fused_arguments(world: World, rank: int) -> Arguments:
    weights = deep_ep.fused_weights(world.gates[rank], world.downs[rank])
    names = "gmm1_weight", "gmm1_weight_scale", "gmm2_weight", "gmm2_weight_scale"
    sizes = {"num_max_dispatch_tokens_per_rank": M, "num_experts": E, "quant_mode": 0}
    return routed_arguments(world, rank) | dict(zip(names, weights, strict=True)) | sizes


def buffer_dispatch_arguments(world: World, rank: int) -> Arguments:
    choose = world.choices
    given = routed_arguments(world, rank)
    if choose["cached"]:
        given = {"x": given["x"], "handle": world.main.handle(rank, world.rows, world.H)}
    else:
        per_rank, _, per_expert, mask = reference.get_dispatch_layout(given["topk_idx"], E, R, 1)
        given |= {"num_tokens_per_rank": per_rank, "num_tokens_per_expert": per_expert}
        given["is_token_in_rank"] = mask.bool() if world.rows == "rank" else mask
        if world.worst is not None:
            given["num_worst_tokens"] = world.worst[rank]
        if world.rows == "rank" and choose["bare"]:
            del given["topk_idx"], given["topk_weights"]
    if choose["quantised"]:
        given["quant_mode"] = "int8"
    return given | ({"async_finish": True} if choose["asynchronous"] else {})


def buffer_combine_arguments(world: World, rank: int) -> Arguments:
    choose = world.choices
    of = (world.main.expert if world.rows == "expert" else world.main.rank)[rank]
    N = len(of.recv_src_idx)
    given: Arguments = {"x": results_of(world, rank, N), "handle": world.main.handle(rank, world.rows, world.H)}
    if world.rows == "rank" and choose["weights"]:
        given["topk_weights"] = results_of(world, rank, N)[:, :K].float().contiguous()
    if choose["bias"]:
        given["bias"] = world.xs[rank] * 2
    return given | ({"async_finish": True} if choose["asynchronous"] else {})


def buffer_low_latency_arguments(world: World, rank: int) -> Arguments:
    choose = world.choices
    given = low_latency_arguments(world, rank)
    if choose["quantised"]:
        given |= {"quant_mode": "int8"}
    elif choose["bare"]:
        given |= {"quant_mode": "none"}
    else:
        given |= {"use_fp8": False}
    if choose["weights"]:
        given["cumulative_local_expert_recv_stats"] = torch.zeros(L, dtype=torch.int32)
    if choose["asynchronous"]:
        given["return_recv_hook" if choose["bias"] else "async_finish"] = True
    return given


def buffer_low_latency_combine_arguments(world: World, rank: int) -> Arguments:
    choose = world.choices
    given = routed_arguments(world, rank)
    if world.rows == "rank":
        given["x"] = results_of(world, rank, L, R * M)
        given["handle"] = world.main.handle(rank, "padded", world.H)
    else:
        given["x"] = results_of(world, rank, R * M * min(K, L))
        given["handle"] = world.main.handle(rank, "low_latency", world.H)
    if choose["weights"]:
        given["out"] = torch.zeros(len(given["topk_idx"]), world.H, dtype=world.dtype)
    if choose["asynchronous"]:
        given["return_recv_hook" if choose["bias"] else "async_finish"] = True
    return given


def buffer_fused_arguments(world: World, rank: int) -> Arguments:
    given = fused_arguments(world, rank)
    for name in ("gmm1_weight", "gmm1_weight_scale"):
        given[name.replace("gmm1", "gmm1_permuted")] = given.pop(name)
    return given


def flat(value: Any) -> list[Any]:
    if isinstance(value, tuple):
        return [one for part in value for one in flat(part)]
    return [value]


def finished(*given: Any) -> None:
    for one in given:
        if isinstance(one, deep_ep.EventOverlap):
            one.current_stream_wait()
        elif callable(one):
            one()


def run_dispatch(group: Any, given: Arguments) -> list[Any]:
    return list(deep_ep.dispatch(**given, group=group)[:4])


def run_dispatch_start(group: Any, given: Arguments) -> list[Any]:
    return list(deep_ep.wait(deep_ep.dispatch_start(**given, group=group))[:4])


def run_combine(group: Any, given: Arguments) -> list[Any]:
    return [deep_ep.combine(**given, group=group)]


def run_combine_start(group: Any, given: Arguments) -> list[Any]:
    return [deep_ep.wait(deep_ep.combine_start(**given, group=group))]


def run_buffer_dispatch(buffer: Any, given: Arguments) -> list[Any]:
    recv, ids, weights, counts, _, event = buffer.dispatch(**given)
    finished(event)
    if given.get("handle") is not None:
        return flat(recv)
    return [*flat(recv), ids, weights, "?" if given.get("num_worst_tokens") else counts]


def run_buffer_combine(buffer: Any, given: Arguments) -> list[Any]:
    out, weights, event = buffer.combine(**given)
    finished(event)
    return [out, weights]


def run_buffer_low_latency_dispatch(buffer: Any, given: Arguments) -> list[Any]:
    recv, counts, _, event, hook = buffer.low_latency_dispatch(**given)
    finished(event, hook)
    return [*flat(recv), counts]


def run_buffer_low_latency_combine(buffer: Any, given: Arguments) -> list[Any]:
    out, event, hook = buffer.low_latency_combine(**given)
    finished(event, hook)
    return [out]


CALLS = {
    "dispatch": Call(dispatch_arguments, run_dispatch, dispatch_model),
    "dispatch_start": Call(dispatch_arguments, run_dispatch_start, dispatch_model),
    "combine": Call(combine_arguments, run_combine, combine_model),
    "combine_start": Call(combine_arguments, run_combine_start, combine_model),
    "low_latency_dispatch": Call(
        low_latency_arguments,
        lambda group, given: list(deep_ep.low_latency_dispatch(**given, group=group)[:2]),
        plain_low_latency_dispatch_model,
    ),
    "low_latency_combine": Call(
        low_latency_combine_arguments,
        lambda group, given: [deep_ep.low_latency_combine(**given, group=group)],
        low_latency_combine_model,
    ),
    "fused_deep_moe": Call(
        fused_arguments, lambda group, given: [deep_ep.fused_deep_moe(**given, group=group)[0]], fused_model
    ),
    "Buffer.dispatch": Call(buffer_dispatch_arguments, run_buffer_dispatch, buffer_dispatch_model, True),
    "Buffer.combine": Call(buffer_combine_arguments, run_buffer_combine, buffer_combine_model, True),
    "Buffer.low_latency_dispatch": Call(
        buffer_low_latency_arguments, run_buffer_low_latency_dispatch, low_latency_dispatch_model, True
    ),
    "Buffer.low_latency_combine": Call(
        buffer_low_latency_combine_arguments, run_buffer_low_latency_combine, low_latency_combine_model, True
    ),
    "Buffer.fused_deep_moe": Call(
        buffer_fused_arguments, lambda buffer, given: [buffer.fused_deep_moe(**given)[0]], fused_model, True
    ),
}
OFTEN = ("Buffer.dispatch", "Buffer.combine", "Buffer.low_latency_dispatch", "Buffer.low_latency_combine")


# What can be wrong with them


def other_dtype(tensor: Tensor) -> Tensor:
    others = {torch.float32: torch.bfloat16, torch.bfloat16: torch.float64, torch.int64: torch.int32}
    return tensor.to(others.get(tensor.dtype, torch.int64))


def strided(tensor: Tensor) -> Tensor:
    return tensor.t().contiguous().t() if tensor.dim() == 2 else torch.stack([tensor, tensor], -1)[..., 0]


def sparse(tensor: Tensor) -> Tensor:
    return tensor.detach().to_sparse()


def needing_gradient(tensor: Tensor) -> Tensor:
    return tensor.clone().requires_grad_() if tensor.is_floating_point() else tensor


def with_id(value: int) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        if tensor.numel() and tensor.dtype in (torch.int64, torch.int32) and value < 1 << 8 * tensor.element_size() - 1:
            tensor.view(-1)[-1] = value
        return tensor

    return change


TENSORS: dict[str, Callable[[Tensor], Any]] = {
    "in a tuple": lambda tensor: (tensor,),
    "as a list": lambda tensor: tensor.float().tolist(),
    "as numpy's": lambda tensor: numpy.zeros(tuple(tensor.shape), dtype=numpy.float32),
    "None": lambda tensor: None,
    "a name": lambda tensor: "tensor",
    "a number": lambda tensor: 3.5,
    "meta": lambda tensor: tensor.to("meta"),
    "sparse": sparse,
    "of another dtype": other_dtype,
    "of bytes": lambda tensor: torch.zeros(tensor.shape, dtype=torch.uint8),
    "strided": strided,
    "shorter": lambda tensor: tensor[:-1],
    "longer": lambda tensor: torch.cat(
        [tensor, tensor[-1:] if len(tensor) else tensor.new_zeros((1, *tensor.shape[1:]))]
    ),
    "narrower": lambda tensor: tensor[..., :-1].contiguous(),
    "wider": lambda tensor: torch.cat([tensor, tensor], -1),
    "of no columns": lambda tensor: tensor[..., :0].contiguous(),
    "in a batch": lambda tensor: tensor[None],
    "without dimensions": lambda tensor: tensor.new_zeros(()),
    "empty": lambda tensor: tensor.new_zeros((0, *tensor.shape[1:])),
    "that needs a gradient": needing_gradient,
    "with an id beyond": with_id(E),
    "with an id far beyond": with_id(1 << 40),
    "with an id below": with_id(-2),
    "with another id": with_id(0),
}
NUMBERS: dict[str, Callable[[Any], Any]] = {
    "None": lambda number: None,
    "a float": float,
    "a half": lambda number: number + 0.5,
    "a text": str,
    "a tensor": lambda number: torch.tensor([number, number]),
    "0": lambda number: 0,
    "negative": lambda number: -number,
    "1 more": lambda number: number + 1,
    "twice": lambda number: 2 * number,
    "huge": lambda number: 1 << 40,
    "beyond 64 bits": lambda number: 1 << 70,
}
FLAGS: dict[str, Any] = {
    "quant_mode": ("int4", 7, "mx_fp8_e4m3", "block_fp8_e4m3", ("int8",)),
    "expert_alignment": (0, -1, 2.0, "2", None),
    "num_worst_tokens": (-1, 1 << 40, 4.0, "many"),
    "bias": (torch.ones(3), "bias", (torch.ones(1),) * 3, [torch.ones(1)], torch.ones(3, 3, dtype=torch.int64)),
    "topk_weights": (torch.ones(3), "weights", torch.ones(2, 2, dtype=torch.float64)),
    "previous_event": ("event", 3),
    "allocate_on_comm_stream": (True,),
    "dispatch_wait_recv_cost_stats": (torch.zeros(R), torch.zeros(R + 1, dtype=torch.int32), "stats"),
    "combine_send_cost_stats": (torch.zeros(R), torch.zeros(R + 1, dtype=torch.int32), "stats"),
    "combine_wait_recv_cost_stats": (torch.zeros(R), torch.zeros(R + 1, dtype=torch.int32), "stats"),
    "cumulative_local_expert_recv_stats": (torch.zeros(L), torch.zeros(L + 1, dtype=torch.int32), "stats", [0, 0]),
    "out": (torch.zeros(9, 9), "out", torch.zeros(9, 128, dtype=torch.int64), (torch.zeros(1),)),
    "async_finish and hook": ({"async_finish": True, "return_recv_hook": True},),
    "use_ue8m0": (True,),
    "x and scales": ("x",),
    "fuse_mode": (0, 3, "fused", None),
    "surprise": (1,),
}
OF_CALL = {
    "Buffer.dispatch": (
        *("quant_mode", "expert_alignment", "num_worst_tokens", "previous_event", "allocate_on_comm_stream"),
        *("dispatch_wait_recv_cost_stats", "x and scales"),
    ),
    "Buffer.combine": ("bias", "topk_weights", "previous_event", "allocate_on_comm_stream", "combine_send_cost_stats"),
    "Buffer.low_latency_dispatch": (
        *("quant_mode", "cumulative_local_expert_recv_stats", "async_finish and hook", "use_ue8m0"),
        "dispatch_wait_recv_cost_stats",
    ),
    "Buffer.low_latency_combine": ("out", "async_finish and hook", "combine_wait_recv_cost_stats"),
    "fused_deep_moe": ("fuse_mode",),
    "Buffer.fused_deep_moe": ("fuse_mode",),
    "dispatch": ("num_worst_tokens",),
    "dispatch_start": ("num_worst_tokens",),
}


@dataclasses.dataclass
class Fault:
    """One of a call's arguments, and how it is wrong."""

    name: str
    kind: str
    place: int = 0  # in a handle
    choice: int = 0
    text: str = ""

    def apply(self, world: World, rank: int, given: Arguments) -> Arguments:
        given = dict(given)
        value = given.get(self.name)
        if self.kind == "missing":
            given.pop(self.name, None)
        elif self.kind == "flag":
            wrong = FLAGS[self.name][self.choice % len(FLAGS[self.name])]
            if isinstance(wrong, dict):
                given |= wrong
            elif self.name == "x and scales":
                given["x"] = (given["x"], given["x"][:0], given["x"])[: 2 + self.choice % 2]
            else:
                given[self.name] = wrong
        elif self.kind.startswith("handle: "):
            kind = self.kind.removeprefix("handle: ")
            sort = next(k for k in ("expert", "rank", "low_latency", "padded") if isinstance(value, SORTS[k]))
            if kind == "other":
                given[self.name] = world.other.handle(rank, sort, world.H)
            elif kind == "foreign":
                sorts = [k for k in SORTS if k != sort]
                given[self.name] = world.main.handle(rank, sorts[self.choice % len(sorts)], world.H)
            elif kind == "cut":
                given[self.name] = tuple(value)[: self.choice % len(value)]
            elif kind == "list":
                given[self.name] = list(value)
            elif kind == "plain":
                given[self.name] = tuple(value)
            else:
                parts = list(value)
                part = parts[self.place % len(parts)]
                table = TENSORS if isinstance(part, Tensor) else NUMBERS
                change = table.get(kind) or NUMBERS["a text"]
                parts[self.place % len(parts)] = change(part) if not isinstance(part, tuple) else "handle"
                given[self.name] = type(value)(*parts)
        elif isinstance(value, Tensor):
            given[self.name] = TENSORS[self.kind](value)
        else:
            given[self.name] = NUMBERS[self.kind](value)
        return given


SORTS = {"expert": DispatchHandle, "rank": RankHandle, "low_latency": LowLatencyHandle, "padded": PaddedHandle}


def draw_fault(draw: random.Random, name: str, given: Arguments) -> Fault:
    flags = OF_CALL.get(name, ())
    if draw.random() < 0.3 and flags:
        return Fault(draw.choice((*flags, "surprise")), "flag", choice=draw.randrange(60))
    argument = draw.choice(
        [one for one in sorted(given) if not isinstance(given[one], bool) and given[one] is not None]
    )
    value = given[argument]
    if draw.random() < 0.05:
        return Fault(argument, "missing")
    if isinstance(value, Tensor):
        return Fault(argument, draw.choice(list(TENSORS)))
    if isinstance(value, tuple):
        kinds = ["other", "other", "foreign", "cut", "list", "plain", *list(TENSORS)]
        if draw.random() < 0.2:
            return Fault(argument, "flag") if argument in FLAGS else Fault(argument, "missing")
        return Fault(argument, f"handle: {draw.choice(kinds)}", draw.randrange(60), draw.randrange(60))
    if isinstance(value, str):
        return Fault("quant_mode", "flag", choice=draw.randrange(60))
    return Fault(argument, draw.choice(list(NUMBERS)))


class Plan:
    """One bad call: what each rank gives, and what it must get."""

    def __init__(self, seed: int, only: str = "") -> None:
        self.seed, self.world = seed, World(seed)
        draw = self.world.draw
        self.name = only or draw.choice((*CALLS, *OFTEN))
        self.call = CALLS[self.name]
        self.rows = self.world.rows = draw.choice(("expert", "rank")) if self.call.buffer else "expert"
        names = "cached", "bare", "quantised", "asynchronous", "weights", "bias"
        self.world.choices = {name: draw.random() < 0.4 for name in names}
        right = [self.call.arguments(self.world, rank) for rank in range(R)]
        self.wrong_on = draw.choice(((0,), (1,), (0, 1)))
        common = draw_fault(draw, self.name, right[0])
        apart = draw.random() < 0.3
        self.faults = {rank: draw_fault(draw, self.name, right[rank]) if apart else common for rank in self.wrong_on}
        self.given = right
        for rank, fault in self.faults.items():
            self.given[rank] = fault.apply(self.world, rank, right[rank])

    def expected(self) -> list[Any]:
        for one, full in zip(self.given, [self.call.arguments(self.world, rank) for rank in range(R)], strict=True):
            demand(not set(full) - set(one) - {"num_worst_tokens", "quant_mode", *OPTIONAL}, "missing")
        return self.call.model(self.world, [as_ops_take(one) for one in self.given])

    def __str__(self) -> str:
        faults = "; ".join(
            f"rank {rank}: {f.name} {f.kind}{f' {f.place}' if ':' in f.kind else ''}"
            f"{f' {FLAGS[f.name][f.choice % len(FLAGS[f.name])]!r}' if f.kind == 'flag' else ''}"
            for rank, f in self.faults.items()
        )
        how = ", ".join(name for name, chosen in self.world.choices.items() if chosen)
        sizes = f"T={self.world.tokens} H={self.world.H} W={self.world.worst} {self.world.dtype}"
        return f"seed {self.seed}: {self.name} (rows={self.rows}; {how}; {sizes}) with {faults}"


def as_ops_take(given: Arguments) -> Arguments:
    given = dict(given)
    ids, weights = given.get("topk_idx"), given.get("topk_weights")
    if isinstance(ids, Tensor) and ids.dtype in arguments.INTEGERS:
        given["topk_idx"] = ids.long()
    if isinstance(weights, Tensor) and weights.dtype in (torch.float16, torch.bfloat16):
        given["topk_weights"] = weights.float()
    return given


OPTIONAL = (
    *("topk_weights", "topk_idx", "bias", "out", "num_tokens_per_rank", "handle", "num_tokens_per_expert"),
    *("is_token_in_rank", "cumulative_local_expert_recv_stats", "use_fp8", "fuse_mode", "async_finish"),
    *("return_recv_hook", "gmm1_weight_scale", "gmm2_weight_scale", "gmm1_permuted_weight_scale"),
)


def difference(actual: list[Any], expected: list[Any]) -> str:
    """What is wrong with results, or nothing."""
    if len(actual) != len(expected):
        return f"{len(actual)} results instead of {len(expected)}"
    for place, (got, wanted) in enumerate(zip(actual, expected, strict=True)):
        if isinstance(wanted, Tensor) and isinstance(got, list):
            got = torch.tensor(got)
        if not isinstance(wanted, Tensor):
            if got != wanted:
                return f"result {place} is {got!r} instead of {wanted!r}"
            continue
        if not isinstance(got, Tensor) or got.dtype != wanted.dtype or got.shape != wanted.shape:
            return f"result {place} is {getattr(got, 'shape', got)} instead of {wanted.dtype} {list(wanted.shape)}"
        got, wanted = got.detach(), wanted.detach()
        if got.element_size() == 1 and got.dtype != torch.bool:
            got, wanted = got.view(torch.uint8), wanted.view(torch.uint8)
        if not torch.allclose(got.double(), wanted.double(), rtol=2e-2, atol=2e-2):
            return f"result {place} has other values"
    return ""


class Outcome(NamedTuple):
    error: str  # its type and text, if the call raised
    wrong: str  # what else is amiss on this rank
    trace: str = ""


def one_call(plan: Plan, rank: int, group: Any, buffers: dict[str, Any]) -> Outcome:
    target = buffers[plan.rows] if plan.call.buffer else group
    try:
        results = plan.call.run(target, plan.given[rank])
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        late = DEADLINE.search(str(error))
        return Outcome(text, f"needed the deadline: {text}" if late else "", traceback.format_exc())
    try:
        return Outcome("", difference(results, plan.expected()[rank]))
    except Exception as error:
        return Outcome("", f"accepted, but {type(error).__name__}: {error}", traceback.format_exc())


def good_call(seed: int, rank: int, group: Any) -> str:
    world = World(seed)
    world.rows = "expert"
    given = [dispatch_arguments(world, r) for r in range(R)]
    try:
        return difference(run_dispatch(group, given[rank]), dispatch_model(world, given)[rank])
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def buffers_of(group: Any, strategy: str) -> dict[str, Any]:
    choices = {"normal_strategy": strategy, "low_latency_strategy": strategy}
    return {rows: deep_ep.Buffer(group, rows=rows, **choices) for rows in ("expert", "rank")}


def bad_calls(ctx: RankContext, strategy: str, seeds: range) -> list[Outcome]:
    """Ends at the first call after which the group is not as before."""
    group = ctx.prepared_group(strategy)
    buffers = buffers_of(group, strategy)
    outcomes = []
    for seed in seeds:
        outcome = one_call(Plan(seed), ctx.rank, group, buffers)
        if not outcome.wrong and (next_is := good_call(seed, ctx.rank, group)):
            outcome = outcome._replace(wrong=f"the next call is wrong: {next_is}")
        outcomes.append(outcome)
        if outcome.wrong:
            break
    return outcomes


def check(pool: RankPool, strategy: str, seeds: range) -> None:
    by_rank = pool.run(R, bad_calls, strategy, seeds)
    for seed, outcomes in zip(seeds, zip(*by_rank, strict=False), strict=False):
        said = "\n".join(f"  rank {rank}: {one.wrong or one.error or 'right'}" for rank, one in enumerate(outcomes))
        assert not any(one.wrong for one in outcomes), f"{Plan(seed)}\n{said}"
        assert len({bool(one.error) for one in outcomes}) == 1, f"{Plan(seed)}\n{said}"
    assert len(by_rank[0]) == len(by_rank[1]) == len(seeds)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_bad_calls(pool: RankPool, strategy: str) -> None:
    check(pool, strategy, range(300))


@pytest.mark.long
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("part", range(10))
def test_many_bad_calls(pool: RankPool, strategy: str, part: int) -> None:
    check(pool, strategy, range(1000 * (part + 1), 1000 * (part + 2)))
