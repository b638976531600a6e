"""Cases for kernels: every value that a Capability lists, in pairs with every other, as runnable blocks."""

from __future__ import annotations

import random
from dataclasses import dataclass, fields, replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from moe_fx.binding import Experts, Operand, WeightBinding, bind
from moe_fx.kernels.capability import Capability
from moe_fx.reference import ACTIVATIONS
from moe_fx.spec import CombineSpec, ExpertSpec, MoESpec

PARAMS = {
    "alpha": 1.702,
    "limit": 0.5,
    "gate_cap": 1.5,
    "up_cap": 2.5,
    "slope": 0.2,
    "beta": 1.5,
}  # small, so that limits are reached
E, K, H, I, T = 6, 3, 24, 16, 13  # noqa: E741


@dataclass(frozen=True, slots=True)
class Case:
    """One point of a capability.  ``split``: gate and up are two operands."""

    act: tuple[str, bool] = ("silu", True)
    dtype: str = "float32"
    x_dtype: str = "same"
    weight_dtype: str = "same"
    form: str = "stacked"
    transposed: bool = False
    order: str = "gate_up"
    split: bool = False
    w13_bias: bool = False
    w2_bias: bool = False
    norm: str = ""
    weight_on: str = "output"
    act_dtype: str = ""
    compute_dtype: str = ""
    accumulate: str = ""
    out_dtype: str = ""
    ids_dtype: str = "int64"

    def named(self, name: str) -> torch.dtype:
        """The dtype in that field; "same" is that of the expert weights."""
        value = getattr(self, name)
        return getattr(torch, self.dtype if value == "same" else value)

    @property
    def spec(self) -> MoESpec:
        name, gated = self.act
        params = tuple(PARAMS[p] for p in ACTIVATIONS[self.act].params)
        expert = ExpertSpec(E, H, I, name, params, gated, self.w13_bias, self.w2_bias, self.norm, 1e-5)
        expert = replace(expert, act_dtype=self.act_dtype, compute_dtype=self.compute_dtype)
        return MoESpec(K, expert, CombineSpec(self.weight_on, self.accumulate, self.out_dtype))

    @property
    def exact_spec(self) -> MoESpec:
        """The same mathematics, all of it in the dtype of the tensors."""
        return replace(self, act_dtype="", compute_dtype="", accumulate="", out_dtype="").spec

    @property
    def eps(self) -> float:
        """Of the coarsest dtype that a value passes through."""
        names = [self.dtype, self.act_dtype, self.compute_dtype, self.accumulate, self.out_dtype]
        dtypes = [getattr(torch, n) for n in names if n] + [self.named("x_dtype"), self.named("weight_dtype")]
        return max(torch.finfo(d).eps for d in dtypes)

    @property
    def binding(self) -> WeightBinding:
        roles = ["w1", "w3"] if self.split and self.act[1] else ["w13"]
        biases = [f"{r}_bias" for r in roles] * self.w13_bias + ["w2_bias"] * self.w2_bias
        small: Any = "list" if self.form == "list" else "stacked"
        form, order = self.form, self.order if roles == ["w13"] and self.act[1] else "gate_up"
        operands = [Operand(r, form, self.transposed, order) for r in (*roles, "w2")]
        operands += [Operand(b, small, False, order) for b in biases]
        return WeightBinding((*operands, *([Operand("norm")] if self.norm else [])))


@dataclass(slots=True)
class Block:
    """A case with tensors."""

    x: Tensor
    ids: Tensor
    weights: Tensor
    operands: list[Tensor]
    binding: WeightBinding

    @property
    def experts(self) -> Experts:
        return bind(self.binding, self.operands, E)

    def exact(self) -> Block:
        """The same values in fp64."""
        operands = [t.double() for t in self.operands]
        return Block(self.x.double(), self.ids, self.weights.double(), operands, self.binding)

    def zeros(self) -> list[Tensor]:
        """Room for the gradients of the operands."""
        return [torch.zeros_like(t) for t in self.operands]


def make(case: Case, seed: int = 0, device: str = "cpu", tokens: int = T) -> Block:
    """Random tensors; ids hold duplicates and values outside [0, E), and one expert has no token."""
    draw = torch.Generator().manual_seed(seed)

    def normal(shape: list[int], scale: float, dtype: torch.dtype) -> Tensor:
        return (torch.randn(shape, generator=draw, dtype=torch.float64) * scale).to(dtype).to(device)

    dtype, gated = case.named("dtype"), case.act[1]
    rows = {"w13": 2 * I if gated else I, "w1": I, "w3": I, "w2": H}
    operands = []
    for operand in case.binding.operands:
        if operand.role == "norm":
            operands.append(normal([H], 0.3, dtype) + 1)
            continue
        out = rows[operand.role.removesuffix("_bias")]
        size = [out] if operand.role.endswith("_bias") else [out, I if operand.role == "w2" else H]
        size = size[::-1] if operand.transposed else size
        scale = 0.5 if len(size) == 1 else (I if operand.role == "w2" else H) ** -0.5
        if operand.form == "list":
            operands += [normal(size, scale, dtype) for _ in range(E)]
        else:
            whole = normal([E, *size], scale, dtype)
            operands.append(whole.flatten(0, 1) if operand.form == "flat" else whole)
    ids = torch.randint(0, E - 1, (tokens, K), generator=draw)
    if tokens > 2:
        ids[0, 0], ids[1, 1], ids[2] = -1, E, ids[2, 0]
    ids = ids.to(getattr(torch, case.ids_dtype)).to(device)
    weights = torch.rand((tokens, K), generator=draw).to(case.named("weight_dtype")).to(device)
    return Block(normal([tokens, H], 1.0, case.named("x_dtype")), ids, weights, operands, case.binding)


def axes(capability: Capability) -> dict[str, list[Any]]:
    """Field of Case → the values that the capability claims."""
    bias = [False, True] if capability.biases else [False]
    values: dict[str, Any] = {
        "act": [a for a in ACTIVATIONS if a[0] in capability.activations and a[1] in capability.gated],
        "dtype": capability.dtypes,
        "x_dtype": ["same", "float32"],
        "weight_dtype": ["same", "float32"],
        "form": capability.forms,
        "transposed": capability.transposed,
        "order": capability.orders,
        "split": [False, True],
        "w13_bias": bias,
        "w2_bias": bias,
        "norm": capability.norms,
        "weight_on": capability.weight_on,
        "act_dtype": capability.act_dtypes,
        "compute_dtype": capability.compute_dtypes,
        "accumulate": capability.accumulate,
        "out_dtype": capability.out_dtypes,
        "ids_dtype": ["int64", "int32"],
    }
    assert list(values) == [f.name for f in fields(Case)]
    return {name: sorted(allowed) for name, allowed in values.items()}


def sample(capability: Capability, count: int, seed: int = 0) -> list[Case]:
    """``count`` cases, each the one of many draws that adds most pairs of values not yet seen together."""
    choices, draw, seen = axes(capability), random.Random(seed), set()
    cases = []
    for _ in range(count):
        drawn = [{name: draw.choice(values) for name, values in choices.items()} for _ in range(12)]
        best = max(drawn, key=lambda d: len(set(combinations(d.items(), 2)) - seen))
        seen |= set(combinations(best.items(), 2))
        cases.append(Case(**best))
    return cases


def error(actual: Tensor, exact: Tensor) -> float:
    """Relative root mean square error."""
    norm = exact.norm()
    return float((actual.double() - exact).norm() / norm) if norm > 0 else float(actual.double().norm())


def assert_as_exact(actual: Tensor, usual: Tensor, exact: Tensor, eps: float, what: str = "") -> None:
    """The tolerance rule: at most twice the reference's own error against fp64, plus 4 eps."""
    assert actual.dtype == usual.dtype, what
    assert actual.shape == usual.shape, what
    ours, bound = error(actual, exact), 2 * error(usual, exact) + 4 * eps
    assert ours <= bound, f"{what}: error {ours:.2e} > {bound:.2e}"
