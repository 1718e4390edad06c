"""Limits of tests: whoever works, or is kept from it, has time, and whoever waits for nobody has not."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import patience
import pytest
from patience import INTERVAL, Patience, own_time, pace, wait_until

SPIN = [sys.executable, "-c", "while True: pass"]


class Clock:
    """Goes on by INTERVAL with every look at it, and has looked at nothing when it is made."""

    def __init__(self) -> None:
        self.looks = -1

    def __call__(self) -> float:
        self.looks += 1
        return self.looks * INTERVAL


@contextlib.contextmanager
def process(*command: str) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True) as one:
        try:
            yield one
        finally:
            os.killpg(one.pid, signal.SIGKILL)


@contextlib.contextmanager
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with process("cat") as one:
        one.stdin.write(b"x")
        one.stdin.flush()
        one.stdout.read(1)
        assert wait_until(lambda _: patience._sleeps(one.pid), [one.pid])
        yield one


def looks_until_over(pids: list[int], timeout: float) -> int:
    clock = Clock()
    waits = Patience(pids, timeout, clock)
    while not waits.is_over():
        pass
    return clock.looks


def test_who_sleeps_has_hung() -> None:
    with sleeper() as one, sleeper() as other:
        assert looks_until_over([one.pid, other.pid], 4 * INTERVAL) == 5
        assert looks_until_over([], 4 * INTERVAL) == 5


LOOKS_AT_ITSELF = """
import os
from test_patience import looks_until_over
print(looks_until_over([os.getpid()], 2.0))
"""


def test_who_looks_does_nothing_else() -> None:
    command = [sys.executable, "-c", LOOKS_AT_ITSELF]
    run = subprocess.run(command, cwd=Path(__file__).parent, stdout=subprocess.PIPE, check=True)
    assert int(run.stdout) == 2.0 / INTERVAL + 1


def test_who_is_stopped_has_not_hung() -> None:
    """Nor have those that wait for it, but for ever nobody waits."""
    with mock.patch.object(patience, "WALL", 20.0), sleeper() as one, sleeper() as other:
        os.kill(one.pid, signal.SIGSTOP)
        os.waitpid(one.pid, os.WUNTRACED)
        for pids in ([one.pid], [other.pid, one.pid]):
            assert looks_until_over(pids, 4 * INTERVAL) == pytest.approx(4 * 20 + 1, abs=1)
        os.kill(one.pid, signal.SIGCONT)
        assert wait_until(lambda _: patience._sleeps(one.pid), [one.pid])
        assert looks_until_over([other.pid, one.pid], 4 * INTERVAL) == 5


def test_who_has_a_child_that_works_has_not_hung() -> None:
    with process("sh", "-c", f"echo; '{SPIN[0]}' -c '{SPIN[2]}' & wait") as one:
        one.stdout.read(1)
        assert wait_until(lambda _: bool(children(one.pid)), [one.pid])
        assert looks_until_over([one.pid], 4 * INTERVAL) > 20


def children(pid: int) -> list[int]:
    return [child for child, parent in patience._processes()[0].items() if parent == pid]


def test_work_has_a_limit_of_its_own() -> None:
    with process(*SPIN) as one, mock.patch.object(patience, "WORK", 0.1):
        waits = Patience([one.pid], 1.0, Clock())
        with mock.patch.object(patience, "WALL", 1e9):
            while not waits.is_over():
                assert waits.used <= 0.1
    assert waits.used > 0.1 and waits.asleep < 1.0


@contextlib.contextmanager
def on_one_core_with(others: int) -> Iterator[None]:
    """This thread, and that many processes that spin."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        with contextlib.ExitStack() as stack:
            for _ in range(others):
                one = stack.enter_context(process(*SPIN))
                assert wait_until(lambda _, pid=one.pid: patience._processes()[1][pid] > 0.05, [one.pid])
            yield
    finally:
        os.sched_setaffinity(0, cores)


def work(seconds: float) -> None:
    begin = time.thread_time()
    while time.thread_time() - begin < seconds:
        pass


def test_own_time_is_without_what_others_take() -> None:
    with on_one_core_with(2):
        (begin, _), at = own_time(lambda: (time.monotonic(), work(0.2)))
        took = time.monotonic() - begin
    assert at - begin < 0.3 < took


def test_own_time_is_with_sleep() -> None:
    begin = time.monotonic()
    result, at = own_time(lambda: time.sleep(0.1) or 3)
    assert result == 3
    assert at - begin > 0.08


def test_pace_is_what_others_leave() -> None:
    with on_one_core_with(2):
        assert any(pace() > 2 for _ in range(20))  # who has just slept may be given more than its share


WATCHING = """
from patience import Watch

def pytest_configure(config):
    config.pluginmanager.register(Watch(0.5))
"""

HANGING = """
import ctypes, threading

def test_waits_for_nobody():
    threading.Event().wait()

def test_passes():
    pass

def test_waits_where_no_signal_comes():
    mutex = ctypes.create_string_buffer(64)
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(mutex)
"""


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_a_test_that_hangs_fails(tmp_path: Path, workers: int) -> None:
    (tmp_path / "conftest.py").write_text(WATCHING)
    (tmp_path / "test_hanging.py").write_text(HANGING)
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-n", str(workers), str(tmp_path)]
    settings = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    run = subprocess.run(command, cwd=tmp_path, env=settings, capture_output=True, text=True)
    assert run.returncode == 1
    for test, outcome in (("waits_for_nobody", "FAILED"), ("passes", "PASSED")):
        lines = [line for line in run.stdout.splitlines() if f"test_{test}" in line]
        assert any(outcome in line for line in lines), run.stdout
    assert "test_waits_where_no_signal_comes hangs, and cannot be interrupted" in run.stderr
    assert "in test_waits_where_no_signal_comes" in run.stderr
    if workers:
        assert "crashed while running 'test_hanging.py::test_waits_where_no_signal_comes'" in run.stdout
