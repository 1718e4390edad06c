"""What a set of ranks does with the kernels on the twin, and what must come of it. Each probe is a function for all
ranks of a pool, on windows of its own; it returns what is wrong, or None.
"""

import ctypes
import functools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import reference
import torch
from cases import Case, assert_close, assert_dispatched, assert_same, expert_outputs, make_inputs
from ranks import RankContext
from torch import Tensor

from deep_ep import quantization
from tools.twin import model
from tools.twin.kernels import POISON, Failed, Group, Setup, Twin, get_dispatch_layout

NAMES = ("recv_x", "recv_count", "recv_src_idx", "layout_range", "send_head")
# enum Op of src/device/op.h
DISPATCH, COMBINE, DISPATCH_BACKWARD, COMBINE_BACKWARD, _, LOW_LATENCY_DISPATCH, LOW_LATENCY_COMBINE, NOTIFY = range(8)
DISPATCH_INT8 = 12
DEADLINE = 4  # word of the window table
FLAG = 64  # bytes
DAY = 24 * 60 * 60 * 1000  # of the twin's virtual time, in ms
# enum Failure of src/device/window_map.h
LATE, AHEAD, DIFFERENT, REFUSED, BAD_ID, BAD_ROW, TOO_SMALL, ABORTED, NO_ROOM = range(1, 10)


class Expected(NamedTuple):
    """Lists are by rank. The experts multiply each row by a factor of its own."""

    xs: list[Tensor]
    ids: list[Tensor]
    weights: list[Tensor]
    dispatched: list[tuple[Tensor, ...]]
    num_rows: list[int]
    sent: list[int]
    """Pairs of a token and another rank that has one of its experts at least."""
    received: list[int]
    """The same from the other side."""
    quantised: list[tuple[Tensor, Tensor]]
    """Data and scales of the same tokens, some of whose rows are of note."""
    asks: list[int]
    """Bytes that a rank sends to others to ask for sums."""
    ys: list[Tensor]
    combined: list[Tensor]
    tolerances: list[Tensor]


@functools.lru_cache(maxsize=64)
def expect(case: Case, M: int) -> Expected:
    xs, ids, weights, _ = make_inputs(case)
    N = case.R * M * min(case.K, case.local_experts)
    received = reference.dispatch(xs, ids, weights, case.E, [N] * case.R)
    dispatched = [
        (d.recv_x, d.num_recv_tokens_per_expert, d.recv_src_idx, d.recv_channel_prefix_matrix.view(-1), d.send_head)
        for d in received
    ]
    ys, combined, tolerances = _combined(case, weights, received)
    num_rows = [int(sum(((i // case.local_experts == r) & (i >= 0)).sum() for i in ids)) for r in range(case.R)]
    pairs = _pairs(case, ids)
    sent, arrived = pairs.sum(1).tolist(), pairs.sum(0).tolist()
    sources = [quantization.quantize(with_rows_of_note(x), "int8", low_latency=True) for x in xs]
    quantised = [_rows_of(sources, d.recv_src_idx) for d in received]
    asks = [_asks(case, i, r) for r, i in enumerate(ids)]
    return Expected(xs, ids, weights, dispatched, num_rows, sent, arrived, quantised, asks, ys, combined, tolerances)


def _asks(case: Case, ids: Tensor, rank: int) -> int:
    """Of tokens with several experts of another rank: two words, and two for each of these."""
    at = torch.stack([((ids >= 0) & (ids // case.local_experts == r)).sum(1) for r in range(case.R) if r != rank])
    return 8 * int((at[at > 1] + 1).sum())


def _pairs(case: Case, ids: list[Tensor]) -> Tensor:
    """[from, to]: tokens of a rank that have an expert of another one."""
    to = [reference.get_dispatch_layout(i, case.E, case.R, 1)[3] for i in ids]
    return torch.stack([t.sum(0) for t in to]).fill_diagonal_(0)


def _combined(
    case: Case, weights: list[Tensor], received: list[reference.DispatchResult]
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """What the experts give, what comes back to the tokens, and how far off it may be."""
    ys = [expert_outputs(d.recv_x, d.recv_src_idx) for d in received]
    return ys, *_sums(case, ys, weights, [d.recv_src_idx for d in received])


def _sums(case: Case, ys: list[Tensor], weights: list[Tensor], src: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    exact = reference.combine([y.double() for y in ys], weights, src)
    size = reference.combine([y.double().abs() for y in ys], [w.abs() for w in weights], src)
    # A rank's rows are summed up in fp32 and rounded to the dtype; then so are the sums of all ranks.
    epsilon = torch.finfo(case.dtype).eps + case.K * torch.finfo(torch.float32).eps
    tolerances = [2 * epsilon * s.double() + 2 * torch.finfo(case.dtype).tiny for s in size]
    return [e.to(case.dtype) for e in exact], tolerances


def with_rows_of_note(x: Tensor) -> Tensor:
    """x, of which some rows are 0, next to 0, very large, Inf or NaN."""
    x = x.clone()
    info = torch.finfo(x.dtype)
    of_note = (0.0, info.smallest_normal, info.max, float("inf"), float("-inf"), float("nan"), -float("nan"), 0.5)
    for row, value in zip(x[1::3], of_note, strict=False):
        row.zero_()
        row[::5] = value
        row[1::5] = -value / 2
    return x


def _rows_of(sources: list[tuple[Tensor, Tensor]], src_idx: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of all ranks that have arrived, and zeros."""
    first = torch.tensor([0, *(len(data) for data, _ in sources)]).cumsum(0)
    rank, token = src_idx[:, 0].long(), src_idx[:, 1]
    row = torch.where(rank >= 0, first[rank] + token, first[-1])
    data = torch.cat([*(data for data, _ in sources), torch.zeros(1, sources[0][0].shape[1], dtype=torch.int8)])
    scales = torch.cat([*(scales for _, scales in sources), torch.zeros(1)])
    return data[row], scales[row]


def sizes_of(case: Case) -> model.Sizes:
    return model.Sizes(case.R, max(case.tokens), case.H, case.K, case.E, case.dtype.itemsize)


def window_bytes(case: Case, M: int, op: str = "low_latency_dispatch") -> int:
    """What low latency needs, to the byte."""
    return model.window_bytes(op, sizes_of(case), M)


def ranks_of(case: Case, ids: list[Tensor]) -> list[list[set[int]]]:
    """By rank and token: the ranks that have an expert of it."""
    return [[{id // case.local_experts for id in token if id >= 0} for token in i.tolist()] for i in ids]


def rounds_of(to: list[list[set[int]]], slot_tokens: int) -> list[model.Rounds]:
    """Of tokens that go `to` these ranks, by rank: as many for each of them as the one has that needs most."""
    rounds = [model.Rounds.of(tokens, slot_tokens) for tokens in to]
    return [own.until(max(len(r.tokens) for r in rounds)) for own in rounds]


def check_round(group: Group, case: Case, M: int, rank: int) -> None:
    """The count, dispatch and combine of a case, with all their outputs, and what goes over links for them."""
    expected = expect(case, M)
    ids, peers, row = expected.ids[rank], case.R - 1, case.H * torch.finfo(case.dtype).bits // 8
    flag, counts, per_token = FLAG, 4 * case.E, 4 * (1 + 2 * case.K)

    def check_link(wanted: int) -> None:
        """One row per token and rank, in both directions; no rank reads what is another's."""
        (read, written), _ = group.twin.take_traffic()
        assert (read, written) == (0, wanted), f"{read} bytes read and {written} written over links, expected {wanted}"

    group.twin.take_traffic()
    num_rows = group.notify_dispatch(ids, case.E).item()
    assert num_rows == expected.num_rows[rank], f"notify_dispatch: {num_rows}, expected {expected.num_rows[rank]}"
    check_link(peers * (counts + flag))
    zero_unused = (case.seed + M) % 2 == 1
    out = group.low_latency_dispatch(expected.xs[rank], ids, M, case.E, zero_unused)
    check_link(peers * (counts + flag) + expected.sent[rank] * (per_token + row))
    is_unused = expected.dispatched[rank][2][:, 0] < 0

    def as_left(rows: Tensor, has_rows: bool = True) -> Tensor:
        """What is expected, where nothing is written to rows that hold nothing."""
        if zero_unused or not has_rows:
            return rows
        poison = torch.nan if rows.is_floating_point() else POISON[rows.dtype]
        return rows.masked_fill(is_unused.unsqueeze(1) if rows.dim() > 1 else is_unused, poison)

    for name, actual, wanted in zip(NAMES, out, expected.dispatched[rank], strict=True):
        assert_same(name, actual, as_left(wanted, name == "recv_x"))
    x = with_rows_of_note(expected.xs[rank])
    data, scales, *handle = group.low_latency_dispatch_int8(x, ids, M, case.E, not zero_unused)
    zero_unused = not zero_unused
    check_link(peers * (counts + flag) + expected.sent[rank] * (per_token + 4 + case.H))  # the scale
    for name, actual, wanted in zip(("data", "scales"), (data, scales), expected.quantised[rank], strict=True):
        assert_same(name, actual, as_left(wanted))
    for name, actual, wanted in zip(NAMES[1:], handle, expected.dispatched[rank][1:], strict=True):
        assert_same(f"{name} of int8 rows", actual, wanted)
    combined = group.low_latency_combine(expected.ys[rank], ids, expected.weights[rank], out[2:], case.E)
    check_link(peers * flag + expected.asks[rank] + expected.received[rank] * (row + 4))  # each has a mark
    assert_close("combined_x", combined, expected.combined[rank], expected.tolerances[rank])
    assert group.status() == [0] * 8, f"status {group.status()}"


def _row_bytes(case: Case) -> int:
    return case.H * torch.finfo(case.dtype).bits // 8


class Normal(NamedTuple):
    """What the ops of normal mode must do. Lists are by rank; experts as in Expected."""

    xs: list[Tensor]
    ids: list[Tensor]
    weights: list[Tensor]
    received: list[reference.DispatchResult]
    quantised: list[tuple[Tensor, Tensor]]
    """As in Expected, in normal mode."""
    asked: Tensor
    """[from, to]: tokens of a rank that have an expert of another one."""
    kept: Tensor
    """The same without what was dropped."""
    words: Tensor
    """The same, counting every (token, k)."""
    kept_ids: list[Tensor]
    """-1 is what was dropped."""
    ys: list[Tensor]
    combined: list[Tensor]
    tolerances: list[Tensor]
    grad_rows: list[Tensor]
    """Gradients of recv_x."""
    grad_row_weights: list[Tensor]
    grad_xs: list[Tensor]
    grad_x_tolerances: list[Tensor]
    grad_weights: list[Tensor]
    """Of dispatch's topk_weights."""
    grad_outs: list[Tensor]
    """Gradients of combine's results."""
    grad_ys: list[Tensor]
    grad_factors: list[Tensor]
    """Of combine's topk_weights."""
    grad_factor_tolerances: list[Tensor]


@functools.lru_cache(maxsize=64)
def expect_normal(case: Case) -> Normal:
    xs, ids, weights, num_worst_tokens = make_inputs(case)
    received = reference.dispatch(xs, ids, weights, case.E, num_worst_tokens)
    src = [d.recv_src_idx for d in received]
    sources = [quantization.quantize(with_rows_of_note(x), "int8") for x in xs]
    quantised = [_rows_of(sources, s) for s in src]
    ys, combined, tolerances = _combined(case, weights, received)
    kept = [i.where(d.send_head >= 0, -1) for i, d in zip(ids, received, strict=True)]
    ranks = [torch.bincount(i[i >= 0] // case.local_experts, minlength=case.R) for i in kept]
    generator = torch.Generator().manual_seed(case.seed + 1)
    ones = [torch.ones_like(w) for w in weights]
    grad_rows = [
        expert_outputs(torch.randn(*y.shape, generator=generator).to(y.dtype), s) for y, s in zip(ys, src, strict=True)
    ]
    grad_row_weights = [torch.randn(*d.recv_topk_weights.shape, generator=generator) for d in received]
    _, grad_weights = reference.dispatch_backward(grad_rows, grad_row_weights, src, list(case.tokens))
    grad_xs, grad_x_tolerances = _sums(case, grad_rows, ones, src)
    grad_outs = [torch.randn(T, case.H, generator=generator).to(case.dtype) for T in case.tokens]
    grad_ys, grad_factors = reference.combine_backward(grad_outs, ys, weights, src)
    _, sizes = reference.combine_backward([g.abs() for g in grad_outs], [y.abs() for y in ys], weights, src)
    return Normal(
        *(xs, ids, weights, received, quantised),
        *(_pairs(case, ids), _pairs(case, kept), torch.stack(ranks).fill_diagonal_(0), kept),
        *(ys, combined, tolerances),
        *(grad_rows, grad_row_weights, grad_xs, grad_x_tolerances, grad_weights),
        *(grad_outs, grad_ys, grad_factors, [64 * torch.finfo(torch.float32).eps * s for s in sizes]),
    )


def normal(ctx: RankContext, twin: Twin, key: str, case: Case, slot_tokens: int, setup: Setup, times: int = 2) -> None:
    """The ops of normal mode, with room for slot_tokens tokens or somewhat fewer, and what goes over links."""
    twin.configure(setup)
    expected, r, row, E = expect_normal(case), ctx.rank, _row_bytes(case), case.E
    # To the byte what so many tokens need, but for what aligns the records.
    num_bytes = window_bytes(case, slot_tokens) + 1024 * case.R
    x, ids, weights, y = (t[r] for t in (expected.xs, expected.ids, expected.weights, expected.ys))
    handle = expected.received[r].recv_src_idx, expected.received[r].send_head
    N = expected.received[r].recv_x.shape[0]
    asked, kept = (t[r].sum().item() for t in (expected.asked, expected.kept))
    kept_here, words_here = (t[:, r].sum().item() for t in (expected.kept, expected.words))
    to, kept_to = ranks_of(case, expected.ids), ranks_of(case, expected.kept_ids)
    epoch = 0

    def check(op: str, launch: Callable[[], Any], over_links: int, phases: int) -> Any:
        nonlocal epoch
        sent = to if op in ("dispatch", "dispatch_int8") else kept_to
        rounds = len(rounds_of(sent, model.slot_tokens(op, sizes_of(case), num_bytes))[r].tokens)
        epoch += rounds
        twin.take_traffic()
        out = launch()
        (read, written), _ = twin.take_traffic()
        wanted = over_links + rounds * phases * (case.R - 1) * FLAG
        assert group.status() == [0] * 8, f"{op}: status {group.status()}"
        assert (read, written) == (0, wanted), f"{op}: {read} bytes read, {written} written over links, not {wanted}"
        assert list(control(group)) == [epoch] * 2, f"{op}: epoch {list(control(group))}, expected {epoch}"
        return out

    with Group(twin, key, r, ctx.size, num_bytes, timeout_ms=DAY) as group:
        for _ in range(times):
            counts, record, row_only = (case.R - 1) * 4 * E, 4 * (1 + 3 * case.K), 4 * (1 + 2 * case.K)
            out = check(
                "dispatch", lambda: group.dispatch(x, ids, weights, N, E), counts + asked * (record + row), phases=1
            )
            assert_dispatched(tuple(out), expected.received[r])
            data, scales, *others = check(
                "dispatch_int8",
                lambda: group.dispatch_int8(with_rows_of_note(x), ids, weights, N, E),
                counts + asked * (record + 4 + case.H),  # the scale
                phases=1,
            )
            for name, actual, wanted in zip(("data", "scales"), (data, scales), expected.quantised[r], strict=True):
                assert_same(name, actual, wanted)
            assert_dispatched((expected.received[r].recv_x, *others), expected.received[r])
            out = check(
                "combine",
                lambda: group.combine(y, ids, weights, handle, E),
                kept * record + kept_here * row,
                phases=2,
            )
            assert_close("combined_x", out, expected.combined[r], expected.tolerances[r])
            grads = expected.grad_rows[r], expected.grad_row_weights[r]
            grad_x, grad_weights = check(
                "dispatch_backward",
                lambda grads=grads: group.dispatch_backward(*grads, ids, handle, E),
                kept * row_only + kept_here * row + words_here * 4,
                phases=2,
            )
            assert_close("grad_x", grad_x, expected.grad_xs[r], expected.grad_x_tolerances[r])
            assert_same("grad_topk_weights", grad_weights, expected.grad_weights[r])
            grad_y, grad_factors = check(
                "combine_backward",
                lambda: group.combine_backward(expected.grad_outs[r], y, ids, weights, handle, E),
                kept * (record + row) + words_here * 4,
                phases=2,
            )
            assert_same("grad_y", grad_y + 0, expected.grad_ys[r] + 0)  # without signs of zeros
            assert_close("grad_weights", grad_factors, expected.grad_factors[r], expected.grad_factor_tolerances[r])


def many_ranks(ctx: RankContext, twin: Twin, key: str, setup: Setup) -> None:
    """More ranks than flags are read at a time, which is 64, as threads of one process."""
    if ctx.rank != 0:
        return
    twin.configure(setup)
    R = 66
    case = Case(tuple(r % 3 for r in range(R)), H=8, K=2, local_experts=1, ids="distinct", absent=0.1, seed=7)
    expected, num_bytes = expect_normal(case), window_bytes(case, 2) + 1024 * R

    def run(rank: int) -> None:
        wanted = expected.received[rank]
        given = expected.xs[rank], expected.ids[rank], expected.weights[rank]
        with Group(twin, key, rank, R, num_bytes, timeout_ms=DAY, name=f"{key}-{rank}") as group:
            for _ in range(2):
                assert_dispatched(tuple(group.dispatch(*given, wanted.recv_x.shape[0], case.E)), wanted)
                handle = wanted.recv_src_idx, wanted.send_head
                out = group.combine(expected.ys[rank], *given[1:], handle, case.E)
                assert_close("combined_x", out, expected.combined[rank], expected.tolerances[rank])

    with ThreadPoolExecutor(R) as pool:
        wrong = [text for done in [pool.submit(run, r) for r in range(R)] if (text := done.exception())]
    if wrong:
        raise wrong[0]


def shapes_as_read(shapes: Tensor) -> list[list[int]]:
    """GE's way: a slot of 9 words for every output, in words of 64 bits if bit 31 of the first is set, else of 32."""
    is_wide = bool(shapes.view(torch.int32)[0, 0] < 0)
    slots = (shapes if is_wide else shapes.view(torch.int32).flatten()[: shapes.numel()].view(-1, 9)).tolist()
    for dims, *_ in slots:
        assert 0 <= dims & ~(1 << 31) <= 8, f"{dims} dimensions"
    return [sizes[: dims & ~(1 << 31)] for dims, *sizes in slots]


def exact(ctx: RankContext, twin: Twin, key: str, case: Case, slot_tokens: int, setup: Setup) -> None:
    """The dispatches as graphs have them in exact mode: with memory for more rows, and for too few on one rank."""
    twin.configure(setup)
    for is_int8 in (False, True):
        _exact(ctx, twin, f"{key}-{is_int8}", case, slot_tokens, is_int8)


def _exact(ctx: RankContext, twin: Twin, key: str, case: Case, slot_tokens: int, is_int8: bool) -> None:
    expected, r = expect_normal(case), ctx.rank
    x, ids, weights, wanted = (t[r] for t in (expected.xs, expected.ids, expected.weights, expected.received))
    N = wanted.recv_x.shape[0]

    def shapes_of(rows: int) -> list[list[int]]:
        (T, K), R, L = ids.shape, case.R, case.local_experts
        received = [[rows, case.H], *([[rows]] if is_int8 else []), [rows, K], [rows, K], [L], []]
        return [*received, [R, R], [R, L], [L, R], [rows, 3], [T, K]]

    num_bytes = window_bytes(case, slot_tokens) + 1024 * case.R
    with Group(twin, key, r, ctx.size, num_bytes, timeout_ms=DAY) as group:
        for room in (N + 5, N, N - 1 if r == 1 else N + r):
            shapes = torch.full((10 + is_int8, 9), -9)  # GE does not clear it
            send = group.dispatch_int8 if is_int8 else group.dispatch
            recv_x, *others = send(x, ids, weights, room, case.E, shapes)
            if any(s > 0 for s in group.status()):
                assert room == (N - 1 if r == 1 else N + r)
                rows = expected.received[1].recv_x.shape[0]
                op = DISPATCH_INT8 if is_int8 else DISPATCH
                check_status(group, [NO_ROOM, None, 1, 0, rows - 1, rows, op])
                assert shapes_as_read(shapes) == shapes_of(0)
                return
            assert shapes_as_read(shapes) == shapes_of(N)
            if is_int8:
                scales, *others = others
                for rows, of_rank in zip((recv_x, scales), quantization.quantize(wanted.recv_x, "int8"), strict=True):
                    assert_same("int8 rows", rows[:N], of_rank)
                recv_x = wanted.recv_x
            out, rows_of = (recv_x, *others), (True, True, True, False, False, False, False, False, True, False)
            assert_dispatched(tuple(t[:N] if has_rows else t for t, has_rows in zip(out, rows_of, strict=True)), wanted)
        raise AssertionError("rows that there is no memory for have been taken")


def layout(ctx: RankContext, twin: Twin, key: str, setup: Setup) -> None:
    if ctx.rank != 0:
        return
    twin.configure(setup)
    for T, K, E, R, S in ((37, 3, 16, 4, 2), (5, 8, 8, 8, 1), (0, 2, 4, 2, 1), (70, 2, 64, 8, 4)):
        topk_idx = torch.randint(-1, E, (T, K), generator=torch.Generator().manual_seed(T))
        wanted = reference.get_dispatch_layout(topk_idx, E, R, S)
        for i, (a, b) in enumerate(zip(get_dispatch_layout(twin, topk_idx, E, R, S), wanted, strict=True)):
            assert_same(f"output {i} of get_dispatch_layout", a, b)


def rounds(ctx: RankContext, twin: Twin, key: str, cases: list[tuple[Case, int]], setup: Setup) -> None:
    """One after the other on the same windows, which have no byte to spare for the largest."""
    twin.configure(setup)
    size = max(window_bytes(*case) for case in cases)
    with Group(twin, key, ctx.rank, ctx.size, size, timeout_ms=DAY) as group:
        for case, M in cases:
            check_round(group, case, M, ctx.rank)
            group.notify_dispatch(expect(case, M).ids[ctx.rank], case.E)  # each launch of a round in both parities


# Launches that fail. Status: failure, launch, peer, phase, expected, got, op; None: any number.


CASE, M = Case((5, 3, 0, 4), H=24, K=2, local_experts=2, ids="distinct", absent=0.0), 6


def check_status(group: Group, wanted: list[int | None]) -> None:
    status = group.status()
    same = all(w in (None, s) for w, s in zip(wanted, status, strict=False))
    assert same, f"status {status}, expected {wanted}"


def _check_stays(group: Group, rank: int) -> None:
    """After a failure launches end at once, write nothing, and say nothing new."""
    status, expected = group.status(), expect(CASE, M)
    ids = expected.ids[rank]
    out = group.low_latency_dispatch(expected.xs[rank], ids, M, CASE.E)
    out += group.dispatch(expected.xs[rank], ids, expected.weights[rank], 9, CASE.E)
    src_idx, layout_range, send_head = expected.dispatched[rank][2:]
    given = expected.ys[rank], ids, expected.weights[rank]
    out.append(group.low_latency_combine(*given, (src_idx, layout_range, send_head), CASE.E))
    out.append(group.combine(*given, (src_idx, send_head), CASE.E))
    assert all(bool((t != t).all() if t.is_floating_point() else (t == POISON[t.dtype]).all()) for t in out)
    assert group.notify_dispatch(ids, CASE.E).item() == 0
    assert group.status() == status, f"status {group.status()}, before {status}"


def different(ctx: RankContext, twin: Twin, key: str, what: str) -> None:
    """Rank 0 asks for something else."""
    twin.configure(Setup(cores=2))
    r, ids, E = ctx.rank, expect(CASE, M).ids[ctx.rank], CASE.E
    is_other = r == 0
    own: dict[str, tuple[int, int]] = {
        "op": (NOTIFY, LOW_LATENCY_DISPATCH),
        "hidden": (16, 24),
        "top_k": (3, 2),
        "experts": (16, 8),
        "max_tokens": (7, 6),
        "element_bytes": (2, 4),
    }
    with Group(twin, key, r, ctx.size, 1 << 20, timeout_ms=DAY) as group:
        if is_other and what == "op":
            group.notify_dispatch(ids, E)
        else:
            given = {name: values[0] if is_other and name == what else values[1] for name, values in own.items()}
            dtype = torch.float16 if given["element_bytes"] == 2 else torch.float32
            ids = ids[:, [0, 1, 1][: given["top_k"]]].contiguous()
            x = torch.ones(len(ids), given["hidden"], dtype=dtype)
            group.low_latency_dispatch(x, ids, given["max_tokens"], given["experts"])
        mine, other = own[what] if is_other else own[what][::-1]
        op = NOTIFY if is_other and what == "op" else LOW_LATENCY_DISPATCH
        check_status(group, [DIFFERENT, 1, None if is_other else 0, 0, mine, other, op])
        _check_stays(group, r)


def bad_id(ctx: RankContext, twin: Twin, key: str, setup: Setup) -> None:
    """In rank 1's last token, which dispatch of normal mode would not send before its third round."""
    twin.configure(setup)
    expected, r = expect(CASE, M), ctx.rank
    for op, num_bytes in ((NOTIFY, 1 << 20), (LOW_LATENCY_DISPATCH, 1 << 20), (DISPATCH, window_bytes(CASE, 1) + 4096)):
        with Group(twin, f"{key}-{op}", r, ctx.size, num_bytes, timeout_ms=DAY) as group:
            x, ids, weights = expected.xs[r], expected.ids[r].clone(), expected.weights[r]
            if r == 1:
                ids[2, 1] = CASE.E + 3
            if op == NOTIFY:
                assert group.notify_dispatch(ids, CASE.E).item() == 0
            elif op == LOW_LATENCY_DISPATCH:
                group.low_latency_dispatch(x, ids, M, CASE.E)
            else:
                group.dispatch(x, ids, weights, 9, CASE.E)
            own = [BAD_ID, 1, 1, 0, CASE.E, CASE.E + 3, op]
            check_status(group, own if r == 1 else [REFUSED, 1, 1, 0, op, -1, op])
            _check_stays(group, r)


def bad_row(ctx: RankContext, twin: Twin, key: str, setup: Setup) -> None:
    """Rank 0 asks the rank of its first expert for a row that is not there."""
    twin.configure(setup)
    expected, r, E = expect(CASE, M), ctx.rank, CASE.E
    x, ids, weights, y = (t[r] for t in (expected.xs, expected.ids, expected.weights, expected.ys))
    peer, N = int(expected.ids[0][0, 0]) // CASE.local_experts, expected.dispatched[0][0].shape[0]
    for op in (LOW_LATENCY_COMBINE, COMBINE, DISPATCH_BACKWARD, COMBINE_BACKWARD):
        with Group(twin, f"{key}-{op}", r, ctx.size, 1 << 20, timeout_ms=DAY) as group:
            check_round(group, CASE, M, r)
            src_idx, layout_range, send_head = (t.clone() for t in expected.dispatched[r][2:])
            if r == 0:
                send_head[0, 0] = N + 5
            handle = src_idx, send_head
            if op == LOW_LATENCY_COMBINE:
                group.low_latency_combine(y, ids, weights, (src_idx, layout_range, send_head), E)
            elif op == COMBINE:
                group.combine(y, ids, weights, handle, E)
            elif op == DISPATCH_BACKWARD:
                group.dispatch_backward(y, torch.ones(N, CASE.K), ids, handle, E)
            else:
                group.combine_backward(x, y, ids, weights, handle, E)
            # The token's rank sees it in low latency, else the row's.
            place = (0, 0) if op == LOW_LATENCY_COMBINE else (peer, 1)
            own = [BAD_ROW, 5, 0, 0, N, N + 5, op]
            check_status(group, own if r == place[0] else [REFUSED, 5, place[0], place[1], op, -1, op])
            _check_stays(group, r)


def late(ctx: RankContext, twin: Twin, key: str, setup: Setup) -> None:
    """Rank 2 does not come to the second launch."""
    twin.configure(setup)
    ids, r = expect(CASE, M).ids[ctx.rank], ctx.rank
    with Group(twin, key, r, ctx.size, 1 << 20, timeout_ms=DAY) as group:
        assert group.notify_dispatch(ids, CASE.E).item() == expect(CASE, M).num_rows[r]
        if r != 2:
            assert group.notify_dispatch(ids, CASE.E).item() == 0
            check_status(group, [LATE, 2, 2, 0, 2, 0, NOTIFY])
            _check_stays(group, r)


def slow(ctx: RankContext, twin: Twin, key: str, setup: Setup) -> None:
    """Rank 2 has much to do before it comes, many times what the others may wait for one that does nothing."""
    twin.configure(setup)
    expected, r = expect(CASE, M), ctx.rank
    with Group(twin, key, r, ctx.size, 1 << 20, timeout_ms=DAY) as group:
        group.table[DEADLINE] //= DAY // 100
        for launch in (1, 2):
            if r == 2:
                while any(list(control(group, peer))[1] < launch for peer in (0, 1, 3)):
                    pass
                for _ in range(10_000_000):
                    pass
            assert group.notify_dispatch(expected.ids[r], CASE.E).item() == expected.num_rows[r]
            assert group.status() == [0] * 8, f"status {group.status()}"


def unsent(ctx: RankContext, twin: Twin, key: str, setup: Setup) -> None:
    """Rank 1 takes its low-latency handle for one without rows."""
    twin.configure(setup)
    expected, r = expect(CASE, M), ctx.rank
    src_idx, layout_range, send_head = expected.dispatched[r][2:]
    handle = src_idx, layout_range * (r != 1), send_head
    with Group(twin, key, r, ctx.size, 1 << 20, timeout_ms=DAY) as group:
        group.low_latency_combine(expected.ys[r], expected.ids[r], expected.weights[r], handle, CASE.E)
        waits = (expected.ids[r] // CASE.local_experts == 1).any()
        check_status(group, [LATE, 1, 1, 1, 1, 0, LOW_LATENCY_COMBINE] if waits else [0] * 8)


def lost(ctx: RankContext, twin: Twin, key: str, setup: Setup) -> None:
    """Rank 0 has forgotten its launches but one, as if they had never reached the device."""
    twin.configure(setup)
    ids, r = expect(CASE, M).ids[ctx.rank], ctx.rank
    with Group(twin, key, r, ctx.size, 1 << 20, timeout_ms=DAY) as group:
        for _ in range(4):
            group.notify_dispatch(ids, CASE.E)
        if r == 0:
            control(group)[:] = [0, 0]
        group.notify_dispatch(ids, CASE.E)
        # The peers' launch 5 may have come already.
        check_status(group, [AHEAD, 1, None, 0, 1, None, NOTIFY] if r == 0 else [LATE, 5, 0, 0, 5, 1, NOTIFY])
        _check_stays(group, r)


def wrapped(ctx: RankContext, twin: Twin, key: str, setup: Setup) -> None:
    """Epochs beyond what a flag can hold: 2^31, weeks of decoding."""
    twin.configure(setup)
    with Group(twin, key, ctx.rank, ctx.size, 1 << 20, timeout_ms=DAY) as group:
        control(group)[:] = [2**31 - 13] * 2
        for _ in range(5):
            check_round(group, CASE, M, ctx.rank)
            group.notify_dispatch(expect(CASE, M).ids[ctx.rank], CASE.E)
        assert list(control(group)) == [2**31 + 12] * 2


def aborted(ctx: RankContext, twin: Twin, key: str, setup: Setup) -> None:
    """Rank 0's second launch has ended before its end."""
    twin.configure(setup)
    expected, r = expect(CASE, M), ctx.rank
    with Group(twin, key, r, ctx.size, 1 << 20, timeout_ms=DAY) as group:
        group.notify_dispatch(expected.ids[r], CASE.E)
        if r == 0:
            assert list(control(group)) == [1, 1], "the launch has not been counted"
            control(group)[1] = 2
        group.low_latency_dispatch(expected.xs[r], expected.ids[r], M, CASE.E)
        own = [ABORTED, 2, 0, 0, 1, 2, LOW_LATENCY_DISPATCH]
        check_status(group, own if r == 0 else [REFUSED, 2, 0, 0, LOW_LATENCY_DISPATCH, -1, LOW_LATENCY_DISPATCH])
        assert list(control(group)) == [2, 2]


def too_small(ctx: RankContext, twin: Twin, key: str, setup: Setup) -> None:
    """The windows lack 1024 bytes, a block of both parities."""
    twin.configure(setup)
    expected, r = expect(CASE, M), ctx.rank
    places = M * (CASE.K * 512 + CASE.R * 32)  # rows of 96 bytes, and asks
    for case, op in ((CASE, LOW_LATENCY_DISPATCH), (CASE, LOW_LATENCY_COMBINE)):
        name = "low_latency_dispatch" if op == LOW_LATENCY_DISPATCH else "low_latency_combine"
        size = window_bytes(case, M, name) - 1024
        with Group(twin, f"{key}-{op}", r, ctx.size, size, timeout_ms=DAY) as group:
            if op == LOW_LATENCY_DISPATCH:
                group.low_latency_dispatch(expected.xs[r], expected.ids[r], M, case.E)
            else:
                handle = expected.dispatched[r][2:]
                group.low_latency_combine(expected.ys[r], expected.ids[r], expected.weights[r], handle, case.E)
            room = (size - model.slots_begin(sizes_of(case))) // 2
            wanted = room + 512 if op == LOW_LATENCY_DISPATCH else places
            check_status(group, [TOO_SMALL, 1, r, 0, -(-wanted // 1024), room // 1024, op])
            _check_stays(group, r)


def begun(ctx: RankContext, twin: Twin, key: str, setup: Setup) -> None:
    """A launch that waits says that it has begun: whoever aborts it leaves that behind."""
    twin.configure(setup)
    expected, r = expect(CASE, M), ctx.rank
    ids, (src_idx, _, send_head) = expected.ids[r], expected.dispatched[r][2:]
    with Group(twin, key, r, ctx.size, 1 << 20, timeout_ms=DAY) as group:
        launches = (
            lambda: group.notify_dispatch(ids, CASE.E),
            lambda: group.combine(expected.ys[r], ids, expected.weights[r], (src_idx, send_head), CASE.E),
        )
        for ended, launch in enumerate(launches):
            while r == 0 and (words := list(control(group, 1))) != [ended, ended + 1]:
                assert words in ([ended - 1, ended], [ended, ended]), f"control words {words}"
                time.sleep(0.001)
            launch()
            assert list(control(group)) == [ended + 1, ended + 1]


def control(group: Group, rank: int | None = None) -> Any:
    """The control words of a rank's window, which is mapped here."""
    address = group.table[8 + (group.rank if rank is None else rank)].item()
    return (ctypes.c_int64 * 2).from_address(address)


# All of them.

Probe = tuple[Callable[..., None], tuple[Any, ...]]

_SMALL = 9 << 10
"""Bytes of a unified buffer that make tokens go in many chunks, and rows in several tiles."""

_CASES = [
    (Case((13, 0, 9, 5), H=24, K=2, local_experts=2, dtype=torch.float16, ids="distinct", absent=0.1), 13),
    (Case((2, 11, 1, 7), H=2100, K=3, local_experts=4, dtype=torch.bfloat16, ids="distinct", absent=0.2), 11),
    # Every slot is full, to the byte.
    (Case((16, 16, 3, 16), H=1200, K=2, local_experts=2, dtype=torch.float32, ids="one rank", absent=0.0), 16),
    # Combine looks for rows of some tokens at a time.
    (Case((60, 3, 0, 41), H=8, K=2, local_experts=1, dtype=torch.bfloat16, ids="distinct", absent=0.1), 60),
]


_NORMAL = Case(
    (13, 0, 9, 5), H=600, K=3, local_experts=2, dtype=torch.float16, absent=0.1, capacity=(1.0, 0.7, 1.6, 0.5), seed=3
)

EXACT = replace(_NORMAL, capacity=None, dtype=torch.float32)


def probes(seeds: range = range(6)) -> list[Probe]:
    from tools.twin.kernels import A2, A5, ARCHS

    fast: list[Probe] = [(layout, (Setup(arch, 3),)) for arch in ARCHS]
    fast += [(rounds, (_CASES, Setup(arch, 3, None, ub))) for arch in ARCHS for ub in (0, _SMALL)]
    # A quarter of the cores gathers in low-latency combine.
    fast += [(rounds, (_CASES, Setup(arch, 8))) for arch in ARCHS] + [(bad_row, (Setup(A2, 8),))]
    fast += [(normal, (_NORMAL, 4, Setup(arch, 3, None, ub))) for arch in ARCHS for ub in (0, _SMALL)]
    fast += [(exact, (EXACT, 5, Setup(arch, 2))) for arch in ARCHS]
    fast += [(many_ranks, (Setup(cores=1, seed=seed),)) for seed in (None, 0)]
    fast += [(different, (what,)) for what in ("op", "hidden", "top_k", "experts", "max_tokens", "element_bytes")]
    fast += [
        (probe, (Setup(A2, 2),)) for probe in (bad_id, bad_row, late, unsent, lost, wrapped, aborted, too_small, begun)
    ]
    slow: list[Probe] = []
    for seed in seeds:
        for arch in ARCHS:
            slow.append((layout, (Setup(arch, 4, seed, _SMALL if seed % 2 else 0),)))
            slow.append((normal, (_NORMAL, 3, Setup(arch, 2 + seed % 3, seed, 0 if seed % 2 else _SMALL))))
            slow.append((rounds, (_CASES, Setup(arch, (2, 3, 8)[seed % 3], seed, 0 if seed % 2 else _SMALL))))
        slow += [(probe, (Setup(A5 if seed % 2 else A2, 2, seed),)) for probe in (bad_id, bad_row, aborted, begun)]
    return fast + slow


def run_probe(ctx: RankContext, library: Path, mutant: int | None, key: str, probe: Probe) -> str | None:
    """What is wrong, as this rank sees it."""
    twin = Twin(library)
    if mutant is not None:
        twin.mutate(mutant)
    function, arguments = probe
    try:
        function(ctx, twin, key, *arguments)
    except (AssertionError, Failed) as wrong:
        return f"{function.__name__}{arguments}: {wrong}"
    return None
