"""The registry of weight transforms: single steps from a model's tensor to what one library's kernel reads.

A transform is one file with one ``@transform``: a frozen object that turns ONE expert's tensor (a matrix [out, in] of
floats or codes, its scales, its bias) into another, so that packing streams expert by expert.  It runs on meta tensors
too: shapes, strides and bytes of a packed copy come from packing a meta tensor, never from a second formula.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import ClassVar, TypeVar

import torch
from torch import Tensor


class Transform(ABC):
    """One step.  Tensors that it cannot take are a ValueError that says which sizes it needs.

    name: under which it is registered.
    paired: it reads the expert's other tensor of the same matrix too: a step on codes their scales, a step on scales
    the codes.  Both are as the model holds them, so paired steps stand first in a chain.
    """

    __slots__ = ()
    name: ClassVar[str]
    paired: ClassVar[bool] = False

    @property
    def loss(self) -> str:
        """What ``unpack`` cannot bring back; "" where ``unpack(pack(t), like=t)`` is t bit for bit."""
        return ""

    @abstractmethod
    def pack(self, tensor: Tensor, partner: Tensor | None = None) -> Tensor:
        """One expert's tensor → the packed one: a new tensor, or a view where the memory stays as it is."""

    @abstractmethod
    def unpack(self, packed: Tensor, like: Tensor) -> Tensor:
        """Inverse of ``pack``, or the nearest to it where there is a loss.  like: shape and dtype of the tensor that
        was packed; a meta tensor will do."""

    def fit(self, tensors: Iterable[Tensor]) -> Transform:
        """The step with what it needs to know of all experts together; ``tensors``: theirs, as the model holds them."""
        return self


TRANSFORMS: dict[str, type[Transform]] = {}
T = TypeVar("T", bound=type[Transform])


def transform(name: str) -> Callable[[T], T]:
    """Registers the decorated class under ``name``; a second registration of a name is an error."""

    def register(cls: T) -> T:
        if name in TRANSFORMS:
            raise ValueError(f"transform {name!r} is registered twice")
        cls.name = name
        TRANSFORMS[name] = cls
        return cls

    return register


def find_transform(name: str) -> type[Transform]:
    """The transform of that name; KeyError lists the known ones."""
    if name not in TRANSFORMS:
        raise KeyError(f"no transform {name!r}; known: {', '.join(sorted(TRANSFORMS))}")
    return TRANSFORMS[name]


def need(step: Transform, tensor: Tensor, **multiples: int) -> None:
    """ValueError unless the tensor's ``rows`` (first size) and ``cols`` (last size) are multiples of these."""
    sizes = {"rows": tensor.shape[0], "cols": tensor.shape[-1]}
    for what, multiple in multiples.items():
        if sizes[what] % multiple:
            raise ValueError(
                f"{step.name} needs {what} in multiples of {multiple}, and {list(tensor.shape)} has {sizes[what]}: "
                "pad first, or choose a kernel without this layout"
            )


def need_partner(step: Transform, partner: Tensor | None) -> Tensor:
    """The partner; ValueError where none was given."""
    if partner is None:
        raise ValueError(f"{step.name} reads the codes and the scales of a matrix together: give both")
    return partner


def need_dtype(step: Transform, tensor: Tensor, *dtypes: torch.dtype) -> None:
    """ValueError unless the tensor has one of these dtypes."""
    if tensor.dtype not in dtypes:
        raise ValueError(f"{step.name} takes {', '.join(map(str, dtypes))}, not {tensor.dtype}")


def has_data(tensor: Tensor) -> bool:
    """Checks of values are possible; they are left out on meta tensors."""
    return not tensor.is_meta


def span(tensor: Tensor) -> int:
    """Elements from the first to the end of the last stride: those of the storage, holes included."""
    return max((size * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)), default=1)
