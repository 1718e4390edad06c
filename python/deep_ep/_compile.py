"""What the ops need of torch.compile beyond fakes and autograd formulas.

Ranks compile on their own, with their own sizes, and still must issue the same communicating ops in the same order:

- no graph pass removes such an op (`communicating`),
- inductor runs them in the order of the program: `prepare` gives them a lowering that depends on the one before, and
  keeps the pass that moves nodes towards their users away from graphs that contain them,
- compiled code from the on-disk caches is used only by the version of this package that made it: torch does not see
  that a fake, a backward formula or a lowering changed, so their digest becomes part of its cache keys.

Nothing of torch is touched when deep_ep is imported: `prepare` runs in `init`, and in fakes, which run before a graph
that contains our ops is looked up in a cache or lowered.
"""

import functools
import hashlib
import sys
import weakref
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import torch
import torch.fx

from .npu import ge

_communicating: list[torch._ops.OpOverload] = []


def communicating(op: torch._ops.OpOverload) -> None:
    """Declares that `op` communicates."""
    _communicating.append(op)
    torch.fx.node.has_side_effect(op)


def prepare() -> None:
    """Tags the compile caches, orders our ops in inductor and gives torchair their converters, if these are loaded."""
    _tag_caches()
    if "torch._inductor.graph" in sys.modules:
        _order_in_inductor()
    ge.register()


def _digest() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@functools.cache
def _tag_caches() -> None:
    import torch.compiler.config as config

    config.cache_key_tag += f"deep_ep-{_digest()}"


@functools.cache
def _order_in_inductor() -> None:
    from torch._inductor.fx_passes import post_grad
    from torch._inductor.lowering import lowerings, make_fallback, require_contiguous

    reorder_for_locality = post_grad.reorder_for_locality

    def reorder_unless_communicating(graph: torch.fx.Graph) -> None:
        if not any(node.target in _communicating for node in graph.nodes):
            reorder_for_locality(graph)

    post_grad.reorder_for_locality = reorder_unless_communicating
    last_kernel: MutableMapping[Any, str] = weakref.WeakKeyDictionary()
    for op in _communicating:
        make_fallback(op, layout_constraint=require_contiguous, warn=False)
        lowerings[op] = _ordered(lowerings[op], last_kernel)


def _ordered(lower: Any, last_kernel: MutableMapping[Any, str]) -> Any:
    """The lowering `lower`, with a dependency of its kernel on the graph's last communicating kernel, by its name."""
    from torch._inductor import ir
    from torch._inductor.virtualized import V

    def lower_in_order(*args: Any, **kwargs: Any) -> Any:
        graph = V.graph
        known = len(graph.operations)
        result = lower(*args, **kwargs)
        (kernel,) = (op for op in graph.operations[known:] if isinstance(op, ir.FallbackKernel))
        kernel.has_side_effects = lambda: True  # type: ignore[method-assign]
        if graph in last_kernel:
            graph.additional_buffer_deps[kernel.get_operation_name()].add(last_kernel[graph])
        last_kernel[graph] = kernel.get_name()
        return result

    return lower_in_order
