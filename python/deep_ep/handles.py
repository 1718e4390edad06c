"""What handles have in common: they are NamedTuples of tensors and sizes, for torch, and read in every way that
programs know.
"""

import copy
from typing import Any, TypeVar

T = TypeVar("T", bound=tuple[Any, ...])


def readable_by_name(handle: type[T]) -> type[T]:
    """Gives the NamedTuple `handle["topk_weights"]` besides `handle[7]` and `handle.topk_weights`.

    KeyError: there is nothing of that name.
    """
    handle.__getitem__ = _item  # type: ignore[method-assign]
    return handle


def _item(handle: Any, key: Any) -> Any:
    if not isinstance(key, str):
        return tuple(handle)[key]
    if key not in handle._fields:
        raise KeyError(f"a {type(handle).__name__} has no {key!r}; it has {', '.join(handle._fields)}")
    return getattr(handle, key)


def copy_in_graph(handle: Any, memo: dict[int, Any]) -> Any:
    """copy.deepcopy of a handle: the copy of weights that need gradients leads back to where they came from."""

    def copied(field: Any) -> Any:
        return field.clone() if field.requires_grad and not field.is_leaf else copy.deepcopy(field, memo)

    return type(handle)(*map(copied, handle))
