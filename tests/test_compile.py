"""The ops under opcheck, torch.compile, torch.export and activation checkpointing: one graph, and eager's results.

Two ranks compile by themselves and communicate while they do, so both must issue the same ops in the same order.
Everything is compared bit by bit. Symbols: T local tokens, H hidden, K top-k, E experts, R ranks, N received rows,
W num_worst_tokens (0 = exact mode).
"""

import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from cases import Case, assert_same, make_inputs
from ranks import STRATEGIES, WINDOW_BYTES, WORLD_SIZE, RankContext, RankPool
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import deep_ep
from deep_ep.groups import Group, op_log
from deep_ep.reference import DispatchResult

MODES = ("exact", "capacity")
OPS = ("get_dispatch_layout", "dispatch", "combine", "dispatch_backward", "combine_backward")
TOKENS = (6, 9)
# In capacity mode rank 0 drops rows of TOKENS, and rank 1 has unused ones.
NUM_WORST_TOKENS = {"exact": (0, 0), "capacity": (5, 30)}


def overload(name: str, strategy: str) -> Any:
    return getattr(getattr(torch.ops.deep_ep, name), strategy)


class Batch(NamedTuple):
    """One rank's share of a batch."""

    x: Tensor
    topk_idx: Tensor
    topk_weights: Tensor
    grad_out: Tensor
    num_experts: int


def make_batch(ctx: RankContext, tokens: Iterable[int] = TOKENS, seed: int = 0) -> Batch:
    case = Case(tuple(tokens), seed=seed)
    x, ids, weights = (tensors[ctx.rank] for tensors in make_inputs(case)[:3])
    grad_out = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed + 1))
    return Batch(x.requires_grad_(), ids, weights.requires_grad_(), grad_out, case.E)


def experts(recv_x: Tensor) -> Tensor:
    """Every row times a factor of its own, so that no row can pass for another."""
    return recv_x * (1 + torch.arange(recv_x.shape[0]) % 7).unsqueeze(1)


class Layer(torch.nn.Module):
    """dispatch, experts and combine. Returns out [T, H] and recv_topk_weights [N, K]."""

    def __init__(self, group: Group, num_experts: int, num_worst_tokens: int) -> None:
        super().__init__()
        self.group = group
        self.num_experts = num_experts
        self.num_worst_tokens = num_worst_tokens

    def forward(self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor) -> tuple[Tensor, Tensor]:
        received = deep_ep.dispatch(
            x,
            topk_idx,
            topk_weights,
            num_experts=self.num_experts,
            group=self.group,
            num_worst_tokens=self.num_worst_tokens,
        )
        out = deep_ep.combine(experts(received.recv_x), received.handle, group=self.group)
        return out, received.recv_topk_weights


def make_layer(ctx: RankContext, group: Group, mode: str) -> Layer:
    return Layer(group, 2 * ctx.size, NUM_WORST_TOKENS[mode][ctx.rank])


def train(layer: Callable, batch: Batch) -> dict[str, Tensor]:
    """The results of the layer and its gradients."""
    out, recv_weights = layer(batch.x, batch.topk_idx, batch.topk_weights)
    grad_recv_weights = torch.arange(1.0, recv_weights.numel() + 1).view(recv_weights.shape)
    grad_x, grad_weights = torch.autograd.grad(
        [out, recv_weights], [batch.x, batch.topk_weights], [batch.grad_out, grad_recv_weights]
    )
    return {"out": out, "recv_topk_weights": recv_weights, "grad_x": grad_x, "grad_topk_weights": grad_weights}


def assert_all_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name in actual:
        assert_same(name, actual[name], expected[name])


class Graphs:
    """A backend like aot_eager that knows which of its graphs were made and which ran, as lists of deep_ep's ops."""

    def __init__(self) -> None:
        self.made: list[list[str]] = []
        self.ran: list[list[str]] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        run = torch._dynamo.lookup_backend("aot_eager")(graph, inputs)
        ops = deep_ep_ops(graph)
        self.made.append(ops)

        def run_and_tell(*args: Any) -> Any:
            self.ran.append(ops)
            return run(*args)

        return run_and_tell


def deep_ep_ops(graph: torch.fx.GraphModule) -> list[str]:
    """Such as dispatch.default, in the graph's order."""
    targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    return [target.removeprefix("deep_ep.") for target in targets if target.startswith("deep_ep.")]


def layer_ops(strategy: str) -> list[str]:
    return [f"{name}.{strategy}" for name in ("dispatch", "get_dispatch_layout", "combine")]


def compiled(fn: Callable, backend: Any, mode: str) -> Callable:
    """Exact mode has a size that is known when it runs, which needs fullgraph=True."""
    torch._dynamo.reset()
    return torch.compile(fn, backend=backend, fullgraph=mode == "exact")


# opcheck


def op_arguments(name: str, strategy: str, ctx: RankContext, group: str, mode: str) -> tuple[Any, ...]:
    x, ids, weights, grad_out, E = make_batch(ctx)
    R, W = ctx.size, NUM_WORST_TOKENS[mode][ctx.rank]
    if name == "get_dispatch_layout":
        return ids, E, R, 1
    if name == "dispatch":
        return x, ids, weights, E, R, W, group
    recv_x, _, recv_weights, *_, src, send_head = overload("dispatch", strategy)(
        x.detach(), ids, weights.detach(), E, R, W, group
    )
    if name == "combine":
        return experts(recv_x).requires_grad_(), ids, weights, src, send_head, E, R, group
    if name == "dispatch_backward":
        return experts(recv_x), recv_weights, src, ids, send_head, E, R, group
    return grad_out, experts(recv_x), ids, weights.detach(), src, send_head, E, R, group


def check_op(ctx: RankContext, name: str, strategy: str, mode: str) -> None:
    group = ctx.prepared_group(strategy).group_name
    arguments = op_arguments(name, strategy, ctx, group, mode)
    torch._dynamo.reset()
    results = torch.library.opcheck(overload(name, strategy), arguments)
    assert set(results) == {
        "test_schema",
        "test_autograd_registration",
        "test_faketensor",
        "test_aot_dispatch_dynamic",
    }
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", OPS)
def test_opcheck(pool: RankPool, name: str, mode: str, strategy: str) -> None:
    pool.run(2, check_op, name, strategy, mode)


# Every output of every op


def every_output(
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    grad_out: Tensor,
    strategy: str,
    group: str,
    num_experts: int,
    num_ranks: int,
    num_worst_tokens: int,
) -> dict[str, Tensor]:
    """All ops, called by themselves."""
    sizes = (num_experts, num_ranks, group)
    layout = overload("get_dispatch_layout", strategy)(topk_idx, num_experts, num_ranks, 1)
    received = overload("dispatch", strategy)(
        x, topk_idx, topk_weights, num_experts, num_ranks, num_worst_tokens, group
    )
    recv_x, src, send_head = received[0], *received[8:]
    rows = experts(recv_x)
    out = overload("combine", strategy)(rows, topk_idx, topk_weights, src, send_head, *sizes)
    grad_rows, combine_grad_weights = overload("combine_backward", strategy)(
        grad_out, rows.detach(), topk_idx, topk_weights.detach(), src, send_head, *sizes
    )
    grad_x, dispatch_grad_weights = overload("dispatch_backward", strategy)(
        rows.detach() + 1, received[2].detach() + 1, src, topk_idx, send_head, *sizes
    )
    names = ("num_tokens_per_rank", "num_tokens_per_rdma_rank", "num_tokens_per_expert", "is_token_in_rank")
    return {
        **dict(zip(names, layout, strict=True)),
        **dict(zip(DispatchResult._fields, received, strict=True)),
        "rows": rows,
        "out": out,
        "combine_backward's grad_x": grad_rows,
        "combine_backward's grad_topk_weights": combine_grad_weights,
        "dispatch_backward's grad_x": grad_x,
        "dispatch_backward's grad_topk_weights": dispatch_grad_weights,
    }


def check_every_output(ctx: RankContext, strategy: str, mode: str, backend: str) -> None:
    group = ctx.prepared_group(strategy).group_name
    W = NUM_WORST_TOKENS[mode][ctx.rank]
    results: list[dict[str, Tensor]] = []

    def layer(x: Tensor, topk_idx: Tensor, topk_weights: Tensor) -> tuple[Tensor, Tensor]:
        results.append(fn(x, topk_idx, topk_weights, batch.grad_out, strategy, group, batch.num_experts, ctx.size, W))
        return results[-1]["out"], results[-1]["recv_topk_weights"]

    batch = make_batch(ctx)
    fn = every_output
    gradients = [train(layer, batch)]
    fn = compiled(every_output, backend, mode)
    with quick_inductor() if backend == "inductor" else nullcontext():
        gradients.append(train(layer, batch))
    if mode == "capacity":
        assert [bool(results[0]["num_dropped"] > 0), bool((results[0]["recv_src_idx"] < 0).any())] == [
            ctx.rank == 0,
            ctx.rank == 1,
        ]
    assert_all_same(*results)
    assert_all_same(*gradients)


@contextmanager
def quick_inductor() -> Iterator[None]:
    """Inductor without what takes it long and is not of interest: worker processes, and trials of vector units."""
    import torch._inductor.config as config

    with config.patch({"compile_threads": 1, "cpp.vec_isa_ok": False}):
        yield


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("mode", MODES)
def test_every_output(pool: RankPool, mode: str, strategy: str, backend: str) -> None:
    pool.run(2, check_every_output, strategy, mode, backend, timeout=240)


# Which overload is called


def check_packet(ctx: RankContext) -> None:
    group = ctx.prepared_group("default").group_name
    batch = make_batch(ctx)
    for name in OPS:
        arguments = op_arguments(name, "default", ctx, group, "capacity")
        graph = make_fx(getattr(torch.ops.deep_ep, name))(*arguments)
        assert deep_ep_ops(graph) == [f"{name}.default"]
    assert batch.num_experts


def test_a_packet_call_means_default(pool: RankPool) -> None:
    pool.run(1, check_packet)
