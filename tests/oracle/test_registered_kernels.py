"""Invariants over the kernels that are really registered.  Not golden: they change whenever a kernel arrives."""

from __future__ import annotations

import pytest
import torch

import moe_fx.kernels.experts  # noqa: F401  registers the built-in kernels
from moe_fx.hardware import catalogue, detect
from moe_fx.kernels.registry import KERNELS
from moe_fx.oracle import Request, choose
from moe_fx.oracle.engine import GRID
from moe_fx.oracle.price import seconds, workload

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


@pytest.mark.parametrize("name", sorted(KERNELS))
def test_every_kernel_can_be_requested_somewhere(name: str) -> None:
    spec, binding = MODELS["olmoe-1b-7b"]
    kinds = KERNELS[name].capability.devices
    device = next(
        d for d in catalogue().values() if d.kind in kinds and KERNELS[name].capability.packages <= d.installed
    )
    request = Request("bfloat16", kernel=name, compiled=KERNELS[name].capability.compiled)
    assert choose(spec, binding, request, device, KERNELS).kernel_for(5) == name
