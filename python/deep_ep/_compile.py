"""What the ops need of torch.compile beyond fakes and autograd formulas.

Ranks compile on their own, with their own sizes, and still must issue the same communicating ops in the same order:

- no graph pass removes such an op (`communicating`), merges two of them that look the same (ranks may differ in what
  looks the same), or recomputes one in backward where a memory budget asks for it; an explicit checkpoint does,
- inductor runs them in the order of the program: `prepare` gives them a lowering that depends on the one before, and
  keeps the pass that moves nodes towards their users away from graphs that contain them,
- what lies between the start of a call and its wait in the program runs between them: inductor would move the wait
  right behind its start,
- what a call sends stays as it is until its wait: no kernel or pass takes its memory or writes to it, and a program
  that does is an error,
- compiled code from the on-disk caches is used only by the version of this package that made it: torch does not see
  that a fake, a backward formula or a lowering changed, so their digest becomes part of its cache keys.

torch's own effects (`register_effect(EffectType.ORDERED)`) do not do it, in 2.13 and 2.14: inductor still reorders the
ops by local sizes, checkpointed regions and exact row counts do not compile, and a memory budget recomputes the ops.

Nothing of torch is touched when deep_ep is imported: `prepare` runs in `init`, and in fakes, which run before a graph
that contains our ops is looked up in a cache or lowered.
"""

import dataclasses
import functools
import operator
import sys
import weakref
from collections.abc import Iterable, MutableMapping
from typing import Any

import torch
import torch.fx
from torch.utils import _pytree as pytree
from torch.utils._ordered_set import OrderedSet
from torch.utils.checkpoint import CheckpointPolicy

from ._library import python_digest
from .npu import ge

_communicating: list[torch._ops.OpOverload] = []


def communicating(op: torch._ops.OpOverload) -> None:
    """Declares that `op` communicates."""
    _communicating.append(op)
    torch.fx.node.has_side_effect(op)


def prepare() -> None:
    """Keys the compile caches, saves and orders our ops and gives torchair their converters, where these are loaded."""
    if "torch._dynamo" in sys.modules:
        _key_caches()
    if "torch._functorch.partitioners" in sys.modules:
        _save_in_partitioner()
    if "torch._inductor.graph" in sys.modules:
        _order_in_inductor()
    ge.register()


@functools.cache
def _key_caches() -> None:
    # torch.compiler.config.cache_key_tag is the user's: what we put there would be gone when he sets it.
    from torch._inductor.codecache import FxGraphHashDetails

    init = FxGraphHashDetails.__init__

    @functools.wraps(init)
    def init_with_ours(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.deep_ep = python_digest()

    FxGraphHashDetails.__init__ = init_with_ours  # type: ignore[method-assign]


@functools.cache
def _save_in_partitioner() -> None:
    from torch._functorch import compile_utils, partitioners

    # Equal nodes become one, unless they are random.
    compile_utils.rand_ops.extend({op.overloadpacket: None for op in _communicating})
    choose = partitioners.choose_saved_values_set

    def choose_with_ours(joint_graph: torch.fx.Graph, node_info: Any, *args: Any, **kwargs: Any) -> list[torch.fx.Node]:
        for node in joint_graph.nodes:
            if node.target in _communicating and node_info.is_required_fw(node) and not _is_checkpointed(node):
                node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
        saved = choose(joint_graph, node_info, *args, **kwargs)
        return _without_recomputing_ours(saved, node_info)

    partitioners.choose_saved_values_set = choose_with_ours


def _is_checkpointed(node: torch.fx.Node) -> bool:
    return node.meta.get("recompute") in (CheckpointPolicy.MUST_RECOMPUTE, CheckpointPolicy.PREFER_RECOMPUTE)


def _without_recomputing_ours(saved: list[torch.fx.Node], node_info: Any) -> list[torch.fx.Node]:
    """`saved`, with results of our ops that backward would recompute otherwise: with a budget of 0 torch looks at no
    tags. Ops with several results are not saved themselves, since a tuple cannot be."""

    def is_ours(node: torch.fx.Node) -> bool:
        return node.meta.get("recompute") == CheckpointPolicy.MUST_SAVE and node.target in _communicating

    def is_result(node: torch.fx.Node) -> bool:
        op = node.args[0] if node.target is operator.getitem else node
        return isinstance(op, torch.fx.Node) and is_ours(op) and isinstance(node.meta.get("val"), torch.Tensor)

    found = dict.fromkeys(node for node in saved if not is_ours(node) or is_result(node))
    seen = set()
    wanted = list(node_info.required_bw_nodes)
    while wanted:
        node = wanted.pop()
        if node in found or node in seen:
            continue
        seen.add(node)
        is_size = isinstance(node.meta.get("val"), torch.SymInt)
        if is_result(node) or (is_size and any(is_result(source) for source in node.all_input_nodes)):
            found[node] = None
        else:
            wanted += node.all_input_nodes
    return list(found)


@functools.cache
def _order_in_inductor() -> None:
    from torch._inductor.fx_passes import post_grad
    from torch._inductor.lowering import lowerings, make_fallback

    reorder_for_locality = post_grad.reorder_for_locality

    def reorder_unless_communicating(graph: torch.fx.Graph) -> None:
        if not any(node.target in _communicating for node in graph.nodes):
            reorder_for_locality(graph)

    post_grad.reorder_for_locality = reorder_unless_communicating
    kernels: MutableMapping[Any, dict[torch.fx.Node, Any]] = weakref.WeakKeyDictionary()
    for op in _communicating:
        make_fallback(op, layout_constraint=_in_memory, warn=False)
        lowerings[op] = _ordered(lowerings[op], kernels)


def _in_memory(node: torch.fx.Node, *args: Any, **kwargs: Any) -> Any:
    """The arguments of an op as contiguous memory, which is that of all their users: what is sent is computed once."""
    from torch._inductor import ir
    from torch._inductor.lowering import require_contiguous

    pytree.tree_map_only_(ir.TensorBox, ir.TensorBox.realize, (args, kwargs))
    return require_contiguous(node, *args, **kwargs)


def _ordered(lower: Any, kernels: MutableMapping[Any, dict[torch.fx.Node, Any]]) -> Any:
    """The lowering `lower`, with the dependencies of its kernel. `kernels` has those of a graph, in their order."""
    from torch._inductor import ir
    from torch._inductor.lowering import lowerings
    from torch._inductor.virtualized import V

    def lower_in_order(*args: Any, **kwargs: Any) -> Any:
        graph: Any = V.graph
        node: Any = graph.current_node
        before = kernels.setdefault(graph, {})
        # Where a graph ends between the two, the ticket is of no kernel here.
        start = before.get(node.args[0]) if node.target.overloadpacket is torch.ops.deep_ep.wait else None
        if start is not None:
            _check_inputs(node.args[0], node)
            _realize_between(graph, node.args[0], node)
        if node.target.overloadpacket.__name__.endswith("_start") and not _keeps_inputs(node):
            args = pytree.tree_map_only(ir.TensorBox, lowerings[torch.ops.aten.clone.default], args)
        known = len(graph.operations)
        result = lower(*args, **kwargs)
        (kernel,) = (op for op in graph.operations[known:] if isinstance(op, ir.FallbackKernel))
        kernel.has_side_effects = lambda: True  # type: ignore[method-assign]
        waits_for = [*before.values()][-1:]
        if start is not None:
            between = graph.operations[graph.operations.index(start) + 1 : known]
            for op in between:
                graph.additional_buffer_deps[op.get_operation_name()].add(start.get_name())
            waits_for += between
            _keep_until(kernel, start)
        names = (buffer.get_name() for op in waits_for for buffer in op.get_outputs())
        graph.additional_buffer_deps[kernel.get_operation_name()].update(names)
        before[node] = kernel
        return result

    return lower_in_order


def _wait_of(start: torch.fx.Node) -> torch.fx.Node | None:
    """The wait for what `start` began, if it is in the same graph."""
    waits = [user for user in start.users if user.target in _communicating and user.args[0] is start]
    return waits[0] if waits else None


def _storages(nodes: Iterable[Any]) -> set[int]:
    values = (node.meta.get("val") for node in nodes if isinstance(node, torch.fx.Node))
    return {value.untyped_storage()._cdata for value in values if isinstance(value, torch.Tensor)}


def _keeps_inputs(start: torch.fx.Node) -> bool:
    """Whether what `start` sends stays as it is until the wait: it is in this graph, and no pass has made an operation
    between the two write to it in place."""
    wait = _wait_of(start)
    if wait is None:
        return False
    sent = _storages(start.all_input_nodes)
    node = start.next
    while node is not wait:
        schema = getattr(node.target, "_schema", None)
        if schema is not None and schema.is_mutable:
            written = (value for value, of in zip(node.args, schema.arguments, strict=False) if of.is_write)
            if not sent.isdisjoint(_storages(pytree.tree_leaves(list(written)))):
                return False
        node = node.next
    return True


def _check_inputs(start: torch.fx.Node, wait: torch.fx.Node) -> None:
    """RuntimeError: the program writes to an argument of a forward call between the two, which both have."""
    op: Any = wait.args[1]
    if op.endswith("_backward"):
        return
    names = [argument.name for argument in start.target._schema.arguments]  # type: ignore[union-attr]
    given = [(name, one) for name, value in zip(names, start.args, strict=True) for one in pytree.tree_leaves(value)]
    sent = [pair for pair in given if _storages([pair[1]])]
    for (name, before), now in zip(sent, wait.args[2], strict=True):  # type: ignore[arg-type]
        if before is not now:
            raise RuntimeError(
                f"deep_ep.{op}: {name} is written to between the start of the call and its wait, so that what is sent "
                "is not known; write to it after the wait, or pass a copy"
            )


def _keep_until(wait: Any, start: Any) -> None:
    """Has inductor take the kernel `wait` for a user of what the kernel `start` reads, whose memory it then leaves
    alone until there."""
    from torch._inductor import dependencies

    sent = OrderedSet(dependencies.StarDep(read.name) for read in start.get_read_writes().reads)
    read_writes = wait.get_read_writes

    def with_sent() -> Any:
        known = read_writes()
        return dataclasses.replace(known, reads=known.reads | sent)

    wait.get_read_writes = with_sent


def _realize_between(graph: Any, start: torch.fx.Node, wait: torch.fx.Node) -> None:
    """Gives what is computed between the two, and used afterwards, a kernel of its own: it would become a part of that
    of its user."""
    from torch._inductor import ir

    between = []
    node = start.next
    while node is not wait:
        between.append(node)
        node = node.next
    inside = set(between)
    for node in between:
        value = graph.env.get(node)
        if isinstance(value, ir.TensorBox) and not inside.issuperset(node.users):
            value.realize()
