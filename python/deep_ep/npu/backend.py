"""A backend for torch.compile: torchair's, with the passes and decompositions that training an MoE model needs besides.

In exact mode the number of received rows is a symbol without a value (unbacked) while a graph is compiled. torchair
asks for its value, and cannot convert the assertions and results that come with it; the passes here take care of both.
"""

import contextlib
import copy
import logging
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx

from . import ge, training

_ROWS = 4099
"""What a number of rows that only a run can tell is taken for where torchair asks: like no other size."""

_ASSERTS = (
    torch.ops.aten._assert_scalar.default,
    torch.ops.aten._assert_async.default,
    torch.ops.aten._assert_async.msg,
    torch.ops.aten.sym_constrain_range.default,
    torch.ops.aten.sym_constrain_range_for_size.default,
)


def backend(compiler_config: Any = None, custom_decompositions: dict[Any, Callable[..., Any]] | None = None) -> Any:
    """For `torch.compile(model, backend=deep_ep.npu.backend())`: graphs for NPUs, forward and backward.

    Does all that `backend="npu"` does, and converts models with exact row counts (num_worst_tokens=0), which need
    `fullgraph=True` or `torch._dynamo.config.capture_dynamic_output_shape_ops`, with SwiGLU, grouped matmul, fused
    attention and activation checkpointing.

    Args:
        compiler_config: a torchair.CompilerConfig; None is the default one.
        custom_decompositions: by op, in addition to torchair's and this library's.

    Raises:
        RuntimeError: torch_npu is not loaded.
    """
    torchair = ge.torchair()
    from torchair import npu_fx_compiler

    ge.register()
    training.register()
    config = torchair.CompilerConfig() if compiler_config is None else compiler_config
    decompositions = training.decompositions() | (custom_decompositions or {})
    decompositions = torchair.get_npu_backend(compiler_config=config, custom_decompositions=decompositions).keywords[
        "decompositions"
    ]

    def deep_ep_npu(module: fx.GraphModule, inputs: list[Any], **_: Any) -> Any:
        with _attention_that_converts(inputs):
            return npu_fx_compiler._compile_graph_with_aot(
                module, _Compiler(torchair.get_compiler(config)), inputs, config, decompositions
            )

    return deep_ep_npu


@contextlib.contextmanager
def _attention_that_converts(inputs: list[Any]) -> Iterator[None]:
    """The CPU's fused attention has no converter; its parts have."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    on_cpu = all(tensor.device.type == "cpu" for tensor in inputs if isinstance(tensor, Tensor))
    with sdpa_kernel(SDPBackend.MATH) if on_cpu else contextlib.nullcontext():
        yield


class _Compiler:
    """torchair's compiler of one graph, behind the passes."""

    def __init__(self, compile_graph: Callable[..., Any]) -> None:
        self._compile_graph = compile_graph

    def __call__(self, module: fx.GraphModule, inputs: list[Any]) -> Any:
        graph = fx.GraphModule(module, copy.deepcopy(module.graph))
        graph.meta = module.meta
        results = _Results(graph.graph)
        drop_asserts(graph.graph)
        graph.recompile()
        with ge.exact_rows(), _answers_about_rows(graph.graph):
            compiled = self._compile_graph(graph, inputs)

        def run(arguments: list[Any]) -> list[Any]:
            values = list(arguments)
            arguments.clear()
            return results.complete(compiled(*values))

        run._boxed_call = True  # type: ignore[attr-defined]
        return run


def _symbol(value: Any) -> Any:
    """The expression of a size that has no value before a run, else None."""
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    is_size = isinstance(value, torch.SymInt) and bool(free_unbacked_symbols(value))
    return value.node.expr if is_size else None


class _Results:
    """Takes sizes that only a run can tell out of a graph's results, and puts them in again after each run."""

    def __init__(self, graph: fx.Graph) -> None:
        (output,) = graph.find_nodes(op="output")
        kept: list[Any] = []
        self._order: list[Any] = []  # by result: its place among those kept, or an expression
        for result in output.args[0]:
            symbol = _symbol(result.meta.get("val")) if isinstance(result, fx.Node) else None
            self._order.append(len(kept) if symbol is None else symbol)
            if symbol is None:
                kept.append(result)
        wanted = {s for entry in self._order if not isinstance(entry, int) for s in entry.free_symbols}
        self._dims: dict[Any, tuple[int, int]] = {}  # by symbol: a kept result, and its dimension of that size
        for node in [*kept, *(node for node in graph.nodes if node.op != "output")]:
            value = node.meta.get("val") if isinstance(node, fx.Node) else None
            for dim, size in enumerate(value.shape if isinstance(value, Tensor) else ()):
                symbol = _symbol(size)
                if symbol in wanted and symbol not in self._dims:
                    if node not in kept:
                        kept.append(node)
                    self._dims[symbol] = kept.index(node), dim
        output.args = (tuple(kept),)

    def complete(self, kept: Any) -> list[Any]:
        sizes = {symbol: kept[place].shape[dim] for symbol, (place, dim) in self._dims.items()}
        return [kept[entry] if isinstance(entry, int) else int(entry.subs(sizes)) for entry in self._order]


def drop_asserts(graph: fx.Graph) -> None:
    """Removes run-time assertions, and the comparisons that they were about."""
    comparisons = {operator.ge, operator.le, operator.eq, operator.ne, operator.lt, operator.gt, torch.sym_not}
    for node in reversed(list(graph.nodes)):
        is_pure_size = node.target in comparisons or node.target is torch.ops.aten.sym_size.int
        if node.target in _ASSERTS or (is_pure_size and not node.users):
            graph.erase_node(node)


@contextlib.contextmanager
def _answers_about_rows(graph: fx.Graph) -> Iterator[None]:
    """Meanwhile a question about an unbacked size is answered as for _ROWS of them. Sizes in the graph stay symbols."""
    import sympy  # type: ignore[import-untyped]
    from torch.utils._sympy.symbol import SymT, symbol_is_type

    class Answers(dict):
        def __contains__(self, symbol: Any) -> bool:
            return isinstance(symbol, sympy.Symbol) and symbol_is_type(symbol, (SymT.UNBACKED_INT,))

        def __getitem__(self, symbol: Any) -> Any:
            return sympy.Integer(_ROWS)

        def __bool__(self) -> bool:
            return True

    environment = None
    for node in graph.nodes:
        value = node.meta.get("val")
        for size in value.shape if isinstance(value, Tensor) else [value]:
            if isinstance(size, torch.SymInt):
                environment = size.node.shape_env
    if environment is None:
        yield
        return
    asserts = {symbol: list(entries) for symbol, entries in environment.deferred_runtime_asserts.items()}
    saved = environment.real_tensor_prop_unbacked_vals, environment.num_deferred_runtime_asserts
    log = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    level = log.level
    environment.real_tensor_prop_unbacked_vals = Answers()
    log.setLevel(logging.ERROR)  # a warning for each answer
    try:
        with environment.ignore_fresh_unbacked_symbols():
            yield
    finally:
        log.setLevel(level)
        environment.deferred_runtime_asserts = asserts
        environment.real_tensor_prop_unbacked_vals, environment.num_deferred_runtime_asserts = saved
