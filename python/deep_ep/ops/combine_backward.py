"""combine_backward: gradients of the experts' rows and of topk_weights from that of combine's result.

T local tokens · H hidden · K top-k · E experts · R ranks · N received rows.
"""

from typing import Any

from torch import Tensor

from .. import checks
from ..kernels import alltoall
from ..npu import ge, graph_alltoall
from ._registration import Start, no_second_derivative, register, reject
from .wait import Completion, completes


def fake(
    grad_out: Tensor,
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    recv_src_idx: Tensor,
    send_head: Tensor,
    num_experts: int,
    num_ranks: int,
    group: str,
) -> tuple[Tensor, Tensor]:
    error = checks.combine_backward(
        grad_out, x, topk_idx, topk_weights, recv_src_idx, send_head, num_experts, num_ranks
    )
    reject("combine_backward", error)
    return x.new_empty(x.shape), topk_weights.new_empty(topk_weights.shape)


def convert(
    grad_out: Any,
    x: Any,
    topk_idx: Any,
    topk_weights: Any,
    recv_src_idx: Any,
    send_head: Any,
    num_experts: int,
    num_ranks: int,
    group: str,
) -> Any:
    """DeepEpCombineBackward."""
    inputs = {
        "grad_out": grad_out,
        "x": x,
        "topk_idx": topk_idx,
        "topk_weights": topk_weights,
        "recv_src_idx": recv_src_idx,
        "send_head": send_head,
    }
    return ge.node("combine_backward", inputs, {"num_experts": num_experts, "num_ranks": num_ranks}, group)


register(
    "combine_backward",
    fake=fake,
    alltoall=alltoall.combine_backward,
    backward=no_second_derivative("combine_backward"),
    convert={"default": convert},
    decompose=graph_alltoall.combine_backward,
    start=Start(checks.combine_backward, no_second_derivative("combine_backward")),
)

completes(
    "combine_backward",
    Completion(
        fake=lambda _, x, topk_weights, *sizes: (x.new_empty(x.shape), topk_weights.new_empty(topk_weights.shape))
    ),
)
