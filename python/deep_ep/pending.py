"""Calls of the `.alltoall` overloads that go on while their caller does something else.

They run one after the other on a thread of their group, and every other call of the group waits for them first
(`join`), so collectives keep the order of the program. The counterpart for `.default` is torch_library/started.cpp.
"""

import atexit
import concurrent.futures
import inspect
import itertools
import queue
import struct
import threading
import weakref
from collections.abc import Callable, MutableMapping, Sequence
from concurrent.futures import Future
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, distributed_c10d

from .calls import Failed, mine

# Below 0, where those of .default are not.
_numbers = itertools.count(-1, -1)


class _Call(Future):
    """One that goes on. Its result is a list of tensors."""

    def __init__(self, op: str) -> None:
        super().__init__()
        self.op = op
        self.early: list[Tensor] = []
        self._lock = threading.Lock()

    def arriving(self, make: Callable[[], Sequence[Tensor]] | None) -> list[Tensor]:
        """The tensors of the result, which are made now if they can be, and are filled in when it is there.

        Without, it raises what the call raised.
        """
        with self._lock:
            if make is not None and (not self.done() or self.exception() is not None):
                self.early = list(make())
                spoil(self.early)
                return self.early
        return self.result()

    def run(self, kernel: Callable[..., Any], arguments: list[Any], failed: Failed | None, form: str) -> None:
        mine.form = form
        try:
            if failed is not None and failed.error is not None:
                raise failed.error
            with torch.no_grad():
                results = kernel(*arguments)
            results = [results] if isinstance(results, Tensor) else list(results)
            with self._lock:
                for early, result in zip(self.early, results, strict=False):
                    write(early, result)
                self.set_result(self.early or results)
        except BaseException as error:
            if failed is not None:
                failed.error = error
            spoil(self.early)
            self.set_exception(error)


def write(to: Tensor, of: Tensor) -> None:
    """Writes behind torch's back: autograd, version counters and grad mode do not see it."""
    with torch.inference_mode():
        to.data.copy_(of)


def spoil(tensors: Sequence[Tensor]) -> None:
    """Makes values out of nothing, in the same way: NaN, and -1."""
    for tensor in tensors:
        with torch.inference_mode():
            tensor.data.view(-1).view(torch.uint8).fill_(0xFF)


_calls: dict[int, _Call] = {}


class _Worker:
    """The thread of a group. It ends with the group, and with the process, whatever it waits for."""

    def __init__(self, group: ProcessGroup) -> None:
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(name="deep_ep", target=_work, args=(self._tasks,), daemon=True)
        self.newest: Future = Future()
        self._thread.start()
        weakref.finalize(group, self._tasks.put, None)

    def run(self, call: _Call, kernel: Callable[..., Any], arguments: list[Any]) -> None:
        self.newest = call
        failed, form = mine.failed, mine.form
        self._tasks.put(lambda: call.run(kernel, arguments, failed, form))
        mine.leave_to_thread()

    def join(self) -> None:
        if threading.current_thread() is not self._thread:
            concurrent.futures.wait([self.newest])


def _work(tasks: "queue.SimpleQueue[Callable[[], None] | None]") -> None:
    while (task := tasks.get()) is not None:
        task()
        del task  # and with it the tensors that it holds


_workers: MutableMapping[ProcessGroup, _Worker] = weakref.WeakKeyDictionary()


@atexit.register
def _let_go() -> None:
    """Gives calls that go on the time to end, or to come to where they wait for a peer: a thread that asks for the
    interpreter while that ends, as CPython before 3.14 has it, takes the process down with it.
    """
    concurrent.futures.wait([worker.newest for worker in _workers.values()], timeout=1.0)


def place_of_group(kernel: Callable[..., Any]) -> int:
    """Which of the arguments of `kernel` is the group."""
    return list(inspect.signature(kernel).parameters).index("group")


def starting(op: str, kernel: Callable[..., Any]) -> Callable[..., Tensor]:
    """The kernel of `<op>_start`, of that of `op`."""
    place = place_of_group(kernel)

    def start(*arguments: Any) -> Tensor:
        kept = [argument.detach() if isinstance(argument, Tensor) else argument for argument in arguments]
        group = _group(arguments[place])
        if group is None:
            kernel(*arguments)  # says what is wrong
        assert group is not None
        if group not in _workers:
            _workers[group] = _Worker(group)
        call = _Call(op)
        _workers[group].run(call, kernel, kept)
        return _ticket(call)

    return start


def holding(op: str, kernel: Callable[..., Any]) -> Callable[..., Tensor]:
    """The kernel of `<op>_start` where that of `op` waits for nobody, since it queues work on a stream."""

    def start(*arguments: Any) -> Tensor:
        call = _Call(op)
        call.run(kernel, list(arguments), mine.failed, mine.form)
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
    return call.result()


def arriving(op: str, ticket: Tensor, make: Callable[[], Sequence[Tensor]] | None) -> list[Tensor]:
    """The same, without waiting for the call if `make` makes the tensors that will hold the results.

    The ticket stays good for `finish`.
    """
    return _find("arriving", op, ticket).arriving(make)


def _find(caller: str, op: str, ticket: Tensor) -> _Call:
    call = _calls.get(int(ticket))
    if call is None:
        raise RuntimeError(
            f"deep_ep.{caller}: ticket must be what {op}_start returned in this process, and is good for one wait"
        )
    if call.op != op:
        raise RuntimeError(f"deep_ep.{caller}: ticket must be what {op}_start returned, got that of {call.op}_start")
    return call


def join(group: str) -> None:
    """Waits until all calls started in `group` have ended, unless this is one of them."""
    pg = _group(group)
    if pg is not None and pg in _workers:
        _workers[pg].join()


def _group(name: str) -> ProcessGroup | None:
    try:
        return cast(Any, distributed_c10d)._resolve_process_group(name)
    except RuntimeError:
        return None
