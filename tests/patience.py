"""How long tests wait: by the time that processes have had, whatever else the machine is busy with.

A limit on the wall clock fails a test when others use the machine. `Patience` limits how long processes sleep and what
they use, `own_time` is the clock without what others took, `pace` is for deadlines that have to pass.
"""

import faulthandler
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterable
from types import FrameType
from typing import TypeVar

import pytest

Result = TypeVar("Result")

# Whoever waits asks its Patience so often, in seconds.
INTERVAL = 0.5
# Seconds of sleep after which processes have hung, and those after which a test has: it may wait for several of them.
TIMEOUT = 60.0
TEST_TIMEOUT = 300.0
# A second of sleep is worth so many of work, and so many on the wall.
WORK = 10.0
WALL = 100.0
# What a burst of others' work may make of the pace: who waits for deadlines of it must not seem to hang.
HIGHEST_PACE = 20.0

_TICK = 1 / os.sysconf("SC_CLK_TCK")
_ASLEEP = "SIZX"  # states of a thread: sleeping, idle, dead


class Patience:
    """With processes: over when nothing has happened in them for long.

    That is when all threads of all of them and of their descendants have slept for `timeout` seconds, or when one of
    `pids` has used WORK times as much CPU time since the first look. A thread that waits for a core does not sleep,
    nor does one that is stopped; this still counts as 1 / WALL, so that in the end everything is over.
    """

    def __init__(self, pids: Iterable[int], timeout: float = TIMEOUT, clock: Callable[[], float] = time.monotonic):
        self.pids, self.timeout = list(pids), timeout
        self.asleep, self.used = 0.0, 0.0
        self._clock, self._looked = clock, clock()
        self._used_before: dict[int, float] | None = None

    def is_over(self) -> bool:
        """Looks at the processes, unless it has just done so."""
        now = self._clock()
        if now - self._looked >= INTERVAL:
            # Whoever comes late to look was itself kept from it.
            self._looked = now
            self._look()
        return self.asleep > self.timeout or self.used > WORK * self.timeout

    def _look(self) -> None:
        parents, used = _processes()
        before = self._used_before = self._used_before or used
        self.used = max((used.get(pid, 0.0) - before.get(pid, 0.0) for pid in self.pids), default=0.0)
        family = set(self.pids)
        while more := {pid for pid, parent in parents.items() if parent in family} - family:
            family |= more
        self.asleep += INTERVAL if all(map(_sleeps, family)) else INTERVAL / WALL


def wait_until(ready: Callable[[float], bool], pids: Iterable[int], timeout: float = TIMEOUT) -> bool:
    """Whether ready(seconds), which waits so long at most, was true before the patience with `pids` was over."""
    patience = Patience(pids, timeout)
    while not ready(INTERVAL):
        if patience.is_over():
            return ready(0.0)
    return True


class Watch(threading.Thread):
    """Ends a test in which this process and its descendants have hung: it fails, and shows the stacks of this process.

    If it cannot fail, since it waits where Python gets no signals, the process ends: the session, or a worker of
    pytest-xdist, which says so. A plugin for pytest, to be made in pytest_configure.
    """

    def __init__(self, timeout: float = TEST_TIMEOUT) -> None:
        super().__init__(name="watch", daemon=True)
        self._timeout, self._test, self._has_told = timeout, "", False
        self._patience: Patience | None = None
        self._stderr = os.dup(2)  # tests are given another one
        signal.signal(signal.SIGALRM, self._fail)
        self.start()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        self._test, self._patience, self._has_told = item.nodeid, Patience([os.getpid()], self._timeout), False
        try:
            return (yield)
        finally:
            self._patience = None

    def run(self) -> None:
        while True:
            time.sleep(INTERVAL)
            patience = self._patience
            if patience is None or not patience.is_over():
                continue
            if self._has_told:
                os.write(self._stderr, f"{self._test} hangs, and cannot be interrupted\n".encode())
                faulthandler.dump_traceback(self._stderr)
                os._exit(1)
            self._patience, self._has_told = Patience(patience.pids, self._timeout), True
            faulthandler.dump_traceback(2)
            signal.pthread_kill(threading.main_thread().ident, signal.SIGALRM)

    def _fail(self, signum: int, frame: FrameType | None) -> None:
        pytest.fail(f"{self._test} hangs")


def own_time(call: Callable[[], Result]) -> tuple[Result, float]:
    """What call() returns, and when, by the clock that all processes share, less the time that this thread has waited
    for a core meanwhile.
    """
    before = _kept_waiting()
    result = call()
    return result, time.monotonic() - (_kept_waiting() - before)


def pace() -> float:
    """How many times as long as on an idle machine things take now, for deadlines that must not pass too early."""
    begin, used = time.monotonic(), time.thread_time()
    while (took := time.thread_time() - used) < 0.05:
        pass
    return min(max(1.0, (time.monotonic() - begin) / took), HIGHEST_PACE)


def _processes() -> tuple[dict[int, int], dict[int, float]]:
    """Of every process its parent, and the CPU time that it and its children that have ended have used."""
    parents, used = {}, {}
    for name in os.listdir("/proc"):
        if name.isdigit() and (fields := _stat(f"/proc/{name}/stat")):
            parents[int(name)] = int(fields[1])
            used[int(name)] = _TICK * sum(map(int, fields[11:15]))
    return parents, used


def _sleeps(pid: int) -> bool:
    """Whether all of its threads do, but for the one that asks."""
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except FileNotFoundError:
        return True
    own = str(threading.get_native_id())
    states = (_stat(f"/proc/{pid}/task/{thread}/stat")[:1] for thread in threads if thread != own)
    return all(not state or state[0] in _ASLEEP for state in states)


def _stat(path: str) -> list[str]:
    """Fields of a process or thread from its state on; none if it is gone."""
    try:
        with open(path) as file:
            return file.read().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def _kept_waiting() -> float:
    with open("/proc/thread-self/schedstat") as file:
        return 1e-9 * int(file.read().split()[1])
