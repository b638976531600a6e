"""Few tokens under a compiler: the plan's inline kernel takes the op's place in the graph."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import moe_fx
from moe_fx import ops
from moe_fx.lowerings.inline import decompositions
from moe_fx.reasons import MoEFxRuntimeError
from tests.test_ops import CASES, Case

from .helpers import Block, ListBlock, Stack, assert_close, compiled, fresh, tokens

# per case of the op's own tests that a compiled kernel may serve: stacked storage, nothing transposed
SERVED = [c for c in CASES if "list" not in c.binding and "in_out" not in c.binding and c.backward == "recompute"]


class Unavailable:
    """An implementation that must not be called."""

    def __getattr__(self, name: str) -> Any:
        raise MoEFxRuntimeError("the op was called")


@pytest.mark.parametrize("case", SERVED, ids=str)
def test_the_op_becomes_the_kernels_own_ops(case: Case) -> None:
    """Traced as AOTAutograd traces it, the inline op leaves no op of ours and gives the op's result."""
    x, ids, weights, operands, spec, binding, plan = case.inputs()
    ids = torch.where(torch.arange(ids.numel()).view(ids.shape) == 1, -1, ids)  # one id that names no expert
    plan += f" inline=gather_gemv:{0 if case.tokens == 0 else 1}-64"

    def call(x: Any, ids: Any, weights: Any, *operands: Any) -> Any:
        return torch.ops.moe_fx.experts_inline(x, ids, weights, list(operands), spec, binding, plan)

    with torch.no_grad():
        graph = make_fx(call, decomposition_table=decompositions(), tracing_mode="fake")(x, ids, weights, *operands)
        assert not [n for n in graph.graph.nodes if "moe_fx" in str(n.target)]
        calls = [n for n in graph.graph.nodes if n.op == "call_function"]
        assert not any(n.target._schema.is_mutable for n in calls), "not functional"  # type: ignore[union-attr]
        mine = graph(x, ids, weights, *operands)
        other = torch.ops.moe_fx.experts(x, ids, weights, operands, spec, binding, plan)
    assert mine.dtype == other.dtype
    torch.testing.assert_close(mine, other, rtol=2e-2 if case.dtype == torch.bfloat16 else 1e-5, atol=1e-2)


def inlined(model: nn.Module, x: torch.Tensor, **options: Any) -> bool:
    """Compiles with Inductor, compares with eager, and tells whether a second call runs without the op."""
    fast = compiled(model, inner_backend="inductor", **options)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", moe_fx.MoEFxWarning)
        assert_close(fast(x), model(x), 1e-5)
        kept, ops._implementation = ops._implementation, Unavailable()
        try:
            assert_close(fast(x), model(x), 1e-5)
        except MoEFxRuntimeError:
            return False
        finally:
            ops._implementation = kept
    return True


def test_one_token_runs_without_the_op() -> None:
    assert inlined(Stack(), tokens(1, 1))
    (plan,) = {site.plan for site in moe_fx.last_report().sites}
    assert plan is not None
    assert plan.inline is not None
    assert plan.inline.kernel == "gather_gemv"
    assert "gather_gemv" in str(moe_fx.last_report())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("block", "shape", "options", "expected"),
    [
        (Block, (1, 2), {}, True),
        (Block, (1, 1), {"router": "fuse"}, True),
        (Block, (1, 1), {"kernel": "gather_gemv"}, True),
        (Block, (40, 40), {}, False),  # many tokens
        (Block, (1, 1), {"kernel": "sorted_loop"}, False),
        (ListBlock, (1, 1), {}, False),  # a list cannot be gathered
    ],
)
def test_where_it_stands(block: Any, shape: tuple[int, int], options: Any, expected: bool) -> None:
    assert inlined(Stack(block), tokens(*shape), **options) == expected


@pytest.mark.slow
def test_a_symbolic_number_of_tokens_keeps_the_op() -> None:
    model = Stack()
    fast = compiled(model, inner_backend="inductor", dynamic=True)
    with torch.no_grad():
        for length in (2, 3, 1):
            assert_close(fast(tokens(1, length)), model(tokens(1, length)), 1e-5)
    plans = {site.plan.op_string() for site in moe_fx.last_report().sites if site.plan}
    assert all("inline=" in p for p in plans)


@pytest.mark.slow
def test_a_training_graph_has_no_inline_kernel() -> None:
    model = Stack()
    fast = compiled(model, inner_backend="inductor")
    fast(tokens(1, 1)).square().sum().backward()
    mine = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    model(tokens(1, 1)).square().sum().backward()
    for a, b in zip(mine, [p.grad for p in model.parameters() if p.grad is not None], strict=True):
        assert_close(a, b, 1e-4)
    assert all(site.plan and site.plan.inline is None for site in moe_fx.last_report().sites)


def test_a_case_covers_every_feature_of_the_spec() -> None:
    served = [c.spec for c in SERVED]
    assert {s.combine.weight_on for s in served} == {"output", "input"}
    assert any(s.expert.norm for s in served)
    assert any(not s.expert.gated for s in served)
    assert replace(SERVED[0]) == SERVED[0]


@pytest.mark.slow
def test_inductors_caches_stay_on(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second compilation of the same graph is a hit, unless the code of the kernels is another."""
    from torch._dynamo.utils import counters

    from moe_fx.lowerings import inline

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    found = []
    for code in ("a", "a", "b"):
        monkeypatch.setattr(inline, "_code", lambda code=code: code)
        fresh()
        counters.clear()
        assert inlined(Stack(), tokens(1, 1))
        hits = counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"]
        found.append(
            (hits, counters["aot_autograd"]["autograd_cache_bypass"] + counters["inductor"]["fxgraph_cache_bypass"])
        )
    assert found[0][0] == 0
    assert found[1][0] > 0
    assert not any(bypassed for _, bypassed in found)
