"""What a rank looks at before it uses the window of another one, besides what ranks have compared when they met."""

import ctypes
import mmap
import os
from collections.abc import Callable

from deep_ep._library import ERROR_BYTES, library

MAGIC, VERSION = slice(0, 8), slice(8, 12)
"""Of the mark with which a window begins (src/shm/window_layout.h)."""


def connect(change: Callable[[mmap.mmap], None]) -> str:
    """What rank 0 of two is told when it opens the window of rank 1, whose beginning `change` has written to."""
    error = ctypes.create_string_buffer(ERROR_BYTES)
    handles = [library.deep_ep_group_create(rank, 2, 1 << 20, 1000, error) for rank in (0, 1)]
    fds = (ctypes.c_int64 * 2)(*map(library.deep_ep_group_fd, handles))
    with mmap.mmap(fds[1], mmap.PAGESIZE) as window:
        change(window)
    pids = (ctypes.c_int64 * 2)(os.getpid(), os.getpid())
    sizes = (ctypes.c_uint64 * 2)(*map(library.deep_ep_group_bytes, handles))
    library.deep_ep_group_connect(handles[0], pids, fds, sizes, error)
    for handle in handles:
        library.deep_ep_group_destroy(handle, b"none")
    return error.value.decode()


def test_windows_of_two_versions() -> None:
    """Both are named."""
    versions = []

    def change(window: mmap.mmap) -> None:
        versions.append(int.from_bytes(window[VERSION], "little"))
        window[VERSION] = (versions[0] + 1).to_bytes(4, "little")

    said = connect(change)
    assert f"has version {versions[0] + 1} of what ranks share" in said
    assert f"this process has version {versions[0]};" in said


def test_memory_that_is_no_window() -> None:
    def change(window: mmap.mmap) -> None:
        window[MAGIC] = b"whatever"

    assert "is not the window of" in connect(change)


def test_a_window() -> None:
    assert connect(lambda window: None) == ""
