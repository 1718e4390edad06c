"""Libraries that are built from the C++ sources of a checkout, for tests and for the twin."""

import fcntl
import functools
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path


def root() -> Path:
    """The checkout."""
    return Path(__file__).resolve().parents[2]


@functools.cache
def torch_npu_dir() -> Path | None:
    """The folder torch_npu of a wheel, which is not imported: TORCH_NPU_DIR, this Python's, or that of .venv-npu."""
    if "TORCH_NPU_DIR" in os.environ:
        return Path(os.environ["TORCH_NPU_DIR"])
    spec = importlib.util.find_spec("torch_npu")
    if spec is not None and spec.submodule_search_locations:
        return Path(spec.submodule_search_locations[0])
    python = root() / ".venv-npu" / "bin" / "python"
    ask = "import importlib.util as u; s = u.find_spec('torch_npu'); print(*s.submodule_search_locations if s else ())"
    found = subprocess.check_output([python, "-c", ask], text=True).strip() if python.exists() else ""
    return Path(found) if found else None


def tool(name: str) -> str:
    """A program of this environment, of .venv, or of the system."""
    folders = (Path(sys.executable).parent, root() / ".venv" / "bin")
    found = next((str(path / name) for path in folders if (path / name).exists()), None) or shutil.which(name)
    if found is None:
        raise RuntimeError(f"no {name} to build with")
    return found


# Libraries of tests take longer to compile than they run. What is to be faster says so itself.
FLAGS = {"CMAKE_BUILD_TYPE": "Release", "CMAKE_CXX_FLAGS_RELEASE": "-O1 -DNDEBUG"}


def build(source: Path, folder: Path, target: str, **definitions: object) -> Path:
    """The shared library `target` of a CMake project, built in `folder` when it is missing or older than what it is
    made of: ninja knows. Processes that want it at the same time wait for one of them.
    """
    ninja = tool("ninja")
    options = [f"-D{name}={value}" for name, value in {"CMAKE_MAKE_PROGRAM": ninja, **FLAGS, **definitions}.items()]
    configure = [tool("cmake"), "-S", str(source), "-B", str(folder), "-G", "Ninja", *options]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (configure, [ninja, "-C", str(folder), target]):
            run = subprocess.run(command, capture_output=True, text=True)
            if run.returncode:
                raise RuntimeError(f"{' '.join(command)} failed:\n{run.stdout}{run.stderr}")
    return folder / f"lib{target}.so"


def build_with_torch_npu(source: Path, folder: Path, target: str, **definitions: object) -> Path:
    """The same for what is compiled with the headers of a torch-npu wheel: the installed one, that of .venv-npu, or
    TORCH_NPU_DIR.
    """
    torch_npu = torch_npu_dir()
    if torch_npu is None:
        raise RuntimeError("no torch-npu wheel, whose headers ops/ is compiled with; TORCH_NPU_DIR may name one")
    return build(source, folder, target, TORCH_NPU_DIR=torch_npu, **definitions)
