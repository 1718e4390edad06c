"""begin_profile and end_profile: a trace of a group's calls, which Chrome's and Perfetto's viewers open."""

import json
import os
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from .groups import cpu_windows, has_npu_windows
from .windows import Traced, Windows

# An op that is several ops, as fused_deep_moe, has so many at most, itself included.
_OPS_OF_ONE = 8


class Session(NamedTuple):
    """From begin_profile to end_profile, of one group."""

    group: "weakref.ref[dist.ProcessGroup]"
    skipped: int
    kept: int
    path: Path
    windows: Windows | None
    spans: list[Traced]
    """Of ops that run in Python."""


_sessions: dict[str, Session] = {}


def note(group: str, name: str, begin: int) -> None:
    """An op that runs in Python and has ended well. begin: of time.monotonic_ns."""
    session = _sessions.get(group)
    if session is not None:
        session.spans.append(Traced(name, begin, time.monotonic_ns(), {}))


def noted(op: Any, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel of an op that runs in Python, whose argument `group` names its group."""
    place = [argument.name for argument in op._schema.arguments].index("group")
    name = str(op).removeprefix("deep_ep.").removesuffix(".default")

    def run(*args: Any, **kwargs: Any) -> Any:
        begin = time.monotonic_ns()
        results = kernel(*args, **kwargs)
        note(args[place], name, begin)
        return results

    return run


def begin(
    group: dist.ProcessGroup,
    num_profile_skip_launches: int,
    num_profile_active_launches: int,
    profile_trace_dir: str | None,
) -> None:
    """As `Buffer.begin_profile`."""
    skipped, kept, name = num_profile_skip_launches, num_profile_active_launches, group.group_name
    for argument, number in (("skip", skipped), ("active", kept)):
        if number < 0:
            raise ValueError(f"num_profile_{argument}_launches must not be negative, got {number}")
    if skipped + kept == 0:
        raise ValueError("num_profile_skip_launches and num_profile_active_launches must not both be 0")
    if has_npu_windows(name):
        raise RuntimeError("deep_ep: begin_profile: the kernels of this group run on an NPU; use torch_npu.profiler")
    if name in _sessions and _sessions[name].group() is group:
        raise RuntimeError(f"deep_ep: begin_profile: the group '{name}' is profiled already; call end_profile first")
    windows = cpu_windows(name)
    if windows is not None:
        windows.trace(_OPS_OF_ONE * (skipped + kept))
    path = Path(profile_trace_dir or os.getcwd(), f"rank{group.rank()}", "trace_view.json")
    _sessions[name] = Session(weakref.ref(group), skipped, kept, path, windows, [])


def end(group: dist.ProcessGroup) -> None:
    """As `Buffer.end_profile`."""
    name, rank = group.group_name, group.rank()
    session = _sessions.pop(name, None)
    if session is None or session.group() is not group:
        return
    if session.windows is not cpu_windows(name):
        raise RuntimeError(f"deep_ep: end_profile: the windows of '{name}' have been made since begin_profile")
    calls = session.spans + (session.windows.traced() if session.windows is not None else [])
    events: list[dict[str, Any]] = [
        {"name": kind, "ph": "M", "pid": rank, "tid": 0, "ts": 0, "args": {"name": text}}
        for kind, text in (("process_name", f"rank {rank}"), ("thread_name", f"group {name}"))
    ]
    for call in _counted(calls, session.skipped, session.kept):
        times = {"ts": call.begin * 1e-3, "dur": (call.end - call.begin) * 1e-3}
        events.append({"name": call.name, "cat": "deep_ep", "ph": "X", "pid": rank, "tid": 0, **times})
        events[-1]["args"] = call.numbers
    session.path.parent.mkdir(parents=True, exist_ok=True)
    session.path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))


def _counted(calls: list[Traced], skipped: int, kept: int) -> Iterator[Traced]:
    """Those of number `skipped` to `skipped + kept`, with what lies within them."""
    number, end = -1, 0
    for call in sorted(calls, key=lambda call: (call.begin, -call.end)):
        if call.end > end:
            number, end = number + 1, call.end
        if skipped <= number < skipped + kept:
            yield call
