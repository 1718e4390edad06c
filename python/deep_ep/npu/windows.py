"""Windows of a group on NPUs, and the library of kernels that makes and uses them.

Kernels take the table of a group's windows as an ordinary input. It is made once per group, on a communicator of the
group's own: HCCL's collectives overwrite the memory of theirs.
"""

import ctypes
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .. import env
from .._library import ERROR_BYTES, find, library
from ..meeting import Meeting
from ..process_groups import process_group
from ..windows import finalize_here

_HEADER = 8
"""Words of a table before the addresses of the ranks' windows (ops/kernels.h)."""

DEFAULT_BYTES = 256 << 20
"""Bytes of a rank's window unless something else is asked for."""

_open: dict[str, "Windows"] = {}


def kernels_path() -> str | None:
    """The library of kernels that is meant: DEEP_EP_KERNELS, or the one that was built into this package, or None."""
    if given := env.value("DEEP_EP_KERNELS"):
        return given
    built = find("libdeep_ep_kernels.so")
    return str(built) if built else None


def load_kernels() -> str | None:
    """Loads the kernels, unless they are loaded, and returns their name; None if there are none.

    RuntimeError: there is a library, and it cannot be used.
    """
    name = library.deep_ep_npu_kernels()
    path = kernels_path()
    if name is None and path is not None:
        error = ctypes.create_string_buffer(ERROR_BYTES)
        if library.deep_ep_npu_load(path.encode(), error):
            raise RuntimeError(f"deep_ep: the NPU kernels in {Path(path)} cannot be used: {error.value.decode()}")
        name = library.deep_ep_npu_kernels()
    return name.decode() if name else None


def communicator(group: dist.ProcessGroup) -> str:
    """HCCL's name of the group's communicator on the NPU, which is made if it does not exist yet."""
    backend: Any = group._get_backend(torch.device("npu"))
    return backend.get_hccl_comm_name(group.rank())


def table_words(num_ranks: int) -> int:
    """The length of a window table."""
    return _HEADER + num_ranks


def table(name: str) -> Tensor:
    """int64 [table_words]: the window table of the group `name`, on the NPU of this rank.

    Raises:
        RuntimeError: there is none, or a launch of the group has failed on this rank, as `check` says it.
    """
    windows = _windows(name)
    windows.check()
    return windows.table


def check(group: str | dist.ProcessGroup | DeviceMesh) -> None:
    """Whether all is well with the launches of the group's kernels that have ended; waits for none.

    A kernel cannot raise. Where one fails, because a peer did not come in time or asked for something else, or because
    of an id that is no expert's, its results are not defined, and the later launches of the group on this rank end at
    once, until `deep_ep.init` is called again on all ranks. The next call of an op of the group raises the same, once
    the launch has ended, and so does the next run of a GE graph; a replay of a captured graph does not.

    Raises:
        RuntimeError: a launch has failed on this rank: its op and number, the peer, and what was expected and found.
    """
    _windows(group if isinstance(group, str) else process_group(group).group_name).check()


def _windows(name: str) -> "Windows":
    if name not in _open:
        raise RuntimeError(
            f"deep_ep: there are no windows on the NPU for the group '{name}' on this rank; call deep_ep.init(group) "
            "with a group that has the NPU among its devices, in an installation that has kernels (docs/npu.md)"
        )
    return _open[name]


class Windows:
    """The windows of one group on NPUs, kept until `close()` or until the group is gone. Collective."""

    def __init__(self, group: dist.ProcessGroup, meeting: Meeting, num_bytes: int | None, timeout: timedelta) -> None:
        num_bytes = num_bytes or DEFAULT_BYTES
        self.num_bytes, self.timeout = num_bytes, timeout
        _require_room(group, meeting.exchange(num_bytes))
        if group.group_name in _open:
            _open[group.group_name].close()  # they go by the group's name, so that a name has one at a time
        own = _own_communicator(group, meeting, num_bytes, timeout)
        self._words = (ctypes.c_int64 * table_words(group.size()))()
        error = ctypes.create_string_buffer(ERROR_BYTES)
        name = group.group_name
        communicator_name = own.get_hccl_comm_name(group.rank())
        library.deep_ep_npu_open_windows(
            *(name.encode(), communicator_name.encode(), group.rank(), group.size(), num_bytes),
            *(int(_patience(timeout).total_seconds() * 1000), self._words, error),
        )
        self._close = finalize_here(group, _close, name, own)
        try:
            # Nobody writes to a window before its rank has made it ready.
            meeting.raise_everywhere("windows", error.value.decode() or None)
        except BaseException:
            self._close()
            raise
        self.table = torch.tensor(self._words[:]).to("npu")
        library.deep_ep_npu_publish_windows(name.encode(), group.size(), self._words, self.table.data_ptr())
        _open[name] = self

    def failure(self) -> str | None:
        """What went wrong in the first launch that has failed on this rank. Waits for no stream."""
        error = ctypes.create_string_buffer(ERROR_BYTES)
        return error.value.decode() if library.deep_ep_npu_check(self._words, error) else None

    def check(self) -> None:
        """RuntimeError: what `failure` says."""
        if failure := self.failure():
            raise RuntimeError(failure)

    @property
    def usable(self) -> bool:
        """Whether ops can use these windows: not after one has failed on this rank."""
        return self.failure() is None

    def join(self) -> None:
        """Nothing goes on but what the device's stream has."""

    def close(self) -> None:
        """Gives the windows up."""
        self._close()


def _require_room(group: dist.ProcessGroup, sizes: list[int]) -> None:
    """RuntimeError, the same on all ranks: windows of these sizes, by rank, are too small for any launch. What a launch
    needs for its slots it says itself."""
    least, smallest = library.deep_ep_npu_least_bytes(len(sizes)), min(sizes)
    if smallest < least:
        raise RuntimeError(
            f"deep_ep: cannot make windows for the group '{group.group_name}': on NPUs {len(sizes)} ranks need {least} "
            f"bytes each at least, for flags, marks and slots, and rank {sizes.index(smallest)} gives {smallest}; ask "
            "for more with num_nvl_bytes, num_bytes or HCCL_BUFFSIZE"
        )


def _patience(timeout: timedelta) -> timedelta:
    """How long a kernel waits for its peers. The device ends a kernel that takes too long, and then no status is left:
    the group's timeout, half an hour if nobody says otherwise, is for hosts."""
    return min(timeout, timedelta(seconds=int(env.value("DEEP_EP_KERNEL_TIMEOUT"))))


def _own_communicator(group: dist.ProcessGroup, meeting: Meeting, num_bytes: int, timeout: timedelta) -> Any:
    """A ProcessGroupHCCL of the group's ranks, known to nobody else, with room for a window in its buffer.

    new_group is no way to it: it wants all ranks of the default group, or, with use_local_synchronization, that its
    members have made equally many groups before.
    """
    from torch_npu._C._distributed_c10d import ProcessGroupHCCL

    options = ProcessGroupHCCL.Options()
    options._timeout = timeout
    options.hccl_config = {"hccl_buffer_size": -(-num_bytes >> 20)}  # MB
    options.global_ranks_in_group = dist.get_process_group_ranks(group)
    store = dist.PrefixStore("windows", meeting.store)  # type: ignore[attr-defined]
    return ProcessGroupHCCL(store, group.rank(), group.size(), options)


def _close(name: str, own: Any) -> None:
    library.deep_ep_npu_publish_windows(name.encode(), 0, None, None)
    library.deep_ep_npu_close_windows(name.encode())
    _open.pop(name, None)
