"""Calls of the `.alltoall` overloads that go on while their caller does something else.

They run one after the other on the thread of their group's communicator, and every other call of the group waits for
them first, so collectives keep the order of the program. The counterpart for `.default` is torch_library/started.cpp.
"""

import contextlib
import inspect
import itertools
import struct
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor

from .. import communicator
from ..calls import Failed, mine
from ..communicator import Communicator
from .alltoall import reject

Write = Callable[[list[Tensor], list[Tensor]], None]
"""(tensors that were made for results, results): writes these to those, behind torch's back."""


class _Call(Future):
    """One that goes on. Its result is a list of tensors."""

    def __init__(self, op: str, group: Communicator | None = None) -> None:
        super().__init__()
        self.op = op
        self._group = group
        self._early: list[Tensor] = []
        self._write: Write = write_all
        self._lock = threading.Lock()

    def arriving(self, make: Callable[[], Sequence[Tensor]] | None, write: Write) -> list[Tensor]:
        """The tensors of the result, which are made now if they can be, and are filled in when it is there.

        Without, it raises what the call raised.
        """
        with self._lock:
            if make is not None and (not self.done() or self.exception() is not None):
                self._early, self._write = list(make()), write
                return self._early
        return self.wait()

    def wait(self) -> list[Tensor]:
        """Its result. Raises what it raised."""
        with contextlib.nullcontext() if self._group is None else self._group.giving_up_if_interrupted():
            return self.result()

    def run(
        self, kernel: Callable[..., Any], arguments: list[Any], failed: Failed | None, form: str, gradient: int
    ) -> None:
        mine.form, mine.gradient = form, gradient
        try:
            if failed is not None and failed.error is not None:
                raise failed.error
            if self._group is not None and any(map(_is_freed, arguments)):
                op = self.op.removesuffix("_padded")  # as peers know it
                reject(op, self._group.name, "an argument has no memory: its storage has been freed")
            with torch.no_grad():
                results = kernel(*arguments)
            results = [results] if isinstance(results, Tensor) else list(results)
            with self._lock:
                if self._early:
                    self._write(self._early, results)
                self.set_result(self._early or results)
        except BaseException as error:
            if failed is not None:
                failed.error = error
            with self._lock:
                spoil(self._early)
                self.set_exception(error)


def _is_freed(argument: Any) -> bool:
    return isinstance(argument, Tensor) and argument.numel() > 0 and argument.untyped_storage().nbytes() == 0


def write(to: Tensor, of: Tensor) -> None:
    """Writes behind torch's back: autograd, version counters and grad mode do not see it."""
    with torch.inference_mode():
        to.data.copy_(of)


def write_all(early: Sequence[Tensor], results: Sequence[Tensor]) -> None:
    """Writes every result."""
    for to, of in zip(early, results, strict=False):
        write(to, of)


def spoiled(make: Callable[..., Sequence[Tensor]]) -> Callable[..., Sequence[Tensor]]:
    """`make`, with values out of nothing."""

    def made(*arguments: Any) -> Sequence[Tensor]:
        tensors = make(*arguments)
        spoil(tensors)
        return tensors

    return made


def spoil(tensors: Sequence[Tensor]) -> None:
    """Makes values out of nothing, in the same way: NaN, and -1."""
    for tensor in tensors:
        with torch.inference_mode():
            tensor.data.view(-1).view(torch.uint8).fill_(0xFF)


# By the number in the ticket, below 0, where those of .default are not.
_calls: dict[int, _Call] = {}
_numbers = itertools.count(-1, -1)


def place_of_group(kernel: Callable[..., Any]) -> int:
    """Which of the arguments of `kernel` is the group."""
    return list(inspect.signature(kernel).parameters).index("group")


def starting(op: str, kernel: Callable[..., Any]) -> Callable[..., Tensor]:
    """The kernel of `<op>_start`, of that of `op`."""
    place = place_of_group(kernel)

    def start(*arguments: Any) -> Tensor:
        kept = [argument.detach() if isinstance(argument, Tensor) else argument for argument in arguments]
        group = communicator.of(f"{op}_start", arguments[place])
        call, failed, form, gradient = _Call(op, group), mine.failed, mine.form, mine.take_gradient()
        group.start(lambda: call.run(kernel, kept, failed, form, gradient))
        mine.leave_to_thread()
        return _ticket(call)

    return start


def holding(op: str, kernel: Callable[..., Any]) -> Callable[..., Tensor]:
    """The kernel of `<op>_start` where that of `op` waits for nobody, since it queues work on a stream."""

    def start(*arguments: Any) -> Tensor:
        call = _Call(op)
        call.run(kernel, list(arguments), mine.failed, mine.form, mine.gradient)
        return _ticket(call)

    return start


def _ticket(call: _Call) -> Tensor:
    number = next(_numbers)
    _calls[number] = call
    memory = _Memory(struct.pack("d", number))
    # Results that nobody asks for go with the ticket.
    weakref.finalize(memory, _calls.pop, number, None).atexit = False
    return torch.frombuffer(memory, dtype=torch.float64)


class _Memory(bytearray):
    """Of a tensor, which says when it goes."""


def finish(op: str, ticket: Tensor) -> list[Tensor]:
    """The results of the call that gave the ticket. Raises what it raised, or RuntimeError if there is none of `op`."""
    call = _find("wait", op, ticket)
    del _calls[int(ticket)]
    return call.wait()


def arriving(
    op: str, ticket: Tensor, make: Callable[[], Sequence[Tensor]] | None = None, write: Write = write_all
) -> list[Tensor]:
    """The same, without waiting for the call if `make` makes the tensors that will hold the results.

    The ticket stays good for `finish`.
    """
    return _find("arriving", op, ticket).arriving(make, write)


def _find(caller: str, op: str, ticket: Tensor) -> _Call:
    call = _calls.get(int(ticket))
    if call is None:
        raise RuntimeError(
            f"deep_ep.{caller}: ticket must be what {op}_start returned in this process, and is good for one wait"
        )
    if call.op != op:
        raise RuntimeError(f"deep_ep.{caller}: ticket must be what {op}_start returned, got that of {call.op}_start")
    return call
