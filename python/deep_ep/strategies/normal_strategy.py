"""Strategies of normal mode: one for each overload of the ops."""

from ..buffer.normal import NormalOfOps
from ..ep_strategy import NormalStrategy, register_normal_strategy


@register_normal_strategy("default")
class DefaultNormalCommStrategy(NormalOfOps):
    """The library's own kernels, over shared memory on CPU."""

    overload = NormalStrategy.DEFAULT


@register_normal_strategy("alltoall")
class AlltoAllNormalCommStrategy(NormalOfOps):
    """Collectives of torch.distributed. The results are those of `default`, bit for bit."""

    overload = NormalStrategy.ALLTOALL
