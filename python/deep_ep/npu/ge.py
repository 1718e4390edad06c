"""GE graphs: how ops become nodes of the graphs that torchair builds.

A converter is called by torchair with an FX node's arguments, tensors being nodes of the GE graph. Nothing of torchair
is imported before a graph is converted; `register` runs when fakes do, which is before that.
"""

import contextlib
import contextvars
import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from . import cache, windows

_converters: dict[torch._ops.OpOverload, Callable[..., Any]] = {}
_communicating: set[torch._ops.OpOverload] = set()
_decompositions: dict[torch._ops.OpOverload, Callable[..., Any]] = {}
_TYPES = (
    "DeepEpGetDispatchLayout",
    "DeepEpDispatch",
    "DeepEpDispatchExact",
    "DeepEpDispatchInt8",
    "DeepEpDispatchInt8Exact",
    "DeepEpCombine",
    "DeepEpDispatchBackward",
    "DeepEpCombineBackward",
    "DeepEpLowLatencyDispatch",
    "DeepEpLowLatencyDispatchInt8",
    "DeepEpLowLatencyCombine",
    "DeepEpFusedDeepMoe",
    "DeepEpFusedDeepMoeDispatchFfnCombine",
    "DeepEpFusedDeepMoeBackward",
    "DeepEpFusedDeepMoeBackwardDispatchFfnCombine",
)
"""The types of this project's operators, which ops/ defines."""


def converter(op: torch._ops.OpOverload, convert: Callable[..., Any], communicates: bool) -> None:
    """Makes `convert` the way of `op` into GE graphs: it takes the op's arguments and returns its results."""
    _converters[op] = convert
    if communicates:
        _communicating.add(op)


def decomposition(op: torch._ops.OpOverload, decompose: Callable[..., Any]) -> None:
    """Makes torchair convert what `decompose` does with the arguments of `op`."""
    _decompositions[op] = decompose


def register() -> None:
    """Gives torchair the converters and decompositions, and npugraph_ex the latter, if they are present."""
    if "torchair" in sys.modules:
        _register()
    if "npugraph_ex" in sys.modules:
        _prepare_captures()


def torchair() -> Any:
    """torchair, which torch_npu brings. RuntimeError: torch_npu is not loaded."""
    if "torchair" not in sys.modules:
        raise RuntimeError(
            "deep_ep.npu: torch_npu is not loaded, which has torchair, the compiler for NPUs; import torch_npu, of the "
            "version that belongs to this torch"
        )
    import torchair

    return torchair


_exact = contextvars.ContextVar("exact", default=False)


@contextlib.contextmanager
def exact_rows() -> Iterator[None]:
    """Meanwhile graphs may hold a number of rows that depends on data."""
    token = _exact.set(True)
    try:
        yield
    finally:
        _exact.reset(token)


def check_exact(op: str) -> None:
    """ValueError where torchair converts a call of `op` whose number of rows depends on data, and cannot.

    torchair asks fakes for results while it converts, and fails thereafter with a message about symbols.
    """
    graphs = sys.modules.get("torchair.ge._ge_graph")
    if graphs is not None and graphs._graph_stack.stack and not _exact.get():
        raise ValueError(
            f'deep_ep.{op}: num_worst_tokens is 0, so the number of rows depends on data, which backend="npu" cannot '
            "compile; pass num_worst_tokens, or use torch.compile(backend=deep_ep.npu.backend())"
        )


@functools.cache
def _register() -> None:
    import torchair

    # torch_npu puts a proxy in the package's place, which loads it at the first look. Were that the import of one of
    # its modules, two copies of the module would come out.
    assert torchair.__path__
    from torchair._ge_concrete_graph import fx2ge_converter, ge_apis

    for op, convert in _converters.items():
        torchair.register_fx_node_ge_converter(op)(_with_outputs(convert))
        # A rank without tokens takes part, although its results are empty.
        fx2ge_converter._DONT_EMPTY_TENSOR_OPT_OPS.add(str(op))
    for op_type in _TYPES:
        # torchair runs an op whose GE types it does not know, to learn the shapes of its results: at compile time, on
        # uninitialised tensors, on this rank alone.
        setattr(ge_apis, op_type, op_type)
    graph_class = fx2ge_converter.GeConcreteGraph
    graph_class.codegen = cache.refreshing(graph_class.codegen)
    _prepare_compiler("torchair")


@functools.cache
def _prepare_captures() -> None:
    """npugraph_ex has a copy of torchair's compiler. Loading it changes how the process takes signals, so that is left
    to who uses it: the proxy in its place loads it when it is first looked at.
    """

    def prepare_if_loaded() -> None:
        if hasattr(sys.modules.get("npugraph_ex.npu_fx_compiler"), "get_npu_backend"):  # to the end
            _prepare_compiler("npugraph_ex")

    prepare_if_loaded()
    proxy: Any = type(sys.modules["npugraph_ex"])
    look = getattr(proxy, "__getattr__", None)
    if look is None:
        return

    def look_and_prepare(self: Any, name: str) -> Any:
        value = look(self, name)
        prepare_if_loaded()
        return value

    proxy.__getattr__ = look_and_prepare


@functools.cache
def _prepare_compiler(package: str) -> None:
    compiler: Any = importlib.import_module(f"{package}.npu_fx_compiler")
    compiler.default_partition = _in_their_direction(compiler.default_partition)
    compiler._compile_graph_with_aot = _with_decompositions(compiler._compile_graph_with_aot)


def _with_outputs(convert: Callable[..., Any]) -> Callable[..., Any]:
    # torchair looks at the signature.
    def convert_node(*args: Any, meta_outputs: Any = None) -> Any:
        return convert(*args)

    return convert_node


def _in_their_direction(default_partition: Callable[..., Any]) -> Callable[..., Any]:
    """torch's default_partition puts an op with side effects wherever its inputs are: forward's into backward as well,
    and parts of backward into forward. And it refuses to checkpoint such ops."""
    from torch._functorch.partitioners import has_recomputable_ops, min_cut_rematerialization_partition

    @functools.wraps(default_partition)
    def partition(joint: Any, *args: Any, **kwargs: Any) -> Any:
        communicating = [fx_node for fx_node in joint.graph.nodes if fx_node.target in _communicating]
        if communicating and has_recomputable_ops(joint):
            return min_cut_rematerialization_partition(joint, *args, **kwargs)
        for fx_node in communicating:
            backward = fx_node.meta.get("partitioner_tag") == "is_backward"
            fx_node.meta["partitioner_tag"] = "must_be_in_backward" if backward else "must_be_in_forward"
        return default_partition(joint, *args, **kwargs)

    return partition


def _with_decompositions(compile_graph: Callable[..., Any]) -> Callable[..., Any]:
    """torchair fixes its decompositions when a backend is made, which may have been before this library was loaded."""

    @functools.wraps(compile_graph)
    def compile_with_decompositions(
        module: Any, compiler: Any, inputs: Any, config: Any = None, decompositions: Any = None, **kwargs: Any
    ) -> Any:
        return compile_graph(module, compiler, inputs, config, _decompositions | (decompositions or {}), **kwargs)

    return compile_with_decompositions


def node(op: str, inputs: dict[str, Any], integers: dict[str, int], group: str | None = None, variant: str = "") -> Any:
    """The node of a torch op by its name, low_latency_combine's being of type DeepEpLowLatencyCombine: its outputs, a
    tuple if there are several. `variant` is the end of the type's name.

    With `group`, the op communicates: it gets the group's window table as its last input and the communicator's name
    as its first attribute, and runs behind the graph's communicating op before it.

    RuntimeError: GE does not know the type, or knows another definition of it.
    """
    from torchair import ge
    from torchair.core import _torchair
    from torchair.ge import attr

    op_type = "DeepEp" + "".join(part.capitalize() for part in op.split("_")) + variant
    results = getattr(torch.ops.deep_ep, op).default._schema.returns
    attributes = {name: attr.Int(value) for name, value in integers.items()}
    if group is not None:
        like = next(iter(inputs.values()))
        inputs = inputs | {"windows": _windows_input(group, like)}
        attributes = {"group": attr.Str(communicator(group))} | attributes
    status, known_inputs, known_outputs, known_attributes = _torchair.get_registered_ir_def(op_type)
    if status != "SUCCESS":
        raise RuntimeError(
            f"deep_ep: GE has no operator {op_type}: deep_ep's operator package is not installed where CANN looks for "
            "it (docs/npu.md)"
        )
    given = (
        [(name, "required") for name in inputs],
        [(name, "VT_INT" if name in integers else "VT_STRING") for name in attributes],
        [(result.name, "required") for result in results],
    )
    known = tuple([tuple(entry) for entry in kind] for kind in (known_inputs, known_attributes, known_outputs))
    if given != known:
        raise RuntimeError(
            f"deep_ep: the installed operator {op_type} has the inputs, attributes and outputs {known}, this version "
            f"wants {given}; deep_ep and its operator package must be of one version"
        )
    outputs = ge.custom_op(op_type, inputs=inputs, attrs=attributes, outputs=[result.name for result in results])
    if group is not None:
        put_in_order(outputs)
    return outputs


def put_in_order(outputs: Any) -> None:
    """Keeps a communicating node, behind the one before: GE may reorder and drop nodes, and ranks must not."""
    from torchair.ge._ge_graph import ControlTensor, get_default_ge_graph

    graph = get_default_ge_graph()
    first = outputs[0] if isinstance(outputs, tuple) else outputs
    graph.dont_prune_me(first)
    this = first.node
    before = graph.__dict__.get("_deep_ep_communicating")
    if before is not None:
        this.input.append(ControlTensor(before).controller)
    graph.__dict__["_deep_ep_communicating"] = this


def _windows_input(group: str, like: Any) -> Any:
    """The graph's input for the window table of `group`, which is looked up whenever the graph runs, in the process
    that runs it. No FX input stands for it, so that graphs for CPU and NPU are traced alike."""
    from torchair.ge._ge_graph import Data, DataType, _FuncBase, _GeInputInfo, _ValueType, get_default_ge_graph

    class Table(_FuncBase):
        def __call__(self, *args: Any) -> torch.Tensor:
            return windows.table(group)

        def codegen(self, index: int, inputs: str) -> str:
            """The same, as a line of the code in which torchair's cache keeps a graph."""
            return f"{inputs}.insert({index}, __import__({windows.__name__!r}, fromlist='_').table({group!r}))"

    graph = get_default_ge_graph()
    tables = graph.__dict__.setdefault("_deep_ep_windows", {})
    if group not in tables:
        size = [windows.table_words(process_group(group).size())]
        place = "CPU" if like.meta.device.type == "cpu" else "NPU"
        data = Data(
            index=graph.num_inputs,
            dtype=DataType.DT_INT64,
            shape=size,
            placement=place,
            node_name=f"deep_ep_windows_{len(tables)}",
        )
        data.set_meta(torch.empty(size, dtype=torch.int64, device="meta"))
        info = _GeInputInfo(value_type=_ValueType.TENSOR, func=Table(), shape=size, real_shape=size, device_type=place)
        graph.record_input_info(data.node.name, info)
        tables[group] = data
    return tables[group]


def process_group(group: str) -> Any:
    """The ProcessGroup of this name."""
    return cast(Any, distributed_c10d)._resolve_process_group(group)


def communicator(group: str) -> str:
    """What a node calls its communicator: HCCL's name of it where the group has an NPU, else the group's name.

    The group's ranks are recorded with it, so that torchair's cache finds the communicator in another process.
    """
    from torchair.ge._ge_graph import get_default_ge_graph

    pg = process_group(group)
    if not any(device.type == "npu" for device in pg._device_types):
        return group
    name = windows.communicator(pg)
    ranks, tag = dist.get_process_group_ranks(pg), distributed_c10d._get_group_tag(pg)
    get_default_ge_graph().record_process_group(name, ranks, tag)
    return name


def number(value: Any) -> Any:
    """An int64 scalar node for an argument that is a number, or a symbol and so a node already."""
    from torchair import ge

    return ge.Const(value, dtype=ge.DataType.DT_INT64) if isinstance(value, int) else value


# Calls that are started and waited for: the node stands where the call is started, and GE runs it as it sees fit.


def starting(convert: Callable[..., Any]) -> Callable[..., Any]:
    """The converter of `<op>_start`, of that of <op>: the node of <op>, and a constant as ticket."""

    def convert_start(*args: Any) -> Any:
        from torchair import ge
        from torchair.ge._ge_graph import get_default_ge_graph

        results = convert(*args)
        ticket = ge.Const([0.0], dtype=ge.DataType.DT_DOUBLE)
        get_default_ge_graph().__dict__.setdefault("_deep_ep_started", {})[ticket.tensor] = results
        return ticket

    return convert_start


def waiting(ticket: Any, op: str, *_: Any) -> Any:
    """The converter of wait."""
    from torchair.ge._ge_graph import get_default_ge_graph

    return _started(op, get_default_ge_graph().__dict__.get("_deep_ep_started", {}).get(ticket.tensor))


def starting_of(decompose: Callable[..., Any]) -> Callable[..., Any]:
    """The decomposition of `<op>_start`, of that of <op>."""

    def decompose_start(*args: Any) -> torch.Tensor:
        ticket = torch.zeros(1, dtype=torch.float64, device="cpu")
        ticket._deep_ep_started = decompose(*args)  # type: ignore[attr-defined]
        return ticket

    return decompose_start


def waiting_of(ticket: torch.Tensor, op: str, *_: Any) -> Any:
    """The decomposition of wait."""
    return _started(op, getattr(ticket, "_deep_ep_started", None))


def _started(op: str, results: Any) -> list[Any]:
    if results is None:
        raise RuntimeError(
            f"deep_ep.wait: {op}_start is in another graph than its wait, which NPU graphs cannot have; put both into "
            "one graph, or neither"
        )
    return list(results) if isinstance(results, tuple) else [results]


# HCCL's collectives


def _sendable(x: Any) -> tuple[Any, Callable[[Any], Any]]:
    """x as HCCL's nodes take it, and back: their definitions do not list bf16."""
    from torchair._ge_concrete_graph import ge_apis
    from torchair.ge import DataType

    if x.dtype != DataType.DT_BF16:
        return x, lambda y: y
    return ge_apis.Bitcast(x, type=DataType.DT_FLOAT16), lambda y: ge_apis.Bitcast(y, type=DataType.DT_BF16)


def all_gather(x: Any, num_ranks: int, group: str) -> Any:
    """HcomAllGather."""
    from torchair._ge_concrete_graph import ge_apis

    y, back = _sendable(x)
    gathered = ge_apis.HcomAllGather(y, rank_size=num_ranks, group=communicator(group))
    put_in_order(gathered)
    return back(gathered)


def all_to_all(x: Any, num_ranks: int, group: str) -> Any:
    """HcomAllToAll, with equal splits."""
    from torchair._ge_concrete_graph import ge_apis

    y, back = _sendable(x)
    out = ge_apis.HcomAllToAll(y, group=communicator(group))
    put_in_order(out)
    return back(out)


def all_to_all_v(x: Any, send_counts: Any, recv_counts: Any, num_rows: Any, group: str) -> Any:
    """HcomAllToAllV, whose counts are tensors. It counts elements, in one dimension."""
    from torchair._ge_concrete_graph import ge_apis
    from torchair.ge import DataType

    def const(*values: int) -> Any:
        return ge_apis.Const(list(values), dtype=DataType.DT_INT64)

    y, back = _sendable(x)
    counts = [send_counts, recv_counts]
    if x.rank > 1:
        width = ge_apis.Slice(ge_apis.Shape(x, dtype=DataType.DT_INT64), const(1), const(1))
        counts = [ge_apis.Mul(count, width) for count in counts]
        y = ge_apis.Reshape(y, const(-1))
    begins = [ge_apis.Cumsum(count, ge_apis.Const(0, dtype=DataType.DT_INT64), exclusive=True) for count in counts]
    out = ge_apis.HcomAllToAllV(y, counts[0], begins[0], counts[1], begins[1], group=communicator(group))
    put_in_order(out)
    if x.rank > 1:
        out = ge_apis.Reshape(out, ge_apis.ConcatV2([const(-1), width], concat_dim=0, N=2))
    return back(out)
