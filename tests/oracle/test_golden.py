from __future__ import annotations

import pytest

from moe_fx.plan import parse_plan

from . import golden


@pytest.fixture(scope="module")
def then(request: pytest.FixtureRequest) -> dict:
    if request.config.getoption("--accept-golden", default=False):
        golden.FILE.accept()
    return golden.FILE.accepted()


def test_at_least_a_hundred_pairs(then: dict) -> None:
    assert len(then) >= 100
    assert list(then) == [" | ".join(pair) for pair in golden.pairs()]


@pytest.mark.parametrize("pair", list(golden.pairs()), ids=" | ".join)
def test_plan_is_the_accepted_one(pair: tuple[str, str, str], then: dict) -> None:
    assert golden.short(golden.plan_of(*pair)) == then[" | ".join(pair)]


def test_goldens_meet_every_kernel_every_layout_and_most_codes(then: dict) -> None:
    plans = [parse_plan(entry["plan"]) for entry in then.values()]
    assert {r.kernel for plan in plans for r in plan.spans} == set(golden.KERNELS)
    assert {plan.layout for plan in plans} == {"view", "stacked"}
    codes = {code for entry in then.values() for group in entry["vetoed"] for code in group.split()}
    assert codes >= {
        "veto.device", "veto.package", "veto.dtype", "veto.activation", "veto.bias", "veto.norm", "veto.combine",
        "veto.storage", "veto.training", "veto.compiler",
    }  # fmt: skip
