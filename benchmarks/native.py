"""benchmarks/native by ctypes: what the tuned competitors do with rows, MPI, calls of ops, and the speed of memory."""

from __future__ import annotations

import ctypes
import functools
import sys
import weakref
from pathlib import Path

import torch
from torch import Tensor

from tools.twin.native import build

SOURCE = Path(__file__).parent / "native"
FOLDER = SOURCE.parents[1] / "build" / "benchmarks"

# Fields of the struct Exchange in exchange.h, in its order.
_NUMBERS = ("tokens", "hidden", "top_k", "experts", "ranks", "rank", "dtype", "threads", "merge", "expand")
_POINTERS = ("send_counts", "recv_counts", "send_meta", "recv_meta", "send_rows", "recv_rows", "recv_x")
_POINTERS += ("token_at", "token_rows", "token_weights", "wire_at", "wire_rows", "wire_weights")


class Exchange(ctypes.Structure):
    """The struct of exchange.h."""

    _fields_ = [(name, ctypes.c_int64) for name in _NUMBERS] + [(name, ctypes.c_void_p) for name in _POINTERS]


def make() -> None:
    """Build the library, with MPI where that is installed, for this process and those that it starts."""
    build(SOURCE, FOLDER, "competitors", Python_EXECUTABLE=sys.executable)


@functools.cache
def library() -> ctypes.CDLL:
    """The library that `make` has built, with MPI's symbols visible to the plugins that MPI loads."""
    loaded = ctypes.CDLL(str(FOLDER / "libcompetitors.so"), mode=ctypes.RTLD_GLOBAL)
    pointer, number, exchange = ctypes.c_void_p, ctypes.c_int64, ctypes.POINTER(Exchange)
    for name, arguments in {
        "exchange_pack": [exchange, pointer, pointer, pointer],
        "exchange_unpack": [exchange],
        "exchange_pack_back": [exchange, pointer],
        "exchange_unpack_back": [exchange, pointer],
        "calls_make": [*[number] * 7, ctypes.c_char_p],
        "calls_drop": [pointer],
        "calls_dispatch": [pointer, pointer, pointer, pointer, number, ctypes.POINTER(number)],
        "calls_combine": [pointer, pointer, number, pointer, pointer, number],
        "memory_copy": [pointer, pointer, number, number],
        "memory_write_read": [pointer, number, number],
        "mpi_dispatch": [exchange, pointer, pointer, pointer, number],
        "mpi_combine": [exchange, pointer, pointer, number],
    }.items():
        if not name.startswith("mpi_") or hasattr(loaded, "mpi_start"):
            function = getattr(loaded, name)
            function.argtypes = arguments
            function.restype = pointer if name.startswith("calls_") else number
    return loaded


def has_mpi() -> bool:
    """Whether the library was built with MPI."""
    return hasattr(library(), "mpi_start")


class Buffers:
    """Memory of the struct Exchange for the largest numbers of rows of a point. Only pages in use take memory."""

    def __init__(self, tokens: int, hidden: int, top_k: int, experts: int, ranks: int, dtype: torch.dtype) -> None:
        T, K, R, L = tokens, top_k, ranks, experts // ranks
        N = R * T * min(K, L)
        self.send_counts = torch.zeros(R, 1 + L, dtype=torch.int64)
        self.recv_counts = torch.zeros(R, 1 + L, dtype=torch.int64)
        self.send_meta = torch.empty(T * K, 2 * K, dtype=torch.int32)
        self.recv_meta = torch.empty(R * T, 2 * K, dtype=torch.int32)
        self.send_rows = torch.empty(T * K, hidden, dtype=dtype)
        self.recv_rows = torch.empty(N, hidden, dtype=dtype)
        self.recv_x = torch.empty(N, hidden, dtype=dtype)
        self.out = torch.empty(T, hidden, dtype=dtype)
        self.token_at = torch.empty(T + 1, dtype=torch.int64)
        self.token_rows = torch.empty(T * K, dtype=torch.int32)
        self.token_weights = torch.empty(T * K, dtype=torch.float32)
        self.wire_at = torch.empty(N + 1, dtype=torch.int64)
        self.wire_rows = torch.empty(N, dtype=torch.int32)
        self.wire_weights = torch.empty(N, dtype=torch.float32)

    def exchange(self, **numbers: int) -> Exchange:
        """The struct with these pointers; they live as long as this object."""
        pointers: dict[str, Tensor] = {name: getattr(self, name) for name in _POINTERS}
        return Exchange(**numbers, **{name: tensor.data_ptr() for name, tensor in pointers.items()})


class Calls:
    """Ops of deep_ep, or gloo as frameworks use it, called by C++ in inference mode: calls.cpp.

    what: "normal" or "low_latency" ops, or "gloo".
    """

    def __init__(
        self,
        what: str,
        tokens: int,
        hidden: int,
        top_k: int,
        experts: int,
        ranks: int,
        dtype: torch.dtype,
        group: str,
    ) -> None:
        self.dtype, self.shape = dtype, (tokens, hidden)
        code = (torch.float32, torch.float16, torch.bfloat16).index(dtype)
        number = ("normal", "low_latency", "gloo").index(what)
        self.calls = library().calls_make(number, tokens, hidden, top_k, experts, ranks, code, group.encode())
        weakref.finalize(self, library().calls_drop, self.calls)

    def _at(self, address: int, num_rows: int) -> Tensor:
        count = num_rows * self.shape[1]
        memory = (ctypes.c_char * (count * self.dtype.itemsize)).from_address(address)
        return torch.frombuffer(memory, dtype=self.dtype, count=count).view(num_rows, self.shape[1])

    def dispatch(self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor, times: int) -> Tensor:
        """recv_x of the last of so many operations, in memory that the next call gives back."""
        num_rows = ctypes.c_int64()
        pointers = x.data_ptr(), topk_idx.data_ptr(), topk_weights.data_ptr()
        address = library().calls_dispatch(self.calls, *pointers, times, ctypes.byref(num_rows))
        return self._at(address, num_rows.value)

    def combine(self, y: Tensor, topk_idx: Tensor, topk_weights: Tensor, times: int) -> Tensor:
        """[T, H] of the last of so many operations, in memory that the next call gives back."""
        pointers = topk_idx.data_ptr(), topk_weights.data_ptr()
        return self._at(library().calls_combine(self.calls, y.data_ptr(), len(y), *pointers, times), self.shape[0])
