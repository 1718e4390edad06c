"""get_notify_send_data and notify_verify, against loops over ids in the words of DeepEP-Ascend's documentation."""

import os
from unittest import mock

import pytest
import torch
from ranks import STRATEGIES, RankContext, RankPool
from test_bad_input import error_of
from torch import Tensor

import deep_ep
from deep_ep.buffer import notify

MAX = 4096
ROUNDS, PER_ROUND = 3, 32


@pytest.mark.parametrize("T, K, E, R", [(50, 3, 32, 16), (5, 2, 4, 2), (0, 2, 8, 8)])
def test_send_data(T: int, K: int, E: int, R: int) -> None:
    S, L = max(1, R // 8), E // R
    ids = torch.randint(-1, E, (T, K), generator=torch.Generator().manual_seed(T))
    per_expert, per_server = [0] * E, [0] * S
    at_server, servers, number = torch.zeros(MAX, S), torch.zeros(MAX, 1), torch.zeros(MAX, S)
    place, sent, by_expert = torch.zeros(MAX, K), torch.zeros(MAX, K), torch.zeros(E, MAX)
    for t in range(T):
        for k in range(K):
            expert = sent[t, k] = int(ids[t, k])
            if expert < 0:
                continue
            server = expert // L // 8
            if not at_server[t, server]:
                per_server[server] += 1
                servers[t] += 1
                number[t, server] = per_server[server]
            at_server[t, server] += 1
            by_expert[expert, per_expert[expert]] = number[t, server]
            per_expert[expert] += 1
            place[t, k] = per_expert[expert]
    parts = [torch.tensor(per_expert), torch.tensor(per_server), at_server, servers, number, place, sent, by_expert]
    data = notify.send_data(ids, E, R)
    assert data.dtype == torch.int32 and data.shape == (E * 4097 + S + MAX * (1 + 2 * S + 2 * K),)
    assert torch.equal(data, torch.cat([part.int().view(-1) for part in parts]))


def test_send_data_has_room_for() -> None:
    with pytest.raises(ValueError, match=r"room for 4096 tokens, .* got 4097 tokens, and 1 ids of one"):
        ids = torch.full((4097, 1), -1)
        ids[0] = 3
        notify.send_data(ids, 4, 2)
    with pytest.raises(ValueError, match="got 3000 tokens, and 6000 ids of one"):
        notify.send_data(torch.zeros(3000, 2, dtype=torch.int64), 4, 2)


def ids_of(rank: int, E: int) -> Tensor:
    """64 + 6·rank tokens, so that the last round is not full."""
    return torch.randint(-1, E, (64 + 6 * rank, 2), generator=torch.Generator().manual_seed(rank))


def check_verify(ctx: RankContext, strategy: str, has_rounds: bool) -> None:
    E, L, R, n = 6, 3, 2, ROUNDS if has_rounds else 1
    names = "DEEPEP_NORMAL_LONG_SEQ_ROUND", "DEEPEP_NORMAL_LONG_SEQ_PER_ROUND_TOKENS"
    variables = dict(zip(names, (str(ROUNDS), str(PER_ROUND)), strict=True)) if has_rounds else {}
    group = ctx.prepared_group(strategy)
    with mock.patch.dict(os.environ, variables | {"DEEP_USE_MODE": strategy}):
        buffer = deep_ep.Buffer(group)
    assert "call get_dispatch_layout first" in error_of(buffer.get_notify_send_data)[1]
    ids = ids_of(ctx.rank, E)
    x = torch.ones(len(ids), 8)
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(ids, E)
    assert torch.equal(buffer.get_notify_send_data(), notify.send_data(ids, E, R))
    assert torch.equal(buffer.runtime.get_notify_send_data(), buffer.get_notify_send_data())
    given = {"num_tokens_per_rank": per_rank, "is_token_in_rank": in_rank, "num_tokens_per_expert": per_expert}
    told = buffer.notify_verify(x, topk_idx=ids, **given)

    # Rows of (source, round, expert), and what each source has of experts before.
    rounds = [ids_of(r, E).split(PER_ROUND if has_rounds else 1000) for r in range(R)]
    asked = torch.zeros(R, n, E, dtype=torch.int64)
    tokens = torch.zeros(R, n, dtype=torch.int64)
    for r, parts in enumerate(rounds):
        for i, part in enumerate(parts):
            tokens[r, i] = len(part)
            for e in range(E):
                asked[r, i, e] = (part == e).sum()
    first = ctx.rank * L
    data, count, offset = [], [], []
    for r in range(R):
        for i in range(n):
            for l in range(L):
                data += [asked[r, i, first + l], asked[r, i, : first + l].sum(), tokens[r, i]]
    for i in range(n):
        running = 0
        for l in range(L):
            for r in range(R):
                running += int(asked[r, i, first + l])
                count.append(running)
                offset.append(int(asked[r, i, : first + l].sum()))
    here = asked[:, :, first : first + L]
    wanted = {
        "recv_data": torch.tensor(data).view(n, 3 * E),
        "recv_count": torch.tensor(count).view(n, E),
        "recv_offset": torch.tensor(offset).view(n, E),
        "expert_global_offset": torch.tensor([int(here[:, :, :l].sum()) for l in range(L)]),
        "srcrank_in_expert_offset": torch.tensor([int(here[:r, :, l].sum()) for l in range(L) for r in range(R)]),
        "r_in_srcrank_offset": torch.tensor(
            [int(here[r, :i, l].sum()) for l in range(L) for r in range(R) for i in range(n)]
        ),
        "total_recv_token": here.sum().view(1),
        "max_bs": torch.tensor([len(ids_of(R - 1, E))]),
        "recv_tokens_per_expert": torch.tensor([int(here[:, i, l].sum()) for i in range(n) for l in range(L)]),
    }
    assert told._fields == tuple(wanted)
    for name, one in zip(told._fields, told, strict=True):
        assert one.dtype == torch.int32 and torch.equal(one, wanted[name].int()), name
    rows, *_ = buffer.dispatch(x, topk_idx=ids, **given)
    assert len(rows) == int(told.total_recv_token)

    with torch.inference_mode():
        inferred = ids_of(ctx.rank, E)
        buffer.get_dispatch_layout(inferred, E)
        inferred.zero_()
        assert torch.equal(buffer.get_notify_send_data(), notify.send_data(ids, E, R))
    buffer.get_dispatch_layout(ids, E)
    ids[0] = 0
    assert "has been written to since" in error_of(buffer.get_notify_send_data)[1]
    # What one rank does wrong is an error of all, and the group is usable.
    wrong = dict(given, num_tokens_per_expert=None) if ctx.rank else given
    assert "num_tokens_per_expert" in error_of(lambda: buffer.notify_verify(x, topk_idx=ids, **wrong))[1]
    assert int(buffer.notify_verify(x, topk_idx=ids, **given).max_bs) == len(ids_of(R - 1, E))


@pytest.mark.parametrize("has_rounds", [False, True])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_verify(pool: RankPool, strategy: str, has_rounds: bool) -> None:
    pool.run(2, check_verify, strategy, has_rounds)
