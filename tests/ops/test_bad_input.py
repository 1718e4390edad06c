"""Wrong arguments: what the error says, that every rank raises it, and that the group works afterwards.

Mostly one rank, the last one, is wrong, and all ranks must raise the same error: it names the op, that rank,
the argument, what was given and what is allowed. T local tokens, H hidden, K top-k, E experts, R ranks,
N received rows.
"""

import os
import resource
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import pytest
import reference
import torch
from cases import Case, make_inputs
from op_calls import OPS, calls, check_ops, error_of, run
from ranks import STRATEGIES, RankContext, RankPool
from torch import Tensor

import deep_ep

CASES = {1: Case((7,), seed=3), 3: Case((5, 0, 7), seed=3)}
MAX_ROWS = 2**31 - 1


class Wrong(NamedTuple):
    """A wrong value for one argument of an op, and what the error must contain.

    `says` are templates over the sizes of the rank that is wrong.
    """

    op: str
    argument: str
    change: Callable[[Any], Any]
    says: tuple[str, ...]
    sizes: tuple[int, ...] = (1, 3)


DTYPES = {
    "topk_idx": torch.int64,
    "recv_src_idx": torch.int32,
    "send_head": torch.int32,
}
HANDLE = ("topk_idx", "recv_src_idx", "send_head")
TENSORS = {
    "dispatch": ("x", "topk_idx", "topk_weights"),
    "combine": ("x", "topk_weights", *HANDLE),
    "dispatch_backward": ("grad_recv_x", "grad_recv_topk_weights", *HANDLE),
    "combine_backward": ("grad_out", "x", "topk_weights", *HANDLE),
}


def other_dtype(tensor: Tensor) -> Tensor:
    return tensor.to({torch.float32: torch.float64, torch.int64: torch.int32, torch.int32: torch.int64}[tensor.dtype])


def strided(tensor: Tensor) -> Tensor:
    return tensor.t().contiguous().t()


def without_last_row(tensor: Tensor) -> Tensor:
    return tensor[:-1]


def without_last_column(tensor: Tensor) -> Tensor:
    return tensor[:, :-1].contiguous()


def with_value(value: int, *at: int) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor[at] = value
        return tensor

    return change


def wrong_tensors() -> dict[str, Wrong]:
    """Every tensor of every op with another dtype, number of dimensions, layout and length."""
    table = {}
    for op, names in TENSORS.items():
        for name in names:
            dtype = DTYPES.get(name, torch.float32)
            given = other_dtype(torch.empty(0, dtype=dtype)).dtype
            table |= {
                f"{op}: {name} of another dtype": Wrong(op, name, other_dtype, (name, f"got {given}", str(dtype))),
                f"{op}: {name} without dimensions": Wrong(
                    op, name, lambda t: t.new_zeros(()), (name, "shape", "got []")
                ),
                f"{op}: {name} with three dimensions": Wrong(op, name, lambda t: t[None], (name, "shape", "got [1, ")),
                f"{op}: {name} strided": Wrong(op, name, strided, (name, "contiguous")),
            }
    for op, name, length in (
        ("dispatch", "topk_idx", "{T}"),
        ("dispatch", "topk_weights", "{T}"),
        ("combine", "topk_weights", "{T}"),
        ("combine", "recv_src_idx", "{N}"),
        ("combine", "send_head", "{T}"),
        ("dispatch_backward", "grad_recv_topk_weights", "{N}"),
        ("dispatch_backward", "recv_src_idx", "{N}"),
        ("dispatch_backward", "send_head", "{T}"),
        ("combine_backward", "grad_out", "{T}"),
        ("combine_backward", "topk_weights", "{T}"),
        ("combine_backward", "recv_src_idx", "{N}"),
        ("combine_backward", "send_head", "{T}"),
    ):
        given = f"got [{length[:-1]}-1}}, "
        table[f"{op}: {name} too short"] = Wrong(op, name, without_last_row, (name, given, length))
    for op, name, columns in (
        ("dispatch", "topk_weights", "{K}"),
        ("combine", "recv_src_idx", "3"),
        ("combine", "send_head", "{K}"),
        ("dispatch_backward", "grad_recv_topk_weights", "{K}"),
        ("combine_backward", "grad_out", "{H}"),
    ):
        table[f"{op}: {name} too narrow"] = Wrong(op, name, without_last_column, (name, columns))
    table["dispatch: topk_idx without columns"] = Wrong(
        "dispatch", "topk_idx", lambda ids: ids[:, :0].contiguous(), ("topk_idx", "column")
    )
    return table


def wrong_numbers() -> dict[str, Wrong]:
    table = {
        "dispatch: num_worst_tokens negative": Wrong(
            "dispatch", "num_worst_tokens", lambda _: -1, ("num_worst_tokens", "got -1", "0 (exact)")
        ),
        "dispatch: num_worst_tokens too large": Wrong(
            "dispatch", "num_worst_tokens", lambda _: MAX_ROWS + 1, ("num_worst_tokens", str(MAX_ROWS))
        ),
    }
    for op in OPS:
        table |= {
            f"{op}: num_experts not divisible": Wrong(
                op, "num_experts", lambda E: E + 1, ("num_experts", "{E+1}", "divisible", "num_ranks", "{R}"), (3,)
            ),
            f"{op}: num_experts 0": Wrong(op, "num_experts", lambda _: 0, ("num_experts", "got 0")),
            f"{op}: num_ranks too large": Wrong(op, "num_ranks", lambda R: R + 1, ("num_ranks", "{R}", "{R+1}")),
            f"{op}: num_ranks 0": Wrong(op, "num_ranks", lambda _: 0, ("num_ranks", "0")),
        }
    return table


def wrong_values() -> dict[str, Wrong]:
    """Values that only a look into the tensors shows."""
    table = {
        "dispatch: id too large": Wrong(
            "dispatch",
            "topk_idx",
            lambda ids: ids.clone().fill_(100),
            ("topk_idx", "id 100", "[0, 0]", "-1", "0..{E-1}"),
        ),
        "dispatch: id too large in the last place": Wrong(
            "dispatch", "topk_idx", with_value(6, -1, -1), ("topk_idx", "id 6", "[{T-1}, {K-1}]", "0..{E-1}")
        ),
        "dispatch: id below -1": Wrong(
            "dispatch", "topk_idx", with_value(-2, 1, 0), ("topk_idx", "id -2", "[1, 0]", "-1", "0..{E-1}")
        ),
    }
    for op in OPS[1:]:
        table |= {
            f"{op}: id too large": Wrong(
                op, "topk_idx", lambda ids: torch.where(ids >= 0, ids + 100, -1), ("topk_idx", "id 10", "0..{E-1}")
            ),
            f"{op}: source rank too large": Wrong(
                op, "recv_src_idx", with_value(9, 0, 0), ("recv_src_idx", "9", "0..{R-1}")
            ),
            f"{op}: k too large": Wrong(op, "recv_src_idx", with_value(9, 1, 2), ("recv_src_idx", "9", "0..{K-1}")),
            f"{op}: token negative": Wrong(op, "recv_src_idx", with_value(-7, 1, 1), ("recv_src_idx", "-7")),
            f"{op}: token too large": Wrong(op, "recv_src_idx", with_value(MAX_ROWS, 1, 1), ("rows", "dispatch")),
            f"{op}: rows in another order": Wrong(op, "recv_src_idx", lambda src: src.flip(0), ("rows", "dispatch")),
            f"{op}: rows without a source": Wrong(
                op, "recv_src_idx", lambda src: torch.full_like(src, -1), ("rows", "dispatch")
            ),
            f"{op}: row too large": Wrong(
                op, "send_head", lambda head: torch.where(head >= 0, head + 1000, head), ("row",)
            ),
            f"{op}: slots without a row": Wrong(
                op, "send_head", lambda head: torch.full_like(head, -1), ("rows", "dispatch")
            ),
        }
    return table


WRONG = wrong_tensors() | wrong_numbers() | wrong_values()


def outcome_of_wrong(ctx: RankContext, strategy: str, name: str) -> tuple[str, str]:
    wrong, case = WRONG[name], CASES[ctx.size]
    group = ctx.prepared_group(strategy).group_name
    arguments = calls(case).arguments(wrong.op, ctx.rank, group)
    if ctx.rank == ctx.size - 1:
        arguments[wrong.argument] = wrong.change(arguments[wrong.argument])
    error = error_of(run, wrong.op, strategy, arguments)
    check_ops(case, ctx.rank, group, strategy, (wrong.op,))
    return error


def sizes_of(case: Case) -> dict[str, int]:
    last = case.R - 1
    sizes = {"T": case.tokens[last], "H": case.H, "K": case.K, "E": case.E, "R": case.R}
    sizes["N"] = calls(case).arguments("combine", last, "")["x"].shape[0]
    return sizes


def fill_in(template: str, sizes: dict[str, int]) -> str:
    """'0..{E-1}' to '0..5'."""
    for size, value in sizes.items():
        for text, offset in (("", 0), ("-1", -1), ("+1", 1)):
            template = template.replace(f"{{{size}{text}}}", str(value + offset))
    return template


def assert_told(errors: list[tuple[str, str]], says: list[str]) -> None:
    """All ranks raised one RuntimeError that contains `says`."""
    assert len(set(errors)) == 1, errors
    kind, message = errors[0]
    assert kind == "RuntimeError", errors[0]
    for fact in says:
        assert fact in message, f"{fact!r} is not in {message!r}"


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", WRONG)
def test_one_wrong_rank(pool: RankPool, strategy: str, name: str) -> None:
    wrong = WRONG[name]
    for R in wrong.sizes:
        says = [f"deep_ep.{wrong.op}: ", f"rank {R - 1}", *(fill_in(text, sizes_of(CASES[R])) for text in wrong.says)]
        assert_told(pool.run(R, outcome_of_wrong, strategy, name), says)


def outcome_of_public_calls(ctx: RankContext, strategy: str, compiled: bool) -> list[tuple[str, str]]:
    """deep_ep.dispatch and deep_ep.combine with wrong values on the last rank, in training."""
    case, group = CASES[ctx.size], ctx.prepared_group(strategy)
    arguments = calls(case).arguments("dispatch", ctx.rank, group.group_name)
    x, ids = arguments["x"].clone().requires_grad_(), arguments["topk_idx"]

    def there_and_back(x: Tensor, ids: Tensor, flipped: bool) -> Tensor:
        received = deep_ep.dispatch(x, ids, num_experts=case.E, group=group)
        handle = received.handle
        if flipped:
            handle = handle._replace(recv_src_idx=handle.recv_src_idx.flip(0))
        return deep_ep.combine(received.recv_x, handle, group=group)

    if compiled:
        torch._dynamo.reset()
        there_and_back = torch.compile(there_and_back, backend="aot_eager", fullgraph=True)
    last = ctx.rank == ctx.size - 1
    errors = [
        error_of(there_and_back, x, with_value(77, 0, 0)(ids) if last else ids, False),
        error_of(there_and_back, x, ids, last),
    ]
    check_ops(case, ctx.rank, group.group_name, strategy)
    return errors


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_one_wrong_rank_in_public_calls(pool: RankPool, strategy: str, compiled: bool) -> None:
    by_rank = pool.run(3, outcome_of_public_calls, strategy, compiled)
    wrong_id, wrong_handle = zip(*by_rank, strict=True)
    assert_told(list(wrong_id), ["deep_ep.dispatch: ", "rank 2: ", "topk_idx", "id 77", "[0, 0]", "0..5"])
    assert_told(list(wrong_handle), ["deep_ep.combine: ", "rank 2", "one dispatch"])


# Ranks that do not fit together


class Apart(NamedTuple):
    """Arguments that are right by themselves, but not those of the other ranks."""

    op: str
    change: Callable[[dict[str, Any]], dict[str, Any]]
    says: tuple[str, ...]


APART = {
    "dispatch: H": Apart("dispatch", lambda a: {"x": a["x"][:, :4].contiguous()}, ("hidden size", "8", "4")),
    "dispatch: K": Apart(
        "dispatch",
        lambda a: {name: a[name][:, :1].contiguous() for name in ("topk_idx", "topk_weights")},
        ("2", "1"),
    ),
    "dispatch: E": Apart("dispatch", lambda a: {"num_experts": 12}, ("num_experts", "6", "12")),
    "dispatch: dtype": Apart("dispatch", lambda a: {"x": a["x"].half()}, ("dtype", "float32", "float16")),
    "combine: H": Apart("combine", lambda a: {"x": a["x"][:, :4].contiguous()}, ("hidden size", "8", "4")),
    "combine: E": Apart("combine", lambda a: {"num_experts": 12}, ("num_experts", "6", "12")),
    "combine: dtype": Apart("combine", lambda a: {"x": a["x"].bfloat16()}, ("dtype", "float32", "bfloat16")),
    "dispatch_backward: H": Apart(
        "dispatch_backward", lambda a: {"grad_recv_x": a["grad_recv_x"][:, :4].contiguous()}, ("hidden size", "8", "4")
    ),
    "dispatch_backward: dtype": Apart(
        "dispatch_backward", lambda a: {"grad_recv_x": a["grad_recv_x"].half()}, ("dtype", "float32", "float16")
    ),
    "combine_backward: E": Apart("combine_backward", lambda a: {"num_experts": 12}, ("num_experts", "6", "12")),
    "combine_backward: dtype": Apart(
        "combine_backward",
        lambda a: {name: a[name].half() for name in ("x", "grad_out")},
        ("dtype", "float32", "float16"),
    ),
}


def outcome_of_apart(ctx: RankContext, strategy: str, name: str) -> tuple[str, str]:
    apart, case = APART[name], CASES[ctx.size]
    group = ctx.prepared_group(strategy).group_name
    arguments = calls(case).arguments(apart.op, ctx.rank, group)
    if ctx.rank == ctx.size - 1:
        arguments |= apart.change(arguments)
    error = error_of(run, apart.op, strategy, arguments)
    check_ops(case, ctx.rank, group, strategy)
    return error


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", APART)
def test_sizes_differ_between_ranks(pool: RankPool, strategy: str, name: str) -> None:
    says = [f"deep_ep.{APART[name].op}: ", "rank 0", "rank 2", "on all ranks", *APART[name].says]
    assert_told(pool.run(3, outcome_of_apart, strategy, name), says)


def outcome_of_two_ops(ctx: RankContext, strategy: str, of_most: str, of_last: str) -> tuple[str, str]:
    case = CASES[ctx.size]
    group = ctx.prepared_group(strategy).group_name
    op = of_last if ctx.rank == ctx.size - 1 else of_most
    kind, message = error_of(run, op, strategy, calls(case).arguments(op, ctx.rank, group))
    check_ops(case, ctx.rank, group, strategy)
    # Every rank's message begins with the op that it is in.
    return kind, message.removeprefix(f"deep_ep.{op}: ")


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    "of_most, of_last",
    [
        ("dispatch", "combine"),
        ("combine", "dispatch"),
        ("combine", "combine_backward"),
        ("dispatch_backward", "dispatch"),
        ("combine_backward", "dispatch_backward"),
    ],
)
def test_ranks_in_different_ops(pool: RankPool, strategy: str, of_most: str, of_last: str) -> None:
    errors = pool.run(3, outcome_of_two_ops, strategy, of_most, of_last)
    assert_told(errors, [of_most, of_last, "rank 0", "2"])


def handle_of_another_dispatch(case: Case, rank: int, same_counts: bool) -> dict[str, Tensor]:
    """As arguments. With the same counts, only the order of the tokens differs."""
    xs, ids, weights, worst = make_inputs(case)
    ids = [i.flip(0) if same_counts else (i + 1) % case.E for i in ids]
    dispatched = reference.dispatch(xs, ids, weights, case.E, worst)
    return {
        "topk_idx": ids[rank],
        "recv_src_idx": dispatched[rank].recv_src_idx,
        "send_head": dispatched[rank].send_head,
    }


def outcome_of_other_handle(ctx: RankContext, strategy: str, op: str, same_counts: bool) -> tuple[str, str]:
    case = CASES[ctx.size]
    group = ctx.prepared_group(strategy).group_name
    arguments = calls(case).arguments(op, ctx.rank, group)
    N = arguments["recv_src_idx"].shape[0]
    if ctx.rank == ctx.size - 1:
        arguments |= handle_of_another_dispatch(case, ctx.rank, same_counts)
        for name in ("x", "grad_recv_x", "grad_recv_topk_weights"):
            if name in arguments:
                arguments[name] = arguments[name].new_zeros(len(arguments["recv_src_idx"]), arguments[name].shape[1])
        assert (arguments["recv_src_idx"].shape[0] == N) == same_counts
    error = error_of(run, op, strategy, arguments)
    check_ops(case, ctx.rank, group, strategy)
    return error


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("same_counts", [False, True])
@pytest.mark.parametrize("op", OPS[1:])
def test_handle_of_another_dispatch_on_one_rank(pool: RankPool, strategy: str, same_counts: bool, op: str) -> None:
    errors = pool.run(3, outcome_of_other_handle, strategy, op, same_counts)
    assert_told(errors, [f"deep_ep.{op}: ", "rank 2", "handle", "one dispatch", "rows"])


# Groups, devices


def outcomes_without_group(ctx: RankContext, strategy: str) -> dict[str, tuple[str, str]]:
    """For each op and function: of a name that nobody has, and of a group that was not prepared."""
    case = CASES[ctx.size]
    unprepared = ctx.group.group_name
    errors = {}
    for op in OPS:
        arguments = calls(case).arguments(op, ctx.rank, "nobody's")
        errors[f"{op} on nobody's"] = error_of(run, op, strategy, arguments)
        # torch.distributed alone is enough for .alltoall.
        if strategy == "default":
            errors[f"{op} on unprepared"] = error_of(run, op, strategy, arguments | {"group": unprepared})
    x, topk_idx = arguments["x"], arguments["topk_idx"]
    handle = deep_ep.DispatchHandle(*([torch.zeros(1, 1)] * 8))
    for name, group in (("nobody's", "nobody's"), ("unprepared", ctx.group)):
        for function, of in (
            (deep_ep.dispatch, {"x": x, "topk_idx": topk_idx, "num_experts": case.E}),
            (deep_ep.combine, {"x": x, "handle": handle}),
            (deep_ep.get_dispatch_layout, {"topk_idx": topk_idx, "num_experts": case.E}),
        ):
            kind, message = error_of(function, **of, group=group)
            errors[f"{function.__name__}() on {name}"] = kind, message.replace(f"'{unprepared}'", "'unprepared'")
    return errors


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_unknown_and_unprepared_groups(pool: RankPool, strategy: str) -> None:
    for errors in pool.run(3, outcomes_without_group, strategy):
        for name, (kind, message) in errors.items():
            assert kind == "RuntimeError", name
            function, group = name.split(" on ")
            if group == "nobody's" or function.endswith("()"):
                assert f"'{group}'" in message, name
            if not function.endswith("()"):
                assert f"deep_ep.{function}: " in message, name
            assert "call deep_ep.init(group)" in message, name


def outcomes_on_meta(ctx: RankContext, strategy: str) -> dict[str, tuple[str, str]]:
    case = CASES[ctx.size]
    group = ctx.prepared_group(strategy).group_name
    errors = {}
    for op, names in TENSORS.items():
        arguments = calls(case).arguments(op, ctx.rank, group)
        for name in names:
            errors[f"{op}: {name}"] = error_of(run, op, strategy, arguments | {name: arguments[name].to("meta")})
        on_meta = {name: value.to("meta") if isinstance(value, Tensor) else value for name, value in arguments.items()}
        if op == "dispatch":
            on_meta["num_worst_tokens"] = 9
        results = run(op, strategy, on_meta)
        assert all(result.is_meta for result in ([results] if isinstance(results, Tensor) else results))
    check_ops(case, ctx.rank, group, strategy)
    return errors


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("R", [1, 3])
def test_meta_tensors(pool: RankPool, strategy: str, R: int) -> None:
    """One among CPU tensors is an error on that rank, before it takes part in the op; meta tensors only give shapes."""
    for errors in pool.run(R, outcomes_on_meta, strategy):
        for name, (kind, message) in errors.items():
            op, argument = name.split(": ")
            assert kind == "ValueError", name
            # Of two devices either may be the wrong one.
            assert f"deep_ep.{op}: " in message, name
            assert argument in message or "must be on meta" in message, name
            assert "cpu" in message, name
            assert "meta" in message, name


# get_dispatch_layout needs no group

LAYOUTS = {
    "another dtype": ((torch.zeros(3, 2, dtype=torch.int32), 4, 2, 1), ("topk_idx", "torch.int32", "torch.int64")),
    "one dimension": ((torch.zeros(3, dtype=torch.int64), 4, 2, 1), ("topk_idx", "shape", "got [3]")),
    "no dimension": ((torch.zeros((), dtype=torch.int64), 4, 2, 1), ("topk_idx", "shape", "got []")),
    "no column": ((torch.zeros(3, 0, dtype=torch.int64), 4, 2, 1), ("topk_idx", "column")),
    "strided": ((torch.zeros(2, 3, dtype=torch.int64).t(), 4, 2, 1), ("topk_idx", "contiguous")),
    "id too large": ((torch.tensor([[0, 1], [3, 4]]), 4, 2, 1), ("topk_idx", "id 4", "[1, 1]", "-1", "0..3")),
    "id below -1": ((torch.tensor([[0, -2]]), 4, 2, 1), ("topk_idx", "id -2", "[0, 1]", "-1", "0..3")),
    "not divisible": ((torch.zeros(3, 2, dtype=torch.int64), 5, 2, 1), ("num_experts", "5", "divisible", "2")),
    "no experts": ((torch.zeros(3, 2, dtype=torch.int64), 0, 2, 1), ("num_experts", "got 0")),
    "no ranks": ((torch.zeros(3, 2, dtype=torch.int64), 4, 0, 1), ("num_ranks", "got 0")),
    "no nodes": ((torch.zeros(3, 2, dtype=torch.int64), 4, 2, 0), ("num_nodes", "0", "num_ranks", "2")),
    "nodes of several sizes": ((torch.zeros(3, 2, dtype=torch.int64), 6, 3, 2), ("num_nodes", "2", "num_ranks", "3")),
}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_arguments(strategy: str, name: str) -> None:
    arguments, says = LAYOUTS[name]
    with pytest.raises(RuntimeError, match=r"^deep_ep\.get_dispatch_layout: ") as raised:
        getattr(torch.ops.deep_ep.get_dispatch_layout, strategy)(*arguments)
    for fact in says:
        assert fact in str(raised.value)


# init and Buffer


def check_mode(ctx: RankContext) -> list[tuple[str, str]]:
    with mock.patch.dict(os.environ, DEEP_USE_MODE="error"):
        errors = [error_of(deep_ep.init, ctx.group), error_of(deep_ep.Buffer, ctx.group)]
        # The environment does not count where a strategy is given.
        deep_ep.init(ctx.group, strategy="alltoall")
    errors.append(error_of(deep_ep.init, ctx.group, strategy="error"))
    check_ops(CASES[ctx.size], ctx.rank, ctx.group.group_name, "alltoall")
    deep_ep.destroy(ctx.group)
    return errors


@pytest.mark.parametrize("R", [1, 3])
def test_unknown_strategy(pool: RankPool, R: int) -> None:
    for *from_environment, from_argument in pool.run(R, check_mode):
        for kind, message in (*from_environment, from_argument):
            assert kind == "ValueError"
            assert "'error'" in message
            assert "default, alltoall, ops" in message
        assert all("DEEP_USE_MODE" in message for _, message in from_environment)
        assert "strategy" in from_argument[1]


@pytest.mark.parametrize("mode, overload", [("default", "default"), ("ops", "default"), ("alltoall", "alltoall")])
def test_strategy_of_a_mode(pool: RankPool, mode: str, overload: str) -> None:
    """The environment is read by init, not when deep_ep is imported or when an op runs."""
    assert pool.run(3, strategy_in_mode, mode) == [overload] * 3


def strategy_in_mode(ctx: RankContext, mode: str) -> str:
    with mock.patch.dict(os.environ, DEEP_USE_MODE=mode):
        strategy = deep_ep.init(ctx.group, num_bytes=1 << 20).normal.value
    check_ops(CASES[ctx.size], ctx.rank, ctx.group.group_name, strategy)
    deep_ep.destroy(ctx.group)
    return strategy


def outcome_of_two_strategies(ctx: RankContext) -> tuple[str, str]:
    strategy = "alltoall" if ctx.rank == ctx.size - 1 else "default"
    error = error_of(deep_ep.init, ctx.group, strategy=strategy, num_bytes=1 << 20)
    deep_ep.init(ctx.group, strategy="default", num_bytes=1 << 20)
    check_ops(CASES[ctx.size], ctx.rank, ctx.group.group_name, "default")
    deep_ep.destroy(ctx.group)
    return error


def test_ranks_choose_different_strategies(pool: RankPool) -> None:
    errors = pool.run(3, outcome_of_two_strategies)
    assert_told(errors, ["strategies", "default", "alltoall"])


def outcome_of_two_hosts(ctx: RankContext) -> tuple[str, str]:
    process = deep_ep.meeting.this_process()
    if ctx.rank == ctx.size - 1:
        process = process._replace(host="elsewhere (1234)")
    with mock.patch.object(deep_ep.meeting, "this_process", lambda: process):
        error = error_of(deep_ep.init, ctx.group, strategy="default", num_bytes=1 << 20)
        deep_ep.init(ctx.group, strategy="alltoall")
        check_ops(CASES[ctx.size], ctx.rank, ctx.group.group_name, "alltoall")
    deep_ep.destroy(ctx.group)
    return error


def test_group_on_several_hosts(pool: RankPool) -> None:
    errors = pool.run(3, outcome_of_two_hosts)
    assert_told(errors, ["several hosts", "rank 2: elsewhere", "DEEP_USE_MODE=alltoall"])


def outcome_of_too_little_memory(ctx: RankContext, limit: str) -> tuple[str, str]:
    """The last rank asks for too much, or may not have what all ask for."""
    num_bytes, last = 1 << 20, ctx.rank == ctx.size - 1
    if last and limit == "of the host":
        num_bytes = 1 << 50
    largest_file = resource.getrlimit(resource.RLIMIT_FSIZE)
    if last and limit == "of the process":
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, largest_file[1]))
    try:
        error = error_of(deep_ep.Buffer, ctx.group, num_bytes)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, largest_file)
    deep_ep.init(ctx.group, num_bytes=1 << 20)
    check_ops(CASES[ctx.size], ctx.rank, ctx.group.group_name, "default")
    deep_ep.destroy(ctx.group)
    return error


@pytest.mark.parametrize("R", [1, 3])
@pytest.mark.parametrize("limit", ["of the host", "of the process"])
def test_too_little_memory_on_one_rank(pool: RankPool, R: int, limit: str) -> None:
    errors = pool.run(R, outcome_of_too_little_memory, limit)
    assert_told(errors, ["windows", f"rank {R - 1}: ", "bytes", "num_bytes"])
    if limit == "of the host":
        assert str(1 << 50) in errors[0][1]
    assert all(f"rank {rank}: " not in errors[0][1] for rank in range(R - 1))


def check_buffer_arguments(ctx: RankContext) -> None:
    """Each is found on the rank itself, before it takes part in anything."""
    case, group = CASES[ctx.size], ctx.prepared_group("default")
    with pytest.raises(ValueError, match="num_nvl_bytes must not be negative, got -1"):
        deep_ep.Buffer(group, -1)
    with pytest.raises(ValueError, match="num_rdma_bytes must not be negative, got -2"):
        deep_ep.Buffer(group, 0, -2)
    for num_bytes in (0, -5):
        with pytest.raises(ValueError, match=f"num_bytes must be positive, got {num_bytes}"):
            deep_ep.init(group, num_bytes=num_bytes)

    buffer = deep_ep.Buffer(group, 1 << 20)
    arguments = calls(case).arguments("dispatch", ctx.rank, group.group_name)
    x, ids, weights = arguments["x"], arguments["topk_idx"], arguments["topk_weights"]
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(ids, case.E)
    right = {
        "x": x,
        "topk_idx": ids,
        "topk_weights": weights,
        "num_tokens_per_rank": per_rank,
        "is_token_in_rank": in_rank,
        "num_tokens_per_expert": per_expert,
    }
    for name in ("topk_idx", "num_tokens_per_rank", "is_token_in_rank", "num_tokens_per_expert"):
        with pytest.raises(ValueError, match=f"{name} is missing"):
            buffer.dispatch(**right | {name: None})
    with pytest.raises(ValueError, match="expert_alignment must be at least 1, got 0"):
        buffer.dispatch(**right, expert_alignment=0)
    with pytest.raises(ValueError, match="dispatch_wait_recv_cost_stats"):
        buffer.dispatch(**right, dispatch_wait_recv_cost_stats=torch.zeros(1))

    recv_x, _, _, counts, handle, event = buffer.dispatch(**right)
    assert event.event is None
    with pytest.raises(ValueError, match="topk_idx must be None with a handle"):
        buffer.dispatch(x, handle=handle, topk_idx=ids)
    for foreign in (weights[:, 1:], torch.cat([weights, weights], 1)):
        with pytest.raises(ValueError, match="topk_weights must be None or those given to dispatch"):
            buffer.combine(recv_x, handle, topk_weights=foreign)
    with pytest.raises(ValueError, match="bias"):
        buffer.combine(recv_x, handle, bias=torch.zeros(1))
    with pytest.raises(ValueError, match="combine_send_cost_stats"):
        buffer.combine(recv_x, handle, combine_send_cost_stats=torch.zeros(1))
    with_weights, _, event = buffer.combine(recv_x, handle, topk_weights=handle[7], async_finish=True)
    with event:
        without, _, _ = buffer.combine(recv_x, tuple(handle))

    assert isinstance(event.event, deep_ep.EventHandle)
    assert isinstance(counts, list)
    assert sum(counts) == len(recv_x)
    assert torch.equal(with_weights, without)
    check_ops(case, ctx.rank, group.group_name, "default")


@pytest.mark.parametrize("R", [1, 3])
def test_buffer_arguments(pool: RankPool, R: int) -> None:
    pool.run(R, check_buffer_arguments)


# Events and configs do nothing on CPU, but take part in DeepEP's calls


def test_events() -> None:
    event = deep_ep.EventOverlap(deep_ep.EventHandle())
    event.current_stream_wait()
    with event as entered:
        assert entered is event
    deep_ep.EventOverlap().current_stream_wait()
    assert deep_ep.EventOverlap().event is None
    assert isinstance(deep_ep.Buffer.capture().event, deep_ep.EventHandle)
    with pytest.raises(KeyError), event:
        raise KeyError


def test_configs() -> None:
    before = deep_ep.Buffer.num_sms
    try:
        deep_ep.Buffer.set_num_sms(8)
        assert deep_ep.Buffer.get_dispatch_config(2) == deep_ep.Config(8)
        assert deep_ep.Buffer.get_combine_config(3).num_sms == 8
        for num_sms in (0, -2, 7):
            with pytest.raises(ValueError, match=f"positive and even, got {num_sms}"):
                deep_ep.Buffer.set_num_sms(num_sms)
        assert deep_ep.Buffer.num_sms == 8
    finally:
        deep_ep.Buffer.num_sms = before
    assert deep_ep.Config(24, 8, 256, 6, 128).num_max_nvl_chunked_send_tokens == 8
    for config in (deep_ep.Buffer.get_dispatch_config, deep_ep.Buffer.get_combine_config):
        with pytest.raises(ValueError, match="num_ranks must be positive, got 0"):
            config(0)


# Autograd and torch.compile


def second_derivatives(ctx: RankContext, strategy: str) -> list[tuple[str, str]]:
    case, group = CASES[ctx.size], ctx.prepared_group(strategy)
    arguments = calls(case).arguments("dispatch", ctx.rank, group.group_name)
    x = arguments["x"].clone().requires_grad_()
    weights = arguments["topk_weights"].clone().requires_grad_()
    received = deep_ep.dispatch(x, arguments["topk_idx"], weights, num_experts=case.E, group=group)
    out = deep_ep.combine(received.recv_x.detach(), received.handle, group=group)
    (of_x,) = torch.autograd.grad((received.recv_x**3).sum(), x, create_graph=True)
    (of_weights,) = torch.autograd.grad((out**2).sum(), weights, create_graph=True)
    errors = [
        error_of(torch.autograd.grad, of_x.sum(), x),
        error_of(torch.autograd.grad, of_weights.sum(), weights),
    ]
    check_ops(case, ctx.rank, group.group_name, strategy)
    return errors


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("R", [1, 3])
def test_second_derivatives(pool: RankPool, strategy: str, R: int) -> None:
    by_rank = pool.run(R, second_derivatives, strategy)
    for op, errors in zip(("dispatch_backward", "combine_backward"), zip(*by_rank, strict=True), strict=True):
        assert_told(errors, [f"deep_ep.{op}: second derivatives are not supported", "create_graph"])


WHEN_COMPILED = [
    "dispatch: x of another dtype",
    "dispatch: x with three dimensions",
    "dispatch: topk_idx too short",
    "dispatch: topk_weights of another dtype",
    "dispatch: num_worst_tokens negative",
    "dispatch: num_experts not divisible",
    "combine: recv_src_idx too short",
    "combine: send_head of another dtype",
    "combine: num_experts 0",
]


def outcome_when_compiled(ctx: RankContext, strategy: str, name: str) -> tuple[str, str]:
    """All ranks are wrong: while a rank traces, it does not talk to others."""
    wrong, case = WRONG[name], CASES[ctx.size]
    group = ctx.prepared_group(strategy).group_name
    arguments = calls(case).arguments(wrong.op, ctx.rank, group)
    # Of a rank with rows, so that all ranks can be wrong in the same way.
    arguments |= calls(case).arguments(wrong.op, ctx.size - 1, group)
    arguments[wrong.argument] = wrong.change(arguments[wrong.argument])

    def model(arguments: dict[str, Any]) -> Any:
        return run(wrong.op, strategy, arguments)

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        raise AssertionError("tracing has found nothing wrong")

    torch._dynamo.reset()
    error = error_of(torch.compile(model, backend=backend, fullgraph=True), arguments)
    check_ops(case, ctx.rank, group, strategy, (wrong.op,))
    return error


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", WHEN_COMPILED)
def test_wrong_metadata_while_tracing(pool: RankPool, strategy: str, name: str) -> None:
    wrong = WRONG[name]
    R = wrong.sizes[-1]
    for kind, message in pool.run(R, outcome_when_compiled, strategy, name):
        assert kind == "TorchRuntimeError"
        for text in (f"deep_ep.{wrong.op}: ", *wrong.says):
            assert fill_in(text, sizes_of(CASES[R])) in message
