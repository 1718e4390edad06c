"""begin_profile and end_profile: the file is one that Chrome's and Perfetto's viewers take, with the group's calls."""

import json
import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from ranks import STRATEGIES, RankContext, RankPool
from test_bad_input import error_of

import deep_ep

T, H, K, E, I = 4, 32, 2, 4, 64


def events_of(path: Path, rank: int) -> list[dict[str, Any]]:
    """The calls of a trace, which must be as the format of Chrome's trace events wants it."""
    trace = json.loads(path.read_text())
    assert trace.keys() == {"traceEvents", "displayTimeUnit"} and trace["displayTimeUnit"] in ("ms", "ns")
    calls, names = [], []
    for event in trace["traceEvents"]:
        assert isinstance(event["name"], str) and (event["pid"], event["tid"]) == (rank, 0)
        assert isinstance(event["args"], dict) and isinstance(event["ts"], int | float)
        if event["ph"] == "M":
            names.append((event["name"], event["args"]["name"]))
            continue
        assert event["ph"] == "X" and event["cat"] == "deep_ep"
        assert event["ts"] >= 0 and event["dur"] > 0
        calls.append(event)
    assert [name for name, _ in names] == ["process_name", "thread_name"] and names[0][1] == f"rank {rank}"
    # Viewers draw events of one thread as a stack: one begins after another, or ends within it.
    open_until: list[float] = []
    for event in calls:
        while open_until and event["ts"] >= open_until[-1]:
            open_until.pop()
        end = event["ts"] + event["dur"]
        assert not open_until or end <= open_until[-1]
        open_until.append(end)
    return calls


def check_trace(ctx: RankContext, strategy: str, folder: str) -> None:
    group = ctx.prepared_group(strategy)
    with mock.patch.dict(os.environ, DEEP_USE_MODE=strategy):
        buffer, other = deep_ep.Buffer(group), deep_ep.Buffer(group)
    ids = torch.arange(T * K).view(T, K) % E

    def layer(x: torch.Tensor) -> torch.Tensor:
        sent = deep_ep.dispatch(x, ids, num_experts=E, group=group, num_worst_tokens=2 * T * K)
        return deep_ep.combine(sent.recv_x, sent.handle, group=group)

    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.ones(T, H, requires_grad=True)

    # Calls of functions, in eager and compiled code, and of backward; the first and the last are left out.
    weights = ["combine_backward_weights"] * (strategy == "default")
    once = ["dispatch", "combine", "combine_backward", *weights, "dispatch_backward"]
    buffer.begin_profile(1, 2 * len(once) - 2, folder)
    for fn in (layer, compiled):
        fn(x).sum().backward()
    buffer.end_profile()
    calls = events_of(Path(folder, f"rank{ctx.rank}", "trace_view.json"), ctx.rank)
    assert [call["name"] for call in calls] == (once * 2)[1:-1]
    if strategy == "default":
        assert all(call["args"]["hidden"] == H and call["args"]["wait (us)"] >= 0 for call in calls)
        sent = calls[len(once) - 1]["args"]
        assert (sent["tokens"], sent["top_k"], sent["experts"]) == (T, K, E)
        spent = {name: n for name, n in sent.items() if name.endswith("(us)")}
        assert len(spent) == 6 and sum(spent.values()) > 0

    # One call of fused_deep_moe is one, with what it calls within it. Any Buffer of the group may begin and end.
    w = deep_ep.fused_weights(torch.ones(E // 2, 2 * I, H), torch.ones(E // 2, H, I))
    buffer.begin_profile(1, 1, folder)
    for _ in range(3):
        buffer.fused_deep_moe(x.detach(), ids, torch.ones(T, K), *w, T, E, quant_mode=0)
    other.runtime.end_profile()
    calls = events_of(Path(folder, f"rank{ctx.rank}", "trace_view.json"), ctx.rank)
    assert [call["name"] for call in calls] == ["fused_deep_moe"] * 2 + ["dispatch", "combine"]

    buffer.end_profile()  # of nothing
    with mock.patch("deep_ep.profile.has_npu_windows", return_value=True):
        assert "use torch_npu.profiler" in error_of(buffer.begin_profile, 0, 1)[1]
    assert error_of(buffer.begin_profile, -1, 1)[1] == "num_profile_skip_launches must not be negative, got -1"
    assert "must not both be 0" in error_of(buffer.begin_profile, 0, 0)[1]
    buffer.begin_profile(0, 1, folder)
    assert "is profiled already" in error_of(other.begin_profile, 0, 1)[1]
    if strategy == "default":  # with new windows, what was noted is gone
        deep_ep.destroy(group)
        with mock.patch.dict(os.environ, DEEP_USE_MODE=strategy):
            deep_ep.init(group)
        assert "have been made since" in error_of(buffer.end_profile)[1]
    else:
        buffer.end_profile()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_trace(pool: RankPool, tmp_path: Path, strategy: str) -> None:
    pool.run(2, check_trace, strategy, str(tmp_path))
