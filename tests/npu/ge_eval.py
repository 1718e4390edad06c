"""An interpreter of GE graphs on CPU tensors: what torchair's converters have made of a model is run, node by node.

A node is run by the function of its type, with its inputs and attributes by the names that CANN's definition gives them
(REG_OP, in torchair's auto_generated_ge_raw_ops.py): any other is a TypeError. A dynamic input is a list. What CANN
leaves undefined is NaN here, and equal keys are not sorted as torch sorts them.
"""

import contextlib
import re
import zlib
from collections.abc import Callable, Iterator
from graphlib import TopologicalSorter
from typing import Any

import ge_graphs
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchair
from torch import Tensor
from torchair._ge_concrete_graph import ge_apis
from torchair._ge_concrete_graph.fx2ge_converter import GeConcreteGraph
from torchair.ge import _ge_graph

from deep_ep.fused_options import FusedOptions
from deep_ep.npu import ge, windows

NODES: dict[str, Callable[..., Any]] = {}
"""By type: what makes of inputs and attributes a node's result, or a tuple of them."""


def node(fn: Callable[..., Any]) -> Callable[..., Any]:
    NODES[fn.__name__] = fn
    return fn


def dtype_of(number: int) -> torch.dtype:
    return _ge_graph.ge_type_to_torch_type(number)


def ints(x: Tensor) -> list[int]:
    assert x.dtype in (torch.int32, torch.int64) and x.dim() <= 1, (x.dtype, x.shape)
    return x.reshape(-1).tolist()


def same_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors. torch promotes; GE does not."""
    assert len({tensor.dtype for tensor in tensors}) == 1, [tensor.dtype for tensor in tensors]
    return tensors


# Element by element


def _of_one(fn: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda x: fn(x)


def _of_two(fn: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda x1, x2: fn(*same_dtype(x1, x2))


_ONE = {
    "Abs": torch.abs,
    "Gelu": F.gelu,
    "Identity": torch.clone,
    "Neg": torch.neg,
    "OnesLike": torch.ones_like,
    "Reciprocal": torch.reciprocal,
    "Round": torch.round,
    "Sigmoid": torch.sigmoid,
    "ZerosLike": torch.zeros_like,
}
_TWO = {
    "Add": torch.add,
    "BitwiseAnd": torch.bitwise_and,
    "BitwiseOr": torch.bitwise_or,
    "Equal": torch.eq,
    "FloorDiv": torch.floor_divide,
    "FloorMod": torch.remainder,
    "GreaterEqual": torch.ge,
    "Less": torch.lt,
    "LogicalAnd": torch.logical_and,
    "Mul": torch.mul,
    "NotEqual": torch.ne,
    "RealDiv": torch.div,
    "Sub": torch.sub,
}
NODES |= {op_type: _of_one(fn) for op_type, fn in _ONE.items()}
NODES |= {op_type: _of_two(fn) for op_type, fn in _TWO.items()}
NODES |= {
    "Cast": lambda x, dst_type: x.to(dtype_of(dst_type)),
    "ClipByValueV2": lambda x, clip_value_min, clip_value_max: torch.clamp(
        *same_dtype(x, clip_value_min, clip_value_max)
    ),
    "GeluGrad": lambda dy, x, y: torch.ops.aten.gelu_backward(dy, x),
    "SelectV2": lambda condition, **given: torch.where(condition, *same_dtype(given.pop("then"), given.pop("else"))),
    "Swish": lambda x, scale: (x.float() * torch.sigmoid(scale * x.float())).to(x.dtype),
    "Sxpy": lambda x1, x2, alpha: x1 - alpha * x2,
}


@node
def Bitcast(x: Tensor, type: torch.dtype, keep_dim: bool = False) -> Tensor:
    """Not as Tensor.view: a narrower dtype makes one more dimension, a wider one takes the last for its parts."""
    assert not keep_dim
    if x.element_size() > type.itemsize:
        return x.unsqueeze(-1).view(type)
    if x.element_size() < type.itemsize:
        assert x.shape[-1] * x.element_size() == type.itemsize, f"Bitcast of {x.dtype} {list(x.shape)} to {type}"
        return x.view(type).squeeze(-1)
    return x.view(type)


# Shapes and places

NODES |= {
    "ConcatV2": lambda x, concat_dim, N: torch.cat(same_dtype(*x)[:N], int(concat_dim)),
    "Fill": lambda dims, value: value.reshape(()).expand(ints(dims)).clone(),
    "Gather": lambda x, indices, **options: GatherV2(x, indices, torch.tensor(0), **options),
    "GatherElements": lambda x, index, dim: x.gather(dim, index),
    "Pack": lambda x, axis, N: torch.stack(same_dtype(*x)[:N], axis),
    "Range": lambda start, limit, delta: torch.arange(*map(int, (start, limit, delta)), dtype=(start + limit).dtype),
    "Reshape": lambda x, shape, axis, num_axes: x.reshape(ints(shape)),
    "Shape": lambda x, dtype: torch.tensor(x.shape, dtype=dtype_of(dtype)),
    "Squeeze": lambda x, axis: x.reshape([n for dim, n in enumerate(x.shape) if dim not in axis]),
    "Transpose": lambda x, perm: x.permute(ints(perm)).contiguous(),
}


@node
def GatherV2(x: Tensor, indices: Tensor, axis: Tensor, negative_index_support: bool, **_: Any) -> Tensor:
    dim, at = int(axis) % x.dim(), indices.reshape(-1)
    if negative_index_support:
        at = torch.where(at < 0, at + x.shape[dim], at)
    return x.index_select(dim, at).reshape((*x.shape[:dim], *indices.shape, *x.shape[dim + 1 :]))


@node
def IndexByTensor(x: Tensor, indices: list[Tensor], indices_mask: list[int]) -> Tensor:
    left = iter(indices)
    return x[tuple(next(left) if given else slice(None) for given in indices_mask)]


@node
def ScatterElements(data: Tensor, indices: Tensor, updates: Tensor, axis: int, reduction: str) -> Tensor:
    assert reduction == "none"
    return data.scatter(axis, indices, same_dtype(updates, data)[0])


@node
def Slice(x: Tensor, offsets: Tensor, size: Tensor) -> Tensor:
    for dim, (begin, length) in enumerate(zip(ints(offsets), ints(size), strict=True)):
        x = x.narrow(dim, begin, x.shape[dim] - begin if length == -1 else length)
    return x


@node
def StridedSliceV2(x: Tensor, begin: Tensor, end: Tensor, axes: Tensor, strides: Tensor, **masks: int) -> Tensor:
    assert not any(masks.values()), masks
    for first, last, axis, step in zip(*map(ints, (begin, end, axes, strides)), strict=True):
        x = x[(slice(None),) * (axis % x.dim()) + (slice(first, last, step),)]
    return x


@node
def Unsqueeze(x: Tensor, axes: list[int]) -> Tensor:
    for axis in axes:
        x = x.unsqueeze(axis)
    return x


# Along a dimension

NODES |= {
    "ReduceProdD": lambda x, axes, keep_dims: x.prod(*axes, keepdim=keep_dims, dtype=x.dtype),
    "ReduceSum": lambda x, axes, keep_dims: x.sum(ints(axes), keepdim=keep_dims, dtype=x.dtype),
    "SoftmaxGrad": lambda softmax, grad_softmax, axes: torch.ops.aten._softmax_backward_data(
        grad_softmax, softmax, *axes, softmax.dtype
    ),
    "SoftmaxV2": lambda x, axes, half_to_float: x.softmax(*axes),
}


@node
def ArgMaxWithValue(x: Tensor, dimension: int, keep_dims: bool) -> tuple[Tensor, Tensor]:
    values, indices = x.max(dimension, keepdim=keep_dims)
    return indices.int(), values


@node
def Cumsum(x: Tensor, axis: Tensor, exclusive: bool, reverse: bool) -> Tensor:
    assert not reverse
    total = x.cumsum(int(axis), dtype=x.dtype)
    return total - x if exclusive else total


@node
def SearchSorted(sorted_sequence: Tensor, values: Tensor, dtype: torch.dtype, right: bool) -> Tensor:
    return torch.searchsorted(*same_dtype(sorted_sequence, values), right=right).to(dtype)


@node
def Sort(x: Tensor, axis: int, descending: bool, stable: bool) -> tuple[Tensor, Tensor]:
    """Equal keys in reverse order."""
    assert not stable
    values, places = x.flip(axis).sort(dim=axis, descending=descending, stable=True)
    return values, (x.shape[axis] - 1 - places).int()


@node
def TopKV2(x: Tensor, k: Tensor, dim: int, largest: bool, sorted: bool, **_: int) -> tuple[Tensor, Tensor]:
    values, indices = x.topk(int(k), dim, largest, sorted)
    return values, indices.int()


# Products


@node
def MatMul(x1: Tensor, x2: Tensor, transpose_x1: bool, transpose_x2: bool) -> Tensor:
    return (x1.t() if transpose_x1 else x1) @ (x2.t() if transpose_x2 else x2)


@node
def GroupedMatmul(
    x: list[Tensor],
    weight: list[Tensor],
    group_list: Tensor,
    split_item: int,
    group_type: int,
    group_list_type: int,
    dtype: int,
    tuning_config: list[int],
    **others: Any,
) -> Tensor:
    """group_type 0: x [M, D], whose rows are in groups, by a weight [D, F] per group gives [M, F]. 2: x [D, M], whose
    columns are in groups, by weight [M, F] gives [groups, D, F]. group_list: where groups end, or their sizes."""
    absent = [part for value in others.values() for part in (value if isinstance(value, list) else [value])]
    assert not any(part.numel() if isinstance(part, Tensor) else part for part in absent), others
    assert split_item == 3 and dtype == -1 and group_list.dtype == torch.int64
    ends = group_list.cumsum(0).tolist() if group_list_type else group_list.tolist()
    groups = [slice(begin, end) for begin, end in zip([0, *ends], ends, strict=False)]
    a, b = same_dtype(*x, *weight)
    assert ends == sorted(ends) and ends[-1] <= a.shape[0 if group_type == 0 else 1], ends
    if group_type == 2:
        return torch.stack([a[:, group] @ b[group] for group in groups])
    assert group_type == 0
    out = a.new_full((a.shape[0], b.shape[2]), torch.nan)
    for group, matrix in zip(groups, b, strict=True):
        out[group] = a[group] @ matrix
    return out


# Collectives, over the process group of the name that the node has

HCCL_DTYPES = {torch.float16, torch.float32, torch.float64, torch.int8, torch.int16, torch.int32, torch.int64}
HCCL_DTYPES |= {torch.uint8, torch.uint16, torch.uint32, torch.uint64}


def exchange(group: str, parts: list[Tensor], recv_counts: list[int]) -> list[Tensor]:
    """The elements that each rank sends to this one, where every rank sends parts[d] to rank d.

    Where what a rank sends is not what another expects, all ranks of the group fail, and none waits.
    """
    pg = ge.process_group(group)
    everyone: list[Any] = [None] * pg.size()
    dist.all_gather_object(everyone, (parts[0].dtype, [part.numel() for part in parts], recv_counts), group=pg)
    (dtype,) = {dtype for dtype, _, _ in everyone}
    assert dtype in HCCL_DTYPES, f"HCCL's nodes do not take {dtype}"
    sent, expected = ([counts[i] for counts in everyone] for i in (1, 2))
    assert sent == [list(column) for column in zip(*expected, strict=True)], f"sent {sent}, expected {expected}"
    data = torch.cat([part.reshape(-1) for part in parts]).view(torch.uint8)
    received = data.new_empty(sum(recv_counts) * dtype.itemsize)
    sizes = [[count * dtype.itemsize for count in counts] for counts in (recv_counts, sent[pg.rank()])]
    dist.all_to_all_single(received, data, *sizes, group=pg)
    return list(received.view(dtype).split(recv_counts))


@node
def HcomAllGather(x: Tensor, rank_size: int, group: str, **_: int) -> Tensor:
    assert rank_size == ge.process_group(group).size()
    return torch.cat([part.view(x.shape) for part in exchange(group, [x] * rank_size, [x.numel()] * rank_size)])


@node
def HcomAllToAll(x: Tensor, group: str) -> Tensor:
    R = ge.process_group(group).size()
    return torch.cat(exchange(group, list(x.view(R, -1)), [x.numel() // R] * R)).view(x.shape)


@node
def HcomAllToAllV(
    send_data: Tensor,
    send_counts: Tensor,
    send_displacements: Tensor,
    recv_counts: Tensor,
    recv_displacements: Tensor,
    group: str,
) -> Tensor:
    """Counts and displacements are in elements; the result has one dimension."""
    places = [send_displacements, send_counts, recv_displacements, recv_counts]
    assert all(numbers.dtype == torch.int64 for numbers in places)
    begin, to, at, of = (numbers.tolist() for numbers in places)
    data = send_data.reshape(-1)
    parts = [data[first : first + count] for first, count in zip(begin, to, strict=True)]
    out = data.new_full((max(map(sum, zip(at, of, strict=True))),), -1)
    for first, part in zip(at, exchange(group, parts, of), strict=True):
        out[first : first + len(part)] = part
    return out


# This project's operators


def window_table(group: str) -> Tensor:
    """In the place of windows.table: a table of the right length, which tells whose it is."""
    return torch.full((windows.table_words(ge.process_group(group).size()),), zlib.crc32(group.encode()))


def run_deep_ep(op_type: str, **given: Any) -> Any:
    """The torch op of this type."""
    name = op_type.removeprefix("DeepEp").removesuffix("Exact").removesuffix("DispatchFfnCombine")
    overload = "dispatch_ffn_combine" if op_type.endswith("DispatchFfnCombine") else "default"
    op = getattr(getattr(torch.ops.deep_ep, "_".join(re.findall("[A-Z][a-z0-9]*", name)).lower()), overload)
    if "group" in given:
        assert torch.equal(given.pop("windows"), window_table(given["group"])), f"{op_type}: another group's windows"
    names = [argument.name for argument in op._schema.arguments]
    if "num_worst_tokens" in names:
        given["num_worst_tokens"] = 0 if op_type.endswith("Exact") else int(given["num_worst_tokens"])
    not_in_graphs = {"comm_alg": "", "strategy": "default", **FusedOptions()._asdict()}
    return op(**given, **{name: value for name, value in not_in_graphs.items() if name in names})


# Graphs


def _dtype(desc: Any) -> torch.dtype:
    return dtype_of(_ge_graph._ge_proto_dtype_to_ge_dtype(desc.dtype))


def argument(op: Any, arguments: list[Tensor]) -> Tensor:
    """The value of a Data node: the graph's input of that index, which has the dtype and shape that the node states."""
    given, desc = arguments[op.attr["index"].i], op.output_desc[0]
    value = given if desc.shape.dim else given.reshape(())  # a symbol comes as one number
    sizes = [-1 if known == -1 else size for size, known in zip(value.shape, desc.shape.dim, strict=True)]
    assert value.dtype == _dtype(desc) and sizes == list(desc.shape.dim), (op.name, value.dtype, value.shape)
    return value


def constant(op: Any) -> Tensor:
    """The value of a Const node."""
    value = op.attr["value"].t
    out = torch.empty(list(value.desc.shape.dim), dtype=_dtype(value.desc))
    assert len(value.data) == out.nbytes, op.name
    return torch.frombuffer(bytearray(value.data), dtype=out.dtype).reshape(out.shape) if value.data else out


def inputs(op: Any, values: dict[str, Tensor]) -> dict[str, Any]:
    """A node's inputs by name, without the optional ones that are not given."""
    dynamic = re.findall(r"DYNAMIC_INPUT\((\w+)", getattr(ge_apis, op.type, "").__doc__ or "")
    given: dict[str, Any] = {}
    for desc, source in zip(op.input_desc, (s for s in op.input if not s.endswith(":-1")), strict=True):
        name = desc.name.rstrip("0123456789")
        if name in dynamic:
            given.setdefault(name, []).append(values[source])
        elif source:
            given[desc.name] = values[source]
    return given


def attributes(op: Any) -> dict[str, Any]:
    """A node's attributes by name."""
    found = {}
    for name, value in op.attr.items():
        if not name.startswith("_"):
            kind, content = value.WhichOneof("value"), ge_graphs._attribute(value)
            found[name] = list(content.i) if kind == "list" else dtype_of(content) if kind == "dt" else content
    return found


def check(op: Any, results: tuple[Tensor, ...], fakes: dict[str, Any], sizes: dict[str, int]) -> None:
    """A node's results have the dtypes that it states, and the shapes of the FX results that they stand for.

    The shapes that it states itself may be a view's: torchair converts no views, but what takes them.
    """
    for index, (desc, result) in enumerate(zip(op.output_desc, results, strict=True)):
        assert "_meta" not in desc.attr or result.dtype == _dtype(desc), (
            f"{op.name}: {result.dtype}, not {_dtype(desc)}"
        )
        fake = ge_graphs._fake_of(op, index, fakes)
        if isinstance(fake, Tensor | torch.SymInt):
            numbers, wanted = (result.shape, fake.shape) if isinstance(fake, Tensor) else ([int(result)], [fake])
            assert len(numbers) == len(wanted), f"{op.name}: {result.shape}, not {wanted}"
            for number, text in zip(numbers, map(str, wanted), strict=True):
                if text.isidentifier():
                    sizes.setdefault(text, number)
                with contextlib.suppress(NameError):  # of a symbol that stands nowhere alone
                    assert number == eval(text, {}, sizes), f"{op.name}: {numbers}, not {wanted} with {sizes}"


def evaluate(op: Any, values: dict[str, Tensor], arguments: list[Tensor]) -> Any:
    """A node's result, or a tuple of them."""
    if op.type == "Data":
        return argument(op, arguments)
    if op.type == "Const":
        return constant(op)
    given = inputs(op, values) | attributes(op)
    if op.type.startswith("DeepEp"):
        return run_deep_ep(op.type, **given)
    if op.type not in NODES:
        raise NotImplementedError(f"ge_eval.py has no function for nodes of type {op.type}")
    try:
        return NODES[op.type](**given)
    except Exception as error:
        raise RuntimeError(f"node {op.name} of type {op.type}: {error}") from error


def in_order(graph: Any) -> list[Any]:
    """The nodes that GE runs: the inputs, and what the result needs or has to wait for. Only edges determine the
    order."""
    ops = {op.name: op for op in graph.op}
    (output,) = (op for op in graph.op if op.type == "NetOutput")
    sources, left = {}, [output.name]
    while left:
        name = left.pop()
        if name not in sources:
            sources[name] = [source.rsplit(":", 1)[0] for source in ops[name].input if source]
            left += sources[name]
    needed = [ops[name] for name in TopologicalSorter(sources).static_order()]
    return [op for op in graph.op if op.type == "Data"] + [op for op in needed if op.type != "Data"]


def run(graph: Any, arguments: list[Tensor], fx: Any = None) -> tuple[list[Tensor], list[Any]]:
    """The results of a GE graph for its inputs, by index, and the nodes that ran. fx: the graph that it was converted
    from, if there is one."""
    *nodes, output = in_order(graph)
    fakes = {call.name: call.meta.get("val") for call in fx.graph.nodes} if fx is not None else {}
    values: dict[str, Tensor] = {}
    sizes: dict[str, int] = {}
    for op in nodes:
        results = evaluate(op, values, arguments)
        results = results if isinstance(results, tuple) else (results,)
        check(op, results, fakes, sizes)
        values |= {f"{op.name}:{index}": result for index, result in enumerate(results)}
    return [values[source] for source in output.input if not source.endswith(":-1")], nodes


def compare(result: Any, expected: Any) -> None:
    """AssertionError unless a GE graph's result is as expected, where it is defined."""
    assert isinstance(result, Tensor) == isinstance(expected, Tensor), f"{type(result)} instead of {type(expected)}"
    if isinstance(result, Tensor) and result.is_floating_point():
        if result.dtype.itemsize == 1:
            assert result.dtype == expected.dtype
            result, expected = result.view(torch.uint8), expected.view(torch.uint8)
        else:
            expected = expected.masked_fill(result.isnan(), torch.nan)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6, equal_nan=True)


@contextlib.contextmanager
def in_place_of_ge() -> Iterator[list[str]]:
    """Meanwhile compiled graphs run here, with all that torchair does around them. Each gives what its FX graph gives,
    except where the result is undefined. Yields the types of the nodes that ran."""
    call = GeConcreteGraph.__call__
    running: list[Any] = []
    ran: list[str] = []

    def run_graph(graph: Any, arguments: list[Tensor], *_: Any) -> list[Tensor]:
        results, nodes = run(graph, arguments, running[-1].fx_graph)
        ran.extend(op.type for op in nodes)
        return results

    def call_and_compare(concrete: Any, *args: Any) -> Any:
        running.append(concrete)
        wanted, results = concrete.fx_graph(*args), call(concrete, *args)
        for result, expected in zip(results, wanted, strict=True):
            compare(result, expected)
        return results

    with pytest.MonkeyPatch.context() as patch:
        for name, method in {"load": lambda *_, **__: None, "compile": lambda _: None, "run": run_graph}.items():
            patch.setattr(_ge_graph.GeGraph, name, method)
        patch.setattr(GeConcreteGraph, "__call__", call_and_compare)
        patch.setattr(windows, "table", window_table)
        patch.setattr(ge_graphs, "config", torchair.CompilerConfig)
        yield ran
