"""What the kernels of dispatch give, on whatever they run.

Symbols: T local tokens, H hidden, K top-k, R ranks, L local experts, N received rows.
"""

from typing import NamedTuple

from torch import Tensor


class DispatchResult(NamedTuple):
    """The outputs of the op dispatch on one rank, in the order of its schema."""

    recv_x: Tensor  # [N, H] as x
    recv_topk_idx: Tensor  # int64 [N, K]: local expert in the column that brought the row, else -1
    recv_topk_weights: Tensor  # fp32 [N, K]: weight in that column, else 0
    num_recv_tokens_per_expert: Tensor  # int64 [L], after dropping
    num_dropped: Tensor  # int64 []
    rank_prefix_matrix: Tensor  # int32 [R, R]: [i, j] rows that ranks 0..i deliver to rank j
    channel_prefix_matrix: Tensor  # int32 [R, L]: running over l, rows asked of d's expert l, not dropping
    recv_channel_prefix_matrix: Tensor  # int32 [L, R]: running over (expert, source), not dropping
    recv_src_idx: Tensor  # int32 [N, 3]: source rank, source token, k
    send_head: Tensor  # int32 [T, K]: row in the destination's recv_x, or -1
