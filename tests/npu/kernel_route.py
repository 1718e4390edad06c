"""Takes deep_ep's ops on CPU tensors to NPU tensors and so to the AscendC kernels, which run on the twin.

The stand-in for CANN has no operators of torch's own, so a model's tensors stay on the CPU; what deep_ep does with them
is done behind NPU tensors, for the rest of the process.
"""

import functools
import os
from typing import Any

import torch
import torch_npu  # noqa: F401
from torch import Tensor
from torch.utils import _pytree as pytree

import deep_ep
from tools.twin import kernels
from tools.twin.kernels import Setup, Twin

OPS = ("get_dispatch_layout", "dispatch", "dispatch_int8", "combine", "dispatch_backward", "combine_backward")
BACKEND = "cpu:gloo,npu:hccl"
"""Of a process group whose ranks have an NPU each."""

_library: torch.library.Library | None = None


def open_route(rank: int) -> Twin:
    """From now on, for groups that deep_ep.init is called for later. Returns the twin that kernels run on."""
    global _library
    os.environ["DEEP_EP_KERNELS"] = str(kernels.build())
    torch.npu.set_device(rank)
    deep_ep.npu.load_kernels()
    twin = Twin(kernels.build())
    twin.configure(Setup(cores=2))
    if _library is None:
        _library = torch.library.Library("deep_ep", "IMPL")
        for name in OPS:
            op = getattr(torch.ops.deep_ep, name).default
            _library.impl(name, functools.partial(_on_npu, op), "CPU", allow_override=True)
    return twin


def close_route() -> None:
    """The CPU's own kernels again."""
    global _library
    if _library is not None:
        _library._destroy()
        _library = None


def _on_npu(op: Any, *arguments: Any) -> Any:
    moved = pytree.tree_map_only(Tensor, lambda tensor: tensor.npu(), arguments)
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.cpu(), op(*moved))
