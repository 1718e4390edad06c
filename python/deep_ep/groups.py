"""What is known of a group: its size, the strategy chosen for it, and its windows."""

import functools
import os
import weakref
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]

from . import _compile, env
from .npu import windows as npu_windows
from .npu.platform import platform
from .npu_ops import check_comm_alg
from .strategies import MODES, LowLatencyStrategy, NormalStrategy, one_of
from .windows import Windows, exchange, group_timeout

Group = dist.ProcessGroup | str | None
"""How functions take a group: a ProcessGroup, its name, or None for the default group."""


@dataclass(frozen=True)
class GroupInfo:
    """What an op call needs to know of a group. Immutable, so that a graph traced with it is guarded by it."""

    name: str
    size: int
    normal: NormalStrategy
    low_latency: LowLatencyStrategy
    comm_alg: str = ""


_owners: dict[str, weakref.ref[dist.ProcessGroup]] = {}
_infos: dict[str, GroupInfo] = {}
_windows: dict[str, dict[str, Windows | npu_windows.Windows]] = {}  # by group and kind of device
_parents: dict[str, weakref.ref[dist.ProcessGroup]] = {}  # of the rank that this process was forked from, if it was


def _forget_parents() -> None:
    _parents.update(_owners)
    for known in (_owners, _infos, _windows):
        known.clear()


os.register_at_fork(after_in_child=_forget_parents)


def process_group(group: Group) -> dist.ProcessGroup:
    """The ProcessGroup that is meant."""
    if isinstance(group, str):
        try:
            return _resolve_process_group(group)  # type: ignore[arg-type]
        except RuntimeError as error:
            raise RuntimeError(f"deep_ep: there is no group named '{group}'") from error
    group = group or dist.group.WORLD
    if group is None:
        raise RuntimeError("deep_ep: there is no default group; call torch.distributed.init_process_group first")
    return group


def init(
    group: Group = None,
    *,
    num_bytes: int | None = None,
    strategy: str | NormalStrategy | None = None,
    low_latency_strategy: str | LowLatencyStrategy | None = None,
    timeout: timedelta | None = None,
    comm_alg: str = "",
) -> GroupInfo:
    """Prepares a group for the ops. Collective: all ranks of the group call it, outside of compiled code.

    Args:
        group: the expert-parallel group; None is the default group.
        num_bytes: most bytes of every rank's window, where a strategy is ``default``; None takes HCCL_BUFFSIZE, read
            now. On CPU a window grows as ops need it, and gives back what they no longer use; with neither, to a
            rank's share in half of the host's memory. On NPUs it has this size from the start; with neither, 256 MiB.
            Rows that do not fit go in rounds, so this bounds speed, not sizes. A window that may be large enough
            already is kept; a smaller one, or one that was given up after a failure, is replaced.
        strategy: ``default``, ``alltoall`` or ``ops``; None takes DEEP_USE_MODE, read now.
        low_latency_strategy: another one for the low-latency ops: ``default``, ``alltoall`` or ``ops``.
        timeout: how long an op waits for a peer without progress; None is the group's own timeout.
        comm_alg: for the strategy ``ops``: hierarchy, fullmesh_v1, fullmesh_v2 or ccu; empty leaves it to torch_npu or,
            on A2, to HCCL_INTRA_PCIE_ENABLE and HCCL_INTRA_ROCE_ENABLE.

    Raises:
        ValueError: an unknown strategy or comm_alg, num_bytes is not positive, or a wrong value in the environment
            (`deep_ep.env`) of what no argument says; on this rank, before it waits for others.
        RuntimeError: on every rank, when windows cannot be made: too little memory on a rank, or ranks on several
            hosts under ``default``.
    """
    normal, low_latency = MODES[env.value("DEEP_USE_MODE") if strategy is None else one_of("strategy", strategy, MODES)]
    if low_latency_strategy is not None:
        low_latency = LowLatencyStrategy(one_of("low_latency_strategy", low_latency_strategy, LowLatencyStrategy))
    if error := check_comm_alg(comm_alg):
        raise ValueError(error)
    pg = process_group(group)
    if pg.group_name in _parents and _parents[pg.group_name]() is pg:
        raise _is_parents(pg.group_name)
    if num_bytes is not None and num_bytes <= 0:
        raise ValueError(f"num_bytes must be positive, got {num_bytes}")
    env.value("MOE_SHARED_EXPERT_RANK_NUM")
    on = {device.type for device in pg._device_types}
    from_environment = env.comm_alg(platform() if "npu" in on else None)
    comm_alg = comm_alg or from_environment
    if num_bytes is None:
        num_bytes = env.window_bytes()
    is_default = normal is NormalStrategy.DEFAULT or low_latency is LowLatencyStrategy.DEFAULT
    wanted = _windowed_devices(on) if is_default else []
    served = {device: _is_served(pg, device, num_bytes, timeout) for device in wanted}
    mode = normal.value if normal.value == low_latency.value else f"{normal.value} and {low_latency.value}"
    wishes = exchange(pg, (mode, served))
    modes = [wish[0] for wish in wishes]
    if len(set(modes)) > 1:
        raise RuntimeError(
            f"deep_ep: the ranks of the group '{pg.group_name}' chose different strategies: {', '.join(modes)}"
        )
    for rank, (_, devices) in enumerate(wishes):
        if devices.keys() != served.keys():
            raise RuntimeError(
                f"deep_ep: rank {rank} has kernels for {', '.join(devices) or 'no device'} of the group "
                f"'{pg.group_name}', rank {pg.rank()} for {', '.join(wanted) or 'none'}; install one version on all"
            )
    name = pg.group_name
    for device in wanted:
        if not all(wish[1][device] for wish in wishes):
            kind = Windows if device == "cpu" else npu_windows.Windows
            windows = kind(pg, num_bytes, timeout or group_timeout(pg))
            _close_windows(name, device)
            _windows.setdefault(name, {})[device] = windows
    if not _owns(pg):
        _owners[name] = weakref.ref(pg, functools.partial(_forget, name))
    _infos[name] = info = GroupInfo(name, pg.size(), normal, low_latency, comm_alg)
    _compile.prepare()
    return info


def _owns(pg: dist.ProcessGroup) -> bool:
    """Whether what is known under the group's name is of this group, and not of one that had the name before."""
    owner = _owners.get(pg.group_name)
    return owner is not None and owner() is pg


def _forget(name: str, owner: weakref.ref[dist.ProcessGroup]) -> None:
    if _owners.get(name) is owner:
        _drop(name)


def _drop(name: str) -> None:
    _owners.pop(name, None)
    _infos.pop(name, None)
    for device in list(_windows.get(name, ())):
        _close_windows(name, device)
    _windows.pop(name, None)


def _close_windows(name: str, device: str) -> None:
    windows = _windows.get(name, {}).pop(device, None)
    if windows is not None:
        windows.close()


def _windowed_devices(devices: set[str]) -> list[str]:
    """The kinds of devices for which there are kernels here."""
    on_npu = "npu" in devices and npu_windows.load_kernels() is not None
    return ["cpu"] * ("cpu" in devices) + ["npu"] * on_npu


def _is_served(pg: dist.ProcessGroup, device: str, num_bytes: int | None, timeout: timedelta | None) -> bool:
    windows = _windows.get(pg.group_name, {}).get(device)
    return (
        windows is not None
        and _owns(pg)
        and windows.usable
        and windows.num_bytes >= (num_bytes or 0)
        and timeout in (None, windows.timeout)
    )


def destroy(group: Group = None) -> None:
    """Leaves the group's windows and forgets its strategy. Peers that wait for this rank in an op raise.

    Tensors that lie in the window stay valid. Without this call the same happens when the ProcessGroup goes.
    """
    _drop(group if isinstance(group, str) else process_group(group).group_name)


def _is_parents(name: str) -> RuntimeError:
    return RuntimeError(
        f"deep_ep: this process was forked from a rank and has no part in its group '{name}'; call the function in the "
        "rank itself, or make a group of such processes"
    )


def info_of(group: Group) -> GroupInfo:
    """What `init` recorded for the group; traceable."""
    name = group if isinstance(group, str) else (group or dist.group.WORLD).group_name  # type: ignore[union-attr]
    info = _infos.get(name)
    if info is None and name in _parents:
        raise _is_parents(name)
    if info is None or not (torch.compiler.is_compiling() or _owns(process_group(group))):
        raise RuntimeError(
            f"deep_ep: the group '{name}' is not prepared; call deep_ep.init(group) first, on all its ranks"
        )
    return info


def op_log(group: Group = None, since: int = 0) -> tuple[list[str], int]:
    """What this rank issued under ``default``: for debugging ranks that fall out of step.

    Returns:
        The names of the communicating ops after the first `since` ones, oldest first (1024 are remembered), and how
        many have been issued by now.
    """
    return _cpu_windows(group).log(since)


def phases(group: Group = None) -> dict[str, dict[str, float]]:
    """Where the time of this rank's ops under ``default`` on CPU has gone, since the windows were made.

    Returns:
        For each op that has finished, "calls", and seconds: "counts" (telling peers what is wanted, and checks), "wait"
        (for peers), "allocate" (outputs, and where rows go), "copy" (rows into windows), "reduce" (sums of rows that
        have come, and what goes with rows), "finish". What is before and after in Python and in torch's dispatcher is
        not in them; torch.profiler has the ops as deep_ep::dispatch and so on.
    """
    return _cpu_windows(group).phases()


def _cpu_windows(group: Group) -> Windows:
    info = info_of(group)
    windows = _windows.get(info.name, {}).get("cpu")
    if not isinstance(windows, Windows):
        raise RuntimeError(
            f"deep_ep: the group '{info.name}' has no windows on CPU; alltoall keeps neither log nor times"
        )
    return windows
