"""Whoever writes the weights, however: the compiled model computes with what the model holds.

memory="view" is always right.  memory="copy" with a packed layout sees every write that a key can see; the others need
``moe_fx.invalidate``.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import moe_fx
from moe_fx import MoEFxRuntimeError, MoEFxUnsupportedError
from moe_fx.weights import STORE

from .helpers import Block, ListBlock, Stack, all_fused, assert_close, compiled, relative, tokens, twin

X = tokens(3, 7)
Write = Callable[[nn.Module], object]


def banks(model: nn.Module) -> list[nn.Parameter]:
    """The expert matrices."""
    return [p for n, p in model.named_parameters() if "router" not in n and "first" not in n and "last" not in n]


def owners(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """(module, name) of every expert matrix."""
    mine = {id(p) for p in banks(model)}
    return [(m, n) for m in model.modules() for n, p in m.named_parameters(recurse=False) if id(p) in mine]


@torch.no_grad()
def load(model: nn.Module) -> None:
    model.load_state_dict({k: v * 1.5 for k, v in model.state_dict().items()})


@torch.no_grad()
def load_assign(model: nn.Module) -> None:
    model.load_state_dict({k: v * 1.5 for k, v in model.state_dict().items()}, assign=True)


def set_data(model: nn.Module) -> None:
    for p in banks(model):
        p.data = p.data * 1.5


def data_mul(model: nn.Module) -> None:
    for p in banks(model):
        p.data.mul_(1.5)


def numpy_write(model: nn.Module) -> None:
    for p in banks(model):
        p.detach().numpy()[...] *= 1.5


@torch.no_grad()
def in_place(model: nn.Module) -> None:
    for p in banks(model):
        p.mul_(1.5)


@torch.no_grad()
def one_expert(model: nn.Module) -> None:
    for p in banks(model):
        p[0].zero_()


def new_parameter(model: nn.Module) -> None:
    for owner, name in owners(model):
        setattr(owner, name, nn.Parameter(getattr(owner, name).detach() * 1.5))


@torch.no_grad()
def swap_tensors(model: nn.Module) -> None:
    for p in banks(model):
        p.set_(p.detach() * 1.5)


def step(**chosen: Any) -> Write:
    """One step of AdamW for gradients made by hand, so that no backward runs through the model."""

    def write(model: nn.Module) -> None:
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        torch.optim.AdamW(model.parameters(), lr=0.1, **chosen).step()
        model.zero_grad()

    return write


def sgd(model: nn.Module) -> None:
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.SGD(model.parameters(), lr=0.1, fused=True).step()
    model.zero_grad()


def halve_and_widen(model: nn.Module) -> None:
    model.to(torch.bfloat16).to(torch.float32)


SEEN: dict[str, Write] = {
    "load": load, "load-assign": load_assign, "data=": set_data, "in-place": in_place, "one-expert": one_expert,
    "new-parameter": new_parameter, "set_": swap_tensors, "adamw": step(), "foreach": step(foreach=True),
    "fused": step(fused=True), "fused-sgd": sgd, "dtype-and-back": halve_and_widen,
}  # fmt: skip
HIDDEN: dict[str, Write] = {"data.mul_": data_mul, "numpy": numpy_write}
MODELS: dict[str, Callable[[], nn.Module]] = {"stacked": Stack, "list": ListBlock}


def check(fused: Any, model: nn.Module, what: str = "") -> None:
    assert_close(fused(X), twin(model)(X), 1e-5, what)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("write", [*SEEN, *HIDDEN])
def test_view_is_always_right(write: str, kind: str) -> None:
    model = MODELS[kind]()
    fused = compiled(model)
    with torch.no_grad():
        check(fused, model, "before")
        before = fused(X)
        for _ in range(2):
            {**SEEN, **HIDDEN}[write](model)
            check(fused, model, f"after {write}")
        assert relative(fused(X), before) > 1e-3, "the write changed nothing"
    all_fused(2 if kind == "stacked" else 1)
    assert STORE.bytes() == 0


@pytest.mark.parametrize("write", [*SEEN, *HIDDEN])
def test_view_is_always_right_in_training(write: str) -> None:
    model = Stack()
    fused = compiled(model)
    check(fused, model, "before")
    {**SEEN, **HIDDEN}[write](model)
    x, y = X.clone().requires_grad_(), X.clone().requires_grad_()
    fused(x).square().sum().backward()
    grads = [p.grad for p in model.parameters()]
    model.zero_grad()
    model(y).square().sum().backward()
    assert_close(x.grad, y.grad, 1e-4)  # type: ignore[arg-type]
    for (name, p), grad in zip(model.named_parameters(), grads, strict=True):
        assert_close(grad, p.grad, 1e-4, name)  # type: ignore[arg-type]
    all_fused(2)


# "stacked" copies lists only, "transposed" both
COPIES = [("stacked", "transposed"), ("list", "stacked"), ("list", "transposed")]


def packed(model: nn.Module, layout: str, **options: Any) -> Any:
    return compiled(model, memory="copy", layout=layout, **options)


def copied(count: int) -> None:
    """Every block runs on a packed copy."""
    assert all(site.plan is not None and site.plan.layout != "view" for site in all_fused(count).sites)
    assert STORE.bytes() > 0


@pytest.mark.parametrize(("kind", "layout"), COPIES)
@pytest.mark.parametrize("write", SEEN)
def test_copy_sees_what_a_key_can_see(write: str, kind: str, layout: str) -> None:
    model = MODELS[kind]()
    fused = packed(model, layout)
    with torch.no_grad():
        check(fused, model, "before")
        copied(2 if kind == "stacked" else 1)
        before = fused(X)
        for _ in range(2):
            SEEN[write](model)
            check(fused, model, f"after {write}")
        assert relative(fused(X), before) > 1e-3, "the write changed nothing"


@pytest.mark.parametrize(("kind", "layout"), COPIES)
@pytest.mark.parametrize("write", HIDDEN)
def test_copy_needs_invalidate_for_the_rest(write: str, kind: str, layout: str) -> None:
    model = MODELS[kind]()
    fused = packed(model, layout)
    with torch.no_grad():
        before = fused(X)
        HIDDEN[write](model)
        assert relative(fused(X), before) == 0, "seen after all: the documentation can be relaxed"
        assert moe_fx.invalidate(Block()) == 0, "another model's weights"
        assert moe_fx.invalidate(model) == (2 if kind == "stacked" else 1)
        check(fused, model, "after invalidate(model)")
        HIDDEN[write](model)
        assert moe_fx.invalidate() == (2 if kind == "stacked" else 1)
        check(fused, model, "after invalidate()")
        assert moe_fx.invalidate(fused) == (2 if kind == "stacked" else 1), "the compiled wrapper is the same model"


def test_reset_frees_the_copies_and_compiled_code_goes_on() -> None:
    model = Stack()
    fused = packed(model, "transposed")
    with torch.no_grad():
        check(fused, model)
        moe_fx.reset()
        assert STORE.bytes() == 0
        in_place(model)
        check(fused, model)
        assert STORE.bytes() > 0


def test_copy_is_refused_for_weights_that_train() -> None:
    """An explicit layout where gradients are wanted is vetoed when it compiles."""
    with pytest.raises(BackendCompilerFailed, match="require gradients") as caught:
        packed(Stack(), "transposed")(X)
    assert isinstance(caught.value.inner_exception, MoEFxUnsupportedError)


def test_copy_may_be_allowed_without_being_asked_for() -> None:
    """memory="copy" alone leaves the choice to the oracle, and training still works."""
    model = Stack()
    fused = compiled(model, memory="copy")
    with torch.no_grad():
        check(fused, model)
    check(fused, model)
    in_place(model)
    check(fused, model)
    all_fused(2)


@pytest.mark.parametrize("layout", ["view", "transposed"])
def test_freezing_and_thawing(layout: str) -> None:
    """requires_grad_ toggles; a copy works under grad mode while all its weights are frozen."""
    model = Stack()
    fused = compiled(model) if layout == "view" else packed(model, layout)
    model.requires_grad_(False)
    for _ in range(2):
        check(fused, model, "frozen")
        in_place(model)
    check(fused, model, "frozen")
    if layout == "transposed":
        copied(2)
        model.requires_grad_(True)
        with pytest.raises((BackendCompilerFailed, MoEFxRuntimeError), match="require grad"):
            fused(X)
        model.requires_grad_(False)
        check(fused, model, "frozen again")
        return
    for frozen in (["w13"], ["w2"], ["router"], []):
        for name, p in model.named_parameters():
            p.requires_grad_(name.rpartition(".")[2] not in frozen)
        fused(X).square().sum().backward()
        grads = [p.grad for p in model.parameters()]
        model.zero_grad()
        model(X).square().sum().backward()
        for (name, p), grad in zip(model.named_parameters(), grads, strict=True):
            assert (grad is None) == (p.grad is None), name
            if p.grad is not None and grad is not None:
                assert_close(grad, p.grad, 1e-4, f"{name} while {frozen} frozen")
        model.zero_grad()
    all_fused(2)


@pytest.mark.parametrize("layout", ["view", "transposed"])
def test_train_and_eval(layout: str) -> None:
    model = Stack()
    fused = compiled(model) if layout == "view" else packed(model, layout)
    with torch.no_grad():
        for training in (False, True, False):
            model.train(training)
            check(fused, model, f"training={training}")
            in_place(model)
    all_fused(2)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("layout", ["view", "transposed"])
def test_autocast_on_and_off(kind: str, layout: str) -> None:
    """The casts of autocast belong to the block; what comes out has its dtype and its exactness."""
    model = MODELS[kind]()
    exact = twin(model).double()(X.double())
    fused = compiled(model) if layout == "view" else packed(model, layout)
    with torch.no_grad():
        for on in (False, True, False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=on):
                y, expected = fused(X), model(X)
            assert y.dtype == expected.dtype
            bound = 2 * relative(expected, exact) + 4 * torch.finfo(torch.bfloat16 if on else torch.float32).eps
            assert relative(y, exact) <= bound, f"autocast {on}"
    all_fused(2 if kind == "stacked" else 1)


@pytest.mark.parametrize("layout", ["view", "transposed"])
def test_another_model_of_the_same_shape(layout: str) -> None:
    """Compiled, freed, built again at addresses that may be the same: never the old weights."""
    held: list[weakref.ref[nn.Module]] = []
    for seed in range(6):
        model = Stack(lambda seed=seed: Block(seed=seed))  # type: ignore[misc]
        fused = compiled(model) if layout == "view" else packed(model, layout)
        with torch.no_grad():
            check(fused, model, f"seed {seed}")
        held.append(weakref.ref(model))
        del model, fused
        torch._dynamo.reset()
        gc.collect()
    assert [r() is None for r in held] == [True] * 6, "something keeps the model alive"
    assert STORE.bytes() == 0


@pytest.mark.parametrize("layout", ["view", "transposed"])
def test_two_models_with_the_same_code(layout: str) -> None:
    models = [Stack(lambda seed=seed: Block(seed=seed)) for seed in (1, 2)]  # type: ignore[misc]
    fused = [compiled(m) if layout == "view" else packed(m, layout) for m in models]
    with torch.no_grad():
        for _ in range(2):
            for f, m in zip(fused, models, strict=True):
                check(f, m)
            in_place(models[0])


def test_a_block_used_twice() -> None:
    class Twice(Stack):
        def forward(self, x: Tensor) -> Tensor:
            return self.blocks[0](x + self.blocks[0](x))

    model = Twice()
    fused = compiled(model)
    with torch.no_grad():
        check(fused, model)
        in_place(model)
        check(fused, model)
    all_fused(2)


def test_tied_blocks() -> None:
    model = Stack()
    model.blocks[1].w13, model.blocks[1].w2 = model.blocks[0].w13, model.blocks[0].w2
    fused = packed(model, "transposed")
    with torch.no_grad():
        check(fused, model)
        copied(2)
        in_place(model)
        check(fused, model)
        single = sum(p.numel() * 4 for p in (model.blocks[0].w13, model.blocks[0].w2))
        assert STORE.bytes() == single, "one copy for both"


def test_no_gradient_mode_switches_back_and_forth() -> None:
    model = Stack()
    fused = compiled(model)
    for grad in (True, False, True):
        with torch.set_grad_enabled(grad):
            assert fused(X).requires_grad == grad
        with torch.inference_mode():
            assert_close(fused(X), model(X))
    all_fused(2)
