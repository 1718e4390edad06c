"""What is known of a group: its size, the strategies chosen for it, and what it has to communicate."""

import functools
import os
import threading
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple, NoReturn, cast

import torch
import torch.distributed as dist

from . import _compile, env
from ._library import library
from .communicator import Communicator
from .ep_strategy import MODES, LowLatencyStrategy, NormalStrategy, one_of
from .kernels.torch_npu_ops import check_comm_alg
from .meeting import INIT, Meeting, group_timeout
from .npu import windows as npu_windows
from .npu.platform import platform
from .process_groups import Group, process_group, untraced
from .windows import Windows


@dataclass(frozen=True)
class GroupInfo:
    """What an op call needs to know of a group. Immutable, so that a graph traced with it is guarded by it."""

    name: str
    size: int
    normal: NormalStrategy
    low_latency: LowLatencyStrategy
    comm_alg: str = ""

    def __str__(self) -> str:
        """The choice, for messages."""
        one = self.normal.value
        both = one if one == self.low_latency.value else f"{one}, and {self.low_latency.value} in low latency"
        return f"{both} (comm_alg {self.comm_alg})" if self.comm_alg else both


Part = Windows | npu_windows.Windows | Communicator


class _Owner(NamedTuple):
    """Which group has the name."""

    group: weakref.ref[dist.ProcessGroup]
    # torch.distributed holds it as long as it knows the group, and nobody else does.
    known: "weakref.ref[Any]"


class _Late(NamedTuple):
    """What the windows on CPU of a group with NPUs are made with, when its first tensor on CPU comes."""

    num_bytes: int | None
    timeout: timedelta
    lock: threading.Lock


# By the group's name: whose it is, what functions do, whether `init` has chosen that, and what the group has: windows
# by kind of device, and "alltoall": a communicator.
_owners: dict[str, _Owner] = {}
_infos: dict[str, GroupInfo] = {}
_chosen: set[str] = set()
_parts: dict[str, dict[str, Part]] = {}
_spoiled: set[str] = set()
_late: dict[str, "_Late"] = {}
_parents: dict[str, _Owner] = {}  # of the rank that this process was forked from, if it was


def _forget_parents() -> None:
    _parents.update(_owners)
    for known in (_owners, _infos, _chosen, _parts, _spoiled, _late):
        known.clear()


os.register_at_fork(after_in_child=_forget_parents)


def platform_of(pg: dist.ProcessGroup) -> str | None:
    """A2, A3 or A5; None where the group has no NPU, and for others."""
    return platform() if "npu" in {device.type for device in pg._device_types} else None


def init(
    group: Group = None,
    *,
    num_bytes: int | None = None,
    strategy: str | NormalStrategy | None = None,
    low_latency_strategy: str | LowLatencyStrategy | None = None,
    timeout: timedelta | None = None,
    comm_alg: str = "",
    device: str | torch.device | None = None,
) -> GroupInfo:
    """Prepares a group for the ops. Collective: all ranks of the group call it, outside of compiled code.

    The group's strategies are chosen once: a further call that names no others keeps them, makes what is missing or was
    given up after a failure, and waits for calls that go on. A Buffer may have others for its own calls.

    Args:
        group: the expert-parallel group, as a ProcessGroup, a DeviceMesh of one dimension, or its name; None is the
            default group.
        num_bytes: most bytes of every rank's window, where a strategy is ``default``; None takes HCCL_BUFFSIZE, read
            now. On CPU a window grows as ops need it, and gives back what they no longer use; with neither, to a
            rank's share in half of the memory of the host or of the rank's cgroup. On NPUs it has this size from the
            start, half a MiB at least; with neither, 256 MiB. Rows that do not fit go in rounds, so this bounds speed,
            not sizes. A window that may be large enough already is kept; a smaller one, or one that was given up after
            a failure, is replaced.
        strategy: ``default``, ``alltoall`` or ``ops``; None takes what was chosen, or DEEP_USE_MODE, read now.
        low_latency_strategy: another one for the low-latency ops: ``default``, ``alltoall`` or ``ops``.
        timeout: how long an op waits for a peer without progress; None is the group's own timeout. This call waits for
            the longer of the two. Kernels on NPUs wait no longer than DEEP_EP_KERNEL_TIMEOUT.
        comm_alg: for the strategy ``ops``: hierarchy, fullmesh_v1, fullmesh_v2 or ccu; empty leaves it to torch_npu or,
            on A2, to HCCL_INTRA_PCIE_ENABLE and HCCL_INTRA_ROCE_ENABLE.
        device: for whose tensors there are windows from the start, ``cpu`` or ``npu``, where a strategy is
            ``default``. None: for those of the NPUs of a group that has some, and of others for those on CPU. Those on
            CPU of a group with NPUs are made by the first op that takes tensors on CPU, which all ranks must call, and
            which waits for them as long as `timeout` says.

    Raises:
        ValueError: an unknown strategy or comm_alg, num_bytes is not positive, a group that this rank is not in or a
            mesh of several dimensions, a device that the group does not have, or a wrong value in the environment
            (`deep_ep.env`) of what no argument says; on this rank, before it waits for others.
        RuntimeError: on every rank, when other strategies were chosen before `destroy`; when ranks have different
            builds of this package; when windows cannot be made: too little memory on a rank, on NPUs too few bytes
            for flags and a slot of each rank, or, on CPU, ranks on several hosts; when a rank has died, leaves or does
            not come.
    """
    return prepare(group, num_bytes, strategy, low_latency_strategy, timeout, comm_alg, device, chooses=True)


def prepare(
    group: Group,
    num_bytes: int | None,
    strategy: str | NormalStrategy | None,
    low_latency_strategy: str | LowLatencyStrategy | None,
    timeout: timedelta | None,
    comm_alg: str,
    device: str | torch.device | None = None,
    *,
    chooses: bool,
) -> GroupInfo:
    """As `init`. Without `chooses` the choice is for the caller alone, and for functions if there is none yet."""
    normal, low_latency = MODES[env.value("DEEP_USE_MODE") if strategy is None else one_of("strategy", strategy, MODES)]
    if low_latency_strategy is not None:
        low_latency = LowLatencyStrategy(one_of("low_latency_strategy", low_latency_strategy, LowLatencyStrategy))
    if error := check_comm_alg(comm_alg):
        raise ValueError(error)
    pg = process_group(group)
    if pg.group_name in _parents and _parents[pg.group_name].group() is pg:
        raise _is_parents(pg.group_name)
    if num_bytes is not None and num_bytes <= 0:
        raise ValueError(f"num_bytes must be positive, got {num_bytes}")
    for name in ("MOE_SHARED_EXPERT_RANK_NUM", "DEEP_EP_KERNEL_TIMEOUT"):
        env.value(name)
    on = _kinds(pg, device)
    from_environment = env.comm_alg(platform_of(pg))
    if num_bytes is None:
        num_bytes = env.window_bytes()
    name = pg.group_name
    if not _owns(pg):
        _drop(name)
    parts = _parts.get(name, {})
    wish = GroupInfo(name, pg.size(), normal, low_latency, comm_alg or from_environment)
    before = _infos[name] if chooses and name in _chosen else None
    if before is not None:
        # What is not asked for stays.
        wish = GroupInfo(
            name,
            pg.size(),
            before.normal if strategy is None else normal,
            before.low_latency if strategy is None and low_latency_strategy is None else low_latency,
            comm_alg or before.comm_alg,
        )
    _join(parts)
    patience = max(timeout or timedelta(0), group_timeout(pg))
    _make_missing(Meeting(pg, patience, INIT), pg, wish, before, _wanted(wish, on), num_bytes, timeout)
    if "npu" in {one.type for one in pg._device_types} and "default" in (wish.normal.value, wish.low_latency.value):
        _late[name] = _Late(num_bytes, timeout or group_timeout(pg), threading.Lock())
    if not _owns(pg):
        store = cast(Any, dist.distributed_c10d)._get_process_group_store(pg)
        _owners[name] = _Owner(weakref.ref(pg), weakref.ref(store or pg, functools.partial(_forget, name)))
    if _infos.get(name) == wish:
        wish = _infos[name]  # for which graphs have been traced
    if chooses:
        _chosen.add(name)
    if chooses or name not in _infos:
        _infos[name] = wish
    _compile.prepare()
    return wish


def _kinds(pg: dist.ProcessGroup, device: str | torch.device | None) -> set[str]:
    """The kinds of devices that windows are wanted for."""
    on = {device.type for device in pg._device_types}
    if device is not None:
        kind = str(device).split(":")[0]
        if kind not in on:
            raise ValueError(f"device must be one that the group has, {', '.join(sorted(on))}; got {str(device)!r}")
        return {kind}
    has_cpu = _owns(pg) and "cpu" in _parts.get(pg.group_name, {})
    return on - {"cpu"} if "npu" in on and not has_cpu else on


def _make_missing(
    meeting: Meeting,
    pg: dist.ProcessGroup,
    wish: GroupInfo,
    before: GroupInfo | None,
    wanted: list[str],
    num_bytes: int | None,
    timeout: timedelta | None,
) -> None:
    """Makes what of `wanted` some rank does not have. Collective."""
    name = pg.group_name
    parts = _parts.get(name, {})
    served = {kind: _is_served(parts.get(kind), num_bytes, timeout) for kind in wanted}
    with meeting:
        is_whole = all(part.usable for part in parts.values())
        wishes = meeting.exchange((str(wish), served, is_whole, before and str(before)))
        _check_wishes(name, wishes)
        made: dict[str, Part] = {}
        try:
            for kind in wanted:
                if not all(wish[1][kind] for wish in wishes):
                    made[kind] = _make(kind, pg, meeting, num_bytes, timeout)
        except BaseException:
            for part in made.values():
                part.close()
            raise
        for kind, part in made.items():
            _close(name, kind)
            _parts.setdefault(name, {})[kind] = part
            if isinstance(part, Communicator):
                part.publish()
            if isinstance(part, Windows) and name in _spoiled:
                part.spoil()


def _make_late(op: str, name: str) -> str:
    """Makes the windows on CPU of a group with NPUs, of which `op` is the first one on CPU. Returns what is wrong."""
    late = _late.get(name)
    pg = _owners[name].group() if late is not None else None
    if late is None or pg is None:
        return ""
    call = f"deep_ep.{op}"
    with late.lock:
        if "cpu" in _parts.get(name, {}):
            return ""
        try:
            _make_missing(
                Meeting(pg, late.timeout, call), pg, _infos[name], None, ["cpu"], late.num_bytes, late.timeout
            )
        except Exception as error:
            reason = str(error).removeprefix("deep_ep: ")
            return reason if reason.startswith(call) else f"{call}: {reason}"
    return ""


library.deep_ep_make_windows_by(_make_late)


def _wanted(wish: GroupInfo, devices: set[str]) -> list[str]:
    """The parts that the strategies use."""
    strategies = {wish.normal.value, wish.low_latency.value}
    wanted = []
    if "default" in strategies:
        # The kinds of devices for which there are kernels here.
        on_npu = "npu" in devices and npu_windows.load_kernels() is not None
        wanted = ["cpu"] * ("cpu" in devices) + ["npu"] * on_npu
    return wanted + ["alltoall"] * ("alltoall" in strategies)


def _is_served(part: Part | None, num_bytes: int | None, timeout: timedelta | None) -> bool:
    return (
        part is not None
        and part.usable
        and (isinstance(part, Communicator) or part.num_bytes >= (num_bytes or 0))
        and timeout in (None, part.timeout)
    )


def _check_wishes(name: str, wishes: list[tuple[str, dict[str, bool], bool, str | None]]) -> None:
    modes = [wish[0] for wish in wishes]
    if all(wish[2] for wish in wishes):
        for rank, (mode, _, _, before) in enumerate(wishes):
            if before is not None and mode != before:
                raise RuntimeError(
                    f"deep_ep: the group '{name}' has been prepared with the strategy {before}, and rank {rank} asks "
                    f"for {mode}; give it to a Buffer, for its calls, or call deep_ep.destroy(group) on all ranks first"
                )
    if len(set(modes)) > 1:
        raise RuntimeError(f"deep_ep: the ranks of the group '{name}' chose different strategies: {'; '.join(modes)}")
    for rank, (_, served, _, _) in enumerate(wishes):
        if served.keys() != wishes[0][1].keys():
            raise RuntimeError(
                f"deep_ep: rank {rank} wants {', '.join(served) or 'no windows'} for the group '{name}', rank 0 "
                f"{', '.join(wishes[0][1]) or 'none'}; give all ranks the same device, and install kernels for NPUs on "
                "all or none"
            )


def _make(kind: str, pg: dist.ProcessGroup, meeting: Meeting, num_bytes: int | None, timeout: timedelta | None) -> Part:
    timeout = timeout or group_timeout(pg)
    if kind == "alltoall":
        return Communicator(pg, meeting, timeout)
    return (Windows if kind == "cpu" else npu_windows.Windows)(pg, meeting, num_bytes, timeout)


def _owns(pg: dist.ProcessGroup) -> bool:
    """Whether what is known under the group's name is of this group, and not of one that had the name before."""
    owner = _owners.get(pg.group_name)
    return owner is not None and owner.group() is pg


def _forget(name: str, known: "weakref.ref[Any]") -> None:
    if name in _owners and _owners[name].known is known:
        _drop(name)


def _drop(name: str) -> None:
    _owners.pop(name, None)
    _infos.pop(name, None)
    _spoiled.discard(name)
    _late.pop(name, None)
    _chosen.discard(name)
    for kind in list(_parts.get(name, ())):
        _close(name, kind)
    _parts.pop(name, None)


def _close(name: str, kind: str) -> None:
    part = _parts.get(name, {}).pop(kind, None)
    if part is not None:
        part.close()


def _join(parts: dict[str, Part]) -> None:
    for part in list(parts.values()):
        part.join()


def destroy(group: Group = None) -> None:
    """Waits for the calls that this rank has started, leaves the group and forgets its strategies. Peers that wait for
    this rank in an op raise.

    Tensors that lie in the window stay valid. Without this call the same happens in destroy_process_group, but for the
    waiting.
    """
    name = group if isinstance(group, str) else process_group(group).group_name
    try:
        _join(_parts.get(name, {}))
    finally:
        _drop(name)


def _is_parents(name: str) -> RuntimeError:
    return RuntimeError(
        f"deep_ep: this process was forked from a rank and has no part in its group '{name}'; call the function in the "
        "rank itself, or make a group of such processes"
    )


def info_of(group: Group) -> GroupInfo:
    """What `init` recorded for the group; traceable."""
    name = group if isinstance(group, str) else process_group(group).group_name
    info = _infos.get(name)
    if info is None and name in _parents:
        raise _is_parents(name)
    if info is None or not (torch.compiler.is_compiling() or _owns(process_group(name))):
        return _refuse_unprepared(name)
    return info


def runs_on_cpu(info: GroupInfo, given: Iterable[object]) -> bool:
    """Whether a call under ``default`` with such arguments runs on the CPU, where a rank can say that it has failed."""
    parts = _parts.get(info.name, {})
    if info.name not in _late:
        return "cpu" in parts
    kinds = {tensor.device.type for tensor in given if isinstance(tensor, torch.Tensor)}
    return kinds == {"cpu"} and ("cpu" in parts or "npu" not in parts)


@untraced
def _refuse_unprepared(name: str) -> NoReturn:
    """Not traced, since Dynamo does not say what traced code raises."""
    raise RuntimeError(
        f"deep_ep: the group '{name}' is not prepared, or gone; call deep_ep.init(group) first, on all its ranks"
    )


def spoil(info: GroupInfo) -> None:
    """From here on, results of calls of the group that go on hold NaN and -1 until they have come."""
    _spoiled.add(info.name)
    windows = cpu_windows(info.name)
    if windows is not None:
        windows.spoil()


def spoils(info: GroupInfo) -> bool:
    """Whether they do."""
    return info.name in _spoiled


def cpu_windows(name: str) -> Windows | None:
    """Those of the group of this name, if it has some."""
    windows = _parts.get(name, {}).get("cpu")
    return windows if isinstance(windows, Windows) else None


def has_npu_windows(name: str) -> bool:
    """Whether kernels of this library run on NPUs for the group of this name."""
    return "npu" in _parts.get(name, {})
