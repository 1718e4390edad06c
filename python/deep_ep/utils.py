"""Events: how a caller says and learns when communication is done."""

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch


class EventHandle:
    """A point in the work issued so far. EventHandle() is the present one, where all that was issued is done: on CPU an
    op is finished when its call returns, but for calls with async_finish, which have events of their own.
    """

    def __init__(self, complete: Callable[[], None] | None = None) -> None:
        self._complete = complete
        self._error: Exception | None = None
        self._lock = None if complete is None or torch.compiler.is_compiling() else threading.Lock()

    def current_stream_wait(self) -> None:
        """Waits for this point. Raises what went wrong on the way to it. Any number of threads may, any number of
        times.
        """
        if self._lock is None:
            self._wait()
        else:
            with self._lock:
                self._wait()

    def _wait(self) -> None:
        if self._error is not None:
            raise self._error
        if self._complete is not None:
            try:
                self._complete()
            except Exception as error:
                self._error = error
                raise
            self._complete = None


class EventOverlap:
    """The event that an asynchronous call returns; `event` is None when the call was synchronous.

    As a context manager it waits on leaving, so that what the block computes overlaps with communication.
    `extra_tensors` live as long as this does.
    """

    def __init__(self, event: EventHandle | None = None, extra_tensors: Any = None) -> None:
        self.event = event
        self.extra_tensors = extra_tensors

    def current_stream_wait(self) -> None:
        """Waits for the call: what it returned may be used from here on. Nothing to do after a synchronous one."""
        if self.event is not None:
            self.event.current_stream_wait()

    def __enter__(self) -> "EventOverlap":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.current_stream_wait()
