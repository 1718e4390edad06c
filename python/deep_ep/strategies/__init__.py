"""The strategies of this library, by DeepEP-Ascend's names."""

from ..ep_strategy import (
    EPCommStrategy,
    LowLatencyEPCommStrategy,
    NormalEPCommStrategy,
    get_low_latency_strategy,
    get_normal_strategy,
    register_low_latency_strategy,
    register_normal_strategy,
)
from .low_latency_strategy import (
    AllToAllLowLatencyCommStrategy,
    DefaultLowLatencyCommStrategy,
    OpsLowLatencyCommStrategy,
)
from .normal_strategy import AlltoAllNormalCommStrategy, DefaultNormalCommStrategy

__all__ = [
    "AllToAllLowLatencyCommStrategy",
    "AlltoAllNormalCommStrategy",
    "DefaultLowLatencyCommStrategy",
    "DefaultNormalCommStrategy",
    "EPCommStrategy",
    "LowLatencyEPCommStrategy",
    "NormalEPCommStrategy",
    "OpsLowLatencyCommStrategy",
    "get_low_latency_strategy",
    "get_normal_strategy",
    "register_low_latency_strategy",
    "register_normal_strategy",
]
