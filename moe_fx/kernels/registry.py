"""The registry of experts kernels: what each can do (closed world) and what it costs.

A kernel is one file with one class under ``@experts_kernel``.  A spec value that its capability does not list is a
veto; the oracle reads capability and cost from here and adds nothing of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from moe_fx.kernels.capability import Capability
from moe_fx.kernels.modular_kernel.experts import FusedMoEExperts

Class = TypeVar("Class", bound=type[FusedMoEExperts])


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
    reach, by rows of one product (pairs of row count and share, ascending).  on_gpu: the same on devices other than
    CPUs, where it is another ().  on_archs: (pattern of an architecture's name, the cost there), where it is run in
    another way.  passes: what ops beside the products (copies of rows, activation, sum) move on such devices, in
    multiples of the activations that a fused kernel would: products wait for them.  On CPUs ``efficiency`` holds them.
    dequantise: (bytes moved for each weight, ops launched for each expert) where weights are codes and the kernel makes
    floats of them before a product; zeros where it multiplies codes.
    """

    weight_traffic: str
    launches: Callable[[Any, Any, Any], Any]
    efficiency: tuple[tuple[int, float], ...] = field(default=((1, 0.5),))
    dequantise: tuple[float, int] = (0.0, 0)
    on_gpu: tuple[tuple[int, float], ...] = ()
    on_archs: tuple[tuple[str, Cost], ...] = ()
    passes: float = 0.0

    def on(self, device: str, arch: str) -> Cost:
        """The cost on that kind of device and that architecture."""
        for pattern, cost in self.on_archs:
            if fnmatchcase(arch, pattern):
                return cost
        if device == "cpu":
            return replace(self, passes=0.0)
        return replace(self, efficiency=self.on_gpu or self.efficiency)


@dataclass(frozen=True, slots=True)
class Kernel:
    """experts: the class that runs it.  rank: breaks ties of price, lower first."""

    name: str
    experts: type[FusedMoEExperts]
    capability: Capability
    cost: Cost
    rank: int


KERNELS: dict[str, Kernel] = {}


def experts_kernel(name: str, *, capability: Capability, cost: Cost, rank: int) -> Callable[[Class], Class]:
    """Registers the decorated class under ``name`` and gives it its capability; a second registration of a name is an
    error."""

    def register(experts: Class) -> Class:
        if name in KERNELS:
            raise ValueError(f"kernel {name!r} is registered twice")
        experts.name, experts.capability = name, capability
        KERNELS[name] = Kernel(name, experts, capability, cost, rank)
        return experts

    return register


def kernel(name: str) -> Kernel:
    """The kernel of that name; KeyError lists the known ones."""
    if name not in KERNELS:
        raise KeyError(f"no kernel {name!r}; known: {', '.join(sorted(KERNELS))}")
    return KERNELS[name]
