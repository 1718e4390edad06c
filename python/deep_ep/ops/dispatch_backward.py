"""dispatch_backward: gradients of x and topk_weights from those of the received rows. The transpose of dispatch.

T local tokens · H hidden · K top-k · E experts · R ranks · N received rows.
"""

from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..kernels import alltoall
from ..npu import ge, graph_alltoall
from ._registration import Start, no_second_derivative, register, reject
from .wait import Completion, completes


def fake(
    grad_recv_x: Tensor,
    grad_recv_topk_weights: Tensor,
    recv_src_idx: Tensor,
    topk_idx: Tensor,
    send_head: Tensor,
    num_experts: int,
    num_ranks: int,
    group: str,
) -> tuple[Tensor, Tensor]:
    error = checks.dispatch_backward(
        grad_recv_x, grad_recv_topk_weights, recv_src_idx, topk_idx, send_head, num_experts, num_ranks
    )
    reject("dispatch_backward", error)
    T, K = topk_idx.shape
    return grad_recv_x.new_empty((T, grad_recv_x.shape[1])), grad_recv_topk_weights.new_empty((T, K))


def convert(
    grad_recv_x: Any,
    grad_recv_topk_weights: Any,
    recv_src_idx: Any,
    topk_idx: Any,
    send_head: Any,
    num_experts: int,
    num_ranks: int,
    group: str,
) -> Any:
    """DeepEpDispatchBackward."""
    inputs = {
        "grad_recv_x": grad_recv_x,
        "grad_recv_topk_weights": grad_recv_topk_weights,
        "recv_src_idx": recv_src_idx,
        "topk_idx": topk_idx,
        "send_head": send_head,
    }
    return ge.node("dispatch_backward", inputs, {"num_experts": num_experts, "num_ranks": num_ranks}, group)


register(
    "dispatch_backward",
    fake=fake,
    alltoall=alltoall.dispatch_backward,
    backward=no_second_derivative("dispatch_backward"),
    convert={"default": convert},
    decompose=graph_alltoall.dispatch_backward,
    start=Start(checks.dispatch_backward, no_second_derivative("dispatch_backward")),
)


def results(_: str, like_x: Tensor, topk_idx: Tensor, *sizes: Any) -> tuple[Tensor, Tensor]:
    """like_x: [any, H]."""
    grad_x = like_x.new_empty((topk_idx.shape[0], like_x.shape[1]))
    return grad_x, topk_idx.new_empty(topk_idx.shape, dtype=torch.float32)


completes("dispatch_backward", Completion(fake=results))
