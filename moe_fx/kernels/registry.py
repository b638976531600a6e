"""The registry of experts kernels: what each can do (closed world) and what it costs.

A kernel is one file with one ``@experts_kernel`` at the definition.  A spec value that its capability does not list is
a veto; the oracle reads capability and cost from here and adds nothing of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from torch import Tensor

from moe_fx.binding import Experts
from moe_fx.spec import MoESpec


class Open(frozenset[str]):
    """A set that lists the values known today and contains any other too: for the reference, which is always legal."""

    def __contains__(self, value: object) -> bool:
        return True


@dataclass(frozen=True, slots=True)
class Capability:
    """Everything a kernel takes; what is not listed is refused.

    dtypes: of the weights as stored; x and the routing weights may have any floating dtype.
    forms: storage forms it reads as they are ("stacked", "list", "flat"; a flat tensor binds as a stacked view).
    transposed: whether it reads matrices stored as [out, in] (False), [in, out] (True) or either.
    backward: the shared backward of ``kernels/experts/backward.py`` serves it, from up products that the kernel keeps
    ("save") or from new ones ("recompute"); or it is forward only ("").
    packages: names that must be in ``Device.installed``.
    gated: which of gated and ungated experts it takes.
    size_multiple: H and I are multiples of it.
    compiled: it is written for a compiler, and goes into the graph in the place of the op (``Plan.inline``).
    """

    devices: frozenset[str]
    dtypes: frozenset[str]
    activations: frozenset[str]
    forms: frozenset[str]
    biases: bool
    norms: frozenset[str]
    weight_on: frozenset[str]
    act_dtypes: frozenset[str]
    compute_dtypes: frozenset[str]
    accumulate: frozenset[str]
    out_dtypes: frozenset[str]
    transposed: frozenset[bool] = frozenset({False, True})
    backward: Literal["save", "recompute", ""] = ""
    packages: frozenset[str] = frozenset()
    gated: frozenset[bool] = frozenset({True, False})
    size_multiple: int = 1
    compiled: bool = False


def touched(experts: Any, tokens: Any, k: Any) -> Any:
    """Distinct experts that T tokens reach under uniform routing, E (1 - (1 - k/E)^T); numbers or sympy expressions."""
    return experts * (1 - (1 - k / experts) ** tokens)


@dataclass(frozen=True, slots=True)
class Cost:
    """What one forward moves and computes, in shares of the ideal.

    weight_traffic: "active" (only experts that tokens reached), "all" experts, "gathered" (read anew for every routed
    row), or "per_row" (copied for every routed row).
    launches(E, T, k): ops launched, arithmetic in its arguments (the oracle calls it with symbols; ``touched`` counts
    the rounds of a loop over experts that have tokens).  efficiency: share of the device's peak that its products
    reach, by rows of one product (pairs of row count and share, ascending).
    """

    weight_traffic: str
    launches: Callable[[Any, Any, Any], Any]
    efficiency: tuple[tuple[int, float], ...] = field(default=((1, 0.5),))


class Forward(Protocol):
    """A kernel.  Only one whose capability says backward="save" is ever called with ``keep``."""

    def __call__(self, x: Tensor, ids: Tensor, weights: Tensor, experts: Experts, spec: MoESpec) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Kernel:
    """rank: breaks ties of price, lower first."""

    name: str
    forward: Forward
    capability: Capability
    cost: Cost
    rank: int


KERNELS: dict[str, Kernel] = {}


def experts_kernel(name: str, *, capability: Capability, cost: Cost, rank: int) -> Callable[[Forward], Forward]:
    """Registers the decorated function under ``name``; a second registration of a name is an error."""

    def register(forward: Forward) -> Forward:
        if name in KERNELS:
            raise ValueError(f"kernel {name!r} is registered twice")
        KERNELS[name] = Kernel(name, forward, capability, cost, rank)
        return forward

    return register


def kernel(name: str) -> Kernel:
    """The kernel of that name; KeyError lists the known ones."""
    if name not in KERNELS:
        raise KeyError(f"no kernel {name!r}; known: {', '.join(sorted(KERNELS))}")
    return KERNELS[name]
