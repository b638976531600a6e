"""Products with codes in Triton, forward only: launches are those of ``triton_experts``.

Weights alone as codes ("triton_wna16"): they become numbers in registers, inputs stay.  Inputs rounded too
("triton_fp8", "triton_int8"): codes are multiplied, and a launch before each product rounds its rows.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING

from torch import Tensor

from moe_fx.binding import Experts
from moe_fx.kernels.capability import Scheme
from moe_fx.kernels.experts.triton_experts import CAPABILITY, TritonExperts
from moe_fx.kernels.libraries.capabilities import TRITON_COST
from moe_fx.kernels.libraries.rows import FP8_REFINED, FP8_ROWS, SM75_UP, SM89_UP
from moe_fx.kernels.registry import experts_kernel
from moe_fx.quant import (
    FP8_BLOCK,
    FP8_CHANNEL,
    FP8_TENSOR,
    FP8_TOKEN,
    INT8_CHANNEL,
    INT8_TENSOR,
    INT8_TOKEN,
    MXFP4,
    MXFP8,
    int_group,
)

if TYPE_CHECKING:
    from moe_fx.kernels.triton.launch import Job

SCALES = ("bfloat16", "float16", "float32")
FOUR = frozenset(int_group(4, *of) for of in product((-1, 32, 64, 128), (False, True), SCALES))  # type: ignore[arg-type]
EIGHT = frozenset(int_group(8, *of) for of in product((-1, 32, 64, 128), (False, True), SCALES))  # type: ignore[arg-type]
FLOATS = frozenset(key for key, _ in FP8_REFINED) | {FP8_TENSOR, FP8_CHANNEL, FP8_BLOCK, MXFP8, MXFP4}
WEIGHTS_ONLY: frozenset[Scheme] = frozenset((key, None) for key in FOUR | EIGHT | FLOATS | {INT8_CHANNEL, INT8_TENSOR})
FP8: frozenset[Scheme] = FP8_ROWS | FP8_REFINED | {(FP8_TENSOR, FP8_TENSOR), (FP8_TENSOR, FP8_TOKEN)}
INT8: frozenset[Scheme] = frozenset({(INT8_CHANNEL, INT8_TOKEN)})
CODES = replace(
    CAPABILITY,
    backward="",
    transposed=frozenset({False}),  # codes of four bits lie along the inputs
)
SIXTEEN = frozenset({"float16", "bfloat16"})
ROUNDED = replace(
    CODES,
    archs=SM89_UP,
    dtypes=SIXTEEN,  # with more digits one code that flips is more than they promise
    compute_dtypes=SIXTEEN | {""},
    schemes=FP8,
)
ROUNDED_COST = replace(TRITON_COST, launches=lambda E, T, k: 8)  # two more: each product's inputs are rounded


@experts_kernel("triton_wna16", capability=replace(CODES, schemes=WEIGHTS_ONLY), cost=TRITON_COST, rank=8)
class TritonCodes(TritonExperts):
    def products(
        self, job: Job, x: Tensor, weights: Tensor | None, experts: Experts, hidden: Tensor, out: Tensor
    ) -> None:
        from moe_fx.kernels.triton import launch_quantised

        launch_quantised.up_products(job, x, weights, experts, hidden)
        launch_quantised.down_products(job, hidden, experts, out)


@experts_kernel("triton_fp8", capability=ROUNDED, cost=ROUNDED_COST, rank=8)
class TritonRoundedInputs(TritonCodes):
    """Codes of float8_e4m3fn by such codes."""

    def temporary_shapes(self, M: int, N: int, K: int, topk: int, activation: str) -> tuple[tuple[int, ...], ...]:
        """Besides order and tiles the codes of both inputs, a byte each, and a float32 for 32 of them or more."""
        widths = (K, self.adjust_N_for_activation(N, activation))
        return ((M * topk, 6), *((M * topk, -(-width * 5 // 8) + 2) for width in widths))


@experts_kernel(
    "triton_int8",
    capability=replace(ROUNDED, archs=SM75_UP - {"sm75"}, schemes=INT8),
    cost=ROUNDED_COST,
    rank=8,
)
class TritonInt8(TritonRoundedInputs):
    """Codes of int8 by such codes: sums are int32."""
