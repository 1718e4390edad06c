"""wait: completes a call that was started, so that what lies between overlaps with communication.

`<op>_start` takes the arguments of <op>, does not wait for peers, and returns a ticket. Backward mirrors this: the
gradient of wait starts the backward call of its op and gives its ticket as the gradient of the ticket; that of
`<op>_start` completes it. A ticket is an fp64 [1] on the CPU, so that autograd carries it; its value is a number.

arriving is wait without the waiting: the results, with their gradients, in memory that the call writes to behind
torch's back until a wait for the same ticket returns. Graphs have no use for it: there, results flow out of wait.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..ep_strategy import LowLatencyStrategy
from ..groups import GroupInfo
from ..kernels.started import arriving, finish, spoiled, write_all
from ..npu import ge
from ._registration import past_autograd, register, reject


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
    tokens: torch.Size
    """The dimensions that the tokens came in; [T] in `arguments`."""
    grad: bool
    """Whether autograd recorded what was computed when the call was issued."""
    contents: tuple[tuple[int, int], ...]
    """Of each of the arguments how often it had been written to, and where it lay, when the call was issued; empty in
    graphs."""
    is_token_in_rank: Tensor | None = None
    """Of a dispatch, where it is known."""

    def results(self) -> list[Tensor]:
        """Those of the op. They are there once."""
        return self._wait(self.grad)

    def arriving(self) -> list[Tensor]:
        """The results, which hold what they should once `join` has returned, and have the gradients of the call."""
        return self._call(torch.ops.deep_ep.arriving)

    def join(self) -> None:
        """Returns when the results are there."""
        self._wait(False)

    def _wait(self, grad: bool) -> list[Tensor]:
        """Outside of inference mode, as the thread of the group is: either may make the results."""
        wait = torch.ops.deep_ep.wait
        if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
            with torch.set_grad_enabled(grad):
                results = self._call(wait)
        else:
            with torch.inference_mode(False), torch.set_grad_enabled(grad):
                results = self._call(wait)
        self._check_contents()
        return results

    def _call(self, packet: Any) -> list[Tensor]:
        sizes = self.num_experts, self.info.size, self.num_max
        with past_autograd():
            return getattr(packet, self.overload)(self.ticket, self.op, list(self.arguments), *sizes, self.info.name)

    def _check_contents(self) -> None:
        """RuntimeError: an argument was written to, or freed, while it may have been sent."""
        if torch.compiler.is_compiling():
            return
        for number, before in enumerate(self.contents):
            if before != (now := _contents(self.arguments[number])):
                done, do = ("written to", "write to") if before[0] != now[0] else ("freed", "free")
                raise RuntimeError(
                    f"deep_ep.{self.op}: {_argument_name(self.op, number)} was {done} between the start of the call "
                    f"and its wait, so that what was sent is not known; {do} it after the wait, or pass a copy"
                )


def issued(
    ticket: Tensor,
    info: GroupInfo,
    overload: str,
    op: str,
    arguments: tuple[Tensor, ...],
    num_experts: int,
    num_max: int,
    tokens: torch.Size,
    is_token_in_rank: Tensor | None = None,
) -> Started:
    """The Started of a call that has just given its ticket."""
    contents = () if torch.compiler.is_compiling() else tuple(map(_contents, arguments))
    sizes = num_experts, num_max, tokens
    return Started(ticket, info, overload, op, arguments, *sizes, torch.is_grad_enabled(), contents, is_token_in_rank)


def says_itself(info: GroupInfo, x: Tensor) -> bool:
    """Whether `arriving` raises at once what is wrong with a low-latency call's arguments: its kernel has looked."""
    return info.low_latency is LowLatencyStrategy.DEFAULT and x.device.type == "cpu"


def as_issued(tensor: Tensor) -> Tensor:
    """What a call that goes on reads of an argument: a copy in inference mode, where torch counts no writes."""
    return tensor.clone() if not torch.compiler.is_compiling() and tensor.is_inference() else tensor


def no_rows(like: Tensor, num_rows: int) -> Tensor:
    """[num_rows, H] as `like` [N, H] is, without a value in it, to see what results would look like."""
    if torch.compiler.is_compiling():
        return like.new_full((num_rows, like.shape[1]), torch.nan)
    return like.new_full((1, like.shape[1]), torch.nan).expand(num_rows, -1)


def _contents(tensor: Tensor) -> tuple[int, int]:
    """How often it has been written to, 0 where torch does not count; and where its memory is."""
    return 0 if tensor.is_inference() else tensor._version, tensor.untyped_storage().data_ptr()


def _argument_name(op: str, number: int) -> str:
    tensors = [
        argument.name
        for argument in getattr(torch.ops.deep_ep, op).default._schema.arguments
        if isinstance(argument.type, torch.TensorType)
    ]
    return tensors[number]


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
    early: Callable[..., list[Tensor]] | None = None
    """As `fake`, for results that .alltoall will write to, where memory of any values will not do."""
    write: Callable[[list[Tensor], list[Tensor]], None] | None = None
    """(those, results): writes them, behind torch's back."""


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


def alltoall_arriving(ticket: Tensor, op: str, arguments: list[Tensor], *sizes: Any) -> list[Tensor]:
    """As .default. Results whose number of rows is not known come when the call has ended."""
    if error := checks.ticket(ticket):
        raise RuntimeError(f"deep_ep.arriving: {error}")
    completion = _completions[op]
    if op == "dispatch" and sizes[2] == 0:
        return arriving(op, ticket)
    make = completion.early or spoiled(completion.fake)
    make = functools.partial(make, "alltoall", *arguments, *sizes[:-1])
    return arriving(op, ticket, make, completion.write or write_all)


def alltoall(ticket: Tensor, op: str, arguments: list[Tensor], *sizes: Any) -> list[Tensor]:
    """As .default."""
    if error := checks.ticket(ticket):
        raise RuntimeError(f"deep_ep.wait: {error}")
    completion = _completions.get(op)
    if completion is not None and completion.complete is None and not ticket.any():
        # A call that nobody has waited for has no gradient, and graphs make that a zero.
        return [tensor.zero_() for tensor in completion.fake("alltoall", *arguments, *sizes[:-1])]
    return finish(op, ticket)


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

register(
    "arriving",
    fake=fake,
    alltoall=alltoall_arriving,
    ops=alltoall_arriving,
    setup_context=setup_context,
    backward=backward,
    convert={},
)
