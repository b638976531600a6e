"""Inputs on which a region and its specification are compared.

Token counts follow the region's symbols; a region captured at one length is sampled at that length.  Weights are
random, never the model's own (real ones can be zero, or alike).  Large banks are allocated as zero pages of which only
a few experts are filled, so that memory follows the experts in use and not the model.
"""

from __future__ import annotations

import math
import mmap
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from moe_fx.passes.dataflow import fake, value
from moe_fx.passes.id_range import UNKNOWN_IDS, IdRange
from moe_fx.passes.regions import Region, numel, runnable

Pattern = str  # "random", "few", "first", "last", "duplicates", "every <from>", "cover <from>", "outside <id>"
_MOST_FOREIGN = 32  # ids beyond the experts that are tried one by one, and the last
_LARGE = 1 << 20  # bytes of one expert in float64 from which gradients are checked along directions only
_FILLED = 128 << 20  # bytes of expert weights in float64 that a sample fills
_BLOCK = 256  # rows of random numbers that a large matrix repeats
MEMORY_BUDGET = 2 << 30  # bytes of filled expert weights, and of rows gathered, a sample may hold

_MOST_TOKENS = 1025
_ROUTINGS: tuple[Pattern, ...] = ("random", "few", "last", "first")


@dataclass(slots=True)
class Sample:
    """inputs: in the order of ``Region.inputs``.  x [T, H], ids [T, k], weights [T, k]: the routing among them, viewed
    flat.  operands: the expert weights, then the region's other parameters, by node."""

    inputs: list[Any]
    x: Tensor
    ids: Tensor
    weights: Tensor
    operands: dict[Node, Tensor]
    label: str


class Sampler:
    """Draws samples for one region, from a private generator: the global random state is not touched.

    bounds: (lowest, highest, distinct in a row) of the ids, as far as ``id_range`` can tell.
    """

    def __init__(self, region: Region, bounds: IdRange = UNKNOWN_IDS, seed: int = 0):
        self.region = region
        self.experts = region.down.sizes[0]
        self.bounds = bounds
        self.generator = torch.Generator().manual_seed(seed)
        self._short = 2
        self.each = sum(fake(n).numel() for n in region.weight_nodes) * 8 // self.experts  # bytes of one in float64
        self.large = self.each > _LARGE
        self._weights: dict[tuple[torch.dtype | None, int | None], tuple[list[int], dict[Node, Tensor]]] = {}
        self.symbols = sorted(
            {s for node in region.inputs for size in sizes_of(node) for s in free_symbols(size)}, key=str
        )

    def token_counts(self) -> list[int]:
        """T to sample: one, odd, and more than E and than the small numbers in the block (capacities) where memory
        allows; the captured T where it is fixed."""
        size = numel(self.region.x)
        if not free_symbols(size):
            return [int(size) // self.region.hidden]  # type: ignore[call-overload]
        beyond = [int(c) + 1 for c in constants(self.region.nodes) if c < _MOST_TOKENS]
        return [t for t in (5, 1, max([min(self.experts + 1, 65), *beyond])) if self._affordable(t)]

    def patterns(self) -> list[Pattern]:
        """Routings to try: three for each token count, and those that ids of unknown origin may bring; one foreign id
        at a time, so that an error on one does not hide what another does."""
        counts = len(self.token_counts())
        found: list[Pattern] = [p for p in _ROUTINGS for _ in range(counts)][: 9 if self._cheap() else 3]
        low, high, distinct = self.bounds
        if not distinct and self.region.top_k > 1:
            found += ["duplicates"] * counts
        found += [f"every {i}" for i in range(0, self.experts, self._step())] if self._cheap() else []
        last = int(min(high, self.experts + (_MOST_FOREIGN if high < math.inf else 2)))
        foreign = [i for i in (-1, -self.experts) if i >= low] + list(range(self.experts, last + 1))
        foreign += [int(high)] if last < high < math.inf else []
        return found + [f"outside {i}" for i in foreign]

    def _step(self) -> int:
        """How many experts one sample can reach."""
        return min(max(self.token_counts()) * self.region.top_k, len(self._chosen(self.region.top_k)))

    def more(self) -> Iterator[Sample]:
        """Further samples, for decisions that those of ``patterns`` took one way only: every expert in turn, rows just
        within and just beyond each number in the block, every expert at the first place."""
        region, tokens = self.region, max(self.token_counts())
        step = min(tokens, len(self._chosen(region.top_k)))
        limits = [*_magnitudes(region.nodes), 1.0]
        for factor in (0.3, 3.0):
            for i in range(-(-self.experts // step)):
                for limit in limits:
                    yield self.draw(tokens, f"cover {i * step}", torch.float64, factor * limit)
        for first in range(0, self.experts, region.top_k):  # the first token by every expert
            yield self.draw(tokens, f"cover {first}", torch.float64)

    def samples(self, dtype: torch.dtype | None, patterns: list[Pattern]) -> Iterator[Sample]:
        """One sample per pattern, token counts in turn.  dtype: None keeps the region's own."""
        counts = self.token_counts()
        for i, pattern in enumerate(patterns):
            tokens = max(counts) if pattern.startswith("every") else counts[i % len(counts)]
            yield self.draw(tokens, pattern, dtype)

    def _cheap(self) -> bool:
        """Whether nine float64 runs take seconds at most."""
        return self.each / 4 * max(self.token_counts()) * self.region.top_k < 4e9

    def draw(self, tokens: int, pattern: Pattern, dtype: torch.dtype | None, scale: float | None = None) -> Sample:
        """scale: of all rows of x, instead of many."""
        region, k = self.region, self.region.top_k
        tokens, assignment = self._assignment(tokens)
        cover = int(pattern.split()[1]) if pattern.startswith(("cover", "every")) else None
        key = (dtype, cover)
        if key not in self._weights:  # drawn once: routings and rows change, weights need not
            self._weights = {k: held for k, held in self._weights.items() if k[0] != dtype}
            self._weights[key] = (self._chosen(k, cover), {})
        chosen, held = self._weights[key]
        ids = self._ids(tokens, k, pattern, chosen)
        filled = chosen if len(chosen) < self.experts else None
        values: dict[Node, Any] = {}
        for node in region.inputs:
            found = value(node)
            if not isinstance(found, Tensor):
                values[node] = evaluate(found, assignment)
                continue
            shape = [evaluate(s, assignment) for s in found.shape]
            kind = found.dtype if dtype is None or not found.is_floating_point() else dtype
            if node is region.ids:
                values[node] = ids.reshape(shape).to(kind)
            elif node is region.weights:
                values[node] = self._routing_weights(shape, kind, special=dtype is not None)
                if cover is not None:  # each expert may come once: its weight must show
                    values[node] = values[node].masked_fill(values[node] == 0, 0.5)
            elif node in region.weight_nodes:
                if node not in held:
                    held[node] = self._weight(node, shape, kind, filled)
                values[node] = held[node]
            elif node in region.params:
                values[node] = self._normal(shape, kind, 0.5)
            else:
                values[node] = self._normal(shape, kind, 1.0)
                if dtype is not None and node is region.x and not pattern.startswith("every"):
                    values[node] = self._special_rows(values[node]) if scale is None else values[node] * scale
        values = {n: v.to(runnable(fake(n).device)) if isinstance(v, Tensor) else v for n, v in values.items()}
        operands = {n: values[n] for n in (*region.weight_nodes, *region.params)}
        x = values[region.x].reshape(-1, region.hidden)
        weights = x.new_ones(tokens, k) if region.weights is None else values[region.weights]
        label = f"{pattern} routing of {tokens} tokens"
        inputs = [values[n] for n in region.inputs]
        return Sample(inputs, x, ids.to(x.device), weights.reshape(tokens, k), operands, label)

    def _weight(self, node: Node, shape: list[int], dtype: torch.dtype, filled: list[int] | None) -> Tensor:
        """Random weights with the strides of the model's own; experts that are not ``filled`` stay zero pages."""
        weight = lazy_zeros(shape, dtype)
        if len(shape) == 2:
            if filled is None or self.region_index(node) in filled:
                self._fill(weight)
        else:
            for e in range(self.experts) if filled is None else filled:
                self._fill(weight[e])
        like = fake(node)
        if like.is_contiguous() or tuple(like.shape) != tuple(shape):
            return weight
        return torch.empty_strided(shape, [int(s) for s in like.stride()], dtype=dtype).copy_(weight)

    def _fill(self, matrix: Tensor) -> None:
        """Normal values.  A large matrix repeats a block of rows with a factor of its own for each row: no two rows are
        equal, at a fraction of the random numbers."""
        rows, columns = matrix.shape
        scale = min(rows, columns) ** -0.5
        block = self._normal([min(rows, _BLOCK), columns], torch.float32, scale)
        for start in range(0, rows, _BLOCK):
            part = matrix[start : start + _BLOCK]
            factors = 1.0 if rows <= _BLOCK else self._normal([len(part), 1], torch.float32, 1.0)
            part.copy_(block[: len(part)] * factors)

    def region_index(self, node: Node) -> int:
        """Which expert a parameter of a list belongs to."""
        bank = next(b for b in (*self.region.ups, self.region.down) if node in b.params)
        return bank.params.index(node)

    def _normal(self, shape: list[int], dtype: torch.dtype, scale: float) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float32).mul_(scale).to(dtype)

    def _special_rows(self, x: Tensor) -> Tensor:
        """x with one factor a row, over decades and beyond every number in the block, so that each limit takes effect
        in some rows and not in others; and, among many rows, some zero and some equal."""
        numbers = _magnitudes(self.region.nodes)
        largest = min(max([25.0, *numbers]), 1e12)
        smallest = max(min([1.0, *numbers]), 1e-12)
        exponents = torch.rand([*x.shape[:-1], 1], generator=self.generator, dtype=torch.float64)
        for row, end in ((0, 0.0), (2, 1.0)):  # both ends are there
            exponents.view(-1)[row : row + 1] = end
        x = x * 0.1 * smallest * (40 * largest / smallest) ** exponents
        rows = x.view(-1, x.shape[-1])
        if len(rows) >= 5:
            rows[1::7] = 0
            rows[3::7] = rows[2].clone()
        return x

    def _routing_weights(self, shape: list[int], dtype: torch.dtype, special: bool) -> Tensor:
        """Positive and of order 1; ``special``: of both signs, over decades, some exactly 0 and 1."""
        weights = self._normal(shape, dtype, 1.0).abs_().add_(0.1)
        if not special:
            return weights
        draw = torch.rand(shape, generator=self.generator, dtype=torch.float64)
        sign = torch.where(torch.rand(shape, generator=self.generator) < 0.3, -1.0, 1.0)
        weights = weights * sign * 10 ** (-5 * draw)
        return torch.where(draw > 0.9, 0.0, torch.where(draw > 0.8, 1.0, weights)).to(dtype)

    def _chosen(self, k: int, first: int | None = None) -> list[int]:
        """Experts whose weights are filled: all, or as many as the memory budget holds; from ``first`` on."""
        count = min(self.experts, max(k + 1, _FILLED // max(self.each, 1)))
        if first is not None:
            return [(first + i) % self.experts for i in range(count)]
        return sorted(torch.randperm(self.experts, generator=self.generator)[:count].tolist())

    def _affordable(self, tokens: int) -> bool:
        """Whether gathering the weights of every row (the worst spelling) stays within the budget."""
        return tokens == 1 or tokens * self.region.top_k * self.each <= MEMORY_BUDGET

    def _ids(self, tokens: int, k: int, pattern: Pattern, chosen: list[int]) -> Tensor:
        pool = torch.tensor(chosen)
        if pattern.startswith("cover"):  # every expert in every slot
            return pool[(torch.arange(tokens).unsqueeze(1) + torch.arange(k)) % len(pool)]
        if pattern.startswith("every"):
            return pool[torch.arange(tokens * k) % len(pool)].view(tokens, k)
        if pattern == "few":
            pool = pool[: max(k, len(chosen) // 2)]
        elif pattern == "first":
            pool = pool[:k]
        elif pattern == "last":
            pool = pool[-k:]
        scores = torch.rand(tokens, len(pool), generator=self.generator)
        ids = pool[scores.argsort(-1)[:, :k]] if len(pool) >= k else pool[torch.zeros(tokens, k, dtype=torch.long)]
        if pattern == "duplicates":
            ids = ids[:, :1].expand(tokens, k).clone()
        elif pattern.startswith("outside"):
            mask = torch.rand(tokens, k, generator=self.generator) < 0.4
            mask[0, -1] = True
            ids = torch.where(mask, int(pattern.split()[1]), ids)
        return ids

    def _assignment(self, tokens: int) -> tuple[int, dict[Any, float]]:
        """(tokens or a count near it that the shapes allow, values of the symbols that give it): of several symbols
        that the number of tokens depends on, all are 2 or 3 but one; for one token, and where that does not fit, 1."""
        size = numel(self.region.x)
        free = [s for s in self.symbols if s in free_symbols(size)]
        others = free_numbers([s for s in self.symbols if s not in free], self.generator)
        if not free:
            return tokens, others
        if len(free) > 1 and tokens > 1:
            for symbol in reversed(free):
                self._short = 5 - self._short  # 2 and 3 in turn: a roll by 2 of 2 is no roll
                long = max(self._short + 2, tokens // self._short ** (len(free) - 1))
                assignment = {**others, **{s: long if s is symbol else self._short for s in free}}
                elements = int(evaluate(size, assignment))
                if elements > 0 and elements % self.region.hidden == 0 and elements // self.region.hidden <= 2 * tokens:
                    return elements // self.region.hidden, assignment
        found: list[tuple[int, dict[Any, float]]] = []
        for symbol in reversed(free):
            for size_of in range(1, tokens + 17):
                assignment = {**others, **{s: size_of if s is symbol else 1 for s in free}}
                count, rest = divmod(int(evaluate(size, assignment)), self.region.hidden)
                if count >= tokens and not rest:
                    found.append((count, assignment))
                    break
        if found:
            return min(found, key=lambda f: f[0])
        raise ValueError(f"no values of {free} give {tokens} tokens or a few more")


def lazy_zeros(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeros whose pages take no memory until they are written (``torch.zeros`` writes them)."""
    size = math.prod(shape) * dtype.itemsize
    if size < mmap.PAGESIZE * 16:
        return torch.zeros(shape, dtype=dtype)
    if not hasattr(mmap, "MAP_PRIVATE"):  # Windows
        return torch.frombuffer(mmap.mmap(-1, size), dtype=dtype).view(*shape)
    reserve_nothing = 0x4000 if sys.platform == "linux" else 0  # MAP_NORESERVE, which mmap names from Python 3.13 on
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | reserve_nothing
    return torch.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=dtype).view(*shape)


def constants(nodes: Iterable[Node]) -> list[float]:
    """Positive numbers among the arguments of ``nodes``, ascending."""
    found = {
        float(arg)
        for node in nodes
        for arg in (*node.args, *node.kwargs.values())
        if isinstance(arg, (int, float)) and not isinstance(arg, bool) and 0 < arg < math.inf
    }
    return sorted(found)


def _magnitudes(nodes: Iterable[Node]) -> list[float]:
    """Sizes of the numbers among the arguments of ``nodes``, of either sign, in lists too; those of a kind once."""
    leaves = torch.utils._pytree.tree_leaves([(node.args, node.kwargs) for node in nodes])
    found = {abs(float(a)) for a in leaves if isinstance(a, (int, float)) and not isinstance(a, bool)}
    return sorted(a for a in found if 0 < a < math.inf)


def free_symbols(size: object) -> set[Any]:
    """The symbols in a symbolic number; none in a plain one."""
    return set(size.node.expr.free_symbols) if isinstance(size, (torch.SymInt, torch.SymFloat)) else set()


def sizes_of(node: Node) -> list[object]:
    """Every number, symbolic or not, in the value of a node."""
    found = value(node)
    if isinstance(found, Tensor):
        return list(found.shape)
    return list(found) if isinstance(found, (tuple, list)) else [found]


def free_numbers(symbols: Iterable[Any], generator: torch.Generator) -> dict[Any, float]:
    """Values of symbols on which the number of tokens does not depend (an argument, another tensor's length): random,
    so that they cancel neither that number nor each other."""
    draws = {s: (torch.randint(2, 100, (), generator=generator), torch.randn((), generator=generator)) for s in symbols}
    return {s: int(whole) if s.is_integer else float(real) for s, (whole, real) in draws.items()}


def evaluate(size: Any, assignment: dict[Any, float]) -> Any:
    """A number, or numbers, with every symbol replaced by its value in ``assignment``."""
    if isinstance(size, (tuple, list)):
        return type(size)(evaluate(s, assignment) for s in size)
    if not isinstance(size, (torch.SymInt, torch.SymFloat)):
        return size
    found = size.node.expr.subs(assignment)
    return int(found) if isinstance(size, torch.SymInt) else float(found)
