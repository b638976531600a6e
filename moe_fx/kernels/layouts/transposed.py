"""Matrices as one stacked tensor with in and out swapped, [E, in, out], so that ``x @ W`` reads along rows."""

from __future__ import annotations

from dataclasses import replace

from moe_fx.binding import Operand
from moe_fx.kernels.layouts.registry import layout
from moe_fx.kernels.layouts.stacked import stacked


@layout("transposed")
def transposed(operand: Operand) -> Operand:
    """A matrix that is stored so and stacked stays in place; lists of biases become stacked."""
    if operand.role == "norm" or operand.role.endswith("_bias"):
        return stacked(operand)
    if operand.transposed and operand.form != "list":
        return operand
    return replace(operand, form="stacked", transposed=True)
