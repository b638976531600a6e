"""Nothing outside of our own compilations changes: other backends, threads, torch.export, transformers, settings."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.symbolic_convert import InliningInstructionTranslator

import moe_fx
from moe_fx.backend import moe_fx as function
from moe_fx.options import disabled
from moe_fx.passes.capture import hooks
from moe_fx.report import Report
from tests.zoo.samples import build

from .helpers import INSTALLED, Stack, all_fused, assert_close, compiled, tokens, twin

ROOT = Path(__file__).resolve().parents[2]
MODES = ["used", *(pytest.param(m, marks=pytest.mark.slow) for m in ("before", "after", "thread", "uninstalled"))]


def python(*arguments: str, **environment: str) -> str:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *arguments], capture_output=True, text=True, env=env, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""


@cache
def behaviour(what: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(python("-m", "tests.e2e.stock_behaviour", what))
    return found


# --- other compilations ----------------------------------------------------------------------------------------------


def test_the_comparison_sees_something() -> None:
    found = behaviour("nothing")
    assert len(found["mixtral-eager"]["graphs"]) > 4, "transformers' loop breaks graphs without us"
    assert found["mixtral-eager"]["breaks"]
    assert found["mixtral-None"]["guards"]


@pytest.mark.parametrize("what", MODES)
def test_other_backends_and_export_are_as_without_us(what: str) -> None:
    stock, ours = behaviour("nothing"), behaviour(what)
    assert ours.keys() == stock.keys()
    for name in stock:
        assert ours[name] == stock[name], name


@pytest.mark.slow
@pytest.mark.parametrize("implementation", [None, "eager"])
def test_inductor_is_as_eager_after_us(implementation: Any) -> None:
    """In this process, after ours compiled the same class."""
    sample = build("mixtral", implementation, config=dict(num_hidden_layers=1))
    with torch.no_grad():
        compiled(sample.model)(**sample.inputs)
        all_fused(1)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        theirs = torch.compile(sample.model, backend="inductor")
        expected = sample.output(sample.model(**sample.inputs))[0]
        assert_close(sample.output(theirs(**sample.inputs))[0], expected, 1e-5)
    assert bool(torch._dynamo.utils.counters["graph_break"]) == (implementation == "eager")


def test_two_backends_on_one_model_do_not_share_code() -> None:
    sample = build("mixtral", "eager")
    graphs: list[int] = []

    def counting(gm: torch.fx.GraphModule, _: list[Any]) -> Any:
        graphs.append(sum("moe_fx" in str(n.target) for n in gm.graph.nodes))
        return gm.forward

    theirs = torch.compile(sample.model, backend=counting)
    ours = compiled(sample.model)
    with torch.no_grad():
        expected = sample.output(sample.model(**sample.inputs))[0]
        for _ in range(2):
            assert_close(sample.output(theirs(**sample.inputs))[0], expected, 1e-5)
            assert_close(sample.output(ours(**sample.inputs))[0], expected, 1e-5)
    all_fused(2)
    assert len(graphs) > 4
    assert not any(graphs), "our op in another backend's graph"


# --- threads ---------------------------------------------------------------------------------------------------------


def test_compiling_in_another_thread() -> None:
    model, x, found = Stack(), tokens(3, 7), []

    def work() -> None:
        with torch.no_grad():
            found.append(compiled(model)(x))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert_close(found[0], model(x), 1e-6)
    all_fused(2)


def test_many_threads_at_once() -> None:
    models, errors = [Stack() for _ in range(4)], []
    start = threading.Barrier(4, timeout=60)

    def work(index: int) -> None:
        try:
            x = tokens(3 + index, 7)
            fused = compiled(models[index])
            start.wait()
            for _ in range(5):
                y = fused(x.requires_grad_())
                (dx,) = torch.autograd.grad(y.square().sum(), x)
                expected = models[index](x)
                assert_close(y, expected, 1e-5)
                assert_close(dx, torch.autograd.grad(expected.square().sum(), x)[0], 1e-4)
        except BaseException as error:  # reported below
            errors.append(error)
            raise

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


# --- imports ---------------------------------------------------------------------------------------------------------


def test_importing_us_does_not_import_transformers() -> None:
    code = "import sys; import moe_fx; a = 'torch' in sys.modules; import moe_fx.backend, moe_fx.api; "
    code += "print(a, any(n.partition('.')[0] == 'transformers' for n in sys.modules))"
    assert python("-c", code) == "False False"


def test_compiling_does_not_import_transformers() -> None:
    code = "import sys, torch; from tests.e2e.helpers import *; "
    code += "torch.set_grad_enabled(False); compiled(Stack())(tokens(3)); all_fused(2); "
    code += "print(any(n.partition('.')[0] == 'transformers' for n in sys.modules))"
    assert python("-c", code) == "False"


@pytest.mark.parametrize("order", ["moe_fx.backend, transformers", "transformers, moe_fx.backend"])
def test_either_import_order_captures_the_loop(order: str) -> None:
    code = f"import {order}, moe_fx, torch; from tests.zoo.samples import build; torch.set_grad_enabled(False)\n"
    code += "s = build('mixtral', 'eager'); from tests.e2e.helpers import compiled\n"
    code += "compiled(s.model)(**s.inputs); r = moe_fx.last_report(); print(r.num_fused, r.num_graphs)"
    assert python("-c", code) == "2 1"


@pytest.mark.skipif(not INSTALLED, reason="moe_fx is not installed: no entry point")
def test_the_entry_point_is_enough() -> None:
    """A user's script that never imports moe_fx."""
    code = "import torch; from tests.zoo.samples import build; torch.set_grad_enabled(False)\n"
    code += "s = build('mixtral', 'eager'); import sys; assert 'moe_fx' not in sys.modules\n"
    code += "m = torch.compile(s.model, backend='moe_fx', fullgraph=True, options={'inner_backend': 'eager'})\n"
    code += "m(**s.inputs); print(sys.modules['moe_fx'].last_report().num_fused)"
    assert python("-c", code) == "2"


# --- the hook --------------------------------------------------------------------------------------------------------


def attribute() -> Any:
    return inspect.getattr_static(InliningInstructionTranslator, "inline_call")


@pytest.fixture
def _hooked() -> Iterator[None]:
    yield
    hooks.install(function, lambda: not disabled())


def test_importing_does_not_touch_dynamo_twice() -> None:
    before = attribute()
    assert hooks.install(function) == ""
    assert attribute() is before


@pytest.mark.usefixtures("_hooked")
def test_uninstall_restores_identity() -> None:
    code = "import inspect; from torch._dynamo.symbolic_convert import InliningInstructionTranslator as T\n"
    code += "get = lambda: inspect.getattr_static(T, 'inline_call'); before = get(); import moe_fx.backend\n"
    code += "from moe_fx.passes.capture import hooks; a = get() is before; hooks.uninstall(); hooks.uninstall()\n"
    code += "print(a, get() is before)"
    assert python("-c", code) == "False True"


@pytest.mark.usefixtures("_hooked")
def test_without_the_hook_the_rest_still_works() -> None:
    hooks.uninstall()
    assert hooks.available() == ""
    with torch.no_grad():
        sample = build("mixtral")
        compiled(sample.model)(**sample.inputs)
        all_fused(2)
        sample = build("mixtral", "eager")
        expected = sample.output(sample.model(**sample.inputs))[0]
        result = sample.output(compiled(sample.model, fullgraph=False)(**sample.inputs))[0]
    assert_close(result, expected, 1e-5)
    assert moe_fx.last_report().num_fused == 0


@pytest.mark.parametrize("implementation", [None, "eager"])
def test_the_off_switch_is_the_inner_backend_alone(monkeypatch: pytest.MonkeyPatch, implementation: Any) -> None:
    """No block is fused, and Dynamo sees the loops as it would without us."""
    monkeypatch.setenv("MOE_FX_DISABLE", "1")
    sample = build("mixtral", implementation)
    with torch.no_grad():
        expected = sample.output(torch.compile(sample.model, backend="eager")(**sample.inputs))[0]
        stock = dict(torch._dynamo.utils.counters["stats"])
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        result = sample.output(compiled(sample.model, fullgraph=False)(**sample.inputs))[0]
    assert torch.equal(result, expected)
    assert moe_fx.last_report() == Report()
    assert dict(torch._dynamo.utils.counters["stats"]) == stock


def test_a_handler_of_the_user_is_respected() -> None:
    from transformers.integrations import moe

    calls = []

    def handler(self: Any, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        calls.append(hidden.shape)
        return moe.grouped_mm_experts_forward(self, hidden, ids, weights) * 2

    interface = moe.ALL_EXPERTS_FUNCTIONS
    assert "eager" not in interface
    sample = build("mixtral", "eager")
    with torch.no_grad():
        plain = sample.output(sample.model(**sample.inputs))[0]
        interface["eager"] = handler
        try:
            expected = sample.output(sample.model(**sample.inputs))[0]
            result = sample.output(compiled(sample.model, fullgraph=False)(**sample.inputs))[0]
        finally:
            interface._local_mapping.pop("eager", None)
            interface._global_mapping.pop("eager", None)
    assert calls
    assert not torch.allclose(plain, expected, rtol=1e-3)
    assert_close(result, expected, 1e-5)


# --- state -----------------------------------------------------------------------------------------------------------


def configuration() -> dict[str, Any]:
    import torch._functorch.config as functorch
    import torch._inductor.config as inductor

    return {m.__name__: m.get_config_copy() for m in (torch._dynamo.config, functorch, inductor)}


@pytest.mark.parametrize("grad", [False, True])
def test_global_state_is_as_before(grad: bool) -> None:
    from torch.overrides import _get_current_function_mode_stack

    sample = build("mixtral", "eager")
    state = torch.get_rng_state()

    def settings() -> tuple[Any, ...]:
        return (
            configuration(), torch.get_default_dtype(), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"),
            torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), torch.get_default_device(),
            list(_get_current_function_mode_stack()), torch._guards.TracingContext.try_get(),
        )  # fmt: skip

    with torch.set_grad_enabled(grad):
        before = settings()
        compiled(sample.model)(**sample.inputs)
        assert settings() == before
    assert torch.equal(torch.get_rng_state(), state), "random numbers were drawn from the global generator"
    all_fused(2)


def test_the_model_is_not_changed() -> None:
    sample = build("gpt_oss", "eager")
    model, reference = sample.model, twin(sample.model)

    def shape(m: torch.nn.Module) -> list[Any]:
        names = [(n, type(c), sorted(c.__dict__), len(c._forward_hooks)) for n, c in m.named_modules()]
        held = m.state_dict(keep_vars=True)
        tensors = [(n, t.shape, t.stride(), t.dtype, t.requires_grad, t._version) for n, t in held.items()]
        return [*names, *tensors, str(getattr(m, "config", ""))]

    forwards = {type(m): type(m).forward for m in model.modules()}
    torch.compile(model, backend="eager")(**sample.inputs)  # transformers notes on the model that it was compiled
    torch._dynamo.reset()
    before, addresses = shape(model), [p.data_ptr() for p in model.parameters()]
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            compiled(model)(**sample.inputs)
    all_fused(2)
    assert shape(model) == before
    assert [p.data_ptr() for p in model.parameters()] == addresses
    assert all(kind.forward is forward for kind, forward in forwards.items())
    for (name, a), b in zip(model.state_dict().items(), reference.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("ambient", ["default_device", "default_dtype", "inference_mode", "deterministic"])
def test_ambient_modes(ambient: str) -> None:
    """Compiling inside of what a user may have set does not fail, and verification is not misled."""
    model, x = Stack(), tokens(3, 7)
    expected = model(x)
    if ambient == "default_device":
        with torch.device("meta"), torch.no_grad():
            result = compiled(model, strict=True)(x)
    elif ambient == "default_dtype":
        torch.set_default_dtype(torch.float64)
        try:
            with torch.no_grad():
                result = compiled(model, strict=True)(x)
        finally:
            torch.set_default_dtype(torch.float32)
    elif ambient == "inference_mode":
        with torch.inference_mode():
            result = compiled(model, strict=True)(x)
    else:
        torch.use_deterministic_algorithms(True)
        try:
            with torch.no_grad():
                result = compiled(model, strict=True)(x)
        finally:
            torch.use_deterministic_algorithms(False)
    assert_close(result.clone(), expected, 1e-6)
    all_fused(2)
