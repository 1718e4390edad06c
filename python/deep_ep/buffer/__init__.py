"""deep_ep.Buffer: the calls of DeepEP's and DeepEP-Ascend's Buffer over the ops of this library."""

from ..config import Config
from ..utils import EventHandle, EventOverlap
from ..weights import FuseMode
from .buffer import Buffer
from .expert_rows import AlignedHandle, InternodeHandle
from .rank_rows import RankHandle

__all__ = [
    "AlignedHandle",
    "Buffer",
    "Config",
    "EventHandle",
    "EventOverlap",
    "FuseMode",
    "InternodeHandle",
    "RankHandle",
]
