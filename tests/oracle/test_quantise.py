"""Weights as codes: what they cost, which layouts are judged, and what speaks against them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from moe_fx import MoEFxUnsupportedError
from moe_fx.binding import Operand, WeightBinding
from moe_fx.hardware import Device, catalogue
from moe_fx.kernels.capability import Open, RowSchemes
from moe_fx.kernels.registry import Cost
from moe_fx.oracle import Request, choose
from moe_fx.oracle.price import seconds, workload
from moe_fx.oracle.vetoes import Case, vetoes
from moe_fx.quant import SCHEMES, scheme_of
from moe_fx.spec import MoESpec

from .candidates import IN_OUT, KERNELS, STACKED, binding, moe

E, H, I = 8, 256, 128  # noqa: E741
WEIGHTS = 3 * H * I  # of one expert
SLOW_MEMORY = Device("cpu", "d", "a", 2**30, 1e6, (("bfloat16", 1e18),), 1, 1e-3)
BF16 = Request("bfloat16")
READS, REFERENCE = (
    replace(kernel, capability=replace(kernel.capability, schemes=schemes))
    for kernel, schemes in ((KERNELS["loop"], RowSchemes()), (KERNELS["reference"], Open()))
)
DEVICE = catalogue()["zen5_epyc_2"]


def none(E: object, T: object, k: object) -> int:
    return 0


def quantised(name: str, **expert: Any) -> MoESpec:
    return replace(moe(E, 2, H, I, **expert), quant=scheme_of(name, H, I))


# codes and scales of one expert, by hand: rows of w13 2I = 256, of w2 H = 256
BYTES = {
    "fp8_w8a8": WEIGHTS + 4 * (256 + 256),
    "fp8_w8a8_block": WEIGHTS + 4 * (2 * 2 + 2 * 1),
    "fp8_w8a8_tensor": WEIGHTS + 4 * 2,
    "fp8_w8a16": WEIGHTS + 4 * (256 + 256),
    "int8_w8a8": WEIGHTS + 4 * (256 + 256),
    "int8_w8a16": WEIGHTS + 4 * (256 + 256),
    "int4_w4a16": WEIGHTS // 2 + 2 * (WEIGHTS // 128),
    "int4_w4a16_g32": WEIGHTS // 2 + 2 * (WEIGHTS // 32),
    "mxfp4_w4a16": WEIGHTS // 2 + WEIGHTS // 32,
    "mxfp8": WEIGHTS + WEIGHTS // 32,
    "mxfp4": WEIGHTS // 2 + WEIGHTS // 32,
    "nvfp4": WEIGHTS // 2 + WEIGHTS // 16 + 4 * 2,
    "nf4_w4a16": WEIGHTS // 2 + 4 * (WEIGHTS // 64),
}


@pytest.mark.parametrize("name", SCHEMES)
def test_bytes_of_codes_and_scales(name: str) -> None:
    cost, biases = Cost("all", none, ((1, 1.0),)), {"w13_bias": True, "w2_bias": True}
    plain, codes, biased = (
        seconds(cost, workload(spec, BF16, SLOW_MEMORY))(1)
        for spec in (moe(E, 2, H, I), quantised(name), quantised(name, **biases))
    )
    assert (plain - codes) * 1e6 == pytest.approx(E * (2 * WEIGHTS - BYTES[name]))
    assert (biased - codes) * 1e6 == pytest.approx(E * 2 * (2 * I + H)), "biases stay what they were"


@pytest.mark.parametrize(("traffic", "experts"), [("all", E), ("active", 2)])
def test_dequantising_costs_bytes_and_launches(traffic: str, experts: int) -> None:
    native, floats = (Cost(traffic, none, ((1, 1.0),), extra) for extra in ((0.0, 0), (30.0, 20)))
    work = workload(quantised("fp8_w8a16"), BF16, SLOW_MEMORY)
    more = seconds(floats, work)(1) - seconds(native, work)(1)
    assert more == pytest.approx(experts * (30 * WEIGHTS / 1e6 + 20 * 1e-3))
    plain = workload(moe(E, 2, H, I), BF16, SLOW_MEMORY)
    assert seconds(floats, plain)(1) == seconds(native, plain)(1)


def test_a_kernel_that_multiplies_codes_wins_over_one_that_dequantises() -> None:
    slow = replace(READS, cost=replace(READS.cost, dequantise=(30.0, 20)))
    native = replace(READS, name="native", rank=99)
    kernels = {k.name: k for k in (slow, native, REFERENCE)}
    plan = choose(quantised("fp8_w8a8"), STACKED, BF16, DEVICE, kernels)
    assert {r.kernel for r in plan.ranges} == {"native"}


def test_unequal_groups_of_128() -> None:
    assert scheme_of("int4_w4a16", 256, 128).w13 == scheme_of("int4_w4a16", 256, 384).w2 == "int4:1x128:bfloat16"
    assert {scheme_of("int4_w4a16", h, i).w2 for h, i in ((64, 128), (128, 96))} == {"int4:1x32:bfloat16"}
    with pytest.raises(KeyError, match="known: fp8_w8a8, "):
        scheme_of("fp8", 256, 128)


# --- layouts ---------------------------------------------------------------------------------------------------------

SCALED = WeightBinding((Operand("w13"), Operand("w2"), Operand("w13_scale"), Operand("w2_scale")))
LIST = binding("w1", "w3", "w2", form="list")


@pytest.mark.parametrize("stored", [STACKED, IN_OUT, LIST], ids=str)
def test_floats_that_are_to_be_codes_have_one_layout(stored: WeightBinding) -> None:
    kernels = {k.name: k for k in (READS, REFERENCE)}
    plan = choose(quantised("fp8_w8a8"), stored, BF16, DEVICE, kernels)
    assert plan.layout == "quantised"
    said = {v.candidate: [r.code for r in v.reasons] for v in plan.verdicts}
    assert said == {
        "loop/view": ["veto.storage"],
        "loop/quantised": [],
        "reference/view": ["veto.storage"],
        "reference/quantised": [],
    }


@pytest.mark.parametrize("spec, stored", [(quantised("fp8_w8a8"), SCALED), (moe(E, 2, H, I), STACKED)])
def test_what_is_codes_or_floats_already_is_not_quantised(spec: MoESpec, stored: WeightBinding) -> None:
    kernels = {k.name: k for k in (READS, REFERENCE)}
    plan = choose(spec, stored, BF16, DEVICE, kernels)
    assert plan.layout == "view"
    assert not any("quantised" in v.candidate for v in plan.verdicts)
    with pytest.raises(MoEFxUnsupportedError, match="makes codes of floats, and none are to be made"):
        choose(spec, stored, replace(BF16, layout="quantised"), DEVICE, kernels)


def codes(layout: str = "quantised", spec: MoESpec | None = None, **changes: Any) -> list[str]:
    given = dict(request=BF16, device=DEVICE, binding=STACKED) | changes
    return [r.code for r in vetoes(Case(spec or quantised("int4_w4a16"), kernel=READS, layout=layout, **given))]


def test_rules() -> None:
    assert codes() == []
    assert codes("view") == ["veto.storage"]
    assert codes("stacked", request=Request("bfloat16", memory="copy")) == ["veto.storage"]
    assert codes(request=replace(BF16, training=True)) == ["veto.training"]
    odd = replace(quantised("int4_w4a16"), expert=replace(quantised("int4_w4a16").expert, intermediate=13))
    assert codes(spec=odd) == ["veto.shape"]
    assert codes(spec=replace(odd, quant=scheme_of("int8_w8a16", H, 13))) == []


def test_original_and_codes_fit_the_memory() -> None:
    needed = E * (2 * WEIGHTS + BYTES["int4_w4a16"])
    assert codes(device=replace(DEVICE, memory_bytes=needed)) == []
    assert codes(device=replace(DEVICE, memory_bytes=needed - 1)) == ["veto.storage"]
