"""The registry of weight layouts: how a packed copy of one operand is held.

A layout is one file with one ``@layout``.  It decides per operand, so a block with a stacked w13 and a list of w2 is
copied only where it has to be.  What a copy holds is again an ``Operand``: kernels read it like a model's own tensor.
A layout that holds codes has ``@scheme_layout``: it is made for a ``QuantSpec``, and one operand becomes several.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from moe_fx.binding import Operand, WeightBinding, uniform
from moe_fx.quant import UNQUANTISED, QuantSpec

Group = tuple[Operand, list[Tensor]]  # one role, and the model's tensors that hold it


class Packing(Protocol):
    """What the weight store asks of a layout."""

    @property
    def name(self) -> str: ...

    def binding(self, binding: WeightBinding) -> WeightBinding:
        """The binding of the packed operands: the buffers of one operand stand in its place."""

    def copies(self, operand: Operand) -> bool:
        """A copy of this operand is needed; otherwise it is read where it is."""

    def write_all(self, groups: list[Group], experts: int, buffers: list[list[Tensor]]) -> list[list[Tensor]]:
        """The model's operands → their copies, in the buffers of each (empty: new ones); none for an operand that is
        read where it is."""


class PerOperand(ABC):
    """A layout that packs each operand by itself."""

    __slots__ = ()

    @abstractmethod
    def copies(self, operand: Operand) -> bool: ...

    @abstractmethod
    def write(self, operand: Operand, tensors: list[Tensor], experts: int, out: list[Tensor]) -> list[Tensor]:
        """The model's tensors of one operand → their copy, in the buffers ``out`` (empty: new ones)."""

    def write_all(self, groups: list[Group], experts: int, buffers: list[list[Tensor]]) -> list[list[Tensor]]:
        """As ``Packing`` says."""
        pairs = zip(groups, buffers, strict=True)
        return [self.write(o, tensors, experts, out) if self.copies(o) else [] for (o, tensors), out in pairs]


class LibraryPacking(Packing, Protocol):
    """A layout that only those kernels read that name it."""

    def left(self, binding: WeightBinding) -> tuple[str, ...]:
        """Roles that it cannot pack, and that the kernels would not read."""


@dataclass(frozen=True, slots=True)
class Layout(PerOperand):
    """target(operand) → how the copy is held; equal to ``operand``: it is read where it is, nothing is copied."""

    name: str
    target: Callable[[Operand], Operand]

    def binding(self, binding: WeightBinding) -> WeightBinding:
        """The binding of the packed operands."""
        return WeightBinding(tuple(self.target(operand) for operand in binding.operands))

    def copies(self, operand: Operand) -> bool:
        """A copy of this operand is needed."""
        return self.target(operand) != operand

    def bytes(self, operand: Operand, tensors: list[Tensor]) -> int:
        """Size of the copy; 0 where none is needed."""
        return sum(t.numel() * t.element_size() for t in tensors) if self.copies(operand) else 0

    def pack(self, operand: Operand, tensors: list[Tensor], experts: int, out: Tensor | None = None) -> Tensor:
        """The model's tensors of one operand → their copy, expert by expert into ``out`` (None: a new buffer).

        One dtype and one device for all tensors; ValueError otherwise.  Needs no memory beside the copy.
        """
        check_alike(operand, tensors)
        source, target = uniform(operand, tensors, experts), self.target(operand)
        if out is None:
            first, shape = source[0], list(source[0].shape)
            out = first.new_empty([experts, *(reversed(shape) if target.transposed else shape)])
        packed = uniform(target, [out], experts)
        for e in range(experts):
            packed[e].copy_(source[e])
        return out

    def write(self, operand: Operand, tensors: list[Tensor], experts: int, out: list[Tensor]) -> list[Tensor]:
        """``pack`` for the weight store: one buffer."""
        return [self.pack(operand, tensors, experts, out[0] if out else None)]

    def unpack(self, operand: Operand, packed: Tensor, experts: int) -> list[Tensor]:
        """Inverse of ``pack``: the shapes and values of the model's tensors, views of the copy where strides allow."""
        whole = uniform(self.target(operand), [packed], experts)
        assert isinstance(whole, Tensor)
        whole = whole.transpose(-2, -1) if operand.transposed and whole.dim() == 3 else whole
        if operand.form == "list":
            return list(whole.unbind(0))
        return [whole.flatten(0, 1) if operand.form == "flat" else whole]


def check_alike(operand: Operand, tensors: list[Tensor]) -> None:
    """ValueError where the tensors of one operand differ in dtype or device."""
    if len({(t.dtype, t.device) for t in tensors}) != 1:
        raise ValueError(f"the {len(tensors)} tensors of {operand} differ in dtype or device")


LAYOUTS: dict[str, Layout] = {}  # of the model's floats
SCHEME_LAYOUTS: dict[str, Callable[[QuantSpec], Packing]] = {}  # of their codes
LIBRARY_LAYOUTS: dict[str, LibraryPacking] = {}


def layout(name: str) -> Callable[[Callable[[Operand], Operand]], Callable[[Operand], Operand]]:
    """Registers the decorated ``target`` function as a layout; a second registration of a name is an error."""

    def register(target: Callable[[Operand], Operand]) -> Callable[[Operand], Operand]:
        _check_free(name)
        LAYOUTS[name] = Layout(name, target)
        return target

    return register


def scheme_layout(name: str) -> Callable[[type[Packing]], type[Packing]]:
    """Registers the decorated class, which is made with a QuantSpec; a second registration of a name is an error."""

    def register(made: type[Packing]) -> type[Packing]:
        _check_free(name)
        SCHEME_LAYOUTS[name] = made
        return made

    return register


def library_layout(made: LibraryPacking) -> LibraryPacking:
    """Registers a layout of one library; a second registration of a name is an error."""
    _check_free(made.name)
    LIBRARY_LAYOUTS[made.name] = made
    return made


def _check_free(name: str) -> None:
    if name in LAYOUTS or name in SCHEME_LAYOUTS or name in LIBRARY_LAYOUTS or name == "view":
        raise ValueError(f"layout {name!r} is registered twice")


def find_layout(name: str, quant: QuantSpec = UNQUANTISED) -> Packing:
    """The layout of that name, for operands held as ``quant`` says; KeyError lists the known ones."""
    if name in SCHEME_LAYOUTS:
        return SCHEME_LAYOUTS[name](quant)
    if name in LIBRARY_LAYOUTS:
        return LIBRARY_LAYOUTS[name]
    if name not in LAYOUTS:
        known = [*sorted(LAYOUTS), *sorted(SCHEME_LAYOUTS), *sorted(LIBRARY_LAYOUTS)]
        raise KeyError(f"no layout {name!r}; known: {', '.join(['view', *known])}")
    return LAYOUTS[name]
