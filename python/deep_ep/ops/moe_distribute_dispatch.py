"""moe_distribute_dispatch: what the strategy ops asks of MoeDistributeDispatchV2, torch_npu's operator.

T local tokens · H hidden · K top-k · E experts · R ranks · S shared ranks, the first ones, which have a shared expert
and no other · L = E/(R - S) local experts, 1 on a shared rank · M num_max_dispatch_tokens_per_rank ·
N rows: R·M·min(K, L), and M·ceil(R/S) on a shared rank, to which every token of its part of the ranks goes.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..groups import GroupInfo
from ..kernels import torch_npu_ops
from ._registration import register, reject


class Output(NamedTuple):
    recv_x: Tensor
    """[N, H] in x's dtype, or int8 with smooth_scales: rows ordered by local expert, source rank, token."""
    recv_scales: Tensor
    """fp32 [N] with smooth_scales."""
    recv_count: Tensor
    """int64 [L]: rows of each local expert."""
    assist_info: Tensor
    """int32: torch_npu's record of where rows came from."""
    layout_range: Tensor
    """int32, the first L·R: running count over (local expert, source rank) of the received rows."""
    expand_scales: Tensor
    """fp32 [N]: the rows' weights, with topk_weights; else empty."""


class Shared(NamedTuple):
    """Ranks for shared experts."""

    num_ranks: int
    """S."""
    is_this: bool
    """Whether this rank is one."""

    def shape(self, M: int, K: int, E: int, R: int) -> tuple[int, int]:
        """N and L."""
        if self.is_this:
            return M * -(-R // self.num_ranks), 1
        L = E // (R - self.num_ranks)
        return R * M * min(K, L), L


def call(
    info: GroupInfo,
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor | None,
    smooth_scales: Tensor | None,
    x_active_mask: Tensor | None,
    num_max_dispatch_tokens_per_rank: int,
    num_experts: int,
    shared: "Shared",
) -> Output:
    """The op.

    Args:
        x: [T, H] bf16 or fp16.
        topk_idx: int64 [T, K].
        topk_weights: fp32 [T, K], which comm_alg hierarchy needs.
        smooth_scales: fp32 [E, H]: rows are multiplied by their expert's and quantised to int8 with one scale each.
        x_active_mask: bool [T] or [T, K]: what is sent. torch_npu wants the tokens that are before those that are not.
    """
    sizes = num_max_dispatch_tokens_per_rank, num_experts, info.size, *shared
    op = torch.ops.deep_ep.moe_distribute_dispatch
    return Output(*op(x, topk_idx, topk_weights, smooth_scales, x_active_mask, *sizes, info.name, info.comm_alg))


def fake(
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor | None,
    smooth_scales: Tensor | None,
    x_active_mask: Tensor | None,
    num_max_dispatch_tokens_per_rank: int,
    num_experts: int,
    num_ranks: int,
    num_shared_ranks: int,
    is_shared: bool,
    group: str,
    comm_alg: str,
    *,
    overload: str,
) -> tuple[Tensor, ...]:
    M, E, R, S = num_max_dispatch_tokens_per_rank, num_experts, num_ranks, num_shared_ranks
    tensors = x, topk_idx, topk_weights, smooth_scales, x_active_mask
    reject("moe_distribute_dispatch", error(*tensors, M, E, R, S, comm_alg))
    (T, H), K = x.shape, topk_idx.shape[1]
    N, L = Shared(S, is_shared).shape(M, K, E, R)
    return (
        x.new_empty((N, H), dtype=None if smooth_scales is None else torch.int8),
        x.new_empty((N,), dtype=torch.float32),
        x.new_empty((L,), dtype=torch.int64),
        x.new_empty((torch.sym_max(T * K, 128 * N),), dtype=torch.int32),
        x.new_empty((R * L + torch_npu_ops.counts_between_servers(topk_weights, M, K, R),), dtype=torch.int32),
        x.new_empty((0 if topk_weights is None else N,), dtype=torch.float32),
    )


def error(
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor | None,
    smooth_scales: Tensor | None,
    x_active_mask: Tensor | None,
    M: int,
    E: int,
    R: int,
    S: int,
    comm_alg: str,
) -> str | None:
    """What is wrong with the arguments, or None."""
    if not 0 <= S < R:
        return f"num_shared_ranks must be at least 0 and less than num_ranks = {R}, got {S}"
    if E % (R - S):
        return f"num_experts ({E}) must be divisible by the {R - S} ranks that have no shared expert"
    if wrong := (
        checks.low_latency_dispatch(x, topk_idx, M, E, R - S)
        or torch_npu_ops.check_comm_alg(comm_alg)
        or torch_npu_ops.check_x(x)
    ):
        return wrong
    if topk_weights is None and comm_alg == "hierarchy":
        return "topk_weights is missing: comm_alg hierarchy sends them with the rows"
    shapes = {"topk_weights": (topk_weights, topk_idx.shape), "smooth_scales": (smooth_scales, (E, x.shape[1]))}
    for name, (given, shape) in shapes.items():
        if given is not None and (
            given.dtype != torch.float32 or given.dim() != 2 or any(map(checks.differ, given.shape, shape))
        ):
            return f"{name} must be torch.float32 {list(shape)}, got {given.dtype} {list(given.shape)}"
    mask = x_active_mask
    if mask is not None and (
        mask.dtype != torch.bool or mask.dim() not in (1, 2) or any(map(checks.differ, mask.shape, topk_idx.shape))
    ):
        return (
            f"x_active_mask must be torch.bool [T] or [T, K] with [T, K] = {list(topk_idx.shape)}, "
            f"got {mask.dtype} {list(mask.shape)}"
        )
    return None


def kernel(
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor | None,
    smooth_scales: Tensor | None,
    x_active_mask: Tensor | None,
    num_max_dispatch_tokens_per_rank: int,
    num_experts: int,
    num_ranks: int,
    num_shared_ranks: int,
    is_shared: bool,
    group: str,
    comm_alg: str,
    *,
    overload: str,
) -> tuple[Tensor, ...]:
    tensors = x, topk_idx, topk_weights, smooth_scales, x_active_mask
    sizes = num_max_dispatch_tokens_per_rank, num_experts, num_ranks, num_shared_ranks
    operator = torch_npu_ops.dispatch_operator(x)
    reject("moe_distribute_dispatch", error(*tensors, *sizes, comm_alg))
    return torch_npu_ops.dispatch(operator, *tensors, *sizes, is_shared, group, comm_alg)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    pass


def backward(ctx: Any, *grads: Tensor, overload: str) -> Any:
    raise RuntimeError("deep_ep.moe_distribute_dispatch has no gradient; use the strategy default or alltoall")


register(
    "moe_distribute_dispatch",
    fake=fake,
    kernel=kernel,
    setup_context=setup_context,
    backward=backward,
    convert={"default": torch_npu_ops.convert_full_dispatch},
)
