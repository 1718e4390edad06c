"""How a group is given, and which ProcessGroup that is."""

from collections.abc import Callable
from typing import NoReturn, TypeVar

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]

F = TypeVar("F", bound=Callable[..., object])


def untraced(function: F) -> F:
    """As torch.compiler.assume_constant_result, which would load Dynamo."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


Group = dist.ProcessGroup | DeviceMesh | str | None
"""How a group is given: a ProcessGroup, a DeviceMesh of one dimension, a name, or None for the default group."""


def process_group(group: Group) -> dist.ProcessGroup:
    """The ProcessGroup that is meant; traceable.

    ValueError: it is a mesh of several dimensions, or this rank is not in it. RuntimeError: there is no such group.
    """
    if isinstance(group, dist.ProcessGroup):
        return group
    if isinstance(group, str):
        try:
            return _resolve_process_group(group)  # type: ignore[arg-type]
        except RuntimeError as error:
            raise RuntimeError(f"deep_ep: there is no group named '{group}'") from error
    if isinstance(group, DeviceMesh) and group.ndim == 1 and group.get_coordinate() is not None:
        return group.get_group()
    if group is None and dist.group.WORLD is not None:
        return dist.group.WORLD
    return _refuse(group)


@untraced
def _refuse(group: object) -> NoReturn:
    """Says why it is no group of this rank. Not traced, since Dynamo does not say what traced code raises."""
    if group is None:
        raise RuntimeError("deep_ep: there is no default group; call torch.distributed.init_process_group first")
    if isinstance(group, DeviceMesh) and group.ndim != 1:
        raise ValueError(
            f"group must be a mesh of one dimension, got one of {group.ndim}: {group.mesh_dim_names or 'unnamed'}; "
            'slice it, as in mesh["ep"]'
        )
    if isinstance(group, DeviceMesh):
        raise ValueError(f"group must be one that this rank is in, got a mesh of the ranks {group.mesh.tolist()}")
    if group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("group must be one that this rank is in; torch.distributed.new_group gave it to other ranks")
    raise ValueError(f"group must be a ProcessGroup, a DeviceMesh of one dimension, a name or None, got {group!r}")
