"""torch_npu, where it is installed and cannot work.

`import torch` loads torch_npu, and fails if that fails: because CANN is not there, or torch_npu is of another version
than torch. deep_ep works on CPU without it, so it is looked at before, and left out with a warning that says what is
wrong.
"""

import contextlib
import ctypes
import importlib.metadata
import os
import sys
import warnings
from collections.abc import Iterator

_AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"
_CANN = (
    "ascendcl",
    "hccl",
    "ge_runner",
    "graph",
    "acl_op_compiler",
    "acl_tdt_channel",
    "fmk_parser",
    "ascend_protobuf",
)
"""The libraries of CANN that torch_npu is linked with."""


def what_is_wrong() -> str | None:
    """Why torch_npu cannot be loaded, or None: also where it is not installed."""
    try:
        npu, torch = importlib.metadata.version("torch_npu"), importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return None
    if npu.split(".")[:2] != torch.split(".")[:2]:
        return f"torch_npu {npu} does not belong to torch {torch}; install torch-npu=={torch.split('+')[0]}"
    missing = []
    for name in _CANN:
        try:
            ctypes.CDLL(f"lib{name}.so")
        except OSError as error:
            missing.append(str(error))
    if missing:
        return f"CANN is not, or not wholly, where the loader looks ({'; '.join(missing)}); source its set_env.sh"
    return None


@contextlib.contextmanager
def left_out_if_broken() -> Iterator[None]:
    """Meanwhile `import torch` does not load a torch_npu that cannot work. Nothing to do if torch is loaded already."""
    told = os.environ.get(_AUTOLOAD)
    wrong = None if "torch" in sys.modules or told == "0" else what_is_wrong()
    if wrong is None:
        yield
        return
    warnings.warn(f"deep_ep: torch_npu is left out, and NPUs with it: {wrong}", RuntimeWarning, stacklevel=4)
    os.environ[_AUTOLOAD] = "0"
    try:
        yield
    finally:
        if told is None:
            del os.environ[_AUTOLOAD]
        else:
            os.environ[_AUTOLOAD] = told
