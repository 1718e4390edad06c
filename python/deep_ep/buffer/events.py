"""Events of Buffer's calls: what a call waits for, and what it returns to be waited for."""

from collections.abc import Callable

from ..utils import EventHandle, EventOverlap


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


def event_and_hook(async_finish: bool, complete: Callable[[], None] | None) -> tuple[EventOverlap, Callable[[], None]]:
    """What a call returns for `complete`, which ends it if it goes on. Both may be called any number of times."""
    handle = EventHandle(complete)
    return EventOverlap(handle if async_finish else None), handle.current_stream_wait
