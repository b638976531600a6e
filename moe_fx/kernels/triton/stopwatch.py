"""Seconds of the products of a layer with given tiles, on random weights and a random routing."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import triton
from torch import Tensor

from moe_fx.binding import Experts
from moe_fx.kernels.triton import launch
from moe_fx.kernels.triton.configs import Config
from moe_fx.kernels.triton.tiles import Layer, Measure
from moe_fx.spec import ExpertSpec, MoESpec


def of_layer(layer: Layer, device: torch.device) -> Callable[[int], Measure]:
    """For a number of routed rows: tiles → (seconds of the up product, of the down product); infinite for tiles that
    the device does not take.  Holds one bank of weights."""
    e = ExpertSpec(layer.experts, layer.hidden, layer.intermediate, gated=layer.gated)
    spec, dtype = MoESpec(1, e), getattr(torch, layer.dtype)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    w13 = normal(1, e.intermediate * (1 + e.gated), e.hidden).expand(e.experts, -1, -1).contiguous()
    w2 = normal(1, e.hidden, e.intermediate).expand(e.experts, -1, -1).contiguous()
    experts = Experts((w13,), w2, (), None, None, "gate_up")

    def measure_at(rows: int) -> Measure:
        x, hidden, out = normal(rows, e.hidden), normal(rows, e.intermediate), normal(rows, e.hidden)
        ids = torch.randint(0, e.experts, (rows, 1), generator=generator).to(device)

        def measure(up: Config, down: Config) -> tuple[float, float]:
            job = launch.listed(ids, spec, dtype, sort=True, tiles_of=(up, down))
            return (
                _seconds(lambda: launch.up_products(job, x, None, experts, hidden), device),
                _seconds(lambda: launch.down_products(job, hidden, experts, out), device),
            )

        return measure

    return measure_at


def _seconds(call: Callable[[], None], device: torch.device) -> float:
    try:
        call()
    except (triton.runtime.errors.OutOfResources, triton.compiler.errors.CompilationError):
        return float("inf")
    if device.type != "cuda":  # the interpreter: to see that it works
        started = time.perf_counter()
        call()
        return time.perf_counter() - started
    return float(triton.testing.do_bench(call, warmup=10, rep=50, return_mode="median")) / 1e3
