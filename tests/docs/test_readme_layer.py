"""The layer in README.md as people run it: in fp32, under autocast, `.bfloat16()`; [batch, sequence, H].

Compared with a dense layer that has all experts. T tokens, H hidden, K top-k, E experts, R ranks, L = E/R local
experts, I intermediate size.
"""

import copy
import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import ALLTOALL_IS_SLOW, RankContext, RankPool
from torch import Tensor

import deep_ep

README = Path(__file__).parents[2] / "README.md"
H, I, E = 16, 32, 8


def readme_layer() -> Any:
    """The class MoE of README.md."""
    (source,) = re.findall(r"^class MoE\(.*?(?=^\S)", README.read_text(), re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {"torch": torch, "deep_ep": deep_ep}
    exec(source, names)
    return names["MoE"]


class Experts(torch.nn.Module):
    """Expert e: x -> relu(x @ up[e]) @ down[e]."""

    def __init__(self, experts: slice) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        up, down = torch.randn(E, H, I, generator=generator), torch.randn(E, I, H, generator=generator)
        self.up, self.down = torch.nn.Parameter(up[experts] / 4), torch.nn.Parameter(down[experts] / 4)

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        local = torch.arange(counts.shape[0])
        expert = torch.repeat_interleave(local, counts, output_size=rows.shape[0])
        return self.of(rows, expert)

    def of(self, rows: Tensor, expert: Tensor) -> Tensor:
        hidden = torch.bmm(rows.unsqueeze(1), self.up[expert]).relu()
        return torch.bmm(hidden, self.down[expert]).squeeze(1)


class Dense(torch.nn.Module):
    """The layer with all experts on one rank: products with fp32 weights are summed up in fp32, rounded once."""

    def __init__(self, router: torch.nn.Module, experts: Experts) -> None:
        super().__init__()
        self.router, self.experts = router, experts

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.router(x).softmax(-1).topk(2)
        tokens = x.flatten(0, -2).repeat_interleave(2, 0)
        y = self.experts.of(tokens, ids.flatten())
        return (y.float() * w.float().flatten()[:, None]).view(*ids.shape, H).sum(-2).to(y.dtype)


def make_router() -> torch.nn.Linear:
    router = torch.nn.Linear(H, E)
    with torch.no_grad():
        router.weight.copy_(torch.randn(E, H, generator=torch.Generator().manual_seed(2)))
        router.bias.zero_()
    return router


def input_of(rank: int) -> Tensor:
    """[batch, sequence, H]; the batch differs between ranks."""
    generator = torch.Generator().manual_seed(10 + rank)
    return torch.randn(1 + rank, 3, H, generator=generator)


def grad_of(x: Tensor) -> Tensor:
    return torch.linspace(-1, 1, x.numel()).view(x.shape)


PRECISIONS = ("fp32", "bf16", "autocast")


def in_precision(
    precision: str, layer: torch.nn.Module, x: Tensor
) -> tuple[torch.nn.Module, Tensor, Callable[[], Any]]:
    if precision == "bf16":
        return layer.bfloat16(), x.bfloat16(), nullcontext
    return layer, x, lambda: torch.autocast("cpu", torch.bfloat16) if precision == "autocast" else nullcontext()


def step(precision: str, layer: torch.nn.Module, x: Tensor, fn: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """out and the gradient of x, once the layer has its gradients."""
    _, x, context = in_precision(precision, layer, x)
    x.requires_grad_()
    with context():
        out = fn(x)
    out.backward(grad_of(out).to(out.dtype))
    assert x.grad is not None
    return [out.detach(), x.grad]


def close(actual: Tensor, expected: Tensor, precision: str) -> None:
    assert actual.dtype == expected.dtype
    assert expected.abs().max() > 0
    tolerance = 1e-5 if precision == "fp32" else 2e-2
    scale = expected.float().abs().max()
    torch.testing.assert_close(actual.float() / scale, expected.float() / scale, rtol=0, atol=tolerance)


def check_layer(ctx: RankContext, strategy: str, precision: str, compiled: bool) -> None:
    group = ctx.prepared_group(strategy)
    L = E // ctx.size
    mine = slice(ctx.rank * L, (ctx.rank + 1) * L)
    layer = copy.deepcopy(readme_layer()(make_router(), Experts(mine), E, group))
    if compiled:
        torch._dynamo.reset()
    fn = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
    actual = step(precision, layer, input_of(ctx.rank), fn)

    dense = Dense(make_router(), Experts(slice(None)))
    steps, routers = [], []
    for rank in range(ctx.size):
        dense.router.zero_grad()
        steps.append(step(precision, dense, input_of(rank), dense))
        routers.append(dense.router.weight.grad)
    for one, wanted in zip(actual, steps[ctx.rank], strict=True):
        close(one, wanted, precision)
    close(layer.router.weight.grad, routers[ctx.rank], precision)
    close(layer.experts.up.grad, dense.experts.up.grad[mine], precision)
    close(layer.experts.down.grad, dense.experts.down.grad[mine], precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("strategy", ALLTOALL_IS_SLOW)
def test_eager(pool: RankPool, strategy: str, precision: str) -> None:
    pool.run(4, check_layer, strategy, precision, False)


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
def test_in_one_graph(pool: RankPool, precision: str) -> None:
    pool.run(4, check_layer, "default", precision, True)
