"""A stopwatch for kernels: random weights with the sizes and strides of a block's own, random routing, real time."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from moe_fx import cache
from moe_fx.binding import Experts, WeightBinding
from moe_fx.kernels.build import run
from moe_fx.kernels.registry import kernel
from moe_fx.plan import Plan
from moe_fx.spec import MoESpec
from moe_fx.weights import WeightStore

ROUNDS, SECONDS = 7, 0.3  # measured calls of a kernel at one T: at most so many, and no new one after so long


class Stopwatch:
    """``stopwatch(name, tokens)`` → seconds of one forward, the median of a few.

    like: tensors (fake ones too) with the sizes, strides, dtypes and device of the operands.  Holds one bank of random
    weights, and its packed copy if ``layout`` is one.
    """

    def __init__(self, spec: MoESpec, binding: WeightBinding, like: Sequence[Tensor], layout: str, dtype: torch.dtype):
        self.spec, self.dtype, self.device = spec, dtype, like[0].device
        generator = torch.Generator().manual_seed(0)
        operands = [_random_like(t, generator) for t in like]
        self.store = WeightStore()
        self.experts: Experts = self.store.get(layout, binding, operands, spec.expert.experts, spec.quant)

    def __call__(self, name: str, tokens: int) -> float:
        generator = torch.Generator().manual_seed(tokens)
        e = self.spec.expert
        x = torch.randn(tokens, e.hidden, generator=generator).to(self.device, self.dtype)
        scores, ids = torch.rand(tokens, e.experts, generator=generator).topk(self.spec.top_k)
        ids, weights = ids.to(self.device), scores.to(self.device, self.dtype)
        chosen = kernel(name)
        times: list[float] = []
        with torch.no_grad():
            run(chosen, x, ids, weights, self.experts, self.spec)
            while len(times) < ROUNDS and sum(times) < SECONDS:
                self._wait()
                started = time.perf_counter()
                run(chosen, x, ids, weights, self.experts, self.spec)
                self._wait()
                times.append(time.perf_counter() - started)
        return statistics.median(times)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _random_like(like: Tensor, generator: torch.Generator) -> Tensor:
    """Normal values in the storage layout of ``like``; a large tensor repeats a block of them."""
    sizes, strides = [int(s) for s in like.shape], [int(s) for s in like.stride()]
    extent = 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    block = (torch.randn(min(extent, 1 << 16), generator=generator) * 0.02).to(like.dtype)
    flat = torch.empty(extent, dtype=like.dtype, device=like.device)
    whole = extent // len(block) * len(block)
    flat[:whole].view(-1, len(block)).copy_(block)
    flat[whole:].copy_(block[: extent - whole])
    return flat.as_strided(sizes, strides)


class TunedPlans:
    """Measured plans on disk, by whatever the measurement depends on; a second process does not measure again."""

    def __init__(self) -> None:
        self.folder = cache.folder("tuned")

    def read(self, *key: object) -> Plan | None:
        """None where there is none, or none that this version can read."""
        try:
            return Plan.from_json(json.loads(self._path(key).read_text()))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, plan: Plan, *key: object) -> None:
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(plan.to_json()))
        partial.replace(path)  # whole or not at all

    def _path(self, key: tuple[object, ...]) -> Path:
        return self.folder / f"{sha256(repr(key).encode()).hexdigest()[:24]}.json"
