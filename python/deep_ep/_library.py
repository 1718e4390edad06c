"""Loads the C++ part (libdeep_ep.so), which defines the ops, and gives access to its functions without tensors."""

import ctypes
from pathlib import Path

import torch


def _find(name: str) -> Path:
    # An editable install has this file in the source tree and the library in site-packages.
    import deep_ep

    folders = [Path(folder) for folder in deep_ep.__path__]
    for folder in folders:
        if (folder / name).exists():
            return folder / name
    raise ImportError(
        f"{name} is in none of {', '.join(map(str, folders))}: "
        "deep_ep was not built; install it with pip install, or run make"
    )


def _load() -> ctypes.CDLL:
    path = _find("libdeep_ep.so")
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
        "deep_ep_group_bytes": (u64, [pointer]),
        "deep_ep_group_connect": (i32, [pointer, pointer, pointer, pointer, text]),
        "deep_ep_group_publish": (None, [pointer, text]),
        "deep_ep_group_log": (u64, [pointer, pointer, u64]),
        "deep_ep_group_destroy": (None, [pointer, text]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


library = _load()
ERROR_BYTES = 512
