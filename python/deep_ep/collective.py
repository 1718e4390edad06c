"""Public calls that ranks make together: one that fails on a rank before its op has been entered there, whatever the
reason, enters as failed, so that its peers raise at once, with that reason, and the group is usable afterwards.
"""

import contextlib
import functools
import inspect
import logging
import sys
import threading
from collections.abc import Callable, Sequence
from types import NoneType, UnionType
from typing import Any, ParamSpec, TypeVar, Union, get_args, get_origin

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch.utils._pytree import tree_leaves

from . import calls, windows
from .arguments import adapted
from .groups import GroupInfo, info_of, runs_on_cpu
from .kernels import alltoall
from .utils import EventOverlap

P = ParamSpec("P")
T = TypeVar("T")

PATIENCE = 5.0
"""Seconds for which a rank that has failed waits for its peers before it says so in the log."""

logger = logging.getLogger("deep_ep")

Ops = Callable[[dict[str, Any]], Sequence[str]]
"""Of the arguments of a call that were given, right or wrong: the ops that it enters, in their order."""


def collective(ops: str | Ops, is_typed: bool = True) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Makes a function, whose `group` is an argument, or a method of Buffer one that fails on all ranks.

    With `is_typed`, arguments of another type than annotated raise ValueError, by name, and those of the right type are
    `adapted`. A call within another is a part of that one. While torch.compile traces, the adapted function is all
    there is.
    """
    ops_of: Ops = (lambda _: (ops,)) if isinstance(ops, str) else ops

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        parameters = inspect.signature(function).parameters
        names = list(parameters)
        kinds = {
            name: kind for name, one in parameters.items() if is_typed and (kind := _kind(one.annotation)) is not None
        }
        by_place = [(name, kinds.get(name)) for name in names]
        # A default need not be looked at.
        by_name = {name: (kind, parameters[name].default) for name, kind in kinds.items()}
        is_method = names[0] == "self"
        adapting = adapted(function) if is_typed else function

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            if torch.compiler.is_compiling():
                return adapting(*args, **kwargs)
            begun = None if calls.is_within() else calls.begin()
            try:
                if is_typed:
                    for (name, kind), value in zip(by_place, args, strict=False):
                        if kind is not None and (wrong := kind(name, value)):
                            raise ValueError(wrong)
                    for name, value in kwargs.items():
                        if name in by_name:
                            kind, default = by_name[name]
                            if value is not default and (wrong := kind(name, value)):
                                raise ValueError(wrong)
                return adapting(*args, **kwargs)
            except Exception as error:
                if begun is not None and calls.is_within():
                    entered, completed = calls.entered(begun)
                    # An op that has been entered has told the others.
                    if completed or entered == 0:
                        given = dict(zip(names, args, strict=False)) | kwargs
                        where = given["self"] if is_method else given.get("group")
                        # Dynamo may run this function without tracing it, and trace what it calls.
                        fail = torch.compiler.disable(_fail) if "torch._dynamo" in sys.modules else _fail
                        fail(where, ops_of, given, entered, str(error))
                raise
            finally:
                if begun is not None:
                    calls.end()

        return call

    return decorate


def _fail(where: Any, ops_of: Ops, given: dict[str, Any], entered: int, reason: str) -> None:
    """Enters the next op of a call as failed, after the first `entered` ones. `where`: a Buffer or a group; where that
    is what is wrong, there is nothing to enter.
    """
    left = ops_of(given)[entered:]
    if not left or _is_traced(given):
        return
    op = left[0]
    reason = reason.removeprefix("deep_ep: ").removeprefix(f"deep_ep.{op}: ") or "failed"
    note = "deep_ep.%s has failed on this rank, which waits for its peers to tell them: %s"
    late = threading.Timer(PATIENCE, logger.error, (note, op, reason))
    late.daemon = True
    late.start()
    with contextlib.suppress(Exception):  # which is what peers raise
        info: GroupInfo = where._live() if "self" in given else info_of(where)
        strategy = (info.low_latency if op.startswith("low_latency") else info.normal).value
        # Collectives do not end within torch.func's transforms, which are the same on all ranks.
        if strategy == "alltoall" and not torch._C._are_functorch_transforms_active():
            alltoall.reject(op, info.name, reason)
        elif strategy == "default" and runs_on_cpu(info, tree_leaves(list(given.values()))):
            windows.agree(op, info.name, reason, torch.float32, ())
    late.cancel()


def _is_traced(given: dict[str, Any]) -> bool:
    """Whether there are no values, so that other ranks are not in this call."""
    proxies = sys.modules.get("torch.fx.experimental.proxy_tensor")
    if proxies is not None and proxies.get_proxy_mode() is not None:
        return True
    return detect_fake_mode(tree_leaves(list(given.values()))) is not None


# What a type allows


Kind = Callable[[str, Any], str | None]
"""(name, value) -> what is wrong with its type, or None."""


def _got(value: Any) -> str:
    return type(value).__name__


_dense = torch.strided


def _tensor(name: str, value: Any) -> str | None:
    if type(value) is Tensor and value.layout is _dense and not value.is_meta:
        return None
    if not isinstance(value, Tensor):
        return f"{name} must be a torch.Tensor, got {_got(value)}"
    if type(value) is Tensor or type(value) is torch.nn.Parameter:
        if value.layout is not _dense:
            return f"{name} must be a dense tensor, got {value.layout}"
        if value.is_meta:
            return f"{name} must have values, got a tensor on the device meta"
    return None


def _integer(name: str, value: Any) -> str | None:
    if isinstance(value, int) or (hasattr(value, "__index__") and not isinstance(value, Tensor)):
        return None
    return f"{name} must be an int, got {value if isinstance(value, float) else _got(value)}"


def _number(name: str, value: Any) -> str | None:
    if isinstance(value, int | float) or (hasattr(value, "__float__") and not isinstance(value, Tensor)):
        return None
    return f"{name} must be a number, got {_got(value)}"


def _event(name: str, value: Any) -> str | None:
    return None if hasattr(value, "event") else f"{name} must be an EventOverlap, got {_got(value)}"


def _fields(of: type, is_strict: bool) -> Kind:
    """Those of the NamedTuple `of`: an object that has them, or, unless is_strict, as many values in a sequence."""
    fields = [(field, _kind(annotation)) for field, annotation in of.__annotations__.items()]
    article = "an" if of.__name__[0] in "AEIOU" else "a"

    def wrong(name: str, value: Any) -> str | None:
        if isinstance(value, of):
            parts: Sequence[Any] = value  # type: ignore[assignment]
        elif not is_strict and isinstance(value, tuple | list) and len(value) == len(fields):
            parts = value
        elif all(hasattr(value, field) for field, _ in fields):
            parts = [getattr(value, field) for field, _ in fields]
        else:
            length = f" of {len(value)}" if isinstance(value, tuple | list) else ""
            return f"{name} must be {article} {of.__name__}, got {_got(value)}{length}"
        for (field, kind), part in zip(fields, parts, strict=True):
            if kind is not None and (text := kind(field, part)):
                return f"{name}.{text}"
        return None

    return wrong


def _pair(name: str, value: Any) -> str | None:
    if not isinstance(value, tuple) or len(value) != 2:
        length = f" of {len(value)}" if isinstance(value, tuple | list) else ""
        return f"{name} must be two tensors in a tuple, got {_got(value)}{length}"
    return _tensor(f"{name}[0]", value[0]) or _tensor(f"{name}[1]", value[1])


def _either(kinds: list[Kind], may_be_none: bool) -> Kind:
    def wrong(name: str, value: Any) -> str | None:
        if value is None and may_be_none:
            return None
        texts = []
        for kind in kinds:
            text = kind(name, value)
            if text is None:
                return None
            texts.append(text)
        # What fits but for a part of it is what was meant.
        for text in texts:
            if not text.startswith(f"{name} must be ") or "dense" in text:
                return text
        others = " or ".join(text.removeprefix(f"{name} must be ").split(", got ")[0] for text in texts)
        return f"{name} must be {others}, got {texts[0].split(', got ')[1]}"

    return wrong


def _kind(annotation: Any, is_strict: bool = True) -> Kind | None:
    """What tells whether a value is as annotated; None: the function itself looks at it."""
    if annotation is Tensor:
        return _tensor
    if annotation is int:
        return _integer
    if annotation is float:
        return _number
    if annotation is EventOverlap:
        return _event
    if annotation == tuple[Tensor, Tensor]:
        return _pair
    if isinstance(annotation, type) and issubclass(annotation, tuple) and hasattr(annotation, "_fields"):
        return _fields(annotation, is_strict)
    if get_origin(annotation) in (Union, UnionType):
        options = [one for one in get_args(annotation) if one is not NoneType]
        kinds = [_kind(one, len(options) == 1) for one in options]
        known = [kind for kind in kinds if kind is not None]
        if len(known) == len(kinds):
            return (
                known[0]
                if len(known) == 1 and len(options) == len(get_args(annotation))
                else _either(known, len(options) < len(get_args(annotation)))
            )
    return None
