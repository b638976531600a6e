"""Weights on the meta device: what would be fused, without the memory that it takes."""

from __future__ import annotations

import torch

import moe_fx

from .helpers import Stack, tokens


def test_explain_of_a_model_without_values() -> None:
    with torch.no_grad():
        report = moe_fx.explain(Stack().to("meta"), tokens(3, 7).to("meta"))
        real = moe_fx.explain(Stack(), tokens(3, 7))
    assert (report.num_fused, real.num_fused) == (2, 2)
    assert [s.spec for s in report.sites] == [s.spec for s in real.sites]
    assert all("unverified" in s.note for s in report.sites)
    assert all(not s.note for s in real.sites)


def test_a_transformers_model_without_values_in_every_implementation() -> None:
    from tests.zoo.samples import build

    for implementation in ("grouped_mm", "batched_mm", "eager"):
        sample = build("qwen3_moe", implementation)
        inputs = {name: v.to("meta") if isinstance(v, torch.Tensor) else v for name, v in sample.inputs.items()}
        with torch.no_grad():
            report = moe_fx.explain(sample.model.to("meta"), **inputs)
        assert report.num_fused == report.num_blocks > 0, str(report)
