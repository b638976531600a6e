"""Lists of per-expert tensors as one tensor: w [out, in] * E → [E, out, in].  Stacked and flat ones stay."""

from __future__ import annotations

from dataclasses import replace

from moe_fx.binding import Operand
from moe_fx.kernels.layouts.registry import layout


@layout("stacked")
def stacked(operand: Operand) -> Operand:
    """Biases are stacked with their matrices; the norm is one tensor already."""
    return replace(operand, form="stacked") if operand.form == "list" and operand.role != "norm" else operand
