"""Kernels of another format under torch.compile: one batch an expert, the router inside; and the room that they get."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import moe_fx
from moe_fx import MoEFxOptionError, MoEFxUnsupportedError
from moe_fx.kernels.modular_kernel.workspace import held_bytes, release
from moe_fx.kernels.registry import kernel
from moe_fx.options import Options, resolve
from moe_fx.plan import WORKSPACE_BYTES, parse_plan
from tests.routers.formulas import ROUTERS
from tests.routers.helpers import Block as RoutedBlock
from tests.routers.helpers import x_of

from .helpers import Block, ListBlock, Stack, all_fused, assert_close, compiled, fresh, tokens

BATCHED: dict[str, Any] = {"kernel": "batched_loop"}
ROUTED: dict[str, Any] = {"kernel": "routed_loop", "router": "fuse"}
REQUESTS = {"batched_loop": BATCHED, "routed_loop": ROUTED}
LENGTHS = (1, 7, 50)  # one, odd, more than there are experts


class Calls:
    """Tokens of every call of a kernel's experts."""

    def __init__(self, patch: pytest.MonkeyPatch, name: str, method: str = "apply"):
        self.tokens: list[int] = []
        experts: Any = kernel(name).experts
        inner = getattr(experts, method)

        def record(this: Any, *args: Any, **given: Any) -> Any:
            rows = given.get("hidden_states", args[0] if args else None)
            self.tokens.append(rows.shape[-2])
            return inner(this, *args, **given)

        patch.setattr(experts, method, record)


def refused(model: Any, x: Tensor) -> str:
    with pytest.raises(BackendCompilerFailed) as caught:
        model(x)
    assert isinstance(caught.value.inner_exception, MoEFxUnsupportedError)
    return str(caught.value.inner_exception)


@pytest.mark.parametrize(("block", "inner"), [(Block, "eager"), (ListBlock, "eager"), (Block, "inductor")])
@pytest.mark.parametrize("name", REQUESTS)
def test_forward(name: str, block: type[nn.Module], inner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Stack(block)
    calls = Calls(monkeypatch, name)
    fused = compiled(model, **REQUESTS[name], inner_backend=inner)
    for length in LENGTHS:
        x = tokens(length, seed=length)
        with torch.no_grad():
            before = len(calls.tokens)
            assert_close(fused(x), model(x), what=f"{length} tokens")
            assert length in calls.tokens[before:], "another kernel ran"
    report = all_fused(2)
    for site in report.sites:
        assert site.plan is not None
        assert {r.kernel for r in site.plan.ranges} == {name}
        assert site.plan.inline is None
        assert site.spec is not None
        assert (site.spec.router is not None) == (name == "routed_loop")


@pytest.mark.parametrize("router", [r for r in ROUTERS if not r.spec.expert_scale], ids=str)
def test_routers_go_inside(router: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Selection biases reach the kernel; the logits, which the model returns, stay."""
    model, x = RoutedBlock(router.written), x_of()
    calls = Calls(monkeypatch, "routed_loop")
    fused = compiled(model, **ROUTED)
    with torch.no_grad():
        y, logits = fused(x)
        expected, usual = model(x)
    assert_close(y, expected)
    assert torch.equal(logits, usual)
    assert x.shape[0] in calls.tokens
    (site,) = all_fused(1).sites
    assert site.spec is not None
    assert site.spec.router is not None


def test_a_scale_of_each_expert_goes_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    router = next(r for r in ROUTERS if r.spec.expert_scale)
    model, x = RoutedBlock(router.written), x_of()
    calls = Calls(monkeypatch, "routed_loop")
    with torch.no_grad():
        assert_close(compiled(model, **ROUTED)(x)[0], model(x)[0])
    assert calls.tokens


@pytest.mark.parametrize("name", REQUESTS)
def test_a_new_length_does_not_compile_again(name: str) -> None:
    model = Block()
    fused = compiled(model, **REQUESTS[name], dynamic=True)
    with torch.no_grad():
        fused(tokens(5))
        graphs = moe_fx.last_report().num_graphs
        for length in (6, 11, 40):
            assert_close(fused(tokens(length)), model(tokens(length)))
    assert moe_fx.last_report().num_graphs == graphs == 1


@pytest.mark.parametrize("name", REQUESTS)
def test_training_is_refused(name: str) -> None:
    text = refused(compiled(Block(), **REQUESTS[name]), tokens(7))
    assert f"{name}/view: veto.training: gradients are wanted and it is forward only" in text


def test_a_router_that_stays_is_refused() -> None:
    with torch.no_grad():
        text = refused(compiled(Block(), kernel="routed_loop"), tokens(7))
        assert "veto.routing: it contains the router, and this block's router stays in the graph" in text
        fresh()
        text = refused(compiled(Unknown(), **ROUTED), tokens(7))
    assert "veto.routing" in text
    assert "the router stays: " in text


class Unknown(Block):
    """Its router is none that a RouterSpec describes."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = super().route(x)
        return weights * (1 + 0.1 * x[:, :1].cos()), ids


def test_other_kernels_keep_their_plan_when_routers_are_fused() -> None:
    model, x = Block(), tokens(7)
    with torch.no_grad():
        assert_close(compiled(model, kernel="sorted_loop", router="fuse")(x), model(x))
    (site,) = all_fused(1).sites
    assert site.plan is not None
    assert site.plan.kernel_for(7) == "sorted_loop"


# --- room


ROOM, MANY = 1 << 20, 12_000  # bytes, tokens that do not fit into them


@pytest.mark.parametrize("name", ["sorted_loop", "reference"])
def test_the_room_reaches_the_kernel(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Block(), tokens(MANY)
    calls = Calls(monkeypatch, name, "compute")
    with torch.no_grad():
        expected = model(x)
        for options, cut in (({}, False), ({"workspace_bytes": ROOM}, True)):
            fresh()
            fused = compiled(model, kernel=name, **options)
            fused(x)
            calls.tokens.clear()  # those of verification
            assert_close(fused(x), expected)
            assert sum(calls.tokens) == MANY
            assert (len(calls.tokens) > 1) == cut
    plan = all_fused(1).sites[0].plan
    assert plan is not None
    assert parse_plan(plan.op_string()).workspace_bytes == plan.workspace_bytes == ROOM


def test_the_room_does_not_cut_what_a_backward_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    release()
    model, x = Block(), tokens(MANY)
    calls = Calls(monkeypatch, "sorted_loop", "compute")
    y = compiled(model, kernel="sorted_loop", workspace_bytes=ROOM)(x)
    assert calls.tokens[-1] == MANY
    y.sum().backward()
    assert_close(y, model(x))
    assert held_bytes() <= ROOM


def test_the_option() -> None:
    assert Options().workspace_bytes == WORKSPACE_BYTES == 1 << 30
    assert resolve({"workspace_bytes": ROOM}).workspace_bytes == ROOM
    for wrong, message in (
        (ROOM - 1, "must be at least 1048576"),
        (-1, "must be at least 1048576"),
        (True, "must be int"),
        (1e9, "must be int"),
        ("1GiB", "must be int"),
        (None, "must be int"),
    ):
        with pytest.raises(MoEFxOptionError, match=f"'workspace_bytes' {message}"):
            resolve({"workspace_bytes": wrong})
