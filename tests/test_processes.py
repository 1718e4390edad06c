"""What a rank is to the operating system: a process that may fork, that other processes of its user can look into.

T local tokens, H hidden, K top-k, E experts, R ranks.
"""

import atexit
import gc
import json
import os
import traceback
from collections.abc import Callable
from typing import Any

import pytest
from cases import Case, assert_same
from op_calls import calls, check_ops, error_of, run
from ranks import STRATEGIES, RankContext, RankPool

import deep_ep
from deep_ep import groups

SMALL = 1 << 20  # bytes, the smallest window
CASES = {R: Case((5, 0, 7, 3)[:R], seed=R) for R in (1, 2, 3, 4)}


def in_child(body: Callable[[], Any]) -> Any:
    """What body() returns in a child of this process, which then ends as Python programs end; it has to be JSON."""
    receiver, sender = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(sender, json.dumps(body()).encode())
            gc.collect()
            atexit._run_exitfuncs()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.close(sender)
    with open(receiver) as answer:
        text = answer.read()
    _, status = os.waitpid(child, 0)
    assert status == 0
    return json.loads(text)


def fork_and_go_on(ctx: RankContext, strategy: str, leave: str) -> list[str]:
    """Rank 0 forks, and the child leaves the group. What ops say in the child."""
    group, right = ctx.group, calls(CASES[ctx.size])
    deep_ep.init(group, strategy=strategy, num_bytes=SMALL)
    arguments = right.arguments("dispatch", ctx.rank, group.group_name)
    public = (arguments["x"], arguments["topk_idx"], arguments["topk_weights"])
    held = [deep_ep.dispatch(*public, num_experts=right.case.E, group=group)]
    buffer = deep_ep.Buffer(group)
    x, ids, weights = public
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(ids, right.case.E)
    normal = (x, None, per_rank, None, in_rank, per_expert, ids, weights)

    def child() -> list[str]:
        held.clear()
        errors = [error_of(deep_ep.dispatch, *public, num_experts=right.case.E, group=group)]
        errors.append(error_of(deep_ep.init, group))
        if strategy == "default":
            errors.append(error_of(buffer.dispatch, *normal))
            errors.append(error_of(run, "dispatch", strategy, arguments))
        if leave == "destroys":
            deep_ep.destroy(group)
        return [f"{kind}: {message}" for kind, message in errors]

    told = in_child(child) if ctx.rank == 0 else []
    assert strategy != "default" or groups._windows[group.group_name]["cpu"].usable
    assert_same("recv_x", held[0].recv_x, right.result("dispatch", ctx.rank)[0])
    check_ops(right.case, ctx.rank, group.group_name, strategy)
    deep_ep.destroy(group)
    return told


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("leave", ["destroys", "exits"])
def test_forked_child_has_no_part_in_the_group(pool: RankPool, strategy: str, leave: str) -> None:
    told, _ = pool.run(2, fork_and_go_on, strategy, leave)
    assert len(told) == (4 if strategy == "default" else 2)
    for error in told:
        assert error.startswith("RuntimeError: deep_ep") and "this process was forked from a rank" in error, told
