"""Loops over experts with ``torch.where`` under torch.compile's defaults, and code that is no MoE, which keeps Dynamo's
own graphs and breaks; and a torch that lacks what this builds on."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters

import moe_fx
from moe_fx.__main__ import HOOKS
from moe_fx.backend import moe_fx as backend
from moe_fx.options import disabled
from moe_fx.passes.capture import data_sizes, hooks

from .helpers import BACKEND, Stack, all_fused, assert_close, compiled, fresh, tokens

E, K, H, I = 5, 2, 16, 12  # noqa: E741  the names of the field


class Loop(nn.Module):
    """A static loop; ``before`` runs between the router and the loop, ``rows`` limits what an expert takes."""

    def __init__(
        self, act: Any = F.silu, before: Callable[[], object] = lambda: None, rows: slice = slice(None), steer: str = ""
    ):
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Linear(H, E, bias=False)
        self.up = nn.ModuleList(nn.Linear(H, I) for _ in range(E))
        self.down = nn.ModuleList(nn.Linear(I, H) for _ in range(E))
        self.act, self.before, self.rows, self.steer = act, before, rows, steer

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, H)
        weights, ids = self.gate(flat).softmax(-1).topk(K, -1)
        self.before()
        out = torch.zeros_like(flat)
        for e in range(E):
            token, slot = torch.where(ids == e)
            if self.steer == "any" and not (ids == e).any():
                continue
            if self.steer == "size" and token.numel() == 0:
                continue
            token, slot = token[self.rows], slot[self.rows]
            out.index_add_(0, token, self.down[e](self.act(self.up[e](flat[token]))) * weights[token, slot, None])
        return out.view(x.shape)


class Unrolled(Loop):
    """Without a loop in the source (a graph break in one has Dynamo give the frame up for good); of no known activation
    while it trains."""

    def forward(self, x: Tensor) -> Tensor:
        act = torch.sin if self.training else F.silu
        weights, ids = self.gate(x).softmax(-1).topk(K, -1)
        first = self.add(act, x, weights, ids, 0, self.add(act, x, weights, ids, 1, torch.zeros_like(x)))
        second = self.add(act, x, weights, ids, 2, self.add(act, x, weights, ids, 3, first))
        return self.add(act, x, weights, ids, 4, second)

    def add(self, act: Any, x: Tensor, weights: Tensor, ids: Tensor, e: int, out: Tensor) -> Tensor:
        token, slot = torch.where(ids == e)
        return out.index_add(0, token, self.down[e](act(self.up[e](x[token]))) * weights[token, slot, None])


class Selects(nn.Module):
    """No MoE: a selection by a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(H, H)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return y[y[:, 0] > 0].sum() + y.sum()


@pytest.fixture(autouse=True)
def _fresh() -> None:
    fresh()
    counters.clear()


def run(model: nn.Module, *lengths: int, **options: Any) -> Any:
    """Compiles with torch.compile's defaults and compares each length with eager."""
    fused = compiled(model, fullgraph=False, **options)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seed, length in enumerate(lengths):
            x = tokens(length, seed=seed)
            assert_close(fused(x), model(x), 1e-5)
    return fused


def test_a_static_loop_is_one_graph_without_fullgraph() -> None:
    run(Loop(), 12, 30, 1)
    all_fused(1)
    assert not counters["graph_break"]


def test_every_layer_of_a_model() -> None:
    run(Stack(Loop), 12, 30)
    all_fused(2)
    assert not counters["graph_break"]


def test_gradients() -> None:
    model, x = Loop(), tokens(9)
    fused = compiled(model, fullgraph=False)
    expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    for mine, other in zip(
        torch.autograd.grad(fused(x).square().sum(), list(model.parameters())), expected, strict=True
    ):
        assert_close(mine, other, 1e-4)
    all_fused(1)


def test_what_follows_a_break_is_a_frame_of_its_own() -> None:
    run(Loop(before=torch._dynamo.graph_break), 12)
    assert moe_fx.last_report().num_fused == 1
    assert counters["graph_break"]


def graphs_of(model: nn.Module, ours: Any = None) -> tuple[list[list[str]], dict[str, int]]:
    """Ops of every graph that Dynamo makes for ``ours``, or for a backend that it does not know, and its breaks."""
    fresh()
    counters.clear()
    graphs: list[list[str]] = []

    def record(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        result = ours(gm, inputs, options={"inner_backend": "eager"}) if ours else gm.forward
        graphs.append([str(n.target) for n in gm.graph.nodes])
        return result

    if ours:  # marked as Dynamo's wrappers mark what they wrap
        record._torchdynamo_orig_backend = ours  # type: ignore[attr-defined]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model_c = torch.compile(model, backend=record)
        for length in (12, 30):
            model_c(tokens(length))
    return graphs, dict(counters["graph_break"])


@pytest.mark.parametrize(
    "model",
    [
        Selects,
        lambda: Loop(torch.sin),
        lambda: Loop(rows=slice(3)),
        lambda: Loop(steer="any"),
        lambda: Loop(steer="size"),
    ],
    ids=["selects", "unknown activation", "capacity", "any", "size"],
)
def test_where_nothing_is_fused_dynamo_does_as_ever(model: Callable[[], nn.Module]) -> None:
    ours = graphs_of(model(), backend)
    assert moe_fx.last_report().num_fused == 0
    assert ours == graphs_of(model())


def test_the_reasons_of_the_first_trace_are_kept() -> None:
    run(Loop(torch.sin), 12)
    (site,) = moe_fx.last_report().sites
    assert [r.code for r in site.rejects] == ["match.activation"]
    assert "test_data_sizes.py" in site.source


@pytest.mark.parametrize("steer", ["any", "size"])
def test_a_branch_on_data_is_named(steer: str) -> None:
    run(Loop(steer=steer), 12)
    (site,) = moe_fx.last_report().sites
    assert [r.code for r in site.rejects] == ["capture.data_dependent"]
    assert site.fqn == "Loop"
    assert "if self.steer" in site.source


def test_a_frame_that_was_sent_back_is_tried_again_for_other_inputs() -> None:
    """The code is the same; what is known about it is not."""
    model = Unrolled()
    run(model, 12)
    assert moe_fx.last_report().num_fused == 0
    run(model.eval(), 12)
    assert moe_fx.last_report().num_fused == 1


def test_the_users_own_setting_is_respected() -> None:
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        run(Selects(), 12)
    assert not counters["graph_break"]
    fresh()
    run(Selects(), 12)
    assert counters["graph_break"]


def test_an_error_of_the_trace_sends_the_frame_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever Dynamo raises on sizes from data, without them it goes on."""
    from torch._dynamo.variables.tensor import TensorVariable

    original = TensorVariable.call_method

    def fail(self: Any, tx: Any, name: str, args: Any, kwargs: Any) -> Any:
        if name == "index_add_" and tx.output.shape_env.allow_dynamic_output_shape_ops:
            raise ZeroDivisionError("planted")
        return original(self, tx, name, args, kwargs)

    monkeypatch.setattr(TensorVariable, "call_method", fail)
    run(Loop(), 12)
    (site,) = moe_fx.last_report().sites
    assert "planted" in site.rejects[0].text


def test_nothing_is_kept_of_a_trace() -> None:
    run(Loop(), 12)
    run(Selects(), 12)
    assert len(data_sizes._allowed) == 0


class Broadcasts(Loop):
    """What follows the block selects one row, which is spread over all: with two rows it would be an error."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y + x[x[:, 0] >= x[:, 0].max()]


def test_sizes_elsewhere_that_the_trace_would_assert_break_the_graph_as_ever() -> None:
    """The trace would take the one row for as many as there are tokens."""
    run(Broadcasts(), 12, 30)
    assert counters["graph_break"]


def test_inductor() -> None:
    model = Loop()
    fused = torch.compile(model, backend=BACKEND)
    with torch.no_grad():
        for length in (12, 30, 1):
            assert_close(fused(tokens(length)), model(tokens(length)), 1e-5)
    all_fused(1)


# --- a torch that lacks a private name


class Lesser(ModuleType):
    """A module without one name for moe_fx; torch, which needs it too, still finds it."""

    def __init__(self, real: ModuleType, name: str):
        super().__init__(real.__name__)
        vars(self).update({k: v for k, v in vars(real).items() if k != name})
        self.real = real

    def __getattr__(self, name: str) -> Any:
        if sys._getframe(1).f_globals["__name__"].startswith("moe_fx"):
            raise AttributeError(name)
        return getattr(self.real, name)


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], None]]:
    """Takes a private name, and what hangs on it, from the module that moe_fx imports it from."""

    def again() -> None:
        data_sizes.missing.cache_clear()
        hooks.uninstall()
        hooks.install(backend, lambda: not disabled())

    def take(module: str, path: str) -> None:
        monkeypatch.setitem(sys.modules, module, Lesser(importlib.import_module(module), path.partition(".")[0]))
        again()

    yield take
    monkeypatch.undo()
    again()


@pytest.mark.parametrize("module, path", data_sizes.NEEDS)
def test_without_a_private_name_dynamo_does_as_ever(
    without: Callable[[str, str], None], module: str, path: str
) -> None:
    expected = graphs_of(Unrolled().eval())
    without(module, path)
    assert graphs_of(Unrolled().eval(), backend) == expected
    fresh()
    run(Loop(), 12)
    (reject,) = {r for site in moe_fx.last_report().sites for r in site.rejects}
    assert reject.code == "capture.unavailable"
    assert f"{module}.{path} is missing" in reject.text


def test_settings_that_are_not_heeded_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_sizes, "ShapeEnv", lambda **_: ModuleType("environment"))
    assert data_sizes.missing.__wrapped__().startswith("ShapeEnv.settings: ")


LOOPS = "torch._dynamo.symbolic_convert"


def test_without_the_hook_of_traces_loops_of_transformers_are_fused(without: Callable[[str, str], None]) -> None:
    from tests.zoo.samples import build

    without(LOOPS, "InstructionTranslator.run")
    assert hooks.available() == f"{LOOPS}.InstructionTranslator.run is missing (for loops with torch.where)"
    run(Loop(), 12)
    assert moe_fx.last_report().num_fused == 0
    fresh()
    sample = build("mixtral", "eager", config={"num_hidden_layers": 1})
    with torch.no_grad():
        compiled(sample.model)(**sample.inputs)
    all_fused(1)


def test_without_the_hook_of_inlining_loops_with_where_are_fused(without: Callable[[str, str], None]) -> None:
    path = "InliningInstructionTranslator.inline_call"
    without(LOOPS, path)
    assert hooks.available() == f"{LOOPS}.{path} is missing (for loops of transformers' experts)"
    run(Loop(), 12)
    all_fused(1)


def test_a_tracer_with_a_method_of_its_own_is_surrounded_and_restored(
    without: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._dynamo.symbolic_convert import InstructionTranslator

    hooks.uninstall()
    inherited = InstructionTranslator.run

    def own(self: Any) -> None:
        inherited(self)

    monkeypatch.setattr(InstructionTranslator, "run", own, raising=False)
    assert hooks.install(backend, lambda: not disabled()) == ""
    run(Loop(), 12)
    all_fused(1)
    hooks.uninstall()
    assert vars(InstructionTranslator)["run"] is own


def test_doctor_looks_for_every_name() -> None:
    needed = {*data_sizes.NEEDS, *hooks.INLINING, *hooks.TRACING}
    assert needed <= {(module, path) for module, path, _ in HOOKS}
