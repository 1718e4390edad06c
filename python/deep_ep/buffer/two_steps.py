"""Buffer's calls in two steps: results that are there when the call has ended, and what waits for that.

Outside of graphs, results are tensors that the call writes to behind torch's back, as a device writes behind a stream:
their gradients are those of the call as it was issued, whoever waits for it, wherever. In a graph, which torch may
reorder, they are a flow of data out of the wait.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from ..groups import spoils
from ..kernels.started import spoil, write
from . import cost


class Op(Protocol):
    """What an op has for calls in two steps: a module of deep_ep.ops is one. The arguments are those of `call`."""

    def call(self, *arguments: Any, **options: Any) -> Any:
        """Its results."""

    def start(self, *arguments: Any, **options: Any) -> Any:
        """Begins the call, for `complete` or `arriving`."""

    def complete(self, started: Any, /) -> Any:
        """Waits for the call: its results."""

    def arriving(self, started: Any, /) -> Any:
        """The same without waiting: they are there once started.join() has returned."""

    def wrong(self, *arguments: Any, **options: Any) -> str | None:
        """What is wrong with the arguments, as far as that needs no values."""

    def nothing_yet(self, *arguments: Any, **options: Any) -> Any:
        """Results without a value in them. Plan.shape follows the arguments."""


class Plan(NamedTuple):
    """What a method of Buffer does."""

    op: Op
    calls: list[tuple[Any, ...]]
    """The arguments of its calls, in their order."""
    received: Callable[..., Any]
    """What the client gets, of the results of all calls, and of `inputs`."""
    shape: tuple[Any, ...] = ()
    """What op.nothing_yet needs besides."""
    inputs: tuple[Tensor, ...] = ()
    """Tensors of the client that `received` needs besides, which may have gradients, or gives back."""
    arranges: bool = False
    """Whether `received` computes nothing: what the client gets are the results of the calls as they are."""


def issue(
    plan: Plan, overlaps: bool, into: Tensor | None = None, stats: Tensor | None = None, rank: int = 0
) -> tuple[Any, Callable[[], None] | None]:
    """Makes the calls, or starts them.

    Returns the results and None; if `overlaps`, the results, which hold nothing yet, and a function that returns when
    they are there. `into`: where the client wants the only one. `stats` of this `rank` get what was waited.
    """
    # Wrong arguments raise at once, on all ranks. (In graphs, fakes have seen them.)
    if not overlaps or (not torch.compiler.is_compiling() and any(plan.op.wrong(*call) for call in plan.calls)):
        since = cost.now(stats)
        results = plan.received(*[plan.op.call(*call) for call in plan.calls], *plan.inputs)
        cost.add(stats, since, rank)
        return results if into is None else into.copy_(results), None

    arriving = _in_graph if torch.compiler.is_compiling() else _in_memory
    results, wait = arriving(plan, [plan.op.start(*call) for call in plan.calls], into)

    def complete() -> None:
        since = cost.now(stats)
        wait()
        cost.add(stats, since, rank)

    return results, complete


def _in_graph(plan: Plan, started: list[Any], into: Tensor | None) -> tuple[Any, Callable[[], None]]:
    """Results that are copied to at the wait."""
    results = into
    if results is None:
        nothing = [plan.op.nothing_yet(*call, *plan.shape) for call in plan.calls]
        results = plan.received(*nothing, *plan.inputs)
    grad = torch.is_grad_enabled()

    def wait() -> None:
        with torch.set_grad_enabled(grad):
            arrived = plan.received(*[plan.op.complete(one) for one in started], *plan.inputs)
            for to, of in zip(tree_leaves(results), tree_leaves(arrived), strict=True):
                # What the client has given comes back as it is.
                if isinstance(to, Tensor) and to is not of:
                    to.copy_(of)

    return results, wait


def _in_memory(plan: Plan, started: list[Any], into: Tensor | None) -> tuple[Any, Callable[[], None]]:
    """Results that are the calls' own tensors, or are computed of these at the wait."""
    outs = [plan.op.arriving(one) for one in started]
    if plan.arranges:
        results, compute = plan.received(*outs, *plan.inputs), _nothing
    else:
        results, compute = _computed(plan, outs)
    combined = results
    if into is not None:
        results = _in_place_of(into, combined)

    def wait() -> None:
        for one in started:
            one.join()
        compute()
        if into is not None:
            write(into, combined)

    return results, wait


def _nothing() -> None:
    """Nothing is left to compute."""


def _computed(plan: Plan, outs: list[Any]) -> tuple[Any, Callable[[], None]]:
    """Results of which some are not tensors of `outs`, and what computes those once these are there."""
    given, structure = tree_flatten((outs, plan.inputs))
    # What `received` makes of nothing shows which results are which of the calls' tensors.
    nothing = [plan.op.nothing_yet(*call, *plan.shape) for call in plan.calls]
    with torch.no_grad():
        results, results_structure = tree_flatten(plan.received(*nothing, *plan.inputs))
    arriving = {id(of): one for of, one in zip(tree_leaves((nothing, plan.inputs)), given, strict=True)}
    places = [n for n, leaf in enumerate(results) if isinstance(leaf, Tensor) and id(leaf) not in arriving]

    def compute(*given: Any) -> list[Tensor]:
        outs, inputs = tree_unflatten(given, structure)
        arrived = tree_leaves(plan.received(*outs, *inputs))
        return [arrived[n] for n in places]

    computed = [torch.empty_like(results[n], memory_format=torch.contiguous_format) for n in places]
    if spoils(plan.calls[0][0]):
        spoil(computed)
    if computed:
        computed = list(_Computed.apply(compute, computed, *given))
    results = [arriving.get(id(leaf), leaf) for leaf in results]
    for n, one in zip(places, computed, strict=True):
        results[n] = one

    def write_all() -> None:
        with torch.no_grad():
            for to, of in zip(computed, compute(*given), strict=True):
                write(to, of)

    return tree_unflatten(results, results_structure), write_all


def _in_place_of(into: Tensor, result: Tensor) -> Tensor:
    """`into` with the gradient of `result`, which will be copied to it."""
    if result.requires_grad:
        return into.copy_(result)
    torch.autograd.graph.increment_version(into)
    return into


class _Computed(torch.autograd.Function):
    """Tensors that will hold what `compute` makes of the arguments once these hold what they should."""

    @staticmethod
    def forward(ctx: Any, compute: Callable[..., list[Tensor]], results: list[Tensor], *given: Any) -> Any:
        ctx.compute, ctx.given = compute, [_Computed if isinstance(one, Tensor) else one for one in given]
        ctx.save_for_backward(*(one for one in given if isinstance(one, Tensor)))
        ctx.mark_non_differentiable(*(result for result in results if not result.is_floating_point()))
        ctx.set_materialize_grads(False)
        return tuple(results)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        saved = iter(ctx.saved_tensors)
        needed = ctx.needs_input_grad[2:]
        given = [
            next(saved).detach().requires_grad_(is_needed) if one is _Computed else one
            for one, is_needed in zip(ctx.given, needed, strict=True)
        ]
        with torch.enable_grad():
            results = ctx.compute(*given)
        pairs = [pair for pair in zip(results, grads, strict=True) if pair[1] is not None and pair[0].requires_grad]
        if not pairs:
            return None, None, *(None for _ in given)
        leaves = [one for one, is_needed in zip(given, needed, strict=True) if is_needed]
        outputs, gradients = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(outputs, leaves, gradients, allow_unused=True))
        return None, None, *(next(found) if is_needed else None for is_needed in needed)
