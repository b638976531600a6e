"""Shared experts, and prepare/finalize in two steps each: what is done while tokens or results travel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_fx.kernels.modular_kernel import FusedMoEKernel
from moe_fx.kernels.prepare_finalize import PrepareAndFinalizeNoEP
from moe_fx.kernels.weight_and_reduce import TopKWeightAndReduce

from .test_modular_kernel import MODULAR, H, Layer, Recorder, T, dtype_of, normal, result, routing


@pytest.fixture(autouse=True)
def _below_autograd() -> Iterator[None]:
    with torch.no_grad():
        yield


def shared_of(events: list[str]) -> Callable[[Tensor], Tensor]:
    def shared(x: Tensor) -> Tensor:
        events.append("shared")
        return -x

    return shared


@pytest.mark.parametrize("name", MODULAR)
def test_shared_experts(name: str) -> None:
    layer, x = Layer(dtype_of(name)), normal(T, H, seed=7, dtype=dtype_of(name))
    ids, weights = routing()
    events: list[str] = []
    alone = layer.kernel(name).apply(x, layer.w13, layer.w2, ids, weights, "silu")
    both = layer.kernel(name, shared_experts=shared_of(events))
    for given, expected in ((None, -x), (2 * x, -2 * x)):
        shared, y = both.apply(x, layer.w13, layer.w2, ids, weights, "silu", shared_experts_input=given)
        assert torch.equal(shared, expected)
        assert torch.equal(y, result(alone))
    assert events == ["shared"] * 2


class Overlapping(PrepareAndFinalizeNoEP):
    """Each step starts, and is done when its receiver has run, after the hook where there is one."""

    def __init__(self, events: list[str], hooks: bool):
        self.events, self.hooks = events, hooks

    def supports_async(self) -> bool:
        return True

    def _started(self, step: str, work: Callable[[], Any]) -> Any:
        self.events.append(f"{step} starts")
        arrived = [not self.hooks]

        def hook() -> None:
            self.events.append(f"{step} hook")
            arrived[0] = True

        def receive() -> Any:
            assert arrived[0]
            self.events.append(f"{step} received")
            return work()

        return (hook, receive) if self.hooks else receive

    def prepare_async(self, *given: Any) -> Any:
        return self._started("prepare", lambda: self.prepare(*given))

    def finalize_async(self, output: Tensor, fused: Tensor, *given: Any) -> Any:
        impl: TopKWeightAndReduce = given[-1]
        held = fused.clone()
        fused.fill_(float("nan"))  # on its way
        return self._started("finalize", lambda: impl.apply(output, held, *given[:-1]))


@pytest.mark.parametrize("hooks", [False, True])
def test_steps_overlap(hooks: bool) -> None:
    """What is done while results travel: the shared experts, and nothing else."""
    layer, x = Layer(torch.float32), normal(T, H, seed=7, dtype=torch.float32)
    ids, weights = routing()
    events: list[str] = []
    experts = layer.experts("sorted_loop")
    calls = Recorder(experts)
    chosen = FusedMoEKernel(Overlapping(events, hooks), experts, shared_of(events))
    shared, y = chosen.apply(x, layer.w13, layer.w2, ids, weights, "silu")
    hook = ["hook"] * hooks
    steps = [f"prepare {step}" for step in ("starts", *hook, "received")]
    steps += ["finalize starts", "shared", *(f"finalize {step}" for step in (*hook, "received"))]
    assert events == steps
    assert calls.rows == [T]
    assert torch.equal(shared, -x)
    assert torch.equal(y, result(layer.kernel("sorted_loop").apply(x, layer.w13, layer.w2, ids, weights, "silu")))
