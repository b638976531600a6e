"""Matrices as the codes of a scheme: what ``reference.quantise`` makes of the model's floats, whatever their storage.

w [out, in] * E → w codes [E, out, in], w_scale, and w_zero, w_gscale where the key has them, all stacked and [out, in]
Biases and norms stay where they are.  The rows of one w13 keep their order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moe_fx.binding import Operand, Quantised, WeightBinding, uniform
from moe_fx.kernels.layouts.registry import PerOperand, check_alike, scheme_layout
from moe_fx.quant import QuantKey, QuantSpec
from moe_fx.reference.quantise import quantise

QUANTISED = "quantised"
PIECE = 1 << 18  # elements of a matrix that are quantised at a time: their float64 temporaries take up to 15 MB


@scheme_layout(QUANTISED)
@dataclass(frozen=True, slots=True)
class QuantisedLayout(PerOperand):
    """quant: keys of the weights; those of activations are not looked at."""

    quant: QuantSpec

    name = QUANTISED

    def key(self, operand: Operand) -> QuantKey | None:
        """Of the codes of an operand; None for one that stays as it is."""
        match operand.role:
            case "w13" | "w1" | "w3":
                return self.quant.key("w13")
            case "w2":
                return self.quant.key("w2")
            case _:
                return None

    def targets(self, operand: Operand) -> tuple[Operand, ...]:
        """How an operand is held: its codes first."""
        if (key := self.key(operand)) is None:
            return (operand,)
        parts = ["", "_scale", *["_zero"] * key.zero_points, *["_gscale"] * key.global_scale]
        return tuple(Operand(f"{operand.role}{part}", order=operand.order) for part in parts)

    def binding(self, binding: WeightBinding) -> WeightBinding:
        """The binding of the codes and what belongs to them."""
        return replace(binding, operands=tuple(t for o in binding.operands for t in self.targets(o)))

    def copies(self, operand: Operand) -> bool:
        """The operand is a matrix of the scheme."""
        return self.key(operand) is not None

    def bytes(self, operand: Operand, tensors: list[Tensor], experts: int) -> int:
        """Size of the codes, scales, zero points and global scales; 0 for an operand that stays as it is."""
        if (key := self.key(operand)) is None:
            return 0
        return experts * key.nbytes(*uniform(operand, tensors, experts)[0].shape)

    def write(self, operand: Operand, tensors: list[Tensor], experts: int, out: list[Tensor]) -> list[Tensor]:
        """The model's tensors of one operand → the buffers that ``targets`` names, expert by expert.

        One dtype and one device for all tensors; ValueError otherwise, and where rows of codes fill no whole bytes.
        Memory beside the buffers: temporaries of PIECE elements, of one expert where a scale is its whole matrix's.
        """
        check_alike(operand, tensors)
        key, source = self.key(operand), uniform(operand, tensors, experts)
        assert key is not None
        if not out:
            like = _parts(quantise(torch.empty_like(source[0], device="meta"), key))
            out = [source[0].new_empty([experts, *part.shape], dtype=part.dtype) for part in like]
        for e in range(experts):
            for start, rows in _pieces(source[e], key):
                codes, *rest = _parts(quantise(rows, key))
                out[0][e, start : start + len(rows)].copy_(codes)
                for buffer, part in zip(out[1:], rest, strict=True):
                    _place(buffer[e], start // key.group.row, part)
        return out


def _parts(q: Quantised) -> list[Tensor]:
    """codes, scale, zero, global_scale: those there are."""
    return [t for t in (q.codes, q.scale, q.zero, q.global_scale) if isinstance(t, Tensor)]


def _pieces(matrix: Tensor, key: QuantKey) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows) of parts that share no scale."""
    rows, cols = matrix.shape
    whole = key.group.row == -1 or key.global_scale
    step = rows if whole else max(PIECE // (cols * key.group.row), 1) * key.group.row
    for start in range(0, rows, step):
        yield start, matrix[start : start + step]


def _place(buffer: Tensor, first: int, part: Tensor) -> None:
    """Writes scales from row ``first`` on; those of a whole matrix have no rows, or are all of them."""
    (buffer[first : first + len(part)] if part.dim() else buffer).copy_(part)
