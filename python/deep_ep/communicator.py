"""Collectives of a group for deep_ep alone: on connections of our own, so that they meet nobody else's.

A wait ends when the collective does, when a rank of the group has gone, after the group's timeout, or by an exception
of a signal handler, such as KeyboardInterrupt. Whatever ends it before the collective does, ends the communicator: this
rank tells its peers why, and leaves.

Who has gone is known by gloo's connections, on any number of hosts: from its making on every rank is in a collective
that receives from all others, and that nobody sends to. It fails as soon as one connection is lost, and then every
connection says whether it is the one. A rank that leaves, and can say so, has written why into its peers' `_inbox`.
"""

import atexit
import contextlib
import ctypes
import os
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from datetime import timedelta
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroupGloo, Store, distributed_c10d  # type: ignore[attr-defined]

from .meeting import Meeting, Process, is_connected
from .worker import Worker

# A wait looks up from its collective so often: for signals, for peers that have gone, for its deadline.
_SLICE = timedelta(milliseconds=100)
# Once a rank has left, those that remain are looked at so often.
_LOOK = 0.2
# How long a rank that leaves waits for its last words to go out, and a process for its calls to end.
_LAST_WORDS = 1.0
# After this part of its time a wait makes known that it waits, and so who is missing.
_MAKE_KNOWN = 0.25
# Deadlines are kept here, by name; gloo's own say no names.
_FOREVER = timedelta(days=365)
_FAREWELL_TAG = 1
_TEXT_BYTES = 512
# How a rank has gone.
_SILENT, _LEFT, _GAVE_UP = range(3)

_open: dict[str, "Communicator"] = {}


class Farewell(NamedTuple):
    """The last word of a rank."""

    kind: int
    collectives: int  # which it has completed
    text: str

    def to_bytes(self) -> bytes:
        text = self.text.encode()[: _TEXT_BYTES - 9]
        return (bytes([self.kind]) + self.collectives.to_bytes(8, "little") + text).ljust(_TEXT_BYTES, b"\0")

    @staticmethod
    def of(data: bytes) -> "Farewell":
        return Farewell(data[0], int.from_bytes(data[1:9], "little"), data[9:].rstrip(b"\0").decode(errors="ignore"))


class _Links:
    """What a communicator holds of torch.distributed: it goes as a whole."""

    def __init__(self, group: dist.ProcessGroup, meeting: Meeting, timeout: timedelta) -> None:
        self.rank, self.size = group.rank(), group.size()
        store = PrefixStore("communicator", meeting.store)
        # That of fake ranks talks to nobody.
        fake: Any = group._get_backend(group._device_types[0]) if meeting.is_fake else None
        self.host: Any = fake or _gloo(group, store, meeting.timeout)
        self.by_device: dict[str, Any] = {}
        for device in group._device_types:
            theirs = group._get_backend(device)
            same = fake is not None or device.type == "cpu" or isinstance(theirs, ProcessGroupGloo)
            self.by_device[device.type] = self.host if same else _like(theirs, group, device, store, timeout)
        self.inbox = torch.zeros(self.size, _TEXT_BYTES, dtype=torch.uint8)
        self.watch: Any = None
        self._remaining, self._looked = self._peers(), 0.0
        if self.size > 1 and fake is None:
            self._receives = [self.host.recv([self.inbox[rank]], rank, _FAREWELL_TAG) for rank in self._peers()]
            self._nothing = torch.empty(self.size, 1, dtype=torch.uint8)
            options = dist.GatherOptions()
            options.rootRank = self.rank
            self.watch = self.host.gather([list(self._nothing.unbind(0))], [self._nothing[self.rank].clone()], options)

    def _peers(self) -> list[int]:
        return [rank for rank in range(self.size) if rank != self.rank]

    def backend(self, device: str | None) -> Any:
        """For tensors on the device; None is the host."""
        return self.host if device is None else self.by_device[device]

    def is_anyone_lost(self) -> bool:
        return self.watch is not None and self.watch.is_completed()

    def lost(self, at_once: bool) -> list[int]:
        """The ranks to which there is no connection any more. Not at once: what was known shortly before will do."""
        if at_once or time.monotonic() - self._looked > _LOOK:
            self._looked = time.monotonic()
            self._remaining = [rank for rank in self._remaining if is_connected(self.host, rank)]
        return [rank for rank in self._peers() if rank not in self._remaining]

    def farewell(self, rank: int) -> Farewell:
        return Farewell.of(bytes(self.inbox[rank].tolist()))

    def say(self, farewell: Farewell) -> None:
        """Sends it to all peers that can hear it."""
        data = torch.tensor(list(farewell.to_bytes()), dtype=torch.uint8)
        sends = []
        for rank in self._peers():
            with contextlib.suppress(RuntimeError):
                sends.append(self.host.send([data], rank, _FAREWELL_TAG))
        deadline = time.monotonic() + _LAST_WORDS
        for send in sends:
            with contextlib.suppress(RuntimeError):
                send.wait(timedelta(seconds=max(0.001, deadline - time.monotonic())))

    def cut(self, failed: bool) -> None:
        """Ends all connections, and with them what goes on in them."""
        for rank in self._peers():
            # gloo has no other way: a receive whose time is over closes the connections to all ranks.
            with contextlib.suppress(RuntimeError):
                self.host.recv([torch.empty(1, dtype=torch.uint8)], rank, _FAREWELL_TAG + 1).wait(
                    timedelta(milliseconds=1)
                )
        for backend in {id(one): one for one in self.by_device.values() if one is not self.host}.values():
            with contextlib.suppress(RuntimeError):
                backend.abort() if failed else backend.shutdown()


def _gloo(group: dist.ProcessGroup, store: Store, timeout: timedelta) -> Any:
    """On the network devices of the group's own gloo, if it has one."""
    options = cast(Any, ProcessGroupGloo)._Options()
    options._devices = []
    for device in group._device_types:
        theirs = group._get_backend(device)
        if isinstance(theirs, ProcessGroupGloo):
            options._devices = cast(Any, theirs.options)._devices
    options._devices = options._devices or [ProcessGroupGloo.create_default_device()]
    # One of them is in `watch`. A single one for the rest would, on a busy machine, have to wait for its next slice.
    options._threads = 3
    options._timeout = timeout
    backend = ProcessGroupGloo(PrefixStore("host", store), group.rank(), group.size(), options)
    cast(Any, backend)._set_default_timeout(_FOREVER)
    return backend


def _like(theirs: Any, group: dist.ProcessGroup, device: torch.device, store: Store, timeout: timedelta) -> Any:
    """Another backend of the kind of the group's own on such devices."""
    store, rank, size = PrefixStore(device.type, store), group.rank(), group.size()
    name = theirs.name()
    plugin = dist.Backend._plugins.get(name.upper())
    if plugin is None:
        options = type(theirs).Options()
        options._timeout = timeout
        options.global_ranks_in_group = dist.get_process_group_ranks(group)
        return type(theirs)(store, rank, size, options)
    if not plugin.extended_api:
        return plugin.creator_fn(store, rank, size, timeout)
    asked = cast(Any, distributed_c10d)._DistributedBackendOptions()
    asked.store, asked.group_rank, asked.group_size, asked.timeout = store, rank, size, timeout
    asked.group_id = f"deep_ep/{group.group_name}/{device.type}"
    asked.global_ranks_in_group = dist.get_process_group_ranks(group)
    return plugin.creator_fn(asked, None)


class Communicator:
    """Of one group, until `close()` or until the group is gone. Made by all ranks together.

    Its calls come one after the other: whoever is not a task of `worker` joins that first.
    """

    def __init__(self, group: dist.ProcessGroup, meeting: Meeting, timeout: timedelta) -> None:
        self.name, self.rank, self.size, self.timeout = group.group_name, group.rank(), group.size(), timeout
        self.devices = [device.type for device in group._device_types]
        self.worker = Worker()
        self._processes: list[Process] = meeting.processes
        self._store = PrefixStore("waits", meeting.store)
        self._lock = threading.Lock()
        self._completed = 0
        self._gone: str | None = None
        links: Future[_Links] = Future()
        # gloo connects without an eye on signals and peers.
        threading.Thread(target=_fulfil, args=(links, lambda: _Links(group, meeting, timeout)), daemon=True).start()
        try:
            self._links: _Links | None = meeting.wait_for(links)
        except BaseException:
            links.add_done_callback(_cut_unwanted)
            raise
        self._group = weakref.ref(group)
        self._finalizer = weakref.finalize(group, self._leave)
        self._finalizer.atexit = False  # as `_let_go` has it
        _communicators.add(self)

    @property
    def usable(self) -> bool:
        return self._gone is None

    def is_of(self, group: dist.ProcessGroup) -> bool:
        return self._group() is group

    def publish(self) -> None:
        """Calls on the group of this name use it from now on."""
        _open[self.name] = self

    def close(self) -> None:
        """Leaves: peers that still wait for this rank raise, and calls that go on."""
        self._finalizer.detach()
        self._leave()

    def join(self) -> None:
        """Waits until all calls that have been started have ended, unless this is one of them."""
        with self.giving_up_if_interrupted():
            self.worker.join()

    @contextlib.contextmanager
    def giving_up_if_interrupted(self) -> Iterator[None]:
        """Around waits: what is not an error of a call comes from a signal's handler."""
        try:
            yield
        except Exception:
            raise
        except BaseException as error:
            self.give_up(f"was interrupted ({type(error).__name__})")
            raise

    def start(self, task: Callable[[], None]) -> None:
        """Runs the task, which raises nothing, behind those that have been started."""
        self.worker.run(task) if self.usable else task()

    def all_gather(self, op: str, what: str, row: Tensor) -> Tensor:
        """[R, n] on the host, of every rank's [n] there."""
        gathered = torch.empty(self.size, row.numel(), dtype=row.dtype)
        self._run(op, what, None, lambda backend: backend.allgather([list(gathered.unbind(0))], [row]))
        return gathered

    def all_to_all(self, op: str, what: str, out: Tensor, rows: Tensor, of: list[int], to: list[int]) -> None:
        """Sends to[i] rows to rank i; out gets the of[i] rows of every rank i, ordered by i."""
        self._run(op, what, rows.device.type, lambda backend: backend.alltoall_base(out, rows, of, to))

    def give_up(self, reason: str) -> None:
        """Ends it on this rank, for good, and tells the peers."""
        self._go(Farewell(_GAVE_UP, self._completed, reason))

    def _leave(self) -> None:
        self._go(Farewell(_LEFT, self._completed, "has left the group"))

    def _go(self, farewell: Farewell) -> None:
        with self._lock:
            links, self._links = self._links, None
            if links is None:
                return
            self._gone = farewell.text
        if _open.get(self.name) is self and farewell.kind == _LEFT:
            del _open[self.name]
        links.say(farewell)
        links.cut(failed=farewell.kind == _GAVE_UP)
        self.worker.close()

    def _run(self, op: str, what: str, device: str | None, issue: Callable[[Any], Any]) -> None:
        links = self._links
        if links is None:
            raise RuntimeError(
                f"deep_ep.{op}: the group '{self.name}' was given up on this rank, which {self._gone}; call "
                "deep_ep.init(group) on all its ranks, or make a new group"
            )
        try:
            if reason := self._missed():
                raise RuntimeError(reason)
            work = issue(links.backend(device))
            if links.backend(device) is links.host:
                self._wait(op, work)
            else:
                work.wait()  # has the device's stream wait
        except RuntimeError as error:
            reason = self._gone or self._missed(by_failure=True) or str(error)
            self.give_up(f"gave up: {reason}")
            # Who keeps the error must not keep the connections.
            del links
            traceback.clear_frames(error.__traceback__)
            raise RuntimeError(f"deep_ep.{op}: rank {self.rank} waits for {what} of its peers: {reason}") from error
        except BaseException as error:
            self.give_up(f"was interrupted ({type(error).__name__})")
            raise
        self._completed += 1

    def _wait(self, op: str, work: Any) -> None:
        begun, timeout, is_known = time.monotonic(), self.timeout.total_seconds(), False
        while True:
            try:
                work.wait(_SLICE)
                return
            except RuntimeError:
                if work.is_completed():
                    work.wait()  # raises what is wrong, if anything is
                    return
            if reason := self._gone or self._missed():
                raise RuntimeError(reason)
            seconds = time.monotonic() - begun
            if not is_known and seconds > _MAKE_KNOWN * timeout:
                is_known = True
                with contextlib.suppress(RuntimeError):
                    self._store.set(str(self.rank), f"{self._completed} {op}")
            if seconds > timeout:
                raise RuntimeError(f"waited {timeout:g} s for {self._late()}")

    def _missed(self, by_failure: bool = False) -> str | None:
        """Who has gone without having done its part of the next collective, and why. By failure: one has failed."""
        links = self._links
        if links is None or not (by_failure or links.is_anyone_lost()):
            return None
        farewells = {rank: links.farewell(rank) for rank in links.lost(by_failure)}
        if silent := [rank for rank, farewell in farewells.items() if farewell.kind == _SILENT]:
            return f"{self._names(silent)} {'has' if len(silent) == 1 else 'have'} died"
        gone = [
            f"rank {rank} {farewell.text}"
            for rank, farewell in farewells.items()
            if farewell.kind == _GAVE_UP or farewell.collectives <= self._completed
        ]
        return "; ".join(gone) or None

    def _late(self) -> str:
        """The ranks that do not wait for what this one waits for."""

        def waits(rank: int) -> bool:
            key = str(rank)
            return self._store.check([key]) and int(self._store.get(key).split()[0]) == self._completed

        try:
            late = [rank for rank in range(self.size) if rank != self.rank and not waits(rank)]
        except RuntimeError:
            late = []  # who keeps the store is gone
        return self._names(late) if late else "its peers"

    def _names(self, ranks: list[int]) -> str:
        return ", ".join(f"rank {rank} (process {self._processes[rank].pid})" for rank in ranks)


def _fulfil(future: Future[Any], make: Callable[[], Any]) -> None:
    try:
        future.set_result(make())
    except BaseException as error:
        future.set_exception(error)


def _cut_unwanted(links: "Future[_Links]") -> None:
    """Nobody has waited for them."""
    if links.exception() is None:
        links.result().cut(failed=True)


def find(group: str) -> Communicator | None:
    """That of the group of this name, if it has one."""
    found = _open.get(group)
    if found is None:
        return None
    try:
        owner = cast(Any, distributed_c10d)._resolve_process_group(group)
    except RuntimeError:
        return None
    return found if found.is_of(owner) else None


def of(op: str, group: str) -> Communicator:
    """That of the group of this name. RuntimeError: it has none."""
    found = find(group)
    if found is None:
        raise RuntimeError(
            f"deep_ep.{op}: the group '{group}' is gone, or not prepared for the strategy alltoall on this rank; "
            "call deep_ep.init(group) with it first, on all its ranks"
        )
    return found


_communicators: "weakref.WeakSet[Communicator]" = weakref.WeakSet()


@atexit.register
def _let_go() -> None:
    """Gives calls that go on the time to end, and ends the others: a thread that asks for the interpreter while that
    ends, as CPython before 3.14 has it, takes the process down with it.
    """
    communicators = list(_communicators)
    deadline = time.monotonic() + _LAST_WORDS
    for communicator in communicators:
        communicator.worker.wait_for_tasks(deadline - time.monotonic())
    for communicator in communicators:
        communicator._leave()
    for communicator in communicators:
        communicator.worker.wait_for_end(_LAST_WORDS)


def _leave_to_parent() -> None:
    """In a forked child: connections and threads are the parent's, and not even gloo's destructors may touch them."""
    for communicator in list(_communicators):
        links, communicator._links = communicator._links, None
        if links is not None:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(links))
            communicator._gone = "was forked from the one that is in the group"


os.register_at_fork(after_in_child=_leave_to_parent)
