"""Calls of the `.alltoall` overloads that go on while their caller does something else.

They run one after the other on the thread of their group's communicator, and every other call of the group waits for
them first, so collectives keep the order of the program. The counterpart for `.default` is torch_library/started.cpp.
"""

import inspect
import itertools
import struct
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor

from . import communicator
from .communicator import Communicator

# Below 0, where those of .default are not.
_numbers = itertools.count(-1, -1)
_calls: dict[int, tuple[str, Communicator | None, Future]] = {}


def _run(call: Future, kernel: Callable[..., Any], arguments: list[Any]) -> None:
    try:
        with torch.no_grad():
            results = kernel(*arguments)
            call.set_result([results] if isinstance(results, Tensor) else list(results))
    except BaseException as error:
        call.set_exception(error)


def place_of_group(kernel: Callable[..., Any]) -> int:
    """Which of the arguments of `kernel` is the group."""
    return list(inspect.signature(kernel).parameters).index("group")


def starting(op: str, kernel: Callable[..., Any]) -> Callable[..., Tensor]:
    """The kernel of `<op>_start`, of that of `op`."""
    place = place_of_group(kernel)

    def start(*arguments: Any) -> Tensor:
        # The caller may write to its tensors as soon as this returns.
        kept = [argument.detach().clone() if isinstance(argument, Tensor) else argument for argument in arguments]
        group = communicator.of(f"{op}_start", arguments[place])
        call: Future = Future()
        group.start(lambda: _run(call, kernel, kept))
        return _ticket(op, group, call)

    return start


def holding(op: str, kernel: Callable[..., Any]) -> Callable[..., Tensor]:
    """The kernel of `<op>_start` where that of `op` waits for nobody, since it queues work on a stream."""

    def start(*arguments: Any) -> Tensor:
        call: Future = Future()
        _run(call, kernel, list(arguments))
        return _ticket(op, None, call)

    return start


def _ticket(op: str, group: Communicator | None, call: Future) -> Tensor:
    number = next(_numbers)
    _calls[number] = op, group, call
    memory = _Memory(struct.pack("d", number))
    # Results that nobody asks for go with the ticket.
    weakref.finalize(memory, _calls.pop, number, None).atexit = False
    return torch.frombuffer(memory, dtype=torch.float64)


class _Memory(bytearray):
    """Of a tensor, which says when it goes."""


def finish(op: str, ticket: Tensor) -> list[Tensor]:
    """The results of the call that gave the ticket. Raises what it raised, or RuntimeError if there is none of `op`."""
    started_op, group, call = _calls.pop(int(ticket), (op, None, None))
    if call is None:
        raise RuntimeError(
            f"deep_ep.wait: ticket must be what {op}_start returned in this process, and is good for one wait"
        )
    if started_op != op:
        raise RuntimeError(f"deep_ep.wait: ticket must be what {op}_start returned, got that of {started_op}_start")
    if group is None:
        return call.result()
    with group.giving_up_if_interrupted():
        return call.result()
