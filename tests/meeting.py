"""Ops by which a program says where it has come to, and waits for another rank to come somewhere: a proof, without a
clock, of what runs while something else does."""

from typing import Any

import torch
from ranks import RankContext
from torch import Tensor

STORE: list[Any] = []
_runs: dict[int, int] = {}


def prepare(ctx: RankContext, *names: str) -> list[str]:
    """Keys of these names that no other run of the same ranks has, for `meet`."""
    STORE[:] = [ctx.store]
    _runs[ctx.size] = _runs.get(ctx.size, 0) + 1
    return [f"{name}-{ctx.size}-{_runs[ctx.size]}" for name in names]


@torch.library.custom_op("deep_ep_tests::meet", mutates_args=())
def meet(x: Tensor, arrives: bool, key: str) -> Tensor:
    """x. One rank arrives; the others go on once it has."""
    if arrives:
        STORE[0].set(key, "here")
    else:
        STORE[0].wait([key])
    return x.clone()


@torch.library.custom_op("deep_ep_tests::meet_in_backward", mutates_args=())
def meet_in_backward(x: Tensor, arrives: bool, key: str) -> Tensor:
    """x, whose gradient is that of `meet`."""
    return x.clone()


def _fake(x: Tensor, arrives: bool, key: str) -> Tensor:
    return torch.empty_like(x)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.arrives, ctx.key = inputs


def _backward(ctx: Any, grad: Tensor) -> Any:
    return torch.ops.deep_ep_tests.meet(grad, ctx.arrives, ctx.key), None, None


meet.register_fake(_fake)
meet.register_autograd(lambda ctx, grad: (grad, None, None))
meet_in_backward.register_fake(_fake)
meet_in_backward.register_autograd(_backward, setup_context=_setup_context)
