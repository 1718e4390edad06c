"""The C interface of ops/kernels.h, for ctypes."""

import ctypes
from typing import Any

import torch

P = ctypes.c_void_p
TEXT = ctypes.c_char_p
_i32 = ctypes.c_int32

DTYPES = {
    torch.float32: 0,
    torch.float16: 1,
    torch.int8: 2,
    torch.int32: 3,
    torch.int64: 9,
    torch.bfloat16: 27,
}
"""aclDataType, which is ge::DataType."""


class DeepEpTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int32),
        ("num_dims", ctypes.c_int32),
        ("sizes", ctypes.c_int64 * 2),
    )


class DeepEpCall(ctypes.Structure):
    _fields_ = (
        ("op", ctypes.c_char_p),
        ("group", ctypes.c_char_p),
        ("num_inputs", ctypes.c_int32),
        ("num_outputs", ctypes.c_int32),
        ("num_integers", ctypes.c_int32),
        ("inputs", ctypes.POINTER(DeepEpTensor)),
        ("outputs", ctypes.POINTER(DeepEpTensor)),
        ("integers", ctypes.POINTER(ctypes.c_int64)),
    )


def _function(*arguments: Any) -> Any:
    return ctypes.CFUNCTYPE(ctypes.c_int, *arguments)


class DeepEpKernels(ctypes.Structure):
    _fields_ = (
        ("version", ctypes.c_uint32),
        ("name", TEXT),
        ("open_windows", _function(TEXT, TEXT, _i32, _i32, ctypes.c_uint64, ctypes.c_int64, P, P)),
        ("close_windows", ctypes.CFUNCTYPE(None, TEXT)),
        ("read_status", _function(P, P, P)),
        ("prepare", _function(ctypes.POINTER(DeepEpCall), ctypes.POINTER(P), ctypes.POINTER(ctypes.c_uint64), P)),
        ("launch", _function(P, P, P, P)),
        ("discard", ctypes.CFUNCTYPE(None, P)),
    )


def kernels_in(library: ctypes.CDLL) -> DeepEpKernels:
    library.deep_ep_kernels.restype = ctypes.POINTER(DeepEpKernels)
    return library.deep_ep_kernels().contents
