"""Cost statistics of Buffer's calls: int32 or int64 [R], to which a call adds the microseconds that it took.

R ranks.
"""

import time

import torch
from torch import Tensor


def check(name: str, stats: Tensor | None, num_ranks: int) -> None:
    """ValueError: `stats`, the argument `name`, has another dtype or shape."""
    if stats is None:
        return
    if stats.dtype not in (torch.int32, torch.int64) or stats.dim() != 1 or stats.shape[0] != num_ranks:
        raise ValueError(
            f"{name} must be torch.int32 or torch.int64 [R] with R = {num_ranks}, got {stats.dtype} {list(stats.shape)}"
        )


def now(stats: Tensor | None) -> int:
    """Nanoseconds, or 0 where no time is taken: a graph has no clock."""
    return 0 if stats is None or torch.compiler.is_compiling() else time.perf_counter_ns()


def add(stats: Tensor | None, start: int, rank: int) -> None:
    """Adds the microseconds since `start` to the entries of all ranks but this one's, `rank`."""
    if stats is None or torch.compiler.is_compiling():
        return
    elapsed = (time.perf_counter_ns() - start) // 1000
    stats[:rank] += elapsed
    stats[rank + 1 :] += elapsed
