"""``moe_fx.explain``: as often as one likes, on anything, and nothing is changed by it."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

import moe_fx

from .helpers import ListBlock, Stack, all_fused, assert_close, compiled, fresh, tokens


def test_explain_again_and_again() -> None:
    model = Stack()
    with torch.no_grad():
        reports = [moe_fx.explain(model, tokens(3, 7)) for _ in range(12)]
        reports.append(moe_fx.explain(model, tokens(3, 7), options={"router": "fuse"}))
    assert {r.num_fused for r in reports} == {2}
    assert {r.num_graphs for r in reports} == {1}


def test_explain_after_compile_and_compile_after_explain() -> None:
    model, x = Stack(ListBlock), tokens(3, 7)
    with torch.no_grad():
        assert_close(compiled(model)(x), model(x), 1e-6)
        assert moe_fx.explain(model, x).num_fused == 2
        assert_close(compiled(model)(x), model(x), 1e-6)


def test_the_plan_is_the_one_that_inductor_would_get() -> None:
    with torch.no_grad():
        report = moe_fx.explain(Stack(), tokens(1, 1))
        eager = moe_fx.explain(Stack(), tokens(1, 1), options={"inner_backend": "eager"})
    assert all(s.plan and s.plan.inline for s in report.sites)
    assert not any(s.plan and s.plan.inline for s in eager.sites)


@pytest.mark.parametrize("grad", [False, True])
def test_the_plan_is_for_the_callers_grad_mode(grad: bool) -> None:
    with torch.set_grad_enabled(grad):
        report = moe_fx.explain(Stack(), tokens(3, 7))
    assert {s.plan.backward for s in report.sites if s.plan} == {"save" if grad else "recompute"}


def test_a_model_is_not_kept_alive() -> None:
    """Verdicts outlive the model; its graph and its weights do not."""
    model = Stack()
    with torch.no_grad():
        compiled(model)(tokens(3, 7))
    all_fused(2)
    weight = weakref.ref(model.blocks[0].w13)
    torch._dynamo.reset()
    del model
    gc.collect()
    assert weight() is None


def test_autocast_around_a_loop_of_transformers() -> None:
    """The loop is compared with its traceable form apart from the caller's autocast."""
    from moe_fx.passes.capture import hugging_face
    from tests.zoo.samples import build

    hugging_face._TRUSTED.clear()
    sample = build("mixtral", "eager", config=dict(num_hidden_layers=1))
    fresh()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        mine = sample.output(compiled(sample.model)(**sample.inputs))[0]
        other = sample.output(sample.model(**sample.inputs))[0]
    all_fused(1)
    assert_close(mine, other, 2e-2)
