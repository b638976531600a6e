"""Token counts: after two lengths no recompile; T = 0 and T = 1 cost at most one graph each; T chooses the kernel."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import moe_fx
from tests.zoo.samples import build, unavailable

from .helpers import BACKEND, Block, ListBlock, Stack, all_fused, assert_close, compiled, tokens

LENGTHS = (2, 3, 5, 17, 64, 255, 1024, 4096)
backend = sys.modules["moe_fx.backend"]


class Counting:
    """Counts what reaches the inner backend, and keeps the graphs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.graphs: list[torch.fx.GraphModule] = []
        original = backend.compile_inner

        def count(gm: torch.fx.GraphModule, *rest: Any) -> Any:
            self.graphs.append(gm)
            return original(gm, *rest)

        monkeypatch.setattr(backend, "compile_inner", count)

    def __len__(self) -> int:
        return len(self.graphs)


@pytest.fixture
def inner(monkeypatch: pytest.MonkeyPatch) -> Counting:
    return Counting(monkeypatch)


def stock_graphs(model: nn.Module, calls: list[dict[str, Any]]) -> list[int]:
    """Graphs that Dynamo compiles without us, after each call."""
    count, found = 0, []

    def eager(gm: torch.fx.GraphModule, _: list[Any]) -> Any:
        nonlocal count
        count += 1
        return gm.forward

    torch._dynamo.reset()
    model = torch.compile(model, backend=eager, fullgraph=True)
    for arguments in calls:
        model(**arguments)
        found.append(count)
    torch._dynamo.reset()
    return found


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("block", [Block, ListBlock], ids=lambda b: b.__name__)
def test_two_lengths_then_no_recompile(inner: Counting, block: type[nn.Module], grad: bool) -> None:
    model = Stack(block)
    fused = compiled(model)
    with torch.set_grad_enabled(grad):
        for i, length in enumerate(LENGTHS):
            x = tokens(length)
            assert_close(fused(x), model(x), 1e-5, f"T={length}")
            assert len(inner) <= min(i + 1, 2), f"a recompile at T={length}"
    assert all_fused(2).num_graphs == len(inner) == counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("block", [Block, ListBlock], ids=lambda b: b.__name__)
def test_batch_and_length(inner: Counting, block: type[nn.Module]) -> None:
    """[batch, length, H]: as many graphs as without us, at every step."""
    shapes = [(3, 7), (3, 9), (3, 31), (3, 2), (5, 9), (2, 64), (64, 2), (4, 1024)]
    model = Stack(block)
    with torch.no_grad():
        expected = stock_graphs(model, [{"x": tokens(*shape)} for shape in shapes])
    fused, found = compiled(model), []
    with torch.no_grad():
        for shape in shapes:
            x = tokens(*shape)
            assert_close(fused(x), model(x), 1e-5, f"{shape}")
            found.append(len(inner))
    assert found == expected
    all_fused(2)


def left_alone_at_zero_only() -> None:
    """Of a graph for no tokens at all every size is 0, so what is what cannot be told: it may be left as it was."""
    by_graph: dict[int, list[bool]] = {}
    for site in moe_fx.last_report().sites:
        by_graph.setdefault(site.graph, []).append(site.fused)
    assert sorted(by_graph.values()).count([True, True]) >= len(by_graph) - 1


def test_one_and_zero_tokens_cost_one_graph_each(inner: Counting) -> None:
    model = Stack()
    fused = compiled(model)
    with torch.no_grad():
        for length in (2, 3):
            fused(tokens(length))
        before = len(inner)
        for length in (1, 0):
            x = tokens(length)
            assert fused(x).shape == model(x).shape
            assert_close(fused(x), model(x), 1e-5, f"T={length}")
            before += 1
            assert len(inner) <= before
            if length == 1:
                all_fused(2)
        for length in (1, 0, *LENGTHS, 0, 1):
            x = tokens(length)
            assert_close(fused(x), model(x), 1e-5, f"T={length}")
        assert len(inner) <= before
    left_alone_at_zero_only()


@pytest.mark.parametrize("first", [1, 0, 2], ids=lambda n: f"first-T={n}")
def test_whatever_comes_first(inner: Counting, first: int) -> None:
    model = Stack()
    fused = compiled(model)
    with torch.no_grad():
        for length in (first, *LENGTHS):
            x = tokens(length)
            assert_close(fused(x), model(x), 1e-5, f"T={length}")
    assert len(inner) <= 3
    left_alone_at_zero_only()


def test_marked_dynamic_is_one_graph(inner: Counting) -> None:
    model = Stack()
    fused = compiled(model)
    with torch.no_grad():
        for length in LENGTHS:
            x = tokens(length)
            torch._dynamo.mark_dynamic(x, 0)
            assert_close(fused(x), model(x), 1e-5, f"T={length}")
    assert len(inner) == 1
    all_fused(2)


def test_dynamic_true_is_one_graph(inner: Counting) -> None:
    model = Stack()
    fused = compiled(model, dynamic=True)
    with torch.no_grad():
        for length in LENGTHS:
            assert_close(fused(tokens(length)), model(tokens(length)), 1e-5, f"T={length}")
    assert len(inner) == 1
    all_fused(2)


def test_dynamic_false_is_one_graph_a_length(inner: Counting) -> None:
    model = Stack()
    fused = compiled(model, dynamic=False)
    with torch.no_grad():
        for length in LENGTHS[:4]:
            assert_close(fused(tokens(length)), model(tokens(length)), 1e-5, f"T={length}")
    assert len(inner) == 4
    assert all_fused(2).num_graphs == 4


def test_no_guard_mentions_a_layer_or_a_token_count() -> None:
    """Guards that we caused would show as symbolic expressions over T other than T >= 2."""
    model = Stack()
    exprs: list[str] = []

    def inner(gm: torch.fx.GraphModule, _: list[Any]) -> Any:
        env = torch._guards.TracingContext.get().fake_mode.shape_env
        exprs.extend(str(g.expr) for g in env.guards)
        return gm.forward

    def guards(target: Any) -> list[str]:
        exprs.clear()
        torch._dynamo.reset()
        with torch.no_grad():
            for length in (5, 9):
                target(tokens(length))
        return list(exprs)

    stock = guards(torch.compile(model, backend=inner, fullgraph=True))
    patch = pytest.MonkeyPatch()
    patch.setattr(backend, "compile_inner", lambda gm, examples, _: inner(gm, examples))
    try:
        ours = guards(torch.compile(model, backend=BACKEND, fullgraph=True))
    finally:
        patch.undo()
    all_fused(2)
    assert ours == stock


def test_the_kernel_follows_the_token_count() -> None:
    """One graph, and the plan's ranges decide at run time."""
    from moe_fx.kernels.registry import KERNELS

    model, used = Block(), []
    fused = compiled(model)
    with torch.no_grad():
        for length in (5, 9):
            fused(tokens(length))
        plan = all_fused(1).sites[0].plan
        assert plan is not None
        patch = pytest.MonkeyPatch()
        for name, kernel in list(KERNELS.items()):

            class Spy(kernel.experts):  # type: ignore[name-defined]
                def compute(self, *args: Any) -> Any:
                    used.append(self.name)
                    return super().compute(*args)

            patch.setitem(KERNELS, name, replace(kernel, experts=Spy))
        from moe_fx.lowerings import dispatch

        dispatch._parsed.cache_clear()
        try:
            for length in LENGTHS:
                fused(tokens(length))
        finally:
            patch.undo()
            dispatch._parsed.cache_clear()
    assert used == [plan.kernel_for(length) for length in LENGTHS]


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", pytest.param("nemotron_h", marks=pytest.mark.slow), "llama4"])
def test_a_model_of_transformers(inner: Counting, name: str) -> None:
    """As many graphs as without us, at every step."""
    assert unavailable(name) is None
    sample = build(name)
    calls = [sample.inputs_of(batch, length) for batch, length in [(2, 11), (2, 13), (2, 29), (2, 64), (2, 2)]]
    model, found = compiled(sample.model), []
    with torch.no_grad():
        stock = stock_graphs(sample.model, calls)
        for inputs in calls:
            expected = sample.output(sample.model(**inputs))[0]
            assert_close(sample.output(model(**inputs))[0], expected, 1e-4, f"{expected.shape}")
            found.append(len(inner))
    assert found == stock
    all_fused(sample.family.moe_layers)


@pytest.mark.parametrize("eager", ["eager", "grouped_mm", "batched_mm"])
def test_implementations_of_transformers(inner: Counting, eager: Any) -> None:
    sample = build("mixtral", eager)
    model = compiled(sample.model)
    with torch.no_grad():
        for batch, length in [(2, 11), (2, 13), (2, 29)]:
            inputs = sample.inputs_of(batch, length)
            expected = sample.output(sample.model(**inputs))[0]
            assert_close(sample.output(model(**inputs))[0], expected, 1e-4, f"{batch} x {length}")
    assert len(inner) == 2
    all_fused(2)


@pytest.mark.slow
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_inductor(inner: Counting, grad: bool) -> None:
    model = Block()
    fused = compiled(model, inner_backend="inductor")
    with torch.set_grad_enabled(grad):
        for length in (*LENGTHS, 1, *LENGTHS):
            x = tokens(length).requires_grad_(grad)
            y = fused(x)
            assert_close(y, model(x), 1e-5, f"T={length}")
            if grad:
                (dx,), (expected,) = (torch.autograd.grad(f.square().sum(), x) for f in (y, model(x)))
                assert_close(dx, expected, 1e-4, f"gradient at T={length}")
    assert len(inner) <= 3
    all_fused(1)


def test_the_report_counts_graphs(inner: Counting) -> None:
    model = compiled(Stack())
    with torch.no_grad():
        for length in LENGTHS:
            model(tokens(length))
    report = moe_fx.last_report()
    assert report.num_graphs == len(inner) == 2
    assert len(report.sites) == 4, "two blocks in two graphs"
    assert report.num_blocks == 2
