"""A model of time: what the kernels of ops/op_kernel move, over published figures of the SoCs. docs/time_model.md says
what it is worth.

T local tokens · H hidden · K top-k · E experts · R ranks · L = E/R local experts · N rows of recv_x · B blocks, one per
vector core. Bytes and seconds, but µs in what is published and printed.
"""

import functools
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

US = 1e-6
FLAG, SAID, STATUS = 64, 32, 32  # bytes of a flag, of what it says of its rank, and of what a block says of itself
MOST_FLAGS = 32  # that are raised at a time; twice as many are read
MOST_ROWS = 4095  # of a transfer
LINE = 512  # bytes that slots are aligned to
LINES, MARKS = 128 * 64, 2 * 4 * (1 << 16)  # bytes of blocks' lines and of marks
FITS = 0.9  # of a round of the tables: with less, most ranks have their last tokens behind those of some others


def align(size: int, unit: int) -> int:
    return -(-size // unit) * unit


# What a launch moves. The twin counts the same: tests/npu/test_time_model.py.


class Rounds(NamedTuple):
    """Tokens of a rank: of each round, and in passes that count, or that look for the first one without room."""

    tokens: tuple[float, ...]
    counted: tuple[float, ...]
    searched: tuple[float, ...] = ()

    @classmethod
    def of(cls, to: Sequence[Collection[int]], slot_tokens: int) -> "Rounds":
        """Of tokens that go `to` these ranks: src/device/window_map.h, ops/common/op_kernel/counts.h."""

        def fitting(first: int, last: int) -> int:
            used: dict[int, int] = {}
            for token in range(first, last):
                for rank in to[token]:
                    used[rank] = used.get(rank, 0) + 1
                    if used[rank] > slot_tokens:
                        return token
            return last

        return cls._of(len(to), fitting)

    @classmethod
    def even(cls, tokens: int, most: float) -> "Rounds":
        """With so many tokens of a full round."""
        return cls._of(tokens, lambda first, last: min(last, first + most))

    @classmethod
    def _of(cls, tokens: int, fitting: Callable[[Any, Any], Any]) -> "Rounds":
        first, last = 0, tokens
        own: list[float] = []
        counted: list[float] = []
        searched: list[float] = []
        while not own or first < tokens:
            end = fitting(first, last)
            counted.append(last - first)
            if end < last:
                searched.append(last - first)
                counted.append(end - first)
            own.append(end - first)
            first, last = end, min(tokens, end + 2 * (end - first))
        return cls(tuple(own), tuple(counted), tuple(searched))

    def until(self, number: int) -> "Rounds":
        """As many as another rank has: the rest without tokens."""
        rest = (0,) * (number - len(self.tokens))
        return self._replace(tokens=self.tokens + rest, counted=self.counted + rest)


class Routing(NamedTuple):
    """What a rank has to send and gets. A record is one token at one rank, whatever number of experts it has there."""

    sent: float
    sent_far: float  # to other ranks
    arrived: float
    arrived_far: float
    rows: float  # (token, k) that have arrived
    rows_far: float
    rounds: Rounds
    asked: float = 0  # of those sent, with several experts
    asked_far: float = 0
    asked_rows: float = 0  # and these
    asked_rows_far: float = 0
    answered: float = 0  # of those arrived


@dataclass(frozen=True)
class Sizes:
    R: int
    T: int
    H: int
    K: int
    E: int
    element_bytes: int = 2
    cores: int = 48
    M: int = 0
    """num_max_dispatch_tokens_per_rank of low latency; 0 is T."""
    slot_tokens: int = 0
    """Tokens that a slot has room for in normal mode; 0: as many as there are."""
    unified_buffer: int = 188160
    """Bytes, of a core."""
    zero_unused: bool = False
    """Of low latency: rows that hold nothing become 0, as in grad mode."""

    @property
    def L(self) -> int:
        return self.E // self.R

    @property
    def row(self) -> int:
        return self.H * self.element_bytes

    @property
    def blocks(self) -> int:
        return min(max(1, self.T, self.low_latency_rows), self.cores)

    @property
    def low_latency_rows(self) -> int:
        return self.R * (self.M or self.T) * min(self.K, self.L)

    @property
    def hit(self) -> float:
        """The chance that a token goes to a rank, if all sets of K experts are alike."""
        return 1 - math.comb(self.E - self.L, self.K) / math.comb(self.E, self.K)

    def uniform_rounds(self) -> Rounds:
        """Each as long as fits with a chance of FITS, which fewer tokens to each rank do than its slot has room for."""
        least, most = self.slot_tokens or self.T, self.T
        while least < most:
            middle = (least + most + 1) // 2
            fits = (1 - _chance_of_more(self.slot_tokens, middle, self.hit)) ** self.R >= FITS
            least, most = (middle, most) if fits else (least, middle - 1)
        return Rounds.even(self.T, least)

    def record(self, rows: "Rows") -> int:
        """Bytes of a record in a slot."""
        return align(4 * ((rows.sent_bytes > 0) + 1 + 3 * self.K), 32)

    @property
    def flags(self) -> int:
        """That a block raises at a time."""
        return min(max(1, -(-self.R // 2)), MOST_FLAGS)

    @property
    def table(self) -> int:
        """Bytes of the counts by expert and rank."""
        return align(4 * self.E, 32) + 4 * self.R

    @property
    def table_bytes(self) -> int:
        """Of a table in the unified buffer."""
        return align(max(4 * (align(4 * self.E, 32) // 4 + self.R), 8 * self.L), 32)

    def uniform(self) -> Routing:
        """Every token has K experts, all sets of K alike."""
        hit = self.hit
        to_all, far = self.T * self.R * hit, self.T * (self.R - 1) * hit
        rows = self.T * self.K
        one = self.L * math.comb(self.E - self.L, self.K - 1) / math.comb(self.E, self.K)
        asked, asked_rows = self.T * self.R * (hit - one), rows - self.T * self.R * one
        away = (self.R - 1) / self.R
        asks = asked, asked * away, asked_rows, asked_rows * away, asked
        return Routing(to_all, far, to_all, far, rows, rows * away, self.uniform_rounds(), *asks)


def _chance_of_more(most: int, tokens: int, hit: float) -> float:
    """That of so many tokens more than `most` go to a rank."""
    if hit == 1:
        return float(tokens > most)

    def chance(n: int) -> float:
        ways = math.lgamma(tokens + 1) - math.lgamma(n + 1) - math.lgamma(tokens - n + 1)
        return math.exp(ways + n * math.log(hit) + (tokens - n) * math.log1p(-hit))

    return max(0.0, 1 - sum(map(chance, range(min(most, tokens) + 1))))


class Rows(NamedTuple):
    """What an op does with rows: Work of src/device/tiling.h."""

    sent_bytes: int = 0
    """Of an element that is quantised on its way."""
    copied: bool = False
    arithmetic: bool = False
    answers: bool = False
    """A word comes back for each (token, k)."""


class Pieces(NamedTuple):
    """What the unified buffer takes of tables, and of tokens with all that goes with them, at a time."""

    tables: int
    tokens: int

    @classmethod
    def of(cls, s: Sizes, rows: Rows) -> "Pieces":
        """As src/device/tiling.cpp has it; tests/npu/test_op_definitions.py compares."""
        tables, tiles = 10, (3 * 4 + 2 + 2 + 4) // s.element_bytes if rows.sent_bytes else 0
        if rows.arithmetic:
            tables, tiles = 6 + rows.answers, 2 + 2 * 4 // s.element_bytes + 4 * rows.copied
        table = s.table_bytes
        per_token = align(8 * s.K, 32) + 4 * align(4 * s.K, 32) + s.record(rows)
        per_token += 32 + align(8 * (1 + 2 * s.K), 32) + 3 * 32 * s.K
        flags = STATUS * (2 + s.cores) + FLAG * s.flags + 2 * align(4 * s.R, 32)
        free = s.unified_buffer - flags - tables * table - LINE * (2 + tiles)
        batch = 1 + min((free - per_token) // (16 if rows.arithmetic else 4) // (2 * table), max(s.R, s.blocks) - 1)
        free -= 2 * (batch - 1) * table
        return cls(batch, min(max(1, free // 10 // per_token), 64))


@dataclass(frozen=True)
class Stage:
    """What runs side by side. Bytes are those of the whole rank: from and to global memory, and over links."""

    name: str
    load: float = 0
    store: float = 0
    link: float = 0
    stalls: float = 0
    """Transfers that the slowest block waits for with nothing else under way."""
    items: float = 0
    """What is split over the blocks; 0: all blocks do the same."""
    serial: bool = False
    """A block's loads and stores do not overlap."""
    blocks: int = 0
    """That do it; 0: all."""
    meetings: int = 0
    """Of all blocks."""
    waits: int = 0
    """For the flags of all ranks."""


Step = Stage | tuple[Stage, ...]
"""Stages in a tuple are of different blocks, which do them at the same time."""


def _agree(s: Sizes, times: int = 1) -> Stage:
    B = s.blocks
    return Stage("agree", times * STATUS * B * B, times * STATUS * B, stalls=2 * times, meetings=times)


def _flags(s: Sizes, n: int) -> list[Stage]:
    """All blocks meet, raise the flags of a phase, wait for them, and agree."""
    of_block = math.ceil(s.R / s.blocks)
    raised = Stage("flags", 0, n * FLAG * s.R, n * FLAG * (s.R - 1), n * math.ceil(of_block / s.flags), meetings=n)
    waited = Stage("wait", stalls=n * of_block, waits=n)
    return [raised, waited, _agree(s, n)]


def _read_flags(s: Sizes, n: int) -> Stage:
    return Stage("read flags", n * SAID * s.R * s.blocks, stalls=n * math.ceil(s.R / (2 * s.flags)))


def _read_tables(pieces: Pieces, tables: int) -> int:
    """Stalls of a block that goes through tables: two transfers are under way at a time."""
    return math.ceil(math.ceil(tables / pieces.tables) / 2)


def _chunks(s: Sizes, pieces: Pieces, tokens: float) -> int:
    """Of a block, of so many tokens of the rank."""
    return math.ceil(tokens / s.blocks / pieces.tokens)


def _arrived_chunks(s: Sizes, pieces: Pieces, records: float) -> int:
    """The same of what has arrived, whoever it is from."""
    return math.ceil(math.ceil(records / s.blocks) / pieces.tokens)


def _count(s: Sizes, pieces: Pieces, per_token: int, rounds: Rounds) -> list[Stage]:
    """Counts by expert and rank of each block, which all blocks read; and where rounds have to end."""
    B, n, passes = s.blocks, len(rounds.counted), rounds.counted + rounds.searched
    load, store = per_token * sum(passes) + n * B * B * s.table, n * B * s.table
    stalls = sum(_chunks(s, pieces, tokens) for tokens in passes) + n * _read_tables(pieces, B)
    return [Stage("count", load, store, stalls=stalls), _agree(s, len(passes))]


def _add_up(s: Sizes, pieces: Pieces, is_normal: bool) -> Stage:
    """The counts of all ranks: each block those of the experts of some ranks, twice, and S waits the second time."""
    ranks = math.ceil(s.R / s.blocks)
    piece = min(pieces.tables * s.table_bytes // align(4 * s.L * ranks, 32), MOST_ROWS)
    rows = s.table_bytes // align(4 * ranks, 32)  # of the matrix of ranks, that are written at a time
    return Stage(
        "add up",
        2 * 4 * s.E * s.R,
        2 * 4 * s.E + is_normal * 4 * s.R * s.R,
        stalls=math.ceil(math.ceil(s.R / piece) / 2) + math.ceil(s.R / piece) + is_normal * math.ceil(s.R / rows),
        items=s.R,
    )


def _dispatch(s: Sizes, rows: Rows, r: Routing, is_normal: bool) -> list[Stage]:
    n, B, pieces, quantised = len(r.rounds.tokens), s.blocks, Pieces.of(s, rows), rows.sent_bytes > 0
    sent_row, scale = s.H * (rows.sent_bytes or s.element_bytes), 4 * quantised
    record, weights, ids = 4 * (1 + (2 + is_normal) * s.K) + scale, 4 * s.K * is_normal, 8 * s.K
    # Of each row of recv_x: its source, and its scale or an expert and a weight; in K columns where there is none.
    described, columns = 12 + scale + 12 * is_normal, 12 * s.K * is_normal
    rest = 0 if is_normal else s.low_latency_rows - r.rows
    chunks = sum(_chunks(s, pieces, tokens) for tokens in r.rounds.tokens)
    return [
        *([Stage("clear columns", 0, r.rows * columns, stalls=1)] if is_normal else []),
        *_count(s, pieces, ids, r.rounds),
        Stage("counts", 0, 4 * s.E * (s.R + is_normal), 4 * s.E * (s.R - 1), stalls=is_normal),
        Stage(
            "send",
            s.T * (s.row * (1 + quantised) + ids + weights),
            r.sent * (sent_row + record),
            r.sent_far * (sent_row + record),
            stalls=2 * chunks + (2 * math.ceil(s.T / B) if quantised else chunks),
            items=s.T / n,
        ),
        *_flags(s, n),
        _read_flags(s, n),
        _add_up(s, pieces, is_normal),
        _agree(s),
        Stage("tables", 2 * 4 * s.E * B, stalls=1),
        Stage("describe", 0, 4 * s.E + 8 * s.L + 8 * is_normal, stalls=2 + is_normal),
        Stage("answer", ids * s.T, 4 * s.K * s.T, stalls=2 * chunks, items=s.T / n),
        Stage(
            "expand",
            r.arrived * (s.record(rows) + sent_row),
            r.rows * (sent_row + described),
            stalls=3 * n * _arrived_chunks(s, pieces, r.arrived / n),
            items=r.arrived / n,
        ),
        Stage(
            "clear",
            0,
            rest * (12 + (sent_row + scale) * s.zero_unused),
            stalls=(1 + (1 + quantised) * s.zero_unused) * (rest > 0),
        ),
    ]


def _low_latency_dispatch(s: Sizes, rows: Rows, r: Routing) -> list[Stage]:
    return _dispatch(s, rows, r, is_normal=False)


def _normal_dispatch(s: Sizes, rows: Rows, r: Routing) -> list[Stage]:
    """With memory for the rows that arrive, and no more."""
    return _dispatch(s, rows, r, is_normal=True)


def _round_trip(s: Sizes, rows: Rows, r: Routing) -> list[Stage]:
    """combine and the backward ops, which differ in what goes with a record and what answers it."""
    n, B, pieces = len(r.rounds.tokens), s.blocks, Pieces.of(s, rows)
    sends_rows, answers_rows, word = rows.copied, not rows.copied, 4 * rows.answers
    has_weights = sends_rows or not rows.answers
    sent = 4 * (1 + (2 + has_weights) * s.K) + s.row * sends_rows
    ids, answer = 12 * s.K, s.row * answers_rows
    chunks = sum(_chunks(s, pieces, tokens) for tokens in r.rounds.tokens)
    arrived_chunks = n * _arrived_chunks(s, pieces, r.arrived / n)
    unused = Stage("find unused", 12 * r.rows, stalls=math.ceil(r.rows / B / (pieces.tokens * s.K)))
    return [
        *([unused] if sends_rows else []),
        *_count(s, pieces, ids, r.rounds),
        Stage(
            "ask",
            (ids + 4 * s.K * has_weights + s.row * sends_rows) * s.T,
            r.sent * sent,
            r.sent_far * sent,
            stalls=(2 + sends_rows) * chunks,
            items=s.T / n,
        ),
        *_flags(s, n),
        _read_flags(s, n),
        Stage(
            "multiply" if sends_rows else "sum",
            r.arrived * (s.record(rows) + s.row * sends_rows) + r.rows * (s.row + word * answers_rows),
            r.arrived * answer + r.rows * (word + s.row * sends_rows),
            r.arrived_far * answer + r.rows_far * word,
            stalls=(2 + rows.answers) * arrived_chunks,
            items=r.arrived / n,
        ),
        _agree(s, n),
        *_flags(s, n),
        Stage(
            "gather",
            (ids + word * s.K) * s.T + r.sent * answer,
            s.T * (answer + word * s.K),
            stalls=(2 + rows.answers) * chunks,
            items=s.T / n,
        ),
    ]


def _low_latency_combine(s: Sizes, rows: Rows, r: Routing) -> list[Step]:
    """Some blocks push what they have, the others ask for sums and gather, token by token."""
    pieces, B, K = Pieces.of(s, rows), s.blocks, s.K
    G = max(1, B // 4)
    P = max(1, B - G)
    parts = P // math.gcd(P, s.R)  # of a source's tokens
    units = s.R * parts // P  # of a block: a part of one source's
    words = (3 + 2 * pieces.tables) * s.table_bytes // 4
    all_of_unit = math.ceil((s.M or s.T) / parts)
    of_unit = min(all_of_unit, words // 2 // units)
    passes = math.ceil(all_of_unit / of_unit)
    staged = pieces.tokens * K * 24  # words; each (source, expert) begins on an alignment
    batches = math.ceil((3 * parts * r.rows / P + 4 * units * s.L) / staged)
    own = math.ceil(s.T / G)
    chunks, of_rank = math.ceil(own / pieces.tokens), math.ceil(s.R / G)
    last = min(s.T, G)  # tokens
    last_rows = round(r.sent * last / max(1, s.T))
    ask, routing = 8 * (r.asked + r.asked_rows), 2 * 16 * K * s.T
    rows_stored = r.arrived * (s.row + 4)
    push = Stage(
        "push",
        r.rows * s.row + r.answered * 8 * (1 + K),
        rows_stored,
        r.arrived_far * (s.row + 4),
        # A mark follows each row.
        stalls=math.ceil(r.arrived / P) + 2 * math.ceil(math.ceil(r.answered / P) / pieces.tokens),
        items=r.arrived,
        blocks=P,
    )
    gather = Stage(
        "gather",
        routing + (r.sent - last_rows) * s.row,
        ask + FLAG * s.R + (s.T - last) * s.row,
        8 * (r.asked_far + r.asked_rows_far) + FLAG * (s.R - 1),
        # Ids, twice, what it asks for, and what it has made; lines and flags; of each token a mark and the first row.
        stalls=4 * chunks + G + math.ceil(of_rank / s.flags) + of_rank + 2 * own,
        items=s.T,
        blocks=G,
    )
    return [
        Stage("find", 4 * s.E * P + 12 * passes * parts * r.rows, stalls=2 + passes * batches, blocks=P),
        (push, gather),
        Stage("last token", last_rows * s.row, last * s.row, stalls=3, waits=1, blocks=G),
        Stage("end", meetings=1),
    ]


class Op(NamedTuple):
    rows: Rows
    stages: Callable[[Sizes, Rows, Routing], Sequence[Step]]


OPS = {
    "low_latency_dispatch": Op(Rows(copied=True), _low_latency_dispatch),
    "low_latency_dispatch_int8": Op(Rows(sent_bytes=1), _low_latency_dispatch),
    "low_latency_combine": Op(Rows(arithmetic=True), _low_latency_combine),
    "dispatch": Op(Rows(copied=True), _normal_dispatch),
    "dispatch_int8": Op(Rows(sent_bytes=1), _normal_dispatch),
    "combine": Op(Rows(arithmetic=True), _round_trip),
    "dispatch_backward": Op(Rows(arithmetic=True, answers=True), _round_trip),
    "combine_backward": Op(Rows(copied=True, arithmetic=True, answers=True), _round_trip),
}


def steps(op: str, s: Sizes, r: Routing) -> list[tuple[Stage, ...]]:
    return [(step,) if isinstance(step, Stage) else step for step in OPS[op].stages(s, OPS[op].rows, r)]


class Counters(NamedTuple):
    link: float
    load: float
    store: float


def counters(op: str, s: Sizes, r: Routing) -> Counters:
    """What the twin counts of a launch: bytes over links, and through the unified buffers of all cores."""
    found = [stage for step in steps(op, s, r) for stage in step]
    return Counters(*(sum(getattr(stage, name) for stage in found) for name in Counters._fields))


def _row_stride(op: str, s: Sizes) -> int:
    rows = OPS[op].rows
    sent = s.H * (rows.sent_bytes or s.element_bytes)
    return align(align(sent, 32) + 4 * s.K if rows.answers else sent, LINE)


def window_bytes(op: str, s: Sizes, tokens: int) -> int:
    """Bytes of a window with slots of so many tokens: src/device/window_map.h. Normal mode: a LINE more."""
    record = s.record(OPS[op].rows)
    slot = align(4 * s.E, LINE) + align(tokens * record, LINE) + tokens * _row_stride(op, s)
    if op == "low_latency_combine":
        return slots_begin(s) + 2 * align(tokens * (min(s.K, s.R) * _row_stride(op, s) + s.R * record), LINE)
    return slots_begin(s) + 2 * s.R * slot


def slots_begin(s: Sizes) -> int:
    """Where the slots of a window begin."""
    return LINE + align(4 * s.R * FLAG, LINE) + LINES + MARKS


def slot_tokens(op: str, s: Sizes, window_bytes: int) -> int:
    """Tokens that a slot has room for in normal mode: src/device/window_map.h."""
    room = (window_bytes - slots_begin(s)) // 2 // LINE * LINE // s.R // LINE * LINE
    return max(1, (room - align(4 * s.E, LINE) - LINE) // (s.record(OPS[op].rows) + _row_stride(op, s)))


# What DeepEP-Ascend's kernels move, from their sources of 2025-09-26, when its figures were published: a row for each
# (token, expert). A block waits for each row that it quantises, twice, and for each row of a combine.


class Peer(NamedTuple):
    stages: Callable[[Sizes, bool], list[Stage]]
    launches: int
    host: bool
    """Its host counts rows before the launch, for each rank."""
    scans: bool
    """Each of its blocks goes through all ids."""


def _sent_row(s: Sizes, is_int8: bool) -> int:
    return (s.H if is_int8 else s.row) + 44  # the scale, or nothing, in 32 bytes, and three words


def _pull(s: Sizes, is_int8: bool) -> list[Stage]:
    rows, row = s.T * s.K, _sent_row(s, is_int8)
    far, stalls = rows * (s.R - 1) / s.R, 2 * math.ceil(rows / s.cores) if is_int8 else 0
    return [
        Stage("send", rows * s.row, rows * row, stalls=stalls, items=rows, serial=True),
        Stage("fetch", rows * row, rows * row, far * row, items=rows),
    ]


def _push(s: Sizes, is_int8: bool) -> list[Stage]:
    rows, row = s.T * s.K, _sent_row(s, is_int8)
    far, stalls = rows * (s.R - 1) / s.R, 2 * math.ceil(rows / s.cores) if is_int8 else 0
    return [
        Stage("send", rows * s.row, rows * row, far * row, stalls, items=rows, serial=True),
        Stage("expand", rows * row, rows * row, items=rows),
    ]


def _return(s: Sizes, _: bool) -> list[Stage]:
    rows, far = s.T * s.K, s.T * s.K * (s.R - 1) / s.R
    return [
        Stage("send", rows * s.row, rows * s.row, far * s.row, items=rows, serial=True),
        Stage("sum", rows * s.row, s.T * s.row, items=s.T, serial=True),
    ]


PEER = {
    "dispatch": Peer(_pull, 2, True, False),
    "combine": Peer(_return, 1, False, False),
    "low_latency_dispatch": Peer(_push, 1, False, True),
    "low_latency_combine": Peer(_return, 1, False, False),
}


# Published figures of the SoCs, of one rank: an A2 or A5 NPU, and one of the two dies of an A3 NPU.


class Tier(NamedTuple):
    """Links of a rank to those of its group of `outer` ranks that are not of its group of `inner`, 0: all."""

    inner: int
    outer: int
    bandwidth: float  # in one direction


class Soc(NamedTuple):
    cores: int
    unified_buffer: int
    core_bandwidth: float  # between a core's unified buffer and memory, in one direction
    memory_bandwidth: float
    tiers: tuple[Tier, ...]
    latencies: tuple[tuple[int, float], ...]  # of the links inside a group of so many ranks
    launch: float
    most_ranks: int


SOCS = {
    "A2": Soc(48, 188160, 32 * 1.8e9, 1.6e12, (Tier(1, 8, 196e9),), ((8, 0.5 * US),), 10 * US, 8),
    "A3": Soc(
        48,
        188160,
        32 * 1.8e9,
        1.6e12,
        (Tier(1, 2, 224e9), Tier(2, 0, 196e9)),
        ((2, 0.2 * US), (16, 0.5 * US), (768, 5.5 * US)),
        10 * US,
        768,
    ),
    "A5": Soc(
        64,
        253952,
        27 * 1.65e9,
        4.0e12,
        (Tier(1, 0, 840e9), Tier(8, 0, 448e9), Tier(64, 0, 224e9)),
        ((8, 2.3 * US), (1024, 4.5 * US)),
        5 * US,
        1024,
    ),
}
EPS = (8, 16, 32, 64, 128, 256, 384)
MEETING = 1 * US
"""SyncAll. Assumed: no figure is published, and no result depends on it by more than a few µs."""

_MSMODELING = "Ascend/msmodeling, tensor_cast/device.py"
SOURCES = {
    "core": "CANN runtime, src/platform/platform_config: ddr_rate and cube_freq of Ascend910B2C.ini (taken for A3 too) "
    "and Ascend950PR_957bx.ini",
    "cores": "the same; A5: cann/ops-transformer, issue 5487, for 950PR (56 in the ini, 72 in reports of 950DT)",
    "memory": f"{_MSMODELING}: memory_bandwidth_bytes_ps, in 10^12 bytes (A5: 950DT; 950PR has 1.6)",
    "links": f"{_MSMODELING}: ATLAS_800.A2_INTERCONNECT, A3_INTERCONNECT, A5.Interconnect.POD_1K. A3: arXiv 2506.12708 "
    "has 392 GB/s for two dies. A5: Huawei's keynote of 2025-09-18 has 2 TB/s, both directions together",
    "latency": f"{_MSMODELING}, the same",
    "launch": f"{_MSMODELING}: StaticCost.comm_op_cost_s, which its authors want to confirm",
}


# Published points: µs.


class Point(NamedTuple):
    soc: str
    op: str
    R: int
    T: int
    is_int8: bool
    us: float
    source: str
    has_host: bool = True  # as far as the op has it at all


H, K, EXPERTS = 7168, 8, 256
_README = "sgl-kernel-npu, README"
_PAPER = "arXiv 2506.12708"


def _of_bandwidth(gbps: float) -> float:
    """The peer's figures of normal mode: 2·H bytes for each (token, expert), quantised or not, by the time."""
    return 4096 * K * 2 * H / gbps / 1e3


FITTED = [
    *(Point("A3", "dispatch", R, 4096, True, _of_bandwidth(b), _README) for R, b in ((8, 146), (16, 107), (32, 102))),
    *(Point("A3", "combine", R, 4096, False, _of_bandwidth(b), _README) for R, b in ((8, 125), (16, 103), (32, 95))),
    *(Point("A3", "low_latency_dispatch", R, 128, True, t, _README) for R, t in ((8, 132), (16, 139), (32, 153))),
    *(Point("A3", "low_latency_combine", R, 128, False, t, _README) for R, t in ((8, 126), (16, 135), (32, 151))),
]
HELD_OUT = [
    *(Point("A3", "dispatch", R, 4096, True, _of_bandwidth(b), _README) for R, b in ((64, 81), (128, 57))),
    *(Point("A3", "combine", R, 4096, False, _of_bandwidth(b), _README) for R, b in ((64, 91), (128, 81))),
    *(Point("A3", "low_latency_dispatch", R, 128, True, t, _PAPER) for R, t in ((8, 116), (256, 152))),
    *(Point("A3", "low_latency_combine", R, 128, False, t, _PAPER) for R, t in ((8, 118), (256, 149))),
    Point("A3", "dispatch", 16, 4096, True, 4036, "sgl-kernel-npu, #177, before"),
    Point("A3", "dispatch", 16, 4096, True, 3508, "sgl-kernel-npu, #177, after: counts on the device", False),
    Point("A3", "combine", 16, 4096, False, 4619, "sgl-kernel-npu, #177, after"),
    Point("A2", "low_latency_dispatch", 8, 256, True, 308, "sgl-kernel-npu, #176"),
    Point("A2", "low_latency_combine", 8, 256, False, 449, "sgl-kernel-npu, #176"),
    Point("A2", "dispatch", 8, 4096, False, 6723, "sgl-kernel-npu, #211, after: counts on the device", False),
    Point("A2", "combine", 8, 4096, False, 5852, "sgl-kernel-npu, #211, after"),
]


# Time.


class Parameters(NamedTuple):
    efficiency: float
    """What is reached of the bandwidth of links."""
    stall: float
    """A transfer that nothing hides."""
    scan: float
    """Of the peer's low-latency dispatch: every block reads all ids, for each (token, k)."""
    host: float
    """Of the peer's normal dispatch, on its host: for each rank."""


def link_time(soc: Soc, R: int, link: float, efficiency: float) -> float:
    """`link` bytes to R - 1 ranks alike; neighbours have neighbouring numbers."""
    times = [0.0]
    for tier in soc.tiers:
        reached = max(0, (min(R, tier.outer) if tier.outer else R) - min(R, tier.inner))
        times.append(link * reached / max(1, R - 1) / (efficiency * tier.bandwidth))
    return max(times)


def latency(soc: Soc, R: int) -> float:
    return next(seconds for ranks, seconds in soc.latencies if ranks >= R)


def _block_time(stage: Stage, soc: Soc, s: Sizes, p: Parameters) -> float:
    blocks = stage.blocks or s.blocks
    share = math.ceil(stage.items / blocks) / stage.items if stage.items > 0 else 1 / blocks
    both = stage.load, stage.store
    return (sum(both) if stage.serial else max(both)) * share / soc.core_bandwidth + stage.stalls * p.stall


def step_time(step: Sequence[Stage], soc: Soc, s: Sizes, p: Parameters) -> float:
    """The slowest of: a block, memory, and the links. Then what blocks wait for."""
    moved = sum(stage.load + stage.store for stage in step)
    blocks = max(_block_time(stage, soc, s, p) for stage in step)
    links = link_time(soc, s.R, sum(stage.link for stage in step), p.efficiency)
    waited = sum(stage.meetings * MEETING + stage.waits * latency(soc, s.R) for stage in step)
    return max(blocks, moved / soc.memory_bandwidth, links) + waited


def op_time(op: str, soc: Soc, s: Sizes, p: Parameters) -> float:
    return soc.launch + sum(step_time(step, soc, s, p) for step in steps(op, s, s.uniform()))


def roof(op: str, soc: Soc, s: Sizes) -> float:
    """Bytes over links at their published bandwidth, or through memory at its own, and nothing else."""
    moved = counters(op, s, s.uniform())
    return max(link_time(soc, s.R, moved.link, 1.0), (moved.load + moved.store) / soc.memory_bandwidth)


def peer_time(point: Point, p: Parameters) -> float:
    soc, peer = SOCS[point.soc], PEER[point.op]
    s = Sizes(point.R, point.T, H, K, experts_of(point.R), cores=soc.cores)
    seconds = sum(step_time([stage], soc, s, p) for stage in peer.stages(s, point.is_int8))
    seconds += peer.launches * soc.launch + peer.scans * p.scan * s.T * s.K
    return seconds + (p.host * s.R if peer.host and point.has_host else 0)


def experts_of(R: int) -> int:
    return EXPERTS if EXPERTS % R == 0 else R


def error(point: Point, p: Parameters) -> float:
    return peer_time(point, p) / (point.us * US) - 1


def _loss(p: Parameters) -> float:
    return sum(math.log1p(error(point, p)) ** 2 for point in FITTED)


@functools.cache
def fit() -> Parameters:
    """Least squares of the logarithms over FITTED, by steps along one parameter at a time."""
    best, steps = Parameters(0.5, 1 * US, 0.05 * US, 30 * US), [0.5] * 4
    while max(steps) > 1e-4:
        for i, name in enumerate(Parameters._fields):
            factors = 1 + steps[i], 1 / (1 + steps[i])
            nearest = min((best._replace(**{name: getattr(best, name) * f}) for f in factors), key=_loss)
            if _loss(nearest) < _loss(best):
                best = nearest
            else:
                steps[i] /= 2
    return best


# Predictions, tables and the plot.

WINDOW = 256 << 20
"""Bytes of a window by default (python/deep_ep/windows.py)."""
NORMAL = ("dispatch", "dispatch_int8", "combine", "dispatch_backward", "combine_backward")
LOW_LATENCY = ("low_latency_dispatch", "low_latency_dispatch_int8", "low_latency_combine")


def sizes(op: str, soc: Soc, R: int) -> Sizes:
    T = 4096 if op in NORMAL else 128
    return Sizes(R, T, H, K, experts_of(R), cores=soc.cores, unified_buffer=soc.unified_buffer)


def bandwidth(op: str, seconds: float) -> float:
    """GB/s as the peer counts: rows of all (token, expert), those that stay on the rank too. In low latency, int8 rows
    have H + H/32 + 16 bytes, in normal mode 2·H."""
    row = H + H // 32 + 16 if op == "low_latency_dispatch_int8" else 2 * H
    return (4096 if op in NORMAL else 128) * K * row / seconds / 1e9


def in_default_window(op: str, soc: Soc, R: int, p: Parameters) -> tuple[int, float]:
    """Rounds, and seconds."""
    s = sizes(op, soc, R)
    s = replace(s, slot_tokens=slot_tokens(op, s, WINDOW))
    return len(s.uniform().rounds.tokens), op_time(op, soc, s, p)


def published(op: str, soc: str, R: int) -> list[float]:
    """µs of DeepEP-Ascend's op, or of Huawei's that is like it."""
    points = [p for p in FITTED + HELD_OUT if (p.soc, p.op, p.R) == (soc, op.removesuffix("_int8"), R)]
    is_own = op != "low_latency_dispatch" and not op.endswith("backward")
    points = [p for p in points if p.is_int8 or op != "dispatch_int8"]
    return [p.us for p in points if is_own and p.T == sizes(op, SOCS[soc], R).T and "before" not in p.source]


def _table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def figures() -> str:
    def links(soc: Soc) -> str:
        ends = [f"beyond {t.inner}" if t.inner > 1 else f"to {t.outer or 'all'}" for t in soc.tiers]
        return ", ".join(f"{t.bandwidth / 1e9:.0f} {end}" for t, end in zip(soc.tiers, ends, strict=True))

    def latencies(soc: Soc) -> str:
        return ", ".join(f"{seconds / US:.1f} in {ranks}" for ranks, seconds in soc.latencies)

    rows: dict[str, tuple[str, Callable[[Soc], object]]] = {
        "core": ("a core to memory, GB/s", lambda soc: f"{soc.core_bandwidth / 1e9:.1f}"),
        "cores": ("vector cores", lambda soc: soc.cores),
        "memory": ("memory, GB/s", lambda soc: f"{soc.memory_bandwidth / 1e9:.0f}"),
        "links": ("links of a rank in one direction, GB/s", links),
        "latency": ("latency in a group of so many ranks, µs", latencies),
        "launch": ("launch, µs", lambda soc: f"{soc.launch / US:.0f}"),
    }
    lines = [(name, *(value(soc) for soc in SOCS.values()), SOURCES[key]) for key, (name, value) in rows.items()]
    return _table(("of a rank", *SOCS, "source"), lines)


def parameters() -> str:
    p = fit()
    rows = [
        ("`efficiency`", f"{p.efficiency:.2f}", "part of the links' bandwidth that is reached", "all"),
        ("`stall`", f"{p.stall / US:.2f} µs", "a transfer that nothing hides", "all"),
        ("`scan`", f"{p.scan / US:.3f} µs", "a block reads all ids, for each (token, k)", "its low-latency dispatch"),
        ("`host`", f"{p.host / US:.0f} µs", "the host counts, for each rank", "its normal dispatch of 2025-09"),
    ]
    return _table(("parameter", "fitted", "what it is", "ops of DeepEP-Ascend that have it"), rows)


def check(points: Sequence[Point]) -> str:
    rows = []
    for p in points:
        modelled = f"{peer_time(p, fit()) / US:.0f}"
        rows.append((p.soc, f"`{p.op}`", p.R, p.T, f"{p.us:.0f}", modelled, f"{error(p, fit()):+.0%}", p.source))
    return _table(("SoC", "op", "EP", "T", "published, µs", "model, µs", "error", "source"), rows)


def _cell(op: str, seconds: float) -> str:
    return f"{seconds / US:.0f} ({bandwidth(op, seconds):.0f})"


def predictions(ops: Sequence[str]) -> str:
    rows: list[Sequence[object]] = []
    for op in ops:
        for name, soc in SOCS.items():
            sized = [sizes(op, soc, R) if soc.most_ranks >= R else None for R in EPS]
            own = [_cell(op, op_time(op, soc, s, fit())) if s else "" for s in sized]
            rows.append((f"`{op}`" if name == "A2" else "", f"{name}, model", *own))
            rows.append(("", f"{name}, roof", *(_cell(op, roof(op, soc, s)) if s else "" for s in sized)))
            peers = [" / ".join(_cell(op, us * US) for us in published(op, name, R)) for R in EPS]
            if any(peers):
                rows.append(("", f"{name}, published", *peers))
    return _table(("op", "", *(f"EP{R}" for R in EPS)), rows)


def rounds() -> str:
    """Normal mode on A3 with windows of the default size."""
    rows: list[Sequence[object]] = [(*what, *numbers) for what, numbers in ROUNDS_BEFORE.items()]
    for op in NORMAL:
        found = [in_default_window(op, SOCS["A3"], R, fit()) for R in EPS]
        one = [op_time(op, SOCS["A3"], sizes(op, SOCS["A3"], R), fit()) for R in EPS]
        rows.append((f"`{op}`", "rounds", *(n for n, _ in found)))
        times = zip(found, one, strict=True)
        rows.append(("", "µs", *(f"{seconds / US:.0f} ({seconds / of_one:.2f})" for (_, seconds), of_one in times)))
    return _table(("A3, 256 MiB", "", *(f"EP{R}" for R in EPS)), rows)


ROUNDS_BEFORE = {
    ("before", "rounds"): (4, 8, 15, 29, 57, 114, 179),
    ("", "`dispatch`, µs"): (2891, 3995, 4815, 5482, 6342, 8272, 10906),
    ("", "`combine`, µs"): (2626, 3766, 4743, 5644, 7048, 10427, 15347),
}
"""When a round had no more tokens than a slot has room for."""


LEVERS = {
    "low_latency_dispatch_int8": [
        ("before", (105, 158, 248, 265, 284, 326, 471)),
        ("rows that hold nothing stay as they are", (74, 90, 107, 123, 142, 184, 256)),
        ("counts split over blocks; flags, and records of several sources, many at a time", None),
    ],
    "low_latency_combine": [
        ("before", (112, 145, 176, 192, 204, 221, 235)),
        ("flags many at a time", (112, 145, 176, 190, 199, 210, 219)),
        ("rows go unasked, and are added up while others are on their way", None),
    ],
}
"""What changes of the kernels have made of the predictions for A3, in µs, as this page had them then; None: now."""


def levers() -> str:
    rows, soc = [], SOCS["A3"]
    for op, changes in LEVERS.items():
        for i, (what, times) in enumerate(changes):
            now = [op_time(op, soc, sizes(op, soc, R), fit()) / US for R in EPS] if times is None else times
            rows.append((f"`{op}`" if i == 0 else "", what, *(f"{us:.0f}" for us in now)))
        peers = [" / ".join(f"{us:.0f}" for us in published(op, "A3", R)) for R in EPS]
        rows.append(("", "published", *peers))
    return _table(("A3, µs", "", *(f"EP{R}" for R in EPS)), rows)


def parts() -> str:
    """Where the time of some launches goes, and what it would be with other parameters."""
    rows = []
    p, soc = fit(), SOCS["A3"]
    for op in ("low_latency_dispatch_int8", "low_latency_combine", "dispatch", "combine", "combine_backward"):
        for R in (8, 128, 384):
            s = sizes(op, soc, R)
            times: dict[str, float] = {"launch": soc.launch}
            for step in steps(op, s, s.uniform()):
                times[step[0].name] = times.get(step[0].name, 0) + step_time(step, soc, s, p)
            largest = sorted(times.items(), key=lambda item: -item[1])[:5]
            others = p._replace(stall=p.stall / 2), p._replace(efficiency=0.7)
            row = [f"`{op}`", R, f"{op_time(op, soc, s, p) / US:.0f}"]
            row += [", ".join(f"{name} {t / US:.0f}" for name, t in largest)]
            rows.append([*row, *(f"{op_time(op, soc, s, other) / US:.0f}" for other in others)])
    return _table(("A3", "EP", "µs", "the largest parts", "`stall` halved", "`efficiency` 0.7"), rows)


TABLES: dict[str, Callable[[], str]] = {
    "figures": figures,
    "parameters": parameters,
    "fitted": lambda: check(FITTED),
    "held out": lambda: check(HELD_OUT),
    "low latency": lambda: predictions(LOW_LATENCY),
    "normal": lambda: predictions(NORMAL),
    "levers": levers,
    "rounds": rounds,
    "parts": parts,
}


def with_tables(text: str) -> str:
    """`text`, with each table between its markers as it is now."""
    for name, table in TABLES.items():
        begin, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
        if begin not in text or end not in text:
            raise ValueError(f"there is no place for the table '{name}': {begin!r} to {end!r}")
        before, rest = text.split(begin, 1)
        text = before + begin + table() + end + rest.split(end, 1)[1]
    return text


def plot(path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams |= {"svg.hashsalt": "deep_ep", "svg.fonttype": "none"}
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(11, 8), sharex=True)
    panels = (("low_latency_dispatch_int8", "low_latency_combine"), ("dispatch", "combine"))
    for axis, op in zip(axes.flat, (op for row in panels for op in row), strict=True):
        _panel(axis, op)
    figure.suptitle("Model of time, H = 7168, top-8: 128 tokens (above), 4096 tokens in one round (below)")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=5, fontsize=8)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _panel(axis: Any, op: str) -> None:
    peer = op.removesuffix("_int8")
    for (name, soc), colour in zip(SOCS.items(), ("C2", "C0", "C1"), strict=True):
        eps = [R for R in EPS if soc.most_ranks >= R]
        times = [op_time(op, soc, sizes(op, soc, R), fit()) / US for R in eps]
        axis.plot(eps, times, "o-" if len(eps) > 1 else "o", color=colour, label=f"{name}, this library: model")
        axis.plot(eps, [roof(op, soc, sizes(op, soc, R)) / US for R in eps], ":", color=colour, label=f"{name}, roof")
    points = [p for p in FITTED + HELD_OUT if p.op == peer and p.soc == "A3" and p.source in (_README, _PAPER)]
    peer_points = [p._replace(R=R) for p in points[:1] for R in EPS]
    modelled = [peer_time(p, fit()) / US for p in peer_points]
    axis.plot([p.R for p in peer_points], modelled, "--", color="0.5", label="A3, DeepEP-Ascend: model")
    for chosen, marker, label in ((FITTED, "s", "fitted"), (HELD_OUT, "x", "held out")):
        some = [p for p in points if p in chosen]
        axis.plot([p.R for p in some], [p.us for p in some], marker, color="k", label=f"A3, published: {label}")
    axis.set(title=op, xscale="log", yscale="log", xticks=EPS, xticklabels=EPS, xlabel="EP", ylabel="µs")
    axis.minorticks_off()


def text() -> str:
    return "\n\n".join(f"{name}:\n\n{table()}" for name, table in TABLES.items())


def write(folder: Path) -> None:
    """The tables into time_model.md, and time_model.svg."""
    page = folder / "time_model.md"
    page.write_text(with_tables(page.read_text()))
    plot(folder / "time_model.svg")
