"""Kernels under CUDA graphs: what a plan for them may hold.  That a graph replays rightly: tests/e2e/test_gpu.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
from torch._inductor import config as inductor

import moe_fx.kernels.experts  # registers the kernels
import moe_fx.kernels.libraries  # noqa: F401
from moe_fx.binding import Operand, WeightBinding
from moe_fx.hardware import Device, catalogue
from moe_fx.kernels.registry import KERNELS
from moe_fx.options import resolve
from moe_fx.oracle.engine import choose
from moe_fx.oracle.request import Request
from moe_fx.plan import Plan
from moe_fx.reasons import MoEFxUnsupportedError
from tests.oracle.candidates import MODELS

FEATURES = frozenset({"torch.grouped_mm", "triton", "moe_fx.triton"})


def device(name: str, installed: frozenset[str] = FEATURES) -> Device:
    return replace(catalogue()[name], installed=installed)


def plan(name: str, model: str = "qwen3-30b-a3b", installed: frozenset[str] = FEATURES, **request: object) -> Plan:
    spec, binding = MODELS[model]
    return choose(spec, binding, Request("bfloat16", captured=True, **request), device(name, installed), KERNELS)  # type: ignore[arg-type]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("model", ["mixtral-8x7b", "qwen3-30b-a3b", "gpt-oss-20b", "llama4-scout"])
@pytest.mark.parametrize("name", ["h100", "h200", "a100", "b200"])
def test_only_what_never_waits(name: str, model: str, training: bool) -> None:
    found = plan(name, model, training=training)
    chosen = {r.kernel for r in found.ranges} | ({found.inline.kernel} if found.inline else set())
    assert all(device(name).arch in KERNELS[kernel].capability.captures for kernel in chosen)
    assert not training or chosen == {"triton"}


def test_a_request_that_waits_is_refused_with_the_reason() -> None:
    with pytest.raises(MoEFxUnsupportedError, match="may wait for the device"):
        plan("h200", kernel="sorted_loop")
    with pytest.raises(MoEFxUnsupportedError, match="its backward waits"):
        plan("h200", kernel="torch_grouped", training=True)
    with pytest.raises(MoEFxUnsupportedError, match="may wait for the device on 'sm80'"):
        plan("a100", kernel="torch_grouped")


def test_gradients_of_matrices_that_lie_apart_are_refused() -> None:
    """They are new tensors in every call, whose addresses a replay does not see."""
    spec, _ = MODELS["mixtral-8x7b"]
    for stored, training, right in (("list", False, True), ("list", True, False), ("stacked", True, True)):
        lists = WeightBinding((Operand("w1", stored), Operand("w3", stored), Operand("w2", stored)))
        request = Request("bfloat16", captured=True, training=training, kernel="triton")
        if right:
            assert choose(spec, lists, request, device("h200"), KERNELS).ranges
            continue
        with pytest.raises(MoEFxUnsupportedError, match="addresses, which are new in every call"):
            choose(spec, lists, request, device("h200"), KERNELS)


def test_a_copy_of_the_weights_is_refused() -> None:
    """Whether it is stale is looked at by each call, and a replay is none."""
    with pytest.raises(MoEFxUnsupportedError, match="weights changed since they were copied"):
        plan("h200", memory="copy", layout="stacked", kernel="triton")
    assert plan("h200", memory="copy").layout == "view"


def test_without_triton_what_is_left_is_slow_and_right() -> None:
    found = plan("a100", installed=frozenset({"torch.grouped_mm"}))
    assert {r.kernel for r in found.ranges} <= {"gather_bmm", "batched_loop"}


def test_a_cpu_has_no_graphs() -> None:
    spec, binding = MODELS["qwen3-30b-a3b"]
    cpu = replace(catalogue()["zen5_epyc_2"], installed=FEATURES)
    plans = [choose(spec, binding, Request("bfloat16", captured=c), cpu, KERNELS) for c in (False, True)]
    assert plans[0].ranges == plans[1].ranges


@pytest.mark.parametrize(
    ("options", "mode", "captured"),
    [
        ({}, None, False),
        ({}, "reduce-overhead", True),
        ({}, "max-autotune", True),
        ({}, "max-autotune-no-cudagraphs", False),
        ({"inner_backend": "cudagraphs"}, None, True),
        ({"inductor": {"triton.cudagraphs": True}}, None, True),
        ({"inductor": {"triton.cudagraphs": False}}, "reduce-overhead", False),
        ({"inner_backend": "eager"}, "reduce-overhead", False),
    ],
)
def test_what_asks_for_graphs(options: dict[str, object], mode: str | None, captured: bool) -> None:
    assert resolve(options, mode).captured is captured


@pytest.mark.parametrize("mode", [None, "default", "max-autotune-no-cudagraphs"])
def test_the_configuration_of_inductor_asks_too(mode: str | None) -> None:
    with inductor.patch({"triton.cudagraphs": True}):
        assert resolve({}, mode).captured
        assert not resolve({"inner_backend": "eager"}, mode).captured
        assert not resolve({"inductor": {"triton.cudagraphs": False}}, mode).captured
