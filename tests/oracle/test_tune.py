"""Measured choice with a stopwatch that says what a test wants."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import moe_fx.kernels.experts  # noqa: F401  registers the built-in kernels
from moe_fx.binding import parse_binding
from moe_fx.hardware import catalogue
from moe_fx.kernels.registry import KERNELS as REGISTERED
from moe_fx.lowerings.measure import Stopwatch, TunedPlans
from moe_fx.oracle import Request, choose, tuned
from moe_fx.oracle.tune import BEST, MEASURED_AT
from moe_fx.plan import Plan
from moe_fx.spec import ExpertSpec, MoESpec

from .candidates import KERNELS, MODELS

SPEC, BINDING = MODELS["olmoe-1b-7b"]
PRICED = choose(SPEC, BINDING, Request("bfloat16", compiled=True), catalogue()["zen5_epyc_2"], KERNELS)


def survivors(plan: Plan) -> set[str]:
    return {v.candidate.partition("/")[0] for v in plan.verdicts if v.status != "vetoed"}


def test_the_fastest_of_the_best_by_price_is_taken() -> None:
    asked: dict[int, list[str]] = {}

    def measure(name: str, tokens: int) -> float:
        asked.setdefault(tokens, []).append(name)
        return 1.0 if (name == "grouped") == (tokens >= 64) else 2.0

    plan = tuned(PRICED, measure)
    assert all(len(names) == BEST for names in asked.values())
    assert tuple(asked) == plan.measured_at == MEASURED_AT
    for tokens, names in asked.items():
        if tokens >= 64 and "grouped" in names:
            assert plan.kernel_for(tokens) == "grouped"
    assert plan.kernel_for(1) != "grouped"
    assert plan.ranges[0].t_min == 1
    assert plan.ranges[-1].t_max is None
    assert all(a.t_max is not None and a.t_max + 1 == b.t_min for a, b in pairwise(plan.ranges))


def test_verdicts_hold_what_was_measured_and_the_plan_replays() -> None:
    plan = tuned(PRICED, lambda name, tokens: 1e-3 * tokens * (1 if name == "loop" else 2))
    measured = {v.candidate: v.measured_us for v in plan.verdicts if v.measured_us}
    assert measured["loop/view"][MEASURED_AT.index(4)] == pytest.approx(4e3)
    assert {v.candidate for v in plan.verdicts if v.status == "chosen"} >= {f"{r.kernel}/view" for r in plan.ranges}
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_the_inline_kernel_and_vetoed_ones_keep_their_price() -> None:
    kernels = {name: KERNELS[name] for name in ("reference", "gather", "loop", "inlined")}
    kernels["loop"] = replace(kernels["loop"], cost=kernels["gather"].cost)
    priced = choose(SPEC, BINDING, Request("bfloat16", compiled=True), catalogue()["zen5_epyc_2"], kernels)
    asked = set()

    def measure(name: str, tokens: int) -> float:
        asked.add(name)
        return 1.0

    plan = tuned(priced, measure)
    assert plan.inline == priced.inline
    assert plan.inline is not None
    assert plan.inline.kernel not in asked
    assert asked <= survivors(priced)


def test_one_candidate_is_not_measured() -> None:
    def measure(name: str, tokens: int) -> float:
        raise AssertionError("nothing to compare")

    asked = choose(SPEC, BINDING, Request("bfloat16", kernel="loop"), catalogue()["zen5_epyc_2"], KERNELS)
    assert tuned(asked, measure) == asked


def test_what_would_take_seconds_is_left_to_its_price() -> None:
    slow = tuple(replace(v, price_us=tuple(1e7 for _ in v.price_us)) for v in PRICED.verdicts)
    priced = replace(PRICED, verdicts=slow)
    assert tuned(priced, lambda name, tokens: 1.0) == priced


@pytest.mark.parametrize("layout", ["view", "transposed"])
def test_the_stopwatch_runs_every_kernel(layout: str) -> None:
    spec = MoESpec(2, ExpertSpec(4, 16, 8))
    binding = parse_binding("bind/1 w13:stacked:out_in:gate_up w2:stacked:in_out:gate_up")
    like = [torch.empty(4, 16, 16, dtype=torch.bfloat16), torch.empty(4, 8, 16, dtype=torch.bfloat16)]
    stopwatch = Stopwatch(spec, binding, like, layout, torch.bfloat16)
    for name, kernel in REGISTERED.items():
        capability = kernel.capability
        here = "cpu" in capability.devices and not capability.packages and capability.archs is None
        if here and not capability.monolithic:
            assert stopwatch(name, 3) > 0


def test_the_stopwatch_keeps_sizes_and_strides() -> None:
    from moe_fx.lowerings.measure import _random_like

    like = torch.empty(3, 7, 400, 300).permute(2, 0, 3, 1)[:, :2]
    found = _random_like(like, torch.Generator().manual_seed(0))
    assert (found.shape, found.stride(), found.dtype) == (like.shape, like.stride(), like.dtype)
    assert 0 < found.std() < 1
    assert found.isfinite().all()


def test_measured_plans_survive_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_FX_CACHE_DIR", str(tmp_path))
    plan = tuned(PRICED, lambda name, tokens: 1.0)
    TunedPlans().write(plan, "key", 1)
    assert TunedPlans().read("key", 1) == plan
    assert TunedPlans().read("key", 2) is None
    (file,) = tmp_path.rglob("*.json")
    file.write_text(file.read_text()[:50])
    assert TunedPlans().read("key", 1) is None
