"""What is the same for all ops: where their parts are registered."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves

from .. import _compile, _library, calls, profile  # noqa: F401  (_library defines the ops)
from ..calls import completing
from ..kernels import started
from ..npu import ge


class _Fragment(torch.library.Library):
    """Our formulas are for backward: other ways to a derivative are refused where torch would begin them."""

    def impl(self, op_name: Any, fn: Any, dispatch_key: str = "", **options: Any) -> None:
        if dispatch_key == "Autograd":
            fn = _only_backward(op_name, fn)
        super().impl(op_name, fn, dispatch_key, **options)


def _only_backward(overload: str, formula: Callable[..., Any]) -> Callable[..., Any]:
    packet, _, strategy = overload.partition(".")
    name = f"deep_ep.{packet}"
    op = getattr(getattr(torch.ops.deep_ep, packet), strategy or "default")

    def without_gradient(keyset: Any, *args: Any) -> Any:
        """What the formula would do, without what it takes to find that out."""
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    def checked(keyset: Any, *args: Any) -> Any:
        is_transformed = torch._C._are_functorch_transforms_active()
        if is_transformed or forward_ad._current_level >= 0:  # else there is nothing to look for, at every call
            for arg in tree_leaves(args):
                if not isinstance(arg, Tensor):
                    continue
                if forward_ad.unpack_dual(arg).tangent is not None:
                    raise RuntimeError(f"{name}: forward-mode derivatives are not supported; use torch.autograd.grad")
                if is_transformed and arg.requires_grad and torch.is_grad_enabled():
                    raise RuntimeError(f"{name}: torch.func's derivatives are not supported; use torch.autograd.grad")
        # While torch traces, and without grad mode as in compiled code, it is not known here.
        if not torch.is_grad_enabled():
            return without_gradient(keyset, *args)
        if type(args[0]) not in (Tensor, torch.nn.Parameter):
            return formula(keyset, *args)
        needed = torch._C._any_requires_grad(*args)
        calls.gradient(2 if needed and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args) else 1)
        try:
            return (formula if needed else without_gradient)(keyset, *args)
        finally:
            calls.gradient(0)

    return checked


_nothing: contextlib.AbstractContextManager[None] = contextlib.nullcontext()


def past_autograd() -> contextlib.AbstractContextManager[Any]:
    """Where no derivative is wanted, ops go past the formulas, which would find that out one by one."""
    if (
        torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    ):
        return _nothing
    return torch._C._AutoDispatchBelowAutograd()


_fragment = _Fragment("deep_ep", "FRAGMENT")


class Start(NamedTuple):
    """What `<op>_start`, which takes the arguments of an op and gives a ticket for wait, has of its own."""

    check: Callable[..., str | None]
    """What is wrong with the arguments, which it gets without the group; called with `overload=` too where there is an
    overload `.ops`."""
    backward: Callable[..., Any]
    """Gets the ticket of the backward call, to complete it."""
    setup_context: Callable[..., None] | None = None


def register(
    name: str,
    *,
    fake: Callable[..., Any],
    alltoall: Callable[..., Any] | None = None,
    kernel: Callable[..., Any] | None = None,
    cpu: Callable[..., Any] | None = None,
    npu: Callable[..., Any] | None = None,
    ops: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    convert: dict[str, Callable[..., Any]],
    decompose: Callable[..., Any] | dict[str, Callable[..., Any]] | None = None,
    communicates: bool = True,
    start: Start | None = None,
) -> None:
    """Registers the Python parts of op `name` for its overloads.

    Args:
        fake: shapes and dtypes of the results; called with `overload=` too where there is an overload `.ops`, or
            `kernel`.
        alltoall: the kernel of the overload `.alltoall`, for every device, where there is such an overload.
        kernel: that of all overloads, for every device, where overloads are no strategies; called with `overload=`.
        cpu, npu: the kernel on the CPU and on an NPU, where it is not in C++.
        ops: the kernel of the overload `.ops`, for every device, where there is such an overload.
        setup_context, backward: the autograd formula; `backward` is called with `overload=`, the name of the overload
            whose gradient is wanted. None: the results have no gradients.
        convert: the GE converter of each overload (see `deep_ep.npu.ge`).
        decompose: the overload `.alltoall`, or overloads by their names, out of operators that torchair converts.
        communicates: whether ranks talk to each other in it.
        start: of `<name>_start`, which is registered with it, where there is one.
    """
    if alltoall is not None:
        _fragment.impl(f"{name}.alltoall", completing(alltoall), "CompositeExplicitAutograd")
    if cpu is not None:
        _fragment.impl(name, cpu, "CPU")
    if npu is not None:
        _fragment.impl(name, npu, "PrivateUse1")
    if ops is not None:
        _fragment.impl(f"{name}.ops", ops, "CompositeExplicitAutograd")
    packet = getattr(torch.ops.deep_ep, name)

    def prepared_fake(*args: Any, overload: str) -> Any:
        _compile.prepare()
        return fake(*args, overload=overload) if ops is not None or kernel is not None else fake(*args)

    decompositions = decompose if isinstance(decompose, dict) else {"alltoall": decompose} if decompose else {}
    for overload, decomposition in decompositions.items():
        ge.decomposition(getattr(packet, overload), decomposition)
    for overload in packet.overloads():
        op = getattr(packet, overload)
        if kernel is not None:
            noted = profile.noted(op, functools.partial(kernel, overload=overload))
            _fragment.impl(op, noted, "CompositeExplicitAutograd")
        torch.library.register_fake(op, functools.partial(prepared_fake, overload=overload), lib=_fragment)
        if backward is not None:
            formula = functools.partial(backward, overload=overload)
            torch.library.register_autograd(op, formula, setup_context=setup_context, lib=_fragment)
        if communicates:
            _compile.communicating(op)
        if overload in convert:
            ge.converter(op, convert[overload], communicates)

    if start is None:
        return
    assert alltoall is not None
    register(
        f"{name}_start",
        fake=_fake_of_start(name, start.check, started.place_of_group(alltoall)),
        alltoall=started.starting(name, alltoall),
        ops=None if ops is None else started.holding(name, ops),
        setup_context=start.setup_context,
        backward=start.backward,
        convert={overload: ge.starting(converter) for overload, converter in convert.items()},
        decompose={
            overload: ge.starting_of(decomposition)
            for overload, decomposition in decompositions.items()
            if overload == "alltoall"  # that of wait
        },
    )


def _fake_of_start(op: str, check: Callable[..., str | None], group: int) -> Callable[..., Tensor]:
    """That of `<op>_start`, whose argument number `group` is the group."""

    def fake(*arguments: Any, **overload: str) -> Tensor:
        reject(f"{op}_start", check(*arguments[:group], *arguments[group + 1 :], **overload))
        return arguments[0].new_empty((1,), dtype=torch.float64, device="cpu")

    return fake


def reject(name: str, error: str | None) -> None:
    """Raises what is wrong with the arguments of op `name`, if anything."""
    if error:
        raise ValueError(f"deep_ep.{name}: {error}")


def refuse(call: Callable[..., Any], wrong: Callable[..., str | None], *arguments: Any) -> None:
    """Makes the call that says on all ranks what is wrong with its arguments, if this rank can tell. (In graphs, fakes
    have seen them.)
    """
    if not torch.compiler.is_compiling() and (error := wrong(*arguments)):
        call(*arguments)
        raise RuntimeError(f"deep_ep: {error}")


def no_second_derivative(name: str) -> Callable[..., Any]:
    """An autograd formula for a backward op: gradients of gradients are an explicit error."""

    def backward(ctx: Any, *grads: Any, overload: str) -> Any:
        raise RuntimeError(f"deep_ep.{name}: second derivatives are not supported; do not use create_graph=True")

    return backward
