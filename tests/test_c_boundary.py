"""No exception leaves a function that Python or another library calls through C: it would end the process."""

import ctypes
import re
import subprocess
from pathlib import Path

import pytest

from deep_ep._library import ERROR_BYTES, library

ROOT = Path(__file__).parent.parent
SOURCES = [path for folder in ("src", "ops", "torch_library") for path in sorted((ROOT / folder).rglob("*.cpp"))]
BOUNDARIES = [path for path in SOURCES if "visibility" in path.read_text() or "DEEP_EP_API" in path.read_text()]

KERNELS = """
extern "C" const void* deep_ep_kernels() { throw 1; }
"""


@pytest.mark.parametrize("path", BOUNDARIES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_function_is_noexcept(path: Path) -> None:
    """Which makes a compiler of it: what a noexcept function lets out ends the process at that line."""
    text = path.read_text()
    assert "visibility" not in text, "functions are exported as DEEP_EP_API"
    heads = re.findall(r"^DEEP_EP_API ([^{;]*)", text, re.MULTILINE)
    assert heads
    for head in heads:
        assert head.rstrip().endswith("noexcept"), head


def error_of(function: str, *arguments: object) -> str:
    error = ctypes.create_string_buffer(ERROR_BYTES)
    assert getattr(library, function)(*arguments, error) != 0
    return error.value.decode()


def test_memory_of_a_host_with_odd_files(tmp_path: Path) -> None:
    """A path of a cgroup that is none: the standard library throws."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/mountinfo").write_text("1 1 0:1 / /cgroup rw - cgroup2 none rw\n")
    (tmp_path / "proc/self/cgroup").write_text("0::odd\n")
    numbers, name = (ctypes.c_uint64 * 4)(), ctypes.create_string_buffer(ERROR_BYTES)
    assert "erase" in error_of("deep_ep_host_memory", str(tmp_path).encode(), numbers, name)


def test_without_kernels() -> None:
    """Nothing is called that is not there."""
    assert library.deep_ep_npu_kernels() is None
    table = (ctypes.c_int64 * 9)()
    none = "no kernels for the NPU"
    assert none in error_of("deep_ep_npu_open_windows", b"g", b"c", 0, 1, 1 << 20, 1000, table)
    assert none in error_of("deep_ep_npu_check", table)
    library.deep_ep_npu_close_windows(b"g")


def test_kernels_that_throw(tmp_path: Path) -> None:
    """What is no std::exception, too."""
    source, built = tmp_path / "kernels.cpp", tmp_path / "kernels.so"
    source.write_text(KERNELS)
    subprocess.run(["g++", "-shared", "-fPIC", source, "-o", built], check=True)
    assert error_of("deep_ep_npu_load", str(built).encode()) == "an exception of an unknown kind"
    assert library.deep_ep_npu_kernels() is None
