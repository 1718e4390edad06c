"""The GE graphs that torchair builds, as tests look at them.

Importing this lets torchair work without CANN: its engine is never started, and what it asks of the operators that are
registered is answered from the definitions in ops/. With CANN nothing is replaced.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import op_definitions
import torch
import torch_npu  # noqa: F401  (brings torchair)
import torchair
from cann import stand_in
from torch.fx.experimental.symbolic_shapes import is_concrete_int
from torchair._ge_concrete_graph import compat_ir, fx2ge_converter
from torchair._ge_concrete_graph.ge_ir_pb2 import DataType
from torchair.core import _backend, _torchair

import deep_ep

DTYPES = {
    "DT_FLOAT": torch.float32,
    "DT_FLOAT16": torch.float16,
    "DT_BF16": torch.bfloat16,
    "DT_INT32": torch.int32,
    "DT_INT64": torch.int64,
    "DT_BOOL": torch.bool,
    "DT_INT8": torch.int8,
}

HOST_SYNCS = {
    *("HcomAllToAllV", "HcomAllToAllVC", "DeepEpDispatchExact", "DeepEpDispatchInt8Exact"),
    *("NonZero", "Where", "Unique", "MaskedSelect"),
}
"""Nodes for which the host has to wait: they take counts on the host, or their results' shapes come from data."""

if not stand_in.has_cann():
    fx2ge_converter.initialize_graph_engine = lambda *_: None
    _backend.initialize_graph_engine = lambda *_: None
    _torchair.get_registered_ir_def = op_definitions.registered_ir_def
    compat_ir.is_cann_compat = lambda *_, **__: ""


@dataclass
class Output:
    """A result of a node. dtype and shape are None where torchair leaves them to GE."""

    name: str
    dtype: torch.dtype | None
    fake: Any  # the FX node's, or None


@dataclass
class Node:
    """A node of a GE graph. Inputs by the definition's names: (type of the node that they come from, which output)."""

    type: str
    name: str
    inputs: dict[str, tuple[str, int]]
    input_fakes: dict[str, Any]
    behind: list[str]  # types of the nodes that it waits for without taking their results
    attrs: dict[str, Any]
    outputs: list[Output]
    call: str  # the name of the FX node that it is the last node of, or ""


class Graph:
    """What torchair made of one FX graph."""

    def __init__(self, concrete: Any) -> None:
        self.fx = concrete.fx_graph
        fakes = {node.name: node.meta.get("val") for node in self.fx.graph.nodes} if self.fx is not None else {}
        ops = {op.name: op for op in concrete.graph.op}
        self.nodes = [_node(op, ops, fakes) for op in concrete.graph.op]
        self._find_the_missing_fakes()
        self.results = [list(desc.shape.dim) for op in ops.values() if op.type == "NetOutput" for desc in op.input_desc]
        self.input_kinds = [type(info.func).__name__ for info in concrete._input_info_list]

    def _find_the_missing_fakes(self) -> None:
        """A node that a converter adds between two FX nodes, such as a transposition, stands for none of them."""
        calls = {node.name: node for node in self.fx.graph.nodes} if self.fx is not None else {}
        for node in self.nodes:
            call = calls.get(node.call)
            if call is None or not isinstance(call.target, torch._ops.OpOverload):
                continue
            for argument, value in zip(call.target._schema.arguments, call.args, strict=False):
                if node.input_fakes.get(argument.name, call) is None and isinstance(value, torch.fx.Node):
                    node.input_fakes[argument.name] = value.meta.get("val")

    def of_type(self, *types: str) -> list[Node]:
        return [node for node in self.nodes if node.type in types]

    @property
    def communicating(self) -> list[Node]:
        return [node for node in self.nodes if "windows" in node.inputs or node.type.startswith(("Hcom", "MoeDistr"))]

    @property
    def types(self) -> list[str]:
        return [node.type for node in self.communicating]


def _attribute(value: Any) -> Any:
    kind = value.WhichOneof("value")
    found = getattr(value, kind) if kind else None
    return found.decode() if isinstance(found, bytes) else found


def _fx_name(desc: Any) -> tuple[str, int]:
    """The FX node whose result an output is, and which of its results."""
    name, _, place = desc.attr["_fx_tensor_name"].s.decode().partition("-")
    return name, int(place.rsplit(".", 1)[1])


def _fake_of(op: Any, index: int, fakes: dict[str, Any]) -> Any:
    """The FX result that an output stands for, or None."""
    desc = op.output_desc[index]
    if op.type == "Data":
        return fakes.get(op.name)
    if "_fx_tensor_name" not in desc.attr:
        return None
    name, place = _fx_name(desc)
    fake = fakes.get(name)
    return fake[place] if isinstance(fake, tuple | list) else fake


def _node(op: Any, ops: dict[str, Any], fakes: dict[str, Any]) -> Node:
    sources = [source.rsplit(":", 1) for source in op.input if source]
    data = [(name, int(index)) for name, index in sources if int(index) >= 0]
    names = [desc.name for desc, source in zip(op.input_desc, (s for s in op.input if s[-2:] != "-1"), strict=False)]
    given = [name for name, source in zip(names, (s for s in op.input if s[-2:] != "-1"), strict=False) if source]
    return Node(
        op.type,
        op.name,
        {name: (ops[source].type, index) for name, (source, index) in zip(given, data, strict=True)},
        {name: _fake_of(ops[source], index, fakes) for name, (source, index) in zip(given, data, strict=True)},
        [ops[name].type for name, index in sources if int(index) < 0],
        {name: _attribute(value) for name, value in op.attr.items() if not name.startswith("_")},
        [
            Output(desc.name, DTYPES.get(DataType.Name(desc.dtype)), _fake_of(op, i, fakes))
            for i, desc in enumerate(op.output_desc)
        ],
        next((_fx_name(desc)[0] for desc in op.output_desc if "_fx_tensor_name" in desc.attr), ""),
    )


_recorded: list[Graph] = []
_optimize = fx2ge_converter.GeConcreteGraph.optimize_graph_without_runtime


def _record(concrete: Any, *args: Any, **kwargs: Any) -> Any:
    result = _optimize(concrete, *args, **kwargs)
    _recorded.append(Graph(concrete))
    return result


fx2ge_converter.GeConcreteGraph.optimize_graph_without_runtime = _record


def recorded() -> list[Graph]:
    """The graphs made since the last call, in order."""
    graphs = list(_recorded)
    _recorded.clear()
    return graphs


def config() -> Any:
    """Graphs are built, and what is in them runs eagerly, on CPU tensors as well."""
    settings = torchair.CompilerConfig()
    settings.debug.run_eagerly = True
    return settings


def npu_backend(exact: bool) -> Any:
    """torch_npu's own backend, or this library's, which exact row counts need."""
    return deep_ep.npu.backend(config()) if exact else torchair.get_npu_backend(compiler_config=config())


def compiled(fn: Callable[..., Any], *, exact: bool = False, dynamic: bool = False) -> Callable[..., Any]:
    torch._dynamo.reset()
    recorded()
    return torch.compile(fn, backend=npu_backend(exact), fullgraph=True, dynamic=dynamic)


def is_static(size: Any) -> bool:
    """Whether it is a number, or a symbol that can only be one number."""
    return is_concrete_int(size)


def dims(tensor: Any) -> list[int]:
    """Its shape, with -1 for what is a symbol."""
    return [int(size) if is_static(size) else -1 for size in tensor.shape]


def check_outputs(graph: Graph) -> int:
    """Every result that stands for an FX node's has its dtype; those of this project's operators have the dtype and
    shape that the definitions infer. Returns how many results were compared."""
    compared = 0
    for node in graph.nodes:
        for output in node.outputs:
            if isinstance(output.fake, torch.Tensor) and output.dtype is not None:
                assert output.dtype == output.fake.dtype, (node.name, output)
                compared += 1
        if node.type.startswith("DeepEp"):
            check_definition(node)
    return compared


def check_definition(node: Node) -> None:
    """What the definition of a node's type infers from its inputs and attributes is what the fake says."""
    inputs = []
    for name, fake in node.input_fakes.items():
        if name == "windows":
            inputs.append(op_definitions.Input("int64", [-1]))
        elif name == "num_worst_tokens":
            size = node.outputs[0].fake.shape[0]
            inputs.append(op_definitions.Input("int64", [], int(size) if is_static(size) else None))
        else:
            inputs.append(op_definitions.Input(str(fake.dtype).removeprefix("torch."), dims(fake)))
    inferred = op_definitions.infer(node.type, inputs, node.attrs)
    assert len(inferred) == len(node.outputs), node
    for output, (dtype, shape) in zip(node.outputs, inferred, strict=True):
        if output.fake is None:  # nobody uses it
            continue
        assert output.fake.dtype == getattr(torch, dtype), (node.name, output)
        assert output.fake.dim() == len(shape), (node.name, output, shape)
        for known, size in zip(shape, output.fake.shape, strict=True):
            assert known == -1 or known == size, (node.name, output, shape)
            assert known != -1 or not is_static(size), (node.name, output, shape)
