"""Runs examples/train_moe.py with graphs for NPUs, without CANN: with the options of the command line."""

import runpy
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
EXAMPLE = TESTS.parent / "examples" / "train_moe.py"

if __name__ == "__main__":
    sys.path.append(str(TESTS))
    import ge_graphs  # noqa: F401  (lets torchair work)

    sys.argv[:1] = [str(EXAMPLE), "--compile", "npu"]
    runpy.run_path(str(EXAMPLE), run_name="__main__")
