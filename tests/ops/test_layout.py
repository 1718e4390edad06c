"""get_dispatch_layout, which needs no ranks: num_ranks and num_nodes are arguments."""

import pytest
import reference
import torch
from cases import assert_same
from hypothesis import given
from hypothesis import strategies as st
from ranks import STRATEGIES, RankContext, RankPool

import deep_ep

NAMES = ("num_tokens_per_rank", "num_tokens_per_rdma_rank", "num_tokens_per_expert", "is_token_in_rank")


def op(strategy: str):
    return getattr(torch.ops.deep_ep.get_dispatch_layout, strategy)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[torch.Tensor, int, int, int]:
    """topk_idx [T, K], num_experts, num_ranks, num_nodes; small L makes repeated ids and ranks likely."""
    num_nodes = draw(st.integers(1, 6))
    num_ranks = num_nodes * draw(st.integers(1, 8))
    num_experts = num_ranks * draw(st.one_of(st.integers(1, 4), st.integers(1, 1024 // num_ranks)))
    T = draw(st.one_of(st.integers(0, 64), st.integers(65, 4096)))
    K = draw(st.integers(1, 16))
    absent = draw(st.sampled_from((0.0, 0.5, 1.0)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    topk_idx = torch.randint(num_experts, (T, K), generator=generator)
    topk_idx[torch.rand(T, K, generator=generator) < absent] = -1
    return topk_idx, num_experts, num_ranks, num_nodes


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(arguments=layouts())
def test_matches_the_reference(strategy: str, arguments: tuple[torch.Tensor, int, int, int]) -> None:
    results = op(strategy)(*arguments)
    for name, actual, expected in zip(NAMES, results, reference.get_dispatch_layout(*arguments), strict=True):
        assert_same(name, actual, expected)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_counts(strategy: str) -> None:
    """8 experts, 4 ranks, 2 nodes: a token counts once per rank and per node, a repeated id once per time."""
    topk_idx = torch.tensor(
        [
            [0, 1, -1],  # both on rank 0
            [2, 7, 2],  # ranks 1 and 3: one on each node
            [5, 5, 5],  # rank 2
            [-1, -1, -1],
            [6, -1, 4],  # ranks 3 and 2: both on node 1
        ]
    )
    per_rank, per_node, per_expert, in_rank = op(strategy)(topk_idx, 8, 4, 2)
    assert per_rank.tolist() == [1, 1, 2, 2]
    assert per_node.tolist() == [2, 3]
    assert per_expert.tolist() == [1, 1, 2, 0, 1, 3, 1, 1]
    assert in_rank.tolist() == [[1, 0, 0, 0], [0, 1, 0, 1], [0, 0, 1, 0], [0, 0, 0, 0], [0, 0, 1, 1]]
    assert {t.dtype for t in (per_rank, per_node, per_expert, in_rank)} == {torch.int32}


def check_public(ctx: RankContext, strategy: str) -> None:
    topk_idx = torch.tensor([[ctx.rank, 3], [-1, 5], [4, 4]])
    layout = deep_ep.get_dispatch_layout(topk_idx, 6, group=ctx.prepared_group(strategy))
    expected = reference.get_dispatch_layout(topk_idx, 6, ctx.size, 1)
    assert layout[1] is None
    for i in (0, 2, 3):
        assert_same(NAMES[i], layout[i], expected[i])


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("R", [1, 2, 3])
def test_public_function(pool: RankPool, strategy: str, R: int) -> None:
    pool.run(R, check_public, strategy)
