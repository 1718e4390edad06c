"""Graphs in torchair's cache, loaded by another process, whose communicators have other names.

torchair's cached code finds each communicator again by its ranks, and writes its name into attributes called `group`,
but not into `group_ep` of torch_npu's MoE operators. A line added to that code does the same for these. Where there is
no such group, it raises, and torchair compiles the graph anew.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

from . import windows

_ATTRIBUTES = ("group_ep", "group_tp")


def refreshing(codegen: Callable[..., Any]) -> Callable[..., Any]:
    """torchair's way of writing a graph as code, with the line that refreshes names."""

    @functools.wraps(codegen)
    def codegen_with_refresh(graph: Any, *args: Any, **kwargs: Any) -> Any:
        code = codegen(graph, *args, **kwargs)
        used = graph.graph.used_process_group  # by name: ranks and tag
        if not isinstance(code, str) or not any(True for _ in _named(graph.graph, used)):
            return code
        return f"{code}\n__import__({__name__!r}, fromlist='_').refresh(ge_graph, {used!r})\n"

    return codegen_with_refresh


def refresh(graph: Any, used: dict[str, tuple[list[int], str]]) -> None:
    """Gives the nodes of a loaded graph this process's names of the communicators.

    used: by the name at compile time, the ranks and the tag of the group. RuntimeError: there is no such group here.
    """
    for node, attribute in list(_named(graph, used)):
        ranks, tag = used[node.attr[attribute].s.decode()]
        group = distributed_c10d._find_pg_by_ranks_and_tag(tag, ranks)
        if group is None:
            raise RuntimeError(f"deep_ep: a cached graph needs a group of the ranks {ranks}, which does not exist here")
        assert dist.get_rank() in ranks
        node.attr[attribute].s = windows.communicator(group).encode()


def _named(graph: Any, used: dict[str, Any]) -> Any:
    """The nodes and attributes that hold a name in `used`."""
    for node in graph.op:
        for attribute in _ATTRIBUTES:
            if attribute in node.attr and node.attr[attribute].s.decode() in used:
                yield node, attribute
