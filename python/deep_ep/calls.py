"""What a thread has done with operations of groups, for calls that fail in Python (`collective`): that of `.alltoall`,
whose counterpart for `.default` is ThreadCalls in src/shm/thread_calls.h.
"""

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch

from ._library import library


class Failed:
    """Why an operation of a call that was left to the thread of the group has failed. The later ones of such a call
    are not entered, on any rank, and fail for that reason.
    """

    error: BaseException | None = None


class _Mine(threading.local):
    entered = 0
    """Operations that this thread has entered, or left to the thread of their group."""
    completed = True
    """The newest of them has not failed here."""
    failed: Failed | None = None
    """Of the call that this thread makes, if it makes one."""
    form = ""
    """What ranks must have in common in this call, in words, where an operation's header does not say it."""

    gradient = 0
    """ThreadCalls::gradient."""
    gradient_of_call = 0
    """ThreadCalls::gradient_of_call."""

    def enter(self) -> None:
        self.entered += 1
        self.completed = False

    def take_gradient(self) -> int:
        """ThreadCalls::take_gradient."""
        gradient, self.gradient = self.gradient, 0
        return gradient or self.gradient_of_call

    def leave_to_thread(self) -> None:
        self.entered += 1
        self.completed = True


mine = _Mine()


def completing(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel of one operation, of which it is noted that it ended well."""

    @functools.wraps(kernel)
    def run(*args: Any, **kwargs: Any) -> Any:
        results = kernel(*args, **kwargs)
        mine.completed = True
        return results

    return run


def form(text: str) -> None:
    """Ranks must have `text` in common in this call, or it fails on all of them. Those that compile it say nothing."""
    if not torch.compiler.is_compiling():
        mine.form = text
        library.deep_ep_call_form(text.encode())


def gradient(value: int) -> None:
    """ThreadCalls::gradient of the operation that this thread enters next."""
    mine.gradient = value
    library.deep_ep_call_gradient(value)


def begin() -> tuple[int, int]:
    """From here on to `end`, operations of this thread are those of one call. Returns what `entered` takes."""
    mine.failed, mine.form = Failed(), ""
    mine.gradient_of_call = 0 if torch.is_grad_enabled() else 1
    return library.deep_ep_call_begin(mine.gradient_of_call) >> 1, mine.entered


def is_within() -> bool:
    """Whether this thread is between `begin` and `end`."""
    return mine.failed is not None


def leave() -> None:
    """The rest of this call is a program's own, which tells other ranks itself what fails in it."""
    if not torch.compiler.is_compiling():
        end()


def entered(begun: tuple[int, int]) -> tuple[int, bool]:
    """How many operations have been entered since `begun`, and whether the newest of them has not failed."""
    code = library.deep_ep_call_entered()
    native, here = (code >> 1) - begun[0], mine.entered - begun[1]
    return native + here, (native == 0 or bool(code & 1)) and (here == 0 or mine.completed)


def end() -> None:
    mine.failed, mine.form, mine.gradient_of_call = None, "", 0
    library.deep_ep_call_end()
