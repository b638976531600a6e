"""The zoo itself: every family is there, runs the blocks it claims, and its MoE blocks weigh in the output."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from . import FAMILIES, blocks_run, build, moe_matters, relative_error, unavailable


def _available(name: str) -> str:
    if reason := unavailable(name):
        pytest.skip(reason)
    return name


def test_the_count_is_that_of_the_issue() -> None:
    status = Counter(family.status for family in FAMILIES.values())
    waits = [name for name, family in FAMILIES.items() if family.default_waits]
    assert waits == ["openai_privacy_filter"]
    assert (status["fuse"] - len(waits), status["route_b"] + len(waits), status["left_alone"]) == (67, 5, 3)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_block_runs_and_matters(name: str) -> None:
    sample = build(_available(name))
    assert len(blocks_run(sample)) == sample.family.moe_layers
    assert min(moe_matters(sample).values()) > 1e-3


@pytest.mark.parametrize("name", FAMILIES)
def test_implementations_agree_and_building_repeats(name: str) -> None:
    with torch.no_grad():
        outputs = [
            sample.output(sample.model(**sample.inputs))
            for sample in (build(_available(name), i) for i in (None, *FAMILIES[name].implementations))
        ]
    assert relative_error(outputs[1], outputs[0]) == 0
    assert max(relative_error(output, outputs[0]) for output in outputs) < 1e-5
