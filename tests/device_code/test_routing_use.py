"""Where the router's kernel is used and where not, the op of a whole block with it, and what it compiles to."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from moe_fx.binding import bind, parse_binding, split_router
from moe_fx.hardware import catalogue
from moe_fx.kernels import routing as served
from moe_fx.kernels.routing import serves
from moe_fx.reference import experts_forward
from moe_fx.reference import router as reference
from moe_fx.spec import ExpertSpec, MoESpec, RouterSpec
from tests.routers.formulas import ROUTERS, E, K, Router
from tests.routers.test_op import EXPERTS, arguments, moe

from .here import INTERPRETED, needs_compiler
from .truth import draw, kernel


@pytest.mark.parametrize(
    "change, dtype, sizes, words",
    [
        (dict(score_dtype=""), torch.bfloat16, (2, 8), "rounded to torch.bfloat16"),
        (dict(score_dtype="float16"), torch.float32, (2, 8), "rounded to torch.float16"),
        (dict(score_dtype="float64"), torch.float32, (2, 8), "torch.float64"),
        (dict(weight_dtype="float64"), torch.float32, (2, 8), "torch.float64"),
        ({}, torch.float64, (2, 8), "torch.float64"),
        ({}, torch.float32, (33, 64), "33 of 64"),
        ({}, torch.float32, (9, 8), "9 of 8"),
        ({}, torch.float32, (8, 1025), "1025"),
        (dict(order="topk_first", bias="scores"), torch.float32, (2, 8), "no router"),
        (dict(order="topk_first", groups=2), torch.float32, (2, 8), "no router"),
        (dict(score="max"), torch.float32, (2, 8), "no router"),
        (dict(groups=3), torch.float32, (2, 8), "groups"),
        (dict(groups=8, topk_groups=2, group_score="top2_sum"), torch.float32, (2, 8), "two best"),
    ],
    ids=str,
)
def test_what_is_not_served(change: dict[str, Any], dtype: torch.dtype, sizes: tuple[int, int], words: str) -> None:
    spec = replace(RouterSpec(score_dtype="float32"), **change)
    assert words in str(serves(spec, dtype, *sizes))


def test_what_dtypes_of_the_operands_are_served() -> None:
    late = RouterSpec(order="topk_first", bias="logits")
    assert serves(late, torch.bfloat16, 2, 8, bias=torch.float32) is None
    assert "bfloat16" in str(serves(late, torch.bfloat16, 2, 8, bias=torch.bfloat16))
    assert "float64" in str(serves(RouterSpec(bias="scores"), torch.float32, 2, 8, bias=torch.float64))
    assert serves(RouterSpec(bias="scores"), torch.float32, 2, 8, bias=torch.bfloat16) is None
    scaled = RouterSpec(expert_scale=True)
    assert serves(scaled, torch.float32, 2, 8, expert_scale=torch.bfloat16) is None
    assert "float64" in str(serves(scaled, torch.float32, 2, 8, expert_scale=torch.float64))


def test_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    there = replace(catalogue()["h200"], installed=frozenset({"triton", "moe_fx.triton"}))
    for found, runs in [
        (there, True),
        (replace(there, arch="sm75"), False),
        (replace(there, kind="rocm", arch="gfx942"), False),
        (replace(there, installed=frozenset({"triton"})), False),
    ]:
        monkeypatch.setattr(served, "detect", lambda device, found=found: found)
        assert served.runs_on.__wrapped__(torch.device("cuda", 1)) is runs


def test_elsewhere_the_reference_routes(monkeypatch: pytest.MonkeyPatch) -> None:
    """On other devices, and what is not served: the bits of the reference."""
    given = draw(RouterSpec(), 6, E)
    where = torch.device("cpu")
    assert not served.runs_on(where)
    assert served.route(given.logits.to(where), None, None, RouterSpec(), K) is None
    monkeypatch.setattr(served, "runs_on", lambda device: True)
    assert served.route(given.logits.double(), None, None, RouterSpec(), K) is None
    from moe_fx.lowerings.dispatch import Dispatch

    found = Dispatch().route(given.logits.double(), None, None, RouterSpec(), K)
    expected = reference.route(given.logits.double(), None, None, RouterSpec(), K)
    assert all(map(torch.equal, found, expected))


@pytest.mark.skipif(not INTERPRETED, reason="runs the kernel on the CPU")
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("router", ROUTERS, ids=str)
def test_the_op_of_a_whole_block_routes_by_it(router: Router, grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and training; masked weights train by the reference, whose backward asks which groups it kept."""
    from moe_fx.kernels.triton import routing

    calls = []
    launch = routing.route
    monkeypatch.setattr(served, "runs_on", lambda device: True)
    monkeypatch.setattr(routing, "route", lambda *args: calls.append(args) or launch(*args))
    x, logits, operands, spec, binding, plan = arguments(router.spec, torch.float32, grad=grad)
    y, ids, weights = moe(x, logits, operands, spec, binding, plan)
    assert len(calls) == (not grad or router.spec.weights_from == "scores")
    experts, roles = split_router(parse_binding(binding))
    extra = dict(zip(roles, operands[2:], strict=True))
    bias, scale = extra.get("router_bias"), extra.get("expert_scale")
    expected = reference.route(logits, bias, scale, replace(router.spec, sorted=True), K)
    assert torch.equal(ids.sort().values, expected[0].sort().values)
    again = reference.weights_of(logits, ids, bias, scale, router.spec)
    torch.testing.assert_close(weights, again, rtol=1e-6, atol=0)
    mathematics = MoESpec(K, ExpertSpec(E, *operands[0].shape[:0:-1][:1], operands[1].shape[2]))
    torch.testing.assert_close(y, experts_forward(x, ids, again, bind(experts, operands[:2], E), mathematics))
    if grad:
        found = torch.autograd.grad(weights.sum() + y.sum(), [logits])[0]
        assert bool(found.isfinite().all())
        assert bool(found.abs().sum() > 0)
    assert binding.startswith(EXPERTS)


COMPILED = {
    "softmax": (RouterSpec(renormalise=True, score_dtype="float32"), 128, 8),
    "late": (RouterSpec(order="topk_first"), 128, 8),
    "groups": (
        RouterSpec(
            "sigmoid", bias="scores", groups=8, topk_groups=4, group_score="top2_sum", group_fill=-math.inf,
            renormalise=True, eps=1e-20, scale=2.5, score_dtype="float32", weight_dtype="bfloat16",
        ), 256, 8,
    ),
    "masked": (RouterSpec(groups=8, topk_groups=3, weights_from="masked", score_dtype="float32"), 160, 6),
    "most": (
        RouterSpec("sqrtsoftplus", bias="logits", expert_scale=True, renormalise=True, score_dtype="float32"), 1024, 32,
    ),
}  # fmt: skip


@needs_compiler
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("name", COMPILED)
def test_compiles_without_spills(name: str, capability: int) -> None:
    from .described import described

    spec, experts, top_k = COMPILED[name]
    with described(capability) as made:
        for tokens, dtype in itertools.product((1, 5, 1 << 12), ("bfloat16", "float32")):
            given = draw(spec, tokens, experts, dtype)
            kernel()(given.logits, given.bias, given.scale, spec, top_k)
    assert len(made) >= 4
    assert [(m.registers, m.spilled) for m in made if m.spilled] == []
    assert not any("approx.f" in m.ptx or "div.full" in m.ptx for m in made), "the device's own exp or quotient"
