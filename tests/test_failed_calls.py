"""Calls that fail on a rank before their op has been entered there: peers raise at once, with the reason.

test_fuzz_bad_calls.py draws such calls at random; here is what they say. T local tokens, H hidden, K top-k, E experts,
R ranks, L = E/R local experts, M num_max_dispatch_tokens_per_rank.
"""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import numpy
import pytest
import torch
from ranks import STRATEGIES, RankContext, RankPool
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import deep_ep
from deep_ep import collective
from deep_ep.debug import op_log

R, H, M = 2, 32, 4
E = 2 * R


def buffer_of(ctx: RankContext, strategy: str, rows: str) -> deep_ep.Buffer:
    group = ctx.prepared_group(strategy)
    return deep_ep.Buffer(group, rows=rows, normal_strategy=strategy, low_latency_strategy=strategy)


def inputs(rank: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """x, topk_idx and topk_weights of 3 tokens."""
    generator = torch.Generator().manual_seed(10 * seed + rank)
    ids = torch.stack([torch.randperm(E, generator=generator)[:2] for _ in range(3)])
    return torch.randn(3, H, generator=generator), ids, torch.rand(3, 2, generator=generator)


def layout(buffer: deep_ep.Buffer, ids: Tensor) -> dict[str, Any]:
    per_rank, _, per_expert, mask, _ = buffer.get_dispatch_layout(ids, E)
    return {"num_tokens_per_rank": per_rank, "num_tokens_per_expert": per_expert, "is_token_in_rank": mask}


def outcome(call: Callable[[], Any]) -> tuple[str, str]:
    """The type and text of what a call raises, or that it raises nothing."""
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error)
    return "nothing", ""


def waited(results: Any) -> Any:
    """Of a call in two steps, whichever way it is told to wait."""
    if isinstance(results, deep_ep.Started):
        return deep_ep.wait(results)
    for one in results:
        if isinstance(one, deep_ep.EventOverlap):
            one.current_stream_wait()
        elif callable(one):
            one()
    return results


def check_usable(ctx: RankContext, strategy: str) -> None:
    """Each rank gets its own token back."""
    group = ctx.prepared_group(strategy)
    x = torch.full((1, H), float(ctx.rank))
    out = deep_ep.dispatch(x, torch.full((1, 1), ctx.rank), num_experts=R, group=group)
    assert torch.equal(deep_ep.combine(out.recv_x, out.handle, group=group), x)


# What Buffer and functions refuse in Python

Change = Callable[[dict[str, Any]], dict[str, Any]]

WRONG: dict[str, tuple[str, str, Change]] = {
    "quant_mode must be one of": ("expert", "dispatch", lambda given: {"quant_mode": "int4"}),
    "H must be divisible by 128": ("expert", "dispatch", lambda given: {"quant_mode": "block_fp8_e4m3"}),
    "is_token_in_rank is missing": ("expert", "dispatch", lambda given: {"is_token_in_rank": None}),
    "x requires a gradient": (
        *("rank", "dispatch"),
        lambda given: {"x": given["x"].clone().requires_grad_(), "quant_mode": "int8"},
    ),
    "is_token_in_rank must be torch.bool": (
        *("rank", "dispatch"),
        lambda given: {"is_token_in_rank": given["is_token_in_rank"].int()},
    ),
    "topk_idx must be a torch.Tensor, got tuple": (
        *("expert", "dispatch"),
        lambda given: {"topk_idx": (given["topk_idx"],)},
    ),
    "num_worst_tokens must be an int, got 4.0": ("rank", "dispatch", lambda given: {"num_worst_tokens": 4.0}),
    "x must be a torch.Tensor or two tensors in a tuple, got ndarray": (
        *("rank", "dispatch"),
        lambda given: {"x": numpy.zeros((3, H))},
    ),
    "x must be a dense tensor, got torch.sparse_coo": (
        *("expert", "dispatch"),
        lambda given: {"x": given["x"].to_sparse()},
    ),
    "x must have values, got a tensor on the device meta": (
        *("expert", "dispatch"),
        lambda given: {"x": given["x"].to("meta")},
    ),
    "topk_idx has the id 4 at [2, 1]; allowed are -1 and 0..3": (
        *("rank", "dispatch"),
        lambda given: {"topk_idx": torch.tensor([[0, 1], [2, 3], [0, E]])},
    ),
    "num_experts must be an int, got 4.0": ("expert", "low_latency_dispatch", lambda given: {"num_experts": 4.0}),
    "cumulative_local_expert_recv_stats must be torch.int32 [2]": (
        *("rank", "low_latency_dispatch"),
        lambda given: {"cumulative_local_expert_recv_stats": torch.zeros(3, dtype=torch.int32)},
    ),
    "handle must be a DispatchHandle or an AlignedHandle or an InternodeHandle or a RankHandle, got str": (
        *("expert", "combine"),
        lambda given: {"handle": "handle"},
    ),
    "bias must be torch.float32": ("rank", "combine", lambda given: {"bias": torch.zeros(1)}),
    "unexpected keyword argument 'biases'": ("rank", "combine", lambda given: {"biases": None}),
}


def arguments(buffer: deep_ep.Buffer, op: str) -> dict[str, Any]:
    if op == "combine":
        return {"x": torch.zeros(0, H), "handle": nothing_received(buffer)}
    x, ids, _ = inputs(buffer.rank)
    if op == "dispatch":
        return {"x": x, "topk_idx": ids, **layout(buffer, ids)}
    sizes = {"num_max_dispatch_tokens_per_rank": M, "num_experts": E}
    return {"x": x, "topk_idx": ids, "use_fp8": False, **sizes}


def nothing_received(buffer: deep_ep.Buffer) -> Any:
    """A handle of a dispatch in which no rank sends anything, without making it."""
    src, head, mask = (torch.zeros(0, n, dtype=torch.int32) for n in (3, 2, R))
    matrices = torch.zeros(R, R, dtype=torch.int32), torch.zeros(R, 2, dtype=torch.int32)
    recv = torch.zeros(2, R, dtype=torch.int32)
    if buffer.runtime.rows == "rank":
        return (*matrices, recv, src, mask.bool(), head)
    return deep_ep.DispatchHandle(*matrices, recv, src, mask, head, head.long(), head.float())


def one_is_wrong(ctx: RankContext, strategy: str, wrong_on: int) -> dict[str, tuple[str, str]]:
    outcomes = {}
    for text, (rows, op, change) in WRONG.items():
        buffer = buffer_of(ctx, strategy, rows)
        given = arguments(buffer, op)
        if ctx.rank == wrong_on:
            given |= change(given)
        outcomes[text] = outcome(partial(getattr(buffer, op), **given))
        check_usable(ctx, strategy)
    return outcomes


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("wrong_on", range(R))
def test_one_rank_is_wrong(pool: RankPool, strategy: str, wrong_on: int) -> None:
    by_rank = pool.run(R, one_is_wrong, strategy, wrong_on)
    for text in WRONG:
        kind, said = by_rank[wrong_on][text]
        kinds = {"x requires a gradient": "RuntimeError", "unexpected keyword argument 'biases'": "TypeError"}
        assert kind == kinds.get(text, "ValueError") and text in said, (kind, said)
        kind, heard = by_rank[1 - wrong_on][text]
        assert kind == "RuntimeError" and f"rank {wrong_on}: " in heard and text in heard, (text, kind, heard)


def all_are_wrong(ctx: RankContext, strategy: str) -> list[tuple[str, str]]:
    group = ctx.prepared_group(strategy)
    x, ids, _ = inputs(ctx.rank)
    outcomes = [outcome(lambda: deep_ep.dispatch(x.double(), ids, num_experts=E, group=group))]
    outcomes.append(outcome(lambda: deep_ep.dispatch("x", ids, num_experts=E, group=group)))  # type: ignore[arg-type]
    check_usable(ctx, strategy)
    return outcomes


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_fault_on_all_ranks_is_one_sentence(pool: RankPool, strategy: str) -> None:
    for (kind, said), of_python in pool.run(R, all_are_wrong, strategy):
        assert (
            kind == "RuntimeError"
            and said.startswith("deep_ep.dispatch: all ranks: x must be")
            and "rank 0" not in said
        )
        assert of_python == ("ValueError", "x must be a torch.Tensor, got str")


# Calls in two steps


def two_steps(ctx: RankContext, strategy: str) -> list[tuple[str, str]]:
    """Rank 1 is wrong: it hears at issue, rank 0 when it waits at the latest."""
    group, wrong = ctx.prepared_group(strategy), ctx.rank == 1
    x, ids, weights = inputs(ctx.rank)
    buffers = {rows: buffer_of(ctx, strategy, rows) for rows in ("expert", "rank")}
    out = deep_ep.dispatch(x, ids, weights, num_experts=E, group=group)
    given = {rows: {"x": x, "topk_idx": ids, **layout(buffer, ids)} for rows, buffer in buffers.items()}
    steps: list[Callable[[], Any]] = [
        lambda: deep_ep.dispatch_start(x, ids + E * wrong, num_experts=E, group=group),
        lambda: deep_ep.dispatch_start(x, ids, num_experts=float(E) if wrong else E, group=group),  # type: ignore[arg-type]
        lambda: deep_ep.combine_start(out.recv_x[: 1 if wrong else None], out.handle, group=group),
        *(
            lambda rows=rows: buffers[rows].dispatch(
                **given[rows] | {"topk_idx": ids + E * wrong}, num_worst_tokens=20, async_finish=True
            )
            for rows in given
        ),
        lambda: buffers["rank"].dispatch(
            **given["rank"], topk_weights=weights[: 1 if wrong else None], num_worst_tokens=20, async_finish=True
        ),
        lambda: buffers["expert"].low_latency_dispatch(
            x, ids, M, E, use_fp8=False, return_recv_hook=True, quant_mode="bad" if wrong else None
        ),
    ]
    outcomes = []
    for step in steps:
        before = deep_ep.dispatch_start(x, ids, num_experts=E, group=group)
        # Under rows="expert" Buffer's asynchronous calls have ended when they return.
        outcomes.append(outcome(step if wrong else lambda step=step: waited(step())))
        assert torch.equal(deep_ep.wait(before).recv_x, out.recv_x)
        check_usable(ctx, strategy)
    return outcomes


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_steps(pool: RankPool, strategy: str) -> None:
    heard, said = pool.run(R, two_steps, strategy)
    for at, ((kind, text), (kind_there, text_there)) in enumerate(zip(heard, said, strict=True)):
        assert kind == "RuntimeError" and "rank 1: " in text, (at, kind, text)
        assert kind_there in ("ValueError", "RuntimeError"), (at, kind_there, text_there)
        reason = text_there.split("rank 1: ")[-1].removeprefix("deep_ep: ")
        assert reason in text, (at, reason, text)


# What was accepted with wrong values


def other_handles(ctx: RankContext, strategy: str, rows: str, async_finish: bool) -> list[tuple[str, str]]:
    buffer = buffer_of(ctx, strategy, rows)
    handles = []
    for seed in (1, 2):
        x, ids, _ = inputs(ctx.rank, seed)
        handles.append(buffer.dispatch(x, topk_idx=ids, **layout(buffer, ids))[4])
    outcomes = [
        outcome(lambda: waited(buffer.dispatch(x, handle=handles[ctx.rank], async_finish=async_finish))),
        outcome(lambda: waited(buffer.dispatch(x, handle=handles[1], async_finish=async_finish))),
    ]
    check_usable(ctx, strategy)
    return outcomes


@pytest.mark.parametrize("async_finish", [False, True])
@pytest.mark.parametrize("rows", ["expert", "rank"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_handles_of_different_dispatches(pool: RankPool, strategy: str, rows: str, async_finish: bool) -> None:
    for (kind, text), right in pool.run(R, other_handles, strategy, rows, async_finish):
        assert kind == "RuntimeError" and "one dispatch" in text, (kind, text)
        assert right == ("nothing", "")


def low_latency_combines(ctx: RankContext, strategy: str) -> list[tuple[str, str]]:
    outcomes = []
    x, ids, weights = inputs(ctx.rank)
    for rows in ("expert", "rank"):
        buffer = buffer_of(ctx, strategy, rows)
        recv_x, _, handle, _, _ = buffer.low_latency_dispatch(x, ids, M, E, use_fp8=False)
        same_rank = torch.where(ids >= 0, ids ^ 1, ids)  # the other expert of the same rank
        without = ids.clone()
        without[0, 0] = -1
        _, _, of_less, _, _ = buffer.low_latency_dispatch(x, without, M, E, use_fp8=False)
        right = torch.where(torch.tensor(ctx.rank == 0), ids, same_rank)
        outcomes += [
            outcome(partial(buffer.low_latency_combine, recv_x, right, weights, handle)),
            outcome(partial(buffer.low_latency_combine, recv_x, ids, weights, of_less)),
            outcome(partial(buffer.low_latency_combine, recv_x, ids, weights, handle)),
        ]
        check_usable(ctx, strategy)
    for shape in ((2, R * M - 1, H), (1, R * M, H), (2 * R * M, H)):
        wrong = torch.zeros(shape) if ctx.rank == 1 else recv_x
        outcomes.append(outcome(partial(buffer.low_latency_combine, wrong, ids, weights, handle)))
        check_usable(ctx, strategy)
    return outcomes


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_low_latency_combine_of_something_else(pool: RankPool, strategy: str) -> None:
    for outcomes in pool.run(R, low_latency_combines, strategy):
        for ids, less, right in (outcomes[:3], outcomes[3:6]):
            assert ids[0] == "RuntimeError" and "topk_idx" in ids[1], ids
            assert less[0] == "RuntimeError" and "topk_idx has the id" in less[1] and "not dispatched" in less[1], less
            assert right == ("nothing", "")
        for _, text in outcomes[6:]:
            assert (
                f"x must have the shape [L, R·M, H] of low_latency_dispatch's recv_x with L = 2 and R·M = {R * M}"
                in text
            )


def other_formats(ctx: RankContext, strategy: str) -> list[tuple[str, str]]:
    buffer, other = buffer_of(ctx, strategy, "expert"), ctx.rank == 1
    x, ids, _ = inputs(ctx.rank)
    given = {"topk_idx": ids, **layout(buffer, ids)}
    outcomes = [
        outcome(lambda: buffer.dispatch(x, **given, quant_mode="pertoken_fp8_e4m3" if other else "int8")),
        outcome(lambda: buffer.low_latency_dispatch(x[:, : 8 if other else H].contiguous(), ids, M, E)),
    ]
    check_usable(ctx, strategy)
    return outcomes


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_rows_in_different_formats(pool: RankPool, strategy: str) -> None:
    for outcomes in pool.run(R, other_formats, strategy):
        for kind, text in outcomes:
            assert kind == "RuntimeError" and "the calls differ: rank 0 has x as torch.int8 [T, 32] with scales" in text


def compiled_ids(ctx: RankContext) -> tuple[str, str]:
    buffer = buffer_of(ctx, "default", "rank")
    x, ids, _ = inputs(ctx.rank)
    given = layout(buffer, ids)

    def send(ids: Tensor) -> Tensor:
        return buffer.dispatch(x, topk_idx=ids, num_worst_tokens=20, **given)[0]

    torch._dynamo.reset()
    compiled = torch.compile(send, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(ids), send(ids))
    error = outcome(lambda: compiled(ids + (E if ctx.rank == 1 else 0)))
    check_usable(ctx, "default")
    return error


def test_ids_that_there_are_not_in_a_graph(pool: RankPool) -> None:
    for kind, text in pool.run(R, compiled_ids):
        assert kind == "RuntimeError" and "rank 1: topk_idx has the id" in text, (kind, text)


# Peers that do not come


def late_peer(ctx: RankContext, strategy: str) -> tuple[str, str]:
    """Rank 1 fails, and rank 0 comes once rank 1 has said so in its log."""
    ctx.prepared_group(strategy)
    x, ids, _ = inputs(ctx.rank)
    if ctx.rank == 0:
        ctx.store.wait([f"logged-{strategy}"])
        return outcome(lambda: deep_ep.dispatch(x, ids, num_experts=E, group=ctx.prepared_group(strategy)))

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            ctx.store.set(f"logged-{strategy}", record.getMessage())

    handler = Handler()
    collective.logger.addHandler(handler)
    try:
        with mock.patch.object(collective, "PATIENCE", 0.0):
            said = outcome(lambda: deep_ep.dispatch((x,), ids, num_experts=E, group=ctx.prepared_group(strategy)))
    finally:
        collective.logger.removeHandler(handler)
    assert "has failed on this rank" in ctx.store.get(f"logged-{strategy}").decode()
    return said


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_a_rank_says_while_its_peers_do_not_come(pool: RankPool, strategy: str) -> None:
    heard, said = pool.run(R, late_peer, strategy)
    assert said == ("ValueError", "x must be a torch.Tensor, got tuple")
    assert heard == ("RuntimeError", "deep_ep.dispatch: rank 1: x must be a torch.Tensor, got tuple")


def test_wait_for_something_else() -> None:
    with pytest.raises(ValueError, match="started must be what dispatch_start or combine_start returned, got str"):
        deep_ep.wait("started")  # type: ignore[arg-type]


# What nobody else is to hear of


def nothing_is_sent(ctx: RankContext) -> None:
    """One rank alone is wrong where its peers do not take part."""
    group = ctx.prepared_group("default")
    before = op_log(group)[1]
    if ctx.rank == 1:
        x, ids, _ = inputs(ctx.rank)
        x = x.double()
        with FakeTensorMode() as mode, pytest.raises(ValueError, match="x must be"):
            deep_ep.dispatch(mode.from_tensor(x), mode.from_tensor(ids), num_experts=E, group=group)
        with pytest.raises(RuntimeError, match=r"no group|not prepared"):
            deep_ep.dispatch(x, ids, num_experts=E, group="another")
    assert op_log(group)[1] == before
    buffer = buffer_of(ctx, "default", "expert")
    buffer.destroy()
    if ctx.rank == 1:
        with pytest.raises(RuntimeError, match="destroyed"):
            buffer.combine(torch.zeros(0, H), nothing_received(buffer))
    assert op_log(group)[1] == before
    check_usable(ctx, "default")


def test_where_nothing_is_entered(pool: RankPool) -> None:
    pool.run(R, nothing_is_sent)
