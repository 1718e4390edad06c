"""What a row of a Buffer is: the contracts under rows="expert" and rows="rank", each a class in a file of its own.

A strategy over the ops does what both have in common, and leaves the rest to the contract of its Buffer.

T local tokens · H hidden · K top-k · E experts · R ranks · L = E/R local experts · N received rows.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..env import Rounds
from ..groups import GroupInfo
from ..ops.dispatch import AsInt8, DispatchHandle
from .two_steps import Plan


class Routing(NamedTuple):
    """Where the tokens of a dispatch go, as `Buffer.dispatch` is told without a handle."""

    num_tokens_per_rank: Tensor | None
    is_token_in_rank: Tensor | None
    num_tokens_per_expert: Tensor | None
    topk_idx: Tensor | None
    topk_weights: Tensor | None
    expert_alignment: int
    num_worst_tokens: int


class RowContract(Protocol):
    """The parts of Buffer's calls in which the contracts differ."""

    name: str
    """As the keyword `rows` and DEEP_EP_ROWS have it."""
    is_of_ascend: bool
    """Whether DeepEP-Ascend's strategies have forms of their own for such rows: those of torch_npu's operators, too."""
    goes_on: bool
    """Whether a call that is asked to goes on when it returns. Otherwise clients need not wait for results."""
    needs: tuple[str, ...]
    """Fields of Routing that a dispatch cannot do without."""
    rounds: Rounds
    """Of num_tokens_per_expert."""

    def ops_of_dispatch(self, given: dict[str, Any]) -> Sequence[str]:
        """What a `Buffer.dispatch` with these arguments enters, whether they are right or not."""

    def ops_of_combine(self, given: dict[str, Any]) -> Sequence[str]:
        """The same of a `Buffer.combine`."""

    def layout(self, topk_idx: Tensor, per_expert: Tensor, in_rank: Tensor) -> tuple[Tensor, Tensor]:
        """num_tokens_per_expert and is_token_in_rank as clients get them, of those of the op get_dispatch_layout."""

    def dispatch(self, info: GroupInfo, x: Tensor | AsInt8, routing: Routing) -> Plan:
        """Its results are those of `Buffer.dispatch` without the event. ValueError: the routing is wrong."""

    def cached_dispatch(self, info: GroupInfo, x: Tensor | AsInt8, handle: tuple[Tensor, ...]) -> Plan:
        """The same with a handle. ValueError: it is none of this contract."""

    def op_handle(self, handle: tuple[Tensor, ...]) -> DispatchHandle:
        """The handle as the ops take it. ValueError: it is none of this contract."""

    def tokens(self, handle: tuple[Tensor, ...]) -> torch.Size:
        """The dimensions that the tokens came in. ValueError: it is none of this contract."""

    def form_of_combine(self, topk_weights: Tensor | None) -> str:
        """What ranks must have in common in a combine, in words."""

    def combine(self, info: GroupInfo, x: Tensor, handle: tuple[Tensor, ...], topk_weights: Tensor | None) -> Plan:
        """Its results are combined_x and combined_topk_weights. ValueError: the handle or the weights are wrong."""

    def scales(self, scales: Tensor) -> Tensor:
        """Those of quantised rows as clients get them."""

    def fp8_mode(self, use_ue8m0: bool) -> str:
        """The quant_mode that use_fp8 means in low latency."""

    def is_quantised_by_kernel(self, info: GroupInfo, x: Tensor, quant_mode: str) -> bool:
        """Whether the op low_latency_dispatch_int8 gives such rows."""

    def low_latency_dispatch(
        self,
        info: GroupInfo,
        x: Tensor,
        topk_idx: Tensor,
        sent: tuple[Tensor, Tensor] | None,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
    ) -> Plan:
        """Its results are recv_x, recv_count and handle. `sent`: the (data, scales) that rows of x hold."""

    def low_latency_shape(self, handle: Any, num_ranks: int) -> tuple[int, ...]:
        """Of the rows that low_latency_combine takes with the handle."""

    def low_latency_combine(
        self, info: GroupInfo, x: Tensor, topk_idx: Tensor, topk_weights: Tensor, handle: Any
    ) -> Plan:
        """Its result is combined_x. ValueError: x has not the shape of the rows that came with the handle."""


def hidden_of(x: Tensor, sent: tuple[Tensor, Tensor] | None) -> int:
    """H, of rows that may hold (data, scales)."""
    if sent is None:
        return x.shape[-1]
    data = sent[0]
    return data.shape[1] * (2 if data.dtype == torch.float4_e2m1fn_x2 else 1)


def same_rows(rows: Any, num_rows: int) -> Any:
    """`rows`, a tensor or data and scales, whose number is known to be num_rows from here on."""
    for part in (rows,) if isinstance(rows, Tensor) else rows:
        torch._check(part.shape[0] == num_rows)
    return rows


def capacity_of(num_rows: int) -> int:
    """The num_worst_tokens with which the routing that once gave num_rows rows gives as many again.

    An unbacked number of rows comes from an exact dispatch in the same graph; every other is known, and repeats
    whatever it dropped.
    """
    if not torch.compiler.is_compiling():
        return num_rows
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    return num_rows if guard_or_false(num_rows > 0) else 0
