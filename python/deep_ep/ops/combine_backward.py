"""combine_backward: gradients of the experts' rows and of topk_weights from that of combine's result.

T local tokens · H hidden · K top-k · E experts · R ranks · N received rows.
"""

from torch import Tensor

from .. import alltoall, checks
from ._registration import no_second_derivative, register, reject


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


register(
    "combine_backward",
    fake=fake,
    alltoall=alltoall.combine_backward,
    backward=no_second_derivative("combine_backward"),
)
