"""Inputs of the normal-mode ops, drawn or fixed, and what the ops must do with them.

A Case is small and all its data follow from its seed, so every rank makes the inputs and the expected
results of the whole group by itself and compares its own share. Symbols: T local tokens, H hidden, K top-k,
E experts, R ranks, L = E/R local experts, N received rows, W num_worst_tokens (0 = exact mode).
"""

from dataclasses import dataclass
from typing import NamedTuple

import reference
import torch
from hypothesis import strategies as st
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# How a token's ids are drawn: independently, without repetition (as long as K <= E), one id K times, the same
# id for all tokens, ids of one rank only, expert k in column k (which is how rows="rank" uses the ops), none at all.
IDS = ("any", "distinct", "repeated", "one expert", "one rank", "columns", "none")
# T·K·H of the rank with the most tokens.
MAX_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Case:
    """Sizes of one dispatch and combine. `tokens` has each rank's T.

    `capacity` has each rank's W as a fraction of the rows meant for it (W is at least 1); None is exact mode.
    `absent` is the chance of an id -1, and of a token without any expert.
    """

    tokens: tuple[int, ...]
    H: int = 8
    K: int = 2
    local_experts: int = 2
    dtype: torch.dtype = torch.float32
    ids: str = "any"
    absent: float = 0.25
    capacity: tuple[float, ...] | None = None
    seed: int = 0

    @property
    def R(self) -> int:
        return len(self.tokens)

    @property
    def E(self) -> int:
        return self.R * self.local_experts


class Inputs(NamedTuple):
    """What each rank gives to dispatch. Lists are by rank."""

    xs: list[Tensor]  # [T, H]
    topk_idxs: list[Tensor]  # int64 [T, K]
    topk_weights: list[Tensor]  # fp32 [T, K]
    num_worst_tokens: list[int]


def make_inputs(case: Case) -> Inputs:
    generator = torch.Generator().manual_seed(case.seed)
    topk_idxs = [_make_ids(case, T, generator) for T in case.tokens]
    rows = torch.stack([torch.bincount(ids[ids >= 0], minlength=case.E) for ids in topk_idxs])
    rows_per_rank = rows.sum(0).view(case.R, -1).sum(1).tolist()
    if case.capacity is None:
        num_worst_tokens = [0] * case.R
    else:
        num_worst_tokens = [max(1, round(part * n)) for part, n in zip(case.capacity, rows_per_rank, strict=True)]
    return Inputs(
        [torch.randn(T, case.H, generator=generator).to(case.dtype) for T in case.tokens],
        topk_idxs,
        [torch.randn(T, case.K, generator=generator) for T in case.tokens],
        num_worst_tokens,
    )


def _make_ids(case: Case, T: int, generator: torch.Generator) -> Tensor:
    K, E = case.K, case.E
    if case.ids == "any":
        ids = torch.randint(E, (T, K), generator=generator)
    elif case.ids == "distinct":
        ids = (torch.randint(E, (T, 1), generator=generator) + torch.arange(K)) % E
    elif case.ids == "repeated":
        ids = torch.randint(E, (T, 1), generator=generator).repeat(1, K)
    elif case.ids == "one expert":
        ids = torch.randint(E, (1, 1), generator=generator).repeat(T, K)
    elif case.ids == "one rank":
        first = torch.randint(case.R, (1,), generator=generator) * case.local_experts
        ids = first + torch.randint(case.local_experts, (T, K), generator=generator)
    elif case.ids == "columns":
        ids = (torch.arange(K) % E).repeat(T, 1)
    else:
        return torch.full((T, K), -1)
    ids[torch.rand(T, K, generator=generator) < case.absent] = -1
    ids[torch.rand(T, generator=generator) < case.absent] = -1
    return ids


def expert_outputs(recv_x: Tensor, recv_src_idx: Tensor) -> Tensor:
    """Stands for the experts: every row times a factor of its own, so that no row can pass for another.

    Unused rows become NaN: nothing may read them.
    """
    factor = 0.25 + torch.arange(recv_x.shape[0]).remainder(61) / 16
    factor[recv_src_idx[:, 0] < 0] = float("nan")
    return recv_x * factor.to(recv_x.dtype).unsqueeze(1)


def assert_same(name: str, actual: Tensor, expected: Tensor) -> None:
    """Equal in dtype, shape and every bit, the sign of a zero included. NaNs are all alike."""
    assert actual.dtype == expected.dtype, f"{name}: {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, f"{name}: {list(actual.shape)}, expected {list(expected.shape)}"
    actual, expected = actual.detach(), expected.detach()
    wrong = bits(actual) != bits(expected)
    if wrong.any() and actual.is_floating_point():
        wrong &= ~(actual.isnan() & expected.isnan())
    _report(name, actual, expected, wrong)


def assert_close(name: str, actual: Tensor, expected: Tensor, tolerance: Tensor) -> None:
    """|actual - expected| <= tolerance, element by element."""
    assert actual.dtype == expected.dtype, f"{name}: {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, f"{name}: {list(actual.shape)}, expected {list(expected.shape)}"
    actual, expected = actual.detach(), expected.detach()
    _report(name, actual, expected, ~((actual.double() - expected.double()).abs() <= tolerance))


def bits(tensor: Tensor) -> Tensor:
    """The tensor's bytes as integers of its element size."""
    return tensor.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def _report(name: str, actual: Tensor, expected: Tensor, wrong: Tensor) -> None:
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{name}: {int(wrong.sum())} of {wrong.numel()} elements differ, the first at {list(at)}: "
            f"{actual[at].item()}, expected {expected[at].item()}"
        )


def assert_dispatched(actual: tuple[Tensor, ...], expected: reference.DispatchResult) -> None:
    """Every output of the op dispatch, exactly."""
    assert len(actual) == len(expected)
    for name, output, wanted in zip(expected._fields, actual, expected, strict=True):
        assert_same(f"dispatch's {name}", output, wanted)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Sizes up to the limits of the ops, T·K·H <= MAX_ELEMENTS on each rank; small ones more often."""
    R = draw(st.integers(1, 4))
    K = draw(st.integers(1, 16))
    H = draw(st.one_of(st.integers(8, 40), st.integers(41, 512), st.integers(513, 7168)))
    largest = min(draw(st.sampled_from((8, 128, 1024, 4096))), MAX_ELEMENTS // (K * H))
    local_experts = draw(st.one_of(st.integers(1, 4), st.integers(5, 1024 // R)))
    fraction = st.sampled_from((0.5, 0.9, 1.0, 1.5, 0.01))
    return Case(
        tokens=tuple(draw(st.lists(st.integers(0, largest), min_size=R, max_size=R))),
        H=H,
        K=K,
        local_experts=local_experts,
        dtype=draw(st.sampled_from(DTYPES)),
        ids=draw(st.sampled_from(IDS)),
        absent=draw(st.sampled_from((0.0, 0.25, 0.9))),
        capacity=tuple(draw(st.lists(fraction, min_size=R, max_size=R))),
        seed=draw(st.integers(0, 2**32 - 1)),
    )
