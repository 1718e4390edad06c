"""Loads the C++ part (libdeep_ep.so), which defines the ops, and gives access to its functions without tensors."""

import atexit
import ctypes
import functools
import hashlib
import os
import sys
from pathlib import Path

import torch

from ._version import __version__


def _package_path() -> list[str]:
    return list(sys.modules[__package__].__path__)


def find(name: str) -> Path | None:
    """The file or folder of this name that was built into the package."""
    # An editable install has this file in the source tree and what was built in site-packages.
    for folder in map(Path, _package_path()):
        if (folder / name).exists():
            return folder / name
    return None


def _load() -> tuple[ctypes.CDLL, ctypes.PyDLL]:
    path = find("libdeep_ep.so")
    if path is None:
        raise ImportError(
            f"libdeep_ep.so is in none of {', '.join(_package_path())}: "
            "deep_ep was not built; install it with pip install, or run make"
        )
    torch.ops.load_library(str(path))
    library = ctypes.CDLL(str(path))
    pointer, i32, i64, u64, text = (
        ctypes.c_void_p,
        ctypes.c_int,
        ctypes.c_int64,
        ctypes.c_uint64,
        ctypes.c_char_p,
    )
    signatures = {
        "deep_ep_group_create": (pointer, [i32, i32, u64, i64, text]),
        "deep_ep_group_fd": (i32, [pointer]),
        "deep_ep_group_usable": (i32, [pointer]),
        "deep_ep_group_join": (i32, [pointer, i64]),
        "deep_ep_group_bytes": (u64, [pointer]),
        "deep_ep_group_connect": (i32, [pointer, pointer, pointer, pointer, text]),
        "deep_ep_group_publish": (None, [pointer, text]),
        "deep_ep_sources": (text, []),
        "deep_ep_host_memory": (i32, [text, pointer, text, text]),
        "deep_ep_make_windows_by": (None, [ctypes.py_object]),
        "deep_ep_sweep": (None, []),
        "deep_ep_exit": (None, []),
        "deep_ep_group_spoil": (None, [pointer]),
        "deep_ep_group_log": (u64, [pointer, pointer, u64]),
        "deep_ep_group_phases": (u64, [pointer, ctypes.c_uint32, pointer]),
        "deep_ep_group_trace": (None, [pointer, u64]),
        "deep_ep_group_traced": (u64, [pointer, pointer]),
        "deep_ep_group_agree": (i32, [text, ctypes.c_uint32, pointer, text, text]),
        "deep_ep_call_begin": (u64, [i64]),
        "deep_ep_call_entered": (u64, []),
        "deep_ep_call_form": (None, [text]),
        "deep_ep_call_end": (None, []),
        "deep_ep_call_gradient": (None, [i64]),
        "deep_ep_group_destroy": (None, [pointer, text]),
        "deep_ep_fused_tile": (i64, []),
        "deep_ep_fused_places": (None, [i64, pointer]),
        "deep_ep_fused_bits_of": (i64, [ctypes.c_float]),
        "deep_ep_fused_scale_of": (ctypes.c_float, [i64]),
        "deep_ep_npu_least_bytes": (i64, [i64]),
        "deep_ep_npu_load": (i32, [text, text]),
        "deep_ep_npu_kernels": (text, []),
        "deep_ep_npu_open_windows": (i32, [text, text, i32, i32, u64, i64, pointer, text]),
        "deep_ep_npu_check": (i32, [pointer, text]),
        "deep_ep_npu_close_windows": (None, [text]),
        "deep_ep_npu_publish_windows": (None, [text, i64, pointer, pointer]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library, ctypes.PyDLL(str(path))


def _announce_operators() -> None:
    """CANN reads where operator packages are when it initialises."""
    package = find("opp/vendors/deep_ep")
    known = os.environ.get("ASCEND_CUSTOM_OPP_PATH", "")
    if package is not None and str(package) not in known.split(os.pathsep):
        os.environ["ASCEND_CUSTOM_OPP_PATH"] = os.pathsep.join(filter(None, [str(package), known]))


_announce_operators()
library, _with_python = _load()
atexit.register(library.deep_ep_exit)
ERROR_BYTES = 512


def raise_interrupt() -> None:
    """If the last call on this thread failed because of a signal, raises what the signal's handler raised."""
    _with_python.deep_ep_raise_interrupt()


@functools.cache
def python_digest() -> str:
    """Of the Python part of this package."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def build() -> str:
    """Version and digest of all sources of this package: ranks of one group have the same."""
    sources = library.deep_ep_sources().decode() + python_digest()
    return f"{__version__} ({hashlib.sha256(sources.encode()).hexdigest()[:8]})"
