"""moe_distribute_combine: what the strategy ops asks of MoeDistributeCombineV2, torch_npu's operator.

Symbols are those of moe_distribute_dispatch.
"""

from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..groups import GroupInfo
from ..kernels import torch_npu_ops
from ._registration import register, reject
from .moe_distribute_dispatch import Shared, setup_context


def call(
    info: GroupInfo,
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    assist_info: Tensor,
    layout_range: Tensor,
    expand_scales: Tensor | None,
    x_active_mask: Tensor | None,
    num_max_dispatch_tokens_per_rank: int,
    num_experts: int,
    shared: Shared,
) -> Tensor:
    """The op: x [N, H] bf16 or fp16, with topk_idx [T, K] and topk_weights fp32 [T, K] of the tokens, and the rest as
    moe_distribute_dispatch took and gave it. Returns [T, H].
    """
    sizes = num_max_dispatch_tokens_per_rank, num_experts, info.size, *shared
    tensors = x, topk_idx, topk_weights, assist_info, layout_range, expand_scales, x_active_mask
    return torch.ops.deep_ep.moe_distribute_combine(*tensors, *sizes, info.name, info.comm_alg)


def fake(*arguments: Any, overload: str) -> Tensor:
    x, topk_idx = arguments[:2]
    reject("moe_distribute_combine", _error(*arguments))
    return x.new_empty((topk_idx.shape[0], x.shape[1]))


def _error(*arguments: Any) -> str | None:
    x, topk_idx, topk_weights, _, _, _, _, M, E, R, S, is_shared, _, comm_alg = arguments
    if wrong := torch_npu_ops.check_comm_alg(comm_alg) or torch_npu_ops.check_x(x):
        return wrong
    if topk_weights.dtype != torch.float32 or any(map(checks.differ, topk_weights.shape, topk_idx.shape)):
        return (
            f"topk_weights must be torch.float32 {list(topk_idx.shape)}, "
            f"got {topk_weights.dtype} {list(topk_weights.shape)}"
        )
    N, _ = Shared(S, is_shared).shape(M, topk_idx.shape[1], E, R)
    if x.dim() != 2 or checks.differ(x.shape[0], N):
        return f"x must have the shape [N, H] of the dispatch's rows with N = {N}, got {list(x.shape)}"
    return None


def kernel(*arguments: Any, overload: str) -> Tensor:
    operator = torch_npu_ops.combine_operator(arguments[0])
    reject("moe_distribute_combine", _error(*arguments))
    return torch_npu_ops.combine(operator, *arguments)


def backward(ctx: Any, *grads: Tensor, overload: str) -> Any:
    raise RuntimeError("deep_ep.moe_distribute_combine has no gradient; use the strategy default or alltoall")


register(
    "moe_distribute_combine",
    fake=fake,
    kernel=kernel,
    setup_context=setup_context,
    backward=backward,
    convert={"default": torch_npu_ops.convert_full_combine},
)
