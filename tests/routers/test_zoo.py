"""Routers of transformers: a family of each class that RouterSpec can say, and those that it cannot, with a reason."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_fx.backend import moe_fx as backend

from .helpers import Fused

build = pytest.importorskip("tests.zoo.samples").build

# class of HF-MOE.md → families
FUSED = {
    "S1": ("mixtral", "qwen3_moe", "jamba", "hunyuan_v1_moe"),
    "T1": ("granitemoe", "cohere2_moe"),
    "T1b": ("gpt_oss", "openai_privacy_filter"),
    "G0": ("minimax_m2", "kolibri1", "laguna", "flint"),
    "G1": ("deepseek_v3", "axk2", "dots1"),
    "S2": ("deepseek_v2", "mistral4"),
    "S3": ("ernie4_5_moe",),
    "S1g": ("gemma4",),
    "Q1": ("inkling2",),
}
LEFT = {  # family → what its reason says
    "phimoe": "no topk chooses",
    "zaya": "9 logits for 8 experts",
    "inkling": "10 logits for 8 experts",
}
TRAINED = ("mixtral", "granitemoe", "gpt_oss", "minimax_m2", "deepseek_v3", "mistral4", "ernie4_5_moe", "gemma4")


def _experts_only(gm: Any, inputs: list[Any]) -> Any:
    backend(gm, inputs, options={"inner_backend": "eager", "strict": True})
    return gm.forward


def _run(sample: Any, model: Any) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    return sample.output(model(**copy.deepcopy(sample.inputs)))


def _implementation(name: str) -> str | None:
    return "grouped_mm" if name == "openai_privacy_filter" else None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", [f for families in FUSED.values() for f in families])
def test_router_is_fused_with_the_bits_of_the_original(name: str, dtype: torch.dtype) -> None:
    """Against the same experts kernels behind the model's own router: nothing may change, ties of bfloat16 included."""
    sample = build(name, _implementation(name), dtype)
    with torch.no_grad():
        torch._dynamo.reset()
        expected = _run(sample, torch.compile(sample.model, backend=_experts_only))
        fused = Fused(sample.model)
        found = _run(sample, fused)
    assert len(fused.outcomes) == sample.family.moe_layers
    for outcome in fused.outcomes:
        assert outcome.router is not None, outcome.reason
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", TRAINED)
def test_trains_as_the_original(name: str) -> None:
    sample = build(name, _implementation(name))

    def gradients(model: Any) -> dict[str, Tensor]:
        sample.model.zero_grad()
        sum(o.float().square().mean() for o in _run(sample, model)).backward()  # type: ignore[union-attr]
        return {n: p.grad.clone() for n, p in sample.model.named_parameters() if p.grad is not None}

    expected = gradients(sample.model)
    fused = Fused(sample.model)
    found = gradients(fused)
    assert fused.outcomes
    assert all(o.router for o in fused.outcomes), fused.outcomes
    assert found.keys() == expected.keys()
    for key, grad in found.items():
        error, scale = (grad - expected[key]).norm(), expected[key].norm()
        assert error <= 1e-4 * scale + 1e-7, f"{key}: {float(error):.1e} of {float(scale):.1e}"


@pytest.mark.parametrize("name", LEFT)
def test_other_routers_stay_with_a_reason(name: str) -> None:
    sample = build(name)
    with torch.no_grad():
        torch._dynamo.reset()
        expected = _run(sample, torch.compile(sample.model, backend=_experts_only))
        fused = Fused(sample.model)
        found = _run(sample, fused)
    assert fused.outcomes
    assert all(o.router is None for o in fused.outcomes)
    assert any(re.search(LEFT[name], str(o.reason)) for o in fused.outcomes), fused.outcomes
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_a_hash_layer_has_no_logits_to_choose_by() -> None:
    """DeepSeek-V4's first layers look their experts up by token id; its others are fused."""
    sample = build("deepseek_v4")
    fused = Fused(sample.model)
    with torch.no_grad():
        _run(sample, fused)
    hashed, chosen = fused.outcomes
    assert hashed.router is None
    assert chosen.router is not None
    assert chosen.router.score == "sqrtsoftplus"
