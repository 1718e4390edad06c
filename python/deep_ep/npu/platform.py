"""Which NPU this process has."""

from typing import Any, cast

import torch

_PLATFORMS = {"ascend910b": "A2", "ascend910_93": "A3", "ascend950": "A5"}
"""By the beginning of the SoC's name."""


def soc_name() -> str | None:
    """What CANN calls the SoC, such as Ascend910_9391; None without torch_npu or an NPU."""
    npu = cast(Any, getattr(torch, "npu", None))
    return npu.get_device_name() if npu is not None and npu.is_available() else None


def platform() -> str | None:
    """A2, A3 or A5; None without an NPU, and for others."""
    name = (soc_name() or "").lower()
    return next((platform for prefix, platform in _PLATFORMS.items() if name.startswith(prefix)), None)
