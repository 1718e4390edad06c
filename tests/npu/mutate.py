"""`make mutate-kernels`: puts one fault at a time into the AscendC kernels and sees whether the twin, or a result, or a
status shows it.

python tests/npu/mutate.py [--first N] [--step N] [--only N ...] [--verbose]
"""

import argparse
import sys
import time
import uuid
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import mutants
from mutants import Mutant
from probes import probes, run_probe
from ranks import RankError, RankPool

from tools.twin import kernels as twin_kernels
from tools.twin import native

FOLDER = native.root() / "build" / "twin" / "mutants"
SIZE = 4
TIMEOUT = 20.0
"""Seconds of a probe, after which it hangs."""


def build() -> tuple[Path, list[Mutant]]:
    """The library of all mutants, and what they are."""
    made = mutants.make(FOLDER / "sources")
    return twin_kernels.build(FOLDER / "sources", "mutants"), made


def caught(pool: RankPool, library: Path, number: int | None) -> str | None:
    """What shows that this mutant is one, or None. Without a number: what is wrong without a fault."""
    for probe in probes():
        try:
            arguments = library, -1 if number is None else number, uuid.uuid4().hex, probe
            said = pool.run(SIZE, run_probe, *arguments, timeout=TIMEOUT, is_wrong=bool)
        except RankError as error:
            return f"{probe[0].__name__}: {error.exceptions}"
        if wrong := [text for text in said if text and "another rank" not in text] or [text for text in said if text]:
            return wrong[0]
    return None


def main(arguments: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--step", type=int, default=1, help="every n-th mutant")
    parser.add_argument("--only", type=int, nargs="*")
    parser.add_argument("--verbose", action="store_true")
    options = parser.parse_args(arguments)
    library, made = build()
    chosen = [made[i] for i in options.only] if options.only else made[options.first :: options.step]
    pool = RankPool(SIZE, init=False)
    begin = time.monotonic()
    if wrong := caught(pool, library, None):
        print(f"without a fault: {wrong}")
        return 1
    print(f"no fault: nothing caught in {time.monotonic() - begin:.1f} s", flush=True)
    survivors = []
    for mutant in chosen:
        begin = time.monotonic()
        how = caught(pool, library, mutant.number)
        if how is None:
            survivors.append(mutant)
        if how is None or options.verbose:
            print(f"{mutant.number}: {mutant}: {how or 'SURVIVES'} ({time.monotonic() - begin:.1f} s)", flush=True)
    pool.close()
    score = len(chosen) - len(survivors)
    print(f"{score} of {len(chosen)} caught: {100 * score / len(chosen):.1f} %")
    return 0 if 100 * score >= 95 * len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
