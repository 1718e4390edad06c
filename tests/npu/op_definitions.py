"""The operator definitions of ops/, asked without CANN: what they are registered with, and what they infer.

`build` makes the library, which needs the headers of a torch-npu wheel: the installed one, that of .venv-npu, or
TORCH_NPU_DIR.
"""

import ctypes
import fcntl
import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "op_definitions"

DTYPES = {"float32": 0, "float16": 1, "int32": 3, "int64": 9, "bfloat16": 27}
"""ge::DataType by the names of torch."""
NAMES = {number: name for name, number in DTYPES.items()}


class Refused(Exception):
    """A function of the definition returned another status than GRAPH_SUCCESS; it printed why."""


class Input(NamedTuple):
    dtype: str
    shape: Sequence[int]
    """With -1 for what is not known; [-2] if not even the rank is."""
    value: int | None = None
    """Of a scalar, where it is known."""


class Output(NamedTuple):
    dtype: str
    shape: list[int]


class Soc(NamedTuple):
    vector_cores: int
    unified_buffer_bytes: int


class Split(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("size", "longer")]

    def begin(self, block: int) -> int:
        return block * self.size + min(block, self.longer)

    def part(self, block: int) -> range:
        return range(self.begin(block), self.begin(block + 1))


class Work(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int64)
        for name in ("tokens", "hidden", "top_k", "experts", "ranks", "rows", "element_bytes", "arithmetic")
    ]


class Tiling(ctypes.Structure):
    """deep_ep::Tiling of src/tiling.h."""

    _fields_ = [
        ("work", Work),
        ("blocks", ctypes.c_int64),
        ("tokens", Split),
        ("rows", Split),
        *[
            (name, ctypes.c_int64)
            for name in (
                *("row_bytes", "row_stride", "tile_bytes", "last_tile_bytes", "tiles", "buffers"),
                *("table_bytes", "id_tokens", "id_bytes"),
                *("count_stride", "block_counts", "rank_counts", "sync", "workspace_bytes"),
            )
        ],
    ]


class Launch(NamedTuple):
    block_dim: int
    schedule_mode: int
    workspaces: list[int]
    tiling: Tiling


def torch_npu_dir() -> Path | None:
    """The folder torch_npu of a wheel, found without importing it."""
    spec = importlib.util.find_spec("torch_npu")
    installed = [Path(path) for path in (spec.submodule_search_locations if spec else None) or []]
    given = [Path(os.environ["TORCH_NPU_DIR"])] if "TORCH_NPU_DIR" in os.environ else []
    other = sorted((ROOT / ".venv-npu" / "lib").glob("python3*/site-packages/torch_npu"))
    return next((path for path in (*given, *installed, *other) if (path / "include").is_dir()), None)


def tool(name: str) -> str:
    """A program of this environment, of .venv, or of the system."""
    folders = (Path(sys.executable).parent, ROOT / ".venv" / "bin")
    found = next((str(path / name) for path in folders if (path / name).exists()), None) or shutil.which(name)
    if found is None:
        raise RuntimeError(f"no {name} to build the operator definitions with")
    return found


@functools.cache
def build() -> Path:
    """The library, built when it is missing or older than what it is made of: ninja knows."""
    torch_npu = torch_npu_dir()
    if torch_npu is None:
        raise RuntimeError("no torch-npu wheel, whose headers ops/ is compiled with; TORCH_NPU_DIR may name one")
    ninja = tool("ninja")
    options = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}", f"-DTORCH_NPU_DIR={torch_npu}"]
    configure = [tool("cmake"), "-S", str(ROOT / "ops"), "-B", str(BUILD), *options]
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:  # the processes of a test all want the library
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (configure, [ninja, "-C", str(BUILD)]):
            run = subprocess.run(command, capture_output=True, text=True)
            if run.returncode:
                raise RuntimeError(f"{' '.join(command)} failed:\n{run.stdout}{run.stderr}")
    return BUILD / "libdeep_ep_op_definitions.so"


@functools.cache
def library() -> ctypes.CDLL:
    lib = ctypes.CDLL(str(build()))
    lib.deep_ep_op_definitions.restype = ctypes.c_char_p
    lib.deep_ep_op_call.restype = ctypes.c_void_p
    for name in ("infer", "infer_range", "tile"):
        getattr(lib, f"deep_ep_op_{name}").restype = ctypes.c_char_p
    return lib


@functools.cache
def definitions() -> dict[str, Any]:
    """By operator type: inputs, outputs, attrs and socs, as op_definitions.cpp writes them."""
    return json.loads(library().deep_ep_op_definitions())


def registered_ir_def(op_type: str) -> tuple[str, list, list, list]:
    """What torchair's `_torchair.get_registered_ir_def` answers once the operators are installed."""
    definition = definitions().get(op_type)
    if definition is None:
        return "ERROR", [], [], []
    inputs, outputs = ([(p["name"], p["type"]) for p in definition[kind]] for kind in ("inputs", "outputs"))
    return "SUCCESS", inputs, outputs, [(attr["name"], attr["kind"]) for attr in definition["attrs"]]


class Call:
    """One call of an operator. `inputs` in the definition's order; `attrs` by name, and all of them."""

    def __init__(self, op_type: str, inputs: Sequence[Input], attrs: Mapping[str, int | str]) -> None:
        definition = definitions()[op_type]
        if len(inputs) != len(definition["inputs"]):
            raise ValueError(f"{op_type} has {len(definition['inputs'])} inputs, got {len(inputs)}")
        if unlike := attrs.keys() ^ {attr["name"] for attr in definition["attrs"]}:
            raise ValueError(f"{op_type}: attributes that are missing or that it does not have: {sorted(unlike)}")
        self._library = library()
        self._call = ctypes.c_void_p(self._library.deep_ep_op_call(op_type.encode()))
        for dtype, shape, value in inputs:
            known = None if value is None else ctypes.byref(ctypes.c_int64(value))
            self._library.deep_ep_op_input(self._call, DTYPES[dtype], _dims(shape), len(shape), known)
        for index, attr in enumerate(definition["attrs"]):
            given = attrs[attr["name"]]
            number, text = (0, given.encode()) if isinstance(given, str) else (given, None)
            self._library.deep_ep_op_attr(self._call, index, ctypes.c_int64(number), text)

    def __del__(self) -> None:
        if hasattr(self, "_call"):
            self._library.deep_ep_op_free(self._call)

    def infer(self) -> list[Output]:
        return _outputs(self._ask("infer")["outputs"])

    def infer_range(self) -> tuple[list[Output], list[Output]]:
        """The outputs at their smallest and at their largest, of operators whose shapes depend on the computation."""
        answer = self._ask("infer_range")
        return _outputs(answer["min"]), _outputs(answer["max"])

    def tile(self, soc: Soc, outputs: Sequence[Sequence[int]]) -> Launch:
        """The launch on `soc`, with outputs of these shapes."""
        for index, shape in enumerate(outputs):
            self._library.deep_ep_op_output(self._call, index, _dims(shape), len(shape))
        answer = self._ask("tile", ctypes.c_uint32(soc.vector_cores), ctypes.c_uint64(soc.unified_buffer_bytes))
        data = bytes(answer["tiling"])
        if len(data) != ctypes.sizeof(Tiling):
            raise RuntimeError(f"Tiling has {ctypes.sizeof(Tiling)} bytes here, and {len(data)} in src/tiling.h")
        return Launch(answer["block_dim"], answer["schedule_mode"], answer["workspaces"], Tiling.from_buffer_copy(data))

    def _ask(self, what: str, *args: Any) -> dict[str, Any]:
        answer = json.loads(getattr(self._library, f"deep_ep_op_{what}")(self._call, *args))
        if answer["status"]:
            raise Refused(f"status {answer['status']:#x}")
        return answer


def infer(op_type: str, inputs: Sequence[Input], attrs: Mapping[str, int | str]) -> list[Output]:
    """Dtypes and shapes of the outputs."""
    return Call(op_type, inputs, attrs).infer()


def _dims(shape: Sequence[int]) -> ctypes.Array:
    return (ctypes.c_int64 * len(shape))(*shape)


def _outputs(tensors: list[dict[str, Any]]) -> list[Output]:
    return [Output(NAMES[tensor["dtype"]], tensor["shape"]) for tensor in tensors]
