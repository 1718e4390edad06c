"""Builds the stand-in for CANN, and reads what it has seen.

`python tests/cann/stand_in.py`, with a Python that has torch-npu, prints the folder to put on LD_LIBRARY_PATH before
torch is imported; nothing where CANN is installed, whose libraries are then the ones to use.

CANN_STAND_IN_SOC names the SoC (Ascend910_9391), CANN_STAND_IN_DEVICES says how many there are (4).
"""

import ctypes
import importlib.util
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

SOURCE = Path(__file__).resolve().parent
ROOT = SOURCE.parents[1]
BUILD = ROOT / "build" / "cann"


class Line(NamedTuple):
    """A line of the log. stand_in.h has the kinds; `stream` is the `npu_stream` of a torch.npu.Stream."""

    kind: str
    stream: int
    text: str


@cache
def _library() -> ctypes.CDLL | None:
    """What the loader finds as libascendcl, if it is the stand-in."""
    try:
        library = ctypes.CDLL("libascendcl.so")
        library.cann_stand_in_log.restype = ctypes.c_char_p
    except (OSError, AttributeError):
        return None
    return library


def in_use() -> bool:
    return _library() is not None


def has_cann() -> bool:
    if "ASCEND_HOME_PATH" in os.environ:
        return True
    try:
        ctypes.CDLL("libascendcl.so")
    except OSError:
        return False
    return not in_use()


def build() -> Path:
    """Builds what has changed, in seconds, and returns the folder of the libraries."""
    torch_npu = importlib.util.find_spec("torch_npu")
    if torch_npu is None or not torch_npu.submodule_search_locations:
        raise RuntimeError(f"{sys.executable} has no torch_npu to build the stand-in for (pip install torch-npu)")
    path = os.pathsep.join([str(Path(sys.executable).parent), str(ROOT / ".venv" / "bin"), os.environ.get("PATH", "")])
    environment = {**os.environ, "PATH": path}
    cmake = shutil.which("cmake", path=path) or "cmake"
    options = [f"-DTORCH_NPU_DIR={torch_npu.submodule_search_locations[0]}", f"-DPython_EXECUTABLE={sys.executable}"]
    for command in ([cmake, "-S", SOURCE, "-B", BUILD, "-G", "Ninja", *options], [cmake, "--build", BUILD]):
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        if result.returncode != 0:
            raise RuntimeError(f"the stand-in for CANN cannot be built:\n{result.stdout}{result.stderr}")
    return BUILD / "lib"


def log(kind: str | None = None) -> list[Line]:
    """What happened since the last clear_log(), oldest first, all of it or one kind.

    torch_npu launches from a thread of its own: synchronise first to have all of it.
    """
    text = _library().cann_stand_in_log().decode()
    lines = [Line(k, int(stream), rest) for k, stream, rest in (line.split(" ", 2) for line in text.splitlines())]
    return [line for line in lines if kind in (None, line.kind)]


def clear_log() -> None:
    _library().cann_stand_in_clear_log()


if __name__ == "__main__" and not has_cann():
    print(build())
