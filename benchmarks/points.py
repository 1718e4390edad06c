"""What is measured: configurations, the inputs of ranks, and the results that are expected.

T local tokens · H hidden · K top-k · E experts · R ranks · L = E/R local experts · N received rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from benchmarks.dispatchers import Dispatcher

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ROWS = ("expert", "rank")
MODES = ("normal", "low_latency")
FEW = (16, 64, 256)  # T of decoding and of small micro-batches in normal mode


@dataclass(frozen=True)
class Point:
    """One configuration to measure; tokens and topk are per rank."""

    ranks: int = 4
    tokens: int = 1024
    hidden: int = 2048
    topk: int = 8
    experts: int = 64
    dtype: str = "bf16"
    rows: str = "expert"  # the contract: one of ROWS
    mode: str = "normal"  # one of MODES; low latency has rows="expert" and M = T
    backward: bool = False
    from_python: bool = False  # ops, also where `from_cpp` has them called from C++
    only: tuple[str, ...] = ()  # names of competitors; none: all
    repeats: int = 7
    # What calls in a row take: where ranks outnumber cores they leave a barrier up to 10 ms apart.
    seconds: float = 0.1

    @property
    def stages(self) -> list[str]:
        return ["dispatch", "combine", "backward"] if self.backward else ["dispatch", "combine"]

    @property
    def from_cpp(self) -> bool:
        """Whether others are called from C++ as MPI is: to call them from Python takes as long as to send few rows."""
        few = self.mode == "low_latency" or self.tokens <= max(FEW)
        return few and self.rows == "expert" and not self.backward and not self.from_python

    @property
    def payload(self) -> int:
        """Bytes of recv_x, of all ranks together, with rows="expert"; in low latency with its rows of 0."""
        rows = self.tokens * self.topk
        if self.mode == "low_latency":
            rows = self.ranks * self.tokens * min(self.topk, self.experts // self.ranks)
        return self.ranks * rows * self.hidden * DTYPES[self.dtype].itemsize

    def __str__(self) -> str:
        text = f"R={self.ranks} T={self.tokens} H={self.hidden} K={self.topk} E={self.experts} {self.dtype}"
        text += f" rows={self.rows}" * (self.rows != "expert") + " low latency" * (self.mode == "low_latency")
        return text + " with backward" * self.backward + " from Python" * self.from_python


@dataclass(frozen=True)
class Inputs:
    """What a rank brings: uniform routing to K distinct experts, weights that sum to one."""

    x: Tensor  # [T, H]
    topk_idx: Tensor  # int64 [T, K]
    topk_weights: Tensor  # float32 [T, K]
    grad_out: Tensor  # [T, H]


def make_inputs(point: Point, rank: int) -> Inputs:
    """The inputs of a rank; every rank can make those of every other. No two rows are equal."""
    generator = torch.Generator().manual_seed(1000 + rank)
    T, H, dtype = point.tokens, point.hidden, DTYPES[point.dtype]
    topk_idx = torch.rand(T, point.experts, generator=generator).topk(point.topk).indices
    topk_weights = torch.randn(T, point.topk, generator=generator).softmax(1)
    x, grad_out = (
        (torch.randn(T, 1, generator=generator) * torch.randn(H, generator=generator)).to(dtype) for _ in range(2)
    )
    return Inputs(x, topk_idx, topk_weights, grad_out)


def goes_to_rank(point: Point, topk_idx: Tensor) -> Tensor:
    """bool [T, R]: whether a token goes to a rank."""
    local_experts = point.experts // point.ranks
    mask = torch.zeros(topk_idx.shape[0], point.ranks, dtype=torch.bool)
    return mask.scatter_(1, topk_idx // local_experts, True)


def num_rows(point: Point, rank: int) -> int:
    """N of a rank: the rows that it receives, and that are read to combine them."""
    total = 0
    for source in range(point.ranks):
        ids = make_inputs(point, source).topk_idx
        if point.rows == "rank":
            total += int(goes_to_rank(point, ids)[:, rank].sum())
        else:
            total += int((ids // (point.experts // point.ranks) == rank).sum())
    return total


def _expected_rows(point: Point, rank: int, everyone: list[Inputs]) -> tuple[Tensor, Tensor]:
    """recv_x [N, H], and what the expert makes of every row: a factor [N]."""
    x = torch.cat([inputs.x for inputs in everyone])
    ids = torch.cat([inputs.topk_idx for inputs in everyone])
    if point.rows == "rank":
        tokens = goes_to_rank(point, ids)[:, rank].nonzero().squeeze(1)
        return x[tokens], torch.full((len(tokens),), 2.0 ** (rank % 4))
    # Rows in the order of (expert, source rank, token, k).
    flat = ids.flatten()
    order = flat.argsort(stable=True)
    order = order[flat[order] // (point.experts // point.ranks) == rank]
    return x[order // point.topk], 2.0 ** (flat[order] % 4)


def check(dispatcher: Dispatcher, point: Point, rank: int) -> None:
    """Compare one round of a dispatcher with the expected rows, outputs and gradients.

    Expert e (rank e with rows="rank") multiplies its rows by 2 ** (e % 4), exact in every dtype, so that rows that
    come back to the wrong place do not go unnoticed.

    Raises:
        AssertionError: a result differs, named with the dispatcher and the tensor.
    """

    def assert_close(what: str, actual: Tensor, expected: Tensor, rtol: float = 0.0, atol: float = 0.0) -> None:
        if not torch.equal(actual, expected):  # which is fast
            torch.testing.assert_close(
                actual, expected, rtol=rtol, atol=atol, msg=lambda m: f"{dispatcher.name}: {what}: {m}"
            )

    everyone = [make_inputs(point, r) for r in range(point.ranks)]
    expected_rows, factors = _expected_rows(point, rank, everyone)
    N = len(expected_rows)

    mine = everyone[rank]
    x = mine.x.clone().requires_grad_(point.backward)
    topk_weights = mine.topk_weights.clone().requires_grad_(point.backward)
    recv_x, state = dispatcher.dispatch(x, mine.topk_idx, topk_weights)
    # Low latency has rows of 0 behind them.
    assert_close("recv_x", recv_x[:N], expected_rows)
    y = recv_x.clone()
    y[:N] *= factors.to(y.dtype).unsqueeze(1)
    out = dispatcher.combine(y, state)

    # All terms of a sum have the same sign, so the error is relative to the result.
    eps, sum_eps = torch.finfo(x.dtype).eps, dispatcher.sum_eps
    tiny = point.topk * torch.finfo(x.dtype).smallest_normal * eps
    if point.rows == "rank":
        total = (goes_to_rank(point, mine.topk_idx) * 2.0 ** (torch.arange(point.ranks) % 4)).double().sum(1, True)
    else:
        scale = 2.0 ** (mine.topk_idx % 4)
        total = (mine.topk_weights * scale).double().sum(1, keepdim=True)
    expected = (mine.x.double() * total).to(x.dtype)
    assert_close("combined x", out.detach(), expected, rtol=max(eps, point.topk * sum_eps), atol=tiny)
    if not point.backward:
        return
    out.backward(mine.grad_out)
    assert x.grad is not None and topk_weights.grad is not None
    expected = (mine.grad_out.double() * total).to(x.dtype)
    assert_close("x.grad", x.grad, expected, rtol=point.topk * eps, atol=tiny)
    dot = (mine.x.double() * mine.grad_out.double()).sum(1, keepdim=True)
    atol = 1e-5 * point.hidden**0.5 * (mine.x.double() * mine.grad_out.double()).abs().max().item() * scale.max().item()
    assert_close("topk_weights.grad", topk_weights.grad, (dot * scale).float(), rtol=4 * sum_eps, atol=atol)
