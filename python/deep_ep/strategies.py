"""Strategies: which overload of an op is called.

They are resolved in Python that Dynamo traces, from a choice that is fixed when a Buffer is made (or `deep_ep.init`
called), so a graph is guarded by the strategy it was traced with.
"""

from collections.abc import Iterable
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


def one_of(argument: str, given: str | Enum, allowed: Iterable[str | Enum]) -> str:
    """What is given for `argument`, a name or a member of an enumeration, as a name. ValueError: it is not allowed."""
    name, *names = (one.value if isinstance(one, Enum) else one for one in (given, *allowed))
    if name not in names:
        raise ValueError(f"{argument} must be one of {', '.join(names)}; got {name!r}")
    return name
