"""The blocks of Python in docs/npu.md, in one process with one NPU. Graphs are made when they are first called: see
test_ge_graphs.py."""

import os
import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "npu.md"


def test_python(tmp_path: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    program = tmp_path / "program.py"
    program.write_text("\n".join(blocks) + "\nprint(deep_ep.npu.load_kernels(), deep_ep.npu.check(dist.group.WORLD))\n")
    launched = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    run = subprocess.run([sys.executable, program], env=os.environ | launched, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == "host kernels for tests None"
