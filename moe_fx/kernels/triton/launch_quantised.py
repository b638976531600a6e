"""The launches of a forward over codes: each product, and before it the rounding of its rows where the spec has one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
import triton
from torch import Tensor

from moe_fx.binding import Experts, Matrices, Quantised, Vectors
from moe_fx.kernels.triton import operands
from moe_fx.kernels.triton.codes import Bank, bank
from moe_fx.kernels.triton.configs import Config
from moe_fx.kernels.triton.launch import DTYPES, Job
from moe_fx.kernels.triton.operands import Rows
from moe_fx.kernels.triton.quantised import down_codes_kernel, round_kernel, up_codes_kernel
from moe_fx.quant import MAX_OF, QuantKey
from moe_fx.reference.experts import rounding_of

WIDE = 1024  # numbers that one program rounds where scales are of groups
_CODES = {"float8_e4m3fn": torch.float8_e4m3fn, "int8": torch.int8}


@dataclass(frozen=True, slots=True)
class Inputs:
    """Of a product.  scales: where rows are codes.  share: routed rows that have one of them together."""

    rows: Rows
    scales: Rows | None
    share: int


def up_products(job: Job, x: Tensor, weights: Tensor | None, experts: Experts, hidden: Tensor) -> None:
    """hidden [rows, I], in order of rows.  weights [T, k]: of the routing, where they are on the input."""
    e, key = job.spec.expert, job.spec.quant.key("a1")
    inputs = Inputs(operands.rows(x), None, job.routed.top_k)
    if key is not None:
        inputs, weights = rounded(job, x, weights, experts, "a1", key), None
    gate, up = _gate_and_up(job, experts, key is not None)
    job.start(
        up_codes_kernel,
        _config(job.up, experts.up[0], key, 1 + e.gated),
        e.intermediate,
        e.hidden,
        inputs.rows,
        inputs.scales,
        None if weights is None else operands.rows(weights),
        operands.rows(hidden),
        inputs.share,
        gate,
        up,
        *job.params,
        ACT=e.act,
        GATED=e.gated,
        PAIRED=e.gated and up is None,
    )


def down_products(job: Job, hidden: Tensor, experts: Experts, out: Tensor) -> None:
    """out [rows, H] by flat position."""
    e, key = job.spec.expert, job.spec.quant.key("a2")
    inputs = Inputs(operands.rows(hidden), None, 1)
    if key is not None:
        inputs = rounded(job, hidden, None, experts, "a2", key)
    job.start(
        down_codes_kernel,
        _config(job.down, experts.down, key),
        e.hidden,
        e.intermediate,
        inputs.rows,
        inputs.scales,
        operands.rows(out),
        bank(_codes(experts.down), experts.down_bias, typed=key is not None),
    )


def rounded(
    job: Job, x: Tensor, weights: Tensor | None, experts: Experts, operand: Literal["a1", "a2"], key: QuantKey
) -> Inputs:
    """x of the up product [T, H], of the down product [rows, I], as codes with a scale for each group of each row."""
    rounding = rounding_of(operand, experts, job.spec)
    given, routed, cols = rounding.scale, job.routed, x.shape[1]
    apart = operand == "a1" and (weights is not None or rounding.by_expert)
    count = x.shape[0] * routed.top_k if apart else x.shape[0]
    size = triton.next_power_of_2(cols) if key.group.col == -1 else key.group.col
    groups = triton.cdiv(cols, size)
    together = min(max(WIDE // size, 1), triton.next_power_of_2(groups))
    codes = x.new_empty((count, cols), dtype=_CODES[key.dtype])
    scales = x.new_empty((count, groups), dtype=torch.float32)
    round_kernel[(count, triton.cdiv(groups, together))](
        operands.rows(x),
        None if weights is None else operands.rows(weights),
        given,
        operands.rows(codes.view(torch.uint8) if key.dtype == "float8_e4m3fn" else codes),
        operands.rows(scales),
        *(routed, cols, groups),
        EACH=rounding.by_expert,
        NAME=key.dtype,
        LIMIT=MAX_OF[key.dtype],
        APART=apart,
        HOW="apart" if operand == "a1" else job.how,
        DTYPE=DTYPES[job.dtype],
        COUNT=together,
        SIZE=size,
        num_warps=8 if size > WIDE else 4,
    )
    share = routed.top_k if operand == "a1" and not apart else 1
    return Inputs(operands.rows(codes), operands.rows(scales), share)


def _config(config: Config, matrices: Matrices, inputs: QuantKey | None, sums: int = 1) -> Config:
    """Of codes that are multiplied a tile takes as many bytes as elsewhere, and lies within one group.  sums: that a
    program keeps; beside codes two wide ones would not fit in registers."""
    if sums > 1:
        config = replace(config, columns=min(64, config.columns))
    if inputs is None:
        return config
    group, inner = _codes(matrices).key.group.col, min(128, 2 * config.inner)
    return replace(config, inner=inner if group == -1 else min(inner, group))


def _gate_and_up(job: Job, experts: Experts, typed: bool) -> tuple[Bank, Bank | None]:
    """Where gate and up rows lie; those in turn stay together, as gate."""
    members = [_codes(matrices) for matrices in experts.up]
    biases: tuple[Vectors | None, ...] = experts.up_bias or (None,) * len(members)
    if len(members) == 2:
        return bank(members[0], biases[0], typed=typed), bank(members[1], biases[1], typed=typed)
    if not job.spec.expert.gated or experts.order == "interleaved":
        return bank(members[0], biases[0], typed=typed), None
    first = (0, job.spec.expert.intermediate)
    gate, up = first if experts.order == "gate_up" else first[::-1]
    return bank(members[0], biases[0], gate, typed), bank(members[0], biases[0], up, typed)


def _codes(matrices: Matrices) -> Quantised:
    assert isinstance(matrices, Quantised)  # its capability lists nothing else
    return matrices
