"""Calls of the `.alltoall` overloads that go on while their caller does something else.

Each runs on a thread of its own once the one before it in its group has ended, and every other call of the group waits
for them first (`join`), so collectives keep the order of the program. The counterpart for `.default` is
torch_library/cpu/started.cpp.
"""

import itertools
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor

_numbers = itertools.count(1)
_calls: dict[int, tuple[str, Future]] = {}
_newest: dict[str, "_Thread"] = {}


class _Thread(threading.Thread):
    """Ends with the process, whatever it waits for."""

    def __init__(self, run: Callable[[], None]) -> None:
        super().__init__(target=run, daemon=True)


def start(op: str, kernel: Callable[..., Any], group: str, *arguments: Any) -> Tensor:
    """Begins kernel(*arguments), a call of `op` in `group`. Returns the ticket for `finish`, int64 [1]."""
    # The caller may write to its tensors as soon as this returns.
    kept = [argument.detach().clone() if isinstance(argument, Tensor) else argument for argument in arguments]
    call: Future = Future()
    before = _newest.get(group)

    def run() -> None:
        if before is not None:
            before.join()
        try:
            with torch.no_grad():
                call.set_result(kernel(*kept))
        except BaseException as error:
            call.set_exception(error)

    number = next(_numbers)
    _calls[number] = op, call
    _newest[group] = _Thread(run)
    _newest[group].start()
    return torch.tensor([number])


def finish(op: str, ticket: Tensor) -> Any:
    """The results of the call. Raises what it raised, or RuntimeError if there is none of `op` to be completed."""
    started_op, call = _calls.pop(int(ticket), (op, None))
    if call is None:
        raise RuntimeError(
            f"deep_ep.{op}: started must be what {op}_start returned in this process, and completes one call"
        )
    if started_op != op:
        raise RuntimeError(f"deep_ep.{op}: started must be what {op}_start returned, got that of {started_op}_start")
    return call.result()


def join(group: str) -> None:
    """Waits until all calls started in `group` have ended, unless this is one of them."""
    if group in _newest and not isinstance(threading.current_thread(), _Thread):
        _newest[group].join()
