"""Megatron-core's MoE layer and its fused dispatch and combine, as a client of deep_ep.Buffer.

Megatron runs as it is, but for its calls of CUDA (`without_cuda`) and, where it is compiled, for what Dynamo cannot
trace in it (`traceable`). Nothing stands in for deep_ep. Symbols: T local tokens, H hidden, K top-k, E experts,
R ranks, L = E/R local experts, N received rows.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from cases import assert_same
from megatron.core import parallel_state
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.transformer.moe import fused_a2a, moe_utils, token_dispatcher
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_config import TransformerConfig
from ranks import STRATEGIES, WORLD_SIZE, RankContext, RankPool
from torch import Tensor

import deep_ep

T, H, K, E = (7, 12, 3, 10), 16, 3, 8

pytestmark = pytest.mark.slow  # importing Megatron takes seconds on every rank

# async_finish and allocate_on_comm_stream.
EVENTS = {"sync": (False, False), "async": (True, False), "async on comm stream": (True, True)}
LAYERS = "async on comm stream"  # what Megatron's layer gives


# Megatron on a CPU


class Stream:
    """What Megatron's alltoall dispatcher asks of a CUDA stream and of an event."""

    def wait_stream(self, stream: "Stream") -> None:
        pass

    def record_event(self) -> "Stream":
        return self

    def synchronize(self) -> None:
        pass


def maybe_move_tensor_to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Megatron's gives numpy's arrays for tensors of a GPU only."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


@contextmanager
def without_cuda() -> Iterator[None]:
    stream = Stream()
    with (
        mock.patch.object(torch.cuda, "current_device", lambda: torch.device("cpu")),
        mock.patch.object(torch.cuda, "Stream", Stream),
        mock.patch.object(torch.cuda, "current_stream", lambda: stream),
        mock.patch.object(torch.cuda, "stream", lambda stream: nullcontext()),
        mock.patch.object(token_dispatcher, "maybe_move_tensor_to_cpu", maybe_move_tensor_to_cpu),
        mock.patch.object(token_dispatcher.MoEAlltoAllTokenDispatcher, "cuda_dtoh_stream", None),
        mock.patch.object(moe_utils, "te_general_gemm", None, create=True),
    ):
        yield


def permute(
    tokens: Tensor, routing_map: Tensor, probs: Tensor, num_out_tokens: int, fused: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Megatron's permute without masked_select, whose backward fails for a size that is known at run time only."""
    assert not fused
    pairs = routing_map.T.flatten().nonzero().squeeze(1)
    sorted_indices = pairs % tokens.shape[0]
    return tokens.index_select(0, sorted_indices), probs.T.flatten().index_select(0, pairs), sorted_indices


@contextmanager
def traceable() -> Iterator[None]:
    flags = {"capture_scalar_outputs": True, "capture_dynamic_output_shape_ops": True}
    with (
        torch._dynamo.config.patch(flags),
        # torch.tensor(counts) warns of counts that are a tensor, and a warning breaks the graph.
        mock.patch.object(warnings, "warn", lambda *args, **kwargs: None),
        mock.patch.object(token_dispatcher, "permute", permute),
    ):
        yield


@contextmanager
def buffers(strategy: str) -> Iterator[None]:
    """Megatron makes its Buffer by itself. It and what it has are gone afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEEP_EP_ROWS", "rank")
        patch.setenv("DEEP_USE_MODE", strategy)
        patch.setattr(fused_a2a, "_buffer", None)
        num_sms = deep_ep.Buffer.num_sms
        torch._dynamo.reset()
        yield
        group = fused_a2a._buffer.group
        fused_a2a._buffer.destroy()
        deep_ep.destroy(group)
        deep_ep.Buffer.set_num_sms(num_sms)
        torch._dynamo.reset()


@contextmanager
def expert_parallel(num_ranks: int) -> Iterator[None]:
    """Megatron's groups over WORLD, those for experts with num_ranks ranks each."""
    known = set(dist.distributed_c10d._world.pg_map)
    parallel_state.initialize_model_parallel(
        1,
        1,
        expert_model_parallel_size=num_ranks,
        expert_tensor_parallel_size=1,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=60,
    )
    yield
    parallel_state.destroy_model_parallel()
    for group in [group for group in dist.distributed_c10d._world.pg_map if group not in known]:
        dist.destroy_process_group(group)


# Megatron's MoELayer


def make_layer(dispatcher: str) -> MoELayer:
    """A layer with the same parameters whatever the dispatcher and however many ranks there are."""
    config = TransformerConfig(
        num_layers=1,
        hidden_size=H,
        num_attention_heads=1,
        ffn_hidden_size=2 * H,
        num_moe_experts=E,
        expert_model_parallel_size=parallel_state.get_expert_model_parallel_world_size(),
        expert_tensor_parallel_size=1,
        moe_router_topk=K,
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type=dispatcher,
        moe_flex_dispatcher_backend="deepep",
        moe_grouped_gemm=False,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=F.silu,
        use_cpu_initialization=True,
    )
    spec = get_moe_module_spec(use_te=False, num_experts=E, moe_grouped_gemm=False)
    layer = MoELayer(config, spec.submodules)
    layer.set_layer_number(1)
    modules = {E: layer.router}
    modules.update(zip(layer.local_expert_indices, layer.experts.local_experts, strict=True))
    with torch.no_grad():
        for seed, module in modules.items():
            generator = torch.Generator().manual_seed(seed)
            for parameter in module.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / H**0.5)
    return layer


def make_batch(num_tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    """x and the gradient of the output, both [T, 1, H]."""
    generator = torch.Generator().manual_seed(seed)
    x, grad_out = torch.randn(2, num_tokens, 1, H, generator=generator)
    return x.requires_grad_(), grad_out


def train(layer: Callable, parameters: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """The output and the gradients, by name."""
    x, grad_out = batch
    out, bias = layer(x)
    assert bias is None
    inputs = {"x": x} | parameters
    return {"out": out} | dict(zip(inputs, torch.autograd.grad(out, list(inputs.values()), grad_out), strict=True))


def assert_all_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Within `tolerance` of the expected value's norm."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        error, norm = float((actual[name] - value).norm()), float(value.norm())
        assert error <= tolerance * norm, f"{name}: {error} of {norm}"


def assert_all_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert_same(name, actual[name], value)


def check_layer(ctx: RankContext, num_ranks: int, strategy: str) -> float:
    """Returns the norm of the gradients of this rank's experts."""
    with (
        without_cuda(),
        expert_parallel(num_ranks),
        buffers(strategy),
        # Megatron compiles small functions of its own.
        torch.compiler.set_stance("force_eager"),
    ):
        flex, alltoall = make_layer("flex"), make_layer("alltoall")
        for seed in range(2):
            batch = make_batch(T[ctx.rank - seed], 10 * seed + ctx.rank)
            actual = train(flex, dict(flex.named_parameters()), batch)
            expected = train(alltoall, dict(alltoall.named_parameters()), batch)
            assert_all_close(actual, expected, 1e-6)
        return sum(float(gradient.norm()) for name, gradient in expected.items() if name.startswith("experts"))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_layer_equals_megatrons_alltoall(pool: RankPool, num_ranks: int, strategy: str) -> None:
    assert all(norm > 0 for norm in pool.run(WORLD_SIZE, check_layer, num_ranks, strategy))


class Graphs:
    """A backend that counts its graphs, each of which must have the strategy's dispatch and combine, in one step or in
    two.
    """

    def __init__(self, backend: str, strategy: str) -> None:
        self.backend = backend
        self.strategy = strategy
        self.made = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        self.made += 1
        # The forward of an autograd.Function is a graph of its own within the graph.
        parts = [module for module in graph.modules() if isinstance(module, torch.fx.GraphModule)]
        ops = {str(node.target) for part in parts for node in part.graph.nodes}
        for name in ("dispatch", "combine"):
            in_two_steps = {f"deep_ep.{name}_start.{self.strategy}", f"deep_ep.wait.{self.strategy}"}
            assert f"deep_ep.{name}.{self.strategy}" in ops or in_two_steps <= ops
        return torch._dynamo.lookup_backend(self.backend)(graph, inputs)


def check_compiled_layer(ctx: RankContext, num_ranks: int, strategy: str, backend: str, tolerance: float) -> None:
    """STEPS has how many tokens every rank has beyond its T, and how many graphs it has needed by then."""
    with without_cuda(), traceable(), expert_parallel(num_ranks):
        # Groups for experts know nothing of each other, so one is enough.
        if ctx.rank >= num_ranks:
            return
        with buffers(strategy):
            layer = make_layer("flex")
            parameters = dict(layer.named_parameters())
            graphs = Graphs(backend, strategy)
            compiled = torch.compile(layer, backend=graphs, fullgraph=True)
            for seed, (more, num_graphs) in enumerate(STEPS):
                batch = make_batch(T[ctx.rank] + more, 10 * seed + ctx.rank)
                # The first of these eager steps makes the Buffer, which compiled code must not.
                with torch.compiler.set_stance("force_eager"):
                    expected = train(layer, parameters, batch)
                actual = train(compiled, parameters, batch)
                if tolerance:
                    assert_all_close(actual, expected, tolerance)
                else:
                    assert_all_same(actual, expected)
                assert graphs.made == num_graphs


# The routing is another one at every step. One graph for the first T, and one for any other T.
STEPS = ((0, 1), (0, 1), (5, 2), (2, 2))


# To the compiler, a number of ranks and a strategy are little more than names.
@pytest.mark.parametrize("num_ranks, strategy", [(4, "default"), (2, "alltoall")])
def test_compiled_layer_is_one_graph_for_any_number_of_tokens(pool: RankPool, num_ranks: int, strategy: str) -> None:
    pool.run(WORLD_SIZE, check_compiled_layer, num_ranks, strategy, "aot_eager", 0.0)


def test_layer_in_inductor(pool: RankPool) -> None:
    pool.run(WORLD_SIZE, check_compiled_layer, 2, "default", "inductor", 1e-5)


# Megatron's fused dispatch and combine by themselves

# Every rank's T, by the number of ranks.
TOKENS = {2: (7, 12), 4: (7, 0, 3, 10)}
L = 2


def make_share(rank: int, num_ranks: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, topk_idx without repetition but with some -1, topk_weights and the gradient of the output.

    Small whole numbers, with which every sum is exact.
    """
    num_tokens = TOKENS[num_ranks][rank]
    generator = torch.Generator().manual_seed(rank)
    x, grad_out = torch.randint(-9, 9, (2, num_tokens, H), generator=generator).float()
    ids = torch.rand(num_tokens, L * num_ranks, generator=generator).argsort(1)[:, :K]
    ids = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.25, -1)
    weights = torch.randint(1, 9, ids.shape, generator=generator).float()
    return x, ids, weights, grad_out


def expected_results(rank: int, num_ranks: int) -> dict[str, Tensor]:
    """What `use_fused` must give on this rank, whose output of a token's row at rank d is (d + 1) times the row."""
    rows, row_ids, row_weights = [], [], []
    for source in range(num_ranks):
        x, ids, weights, _ = make_share(source, num_ranks)
        local = ids // L == rank
        here = local.any(1)
        rows.append(x[here])
        row_ids.append(torch.where(local, ids - rank * L, -1)[here])
        row_weights.append(torch.where(local, weights, 0.0)[here])
    recv_topk_idx = torch.cat(row_ids)
    x, ids, weights, grad_out = make_share(rank, num_ranks)
    to_rank = (ids.unsqueeze(2) // L == torch.arange(num_ranks)).any(1)
    factor = (to_rank * torch.arange(1.0, num_ranks + 1)).sum(1, keepdim=True)
    return {
        "recv_x": torch.cat(rows),
        "recv_topk_idx": recv_topk_idx,
        "recv_topk_weights": torch.cat(row_weights),
        "tokens_per_expert": (recv_topk_idx.unsqueeze(2) == torch.arange(L)).sum((0, 1)),
        "out": x * factor,
        "grad_x": grad_out * factor,
        "grad_topk_weights": torch.where(ids >= 0, ids + 1.0, 0.0),
    }


def check_fused(ctx: RankContext, strategy: str, events: str, backend: str) -> None:
    rank, group = ctx.rank, ctx.group
    x, ids, weights, grad_out = make_share(rank, ctx.size)
    x.requires_grad_()
    weights.requires_grad_()
    expected = expected_results(rank, ctx.size)

    def use_fused(x: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        *received, handle = fused_a2a.fused_dispatch(x, ids, weights, L * ctx.size, group, *EVENTS[events])
        out, _ = fused_a2a.fused_combine(received[0] * (rank + 1), group, handle, *EVENTS[events])
        return *received, out

    def check(fn: Callable) -> None:
        *received, out = fn(x, ids, weights)
        _, recv_topk_idx, recv_topk_weights, _ = received
        # A weight's gradient is the number of its expert + 1, where that is an expert of this rank.
        grad_recv_weights = torch.where(recv_topk_idx >= 0, recv_topk_idx + (L * rank + 1.0), 0.0)
        gradients = torch.autograd.grad([out, recv_topk_weights], [x, weights], [grad_out, grad_recv_weights])
        assert_all_same(dict(zip(expected, [*received, out, *gradients], strict=True)), expected)

    with buffers(strategy):
        check(use_fused)
        if backend != "eager":
            graphs = Graphs(backend, strategy)
            with traceable():
                check(torch.compile(use_fused, backend=graphs, fullgraph=True))
            assert graphs.made == 1


@pytest.mark.parametrize("events", EVENTS)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_fused_dispatch_and_combine(pool: RankPool, num_ranks: int, strategy: str, events: str) -> None:
    pool.run(num_ranks, check_fused, strategy, events, "eager")


@pytest.mark.parametrize(
    "num_ranks, strategy, events", [(4, "default", LAYERS), *((2, s, e) for s in STRATEGIES for e in EVENTS)]
)
def test_compiled_dispatch_and_combine(pool: RankPool, num_ranks: int, strategy: str, events: str) -> None:
    pool.run(num_ranks, check_fused, strategy, events, "aot_eager")


def test_dispatch_and_combine_in_inductor(pool: RankPool) -> None:
    pool.run(2, check_fused, "default", LAYERS, "inductor")
