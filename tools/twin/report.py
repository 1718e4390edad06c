"""What launches of the kernels move and wait for, counted on the twin: docs/kernels.md says what that tells.

T tokens of each rank · H hidden · K top-k · E experts · R ranks · L = E/R local experts · N rows.
"""

import functools
import multiprocessing
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor

from . import model
from .kernels import A2, A5, Group, Launch, Moved, Setup, Twin, build, get_dispatch_layout

ARCHS = {"A2": A2, "A3": A2, "A5": A5}
DTYPES = ("bfloat16", "float16", "float32")
ROUTINGS = ("uniform", "skewed")

_TIMEOUT = 600
"""Seconds that a rank waits for another one."""


@dataclass(frozen=True)
class Options:
    """One launch of each op on each rank.

    ValueError: a value that is not allowed.
    """

    ops: Sequence[str]
    """Names in OPS, in the order in which they run."""
    ranks: int = 4
    tokens: int = 128
    """Of each rank; M in low latency."""
    hidden: int = 7168
    top_k: int = 8
    experts: int = 256
    dtype: str = "bfloat16"
    """One of DTYPES."""
    arch: str = "A2"
    """One of ARCHS."""
    cores: int = 8
    """That a launch may use on each rank."""
    routing: str = "uniform"
    """uniform: K experts of each token at random; skewed: half of all tokens have expert 0 among them, no other has."""
    seed: int = 0

    def __post_init__(self) -> None:
        allowed: dict[str, Sequence[str]] = {"dtype": DTYPES, "arch": tuple(ARCHS), "routing": ROUTINGS}
        wrong = [(name, getattr(self, name), values) for name, values in allowed.items()]
        wrong += [("ops", op, tuple(OPS)) for op in self.ops]
        for name, value, values in wrong:
            if value not in values:
                raise ValueError(f"{name} must be of {', '.join(values)}; got {value}")
        for field in fields(self):
            least = 0 if field.name == "seed" else 1
            if field.type is int and getattr(self, field.name) < least:
                raise ValueError(f"{field.name} must be at least {least}, got {getattr(self, field.name)}")
        if self.experts % self.ranks:
            raise ValueError(f"experts must be a multiple of ranks, got {self.experts} experts and {self.ranks} ranks")
        if len(set(self.ops)) < len(self.ops):
            raise ValueError(f"ops must differ, got {', '.join(self.ops)}")
        if self.top_k > self.experts:
            raise ValueError(f"top_k must be at most {self.experts}, the number of experts, got {self.top_k}")


class Report(TypedDict):
    """The JSON: bytes and numbers of transfers, flags and calls."""

    options: dict[str, Any]
    """As Options has them."""
    launches: list[Launch]
    """By op, then by rank."""


def route(options: Options, rank: int) -> tuple[Tensor, Tensor]:
    """topk_idx [T, K], of experts that differ, and topk_weights [T, K]."""
    generator = torch.Generator().manual_seed(options.seed * options.ranks + rank)
    scores = torch.rand(options.tokens, options.experts, generator=generator)
    if options.routing == "skewed":
        order = torch.randperm(options.tokens, generator=generator)
        scores[order, 0] = torch.where(torch.arange(options.tokens) < (options.tokens + 1) // 2, 2.0, -1.0)
    values, topk_idx = scores.topk(options.top_k)
    return topk_idx, values.softmax(1)


class Rank:
    """What a rank gives to the ops."""

    def __init__(self, options: Options, rank: int, group: Group) -> None:
        self.options, self.rank, self.group = options, rank, group
        self.topk_idx, self.topk_weights = route(options, rank)
        self.T, self.E, R = options.tokens, options.experts, options.ranks
        self.N_low_latency = R * self.T * min(options.top_k, self.E // R)
        src, send_head, layout_range = _left_by_dispatch([route(options, r)[0] for r in range(R)], rank, self.E)
        self.N = len(src)
        self.handle = src, send_head
        unused = src.new_full((self.N_low_latency - self.N, 3), -1)
        self.handle_low_latency = torch.cat([src, unused]), layout_range, send_head

    def rows(self, count: int) -> Tensor:
        """[count, H], at random."""
        generator = torch.Generator().manual_seed(self.options.seed * self.options.ranks + self.rank)
        return torch.randn(count, self.options.hidden, dtype=getattr(torch, self.options.dtype), generator=generator)


def _left_by_dispatch(topk_idxs: list[Tensor], rank: int, E: int) -> tuple[Tensor, Tensor, Tensor]:
    """recv_src_idx int32 [N, 3], send_head int32 [T, K] and layout_range int32 [L·R] of a dispatch of [T, K] ids, none
    of them -1, on each rank."""
    R, (T, K) = len(topk_idxs), topk_idxs[0].shape
    expert = torch.stack(topk_idxs).view(-1)  # of each (source rank, token, k)
    order = expert.argsort(stable=True)
    rows = torch.bincount(expert // (E // R), minlength=R)
    begin = rows.cumsum(0) - rows
    mine = order[begin[rank] : begin[rank] + rows[rank]]
    source, token, k = mine // (T * K), mine // K % T, mine % K
    place = torch.empty_like(order).index_copy(0, order, torch.arange(len(order))).view(R, T, K)[rank]
    counts = torch.bincount(expert[mine] % (E // R) * R + source, minlength=E)
    send_head = place - begin[topk_idxs[rank] // (E // R)]
    return torch.stack([source, token, k], 1).int(), send_head.int(), counts.cumsum(0).int()


OPS: dict[str, Callable[[Rank], object]] = {
    "get_dispatch_layout": lambda r: get_dispatch_layout(r.group.twin, r.topk_idx, r.E, r.options.ranks, 1),
    "notify_dispatch": lambda r: r.group.notify_dispatch(r.topk_idx, r.E),
    "low_latency_dispatch": lambda r: r.group.low_latency_dispatch(r.rows(r.T), r.topk_idx, r.T, r.E),
    "low_latency_dispatch_int8": lambda r: r.group.low_latency_dispatch_int8(r.rows(r.T), r.topk_idx, r.T, r.E),
    "low_latency_combine": lambda r: r.group.low_latency_combine(
        r.rows(r.N_low_latency), r.topk_idx, r.topk_weights, r.handle_low_latency, r.E
    ),
    "dispatch": lambda r: r.group.dispatch(r.rows(r.T), r.topk_idx, r.topk_weights, r.N, r.E),
    "dispatch_int8": lambda r: r.group.dispatch_int8(r.rows(r.T), r.topk_idx, r.topk_weights, r.N, r.E),
    "combine": lambda r: r.group.combine(r.rows(r.N), r.topk_idx, r.topk_weights, r.handle, r.E),
    "dispatch_backward": lambda r: r.group.dispatch_backward(
        r.rows(r.N), torch.zeros(r.N, r.options.top_k), r.topk_idx, r.handle, r.E
    ),
    "combine_backward": lambda r: r.group.combine_backward(
        r.rows(r.T), r.rows(r.N), r.topk_idx, r.topk_weights, r.handle, r.E
    ),
}
"""One launch of each, of those in normal mode with exact shapes."""


def make(options: Options) -> Report:
    """Runs the launches, on a process per rank.

    RuntimeError: something is missing (tools.twin). Failed: a launch has been refused or has failed.
    """
    run = functools.partial(_run, options, build(), uuid.uuid4().hex)
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload([__name__])
    with processes.Pool(options.ranks) as pool:
        answers = pool.imap_unordered(run, range(options.ranks))
        launches = [launch for _ in range(options.ranks) for launch in answers.next(_TIMEOUT)]
    launches.sort(key=lambda launch: (options.ops.index(launch["op"]), launch["rank"]))
    return {"options": asdict(options), "launches": launches}


def _run(options: Options, library: Path, key: str, rank: int) -> list[Launch]:
    torch.set_num_threads(1)
    twin = Twin(library)
    twin.configure(Setup(ARCHS[options.arch], options.cores))
    launches = []
    with Group(twin, key, rank, options.ranks, _window_bytes(options), _TIMEOUT * 1000) as group:
        inputs = Rank(options, rank, group)
        for op in options.ops:
            OPS[op](inputs)
            if any(group.status()):
                raise RuntimeError(f"{op} has failed on rank {rank}, with the status {group.status()}")
            launches += [launch for launch in twin.take_report() if launch["op"] == op]
    for launch in launches:
        launch["rank"] = rank
    return launches


def _window_bytes(options: Options) -> int:
    """Enough for all tokens in one round of any op."""
    element_bytes = torch.finfo(getattr(torch, options.dtype)).bits // 8
    R, T = options.ranks, options.tokens
    sizes = model.Sizes(R, T, options.hidden, options.top_k, options.experts, element_bytes)
    return 2 * R * model.LINE + max(model.window_bytes(op, sizes, T) for op in model.OPS)


def table(report: Report) -> str:
    """For people: a block per op."""
    ops = dict.fromkeys(launch["op"] for launch in report["launches"])
    options = report["options"]
    head = "{ranks} ranks, T={tokens} H={hidden} K={top_k} E={experts} {dtype}, {routing}; {arch}, cores: {cores}"
    blocks = [_block([launch for launch in report["launches"] if launch["op"] == op]) for op in ops]
    return "\n\n".join([head.format(**options), *blocks])


def _block(launches: list[Launch]) -> str:
    """Of an op's launches on all ranks."""

    def sum_of(moved: Sequence[Moved]) -> tuple[int, int]:
        return sum(m["bytes"] for m in moved), sum(m["transfers"] for m in moved)

    def busiest(launch: Launch) -> tuple[int, int]:
        return max(sum_of((core["mte2"], core["mte3"])) for core in launch["cores"])

    def average(launch: Launch) -> tuple[float, float]:
        moved, transfers = sum_of((launch["total"]["mte2"], launch["total"]["mte3"]))
        return moved / len(launch["cores"]), transfers / len(launch["cores"])

    measured: dict[str, Callable[[Launch], tuple[float | None, float | None]]] = {
        "written over links": lambda launch: sum_of([link["written"] for link in launch["links"]]),
        "  flags of that": lambda launch: sum_of([link["flags"] for link in launch["links"]]),
        "read over links": lambda launch: sum_of([link["read"] for link in launch["links"]]),
        "MTE2, in": lambda launch: sum_of([launch["total"]["mte2"]]),
        "MTE3, out": lambda launch: sum_of([launch["total"]["mte3"]]),
        "both, average core": average,
        "both, busiest core": busiest,
        "unified buffer, peak": lambda launch: (launch["total"]["unified_buffer_peak"], None),
        "PipeBarrier, of a core": lambda launch: (None, max(core["barriers"] for core in launch["cores"])),
        "SyncAll, of a core": lambda launch: (None, max(core["syncs"] for core in launch["cores"])),
        "SetFlag, of a core": lambda launch: (None, max(core["events"] for core in launch["cores"])),
    }
    lines = [
        f"{launches[0]['op']}, cores: {len(launches[0]['cores'])}",
        f"  {'':22}{'bytes':>15}{'':15}{'number':>12}",
        f"  {'':22}{'mean of ranks':>15}{'most':>15}{'mean':>12}{'most':>12}",
    ]
    for label, of in measured.items():
        cells = []
        for values, width in zip(zip(*map(of, launches), strict=True), (15, 12), strict=True):
            known = [value for value in values if value is not None]
            numbers = (sum(known) / len(known), max(known)) if known else ()
            cells += [f"{number:>{width},.0f}" for number in numbers] or [" " * 2 * width]
        lines.append(f"  {label:22}{''.join(cells)}".rstrip())
    links = [(launch["rank"], link) for launch in launches for link in launch["links"]]
    lines += _matrix("writes to", {(rank, link["peer"]): link["written"] for rank, link in links})
    lines += _matrix("reads from", {(rank, link["peer"]): link["read"] for rank, link in links})
    return "\n".join(lines)


def _matrix(verb: str, cells: dict[tuple[int, int], Moved]) -> list[str]:
    """What every rank does with every other one's window; nothing where that is nothing."""
    if not any(moved["transfers"] for moved in cells.values()):
        return []
    ranks = range(1 + max(rank for rank, _ in cells))
    text = {place: f"{moved['bytes']:,} / {moved['transfers']:,}" for place, moved in cells.items()}
    width = 2 + max(8, *map(len, text.values()))
    lines = [f"  {'bytes / transfers':22}" + "".join(f"{f'rank {peer}':>{width}}" for peer in ranks)]
    for rank in ranks:
        line = "".join(f"{text.get((rank, peer), '-'):>{width}}" for peer in ranks)
        lines.append(f"  {f'rank {rank} {verb}':22}{line}")
    return lines
