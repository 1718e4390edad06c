"""Mutants of the AscendC kernels: copies of their sources with one fault each, chosen at run time.

A mutant leaves out one statement that synchronises (events, barriers, queues, cache lines, flags, epochs, checks of
what peers have sent), or shifts one offset by a slot. All of them are in one library: every fault is behind a
comparison with a number, so the sources are compiled once.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from tools.twin import native

OPS = native.root() / "ops"
KERNELS = (
    "get_dispatch_layout",
    "notify_dispatch",
    "low_latency_dispatch",
    "low_latency_dispatch_int8",
    "low_latency_combine",
    "dispatch",
    "dispatch_exact",
    "dispatch_int8",
    "dispatch_int8_exact",
    "combine",
    "dispatch_backward",
    "combine_backward",
)


class Mutant(NamedTuple):
    number: int
    file: str
    line: int
    fault: str
    """Left out, or shifted: what the source has."""
    function: str
    """The kernel or class, and the function, that it is in."""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}, {self.function}: {self.fault}"


# Calls that nothing else needs the value of, and what a mutant has in their place.
_LEFT_OUT = {
    r"order<HardEvent::\w+>\(\)": "(void)0",
    r"all_blocks\(\)": "(void)0",
    r"PipeBarrier<PIPE_\w+>\(\)": "(void)0",
    r"SyncAll\(\)": "(void)0",
    r"(?:SetFlag|WaitFlag)<event>\(id\)": "(void)0",
    r"refresh\(\w+\)": "(void)0",
    r"SetAtomic(?:Add<int32_t>|None)\(\)": "(void)0",
    r"raise\(phase, at, [^;]*\)": "(void)0",
    r"exchange_\.(?:begin|finish|post|tell|close)\(\)": "(void)0",
    r"exchange_\.begin\(places_of_\.bytes\(\)\)": "(void)0",
    r"exchange_\.hear\(gatherers_\)": "(void)0",
    r"exchange_\.raise_some\([^;]*\)": "(void)0",
    r"exchange_\.have_raised\(0, GetBlockIdx\(\), gatherers_\)": "true",
    r"exchange_\.has_raised\(0, source\)": "true",
    r"exchange_\.is_marked\([^;]*k\)\)": "true",
    r"line\.SetValue\(kPost\w+, [^;]*\)": "(void)0",
    r"\(got = line\.GetValue\(word\)\) != expected": "(got = line.GetValue(word)) == 0",
    r"unless == Unless::ahead": "false",
    r"exchange_\.raise_all\([^;]*\)\)": "(void)0",
    r"control\.SetValue\(\w+, epoch_\)": "(void)0",
    r"control\.GetValue\(kEnded\)": "(int64_t)0",
    r"status\.SetValue\(i, failure_\.get\(i\)\)": "(void)0",
    r"exchange_\.has_failed_before\(\)": "false",
    r"exchange_?\.agree\(\)": "!exchange_.has_failed()",
    r"agree\(\)": "!has_failed()",
    r"exchange_\.all_raised\(\w+\)": "!exchange_.has_failed()",
    r"wait\(phase, source\)": "true",
    r"read_flags\(\)": "(void)0",
    r"exchange_\.must_fit\(rank\)": "false",
    r"exchange_\.next_round\(\)": "false",
    r"has_more\(\)": "false",
    r"counts_\.fit\(exchange_\)": "true",
    r"exchange\.end_before\([^;]*\)\)": "(void)0",
    r"number < slots_\.tokens": "number <= slots_.tokens",
    r"said < end_": "block == 0",
    r"matches\(flag, \w+, [\w.]+, phase, source\)": "true",
    r"begun \+ 1 != epoch_": "false",
    r"bytes > map_\.room\(\)": "false",
    r"GetSystemCycle\(\) - begin_ <= deadline": "true",
    r"DataCacheCleanAndInvalid<[^;]*>\(line\)": "(void)0",
    r"DataCopy\(global<int32_t>\(flag\)[^;]*\)": "(void)0",
}
_DEFINITION = re.compile(r"__aicore__ (inline )?(?!GM_ADDR round)[\w<>:]+ \w+\(|^\s*//|#define")

# What an index is multiplied with, in the offset of a slot, row, record or the like.
_STRIDE = (
    r"(?:tiling_?(?:->|\.)(?:row_stride|row_bytes|record_bytes|count_stride|tile_bytes|work\.top_k)|stride_|top_k_"
    r"|kWords|words_|words|kFlagWords|id_stride_|word_stride_|ask_stride_|of_unit_|parts_|pushers_|gatherers_|local_experts_|kEntryWords|kStatusBytes|kStatusWords|kKnownWords|kSourceBytes|kLine|kLane|answer_words_|room\(\)|slot_bytes|work\.ranks"
    r"|exchange_\.ranks\(\)|sizeof\(int32_t\)|sizeof\(T\)|3|L|R)"
)
_CALL = r"(?:\([\w, ]*\))?"
_INDEX = rf"(?:\w+(?:\+\+)? % \w+|\([^()]*(?:\([^()]*\)[^()]*)*\)|[A-Za-z_][\w.]*{_CALL}(?:\.\w+{_CALL})*)"
_PRODUCT = re.compile(rf"(?<![\w>])({_INDEX}) \* ({_STRIDE})(?!\w)")
# Sizes, not offsets; and where all flags lie.
_SIZE = re.compile(
    r"phase\)\s\*\sranks\s\+\ssource\)$|count\(\)$|chunk_tokens|^count$|^kWords$|^words$|GetBlockNum|^size$|^places$|^tokens$|^ranks$|^work\.ranks$|^work\.top_k$|local_experts_$|^kParities|^kPhases"
)
# All who look for such a line look elsewhere alike; every rank is sent the same counts.
_ALIKE = ("block * kLine", "exchange.slot(to, exchange.rank()): to + 1")
# Whose window, slot or flag: the next rank's, or the other phase's.
_ARGUMENT = r"((?:[^(),]|\([^()]*\))+)"
_PLACES = {
    rf"exchange_?(?:\.|->)slot\({_ARGUMENT}, {_ARGUMENT}\)": ("exchange_.ranks()", "exchange_.ranks()"),
    rf"map_\.flag\(epoch_, {_ARGUMENT}, {_ARGUMENT}\)": ("WindowMap::kPhases", "map_.ranks"),
    r"window\((to|rank_)\)": ("map_.ranks",),
}


def patterns() -> Iterator[str]:
    """All that is left out or elsewhere."""
    yield from (*_LEFT_OUT, *_PLACES)


def mutate(text: str, file: str, first: int) -> tuple[str, list[Mutant]]:
    """The source with all its faults, the first of which has the number `first`."""
    mutants: list[Mutant] = []

    def add(line: int, fault: str) -> int:
        mutants.append(Mutant(first + len(mutants), file, line, fault, function))
        return mutants[-1].number

    lines = text.split("\n")
    scope = function = ""
    for i, line in enumerate(lines):
        if found := re.match(r"(?:class|struct) (\w+)", line):
            scope = found[1]
        if found := re.search(r"__aicore__ (?:inline |static )*(?:constexpr )?[\w<>:&]+ (\w+)\(", line):
            function = f"{scope}::{found[1]}" if line.startswith(" ") else found[1]
        code = line
        if found := re.match(r"(\s*)((\w+)\.EnQue\((\w+)\);)$", line):
            following = lines[i + 1]
            assert following.strip().startswith(f"{found[4]} = {found[3]}.DeQue<"), f"{file}:{i + 2}"
            number = add(i + 1, f"{found[3]}: EnQue and DeQue")
            code = f"{found[1]}if (deep_ep_mutant != {number}) {{ {found[2]}"
            lines[i + 1] = following + " }"
        else:
            # What stands before a body is no code.
            head, brace, body = line.partition("{") if _DEFINITION.search(line) else ("", "", line)
            for replace in (_leave_out, _shift):
                body = replace(body, i + 1, add)
            code = head + brace + body
        lines[i] = code
    return "extern volatile int deep_ep_mutant; " + "\n".join(lines), mutants


def _leave_out(line: str, number: int, add: Callable[[int, str], int]) -> str:
    def instead(match: re.Match[str], value: str) -> str:
        call = match[0]
        # Both are void, or both have a value.
        whole = f"(void)({call})" if value == "(void)0" else call
        return f"(deep_ep_mutant != {add(number, call)} ? {whole} : {value})"

    for pattern, value in _LEFT_OUT.items():
        line = re.sub(rf"(?<![\w.:]){pattern}(?!\w)", lambda match, value=value: instead(match, value), line)
    return line


def _shift(line: str, number: int, add: Callable[[int, str], int]) -> str:
    if re.search(r"init\(|static_assert|InitBuffer|\bbytes = map_", line):
        return line

    def shifted(match: re.Match[str]) -> str:
        if _SIZE.search(match[1]) or match[0] in _ALIKE:
            return match[0]
        return f"({match[1]} + (deep_ep_mutant == {add(number, match[0])})) * {match[2]}"

    for pattern, sizes in _PLACES.items():

        def elsewhere(match: re.Match[str], sizes: tuple[str, ...] = sizes) -> str:
            call = match[0]
            for index, size in enumerate(sizes, start=1):
                begin, end = (at + len(call) - len(match[0]) - match.start() for at in match.span(index))
                fault = f"{match[0]}: {match[index]} + 1"
                if fault in _ALIKE:
                    continue
                mutant = add(number, fault)
                call = f"{call[:begin]}({match[index]} + (deep_ep_mutant == {mutant})) % {size}{call[end:]}"
            return call

        line = re.sub(rf"(?<!GM_ADDR ){pattern}", elsewhere, line)
    return _PRODUCT.sub(shifted, line)


def sources() -> Iterator[tuple[Path, str]]:
    """The files that faults are put into, and where in the copy they lie."""
    for path in sorted((OPS / "common" / "op_kernel").glob("*.h")):
        yield path, f"common/op_kernel/{path.name}"
    for name in KERNELS:
        path = next(OPS.glob(f"*/op_kernel/{name}.cpp"))
        yield path, str(path.relative_to(OPS))
    yield native.root() / "src" / "device" / "window_map.h", "common/op_kernel/window_map.h"


def make(folder: Path) -> list[Mutant]:
    """Writes the copies, where they differ from what is there, and returns all mutants."""
    mutants: list[Mutant] = []
    written = {
        "common/op_kernel/mutant.cpp": (
            "volatile int deep_ep_mutant = -1;\n"
            'extern "C" __attribute__((visibility("default"))) void deep_ep_twin_mutant(int number) '
            "{ deep_ep_mutant = number; }\n"
        )
    }
    for path, place in sources():
        file = str(path.relative_to(native.root()))
        text, added = mutate(path.read_text(), file, len(mutants))
        if path.name == "window_map.h":
            text = re.sub(
                r"constexpr (int64_t (?:least_bytes|flag|lines_begin|line|mark|slots_begin|room|slot|row|ask|bytes)\()",
                r"\1",
                text,
            )
        written[place] = re.sub(r"exchange_\.(ranks|has_failed)\(", _own_exchange(path), text)
        mutants += added
    for place, text in written.items():
        target = folder / place
        if not target.exists() or target.read_text() != text:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text)
    for old in set(folder.rglob("*.*")) - {folder / place for place in written}:
        old.unlink()
    return mutants


def _own_exchange(path: Path) -> str:
    """How the exchange is called there."""
    return {"counts.h": r"exchange.\1(", "messages.h": r"exchange_->\1("}.get(path.name, r"exchange_.\1(")


if __name__ == "__main__":
    for mutant in make(native.root() / "build" / "twin" / "mutants" / "sources"):
        print(mutant.number, mutant)
