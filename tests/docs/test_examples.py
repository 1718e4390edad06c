"""The small examples, run as their texts say."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"

pytestmark = pytest.mark.slow


def printed_by(example: str) -> str:
    """What it prints on two ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run([*command, EXAMPLES / example], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_moe_layer() -> None:
    lines = re.findall(
        r"rank (\d): (\d+) tokens, rows of its experts \[([^\]]*)\], norm of their gradient ([\d.]+)",
        out := printed_by("moe_layer.py"),
    )
    assert sorted((int(rank), int(tokens)) for rank, tokens, *_ in lines) == [(0, 100), (1, 101)], out
    assert sum(int(count) for *_, counts, _ in lines for count in counts.split(",")) == 2 * (100 + 101)
    assert all(float(norm) > 0 for *_, norm in lines)


def test_decode() -> None:
    found = re.search(r"2 ranks, compiled: (\d+) tokens/s; differs from eager by (.*)", out := printed_by("decode.py"))
    assert found, out
    assert int(found[1]) > 0
    assert float(found[2]) < 0.05
