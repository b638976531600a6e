from __future__ import annotations

import pytest

from moe_fx.kernels.ladder import LADDER

from . import golden_selection as golden

SITUATIONS = {str(situation): situation for situation in golden.situations()}


@pytest.fixture(scope="module")
def then(request: pytest.FixtureRequest) -> dict:
    if request.config.getoption("--accept-golden", default=False):
        golden.accept()
    return golden.accepted()


def test_at_least_three_hundred_situations_none_twice(then: dict) -> None:
    assert len(then) >= 300
    assert len(SITUATIONS) == len(list(golden.situations()))
    assert list(then) == list(SITUATIONS)


@pytest.mark.parametrize("name", SITUATIONS)
def test_selection_is_the_accepted_one(name: str, then: dict) -> None:
    assert golden.short(SITUATIONS[name]) == then[name]


def test_goldens_meet_every_code_of_the_ladder_and_most_backends(then: dict) -> None:
    met = {code for entry in then.values() for group in entry["vetoed"] for code in group.split()}
    assert met >= {
        "device", "package", "activation", "scheme", "parallel", "routing", "shape", "format", "invariance", "lora",
        "dtype", "spec", "bias", "norm", "combine",
    }  # fmt: skip
    assert len(LADDER) == 23  # a new rule: add its code above
    chosen = {entry["chosen"] for entry in then.values()}
    assert "" in chosen  # somewhere nothing is left
    assert len({candidate.partition("/")[0] for candidate in chosen}) >= 20
    assert len(chosen) >= 35
