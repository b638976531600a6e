"""Invariants over the kernels that are really registered.  Not golden: they change whenever a kernel arrives."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import moe_fx.kernels.experts  # noqa: F401  registers the built-in kernels
from moe_fx.binding import Operand, WeightBinding
from moe_fx.hardware import Device, catalogue, detect
from moe_fx.kernels.capability import PLAIN, Capability
from moe_fx.kernels.config import routing_method
from moe_fx.kernels.registry import KERNELS
from moe_fx.oracle import Request, choose
from moe_fx.oracle.engine import GRID
from moe_fx.oracle.price import seconds, workload
from moe_fx.quant import QuantSpec
from moe_fx.spec import MoESpec, RouterSpec

from .candidates import MODELS, moe

DEVICES = ["zen5_epyc_2", "h100", "mi300x", "tpu_v5p"]


@pytest.mark.parametrize("name", sorted(KERNELS))
@pytest.mark.parametrize("model", MODELS)
def test_prices_are_positive_and_grow(name: str, model: str) -> None:
    for device in catalogue().values():
        work = workload(MODELS[model][0], Request("bfloat16"), device)
        prices = [seconds(KERNELS[name].cost, work)(t) for t in GRID]
        assert prices[0] > 0
        assert prices == sorted(prices)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_every_model_gets_a_plan_of_kernels_that_nothing_vetoes(model, device, training, dtype) -> None:
    spec, binding = MODELS[model]
    plan = choose(spec, binding, Request(dtype, training=training), catalogue()[device], KERNELS)
    vetoed = {v.candidate for v in plan.verdicts if v.status == "vetoed"}
    assert plan.layout == "view"
    assert not vetoed & {f"{r.kernel}/{plan.layout}" for r in plan.ranges}
    assert {r.kernel for r in plan.ranges} == {"reference"} or "reference" not in {r.kernel for r in plan.ranges}


def test_known_blocks_on_this_machine_do_not_need_the_reference() -> None:
    for spec, binding in MODELS.values():
        plan = choose(spec, binding, Request("bfloat16"), detect(torch.device("cpu")), KERNELS)
        assert plan.kernel_for(1) != "reference"


def test_a_new_activation_leaves_only_the_reference() -> None:
    spec, (_, binding) = moe(8, 2, 64, 64, act="from_next_year"), MODELS["olmoe-1b-7b"]
    plan = choose(spec, binding, Request("bfloat16"), detect(torch.device("cpu")), KERNELS)
    assert {r.kernel for r in plan.ranges} == {"reference"}


ROUTERS = (
    RouterSpec(),
    RouterSpec(order="topk_first"),
    RouterSpec(renormalise=True),
    RouterSpec(score="sigmoid", renormalise=True, bias="scores", groups=4, topk_groups=2),
    RouterSpec(score="sigmoid"),
)


def _fitting(capability: Capability) -> tuple[MoESpec, Request, Device]:
    """A block, a request and a machine that a kernel of that capability should take."""
    spec, _ = MODELS["olmoe-1b-7b"]
    act = next(a for a in ("silu", "swiglu_oai", "relu2") if a in capability.activations)
    params = (1.702, 7.0) if act == "swiglu_oai" else ()
    expert = replace(spec.expert, act=act, act_params=params, gated=True in capability.gated)
    fits = [r for r in ROUTERS if routing_method(r, spec.top_k).name in capability.routing]
    router = fits[0] if capability.monolithic else None
    weights, inputs = PLAIN if PLAIN in capability.schemes else min(capability.schemes, key=str)
    names = ["" if key is None else str(key) for key in (weights, weights, inputs, inputs)]
    spec = replace(spec, expert=expert, router=router, quant=QuantSpec(*names))
    machine = next(d for d in catalogue().values() if d.kind in capability.devices)
    arch = machine.arch if capability.archs is None else min(capability.archs)
    machine = replace(machine, arch=arch, installed=machine.installed | capability.packages)
    dtype = "bfloat16" if "bfloat16" in capability.dtypes else min(capability.dtypes)
    return spec, Request(dtype, memory="copy", compiled=capability.compiled), machine


@pytest.mark.parametrize("name", sorted(KERNELS))
def test_every_kernel_can_be_requested_somewhere(name: str) -> None:
    spec, request, machine = _fitting(KERNELS[name].capability)
    _, binding = MODELS["olmoe-1b-7b"]
    if spec.quant.w13 and KERNELS[name].experts.layout_for(spec):  # it packs codes that the model holds
        binding = WeightBinding((*binding.operands, Operand("w13_scale"), Operand("w2_scale")))
    plan = choose(spec, binding, replace(request, kernel=name), machine, KERNELS)
    assert plan.kernel_for(5) == name
