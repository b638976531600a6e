"""Copies for one library's kernels: rows of the table of packed layouts (``packed``) as the weight store holds them.

In: the model's tensors of one operand, however stored.  Out: one tensor [E, ...] in the order of the library, written
expert by expert.  Its operand has the form "packed", which no kernel reads but the one that names the layout
(``FusedMoEExperts.layout_for``).  An operand with nothing to do to it is read in place, unless the row is ``owned``.
Gate and up held apart (w1 and w3) are not joined: such operands stay as they are, and the kernel refuses them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moe_fx.binding import ROUTER_ROLES, Operand, WeightBinding, join_gate_up, split_gate_up, uniform
from moe_fx.kernels.layouts.packed import PackedLayout
from moe_fx.kernels.layouts.registry import Group, check_alike
from moe_fx.kernels.layouts.transforms import span


@dataclass(frozen=True, slots=True, eq=False)  # registered once, and a key of the weight store
class LibraryLayout:
    """row: what is done to each role.  owned: also what could be read in place is copied, as the library remembers
    tensors by their address and only of a copy is it known when it changed."""

    name: str
    row: PackedLayout
    owned: bool = False

    def target(self, operand: Operand) -> Operand:
        """How an operand is held."""
        if operand.role not in self.row.chains:
            return operand
        if self.owned or self.row.copies(operand.role):
            return Operand(operand.role, "packed")
        return Operand(operand.role)

    def binding(self, binding: WeightBinding) -> WeightBinding:
        """The binding of the packed operands."""
        return replace(binding, operands=tuple(map(self.target, binding.operands)))

    def left(self, binding: WeightBinding) -> tuple[str, ...]:
        """Roles that the row does not have, as gate and up held apart.  One number an expert is read where it is."""
        mine = [o.role for o in binding.operands if not o.shared and o.role not in ROUTER_ROLES]
        return tuple(role for role in mine if role not in self.row.chains and not role.endswith("_gscale"))

    def copies(self, operand: Operand) -> bool:
        """A copy of this operand is needed."""
        return self.target(operand) != operand

    def bytes(self, operand: Operand, tensors: list[Tensor], experts: int) -> int:
        """Size of the copy, padding included; 0 where none is needed."""
        if not self.copies(operand):
            return 0
        return self.row.bytes(operand.role, _Canonical(operand, tensors, experts).meta(), experts)

    def write_all(self, groups: list[Group], experts: int, buffers: list[list[Tensor]]) -> list[list[Tensor]]:
        """Every operand, beside the other tensors of the same matrix: codes beside scales, scales beside codes."""
        by_role = {operand.role: group for group in groups for operand in group[:1]}
        return [
            self.write(*group, experts, out, by_role.get(_partner(group[0].role))) if self.copies(group[0]) else []
            for group, out in zip(groups, buffers, strict=True)
        ]

    def write(
        self,
        operand: Operand,
        tensors: list[Tensor],
        experts: int,
        out: list[Tensor],
        partner: Group | None = None,
    ) -> list[Tensor]:
        """The model's tensors of one operand → their copy, expert by expert into ``out`` (empty: a new buffer).

        partner: the other operand of the same matrix, which some steps read.  One dtype and one device for all
        tensors, and sizes that the row takes; ValueError otherwise.  Memory beside the copy: what the steps of one
        expert need.
        """
        check_alike(operand, tensors)
        source, role = _Canonical(operand, tensors, experts), operand.role
        other = None if partner is None else _Canonical(*partner, experts)
        turns = role.endswith("_scale") and operand.order == "interleaved" and other is not None
        if turns and source.meta().shape[0] not in (1, other.meta().shape[0]):
            raise ValueError(f"{operand}: a scale belongs to gate and up rows that lie in turn, and these go apart")
        if not out:
            want = self.row.packed(role, source.meta(), experts, None if other is None else other.meta())
            make = torch.zeros if span(want) > want.numel() else torch.empty  # holes are zero
            flat = make(span(want), dtype=want.dtype, device=tensors[0].device)
            out = [flat.as_strided(want.shape, want.stride())]
        for e in range(experts):
            self.row.pack(role, [source[e]], None if other is None else [other[e]], out=out[0][e : e + 1])
        return out

    def unpack(self, operand: Operand, packed: Tensor, like: list[Tensor], experts: int) -> list[Tensor]:
        """Inverse of ``write``: the shapes and values of the model's tensors; like: those, meta tensors will do."""
        one = _Canonical(operand, like, experts).meta()
        back = [torch.empty_like(t, device=packed.device) for t in like]
        target = uniform(operand, back, experts)
        for e, matrix in enumerate(self.row.unpack(operand.role, packed, one)):
            target[e].copy_(_stored(operand, matrix))
        return back


class _Canonical:
    """The tensors of one operand, expert by expert, gate rows first."""

    def __init__(self, operand: Operand, tensors: list[Tensor], experts: int) -> None:
        self.operand, self.held = operand, uniform(operand, tensors, experts)

    def __getitem__(self, e: int) -> Tensor:
        return _canonical(self.operand, self.held[e])

    def meta(self) -> Tensor:
        """Of one expert, without values."""
        return _canonical(self.operand, self.held[0].to("meta"))


def _partner(role: str) -> str:
    return role.removesuffix("_scale") if role.endswith("_scale") else f"{role}_scale"


def _halved(operand: Operand) -> bool:
    """Its rows are those of gate and up, in an order of the model's."""
    return operand.role.startswith("w13") and operand.order != "gate_up"


def _canonical(operand: Operand, tensor: Tensor) -> Tensor:
    """One expert's tensor with its gate rows first; itself where they are."""
    if not _halved(operand) or tensor.shape[0] == 1:
        return tensor
    if tensor.shape[0] % 2:
        raise ValueError(f"{operand.role} {list(tensor.shape)} cannot be split into gate and up rows")
    return torch.cat([half.movedim(-1, 0) for half in split_gate_up(tensor.movedim(0, -1), operand.order)])


def _stored(operand: Operand, tensor: Tensor) -> Tensor:
    """Inverse of ``_canonical``."""
    if not _halved(operand) or tensor.shape[0] == 1:
        return tensor
    gate, up = tensor.chunk(2)
    return join_gate_up(gate.movedim(0, -1), up.movedim(0, -1), operand.order).movedim(-1, 0)
