"""vLLM's Marlin products: weights of 4 or 8 bits, activations as they are.

x, ids → rows by expert in blocks of ``block`` (``blocks``) → up products → activation → down products, weighted → sum.
Not run: no GPU here.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_fx.binding import Experts
from moe_fx.kernels.experts.rows import activate
from moe_fx.kernels.libraries.adapter import RoutedExperts, Routing, adapter, biases_of, packed, scaled, scheme_of
from moe_fx.kernels.libraries.vllm_cutlass import ops
from moe_fx.quant import FP8_BLOCK, FP8_CHANNEL, FP8_TENSOR, MXFP4, MXFP8, int_group
from moe_fx.spec import MoESpec

BLOCKS = (8, 16, 32, 48, 64)
FULL = 0.9  # rows of an expert to rows of a block: above it the next larger block is better
WORKSPACE = 4  # int32 of zeros for each multiprocessor: locks, zero again after a call
ANY = -1  # the kernel chooses
WEIGHTS = frozenset((key, None) for key in (FP8_TENSOR, FP8_CHANNEL, FP8_BLOCK, MXFP8, MXFP4)) | frozenset(
    (int_group(bits, group), None) for bits in (4, 8) for group in (-1, 32, 64, 128)
)


def type_id(*, exponent: int = 0, mantissa: int = 0, bias: int = 0, nan: int = 1) -> int:
    """How vLLM numbers a type of numbers: its fields side by side, of 8, 8, 1 (signed), 32, 1 (finite only), 8 bits.

    Floats are signed and finite here, integers neither.  nan: 0 none, 1 as IEEE 754, 2 all ones.
    """
    is_float = int(exponent > 0)
    return exponent | mantissa << 8 | is_float << 16 | bias << 17 | is_float << 49 | nan << 50


E4M3 = type_id(exponent=4, mantissa=3, nan=2)
TYPES = {  # by the first word of a scheme
    "fp8": E4M3,
    "mxfp8": E4M3,
    "mxfp4": type_id(exponent=2, mantissa=1, nan=0),
    "int4": type_id(mantissa=4, bias=8),
    "int8": type_id(mantissa=8, bias=128),
}


class Blocks(NamedTuple):
    """rows int32 [M]: flat positions of routed rows in blocks of one expert, S (none) where a block is not full.
    experts int32 [M / block].  used int32 [1]: rows of blocks that there are; later ones are undefined."""

    rows: Tensor
    experts: Tensor
    used: Tensor


class Both(NamedTuple):
    """What both products get: weights float32 [T, k], locks int32, rows of a block, number of the type of weights."""

    found: Blocks
    weights: Tensor
    locks: Tensor
    block: int
    type_id: int


def blocks(ids: Tensor, experts: int, block: int) -> Blocks:
    """ids int32 [T, k], every one an expert's.  Waits for no device: M is bounded by the sizes alone."""
    expert, order = ids.reshape(-1).sort(stable=True)
    rows = ids.numel()
    bins = torch.arange(experts, device=ids.device, dtype=ids.dtype)
    ends = torch.searchsorted(expert, bins, right=True)
    counts = ends.diff(prepend=ends.new_zeros(1))
    room = (counts + block - 1) // block * block
    after = room.cumsum(0)
    most = -(-rows // block) + min(rows, experts)
    places = (after - room)[expert.long()] + torch.arange(rows, device=ids.device) - (ends - counts)[expert.long()]
    found = torch.full((most * block,), rows, dtype=torch.int32, device=ids.device)
    found[places] = order.int()
    starts = torch.arange(most, device=ids.device) * block
    of = torch.searchsorted(after, starts, right=True).clamp(max=experts - 1)
    return Blocks(found, of.int(), after[-1:].int())


def block_size(rows: int, experts: int) -> int:
    """Rows of a block for so many routed rows."""
    return next((b for b in BLOCKS if rows / experts / b < FULL), BLOCKS[-1])


@adapter("marlin", rank=18, schemes=WEIGHTS, dtypes=frozenset({"bfloat16"}), weight_on=frozenset({"output"}))
class MarlinExperts(RoutedExperts):
    @classmethod
    def layout_for(cls, spec: MoESpec) -> str:
        return packed("marlin", scheme_of(spec))

    def call(self, x: Tensor, routed: Routing, experts: Experts, spec: MoESpec) -> Tensor:
        gemm = ops("_moe_C", "moe_wna16_marlin_gemm").moe_wna16_marlin_gemm
        e, k = spec.expert, spec.top_k
        found = blocks(routed.ids, e.experts, size := block_size(routed.ids.numel(), e.experts))
        lanes = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
        locks = torch.zeros(WORKSPACE * lanes, dtype=torch.int32, device=x.device)
        b13, b2 = biases_of(experts, ((e.experts, 2 * e.intermediate), (e.experts, e.hidden)), x.dtype)
        both = Both(found, routed.weights, locks, size, TYPES[scheme_of(spec).split("_")[0]])
        up = x.new_empty(len(x) * k, 2 * e.intermediate)
        gemm(*arguments(x, up, scaled(experts.up[0]), b13, both, times=k, weighted=False))
        hidden = activate([up], experts, e).contiguous()
        out = x.new_empty(len(x) * k, e.hidden)
        gemm(*arguments(hidden, out, scaled(experts.down), b2, both, times=1, weighted=True))
        return out.view(len(x), k, -1).sum(1)


def arguments(
    a: Tensor,
    out: Tensor,
    weights: tuple[Tensor, Tensor],
    bias: Tensor | None,
    both: Both,
    times: int,
    weighted: bool,
) -> tuple[Any, ...]:
    """Of ``_moe_C::moe_wna16_marlin_gemm``: a [m, in] → out [m * times, out].

    times: routed rows of a row of ``a``.  weighted: results are multiplied by their routing weights.
    """
    codes, scales = weights
    found, routing_weights, locks, block, type_ = both
    none = None
    atomic, wide, float_zero = False, True, False  # sums in float32, without atomics
    return (
        *(a, out, codes, bias, scales, none, none, none, locks, found.rows, found.experts, found.used),
        *(routing_weights, block, times, weighted, type_, len(a), out.shape[1], a.shape[1]),
        *(atomic, wide, float_zero, ANY, ANY, ANY),
    )
