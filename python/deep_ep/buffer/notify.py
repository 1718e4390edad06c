"""What DeepEP-Ascend's kernels tell each other before rows move, for programs that look at it: get_notify_send_data and
notify_verify of Buffer.

T local tokens · K top-k · E experts · R ranks · L = E/R local experts · S servers of 8 ranks.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..env import Rounds
from ..groups import GroupInfo
from ..ops import dispatch as dispatch_op

MAX_TOKENS = 4096
RANKS_OF_SERVER = 8


def send_data(topk_idx: Tensor, E: int, R: int) -> Tensor:
    """int32 [E·(1 + 4096) + S + 4096·(1 + 2·S + 2·K)], one part after the other, with rows of 0 behind the T tokens:

    [E] ids of each expert; [S] tokens for each server; [4096, S] ids of each token at each server; [4096] servers of
    each token; [4096, S] the number of the token among those for the server, from 1; [4096, K] the number of the id
    among those of its expert, from 1, or 0 for none; [4096, K] the ids; [E, 4096] for the ids of each expert, in their
    order, the number of the token among those for the server.

    ValueError: more than 4096 tokens, or ids of an expert.
    """
    (T, K), S = topk_idx.shape, -(-R // RANKS_OF_SERVER)
    per_expert = torch.bincount(topk_idx.view(-1) + 1, minlength=E + 1)[1:]
    if T > MAX_TOKENS or int(per_expert.max()) > MAX_TOKENS:
        raise ValueError(
            f"get_notify_send_data has room for {MAX_TOKENS} tokens, and ids of an expert; got {T} tokens, and "
            f"{int(per_expert.max())} ids of one"
        )
    server = torch.where(topk_idx >= 0, topk_idx // (E // R) // RANKS_OF_SERVER, S)
    at_server = torch.nn.functional.one_hot(server, S + 1)[..., :S].sum(1)
    goes = (at_server > 0).int()
    number = goes.cumsum(0) * goes
    asked = torch.nn.functional.one_hot(topk_idx.view(-1) + 1, E + 1)[:, 1:]
    place = (asked.cumsum(0) * asked).sum(1)
    by_expert = topk_idx.new_zeros(E, MAX_TOKENS)
    slot = place.nonzero()[:, 0]
    expert = topk_idx.view(-1)[slot]
    by_expert[expert, place[slot] - 1] = number[slot // K, server.view(-1)[slot]]

    def rows(part: Tensor) -> Tensor:
        return torch.nn.functional.pad(part, (0, 0, 0, MAX_TOKENS - T)).view(-1)

    parts = (
        *(per_expert, goes.sum(0), rows(at_server), rows(goes.sum(1, keepdim=True)), rows(number)),
        *(rows(place.view(T, K)), rows(topk_idx), by_expert.view(-1)),
    )
    return torch.cat([part.int() for part in parts])


class Notified(NamedTuple):
    """What a rank is told of the rows that it will get. All int32."""

    recv_data: Tensor
    """[rounds, 3·E] that hold, by (source rank, round, local expert): rows, rows of the source's experts before it, and
    tokens of the round."""
    recv_count: Tensor
    """[rounds, E]: running count of the round's rows over (local expert, source rank)."""
    recv_offset: Tensor
    """[rounds, E]: by (local expert, source rank): rows of the source's experts before it."""
    expert_global_offset: Tensor
    """[L]: rows of the local experts before."""
    srcrank_in_expert_offset: Tensor
    """[L·R]: rows of the local expert from source ranks before."""
    r_in_srcrank_offset: Tensor
    """[L·R·rounds]: rows of the local expert from the source rank in rounds before."""
    total_recv_token: Tensor
    """[1]: rows."""
    max_bs: Tensor
    """[1]: the largest T of a rank."""
    recv_tokens_per_expert: Tensor
    """[rounds·L]: rows of each local expert."""


def verify(info: GroupInfo, rank: int, num_tokens_per_expert: Tensor, T: int, rounds: Rounds) -> Notified:
    """Every rank's counts and T, which go around as rows of a dispatch: one for each rank."""
    R, n = info.size, rounds.number
    E = num_tokens_per_expert.shape[0] // n
    L, device = E // R, num_tokens_per_expert.device
    own = torch.cat([num_tokens_per_expert.int(), torch.tensor([T], dtype=torch.int32, device=device)])
    to_all = torch.arange(0, E, L, device=device).unsqueeze(0)
    everyone = dispatch_op.call(info, own.view(1, -1).view(torch.float32), to_all, None, E, R).recv_x.view(torch.int32)
    tokens = everyone[:, -1:]
    if n > 1:
        tokens = (tokens - rounds.tokens * torch.arange(n, device=device)).clamp(0, rounds.tokens)
    asked = everyone[:, :-1].reshape(R, n, E)
    before = asked.cumsum(2) - asked
    here = slice(rank * L, rank * L + L)
    count, offset = (table[..., here] for table in (asked, before))  # [source, round, local expert]
    by_expert = count.permute(1, 2, 0)  # [round, local expert, source]
    total = by_expert.sum(0)
    parts = (
        torch.stack([count, offset, tokens.unsqueeze(2).expand_as(count)], 3).reshape(n, 3 * E),
        by_expert.reshape(n, E).cumsum(1),
        offset.permute(1, 2, 0).reshape(n, E),
        total.sum(1).cumsum(0) - total.sum(1),
        (total.cumsum(1) - total).view(-1),
        (by_expert.cumsum(0) - by_expert).permute(1, 2, 0).reshape(-1),
        total.sum().view(1),
        everyone[:, -1].max().view(1),
        by_expert.sum(2).view(-1),
    )
    return Notified(*(part.int() for part in parts))
