"""The tables of all schemes together: which belongs to a scheme, the place of a kernel in it, and what can run here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from moe_fx.hardware import Device
from moe_fx.kernels.capability import Scheme
from moe_fx.kernels.config import FusedMoEConfig, FusedMoEParallelConfig, RoutingMethodType
from moe_fx.kernels.libraries import LIBRARIES
from moe_fx.kernels.registry import KERNELS
from moe_fx.oracle.backends import Candidates, Oracle, kernel_reasons
from moe_fx.oracle.conditions import Asked
from moe_fx.oracle.fp8 import FP8
from moe_fx.oracle.int8 import INT8
from moe_fx.oracle.int_wna16 import INT_WNA16
from moe_fx.oracle.mxfp4 import MX4
from moe_fx.oracle.mxfp8 import MX8
from moe_fx.oracle.nvfp4 import NV
from moe_fx.oracle.unquantized import UNQUANTIZED
from moe_fx.oracle.w4a8 import W4A8
from moe_fx.reasons import Reject
from moe_fx.spec import MoESpec

ORACLES: dict[str, Oracle[Any]] = {o.name: o for o in (UNQUANTIZED, FP8, MX8, INT8, INT_WNA16, MX4, NV, W4A8)}


def oracle_for(scheme: Scheme) -> Oracle[Any] | None:
    """The table of a scheme; None where there is none (OCP's mxfp6, say)."""
    weights, inputs = scheme
    if weights is None:
        return UNQUANTIZED if inputs is None else None
    match weights.dtype, weights.scale, None if inputs is None else inputs.dtype:
        case "float8_e4m3fn", "float8_e8m0fnu", _:
            return MX8
        case "float8_e4m3fn", _, _:
            return FP8
        case "float4_e2m1", "float8_e8m0fnu", _:
            return MX4
        case "float4_e2m1", "float8_e4m3fn", _:
            return NV
        case "int8", _, "int8":
            return INT8
        case "int8" | "int4", _, None:
            return INT_WNA16
        case "int4", _, "float8_e4m3fn":
            return W4A8
    return None


def places(spec: MoESpec, dtype: torch.dtype, device: Device, order: str = "seed") -> dict[str, int]:
    """Kernel → its place in the order of the block's scheme on that device; those that the table leaves out are not in
    it.  dtype: of x."""
    scheme = spec.quant.key("w13"), spec.quant.key("a1")
    oracle = oracle_for(scheme)
    if oracle is None:
        return {}
    asked = Asked(FusedMoEConfig.of(spec, dtype), device, scheme)
    rows = [oracle.backend(member) for member in oracle.ordered(asked, order)]
    here = [row for row in rows if row.where is None or row.where.holds(asked)]
    return {name: place for place, name in enumerate(dict.fromkeys(n for row in here for n in row.kernels))}


class Entry(NamedTuple):
    """scheme: the table's name.  backend: "" for a kernel that no table names.  kernel: "" where a plugin brings it.
    reasons: none, it can run."""

    scheme: str
    backend: str
    kernel: str
    reasons: tuple[Reject, ...]


BATCHES = FusedMoEParallelConfig.make(dp_size=2, use_ep=True, all2all_backend="deepep_low_latency")
USUAL = FusedMoEConfig(
    8, 2, 1024, 8, routing_method=RoutingMethodType.RenormalizeNaive, intermediate_size=512, in_dtype=torch.bfloat16
)


def survey(device: Device, candidates: Candidates | None = None) -> Iterator[Entry]:
    """Every backend with each of its kernels and what speaks against it on ``device``, then kernels that no table has.

    The layer is USUAL; a kernel is asked for the first scheme of its table that it has, and one for batches with
    batches.  candidates: the kernels that there are; None: those registered in this process.
    """
    known: Candidates = {**LIBRARIES, **KERNELS} if candidates is None else candidates
    batches = replace(USUAL, moe_parallel_config=BATCHES)
    named: set[str] = set()
    for oracle in ORACLES.values():
        for row in oracle.table:
            for name in (*row.kernels_for(USUAL), *row.lora):
                named.add(name)
                found = known.get(name)
                fits = [s for s in oracle.schemes if found and row.question_scheme(s) in found.capability.schemes]
                layer = batches if found and found.capability.batched else USUAL
                asked = Asked(layer, device, next(iter(fits), oracle.schemes[0]))
                against = oracle.against(row, name, asked, candidates=candidates)
                yield Entry(oracle.name, row.member.name, name, against)
    for name in sorted(known.keys() - named):
        schemes = known[name].capability.schemes
        oracle = next(o for o in ORACLES.values() if any(s in schemes for s in o.schemes))
        scheme = next(s for s in oracle.schemes if s in schemes)
        yield Entry(oracle.name, "", name, kernel_reasons(name, scheme, Asked(USUAL, device, scheme), candidates))
