"""What deep_ep.Buffer adds to the functions it calls."""

import pytest
import torch
from ranks import STRATEGIES, RankContext, RankPool

import deep_ep

T, H, K, E, W = 12, 8, 2, 4, 10


def dropped(ctx: RankContext, strategy: str, backend: str) -> tuple[int, int]:
    """Rows for this rank that did not fit, by the handle of a Buffer and by deep_ep.dispatch."""
    torch._dynamo.reset()
    group = ctx.prepared_group(strategy)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEEP_USE_MODE", strategy)
        buffer = deep_ep.Buffer(group)
    x, ids = torch.ones(T, H), torch.arange(T * K).view(T, K) % E

    def by_buffer() -> torch.Tensor:
        per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(ids, E)
        *_, handle, _ = buffer.dispatch(
            x,
            num_tokens_per_rank=per_rank,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            topk_idx=ids,
            num_worst_tokens=W,
        )
        return handle.num_dropped

    fn = by_buffer if backend == "eager" else torch.compile(by_buffer, backend=backend, fullgraph=True)
    out = deep_ep.dispatch(x, ids, num_experts=E, group=group, num_worst_tokens=W)
    return int(fn()), int(out.num_dropped)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_dropped_rows_are_counted(pool: RankPool, strategy: str, backend: str) -> None:
    # Every expert gets T * K / E rows of each of 2 ranks, and a rank has E / 2 experts.
    assert pool.run(2, dropped, strategy, backend) == [(T * K - W, T * K - W)] * 2
