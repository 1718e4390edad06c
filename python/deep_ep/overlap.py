"""Buffer's calls in two steps: results that are filled once the call has ended, and what fills them.

Dynamo traces through it: in a graph the filling is a flow of data.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from . import cost
from .utils import EventHandle, EventOverlap


class Plan(NamedTuple):
    """What a method of Buffer does."""

    op: Any
    """The module of the op, one of deep_ep.ops."""
    calls: list[tuple[Any, ...]]
    """The arguments of its calls, in their order."""
    received: Callable[..., Any]
    """What the client gets, of the results of all calls."""
    shape: tuple[Any, ...] = ()
    """What op.nothing_yet needs besides."""


def issue(
    plan: Plan, overlaps: bool, into: Any = None, stats: Tensor | None = None, rank: int = 0
) -> tuple[Any, Callable[[], None] | None]:
    """Makes the calls, or starts them. Returns the results and None; if `overlaps`, zeros, or what is in `into`, and a
    function that waits for the calls and fills in the results. `stats` of this `rank` get what was waited.
    """
    # Wrong arguments raise at once, on all ranks. (In graphs, fakes have seen them.)
    if not overlaps or (not torch.compiler.is_compiling() and any(plan.op.wrong(*call) for call in plan.calls)):
        since = cost.now(stats)
        results = plan.received(*[plan.op.call(*call) for call in plan.calls])
        cost.add(stats, since, rank)
        return results, None

    started = [plan.op.start(*call) for call in plan.calls]
    results = into
    if results is None:
        results = plan.received(*[plan.op.nothing_yet(*call, *plan.shape) for call in plan.calls])

    def complete() -> None:
        since = cost.now(stats)
        arrived = plan.received(*[plan.op.complete(one) for one in started])
        for to, of in zip(tree_leaves(results), tree_leaves(arrived), strict=True):
            # What the client has given comes back as it is.
            if isinstance(to, Tensor) and to is not of:
                to.copy_(of)
        cost.add(stats, since, rank)

    return results, complete


def begin_after(previous_event: EventOverlap | None, async_finish: bool, allocate_on_comm_stream: bool) -> None:
    """Waits for the event. ValueError: as upstream, allocate_on_comm_stream needs both others."""
    event = None if previous_event is None else previous_event.event
    if allocate_on_comm_stream and (event is None or not async_finish):
        raise ValueError(
            "allocate_on_comm_stream needs previous_event and async_finish=True, got "
            f"{'no previous_event' if event is None else 'a previous_event'} and async_finish={async_finish}"
        )
    if event is not None:
        event.current_stream_wait()


def event_of(async_finish: bool, complete: Callable[[], None] | None = None) -> EventOverlap:
    """The event of a call, which `complete` ends if it goes on when it returns."""
    return EventOverlap(EventHandle(complete) if async_finish else None)
