"""Runs examples/train_moe.py with graphs for NPUs, without CANN: with the options of the command line."""

import runpy
import sys
from pathlib import Path

import ge_graphs  # noqa: F401  (lets torchair work)

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "train_moe.py"

if __name__ == "__main__":
    sys.argv[:1] = [str(EXAMPLE), "--compile", "npu"]
    runpy.run_path(str(EXAMPLE), run_name="__main__")
