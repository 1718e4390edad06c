"""A correct call of each op on every rank of a small case, for tests that spoil or interrupt one.

T local tokens, H hidden, K top-k, E experts, R ranks, N received rows.
"""

import functools
from collections.abc import Callable
from typing import Any

import reference
import torch
from cases import Case, assert_close, assert_same, make_inputs

OPS = ("dispatch", "combine", "dispatch_backward", "combine_backward")


class Calls:
    """The arguments of each op by rank, and what it must return."""

    def __init__(self, case: Case) -> None:
        self.case = case
        xs, ids, weights, worst = make_inputs(case)
        dispatched = reference.dispatch(xs, ids, weights, case.E, worst)
        src = [d.recv_src_idx for d in dispatched]
        generator = torch.Generator().manual_seed(case.seed + 1)

        def random(like: list[torch.Tensor]) -> list[torch.Tensor]:
            return [torch.randn(tensor.shape, generator=generator).to(tensor.dtype) for tensor in like]

        ys = random([d.recv_x for d in dispatched])
        grads = random(xs)
        grad_recv_weights = random([d.recv_topk_weights for d in dispatched])
        self._arguments: dict[str, dict[str, list[Any]]] = {
            "dispatch": {"x": xs, "topk_idx": ids, "topk_weights": weights, "num_worst_tokens": worst},
            "combine": {"x": ys, "topk_weights": weights},
            "dispatch_backward": {"grad_recv_x": ys, "grad_recv_topk_weights": grad_recv_weights},
            "combine_backward": {"grad_out": grads, "x": ys, "topk_weights": weights},
        }
        handle = {"topk_idx": ids, "recv_src_idx": src, "send_head": [d.send_head for d in dispatched]}
        for op in OPS[1:]:
            self._arguments[op] |= handle
        self._results: dict[str, list[tuple[torch.Tensor, ...]]] = {
            "dispatch": list(dispatched),
            "combine": [(out,) for out in reference.combine(ys, weights, src)],
            "dispatch_backward": _by_rank(reference.dispatch_backward(ys, grad_recv_weights, src, list(case.tokens))),
            "combine_backward": _by_rank(reference.combine_backward(grads, ys, weights, src)),
        }

    def arguments(self, op: str, rank: int, group: str) -> dict[str, Any]:
        """By name, of every argument. The tensors belong to all calls: they must not be written to."""
        own = {name: by_rank[rank] for name, by_rank in self._arguments[op].items()}
        return own | {"num_experts": self.case.E, "num_ranks": self.case.R, "group": group}

    def result(self, op: str, rank: int) -> tuple[torch.Tensor, ...]:
        """What the op must return on this rank."""
        return self._results[op][rank]

    def check(self, op: str, rank: int, results: Any) -> None:
        """Raises AssertionError unless `results` are what the op must return on this rank."""
        results = (results,) if isinstance(results, torch.Tensor) else tuple(results)
        expected = self.result(op, rank)
        if op == "combine_backward":
            # An inner product, whose order of summation is free.
            tolerance = 1e-5 * expected[1].abs() + 1e-6 * self.case.H
            assert_close(f"{op}'s grad_topk_weights", results[1], expected[1], tolerance)
            results, expected = results[:1], expected[:1]
        for i, (actual, wanted) in enumerate(zip(results, expected, strict=True)):
            assert_same(f"{op}'s result {i}", actual, wanted)


calls = functools.cache(Calls)


def run(op: str, strategy: str, arguments: dict[str, Any]) -> Any:
    """Calls the op's overload for the strategy."""
    return getattr(getattr(torch.ops.deep_ep, op), strategy)(**arguments)


def check_ops(case: Case, rank: int, group: str, strategy: str, ops: tuple[str, ...] = OPS) -> None:
    """Runs the ops on the case and checks the results, once the last one has returned. Collective."""
    right = calls(case)
    results = {op: run(op, strategy, right.arguments(op, rank, group)) for op in ops}
    for op, result in results.items():
        right.check(op, rank, result)


def error_of(call: Callable[..., object], *args: Any, **kwargs: Any) -> tuple[str, str]:
    """Type and message of the exception that the call raises; two empty strings if it raises none."""
    try:
        call(*args, **kwargs)
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


def _by_rank(results: tuple[list[torch.Tensor], ...]) -> list[tuple[torch.Tensor, ...]]:
    return list(zip(*results, strict=True))
