"""Which decisions of a region the samples took both ways.

Samples prove a formula only where they reach.  An op that compares, clamps or cuts splits the inputs in two; while all
samples fall on one side (a limit of 1e8, tokens past a capacity of 4096, an expert that no token chose, rows with NaN),
nothing is known about the other, so VERIFY asks for samples on both and gives the block up where there are none.
Decisions about the ids alone whose outcome follows from the ids' range (``ids >= E`` after a top-k of E) are exempt.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from moe_fx.passes.dataflow import target_name, tensor, value
from moe_fx.passes.id_range import SAME_IDS
from moe_fx.passes.regions import Region, numel

aten = torch.ops.aten
Both = list[bool]  # [seen not taken, seen taken]

_BENDS: dict[str, Callable[..., list[Tensor]]] = {
    "relu": lambda a: [a > 0],
    "leaky_relu": lambda a, *_: [a > 0],
    "elu": lambda a, *_: [a > 0],
    "abs": lambda a: [a > 0],
    "sign": lambda a: [a > 0],
    "threshold": lambda a, limit, *_: [a > limit],
    "hardtanh": lambda a, low=-1, high=1: [a < low, a > high],
    "hardsigmoid": lambda a: [a < -3, a > 3],
    "hardswish": lambda a: [a < -3, a > 3],
    "hardshrink": lambda a, limit=0.5: [a.abs() > limit],
    "softshrink": lambda a, limit=0.5: [a.abs() > limit],
    "clamp": lambda a, min=None, max=None: _outside(a, min, max),  # noqa: A006  aten's names
    "clamp_min": lambda a, limit: _outside(a, limit, None),
    "clamp_max": lambda a, limit: _outside(a, None, limit),
    "maximum": lambda a, b: [a > b],
    "minimum": lambda a, b: [a > b],
    "fmax": lambda a, b: [a > b],
    "fmin": lambda a, b: [a > b],
    "nan_to_num": lambda a, *_: [a.isnan(), a.isinf()],
}
_STEPS = {"round", "floor", "ceil", "trunc", "fix", "frac", "fmod", "remainder", "heaviside", "floor_divide", "frexp"}
_DIVIDES = {"floor_divide", "__rshift", "bitwise_right_shift", "bitwise_and", "__and"}  # 0 below the number
_WRAPS = {"remainder", "fmod"}  # whole numbers: as they were below the divisor
_TESTS = {"eq", "ne", "lt", "le", "gt", "ge", "isnan", "isinf", "isfinite", "isposinf", "isneginf", "any", "all"}
_TESTS |= {"logical_and", "logical_or", "bitwise_and", "bitwise_or", "logical_not", "signbit"}
_COMPARE = {name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")}


def _is_real(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex or dtype == torch.bool


def _outside(a: Tensor, low: Any, high: Any) -> list[Tensor]:
    found = [] if low is None else [a < low]
    return found if high is None else [*found, a > high]


class Coverage:
    """Decisions by (node, op and which of its limits).  Outcomes count when the sample ran to its end: ``commit``."""

    def __init__(self, region: Region, low: float, high: float):
        self.region, self.low, self.high = region, low, high
        self.nodes = {n.name: n for n in region.nodes}
        self.varies = not isinstance(numel(region.x), int)
        self.seen: dict[tuple[str, str], Both] = {}
        self._now: dict[tuple[str, str], Both] = {}
        self.node = ""

    def before(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Called with the arguments of every op: what bends, in place too."""
        name = func._schema.name.removeprefix("aten::").rstrip("_")
        if (bends := _BENDS.get(name)) is not None:
            for i, taken in enumerate(bends(*args, **kwargs)):
                self._note(f"{name}.{i}", taken)
        elif self._steps(name, kwargs) and args[0].is_floating_point() and bool((args[0] != args[0].round()).any()):
            self._note(f"{name}, a step at every number", torch.tensor(True))  # no sample sees them all
        elif name == "nonzero" and args[0].dtype != torch.bool:
            self._note(name, args[0] != 0)

    def after(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: object) -> None:
        """Called with the result of every op: what compares, what turns numbers into truth, and what divides places or
        counts by a number of the code."""
        name = func._schema.name.removeprefix("aten::").rstrip("_")
        if not isinstance(out, Tensor):
            return
        if out.dtype == torch.bool:
            if name in _TESTS or name == "_to_copy":
                self._note(name, out)
        elif not out.is_floating_point() and self._by_constant(args):
            if name in _DIVIDES or (name == "div" and kwargs.get("rounding_mode")):
                self._note(f"{name}, 0 or not", out != 0)
            elif name in _WRAPS and isinstance(args[0], Tensor):
                self._note(f"{name}, a change or not", out != args[0])

    @staticmethod
    def _steps(name: str, kwargs: dict[str, Any]) -> bool:
        """Whether an op rounds."""
        whole = name == "_to_copy" and kwargs.get("dtype") is not None and not _is_real(kwargs["dtype"])
        return name in _STEPS or whole or (name == "div" and bool(kwargs.get("rounding_mode")))

    def _by_constant(self, args: tuple[Any, ...]) -> bool:
        """Whether the op's second operand is a number above 1 in the code, and the number of tokens varies (where it
        does not, the samples have all places that there are)."""
        node, other = self.nodes.get(self.node), args[1] if len(args) > 1 else None
        value = other.item() if isinstance(other, Tensor) and other.numel() == 1 else other
        literals = [] if node is None else [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, int)]
        return isinstance(value, int) and value > 1 and value in literals and self.varies

    def cut(self, node: Node, source: object, out: object) -> None:
        """A slice of a dimension whose length varies either shortens it or not."""
        index = node.args[1] if len(node.args) > 1 else None
        parts = list(index) if isinstance(index, tuple) else [index]
        shape = getattr(tensor(node.args[0]), "shape", ()) if isinstance(node.args[0], Node) else ()
        if not isinstance(source, Tensor) or not isinstance(out, Tensor):
            return
        if Ellipsis in parts:
            at, taken = parts.index(Ellipsis), sum(p is not None for p in parts) - 1
            parts[at : at + 1] = [slice(None)] * (len(shape) - taken)
        parts = [p for p in parts if p is not None]
        for dim, part in enumerate(parts[: len(shape)]):
            if isinstance(part, slice) and isinstance(shape[dim], torch.SymInt) and part != slice(None):
                self._note(f"cut.{dim}", torch.tensor(out.numel() < source.numel()))

    def commit(self) -> None:
        for key, (no, yes) in self._now.items():
            both = self.seen.setdefault(key, [False, False])
            both[0] |= no
            both[1] |= yes
        self._now = {}

    def drop(self) -> None:
        self._now = {}

    def missing(self) -> list[str]:
        """Decisions that went one way only, as "node (op)"."""
        found = [
            f"{name} ({what})"
            for (name, what), both in self.seen.items()
            if not all(both) and not (name in self.nodes and self._settled(self.nodes[name]))
        ]
        return found + [f"{n.name} (size {value(n)})" for n in self._sizes()]

    def _sizes(self) -> list[Node]:
        """Numbers that are no polynomial in the lengths: a minimum, a rounded quotient."""
        return [
            n
            for n in (*self.region.sizes, *self.region.nodes)
            if isinstance(found := value(n), (torch.SymInt, torch.SymFloat)) and not found.node.expr.is_polynomial()
        ]

    def _note(self, what: str, taken: Tensor) -> None:
        both = self._now.setdefault((self.node, what), [False, False])
        if taken.numel():
            yes = bool(taken.any())
            both[1] |= yes
            both[0] |= not yes or not bool(taken.all())

    def _settled(self, node: Node) -> bool:
        """Whether the range of the ids decides: both ends on one side of a number, or a limit outside the range."""
        name = target_name(node).strip("_")
        if name in ("and", "or", "logical_and", "logical_or", "bitwise_and", "bitwise_or", "any", "all"):
            return any(self._settled(n) for n in node.all_input_nodes)
        if not node.args or not self._is_ids(node.args[0]):
            return False
        numbers = [a for a in (*node.args[1:], *node.kwargs.values()) if a is not None]
        if not all(isinstance(n, (int, float)) for n in numbers) or math.inf in (-self.low, self.high):
            return False
        if name in ("clamp", "clip", "clamp_min", "clamp_max"):
            return all(not self.low < n < self.high for n in numbers)  # type: ignore[operator]
        if name not in _COMPARE or len(numbers) != 1:
            return False
        (number,) = numbers
        inside = self.low <= number <= self.high  # type: ignore[operator]
        ends = {_COMPARE[name](end, number) for end in (self.low, self.high)}
        return len(ends) == 1 and not (inside and name in ("eq", "ne") and self.low < self.high)

    def _is_ids(self, node: object) -> bool:
        """Whether the values of ``node`` are ids and nothing else."""
        while isinstance(node, Node) and node is not self.region.ids:
            if target_name(node) not in SAME_IDS or not node.args:
                return False
            source = node.args[0]
            if isinstance(source, Node) and target_name(source) == "sort" and node.args[1:] and node.args[1]:
                return False  # the permutation, not the sorted ids
            node = source
        return node is self.region.ids
