"""Processes that act as ranks in tests.

`RankPool` holds its processes for the whole pytest session and runs functions on the first R of them.
`spawn_ranks` starts processes of its own, for tests that kill ranks or make process groups again.

A function that runs on ranks is top-level in a module that the ranks can import (a test module will do), is
called as fn(ctx, *args) with a RankContext, and returns something that can be pickled. The store that the
ranks meet at lives in the parent, so that it outlives every rank.
"""

import contextlib
import datetime
import faulthandler
import gc
import multiprocessing
import multiprocessing.connection
import os
import pickle
import resource
import shutil
import signal
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from patience import INTERVAL, TIMEOUT, Patience, wait_until

import deep_ep

WORLD_SIZE = 4
STRATEGIES = ("default", "alltoall")
# For tests that are quick under one of them only.
ALLTOALL_IS_SLOW = ("default", pytest.param("alltoall", marks=pytest.mark.slow))

# Small enough that four ranks with a window per group fit anywhere; larger payloads go in rounds.
WINDOW_BYTES = 32 << 20

# A lost message is a hang, which Patience notices: what others take of the machine is in the deadline of a collective.
GROUP_TIMEOUT = datetime.timedelta(hours=1)
# Once a rank has failed, the others have GRACE to fail too.
GRACE = 2.0
EXIT_TIMEOUT = 10.0

# The server imports once, in a process that starts no threads, and the ranks are its forks. deep_ep is first, as in
# programs: what it does to the compiler it does when that comes.
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["deep_ep", "torch._inductor.compile_fx", "hypothesis", "pytest"])


class RankError(Exception):
    """What went wrong on the ranks of a run.

    `exceptions` has one entry per rank, None where the rank returned.
    """

    def __init__(self, message: str, exceptions: list[BaseException | None]):
        super().__init__(message)
        self.exceptions = exceptions


class RankDied(Exception):
    """The process of a rank ended before it returned."""


class RankHung(Exception):
    """A rank did not return. It was killed when Patience with the ranks of the run was over."""


@dataclass
class RankContext:
    """What a function on a rank gets.

    `group` has the ranks 0 .. size-1 and was not given to deep_ep.init; it is WORLD if it has all
    ranks. `store` reaches the store in the parent.
    """

    rank: int
    size: int
    store: dist.Store
    group: dist.ProcessGroup | None = None
    _groups: dict[str, dist.ProcessGroup] = field(default_factory=dict)
    _num_bytes: dict[str, int] = field(default_factory=dict)
    _generation: int = 0

    def init_process_group(self) -> None:
        """Makes WORLD, collectively. After dist.destroy_process_group() it can be called again."""
        store = dist.PrefixStore(f"world-{self._generation}", self.store)
        self._generation += 1
        dist.init_process_group("gloo", store=store, rank=self.rank, world_size=self.size, timeout=GROUP_TIMEOUT)
        self.group = dist.group.WORLD
        self.make_groups()

    def make_groups(self) -> None:
        """Makes the groups of this size, collectively over WORLD."""
        ranks = list(range(self.size))
        if self.size < dist.get_world_size():
            self.group = dist.new_group(ranks, timeout=GROUP_TIMEOUT)
        self._groups = {strategy: dist.new_group(ranks, timeout=GROUP_TIMEOUT) for strategy in STRATEGIES}
        self._num_bytes.clear()

    def prepared_group(self, strategy: str, num_bytes: int = WINDOW_BYTES) -> dist.ProcessGroup:
        """The group of the ranks 0 .. size-1 that is for this strategy, ready for deep_ep's ops.

        deep_ep.init runs at the first call, and again where num_bytes changes. Collective over the group.
        """
        group = self._groups[strategy]
        if self._num_bytes.get(strategy) != num_bytes:
            if strategy in self._num_bytes:
                self.unprepare(strategy)
            deep_ep.init(group, strategy=strategy, num_bytes=num_bytes)
            self._num_bytes[strategy] = num_bytes
        return group

    def unprepare(self, strategy: str) -> None:
        """Of this group: for a test that changes what all its calls do, as DEBUG_MODE does. Collective over it."""
        deep_ep.destroy(self._groups[strategy])
        del self._num_bytes[strategy]


@dataclass
class Outcome:
    """How a run ended on one rank."""

    value: Any = None
    exception: BaseException | None = None
    traceback: str = ""


class Ranks:
    """`world_size` processes that stand ready, with a gloo WORLD if `init` is set.

    `fresh` ones have loaded nothing but what they need, as programs have that compile for the first time. A context
    manager: leaving it ends them.
    """

    def __init__(self, world_size: int, *, init: bool = True, fresh: bool = False):
        context = multiprocessing.get_context("spawn") if fresh else _processes
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._folder = Path(tempfile.mkdtemp(prefix="deep_ep-ranks-"))
        self._connections: list[multiprocessing.connection.Connection] = []
        self._running = 0
        self._pending: set[int] = set()
        self._ended: dict[int, Outcome] = {}  # that `outcomes` has not returned
        self.processes: list[BaseProcess] = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve,
                args=(theirs, rank, world_size, self.store.port, str(self._stack_file(rank)), init),
                name=f"rank {rank}",
                daemon=True,
            )
            process.start()
            theirs.close()
            self._connections.append(ours)
            self.processes.append(process)

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self.processes]

    def submit(self, size: int, fn: Callable, *args: Any) -> None:
        """Starts fn(ctx, *args) on the ranks 0 .. size-1. `outcomes` waits for the end."""
        request = pickle.dumps((size, fn, args))
        self._running = size
        self._pending = set(range(size))
        for connection in self._connections[:size]:
            connection.send_bytes(request)

    def wait_for(self, key: str) -> None:
        """Until a rank has set the key in the store. RankError: a rank has failed, or all wait for something else."""

        def is_set(seconds: float) -> bool:
            if self.store.check([key]):
                return True
            self._collect(min(seconds, 0.01))
            return not self._pending or any(outcome.exception for outcome in self._ended.values())

        wait_until(is_set, self.pids)
        if not self.store.check([key]):
            raise_failures(self.outcomes(timeout=0.0))
            raise AssertionError(f"no rank has set {key!r}")

    def outcomes(
        self,
        *,
        timeout: float = TIMEOUT,
        grace: float | None = None,
        is_wrong: Callable[[Any], object] = lambda value: False,
    ) -> list[Outcome]:
        """The outcome of every rank of the run.

        Ranks that have not returned when `timeout` seconds of Patience with all of them are over, or `grace` seconds
        after another one's failure, an exception or a value that is wrong, are killed; their exception is a RankHung,
        their traceback the Python stacks.
        """
        pids = self.pids[: self._running]
        patience, failed = Patience(pids, timeout), False
        while self._pending and not patience.is_over():
            for outcome in self._collect(INTERVAL):
                has_failed = outcome.exception is not None or is_wrong(outcome.value)
                if has_failed and grace is not None and not failed:
                    patience, failed = Patience(pids, grace), True
        for rank in self._pending:
            self.kill(rank, signal.SIGABRT)
        for rank in self._pending:
            stacks = self._death(rank).traceback
            self._ended[rank] = Outcome(exception=RankHung(f"rank {rank} did not return"), traceback=stacks)
        self._pending.clear()
        ended, self._ended = self._ended, {}
        return [ended[rank] for rank in range(self._running)]

    def _collect(self, seconds: float) -> list[Outcome]:
        """The outcomes of the ranks that have ended, or do so in this time."""
        waiting = {self._connections[rank]: rank for rank in self._pending}
        collected = []
        for connection in multiprocessing.connection.wait(list(waiting), seconds):
            rank = waiting[connection]
            self._pending.remove(rank)
            try:
                self._ended[rank] = pickle.loads(connection.recv_bytes())
            except (EOFError, ConnectionError):
                self._ended[rank] = self._death(rank)
            collected.append(self._ended[rank])
        return collected

    def kill(self, rank: int, signum: int = signal.SIGKILL) -> None:
        os.kill(self.processes[rank].pid, signum)

    def close(self) -> None:
        """Ends the processes, by force where a rank is still in a run."""
        for rank in self._pending:
            self.processes[rank].kill()
        for connection in self._connections:
            connection.close()
        for process in self.processes:
            _join(process)
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _stack_file(self, rank: int) -> Path:
        return self._folder / f"stacks-{rank}"

    def _death(self, rank: int) -> Outcome:
        process = self.processes[rank]
        _join(process)
        stack_file = self._stack_file(rank)
        stacks = stack_file.read_text() if stack_file.exists() else ""
        return Outcome(exception=RankDied(f"rank {rank} ended with exit code {process.exitcode}"), traceback=stacks)


class RankPool:
    """`world_size` ranks, started at the first run, with process groups if `init` is set, `fresh` as `Ranks` has it.

    A run that fails ends them, since nobody knows what it leaves in the groups; the next one starts anew.
    """

    def __init__(self, world_size: int = WORLD_SIZE, *, init: bool = True, fresh: bool = False) -> None:
        self._world_size, self._init, self._fresh = world_size, init, fresh
        self._ranks: Ranks | None = None

    def run(
        self,
        size: int,
        fn: Callable,
        *args: Any,
        expect_errors: bool = False,
        timeout: float = TIMEOUT,
        is_wrong: Callable[[Any], object] = lambda value: False,
    ) -> list[Any]:
        """Calls fn(ctx, *args) on the ranks 0 .. size-1 and returns what they return, by rank.

        Raises RankError with the tracebacks of all ranks if one of them failed or hung. When what a rank returns
        is_wrong, the others have GRACE as if it had failed: they may wait for it in vain. With expect_errors it
        returns the exceptions by rank instead (None where the rank returned), and only a hang raises.
        """
        if self._ranks is None:
            self._ranks = Ranks(self._world_size, init=self._init, fresh=self._fresh)
        try:
            self._ranks.submit(size, fn, *args)
            outcomes = self._ranks.outcomes(timeout=timeout, grace=None if expect_errors else GRACE, is_wrong=is_wrong)
        except BaseException:
            self.close()
            raise
        exceptions = [outcome.exception for outcome in outcomes]
        if any(exception is not None for exception in exceptions):
            self.close()
        if expect_errors and not any(isinstance(exception, RankHung) for exception in exceptions):
            return exceptions
        raise_failures(outcomes)
        return [outcome.value for outcome in outcomes]

    def close(self) -> None:
        if self._ranks is not None:
            ranks, self._ranks = self._ranks, None
            ranks.close()


@contextlib.contextmanager
def vector_units() -> Iterator[None]:
    """Inductor compiles for them, as it does for users; conftest.py turns them off.

    Which ones there are it looks up once in a process, whatever its options are by then. A rank that has looked without
    them would compile code for none of them, and fail on that of another rank, which the cache of graphs has.
    """
    import torch._inductor.config
    from torch._inductor.cpu_vec_isa import valid_vec_isa_list

    with torch._inductor.config.patch({"cpp.vec_isa_ok": None}):
        valid_vec_isa_list.cache_clear()
        try:
            yield
        finally:
            valid_vec_isa_list.cache_clear()


def spawn_ranks(size: int, fn: Callable, *args: Any, init: bool = True) -> Ranks:
    """Starts fn(ctx, *args) on `size` processes of its own and returns at once.

    with spawn_ranks(2, fn) as ranks:
        ranks.wait_for("rank 1 is in combine")
        ranks.kill(1)
        outcomes = ranks.outcomes()

    init=False leaves making the process group to fn: ctx.init_process_group().
    """
    ranks = Ranks(size, init=init)
    try:
        ranks.submit(size, fn, *args)
    except BaseException:
        ranks.close()
        raise
    return ranks


def _join(process: BaseProcess) -> None:
    """Waits for its end, and brings it about if it does not come."""

    def has_ended(seconds: float) -> bool:
        process.join(seconds)
        return not process.is_alive()

    if not wait_until(has_ended, [process.pid], EXIT_TIMEOUT):
        process.kill()
        process.join()


def raise_failures(outcomes: list[Outcome]) -> None:
    """Raises RankError with the tracebacks of all ranks if one of them failed."""
    exceptions = [outcome.exception for outcome in outcomes]
    if any(exception is not None for exception in exceptions):
        reports = [
            f"rank {rank}: {type(outcome.exception).__name__}: {outcome.exception}\n{outcome.traceback}"
            for rank, outcome in enumerate(outcomes)
            if outcome.exception is not None
        ]
        raise RankError("\n".join(reports), exceptions)


def _serve(
    connection: multiprocessing.connection.Connection,
    rank: int,
    world_size: int,
    port: int,
    stack_file: str,
    init: bool,
) -> None:
    """The life of a rank: requests until the parent closes the connection."""
    # SIGABRT writes the stacks and ends the process, wherever it hangs.
    stacks = open(stack_file, "w")  # noqa: SIM115
    faulthandler.enable(stacks)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # What has been imported stays: the collector need not go through all of torch again and again.
    gc.freeze()

    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=GROUP_TIMEOUT)
    contexts = {size: RankContext(rank, size, store) for size in range(1, world_size + 1)}
    if init:
        contexts[world_size].init_process_group()
        for size in range(1, world_size):
            contexts[size].make_groups()

    while True:
        try:
            request = connection.recv_bytes()
        except (EOFError, ConnectionError):
            return
        try:
            size, fn, args = pickle.loads(request)
            counted = _groups_made()
            outcome = Outcome(value=fn(contexts[size], *args))
            if size < world_size and _groups_made() != counted:
                raise AssertionError(
                    "groups must be made on all ranks of the pool: others give their next one its name"
                )
            answer = pickle.dumps(outcome)
        except BaseException as error:
            answer = pickle.dumps(Outcome(exception=_picklable(error), traceback=traceback.format_exc()))
        connection.send_bytes(answer)


def _groups_made() -> int:
    """What dist.new_group names the next one by."""
    return int(dist.distributed_c10d._world.group_count)


def _end_with_parent() -> None:
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _picklable(error: BaseException) -> BaseException:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
