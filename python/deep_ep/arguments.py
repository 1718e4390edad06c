"""What callers pass, brought to what ops take: here, and nowhere else.

Functions and methods of Buffer take ids of any integer dtype, weights in the dtype of the model, whose gradient comes
back in it, and rows of any strides. The ops are strict.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")

INTEGERS = frozenset(
    (
        *(torch.int8, torch.int16, torch.int32, torch.int64),
        *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    )
)


def adapted(function: Callable[P, T]) -> Callable[P, T]:
    """`function`, with its arguments x, topk_idx and topk_weights as the ops take them.

    x as (data, scales) stays as it is: that is packed from any strides.
    """
    names = list(inspect.signature(function).parameters)
    known = [(names.index(name), name, *how) for name, how in _TAKES.items() if name in names]

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> T:
        taken = list(args)
        for place, name, dtype, take in known:
            value = taken[place] if place < len(taken) else kwargs.get(name)
            if not isinstance(value, Tensor):
                continue
            # Not if it is contiguous: where its number of rows is a symbol, nobody can tell.
            value = (value if value.dtype is dtype else take(value)).contiguous()
            if place < len(taken):
                taken[place] = value
            else:
                kwargs[name] = value
        return function(*taken, **kwargs)

    return call


def _rows(x: Tensor) -> Tensor:
    return x


def _ids(ids: Tensor) -> Tensor:
    """int64. ValueError: not of an integer dtype."""
    if ids.dtype not in INTEGERS:
        raise ValueError(f"topk_idx must be of an integer dtype, got {ids.dtype}")
    wide = ids.to(torch.int64)
    if ids.dtype == torch.uint64:  # what int64 cannot hold is no expert's id, and not -1 either
        wide = torch.where(wide < 0, torch.iinfo(torch.int64).max, wide)
    return wide


def _weights(weights: Tensor) -> Tensor:
    """fp32. ValueError: not bf16, fp16 or fp32."""
    if weights.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"topk_weights must be torch.float32, torch.bfloat16 or torch.float16, got {weights.dtype}")
    return weights.to(torch.float32)


_TAKES: dict[str, tuple[torch.dtype | None, Callable[[Tensor], Tensor]]] = {
    "x": (None, _rows),
    "topk_idx": (torch.int64, _ids),
    "topk_weights": (torch.float32, _weights),
}
"""By argument: what it is to be, and how to make it that."""


# Leading dimensions


def flat(*tensors: Tensor) -> tuple[Tensor, ...]:
    """x [..., H] and what there is for its tokens, [..., K], as the ops take them: [T, H] and [T, K].

    ValueError: they have not the same leading dimensions.
    """
    if all(tensor.dim() <= 2 for tensor in tensors):
        return tensors
    if any(tensor.shape[:-1] != tensors[0].shape[:-1] for tensor in tensors):
        raise ValueError(
            "x [T, H], topk_idx [T, K] and topk_weights [T, K] may have several dimensions for T, the same ones, got "
            f"{' and '.join(str(list(tensor.shape)) for tensor in tensors)}; x.flatten(0, -2) makes them one"
        )
    return tuple(tensor.flatten(0, -2) for tensor in tensors)


def like_tokens(rows: Tensor, tokens: torch.Size) -> Tensor:
    """Rows [T, H], one for each token, with the dimensions that the tokens came in."""
    return rows if len(tokens) == 1 else rows.view(*tokens, rows.shape[1])
