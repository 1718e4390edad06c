"""The operator definitions of ops/, asked without CANN: what they are registered with, and what they infer."""

import ctypes
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tools.twin import interface, native

ROOT = native.root()
DTYPES = {str(dtype).removeprefix("torch."): number for dtype, number in interface.DTYPES.items()}
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
        for name in (
            *("tokens", "max_tokens", "hidden", "top_k", "experts", "ranks", "nodes"),
            *("rows", "element_bytes", "sent_bytes", "copied", "arithmetic", "answers", "zero_unused"),
        )
    ]


class Tiling(ctypes.Structure):
    """deep_ep::Tiling of src/device/tiling.h."""

    _fields_ = [
        ("work", Work),
        ("blocks", ctypes.c_int64),
        ("tokens", Split),
        *[
            (name, ctypes.c_int64)
            for name in (
                *("row_bytes", "row_stride", "answer", "tile_bytes", "last_tile_bytes", "tiles", "buffers"),
                *("table_ranks", "table_words", "table_bytes", "table_batch", "chunk_tokens", "record_bytes"),
                *("count_stride", "flags", "failures", "shared", "workspace_bytes"),
            )
        ],
    ]


class Launch(NamedTuple):
    block_dim: int
    schedule_mode: int
    workspaces: list[int]
    tiling: Tiling


@functools.cache
def build() -> Path:
    """The library, up to date."""
    return native.build_with_torch_npu(ROOT / "ops", ROOT / "build" / "op_definitions", "deep_ep_op_definitions")


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
            raise RuntimeError(f"Tiling has {ctypes.sizeof(Tiling)} bytes here, and {len(data)} in src/device/tiling.h")
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
