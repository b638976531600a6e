"""The registry of weight layouts: how a packed copy of one operand is held.

A layout is one file with one ``@layout``.  It decides per operand, so a block with a stacked w13 and a list of w2 is
copied only where it has to be.  What a copy holds is again an ``Operand``: kernels read it like a model's own tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from moe_fx.binding import Operand, WeightBinding, uniform


@dataclass(frozen=True, slots=True)
class Layout:
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
        if len({(t.dtype, t.device) for t in tensors}) != 1:
            raise ValueError(f"the {len(tensors)} tensors of {operand} differ in dtype or device")
        source, target = uniform(operand, tensors, experts), self.target(operand)
        if out is None:
            first, shape = source[0], list(source[0].shape)
            out = first.new_empty([experts, *(reversed(shape) if target.transposed else shape)])
        packed = uniform(target, [out], experts)
        for e in range(experts):
            packed[e].copy_(source[e])
        return out

    def unpack(self, operand: Operand, packed: Tensor, experts: int) -> list[Tensor]:
        """Inverse of ``pack``: the shapes and values of the model's tensors, views of the copy where strides allow."""
        whole = uniform(self.target(operand), [packed], experts)
        assert isinstance(whole, Tensor)
        whole = whole.transpose(-2, -1) if operand.transposed and whole.dim() == 3 else whole
        if operand.form == "list":
            return list(whole.unbind(0))
        return [whole.flatten(0, 1) if operand.form == "flat" else whole]


LAYOUTS: dict[str, Layout] = {}


def layout(name: str) -> Callable[[Callable[[Operand], Operand]], Callable[[Operand], Operand]]:
    """Registers the decorated ``target`` function as a layout; a second registration of a name is an error."""

    def register(target: Callable[[Operand], Operand]) -> Callable[[Operand], Operand]:
        if name in LAYOUTS or name == "view":
            raise ValueError(f"layout {name!r} is registered twice")
        LAYOUTS[name] = Layout(name, target)
        return target

    return register


def find_layout(name: str) -> Layout:
    """The layout of that name; KeyError lists the known ones."""
    if name not in LAYOUTS:
        raise KeyError(f"no layout {name!r}; known: {', '.join(['view', *sorted(LAYOUTS)])}")
    return LAYOUTS[name]
