"""fused_deep_moe_options_backward: fused_deep_moe_backward where fused_deep_moe was given FusedOptions, whose gradients
it gives as well.
"""

from typing import Any

from torch import Tensor

from ..fused_options import FusedOptions
from ..kernels import fused_deep_moe as fused_kernel
from . import fused_deep_moe_backward
from ._registration import no_second_derivative, register
from .fused_deep_moe import OVERLOADS, refuse_in_graphs


def fake(*arguments: Any, overload: str) -> list[Tensor]:
    return list(fused_deep_moe_backward.fake(*arguments, overload=overload))


def kernel(*arguments: Any, overload: str) -> list[Tensor]:
    return list(fused_kernel.backward(*arguments, overload=overload))


def convert(*arguments: Any) -> Any:
    """Says that there is no such node."""
    refuse_in_graphs("fused_deep_moe_backward", 0, FusedOptions(*arguments[-len(FusedOptions._fields) :]))


register(
    "fused_deep_moe_options_backward",
    fake=fake,
    kernel=kernel,
    backward=no_second_derivative("fused_deep_moe_backward"),
    convert=dict.fromkeys(OVERLOADS.values(), convert),
)
