"""Expert-parallel communication for Mixture-of-Experts layers, as torch.library ops that compile and differentiate.

`init` prepares a group; `dispatch` sends tokens to the ranks of their experts, `combine` brings the results back.
`Buffer` offers the same with the calls of DeepEP and DeepEP-Ascend.
"""

from ._torch_npu import left_out_if_broken

with left_out_if_broken():
    import torch

from . import debug, ep_strategy, groups, npu, strategies
from ._version import __version__  # noqa: F401
from .buffer import AlignedHandle, Buffer, InternodeHandle, RankHandle
from .config import Config
from .ep_strategy import LowLatencyStrategy, NormalStrategy
from .groups import destroy, init
from .ops import (  # noqa: F401  (registers them)
    combine_backward,
    dispatch_backward,
    fused_deep_moe_backward,
    fused_deep_moe_options_backward,
)
from .ops.combine import combine, combine_start
from .ops.dispatch import DispatchHandle, DispatchOutput, dispatch, dispatch_start
from .ops.fused_deep_moe import fused_deep_moe
from .ops.get_dispatch_layout import get_dispatch_layout
from .ops.low_latency_combine import low_latency_combine
from .ops.low_latency_dispatch import LowLatencyHandle, LowLatencyOutput, low_latency_dispatch
from .ops.low_latency_dispatch_padded import PaddedHandle
from .ops.wait import Started, wait
from .strategies.low_latency_strategy import CapacityHandle, OpsHandle
from .utils import EventHandle, EventOverlap
from .weights import FusedWeights, FuseMode, fused_bias, fused_weights, quantize_weight

# Where they were.
for _name in ("op_log", "phases"):
    setattr(groups, _name, getattr(debug, _name))

topk_idx_t = torch.int64
"""The dtype of expert ids."""

# What torch.load(weights_only=True) may make: they hold tensors, numbers and names.
torch.serialization.add_safe_globals(
    [
        AlignedHandle,
        CapacityHandle,
        Config,
        DispatchHandle,
        DispatchOutput,
        EventHandle,
        EventOverlap,
        FuseMode,
        FusedWeights,
        InternodeHandle,
        LowLatencyHandle,
        LowLatencyOutput,
        LowLatencyStrategy,
        NormalStrategy,
        OpsHandle,
        PaddedHandle,
        RankHandle,
    ]
)

__all__ = [
    "Buffer",
    "Config",
    "DispatchHandle",
    "DispatchOutput",
    "EventHandle",
    "EventOverlap",
    "FuseMode",
    "FusedWeights",
    "LowLatencyHandle",
    "LowLatencyOutput",
    "LowLatencyStrategy",
    "NormalStrategy",
    "Started",
    "combine",
    "combine_start",
    "debug",
    "destroy",
    "dispatch",
    "dispatch_start",
    "ep_strategy",
    "fused_bias",
    "fused_deep_moe",
    "fused_weights",
    "get_dispatch_layout",
    "init",
    "low_latency_combine",
    "low_latency_dispatch",
    "npu",
    "quantize_weight",
    "strategies",
    "topk_idx_t",
    "wait",
]
