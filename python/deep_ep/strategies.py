"""Strategies: which overload of an op is called.

They are resolved in Python that Dynamo traces, from a choice that is fixed when a Buffer is made (or `deep_ep.init`
called), so a graph is guarded by the strategy it was traced with.
"""

import os
from enum import Enum


class NormalStrategy(Enum):
    """Normal mode (training, prefill): the overload of get_dispatch_layout, dispatch and combine."""

    DEFAULT = "default"
    """The library's own kernels, over shared memory on CPU."""
    ALLTOALL = "alltoall"
    """Collectives of torch.distributed, on any device and any number of hosts."""


class LowLatencyStrategy(Enum):
    """Low-latency mode (decode): the overload of low_latency_dispatch and low_latency_combine."""

    DEFAULT = "default"
    ALLTOALL = "alltoall"
    OPS = "ops"
    """torch_npu's own MoE operators."""


MODES = {
    "default": (NormalStrategy.DEFAULT, LowLatencyStrategy.DEFAULT),
    "alltoall": (NormalStrategy.ALLTOALL, LowLatencyStrategy.ALLTOALL),
    "ops": (NormalStrategy.DEFAULT, LowLatencyStrategy.OPS),
}
"""What each value of DEEP_USE_MODE means."""


def mode_from(strategy: str | None) -> str:
    """`strategy`, or what DEEP_USE_MODE says now. Raises ValueError unless it is one of MODES."""
    mode = os.environ.get("DEEP_USE_MODE", "default") if strategy is None else strategy
    if mode not in MODES:
        source = "the environment variable DEEP_USE_MODE" if strategy is None else "strategy"
        raise ValueError(f"{source} must be one of {', '.join(MODES)}; got {mode!r}")
    return mode
