"""Modules that hold a Buffer, a Config or a handle are copied, saved and loaded; handles are data."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from ranks import RankContext, RankPool
from test_bad_input import error_of

import deep_ep

R, T, H, K, E, M = 2, 5, 32, 2, 4, 8


class Layer(torch.nn.Module):
    """Experts that multiply, in the manner of frameworks: the Buffer and what dispatch gave are attributes."""

    def __init__(self, buffer: deep_ep.Buffer) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.full((H,), 2.0))
        self.gate = torch.nn.Parameter(torch.linspace(0, 1, K))
        self.buffer = buffer
        self.config = deep_ep.Config(num_sms=8)
        self.strategy = deep_ep.NormalStrategy.DEFAULT
        self.event = deep_ep.Buffer.capture()

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        weights = self.gate.expand(x.shape[0], K) * 1.0
        per_rank, _, per_expert, in_rank, _ = self.buffer.get_dispatch_layout(ids, E)
        rows, _, _, _, self.handle, _ = self.buffer.dispatch(
            x,
            topk_idx=ids,
            topk_weights=weights,
            num_tokens_per_rank=per_rank,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            config=self.config,
        )
        return self.buffer.combine(rows * self.scale, self.handle)[0]


def inputs(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(T * H).view(T, H).float() + rank, torch.arange(T * K).view(T, K) % E


def expected(x: torch.Tensor, scale: float) -> torch.Tensor:
    return x * scale * torch.linspace(0, 1, K).sum()


def saved_and_loaded(value: Any, **options: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, **options)


def check_modules(ctx: RankContext) -> tuple[str, str]:
    x, ids = inputs(ctx.rank)
    layer = Layer(deep_ep.Buffer(ctx.prepared_group("default"), explicitly_destroy=True))
    torch.testing.assert_close(layer(x, ids), expected(x, 2.0))
    assert layer.handle.topk_weights.grad_fn is not None
    assert layer.state_dict().keys() == {"scale", "gate"}

    # An average of weights: another module of the same group.
    average = copy.deepcopy(layer)
    assert average.buffer is layer.buffer
    assert copy.copy(layer.buffer) is layer.buffer
    assert (average.config, average.strategy) == (layer.config, layer.strategy)
    with torch.no_grad():
        average.scale.fill_(3.0)
    torch.testing.assert_close(average(x, ids), expected(x, 3.0))
    torch.testing.assert_close(layer(x, ids), expected(x, 2.0))

    loaded = saved_and_loaded(layer, weights_only=False)
    assert (loaded.config, loaded.strategy) == (layer.config, layer.strategy)
    assert (loaded.buffer.rank, loaded.buffer.group_size, loaded.buffer.group) == (ctx.rank, R, None)
    assert (loaded.buffer.normal_strategy, loaded.buffer.runtime) == (None, None)
    error = error_of(loaded, x, ids)
    loaded.buffer.destroy()
    loaded.buffer = deep_ep.Buffer(ctx.prepared_group("default"))
    torch.testing.assert_close(loaded(x, ids), expected(x, 2.0))
    layer.buffer.destroy()
    return error


def test_modules(pool: RankPool) -> None:
    error = "RuntimeError", "deep_ep: this Buffer was pickled, and has no group since; make another one"
    assert pool.run(R, check_modules) == [error] * R


def check_copies_of_handles(ctx: RankContext) -> None:
    """What goes back with a copied handle, and its gradients, are those of the handle."""
    group = ctx.prepared_group("default")
    x, ids = inputs(ctx.rank)
    for alignment in (1, 4):
        results = []
        for copied in (lambda handle: handle, copy.deepcopy):
            gate = torch.linspace(0, 1, K).requires_grad_()
            buffer = deep_ep.Buffer(group)
            per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(ids, E)
            rows, _, _, _, handle, _ = buffer.dispatch(
                x,
                topk_idx=ids,
                topk_weights=gate.expand(T, K) * 1.0,
                num_tokens_per_rank=per_rank,
                is_token_in_rank=in_rank,
                num_tokens_per_expert=per_expert,
                expert_alignment=alignment,
            )
            combined = buffer.combine(rows, copied(handle))[0]
            combined.backward(x)
            results.append((combined.detach(), gate.grad))
        torch.testing.assert_close(*results, rtol=0, atol=0)
        torch.testing.assert_close(results[0], (expected(x, 1.0), x.square().sum().expand(K)))


def test_copies_of_handles(pool: RankPool) -> None:
    pool.run(R, check_copies_of_handles)


def check_handles_are_data(ctx: RankContext) -> None:
    group = ctx.prepared_group("default")
    x, ids = inputs(ctx.rank)
    out = deep_ep.dispatch(x, ids, num_experts=E, group=group)
    loaded = saved_and_loaded(out)
    torch.testing.assert_close(loaded, out, rtol=0, atol=0)
    assert type(loaded.handle) is deep_ep.DispatchHandle
    assert torch.equal(deep_ep.combine(loaded.recv_x, loaded.handle, group=group), K * x)

    for rows in ("expert", "rank"):
        buffer = deep_ep.Buffer(group, rows=rows)
        per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(ids, E)
        for alignment in (1, 4):
            received, *_, handle, _ = buffer.dispatch(
                x,
                topk_idx=ids,
                topk_weights=torch.ones(T, K),
                num_tokens_per_rank=per_rank,
                is_token_in_rank=in_rank,
                num_tokens_per_expert=per_expert,
                expert_alignment=alignment,
            )
            back = saved_and_loaded(handle)
            assert type(back) is type(handle)
            assert torch.equal(buffer.combine(received, back)[0], buffer.combine(received, handle)[0])
        received, _, handle, *_ = buffer.low_latency_dispatch(x, ids, M, E, use_fp8=False)
        back = saved_and_loaded(handle)
        assert type(back) is type(handle)
        assert torch.equal(buffer.low_latency_combine(received, ids, torch.ones(T, K), back)[0], K * x)


def test_handles_are_data(pool: RankPool) -> None:
    pool.run(R, check_handles_are_data)


@pytest.mark.parametrize(
    "value",
    [
        deep_ep.Config(num_sms=4),
        deep_ep.NormalStrategy.ALLTOALL,
        deep_ep.LowLatencyStrategy.OPS,
        deep_ep.FuseMode.DISPATCH_FFN_COMBINE,
        deep_ep.FusedWeights(torch.ones(2), None, torch.zeros(1), None),
    ],
)
def test_values(value: Any) -> None:
    for copied in (copy.deepcopy(value), pickle.loads(pickle.dumps(value)), saved_and_loaded(value)):
        assert type(copied) is type(value)
        assert str(copied) == str(value)


def test_events() -> None:
    """That of a call that has finished."""
    event = deep_ep.Buffer.capture()
    for copied in (copy.deepcopy(event), pickle.loads(pickle.dumps(event)), saved_and_loaded(event)):
        copied.current_stream_wait()
        assert isinstance(copied.event, deep_ep.EventHandle)
