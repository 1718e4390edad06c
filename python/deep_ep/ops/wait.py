"""wait: completes a call that was started, so that what lies between overlaps with communication.

`<op>_start` takes the arguments of <op>, does not wait for peers, and returns a ticket. Backward mirrors this: the
gradient of wait starts the backward call of its op and gives its ticket as the gradient of the ticket; that of
`<op>_start` completes it. A ticket is an fp64 [1] on the CPU, so that autograd carries it; its value is a number.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checks, pending
from ..groups import GroupInfo
from ..npu import ge
from ._registration import register, reject


class Started(NamedTuple):
    """A call that goes on; `deep_ep.wait` completes it."""

    ticket: Tensor
    info: GroupInfo
    overload: str
    op: str
    arguments: tuple[Tensor, ...]
    """As the call has them."""
    num_experts: int
    num_max: int
    """num_worst_tokens of a dispatch, num_max_dispatch_tokens_per_rank of a low-latency one, else 0."""
    is_token_in_rank: Tensor | None = None
    """Of a dispatch, where it is known."""

    def results(self) -> list[Tensor]:
        """Those of the op. They are there once."""
        op = getattr(torch.ops.deep_ep.wait, self.overload)
        sizes = self.num_experts, self.info.size, self.num_max
        return op(self.ticket, self.op, list(self.arguments), *sizes, self.info.name)


class Completion(NamedTuple):
    """What wait does for one op."""

    fake: Callable[..., tuple[Tensor, ...]]
    """(overload, *arguments, num_experts, num_ranks, num_max) -> the op's results."""
    complete: Callable[[Started], Any] | None = None
    """A Started to what the public function of the op returns."""
    saved: Callable[[list[Tensor], list[Tensor]], tuple[Tensor, ...]] | None = None
    """(arguments, results) -> what `backward` gets."""
    backward: Callable[..., Tensor] | None = None
    """(overload, saved, gradients of the results, (num_experts, num_ranks, group)) -> the ticket of the backward
    call."""


_completions: dict[str, Completion] = {}


def completes(op: str, completion: Completion) -> None:
    """Declares how wait completes `op`."""
    _completions[op] = completion


def wait(started: Started) -> Any:
    """Completes a call. Collective in the order of the starts; differentiable as the call is.

    Gradients of what is computed between start and wait are computed between the start and the end of the call's
    backward communication.

    Args:
        started: what `dispatch_start` or `combine_start` returned, for one wait.

    Returns:
        What `deep_ep.dispatch` (DispatchOutput) or `deep_ep.combine` ([T, H]) returns for the same arguments.

    Raises:
        RuntimeError: what the call raises, on all its ranks; or `started` has been completed before.
        ValueError: `started` is something else.
    """
    if not isinstance(started, Started):
        raise ValueError(f"started must be what dispatch_start or combine_start returned, got {type(started).__name__}")
    complete = _completions[started.op].complete
    assert complete is not None
    return complete(started)


def fake(
    ticket: Tensor,
    op: str,
    arguments: list[Tensor],
    num_experts: int,
    num_ranks: int,
    num_max: int,
    group: str,
    *,
    overload: str,
) -> list[Tensor]:
    reject("wait", None if op in _completions else f"op must be one of {', '.join(_completions)}; got {op!r}")
    reject("wait", checks.ticket(ticket))
    return list(_completions[op].fake(overload, *arguments, num_experts, num_ranks, num_max))


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    _, ctx.op, arguments, num_experts, num_ranks, _, group = inputs
    ctx.num_arguments = len(arguments)
    ctx.arguments = num_experts, num_ranks, group
    if saved := _completions[ctx.op].saved:
        ctx.save_for_backward(*saved(arguments, output))


def backward(ctx: Any, grads: list[Tensor], *, overload: str) -> Any:
    """Starts the backward call, whose ticket is the gradient of the ticket."""
    ticket = None
    if ctx.needs_input_grad[0]:
        formula = _completions[ctx.op].backward
        if formula is None:
            raise RuntimeError(f"deep_ep.{ctx.op}: second derivatives are not supported; do not use create_graph=True")
        ticket = formula(overload, ctx.saved_tensors, grads, ctx.arguments)
    return ticket, None, [None] * ctx.num_arguments, None, None, None, None


def alltoall(ticket: Tensor, op: str, arguments: list[Tensor], *sizes: Any) -> list[Tensor]:
    """As .default."""
    if error := checks.ticket(ticket):
        raise RuntimeError(f"deep_ep.wait: {error}")
    completion = _completions.get(op)
    if completion is not None and completion.complete is None and not ticket.any():
        # A call that nobody has waited for has no gradient, and graphs make that a zero.
        return [tensor.zero_() for tensor in completion.fake("alltoall", *arguments, *sizes[:-1])]
    return pending.finish(op, ticket)


register(
    "wait",
    fake=fake,
    alltoall=alltoall,
    ops=alltoall,
    setup_context=setup_context,
    backward=backward,
    convert=dict.fromkeys(("default", "ops"), ge.waiting),
    decompose=ge.waiting_of,
)
