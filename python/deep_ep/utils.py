"""Events: how a caller says and learns when communication is done."""

from types import TracebackType


class EventHandle:
    """A point in the work issued so far.

    On CPU an op is finished when its call returns, so every point lies in the past.
    """

    def current_stream_wait(self) -> None:
        """Makes later work wait for this point."""


class EventOverlap:
    """The event that an asynchronous call returns; `event` is None when the call was synchronous.

    As a context manager it waits on leaving, so that what the block issues can overlap with communication.
    """

    def __init__(self, event: EventHandle | None = None) -> None:
        self.event = event

    def current_stream_wait(self) -> None:
        """Makes later work wait for the call. Nothing to do after a synchronous one."""
        if self.event is not None:
            self.event.current_stream_wait()

    def __enter__(self) -> "EventOverlap":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.current_stream_wait()
