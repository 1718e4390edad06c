"""GE graphs compute what the FX graphs that they were converted from compute, and what eager code computes; mutants of
converters do not.

H hidden · K top-k · E experts · R ranks · L = E/R · W num_worst_tokens · M num_max_dispatch_tokens_per_rank
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import ge_eval
import ge_graphs
import pytest
import test_ge_graphs
import test_ge_quantised
import test_npu_training
import torch
import torch.nn.functional as F
from cases import Case, make_inputs
from ranks import RankContext, RankPool
from test_ge_graphs import BACKWARD, FORWARD, LOW_LATENCY, run_and_compare, weights_of
from torch import Tensor
from torchair._ge_concrete_graph import ge_apis
from torchair._ge_concrete_graph.ge_apis import HcomAllGather, HcomAllToAll
from torchair.ge._ge_graph import Data, GeGraph, default_ge_graph, get_default_ge_graph, torch_type_to_ge_type

import deep_ep
from deep_ep.npu import ge, training

R, H, K, L, W, M = 2, 16, 4, 3, 5, 9
E = R * L
DYNAMIC = [(5, 3), (2, 2), (3, 8)]  # by call: each rank's number of tokens


def inputs_of(rank: int, tokens: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """x, ids of which some are -1, weights, and the experts' matrix."""
    case = Case(tokens, H=H, K=K, local_experts=L, dtype=dtype, seed=sum(tokens))
    x, ids, weights, _ = (given[rank] for given in make_inputs(case))
    return x, ids, weights, weights_of(rank).to(dtype)


def check_step(step: Callable[..., Tensor], inputs: list[tuple[Tensor, ...]], dynamic: bool, types: list[str]) -> None:
    """step, compiled once, gives what it gives eagerly, with its gradients, and its communicating nodes are of these
    types, in this order."""
    with ge_eval.in_place_of_ge() as ran:
        fn = ge_graphs.compiled(step, exact=True, dynamic=dynamic)
        for given in inputs:
            run_and_compare(step, fn, *given)
    assert len(ge_graphs.recorded()) == 2  # forward and backward, for all numbers of tokens
    assert [name for name in ran if name.startswith(("DeepEp", "Hcom"))] == types * len(inputs)


def normal_mode(ctx: RankContext, strategy: str, exact: bool, dynamic: bool) -> int:
    """How many rows are dropped on this rank."""
    group, rows = ctx.prepared_group(strategy).group_name, 0 if exact else W

    def dispatch(x: Tensor, ids: Tensor, weights: Tensor) -> Any:
        return deep_ep.dispatch(x, ids, weights, num_experts=E, group=group, num_worst_tokens=rows)

    def step(x: Tensor, ids: Tensor, weights: Tensor, w: Tensor) -> Tensor:
        out = dispatch(x, ids, weights)
        return deep_ep.combine(F.gelu(out.recv_x @ w), out.handle, group=group) + out.num_dropped

    dtype = torch.float32 if exact == dynamic else torch.bfloat16
    inputs = [inputs_of(ctx.rank, tokens, dtype) for tokens in (DYNAMIC if dynamic else [(0, 7)])]
    check_step(step, inputs, dynamic, FORWARD[strategy, exact] + BACKWARD[strategy, exact])
    return int(dispatch(*inputs[-1][:3]).num_dropped)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("exact", [False, True], ids=["capacity", "exact"])
@pytest.mark.parametrize("strategy", ["default", "alltoall"])
def test_normal_mode(pool: RankPool, strategy: str, exact: bool, dynamic: bool) -> None:
    dropped = pool.run(R, normal_mode, strategy, exact, dynamic)
    assert any(dropped) != exact


def low_latency(ctx: RankContext, strategy: str) -> None:
    group = ctx.prepared_group(strategy).group_name

    def step(x: Tensor, ids: Tensor, weights: Tensor, w: Tensor) -> Tensor:
        out = deep_ep.low_latency_dispatch(x, ids, M, E, group=group)
        return deep_ep.low_latency_combine(F.gelu(out.recv_x @ w), ids, weights, out.handle, group=group)

    forward, backward = LOW_LATENCY[strategy]
    inputs = [inputs_of(ctx.rank, tokens, torch.bfloat16) for tokens in DYNAMIC]
    check_step(step, inputs, True, forward + backward)


@pytest.mark.parametrize("strategy", ["default", "alltoall"])
def test_low_latency(pool: RankPool, strategy: str) -> None:
    pool.run(R, low_latency, strategy)


def fused(ctx: RankContext, mode: int, quant_mode: int) -> None:
    with ge_eval.in_place_of_ge() as ran:
        test_ge_graphs.fused(ctx, deep_ep.FuseMode(mode), quant_mode, True)
    parts = [name.removeprefix("DeepEpFusedDeepMoe") for name in ran if name.startswith("DeepEpFused")]
    assert parts == 3 * (["DispatchFfnCombine"] if mode == 2 else ["", "Backward"])


@pytest.mark.parametrize(("mode", "quant_mode"), [(1, 0), (2, 1)])
def test_fused(pool: RankPool, mode: int, quant_mode: int) -> None:
    pool.run(R, fused, mode, quant_mode)


def quantised(ctx: RankContext, mode: str) -> None:
    with ge_eval.in_place_of_ge() as ran:
        test_ge_quantised.converts(ctx, "expert", mode, True)
    assert len([name for name in ran if name.startswith("DeepEpLowLatency")]) == 2


@pytest.mark.parametrize("mode", ["int8", "block_fp8_e4m3", "mx_fp4_e2m1"])
def test_quantised_rows(pool: RankPool, mode: str) -> None:
    pool.run(R, quantised, mode)


def moe_block(ctx: RankContext, strategy: str, low_latency: bool) -> None:
    with ge_eval.in_place_of_ge() as ran:
        test_npu_training.moe_block(ctx, strategy, low_latency)
    # Three, and two for each in backward. In low latency nothing wants the gradients of the rows: weights do not go
    # through dispatch, and x is no parameter.
    assert ran.count("GroupedMatmul") == (7 if low_latency else 9)


@pytest.mark.parametrize("strategy, low_latency", [("default", True), ("alltoall", False)])
def test_moe_block(pool: RankPool, strategy: str, low_latency: bool) -> None:
    pool.run(R, moe_block, strategy, low_latency)


# Mutants of converters

BF16, INT64 = map(torch_type_to_ge_type, (torch.bfloat16, torch.int64))
Call = tuple[Callable[..., Tensor], Callable[..., Any], tuple[Any, ...]]
Mutation = Callable[[Callable[..., Any]], Callable[..., Any]]
Mutant = tuple[Any, str, Mutation]  # where a function is, its name, and what makes another of it


def calls(rank: int, group: str) -> dict[str, list[Call]]:
    """By converter: ops, how they are converted, arguments."""
    ops, generator = torch.ops.deep_ep, torch.Generator().manual_seed(rank)
    x = (1e6 * torch.randn(3, 5, generator=generator)).bfloat16()  # more than fp16 can hold
    rows, columns, weights = (
        torch.randn(shape, generator=generator).bfloat16() for shape in ((8, 16), (24, 8), (3, 16, 24))
    )
    counts, ends = torch.tensor([[2, 1], [0, 3]]), torch.tensor([2, 2, 8], dtype=torch.int32)
    v = counts[rank], counts[:, rank], -1, group
    return {
        "all_gather": [(ops._all_gather.default, ge.all_gather, (x[0, :4], R, group))],
        "all_to_all": [(ops._all_to_all.default, ge.all_to_all, (torch.cat([x, -x]), R, group))],
        "all_to_all_v": [
            (ops._all_to_all_v.default, ge.all_to_all_v, (x, *v)),
            (ops._all_to_all_v.default, ge.all_to_all_v, (10 * rank + torch.arange(3), *v)),
        ],
        "grouped_matmul": [
            (torch._grouped_mm, training.grouped_matmul, (rows, weights, ends)),
            (torch._grouped_mm, training.grouped_matmul, (columns, rows, ends)),
        ],
        "view": [
            (torch.ops.aten.view.dtype, training._view, (numbers, dtype))
            for numbers in (weights, rows[:0], ends)
            for dtype in (torch.uint8, torch.float16, torch.float32)
        ],
    }


def converted(call: Call, times: int) -> GeGraph:
    """The GE graph of a call, converted that often, of which only the first result is used."""
    _, convert, arguments = call
    graph = GeGraph(name="converted")
    nodes: list[Any] = []
    with default_ge_graph(graph):
        for argument in arguments:
            if isinstance(argument, Tensor):
                dtype, shape = torch_type_to_ge_type(argument.dtype), list(argument.shape)
                nodes.append(Data(index=graph.num_inputs, dtype=dtype, shape=shape, placement="NPU"))
                nodes[-1].set_meta(argument)
            else:
                nodes.append(argument)
        results = [convert(*nodes) for _ in range(times)]
        ge_apis.NetOutput(results[:1], dependencies=graph.must_keep_ops)
    return graph


def fails(call: Call, once: GeGraph, twice: GeGraph, group: str) -> bool:
    """Whether something is wrong with what a call was converted to."""
    op, _, arguments = call
    wanted = op(*arguments)
    try:
        (result,), _ = ge_eval.run(once, [argument for argument in arguments if isinstance(argument, Tensor)])
        torch.testing.assert_close(result, wanted, rtol=0, atol=0, equal_nan=True)
        nodes = [node for node in ge_eval.in_order(twice) if node.type.startswith("Hcom")]
        assert len(nodes) == (2 if op in ge._communicating else 0)
        assert all(node.attr["group"].s.decode() == group for node in nodes)
        assert all(f"{before.name}:-1" in node.input for before, node in pairwise(nodes))
    except Exception:
        return True
    return False


def arguments(*order: int) -> Mutation:
    return lambda original: lambda *given, **options: original(*(given[i] for i in order), **options)


def options(**changed: Any) -> Mutation:
    return lambda original: lambda *given, **options: original(*given, **options | changed)


def instead(function: Callable[..., Any]) -> Mutation:
    return lambda original: function


def keep(outputs: Any) -> None:
    get_default_ge_graph().dont_prune_me(outputs)


def const(*values: int) -> Any:
    return ge_apis.Const(list(values), dtype=INT64)


def collective(other: str) -> dict[str, Mutant]:
    """Mutants of all three collectives. other: another group of the same ranks."""
    return {
        "another group": (ge, "communicator", instead(lambda group: other)),
        "no group": (ge, "communicator", instead(lambda group: "none")),
        "as bf16": (ge_apis, "Bitcast", instead(lambda x, type: x)),
        "left as fp16": (ge_apis, "Bitcast", lambda fn: lambda x, type: x if type == BF16 else fn(x, type=type)),
        "values for bits": (ge_apis, "Bitcast", instead(lambda x, type: ge_apis.Cast(x, dst_type=type))),
        "neither kept nor in order": (ge, "put_in_order", instead(lambda outputs: None)),
        "not in order": (ge, "put_in_order", instead(keep)),
        "not kept": (GeGraph, "dont_prune_me", instead(lambda graph, tensor: None)),
    }


MUTANTS: dict[str, dict[str, Mutant]] = {
    "all_gather": {
        "more ranks": (ge_apis, "HcomAllGather", options(rank_size=R + 1)),
        "fewer ranks": (ge_apis, "HcomAllGather", options(rank_size=R - 1)),
        "to each its own": (
            ge_apis,
            "HcomAllGather",
            instead(lambda x, rank_size, group: HcomAllToAll(x, group=group)),
        ),
    },
    "all_to_all": {
        "all to each": (ge_apis, "HcomAllToAll", instead(lambda x, group: HcomAllGather(x, rank_size=R, group=group))),
    },
    "all_to_all_v": {
        "sent for received": (ge_apis, "HcomAllToAllV", arguments(0, 3, 4, 1, 2)),
        "counts swapped": (ge_apis, "HcomAllToAllV", arguments(0, 3, 2, 1, 4)),
        "displacements swapped": (ge_apis, "HcomAllToAllV", arguments(0, 1, 4, 3, 2)),
        "send counts for displacements": (ge_apis, "HcomAllToAllV", arguments(0, 1, 1, 3, 4)),
        "receive counts for displacements": (ge_apis, "HcomAllToAllV", arguments(0, 1, 2, 3, 3)),
        "send displacements for counts": (ge_apis, "HcomAllToAllV", arguments(0, 2, 2, 3, 4)),
        "ends for displacements": (ge_apis, "Cumsum", options(exclusive=False)),
        "counts of rows": (ge_apis, "Mul", instead(lambda count, width: count)),
        "the number of rows for the width": (ge_apis, "Slice", lambda fn: lambda x, _, size: fn(x, const(0), size)),
        "all sizes for the width": (ge_apis, "Slice", instead(lambda x, *_: x)),
        "neither flat nor in rows": (ge_apis, "Reshape", instead(lambda x, shape: x)),
    },
    "grouped_matmul": {
        "other groups": (
            *(ge_apis, "GroupedMatmul"),
            lambda fn: lambda *given, group_type, **options: fn(*given, group_type=2 - group_type, **options),
        ),
        "no groups": (ge_apis, "GroupedMatmul", options(group_type=-1)),
        "sizes for ends": (ge_apis, "GroupedMatmul", options(group_list_type=1)),
        "another dtype": (ge_apis, "GroupedMatmul", options(dtype=0)),
        "transposed weight": (ge_apis, "GroupedMatmul", options(transpose_weight=True)),
        "weight first": (ge_apis, "GroupedMatmul", arguments(1, 0, *range(2, 9))),
        "a bias": (ge_apis, "Fill", lambda fn: lambda dims, value: fn([1], value)),
        "ends in int32": (
            ge_apis,
            "Cast",
            lambda fn: lambda x, dst_type: x if dst_type == INT64 else fn(x, dst_type=dst_type),
        ),
    },
    "view": {
        "Bitcast alone": (ge_apis, "Reshape", instead(lambda x, shape: x)),
        "values for bits": (ge_apis, "Bitcast", instead(lambda x, type: ge_apis.Cast(x, dst_type=type))),
        "not wider": (ge_apis, "Mul", instead(lambda width, parts: width)),
        "not narrower": (ge_apis, "FloorDiv", instead(lambda width, parts: width)),
        "rows forgotten": (ge_apis, "Slice", lambda fn: lambda x, begin, size: fn(x, const(0), const(1))),
    },
}


def survivors(ctx: RankContext, name: str) -> list[str]:
    """The mutants with which nothing is wrong on this rank."""
    group, other = (ctx.prepared_group(strategy).group_name for strategy in ("alltoall", "default"))
    given = calls(ctx.rank, group)[name]
    mutants = MUTANTS[name] | (collective(other) if given[0][0] in ge._communicating else {})
    alive = []
    for what, (owner, attribute, mutate) in {"": (ge, "put_in_order", lambda fn: fn), **mutants}.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, attribute, mutate(getattr(owner, attribute)))
            graphs = [(converted(call, 1), converted(call, 2)) for call in given]
        failed = [fails(call, *made, group) for call, made in zip(given, graphs, strict=True)]
        if not any(failed):
            alive.append(what)
    return alive


@pytest.mark.parametrize("name", MUTANTS)
def test_every_mutant_fails(pool: RankPool, name: str) -> None:
    alive = pool.run(R, survivors, name)
    assert set.intersection(*map(set, alive)) == {""}  # the converter itself
