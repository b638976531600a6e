"""transformers' fine-grained fp8 models on the CPU, where it has no kernel: fused on codes, in all implementations."""

from __future__ import annotations

import copy
import inspect
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.integrations import finegrained_fp8

import moe_fx
from moe_fx.passes.capture import quantised_libraries

from .fp8_models import EXPERTS, FAMILIES, HIDDEN, INTERMEDIATE, SCHEMES, Pair, pair
from .helpers import watched

IMPLEMENTATIONS = ("default", "eager", "batched_mm", "grouped_mm")


def compiled(model: nn.Module, **options: Any) -> Any:
    torch._dynamo.reset()
    moe_fx.reset()
    return torch.compile(model, backend="moe_fx", options={"inner_backend": "eager"} | options)


def errors(run: Any, models: Pair, shape: tuple[int, int]) -> tuple[float, float]:
    """Of the run, and of the same numbers in bfloat16 by transformers, to float64."""
    ids = torch.randint(0, 64, shape)
    with torch.no_grad():
        exact = models.exact(ids).logits
        usual = copy.deepcopy(models.exact).to(torch.bfloat16)(ids).logits.double()
        found = run(ids).logits.double()
    return float((found - exact).norm() / exact.norm()), float((usual - exact).norm() / exact.norm())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_implementation_is_fused(family: str, implementation: str) -> None:
    models = pair(family)
    if implementation != "default":
        models.quantised.set_experts_implementation(implementation)
    run = compiled(models.quantised)
    for shape in ((1, 9), (2, 5), (1, 1)):
        own, usual = errors(run, models, shape)
        assert own <= 2 * usual + 4 * torch.finfo(torch.bfloat16).eps, shape
    sites = moe_fx.last_report().sites
    assert len({s.fqn for s in sites}) == 2
    for site in sites:
        assert site.fused, site.rejects
        assert site.spec.quant.w13 == "float8_e4m3fn:128x128:float32"
        assert "not rounded" in site.note


@pytest.mark.parametrize("name", [n for n in SCHEMES if n != "blocks"])
def test_every_scheme(name: str) -> None:
    models = pair("Qwen3Moe", SCHEMES[name])
    run = compiled(models.quantised)
    own, usual = errors(run, models, (1, 9))
    assert own <= 2 * usual + 4 * torch.finfo(torch.bfloat16).eps
    for site in moe_fx.last_report().sites:
        assert site.fused, site.rejects
        assert site.spec.quant.w13.startswith("float4_e2m1:1x32" if name == "fp4" else "float8_e4m3fn")


def test_no_bank_is_dequantised(monkeypatch: pytest.MonkeyPatch) -> None:
    block, x = pair("Qwen3Moe").quantised.model.layers[0].mlp, torch.randn(1, 4, HIDDEN, dtype=torch.bfloat16)
    with torch.no_grad():
        compiled(block)(x)  # makes tables
        seen = watched(monkeypatch)
        compiled(block)(x)
    assert seen.most == 2 * INTERMEDIATE * HIDDEN < EXPERTS * INTERMEDIATE * HIDDEN  # one expert's up projection


def test_with_inductor() -> None:
    models = pair("Qwen3Moe")
    own, usual = errors(compiled(models.quantised, inner_backend="inductor"), models, (1, 9))
    assert own <= 2 * usual + 4 * torch.finfo(torch.bfloat16).eps
    assert all(site.fused for site in moe_fx.last_report().sites)


def test_what_no_block_takes_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention's products stay calls of the op; nothing of a reading is left."""
    graphs: list[torch.fx.Graph] = []

    def kept(gm: torch.fx.GraphModule, *_: object) -> Any:
        graphs.append(gm.graph)
        return gm.forward

    monkeypatch.setattr("moe_fx.backend.compile_inner", kept)
    with torch.no_grad():
        compiled(pair("Qwen3Moe").quantised)(torch.ones(1, 3).long())
    called = [getattr(n.target, "__name__", str(n.target)) for graph in graphs for n in graph.nodes]
    assert sum("fp8_linear" in name for name in called) == 8  # q, k, v, o of two layers
    assert not [name for name in called if name in ("held", "rounded", "grouped_mm") or "fp8_grouped_mm" in name]


def test_static_scales_of_inputs_are_left_to_dynamo() -> None:
    """Which needs transformers' kernel, as without us."""
    models = pair("Qwen3Moe", activations="static")
    models.quantised.set_experts_implementation("eager")  # the only one that transformers has
    experts = models.quantised.model.layers[0].mlp.experts
    arguments = torch.randn(5, HIDDEN, dtype=torch.bfloat16), torch.tensor([[0, 3]] * 5), torch.rand(5, 2)
    with torch.no_grad(), pytest.raises(ImportError, match="kernels"):
        experts(*arguments)
    with torch.no_grad(), suppress(ImportError):  # raised where Dynamo runs the loop itself
        compiled(experts)(*arguments)
    notes = {s.rejects[0].code for s in moe_fx.last_report().sites}
    assert "capture.untrusted" in notes


def test_a_function_that_somebody_registered_is_respected() -> None:
    models = pair("Qwen3Moe")

    def mine(self: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return x * 3

    finegrained_fp8.ALL_FP8_EXPERTS_FUNCTIONS["mine"] = mine
    try:
        experts = models.quantised.model.layers[0].mlp.experts
        experts.config._experts_implementation = "mine"
        x = torch.randn(5, HIDDEN, dtype=torch.bfloat16)
        with torch.no_grad():
            y = compiled(experts)(x, torch.zeros(5, 2, dtype=torch.int64), torch.ones(5, 2))
    finally:
        del finegrained_fp8.ALL_FP8_EXPERTS_FUNCTIONS["mine"]
    assert torch.equal(y, x * 3)


def test_a_loop_that_means_something_else_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A class whose loop adds the experts' results unweighted."""
    experts = pair("Qwen3Moe").quantised.model.layers[0].mlp.experts
    own = inspect.unwrap(type(experts).forward)

    def unweighted(self: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return own(self, x, ids, torch.ones_like(weights))

    class Other(type(experts)):
        forward = unweighted

    assert quantised_libraries._compare(experts) == ""
    experts.__class__ = Other
    assert "differ by" in quantised_libraries._compare(experts)


def test_the_calls_bind_to_the_real_signatures() -> None:
    """On a GPU the ops call transformers; here its functions tell whether they would take the calls."""
    x = torch.zeros(2, 128)
    inspect.signature(finegrained_fp8.fp8_linear).bind(x, x, x, [128, 128], None, None)
    fields = inspect.signature(finegrained_fp8.FineGrainedFP8).parameters
    assert "grouped_matmul" in fields
    source = inspect.getsource(finegrained_fp8.fp8_grouped_mm_experts_forward)
    source += inspect.getsource(finegrained_fp8.fp8_grouped_matmul)
    assert all(f"{name}=" in source for name in ("offsets", "tokens_per_expert", "block_size"))


def test_trust_is_of_the_functions_that_were_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """A class that is changed after a verdict, and products that are somebody's own."""
    experts = pair("Qwen3Moe").quantised.model.layers[0].mlp.experts
    assert quantised_libraries._distrust(experts) == ""
    known = len(quantised_libraries._TRUSTED)
    monkeypatch.setattr(type(experts), "_apply_gate", lambda self, rows: rows.chunk(2, -1)[0])
    assert quantised_libraries._distrust(experts) == ""  # both forms call it
    assert len(quantised_libraries._TRUSTED) == known + 1
    monkeypatch.setattr(type(experts), "linear", lambda self, x, w, s, activation_scale=None: x @ w.to(x.dtype).t())
    assert "products" in quantised_libraries._distrust(experts)
