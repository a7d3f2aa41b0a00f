"""Whole batches on their way to a device: every tensor of a Movable, and of those inside it."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Movable:
    """A dataclass whose tensors move together; what else it holds stays where it is."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]  # every subclass has them


def to_device(value: T, device: torch.device) -> T:
    """The same there; the copy of what is pinned does not wait."""
    return _each_tensor(value, lambda tensor: tensor.to(device, non_blocking=True))


def pinned(value: T) -> T:
    """The same in memory that a GPU can read by itself."""
    return _each_tensor(value, Tensor.pin_memory)


def pinned_bytes(tensor: Tensor) -> int:
    """That it takes of the host once it is pinned: torch takes powers of two for that."""
    return 1 << (tensor.nbytes - 1).bit_length() if tensor.nbytes else 0


def _each_tensor(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`value` with its tensors changed, also in lists and in what is Movable; of the same type."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, list):
        return [_each_tensor(item, change) for item in value]
    if isinstance(value, Movable):
        names = [field.name for field in dataclasses.fields(value)]
        parts = {name: _each_tensor(getattr(value, name), change) for name in names}
        return dataclasses.replace(value, **parts)
    return value
