"""Inputs on which a router and its specification are compared: rows over decades, rows where an epsilon shows, ties."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from moe_fx.passes.dataflow import fake, value
from moe_fx.passes.routers.region import RouterRegion
from moe_fx.passes.sampling import constants, evaluate, free_numbers, free_symbols, sizes_of

Kind = Literal["plain", "small", "spread", "peaks", "negative", "ties", "equal", "saturated"]
EXACT: tuple[Kind, ...] = ("plain", "small", "spread", "peaks", "negative")
EVERY: tuple[Kind, ...] = (*EXACT, "ties", "equal", "saturated")
_ROWS = 64  # to see of each kind
_MANY = 2048
_PARAMS = 4  # draws of a bias: it is the same for all rows


@dataclass(slots=True)
class RouterSample:
    """inputs: in the order of ``RouterRegion.inputs``.  logits [T, E]; params: [E] each, in the region's order."""

    inputs: list[Any]
    logits: Tensor
    params: list[Tensor]
    label: str


class RouterSampler:
    """Draws samples from a private generator."""

    def __init__(self, region: RouterRegion, seed: int = 0):
        self.region = region
        self.generator = torch.Generator().manual_seed(seed)
        self.symbols = sorted({s for n in region.inputs for size in sizes_of(n) for s in free_symbols(size)}, key=str)
        self.tiny = [c for c in constants(region.nodes) if c < 1e-2]

    def samples(self, kinds: tuple[Kind, ...], dtype: torch.dtype | None) -> Iterator[RouterSample]:
        """Each kind until enough rows were seen, with the token counts that the region's sizes allow.  dtype: of
        everything floating; None keeps the region's own."""
        for kind in kinds:
            counts = self._token_counts(kind)
            seen, least = 0, max(len(counts), _PARAMS if self.region.params else 1)
            for draw in range(_ROWS):
                sample = self.draw(kind, counts[draw % len(counts)], dtype)
                yield sample
                seen += sample.logits.shape[0]
                if seen >= _ROWS and draw + 1 >= least:
                    break

    def draw(self, kind: Kind, tokens: int, dtype: torch.dtype | None) -> RouterSample:
        region = self.region
        assignment = self._assignment(tokens)
        inputs: list[Any] = []
        for node in region.inputs:
            found = value(node)
            if not isinstance(found, Tensor):
                inputs.append(evaluate(found, assignment))
                continue
            shape = [evaluate(s, assignment) for s in found.shape]
            own = found.dtype if dtype is None or not found.is_floating_point() else dtype
            if node is region.logits:
                rows = math.prod(shape[:-1])
                inputs.append(self._logits(kind, rows).reshape(shape).to(own))
            elif node in region.params:
                inputs.append(self._param(kind).reshape(shape).to(own))
            else:
                inputs.append(torch.zeros(shape, dtype=own))
        logits = inputs[0].reshape(-1, region.experts)
        params = [p.reshape(-1) for p in inputs[1 : 1 + len(region.params)]]
        return RouterSample(inputs, logits, params, f"{kind} logits of {logits.shape[0]} tokens")

    def _logits(self, kind: Kind, rows: int) -> Tensor:
        """float64 [rows, E]."""
        size = (rows, self.region.experts)
        noise = self._normal(size)
        match kind:
            case "plain" | "negative":
                return noise * 0.1 * 400 ** self._uniform((rows, 1))
            case "small":  # sums of scores near every small number in the router, and far below
                levels = [math.log(c) for c in self.tiny] or [-40.0, -15.0, 0.0, 20.0]
                level = torch.tensor(levels, dtype=torch.float64)[torch.arange(rows) % len(levels)].unsqueeze(1)
                return noise + level * (0.8 + 0.4 * self._uniform((rows, 1)))
            case "spread":
                return noise * 30
            case "peaks":  # most scores are 0, so that masked experts are chosen where too few others are left
                return noise.where(self._uniform(size) < 0.3, -1000.0)
            case "ties":
                return (noise * 1.5).round() * 0.5
            case "equal":
                return self._normal((rows, 1)).round().expand(size).clone()
            case "saturated":
                return noise.sign() * 100 * (1 + self._uniform((rows, 1))).round()

    def _param(self, kind: Kind) -> Tensor:
        """float64 [E]; of coarse values where the logits tie, so that sums tie too."""
        size = (self.region.experts,)
        match kind:
            case "plain" | "peaks":
                return self._normal(size) * 0.3
            case "small" | "spread":
                return self._normal(size) * 3
            case "negative":  # choices below a fill of zero
                return -self._normal(size).abs() * 3
            case "ties":
                return self._normal(size).sign() * 0.25 + 0.75
            case _:
                return torch.ones(size, dtype=torch.float64)

    def _normal(self, size: tuple[int, ...]) -> Tensor:
        return torch.randn(size, generator=self.generator, dtype=torch.float64)

    def _uniform(self, size: tuple[int, ...]) -> Tensor:
        return torch.rand(size, generator=self.generator, dtype=torch.float64)

    def _token_counts(self, kind: Kind) -> list[int]:
        """Many equal rows want the same expert: more than a capacity would let through."""
        size = math.prod(fake(self.region.logits).shape[:-1])
        return [_MANY if kind == "equal" else _ROWS, 5, 1] if free_symbols(size) else [int(size)]

    def _assignment(self, tokens: int) -> dict[Any, float]:
        """Values of the symbols that give ``tokens``: all 1 but one."""
        size = math.prod(fake(self.region.logits).shape[:-1])
        free = [s for s in self.symbols if s in free_symbols(size)]
        others = free_numbers([s for s in self.symbols if s not in free], self.generator)
        if not free:
            return others
        for count in range(tokens, tokens + 16):
            for symbol in reversed(free):
                found = {**others, **{s: count if s is symbol else 1 for s in free}}
                if int(evaluate(size, found)) == count:
                    return found
        raise ValueError(f"no values of {free} give {tokens} tokens or a few more")
