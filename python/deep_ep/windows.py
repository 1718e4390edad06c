"""Shared-memory windows of a group on one host: made by all ranks together, outside of graphs.

The ops find them by the group's name. A name can come back after `destroy_process_group`, so the windows go with
the ProcessGroup object that they were made for.
"""

import ctypes
import os
import weakref
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ._library import ERROR_BYTES, library, raise_interrupt
from .meeting import Meeting, Process

# How many ops a group remembers.
_LOGGED = 1024

_OPS = (
    "dispatch",
    "combine",
    "dispatch_backward",
    "combine_backward",
    "combine_backward_weights",
    "low_latency_dispatch",
    "low_latency_combine",
    "notify_dispatch",
    "low_latency_dispatch_int8",
    "fused_deep_moe",
    "fused_deep_moe.dispatch_ffn_combine",
    "fused_deep_moe_backward",
    "dispatch_int8",
)
"""enum Op of src/device/op.h."""

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""enum DType of src/shm/arithmetic.h."""

PHASES = ("counts", "wait", "allocate", "copy", "reduce", "finish")
"""enum Phase of src/shm/phases.h."""


def finalize_here(owner: object, function: Callable[..., object], *args: object) -> "weakref.finalize[..., Any]":
    """weakref.finalize, but for processes that are forked: what goes with the owner is not theirs to close."""
    process = os.getpid()

    def finalize() -> None:
        if os.getpid() == process:
            function(*args)

    return weakref.finalize(owner, finalize)


def agree(op: str, group: str, rejected: str | None, dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    """All ranks issue `op` with the same dtype and sizes, or RuntimeError on all of them. Nothing else moves.

    Args:
        rejected: what is wrong with the arguments of this rank, if anything; then the rest is of no interest.
        dtype: of rows.
        sizes: H, K, E, num_max_dispatch_tokens_per_rank, quant_mode.
    """
    H, K, E, M, quant_mode = (0,) * 5 if rejected else sizes
    numbers = (ctypes.c_int64 * 6)(H, K, E, 0 if rejected else _DTYPES.index(dtype), M, quant_mode)
    error = ctypes.create_string_buffer(ERROR_BYTES)
    if library.deep_ep_group_agree(group.encode(), _OPS.index(op), numbers, (rejected or "").encode(), error):
        raise_interrupt()
        raise RuntimeError(error.value.decode())


def _apart(ranks: list[Process]) -> str | None:
    """Why ranks cannot open each other's windows."""
    for what in ("host", "container", "user"):
        by_rank = [getattr(rank, what) for rank in ranks]
        if len(set(by_rank)) > 1:
            return f"spans several {what}s ({', '.join(f'rank {rank}: {value}' for rank, value in enumerate(by_rank))})"
    return None if ranks[0].host else "has ranks whose /proc is without sys/kernel or self/ns"


class Traced(NamedTuple):
    """An op that has finished."""

    name: str
    begin: int
    """In nanoseconds of time.monotonic_ns, as `end`."""
    end: int
    numbers: dict[str, int | float]
    """Of its arguments and its phases."""


class Windows:
    """The windows of one group, kept until `close()` or until the group is gone.

    They grow as ops need them, to `num_bytes` at most; None: to a rank's share in half of the host's memory.
    """

    def __init__(self, group: dist.ProcessGroup, meeting: Meeting, num_bytes: int | None, timeout: timedelta) -> None:
        self.name = group.group_name
        self.timeout = timeout
        if apart := _apart(meeting.processes):
            raise RuntimeError(
                f"deep_ep: the group '{self.name}' {apart}; on CPU the strategy 'default' works within one host, "
                "container and user, use DEEP_USE_MODE=alltoall"
            )
        error = ctypes.create_string_buffer(ERROR_BYTES)
        self._handle = library.deep_ep_group_create(
            group.rank(), group.size(), num_bytes or 0, int(timeout.total_seconds() * 1000), error
        )
        self._close = finalize_here(group, _destroy, self._handle, self.name)
        try:
            meeting.raise_everywhere("windows", error.value.decode() or None)
            self._connect(group, meeting)
        except BaseException:
            self._close()
            raise
        self.num_bytes = library.deep_ep_group_bytes(self._handle)

    def _connect(self, group: dist.ProcessGroup, meeting: Meeting) -> None:
        handle, size = self._handle, group.size()
        fd, num_bytes = library.deep_ep_group_fd(handle), library.deep_ep_group_bytes(handle)
        fds, sizes = zip(*meeting.exchange((fd, num_bytes)), strict=True)
        pids = [rank.pid for rank in meeting.processes]
        numbers, lengths = ctypes.c_int64 * size, ctypes.c_uint64 * size
        error = ctypes.create_string_buffer(ERROR_BYTES)
        library.deep_ep_group_connect(handle, numbers(*pids), numbers(*fds), lengths(*sizes), error)
        meeting.raise_everywhere("windows", error.value.decode() or None)
        library.deep_ep_group_publish(handle, self.name.encode())

    @property
    def usable(self) -> bool:
        """Whether ops can use these windows: not after one has failed in its middle, on this rank."""
        return bool(library.deep_ep_group_usable(self._handle))

    def spoil(self) -> None:
        """From here on, results of calls that go on hold NaN and -1 until they have come."""
        library.deep_ep_group_spoil(self._handle)

    def join(self) -> None:
        """Waits until the ops that have been issued here have ended. A signal ends the wait of the main thread."""
        while not library.deep_ep_group_join(self._handle, 100):
            pass

    def log(self, since: int) -> tuple[list[str], int]:
        """Names of this rank's communicating ops after the first `since` ones, and how many there are by now."""
        codes = (ctypes.c_uint32 * _LOGGED)()
        issued = library.deep_ep_group_log(self._handle, codes, _LOGGED)
        kept = min(issued, _LOGGED)
        wanted = min(max(issued - since, 0), kept)
        return [_OPS[code] for code in codes[kept - wanted : kept]], issued

    def phases(self) -> dict[str, dict[str, float]]:
        """Seconds of this rank's finished ops, by op and phase, and their number under "calls"."""
        result = {}
        for code, op in enumerate(_OPS):
            nanoseconds = (ctypes.c_int64 * len(PHASES))()
            calls = library.deep_ep_group_phases(self._handle, code, nanoseconds)
            if calls:
                result[op] = {phase: n * 1e-9 for phase, n in zip(PHASES, nanoseconds, strict=True)} | {"calls": calls}
        return result

    def trace(self, limit: int) -> None:
        """From here on, this rank's ops that finish are kept for `traced`, `limit` of them at most."""
        self._traces = limit
        library.deep_ep_group_trace(self._handle, limit)

    def traced(self) -> list[Traced]:
        """Ends that, and gives them in the order in which they ran."""
        names = ("tokens", "hidden", "top_k", "experts")
        width = 3 + len(names) + len(PHASES)
        numbers = (ctypes.c_int64 * (self._traces * width))()
        count = library.deep_ep_group_traced(self._handle, numbers)
        rows = [numbers[i * width : (i + 1) * width] for i in range(count)]
        return [
            Traced(
                _OPS[op],
                begin,
                end,
                dict(zip(names, sizes, strict=False))
                | {f"{phase} (us)": n * 1e-3 for phase, n in zip(PHASES, sizes[len(names) :], strict=True)},
            )
            for op, begin, end, *sizes in rows
        ]

    def close(self) -> None:
        """Leaves the group: peers that still wait for this rank raise. Tensors in the window stay valid."""
        self._close()


def _destroy(handle: int | None, name: str) -> None:
    if handle is not None:
        library.deep_ep_group_destroy(handle, name.encode())
