"""Strategies: by which calls a Buffer communicates. DeepEP-Ascend's classes; a program may have its own.

Those of this library call one overload of the ops each, from a choice that is fixed when they are made, so a graph is
guarded by the strategy it was traced with.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from enum import Enum
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .utils import EventOverlap

Rows = Tensor | tuple[Tensor, Tensor]
"""Rows [N, H], or quantised rows as (data, scales)."""


class NormalStrategy(str, Enum):
    """Normal mode (training, prefill): the overload of get_dispatch_layout, dispatch and combine."""

    DEFAULT = "default"
    """The library's own kernels, over shared memory on CPU."""
    ALLTOALL = "alltoall"
    """Collectives of torch.distributed, on any device and any number of hosts."""

    @classmethod
    def get_all_strategies(cls) -> list[str]:
        """Their names."""
        return [one.value for one in cls]


class LowLatencyStrategy(str, Enum):
    """Low-latency mode (decode): the overload of low_latency_dispatch and low_latency_combine."""

    DEFAULT = "default"
    ALLTOALL = "alltoall"
    OPS = "ops"
    """torch_npu's own MoE operators."""

    @classmethod
    def get_all_strategies(cls) -> list[str]:
        """Their names."""
        return [one.value for one in cls]


MODES = {
    "default": (NormalStrategy.DEFAULT, LowLatencyStrategy.DEFAULT),
    "alltoall": (NormalStrategy.ALLTOALL, LowLatencyStrategy.ALLTOALL),
    "ops": (NormalStrategy.DEFAULT, LowLatencyStrategy.OPS),
}
"""What each value of DEEP_USE_MODE means."""


def one_of(argument: str, given: Any, allowed: Iterable[str | Enum]) -> str:
    """What is given for `argument`, a name or a member of an enumeration, as a name. ValueError: it is not allowed."""
    name, *names = (one.value if isinstance(one, Enum) else one for one in (given, *allowed))
    if name not in names:
        raise ValueError(f"{argument} must be one of {', '.join(names)}; got {name!r}")
    return name


class EPCommStrategy(ABC):
    """What a strategy of either mode is.

    Args:
        group: the expert-parallel group.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.group_size = group.size()
        self.rank = group.rank()

    @property
    def group_name(self) -> str:
        """HCCL's name of the group's communicator where the group is for NPUs, else the group's own."""
        if "npu" not in {device.type for device in self.group._device_types}:
            return self.group.group_name
        backend: Any = self.group._get_backend(torch.device("npu"))
        return backend.get_hccl_comm_name(self.rank)

    @abstractmethod
    def get_name(self) -> str:
        """The name by which it is chosen."""

    @abstractmethod
    def get_supported_modes(self) -> list[str]:
        """["normal"], ["low_latency"] or both."""


class NormalEPCommStrategy(EPCommStrategy):
    """A strategy of normal mode. Arguments and results are those of Buffer's methods."""

    @abstractmethod
    def get_dispatch_layout(
        self,
        topk_idx: Tensor,
        num_experts: int,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor, EventOverlap]:
        """As `Buffer.get_dispatch_layout`."""

    @abstractmethod
    def dispatch(
        self,
        x: Rows,
        handle: Any,
        num_tokens_per_rank: Tensor | None,
        num_tokens_per_rdma_rank: Tensor | None,
        is_token_in_rank: Tensor | None,
        num_tokens_per_expert: Tensor | None,
        topk_idx: Tensor | None,
        topk_weights: Tensor | None,
        expert_alignment: int,
        num_worst_tokens: int,
        config: Any,
        previous_event: EventOverlap | None,
        async_finish: bool,
        allocate_on_comm_stream: bool,
        dispatch_wait_recv_cost_stats: Tensor | None,
        quant_mode: str | None = None,
    ) -> tuple[Any, ...]:
        """As `Buffer.dispatch`."""

    @abstractmethod
    def combine(
        self,
        x: Tensor,
        handle: Any,
        topk_weights: Tensor | None,
        bias: Any,
        config: Any,
        previous_event: EventOverlap | None,
        async_finish: bool,
        allocate_on_comm_stream: bool,
        combine_send_cost_stats: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, EventOverlap]:
        """As `Buffer.combine`."""


class LowLatencyEPCommStrategy(EPCommStrategy):
    """A strategy of low-latency mode. Arguments and results are those of Buffer's methods."""

    @abstractmethod
    def low_latency_dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        cumulative_local_expert_recv_stats: Tensor | None,
        use_fp8: bool,
        round_scale: bool,
        use_ue8m0: bool,
        use_mxfp4: bool,
        async_finish: bool,
        return_recv_hook: bool,
        topk_weights: Tensor | None,
        quant_mode: str | None,
    ) -> tuple[Any, ...]:
        """As `Buffer.low_latency_dispatch`; quant_mode is what the Buffer makes of the flags, None for rows as they
        are."""

    @abstractmethod
    def low_latency_combine(
        self,
        x: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor,
        handle: Any,
        zero_copy: bool,
        async_finish: bool,
        return_recv_hook: bool,
        out: Tensor | None,
    ) -> tuple[Tensor, EventOverlap, Callable[[], None]]:
        """As `Buffer.low_latency_combine`."""


Normal = TypeVar("Normal", bound=type[Any])
LowLatency = TypeVar("LowLatency", bound=type[Any])

_normal: dict[str, type[Any]] = {}
_low_latency: dict[str, type[Any]] = {}


def register_normal_strategy(name: str) -> Callable[[Normal], Normal]:
    """Decorates the class that `Buffer(normal_strategy=name)` makes with (runtime=, group=), this library's own names
    included."""

    def decorate(cls: Normal) -> Normal:
        _normal[name] = cls
        return cls

    return decorate


def register_low_latency_strategy(name: str) -> Callable[[LowLatency], LowLatency]:
    """The same for `Buffer(low_latency_strategy=name)`."""

    def decorate(cls: LowLatency) -> LowLatency:
        _low_latency[name] = cls
        return cls

    return decorate


def get_normal_strategy(name: str) -> type[Any]:
    """The class of that name. ValueError: there is none."""
    return _normal[one_of("normal_strategy", name, _normal)]


def get_low_latency_strategy(name: str) -> type[Any]:
    """The class of that name. ValueError: there is none."""
    return _low_latency[one_of("low_latency_strategy", name, _low_latency)]
