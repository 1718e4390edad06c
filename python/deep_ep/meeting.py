"""How the ranks of a group meet before they have anything of their own to talk through: at the store of their group.

No collective of the caller's group is used: one that not all ranks come to would stay behind in it.
"""

import errno
import os
import pickle
import socket
import time
import weakref
from collections.abc import Iterable, MutableMapping
from concurrent.futures import Future
from datetime import timedelta
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, ProcessGroupGloo  # type: ignore[attr-defined]

from ._library import build

# Seconds between two looks at the store, at first and at most, and between two looks at the peers.
_PAUSES = 0.0005, 0.05
_LOOK = 0.5
_PROBE_TAG = 0x3DEE9E9

INIT = "deep_ep.init"

_meetings: MutableMapping[dist.ProcessGroup, int] = weakref.WeakKeyDictionary()


def group_timeout(group: dist.ProcessGroup) -> timedelta:
    """The timeout that the group was made with."""
    try:
        return group._get_backend(torch.device("cpu")).options._timeout
    except (RuntimeError, AttributeError):
        return dist.distributed_c10d.default_pg_timeout


def is_fake(group: dist.ProcessGroup) -> bool:
    """Whether its ranks do not exist, as in graphs that are made for many by one."""
    return dist.get_backend(group) == "fake"


class Process(NamedTuple):
    """Who a rank is."""

    host: str  # the machine; "" where /proc does not say it
    container: str  # the namespace of process ids
    user: str
    pid: int
    started: str  # when, by the clock of the machine; "" where /proc does not say it

    def has_ended(self) -> bool:
        """Whether that is known, which it may be on this host only."""
        if not self.host or (self.host, self.container) != _host():
            return False
        state, started = _status(self.pid)
        if state:
            return state in ("Z", "X") or started != self.started != ""
        # It may be hidden from this one.
        try:
            os.kill(self.pid, 0)
        except OSError as error:
            return error.errno == errno.ESRCH
        return False


def this_process() -> Process:
    real, effective, saved = os.getresuid()
    user = str(effective) if real == effective == saved else f"{effective} (real {real}, saved {saved})"
    return Process(*_host(), user, os.getpid(), _status(os.getpid())[1])


def _host() -> tuple[str, str]:
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot = file.read().strip()
        return f"{socket.gethostname()} ({boot})", os.readlink("/proc/self/ns/pid")
    except OSError:
        return "", ""


def _status(pid: int) -> tuple[str, str]:
    """State and start of a process, empty where /proc shows none."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return "", ""
    return fields[0], fields[19]


class Meeting:
    """One meeting of all ranks of a group, for any number of exchanges; a context manager.

    A rank that leaves it by an exception tells the others, whose exchange then raises RuntimeError, as it does when a
    rank has died, has come in another call than `call`, or has not come within `timeout`.
    """

    def __init__(self, group: dist.ProcessGroup, timeout: timedelta, call: str) -> None:
        self.call, self.timeout = call, timeout
        self.rank, self.size, self.name = group.rank(), group.size(), group.group_name
        self.number = _meetings.get(group, 0)
        # Also when it fails: who is late to this one must not meet those who try again.
        _meetings[group] = self.number + 1
        self.store: Any = PrefixStore(f"deep_ep/{self.number}", group.get_group_store())
        self.processes: list[Process] = []
        self.is_fake = is_fake(group)
        self._group = group
        self._round = 0

    def __enter__(self) -> "Meeting":
        # Plain values, which every build can read.
        builds, calls, *processes = zip(*self.exchange((build(), self.call, *this_process())), strict=True)
        if len(set(builds)) > 1:
            raise RuntimeError(
                f"{self.call}: the ranks of the group '{self.name}' have different builds of deep_ep: "
                f"{_by_rank('has', builds)}; install one on all of them"
            )
        if len(set(calls)) > 1:
            raise RuntimeError(
                f"{self.call}: ranks of the group '{self.name}' meet in different calls, {_by_rank('is in', calls)}; "
                "all must make the same calls in the same order"
            )
        self.processes = [Process(*process) for process in zip(*processes, strict=True)]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        if error is not None:
            self._leave(error)

    def exchange(self, mine: Any) -> list[Any]:
        """What every rank has for `mine`."""
        if self.is_fake:
            return [mine] * self.size
        keys = [f"{self._round}/{rank}" for rank in range(self.size)]
        self._round += 1
        self.store.set(keys[self.rank], pickle.dumps(mine))
        try:
            self._wait(lambda: self.store.check(keys), lambda: [r for r, k in enumerate(keys) if not self._has(k)])
        except BaseException as error:
            self._leave(error)
            raise
        everyone = [pickle.loads(self.store.get(key)) for key in keys]
        # By now all have read the round before.
        if self._round > 1:
            self.store.delete_key(f"{self._round - 2}/{self.rank}")
        return everyone

    def raise_everywhere(self, what: str, error: str | None) -> None:
        """Raises on all ranks what is an error on one."""
        errors = [f"rank {rank}: {text}" for rank, text in enumerate(self.exchange(error)) if text]
        if errors:
            raise RuntimeError(f"deep_ep: cannot make {what} for the group '{self.name}': {'; '.join(errors)}")

    def wait_for(self, result: "Future[Any]") -> Any:
        """The result of what goes on in another thread, and needs the peers."""
        self._wait(result.done, lambda: [rank for rank in range(self.size) if rank != self.rank])
        return result.result()

    def _wait(self, has_come: Any, missing: Any) -> None:
        pause, longest = _PAUSES
        started = looked = time.monotonic()
        while not has_come():
            now = time.monotonic()
            if pause == longest and self._has("left"):
                rank, reason = pickle.loads(self.store.get("left"))
                raise RuntimeError(f"{self.call}: rank {self.rank} waits for its peers: rank {rank} {reason}")
            if now - looked >= _LOOK:
                looked = now
                if dead := [self._named(rank) for rank in missing() if self._has_died(rank)]:
                    raise RuntimeError(
                        f"{self.call}: rank {self.rank} waits for its peers: {', '.join(dead)} "
                        f"{'has' if len(dead) == 1 else 'have'} died"
                    )
            if now - started > self.timeout.total_seconds():
                late = ", ".join(str(rank) for rank in missing())
                needed = "call deep_ep.init, or make a Buffer" if self.call == INIT else f"make this {self.call} on CPU"
                raise RuntimeError(
                    f"{self.call}: rank {self.rank} waited {self.timeout.total_seconds():g} s for rank {late} of the "
                    f"group '{self.name}'; all its ranks must {needed}"
                )
            time.sleep(pause)
            pause = min(2 * pause, longest)

    def _has(self, key: str) -> bool:
        return self.store.check([key])

    def _named(self, rank: int) -> str:
        return f"rank {rank}" + (f" (process {self.processes[rank].pid})" if self.processes else "")

    def _has_died(self, rank: int) -> bool:
        if self.processes and self.processes[rank].has_ended():
            return True
        try:
            backend = self._group._get_backend(torch.device("cpu"))
        except RuntimeError:
            return False
        # The only thing that is known of a rank that has not come yet: whether the group is still connected to it. A
        # receive that nobody sends to says so.
        return isinstance(backend, ProcessGroupGloo) and not is_connected(backend, rank)

    def _leave(self, error: BaseException) -> None:
        if isinstance(error, Exception):
            reason = f"gave up: {error}"
        else:
            reason = f"was interrupted ({type(error).__name__})"
        try:
            if not self._has("left"):
                self.store.set("left", pickle.dumps((self.rank, reason)))
        except RuntimeError:
            pass  # who keeps the store is gone


def _by_rank(verb: str, values: Iterable[str]) -> str:
    return ", ".join(f"rank {rank} {verb} {value}" for rank, value in enumerate(values))


def is_connected(backend: Any, rank: int) -> bool:
    """Whether gloo has a connection to the rank. Of one that has been lost it says so at once, and waits for none."""
    try:
        cast(Any, backend).recv([torch.empty(1, dtype=torch.uint8)], rank, _PROBE_TAG)
    except RuntimeError:
        return False
    return True
