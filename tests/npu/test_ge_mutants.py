"""Every mutant of a definition or converter fails: one input, output, attribute, kind, dtype or shape at a time.

A mutant is converted by itself, as torchair converts an FX node, and goes through the checks that graphs go through.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import ge_graphs
import op_definitions
import pytest
import torch
from ge_graphs import Graph
from ranks import RankContext, RankPool
from test_ge_graphs import ATTRIBUTES, INPUTS, E, H, K, M, R, Sizes, check_moe_distribute, check_node
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torchair._ge_concrete_graph import fx2ge_converter
from torchair.ge._ge_graph import Data, GeGraph, default_ge_graph, torch_type_to_ge_type

from deep_ep.fused_options import FusedOptions
from deep_ep.kernels import torch_npu_ops
from deep_ep.npu import ge

T, W = 5, 50
N_LOW_LATENCY = R * M * min(K, E // R)

OVERLOADS = {
    "DeepEpGetDispatchLayout": ("get_dispatch_layout", "default"),
    "DeepEpDispatch": ("dispatch", "default"),
    "DeepEpDispatchInt8": ("dispatch_int8", "default"),
    "DeepEpCombine": ("combine", "default"),
    "DeepEpDispatchBackward": ("dispatch_backward", "default"),
    "DeepEpCombineBackward": ("combine_backward", "default"),
    "DeepEpLowLatencyDispatch": ("low_latency_dispatch", "default"),
    "DeepEpLowLatencyDispatchInt8": ("low_latency_dispatch_int8", "default"),
    "DeepEpLowLatencyCombine": ("low_latency_combine", "default"),
    "DeepEpFusedDeepMoe": ("fused_deep_moe", "default"),
    "DeepEpFusedDeepMoeDispatchFfnCombine": ("fused_deep_moe", "dispatch_ffn_combine"),
    "DeepEpFusedDeepMoeBackward": ("fused_deep_moe_backward", "default"),
    "DeepEpFusedDeepMoeBackwardDispatchFfnCombine": ("fused_deep_moe_backward", "dispatch_ffn_combine"),
    "MoeDistributeDispatchV2": ("low_latency_dispatch", "ops"),
    "MoeDistributeCombineV2": ("low_latency_combine", "ops"),
}
"""Every type whose rows' number is known; those in exact mode have no other parts than those with a capacity."""

NUMBERS = {
    "num_experts": E,
    "num_ranks": R,
    "num_nodes": 1,
    "num_worst_tokens": W,
    "num_max_dispatch_tokens_per_rank": M,
    "comm_alg": "fullmesh_v2",
    "quant_mode": 1,
    "zero_unused": True,
    "strategy": "default",
    **FusedOptions()._asdict(),
}


class Converted:
    """One FX node, converted."""

    def __init__(self, op_type: str, group: str) -> None:
        name, overload = OVERLOADS[op_type]
        op = getattr(getattr(torch.ops.deep_ep, name), overload)
        shapes = self._shapes(op_type)
        self.fx_graph = torch.fx.GraphModule({}, torch.fx.Graph())
        self.graph = GeGraph(name=op_type)
        self._input_info_list: list[Any] = []
        with FakeTensorMode(), default_ge_graph(self.graph):
            fakes, nodes = [], []
            for argument in op._schema.arguments:
                if str(argument.type) == "Tensor":
                    fake = torch.empty(*shapes[argument.name][1], dtype=shapes[argument.name][0])
                    node = self._data(argument.name, fake)
                else:
                    fake = node = group if argument.name == "group" else NUMBERS[argument.name]
                fakes.append(fake)
                nodes.append(node)
            self.fakes = {
                argument.name: fake
                for argument, fake in zip(op._schema.arguments, fakes, strict=True)
                if isinstance(fake, Tensor)
            }
            results = op(*fakes)
            call = self._call(op, fakes, results)
            converted = ge._converters[op](*nodes)
            fx2ge_converter.set_ge_outputs(converted, results)
            fx2ge_converter._set_fx_tensor_names(converted, f"{call.name}-{op}.OUTPUT")

    def _shapes(self, op_type: str) -> dict[str, tuple[torch.dtype, list[int]]]:
        rows = N_LOW_LATENCY if "LowLatency" in op_type or op_type.startswith("Moe") else W
        sizes = Sizes(torch.bfloat16, T, rows)
        known = INPUTS[op_type.replace("MoeDistribute", "DeepEpLowLatency").removesuffix("V2")]
        shapes = {}
        for name, what in known.items():
            if what is not None:
                dtype, symbols = what
                shapes[name] = (torch.bfloat16 if isinstance(dtype, str) else dtype, sizes.of(symbols))
        return shapes

    def _data(self, name: str, fake: Tensor) -> Any:
        data = Data(
            index=self.graph.num_inputs,
            dtype=torch_type_to_ge_type(fake.dtype),
            shape=list(fake.shape),
            placement="NPU",
            node_name=name,
        )
        data.set_meta(fake)
        self.graph.record_input_info(name, None)
        self.fx_graph.graph.placeholder(name).meta["val"] = fake
        return data

    def _call(self, op: Any, fakes: list[Any], results: Any) -> torch.fx.Node:
        placeholders = iter(list(self.fx_graph.graph.nodes))
        call = self.fx_graph.graph.call_function(
            op, tuple(next(placeholders) if isinstance(fake, Tensor) else fake for fake in fakes)
        )
        call.meta["val"] = results
        return call


def check(op_type: str, group: str, rank: int) -> None:
    """Converts the op and checks the node of this type, and nothing but it."""
    converted = Converted(op_type, group)
    graph = Graph(converted)
    if op_type.startswith("Moe"):
        check_moe_distribute_node(graph, op_type, group, rank)
        return
    (node,) = graph.of_type(*INPUTS)
    assert node.type == op_type
    rows = N_LOW_LATENCY if "LowLatency" in op_type else W
    check_node(node, group, Sizes(torch.bfloat16, T, rows))
    for name, fake in converted.fakes.items():
        assert node.input_fakes[name] is fake, (op_type, name)
    ge_graphs.check_definition(node)
    assert ge_graphs.check_outputs(graph) >= len(node.outputs)
    for output in node.outputs:
        assert output.fake is not None


def check_moe_distribute_node(graph: Graph, op_type: str, group: str, rank: int) -> None:
    (node,) = graph.of_type(op_type)
    check_moe_distribute([node], group, rank)
    shapes = {name: list(fake.shape) for name, fake in node.input_fakes.items() if fake is not None}
    N = N_LOW_LATENCY
    wanted = {"x": [T, H], "expand_x": [N, H], "expert_scales": [T, K], "ep_send_counts": [E]}
    wanted["assist_info_for_combine"] = [N, 3]  # as given here; the overload takes what torch_npu made
    assert shapes == {name: shape for name, shape in wanted.items() if name in node.inputs}


Mutant = tuple[str, Callable[[pytest.MonkeyPatch], None]]


def definition_mutants(op_type: str) -> Iterator[Mutant]:
    """Other answers about the operator, and other results of its inferences."""
    original = op_definitions.definitions()

    def redefined(change: Callable[[dict[str, Any]], None]) -> Callable[[pytest.MonkeyPatch], None]:
        changed = copy.deepcopy(original)
        change(changed[op_type])
        return lambda patch: patch.setattr(op_definitions, "definitions", lambda: changed)

    for kind in ("inputs", "outputs", "attrs"):
        for i, entry in enumerate(original[op_type][kind]):
            what = f"{kind} {entry['name']}"
            yield f"no {what}", redefined(lambda d, kind=kind, i=i: d[kind].pop(i))
            yield f"{what} renamed", redefined(lambda d, kind=kind, i=i: d[kind][i].update(name="other"))
            if i > 0:
                yield f"{what} earlier", redefined(lambda d, kind=kind, i=i: d[kind].insert(i - 1, d[kind].pop(i)))
            if kind == "attrs":
                other = "VT_INT" if entry["kind"] == "VT_STRING" else "VT_STRING"
                yield f"{what} {other}", redefined(lambda d, i=i, other=other: d["attrs"][i].update(kind=other))
    yield "one more input", redefined(lambda d: d["inputs"].append(dict(d["inputs"][0], name="more")))
    yield "one more output", redefined(lambda d: d["outputs"].append(dict(d["outputs"][0], name="more")))
    yield "one more attribute", redefined(lambda d: d["attrs"].append(dict(d["attrs"][-1], name="more")))

    infer = op_definitions.infer

    def inferred(change: Callable[[list[Any]], None]) -> Callable[[pytest.MonkeyPatch], None]:
        def infer_otherwise(*args: Any) -> list[Any]:
            outputs = infer(*args)
            change(outputs)
            return outputs

        return lambda patch: patch.setattr(op_definitions, "infer", infer_otherwise)

    for i, entry in enumerate(original[op_type]["outputs"]):
        name = entry["name"]

        def dtype(outputs: list[Any], i: int = i) -> None:
            outputs[i] = outputs[i]._replace(dtype="float16")

        def rank(outputs: list[Any], i: int = i) -> None:
            outputs[i] = outputs[i]._replace(shape=[*outputs[i].shape, 1])

        yield f"{name} of another dtype", inferred(dtype)
        yield f"{name} of another rank", inferred(rank)
        for dim in range(len(infer_rank(op_type, i))):

            def size(outputs: list[Any], i: int = i, dim: int = dim) -> None:
                outputs[i].shape[dim] += 1

            yield f"{name} of another size {dim}", inferred(size)


def infer_rank(op_type: str, output: int) -> list[Any]:
    """The shape of an output, of which only the length counts."""
    symbols = {
        "DeepEpGetDispatchLayout": ("R", "S", "E", "TR"),
        "DeepEpDispatch": ("NH", "NK", "NK", "L", "", "RR", "RL", "LR", "N3", "TK"),
        "DeepEpDispatchInt8": ("NH", "N", "NK", "NK", "L", "", "RR", "RL", "LR", "N3", "TK"),
        "DeepEpCombine": ("TH",),
        "DeepEpDispatchBackward": ("TH", "TK"),
        "DeepEpCombineBackward": ("NH", "TK"),
        "DeepEpLowLatencyDispatch": ("NH", "L", "N3", "E", "TK"),
        "DeepEpLowLatencyDispatchInt8": ("NH", "N", "L", "N3", "E", "TK"),
        "DeepEpLowLatencyCombine": ("TH",),
        "DeepEpFusedDeepMoe": ("TH", "E"),
        "DeepEpFusedDeepMoeDispatchFfnCombine": ("TH", "L"),
        "DeepEpFusedDeepMoeBackward": ("TH", "TK", "LHJ", "LHI"),
        "DeepEpFusedDeepMoeBackwardDispatchFfnCombine": ("TH", "TK", "LHJ", "LIH"),
    }
    return list(symbols[op_type][output])


def converter_mutants(op_type: str) -> Iterator[Mutant]:
    """Other nodes than the converter makes."""
    node = ge.node
    inputs = [name for name, what in INPUTS[op_type].items() if name != "windows"]
    integers = [name for name in ATTRIBUTES.get(op_type, {"num_experts": E, "num_ranks": R}) if name != "group"]

    def made(
        change: Callable[..., tuple[Any, ...]], other_variant: str | None = None
    ) -> Callable[[pytest.MonkeyPatch], None]:
        def make_otherwise(op: str, inputs: Any, integers: Any, group: str | None = None, variant: str = "") -> Any:
            changed = change(op, dict(inputs), dict(integers), group)
            return node(*changed, variant if other_variant is None else other_variant)

        return lambda patch: patch.setattr(ge, "node", make_otherwise)

    def without(name: str, given: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in given.items() if key != name}

    def renamed(name: str, given: dict[str, Any]) -> dict[str, Any]:
        return {"other" if key == name else key: value for key, value in given.items()}

    for i, name in enumerate(inputs):
        yield f"no {name}", made(lambda t, x, n, g, name=name: (t, without(name, x), n, g))
        yield f"{name} renamed", made(lambda t, x, n, g, name=name: (t, renamed(name, x), n, g))
        for other in inputs[:i]:
            yield (
                f"{name} for {other}",
                made(lambda t, x, n, g, a=name, b=other: (t, x | {a: x[b], b: x[a]}, n, g)),
            )
    for i, name in enumerate(integers):
        yield f"no {name}", made(lambda t, x, n, g, name=name: (t, x, without(name, n), g))
        yield f"{name} renamed", made(lambda t, x, n, g, name=name: (t, x, renamed(name, n), g))
        yield f"another {name}", made(lambda t, x, n, g, name=name: (t, x, n | {name: n[name] + 1}, g))
        for other in integers[:i]:
            yield (
                f"{name} for {other}",
                made(lambda t, x, n, g, a=name, b=other: (t, x, n | {a: n[b], b: n[a]}, g)),
            )
    for other, (op, overload) in OVERLOADS.items():
        if other != op_type and overload != "ops":
            variant = "" if overload == "default" else "DispatchFfnCombine"
            yield f"type {other}", made(lambda t, x, n, g, op=op: (op, x, n, g), variant)
    outputs = len(op_definitions.definitions()[op_type]["outputs"])
    if outputs > 1:
        yield "results in another order", lambda patch: patch.setattr(ge, "node", lambda *args: node(*args)[::-1])
    if "windows" in INPUTS[op_type]:
        yield "no group", made(lambda t, x, n, g: (t, x, n, None))
        yield "another group", lambda patch: patch.setattr(ge, "communicator", lambda group: "another")
    else:
        yield "a group", made(lambda t, x, n, g: (t, x, n, GROUP[0]))


GROUP: list[str] = []


def moe_distribute_mutants(op_type: str) -> Iterator[Mutant]:
    """Other arguments for torch_npu's own converter."""
    converter = torch_npu_ops._converter

    def called(change: Callable[[list[Any], dict[str, Any]], None]) -> Callable[[pytest.MonkeyPatch], None]:
        def convert(name: str) -> Any:
            def convert_otherwise(*args: Any, **kwargs: Any) -> Any:
                given = list(args)
                change(given, kwargs)
                return converter(name)(*given, **kwargs)

            return convert_otherwise

        return lambda patch: patch.setattr(torch_npu_ops, "_converter", convert)

    names = ["group_ep", "ep_world_size", "ep_rank_id", "moe_expert_num", "global_bs", "comm_alg"]
    for name in names:

        def another(given: list[Any], kwargs: dict[str, Any], name: str = name) -> None:
            kwargs[name] = "ccu" if isinstance(kwargs[name], str) else kwargs[name] + 1

        yield f"another {name}", called(another)
    for name in ("quant_mode", "expert_token_nums_type") if "Dispatch" in op_type else ("comm_quant_mode",):
        value = 0 if name == "expert_token_nums_type" else 2
        yield f"{name} {value}", called(lambda given, kwargs, name=name, value=value: kwargs.update({name: value}))
    for i in range(2 if "Dispatch" in op_type else 5):

        def first(given: list[Any], kwargs: dict[str, Any], i: int = i) -> None:
            given[i] = given[i - 1]

        yield f"argument {i} is the one before", called(first)


def survivors(ctx: RankContext, op_type: str) -> tuple[int, list[str]]:
    """How many mutants there are, and those that pass all checks."""
    group = ctx.prepared_group("default").group_name
    GROUP[:] = [group]
    check(op_type, group, ctx.rank)
    mutants = (
        list(moe_distribute_mutants(op_type))
        if op_type.startswith("Moe")
        else [*definition_mutants(op_type), *converter_mutants(op_type)]
    )
    alive = []
    for name, apply in mutants:
        with pytest.MonkeyPatch.context() as patch:
            apply(patch)
            try:
                check(op_type, group, ctx.rank)
            except Exception:
                continue
            alive.append(name)
    check(op_type, group, ctx.rank)
    return len(mutants), alive


@pytest.mark.parametrize("op_type", OVERLOADS)
def test_every_mutant_fails(pool: RankPool, op_type: str) -> None:
    for count, alive in pool.run(R, survivors, op_type):
        assert count >= (9 if op_type.startswith("Moe") else 30)
        assert alive == []
