"""The ops under opcheck, torch.compile, torch.export and activation checkpointing: one graph, and eager's results.

Two ranks compile by themselves and communicate while they do, so both must issue the same ops in the same order.
Everything is compared bit by bit. Symbols: T local tokens, H hidden, K top-k, E experts, R ranks, N received rows,
W num_worst_tokens (0 = exact mode).
"""

import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from cases import Case, assert_same, make_inputs
from ranks import ALLTOALL_IS_SLOW, STRATEGIES, WINDOW_BYTES, WORLD_SIZE, RankContext, RankPool
from reference import DispatchResult
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import deep_ep
from deep_ep.debug import op_log
from deep_ep.process_groups import Group

MODES = ("exact", "capacity")
# For tests that are quick in one of them only.
CAPACITY_IS_SLOW = ("exact", pytest.param("capacity", marks=pytest.mark.slow))
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


def make_batch(
    ctx: RankContext, tokens: Iterable[int] = TOKENS, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Batch:
    case = Case(tuple(tokens), dtype=dtype, seed=seed)
    x, ids, weights = (tensors[ctx.rank] for tensors in make_inputs(case)[:3])
    grad_out = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed + 1)).to(dtype)
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
    """A backend that knows which of its graphs were made and which ran, as lists of deep_ep's ops."""

    def __init__(self, backend: str = "aot_eager") -> None:
        self.backend = backend
        self.made: list[list[str]] = []
        self.ran: list[list[str]] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        run = torch._dynamo.lookup_backend(self.backend)(graph, inputs)
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


def compiled(fn: Callable, backend: Any, *, fullgraph: bool) -> Callable:
    """Compiled anew, whatever other tests have compiled. Exact mode needs fullgraph=True to stay in one graph."""
    torch._dynamo.reset()
    return torch.compile(fn, backend=backend, fullgraph=fullgraph)


# opcheck

OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def op_arguments(ctx: RankContext, name: str, strategy: str, mode: str, dtype: torch.dtype) -> tuple[Any, ...]:
    group = ctx.prepared_group(strategy).group_name
    x, ids, weights, grad_out, E = make_batch(ctx, dtype=dtype)
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


def check_op(ctx: RankContext, name: str, strategy: str, mode: str, dtype: torch.dtype) -> None:
    arguments = op_arguments(ctx, name, strategy, mode, dtype)
    torch._dynamo.reset()
    results = torch.library.opcheck(overload(name, strategy), arguments)
    assert results == dict.fromkeys(OPCHECKS, "SUCCESS")


@pytest.mark.parametrize("strategy", ALLTOALL_IS_SLOW)
@pytest.mark.parametrize(("mode", "dtype"), [("exact", torch.float32), ("capacity", torch.bfloat16)], ids=str)
@pytest.mark.parametrize("name", OPS)
def test_opcheck(pool: RankPool, name: str, mode: str, dtype: torch.dtype, strategy: str) -> None:
    pool.run(2, check_op, name, strategy, mode, dtype)


# Every output of every op


def every_output(batch: Batch, strategy: str, group: str, num_ranks: int, num_worst_tokens: int) -> dict[str, Tensor]:
    """All ops, called by themselves."""
    x, topk_idx, topk_weights, grad_out, num_experts = batch
    sizes = (num_experts, num_ranks, group)
    layout = overload("get_dispatch_layout", strategy)(topk_idx, num_experts, num_ranks, 1)
    received = overload("dispatch", strategy)(
        x, topk_idx, topk_weights, num_experts, num_ranks, num_worst_tokens, group
    )
    recv_x, _, recv_weights, *_, src, send_head = received
    rows = experts(recv_x)
    out = overload("combine", strategy)(rows, topk_idx, topk_weights, src, send_head, *sizes)
    grad_rows, combine_grad_weights = overload("combine_backward", strategy)(
        grad_out, rows.detach(), topk_idx, topk_weights.detach(), src, send_head, *sizes
    )
    grad_x, dispatch_grad_weights = overload("dispatch_backward", strategy)(
        recv_x.detach() * 3, recv_weights.detach() + 1, src, topk_idx, send_head, *sizes
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


def check_every_output(ctx: RankContext, strategy: str, mode: str, dtype: torch.dtype, backend: str) -> None:
    batch = make_batch(ctx, dtype=dtype)
    options = (strategy, ctx.prepared_group(strategy).group_name, ctx.size, NUM_WORST_TOKENS[mode][ctx.rank])

    def train_and_tell(fn: Callable) -> dict[str, Tensor]:
        outputs: dict[str, Tensor] = {}

        def layer(*inputs: Tensor) -> tuple[Tensor, Tensor]:
            outputs.update(fn(batch, *options))
            return outputs["out"], outputs["recv_topk_weights"]

        gradients = train(layer, batch)
        return outputs | gradients

    expected = train_and_tell(every_output)
    actual = train_and_tell(compiled(every_output, backend, fullgraph=mode == "exact"))
    assert_all_same(actual, expected)
    if mode == "capacity":
        drops, has_unused = expected["num_dropped"] > 0, (expected["recv_src_idx"] < 0).any()
        assert (drops, has_unused) == ((True, False), (False, True))[ctx.rank]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("strategy", ALLTOALL_IS_SLOW)
@pytest.mark.parametrize(("mode", "dtype"), [("exact", torch.bfloat16), ("capacity", torch.float32)], ids=str)
def test_every_output(pool: RankPool, mode: str, dtype: torch.dtype, strategy: str, backend: str) -> None:
    pool.run(2, check_every_output, strategy, mode, dtype, backend)


# Which overload is called


def check_packet(ctx: RankContext) -> None:
    for name in OPS:
        arguments = op_arguments(ctx, name, "default", "capacity", torch.float32)
        graph = make_fx(getattr(torch.ops.deep_ep, name))(*arguments)
        assert deep_ep_ops(graph) == [f"{name}.default"]


def test_a_packet_call_means_default(pool: RankPool) -> None:
    pool.run(1, check_packet)


def check_new_strategy(ctx: RankContext, mode: str) -> None:
    batch, graphs = make_batch(ctx), Graphs()
    layer = make_layer(ctx, ctx.group, mode)
    compiled_layer = compiled(layer, graphs, fullgraph=mode == "exact")
    for strategy in ("default", "alltoall", "default", "alltoall"):
        deep_ep.init(ctx.group, strategy=strategy, num_bytes=WINDOW_BYTES)
        assert_all_same(train(compiled_layer, batch), train(layer, batch))
        assert graphs.ran.pop() == layer_ops(strategy)
        assert not graphs.ran
        deep_ep.destroy(ctx.group)
    with pytest.raises(RuntimeError, match="is not prepared"):
        torch.compile(layer, backend=graphs)(*batch[:3])


@pytest.mark.parametrize("mode", CAPACITY_IS_SLOW)
def test_a_new_strategy_is_seen(pool: RankPool, mode: str) -> None:
    pool.run(2, check_new_strategy, mode)


def make_buffer(ctx: RankContext, strategy: str) -> deep_ep.Buffer:
    with mock.patch.dict(os.environ, DEEP_USE_MODE=strategy):
        return deep_ep.Buffer(ctx.group, num_nvl_bytes=WINDOW_BYTES)


def buffer_layer(
    buffer: deep_ep.Buffer,
    num_experts: int,
    num_worst_tokens: int,
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
) -> tuple[Tensor, Tensor, Any]:
    """A layer as clients of DeepEP write it, with events. Returns the rows of each expert as well."""
    per_rank, _, per_expert, in_rank, event = buffer.get_dispatch_layout(
        topk_idx, num_experts, previous_event=buffer.capture(), async_finish=True, allocate_on_comm_stream=True
    )
    recv_x, _, recv_weights, counts, handle, event = buffer.dispatch(
        x,
        topk_idx=topk_idx,
        topk_weights=topk_weights,
        num_tokens_per_rank=per_rank,
        is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert,
        num_worst_tokens=num_worst_tokens,
        previous_event=event,
        async_finish=True,
        allocate_on_comm_stream=True,
    )
    event.current_stream_wait()
    rows = experts(recv_x)
    out, _, event = buffer.combine(rows, handle, async_finish=True, previous_event=buffer.capture())
    with event:
        recv_weights = recv_weights * 1
    return out, recv_weights, counts


def check_buffers(ctx: RankContext, mode: str) -> None:
    batch, graphs = make_batch(ctx), Graphs()
    W = NUM_WORST_TOKENS[mode][ctx.rank]
    compiled_layer = compiled(buffer_layer, graphs, fullgraph=mode == "exact")
    counts: list[Any] = []

    def layer_with(fn: Callable, buffer: deep_ep.Buffer) -> Callable:
        def layer(*inputs: Tensor) -> tuple[Tensor, Tensor]:
            *results, rows_per_expert = fn(buffer, batch.num_experts, W, *inputs)
            counts.append(rows_per_expert)
            return tuple(results)

        return layer

    buffers = {strategy: make_buffer(ctx, strategy) for strategy in STRATEGIES}
    for strategy in (*STRATEGIES, *STRATEGIES):
        buffer = buffers[strategy]
        eager = train(layer_with(buffer_layer, buffer), batch)
        assert_all_same(train(layer_with(compiled_layer, buffer), batch), eager)
        # Under rows="expert" nobody need wait for the events.
        ops = [f"{name}.{strategy}" for name in ("get_dispatch_layout", "dispatch", "combine")]
        assert graphs.ran.pop() == ops
        assert not graphs.ran
        assert isinstance(counts[-2], list if mode == "exact" else Tensor)
        assert_same("counts", counts[-1], torch.as_tensor(counts[-2]))
    assert len(graphs.made) == len(STRATEGIES)
    deep_ep.destroy(ctx.group)


@pytest.mark.parametrize("mode", CAPACITY_IS_SLOW)
def test_buffers_trace_with_their_own_strategies(pool: RankPool, mode: str) -> None:
    pool.run(2, check_buffers, mode)


def check_groups(ctx: RankContext, mode: str) -> None:
    deep_ep.init(num_bytes=WINDOW_BYTES, strategy="default")
    world = dist.group.WORLD
    batch = make_batch(ctx, (5, 6, 7, 8))
    W = 10 if mode == "capacity" else 0
    expected = train(Layer(world, batch.num_experts, W), batch)
    layout = deep_ep.get_dispatch_layout(batch.topk_idx, batch.num_experts)
    for group in (world, world.group_name, None):
        graphs, layer = Graphs(), Layer(group, batch.num_experts, W)
        assert_all_same(train(compiled(layer, graphs, fullgraph=mode == "exact"), batch), expected)
        assert graphs.made == [layer_ops("default")]
        get_layout = partial(deep_ep.get_dispatch_layout, num_experts=batch.num_experts, group=group)
        actual = torch.compile(get_layout, backend="aot_eager", fullgraph=True)(batch.topk_idx)
        assert actual[1] is None and layout[1] is None
        for i in (0, 2, 3):
            assert_same(f"layout[{i}]", actual[i], layout[i])
    deep_ep.destroy()


@pytest.mark.parametrize("mode", CAPACITY_IS_SLOW)
def test_group_by_object_by_name_and_default_group(pool: RankPool, mode: str) -> None:
    pool.run(WORLD_SIZE, check_groups, mode)


# How many graphs there are


# T of rank 0 at every step, and how many graphs it has needed by then: one for the first T, one for any other T
# from 2 on, one for 1 and one for 0.
STEPS = ((6, 1), (6, 1), (7, 2), (33, 2), (6, 2), (1, 3), (2, 3), (0, 4), (6, 4), (1, 4), (0, 4))


def check_recompilation(ctx: RankContext, strategy: str, mode: str, flag: str, backend: str) -> None:
    """Rank 1 has as many tokens at every step, with other ids: one graph, while rank 0 compiles anew, or has none."""
    graphs, layer = Graphs(backend), make_layer(ctx, ctx.prepared_group(strategy), mode)
    compiled_layer = compiled(layer, graphs, fullgraph=flag == "fullgraph")
    made, num_rows = [], set()
    for seed, (T, _) in enumerate(STEPS):
        batch = make_batch(ctx, (T, 9), seed)
        expected = train(layer, batch)
        with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=flag == "capture_dynamic_output_shape_ops"):
            assert_all_same(train(compiled_layer, batch), expected)
        made.append(len(graphs.made))
        num_rows.add(len(expected["recv_topk_weights"]))
    assert made == [n if ctx.rank == 0 else 1 for _, n in STEPS]
    assert all(ops == layer_ops(strategy) for ops in graphs.made)
    assert mode == "capacity" or len(num_rows) > 3


FLAGS = [
    ("exact", "fullgraph"),
    pytest.param("exact", "capture_dynamic_output_shape_ops", marks=pytest.mark.slow),
    ("capacity", "none"),
]


@pytest.mark.parametrize("strategy", ALLTOALL_IS_SLOW)
@pytest.mark.parametrize(("mode", "flag"), FLAGS)
def test_recompilation(pool: RankPool, mode: str, flag: str, strategy: str) -> None:
    pool.run(2, check_recompilation, strategy, mode, flag, "aot_eager")


@pytest.mark.slow
def test_recompilation_in_inductor(pool: RankPool) -> None:
    pool.run(2, check_recompilation, "default", "exact", "fullgraph", "inductor")


def check_marked(ctx: RankContext, mode: str, mark: str, tokens: tuple[int, ...]) -> None:
    group = ctx.prepared_group("default")
    graphs, layer = Graphs(), make_layer(ctx, group, mode)
    compiled_layer = compiled(layer, graphs, fullgraph=mode == "exact")
    for seed, T in enumerate(tokens):
        batch = make_batch(ctx, (T, tokens[-seed]), seed)
        expected = train(layer, batch)
        for tensor in batch[:3]:
            getattr(torch._dynamo.decorators, mark)(tensor, 0)
        assert_all_same(train(compiled_layer, batch), expected)
    assert graphs.made == [layer_ops("default")]


@pytest.mark.parametrize("mode", CAPACITY_IS_SLOW)
@pytest.mark.parametrize(("mark", "tokens"), [("mark_dynamic", (6, 2, 33)), ("mark_unbacked", (6, 1, 0, 33))])
def test_one_graph_for_marked_inputs(pool: RankPool, mark: str, tokens: tuple[int, ...], mode: str) -> None:
    pool.run(2, check_marked, mode, mark, tokens)


def check_capacities(ctx: RankContext) -> None:
    """W as an argument of the compiled function: one recompilation makes it a symbol."""
    group = ctx.prepared_group("default")
    graphs, batch = Graphs(), make_batch(ctx)

    def layer(W: int, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        return Layer(group, batch.num_experts, W)(*inputs)

    compiled_layer = compiled(layer, graphs, fullgraph=False)
    for W in (5, 12, 2, 40):
        W += ctx.rank
        assert_all_same(train(partial(compiled_layer, W), batch), train(partial(layer, W), batch))
    assert graphs.made == [layer_ops("default")] * 2


def test_any_capacity(pool: RankPool) -> None:
    pool.run(2, check_capacities)


def check_broken_graph(ctx: RankContext) -> None:
    """Exact mode without the flags that it needs: several graphs, the same results."""
    group = ctx.prepared_group("default")
    batch, graphs = make_batch(ctx), Graphs()
    layer = make_layer(ctx, group, "exact")
    assert_all_same(train(compiled(layer, graphs, fullgraph=False), batch), train(layer, batch))
    assert layer_ops("default") not in graphs.made


def test_exact_mode_without_flags(pool: RankPool) -> None:
    pool.run(2, check_broken_graph)


# Gradients


def check_partial_gradients(ctx: RankContext, strategy: str, mode: str) -> None:
    group = ctx.prepared_group(strategy)
    batch = make_batch(ctx)
    x, ids, weights = batch.x.detach(), batch.topk_idx, batch.topk_weights.detach()
    layer = make_layer(ctx, group, mode)

    def scaled(x: Tensor, weights: Tensor, scale: Tensor) -> Tensor:
        received = deep_ep.dispatch(
            x, ids, weights, num_experts=layer.num_experts, group=group, num_worst_tokens=layer.num_worst_tokens
        )
        return deep_ep.combine(experts(received.recv_x) * scale, received.handle, group=group)

    inputs = {"x": x, "topk_weights": weights, "scale": torch.arange(1.0, 1 + x.shape[1])}
    for wanted in ("x", "topk_weights", "scale", "none"):
        results = []
        for fn in (scaled, compiled(scaled, "aot_eager", fullgraph=mode == "exact")):
            given = [value.clone().requires_grad_(name == wanted) for name, value in inputs.items()]
            out = fn(*given)
            assert out.requires_grad == (wanted != "none")
            results.append({"out": out})
            if wanted != "none":
                out.backward(batch.grad_out)
                gradients = dict(zip(inputs, [value.grad for value in given], strict=True))
                results[-1][wanted] = gradients.pop(wanted)
                assert set(gradients.values()) == {None}
        assert_all_same(results[1], results[0])


@pytest.mark.parametrize("strategy", ALLTOALL_IS_SLOW)
@pytest.mark.parametrize("mode", CAPACITY_IS_SLOW)
def test_gradient_of_one_input(pool: RankPool, mode: str, strategy: str) -> None:
    pool.run(2, check_partial_gradients, strategy, mode)


def check_checkpointing(ctx: RankContext, strategy: str, mode: str, saved: tuple[str, ...], backend: str) -> list[str]:
    """Returns the communicating ops of this rank, which strategy default keeps a log of."""
    deep_ep.init(ctx.group, strategy=strategy, num_bytes=WINDOW_BYTES)
    batch, layer = make_batch(ctx), make_layer(ctx, ctx.group, mode)
    options: dict[str, Any] = {"use_reentrant": False}
    if saved:
        ops = [overload(name, strategy) for name in saved]
        options["context_fn"] = partial(create_selective_checkpoint_contexts, ops)

    def checkpointed(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        return checkpoint(layer, *inputs, **options)

    actual = train(
        checkpointed if backend == "eager" else compiled(checkpointed, backend, fullgraph=mode == "exact"), batch
    )
    issued = op_log(ctx.group)[0] if strategy == "default" else []
    assert_all_same(actual, train(layer, batch))
    deep_ep.destroy(ctx.group)
    return issued


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("saved", [(), ("dispatch",), ("dispatch", "combine")], ids=lambda ops: "+".join(ops) or "none")
@pytest.mark.parametrize("strategy", ALLTOALL_IS_SLOW)
@pytest.mark.parametrize("mode", CAPACITY_IS_SLOW)
def test_checkpointing(pool: RankPool, mode: str, strategy: str, saved: tuple[str, ...], backend: str) -> None:
    issued = pool.run(2, check_checkpointing, strategy, mode, saved, backend)
    assert issued[0] == issued[1]
    if strategy == "default":
        assert issued[0].count("dispatch") == (1 if "dispatch" in saved else 2)


# Export


def check_export(ctx: RankContext, strategy: str, mode: str) -> None:
    """For any T, as traced, decomposed, and saved and loaded."""
    layer = make_layer(ctx, ctx.prepared_group(strategy).group_name, mode)
    dim = torch.export.Dim("T", max=1 << 20)
    shapes = {name: {0: dim} for name in ("x", "topk_idx", "topk_weights")}
    with torch.no_grad():
        program = torch.export.export(layer, make_batch(ctx)[:3], dynamic_shapes=shapes)
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        for version in (program, program.run_decompositions(), torch.export.load(file)):
            ops = set(deep_ep_ops(version.graph_module))
            assert {f"dispatch.{strategy}", f"combine.{strategy}"} <= ops <= set(layer_ops(strategy))
            for seed, tokens in enumerate([TOKENS, (31, 2), (3, 80)]):
                inputs = make_batch(ctx, tokens, seed)[:3]
                actual, expected = version.module()(*inputs), layer(*inputs)
                assert_same("out", actual[0], expected[0])
                assert_same("recv_topk_weights", actual[1], expected[1])


@pytest.mark.parametrize("strategy", ALLTOALL_IS_SLOW)
@pytest.mark.parametrize("mode", CAPACITY_IS_SLOW)
def test_export(pool: RankPool, mode: str, strategy: str) -> None:
    pool.run(2, check_export, strategy, mode)


# Import

LOOK_AROUND = """
import os, signal, sys, threading, warnings
import torch
from torch.utils._config_module import ConfigModule

def look():
    configs = {name: m.get_config_copy() for name, m in sys.modules.items() if isinstance(m, ConfigModule)}
    return {
        "configs": configs,
        "print options": vars(torch._tensor_str.PRINT_OPTS).copy(),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads(), threading.enumerate()),
        "grad": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul": torch.get_float32_matmul_precision(),
        "rng": torch.get_rng_state().tolist(),
        "distributed": torch.distributed.is_initialized(),
        "environment": dict(os.environ),
        "warnings": list(warnings.filters),
        "signals": [signal.getsignal(s) for s in signal.valid_signals()],
        "excepthook": (sys.excepthook, threading.excepthook),
    }

before = look()
import deep_ep
after = look()
changed = [name for name in before if before[name] != after[name]]
assert not changed, [(name, before[name], after[name]) for name in changed]
loaded = [name for name in ("torch._dynamo", "torch._inductor", "torch._functorch.aot_autograd") if name in sys.modules]
assert not loaded, loaded
import torch.compiler.config
assert torch.compiler.config.cache_key_tag == ""
"""


@pytest.mark.slow
def test_import_changes_nothing_in_torch() -> None:
    subprocess.run([sys.executable, "-c", LOOK_AROUND], check=True)
