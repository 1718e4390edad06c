"""What fused_deep_moe can do besides, and the formats of its weights.

L local experts · H hidden · I intermediate size.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class FusedOptions(NamedTuple):
    """The last arguments of the op, in its order. With the defaults it is as if there were none."""

    gmm1_bias: Tensor | None = None
    gmm2_bias: Tensor | None = None
    shared_gmm1_weight: Tensor | None = None
    shared_gmm1_weight_scale: Tensor | None = None
    shared_gmm2_weight: Tensor | None = None
    shared_gmm2_weight_scale: Tensor | None = None
    x_active_mask: Tensor | None = None
    swiglu_limit: float = 0.0
    swiglu_alpha: float = 1.0
    swiglu_beta: float = 0.0

    @property
    def has_shared_expert(self) -> bool:
        return self.shared_gmm1_weight is not None

    @property
    def differentiable(self) -> tuple[Tensor | None, ...]:
        """Those that may have gradients."""
        return self.gmm1_bias, self.gmm2_bias, self.shared_gmm1_weight, self.shared_gmm2_weight

    def given(self) -> list[str]:
        """The names of those that are not as by default."""
        defaults = FusedOptions._field_defaults
        return [
            name
            for name, value in zip(self._fields, self, strict=True)
            if (value is not None if defaults[name] is None else value != defaults[name])
        ]


class Format(NamedTuple):
    """A format of weights, in which rows are multiplied with them."""

    quant_mode: str
    """That of `quantization.quantize` for rows."""
    dtype: torch.dtype | None
    """None: that of x."""
    packed: int = 1
    """Columns in an element."""

    @property
    def is_mx(self) -> bool:
        return self.quant_mode.startswith("mx_")


FORMATS = (
    Format("none", None),
    Format("int8", torch.int8),
    Format("mx_fp8_e4m3", torch.float8_e4m3fn),
    Format("mx_fp8_e5m2", torch.float8_e5m2),
    Format("mx_fp4_e2m1", torch.float4_e2m1fn_x2, 2),
)
"""By the op's quant_mode."""

_QUANT_MODES = {form.dtype: quant_mode for quant_mode, form in enumerate(FORMATS) if form.dtype is not None}


def quant_mode_of(weight: Tensor) -> int:
    """The op's quant_mode for weights like this one; 0 for those that are not quantised."""
    return _QUANT_MODES.get(weight.dtype, 0)


def in_tiles(overload: str, form: Format) -> bool:
    """Whether weights lie as DeepEP-Ascend's kernels for A3 want them: gmm1's columns in tiles of gate and up, gmm2
    [L, H, I], and counts of rows by source rank. Otherwise gmm1 is [L, H, 2I], gmm2 [L, I, H], and counts are [L]."""
    return overload == "default" and not form.is_mx
