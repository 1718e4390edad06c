"""`make test`: both tiers run, the cheaper one first, and the last lines say what both did. Nothing is left out."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

TESTS = "import os\ndef test_right(): pass\ndef test_wrong(): {does}\n"
WRONG = {"passes": "pass", "fails": "assert not True", "dies": "os._exit(3)"}
FAILED = "  failed: test_fails::test_wrong", "    assert not True"
DIED = "  failed: test_dies::test_wrong", "    failed on setup with \"worker 'gw0' crashed while running"
TIER = """#!/bin/sh
echo "runs $2"
cd "$(dirname "$0")"
test -e $2.report && cp $2.report ${2#test-}.xml && ! grep -q "<failure" $2.report
"""
"""In place of make: a tier that has a report."""


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("reports")
    for name, does in WRONG.items():
        (folder / f"test_{name}.py").write_text(TESTS.format(does=does))
        options = ["-q", "-p", "no:cacheprovider", "--numprocesses", "1", "--dist", "worksteal"]
        options += ["--junit-xml", f"{name}.xml", f"test_{name}.py"]
        subprocess.run([sys.executable, "-m", "pytest", *options], cwd=folder, capture_output=True)
    return {name: folder / f"{name}.xml" for name in WRONG}


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(
    "cpu, npu, says",
    [
        ("passes", "passes", ["test-cpu: 2 passed in", "test-npu: 2 passed in"]),
        (
            "fails",
            "passes",
            ["test-cpu: 1 passed, 1 failed in", *FAILED, "test-npu: 2 passed"],
        ),
        (
            "passes",
            "fails",
            ["test-cpu: 2 passed in", "test-npu: 1 passed, 1 failed", *FAILED],
        ),
        ("dies", "passes", ["test-cpu: 1 passed, 1 failed in", *DIED, "test-npu: 2 passed"]),
        ("", "passes", ["test-cpu: did not come to its end", "test-npu: 2 passed in"]),
    ],
)
def test_both_tiers_are_told(reports: dict[str, Path], tmp_path: Path, cpu: str, npu: str, says: list[str]) -> None:
    make = tmp_path / "make"
    make.write_text(TIER)
    make.chmod(0o755)
    for name, report in (("cpu", cpu), ("npu", npu)):
        (tmp_path / f"{name}.xml").write_text("of the last time")
        if report:
            shutil.copy(reports[report], tmp_path / f"test-{name}.report")
    given = f"MAKE={make}", f"REPORTS={tmp_path}", f"PYTHON={sys.executable}"
    settings = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    run = subprocess.run(["make", *given, "test"], cwd=ROOT, env=settings, capture_output=True, text=True)
    lines = run.stdout.splitlines()
    assert [line for line in lines if line.startswith("runs ")] == ["runs test-cpu", "runs test-npu"]
    assert (run.returncode == 0) == (cpu == npu == "passes"), run.stdout + run.stderr
    assert all(line.startswith(begin) for line, begin in zip(lines[-len(says) :], says, strict=True)), lines


WITHOUT_TORCH_NPU = """
import sys
import pytest
from tools.twin import native
native.torch_npu_dir = lambda: None
sys.exit(pytest.main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("option, outcome", [("--complete", "1 error"), ("-q", "1 skipped")])
def test_without_torch_npu(option: str, outcome: str) -> None:
    """What make runs fails; who has started pytest may have made no .venv-npu, and reads how to."""
    test = "tests/package/test_build.py::test_request_of_windows_is_laid_out_as_hccl_reads_it"
    command = [sys.executable, "-c", WITHOUT_TORCH_NPU, "-p", "no:cacheprovider", option, test]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert outcome in run.stdout, run.stdout + run.stderr
    assert "make test installs one in .venv-npu" in run.stdout
    assert "--complete" in (ROOT / "Makefile").read_text()
