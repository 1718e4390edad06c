"""DEBUG_MODE=ON: the calls of a Buffer's methods in the log: shapes, dtypes and numbers, no values of tensors."""

import functools
import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger("deep_ep")


def start(buffer: Any, group: str) -> None:
    """Has the methods of `buffer` log what they are called with and what they return, outside of compiled code.

    Where no logging is set up, the lines go to stderr.
    """
    logger.setLevel(logging.DEBUG)
    if not logger.hasHandlers():
        logger.addHandler(logging.StreamHandler())
    where = f"[rank {buffer.rank} of {buffer.group_size}, group {group}]"
    for name, _ in inspect.getmembers(type(buffer), inspect.isfunction):
        if not name.startswith("_"):
            setattr(buffer, name, _logged(getattr(buffer, name), where))


def _logged(method: Callable[..., Any], where: str) -> Callable[..., Any]:
    signature = inspect.signature(method)

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return method(*args, **kwargs)
        given = signature.bind(*args, **kwargs).arguments
        text = ", ".join(f"{name}={described(value)}" for name, value in given.items())
        logger.debug("%s %s(%s)", where, method.__name__, text)
        result = method(*args, **kwargs)
        logger.debug("%s %s -> %s", where, method.__name__, described(result))
        return result

    return call


def described(value: Any) -> str:
    """The value in short: of a tensor its dtype and shape, of a list its length."""
    if isinstance(value, Tensor):
        return f"{value.dtype}{list(value.shape)}".removeprefix("torch.")
    if isinstance(value, tuple):
        return f"({', '.join(described(one) for one in value)})"
    if isinstance(value, list):
        return f"list of {len(value)}"
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)
    return type(value).__name__
