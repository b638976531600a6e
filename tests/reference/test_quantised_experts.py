"""The experts on quantised operands, against a sum over (token, slot) pairs in float64 whose weights and roundings come
from ``number_formats``, and against autograd through that sum."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from moe_fx.binding import Experts, InputScales, Matrices, Quantised
from moe_fx.quant import (
    FP8_BLOCK,
    FP8_CHANNEL,
    FP8_DYNAMIC,
    FP8_GROUP,
    FP8_TENSOR,
    FP8_TOKEN,
    INT8_CHANNEL,
    INT8_DYNAMIC,
    INT8_TENSOR,
    INT8_TOKEN,
    MXFP4,
    MXFP4_DYNAMIC,
    MXFP6_E2M3_DYNAMIC,
    MXFP6_E3M2,
    MXFP6_E3M2_DYNAMIC,
    MXFP8,
    MXFP8_DYNAMIC,
    NVFP4,
    NVFP4_DYNAMIC,
    QuantKey,
    int_group,
)
from moe_fx.reference import experts as module
from moe_fx.reference import experts_backward, experts_forward
from moe_fx.reference import quantise as codes_module
from moe_fx.reference.experts import compute_dtype
from moe_fx.reference.quantise import quantise
from moe_fx.spec import CombineSpec, ExpertSpec, MoESpec, QuantSpec

from .number_formats import by_hand, values_of

E, K, H, I, T = 4, 2, 40, 72, 9  # noqa: E741  no multiples of the groups; w13 has two blocks of rows
DOUBLE = torch.float64


def scheme(weights: QuantKey | None, inputs: QuantKey | None = None) -> QuantSpec:
    w, a = str(weights or ""), str(inputs or "")
    return QuantSpec(w, w, a, a)


SCHEMES = {
    "fp8 tensor": scheme(FP8_TENSOR, FP8_TENSOR),
    "fp8 tensor dynamic": scheme(FP8_TENSOR, FP8_DYNAMIC),
    "fp8 channel token": scheme(FP8_CHANNEL, FP8_TOKEN),
    "fp8 block": scheme(FP8_BLOCK, FP8_GROUP),
    "fp8 w8a16": scheme(FP8_BLOCK),
    "int8 static": scheme(INT8_TENSOR, INT8_TENSOR),
    "int8 dynamic": scheme(INT8_CHANNEL, INT8_DYNAMIC),
    "int8 token": scheme(INT8_CHANNEL, INT8_TOKEN),
    "int8 asymmetric token": scheme(INT8_CHANNEL, replace(INT8_TOKEN, zero_points=True)),
    "int8 w8a16": scheme(int_group(8, 32)),
    "int8 w8a16 zero": scheme(int_group(8, -1, zero_points=True)),
    "int4 w4a16": scheme(int_group(4, 32)),
    "int4 w4a16 zero": scheme(int_group(4, 128, zero_points=True)),
    "int4 fp8 token": scheme(int_group(4, 32), FP8_TOKEN),
    "mxfp4 w4a16": scheme(MXFP4),
    "mxfp4": scheme(MXFP4, MXFP4_DYNAMIC),
    "mxfp4 mxfp6 e3m2": scheme(MXFP4, MXFP6_E3M2_DYNAMIC),
    "mxfp4 mxfp6 e2m3": scheme(MXFP4, MXFP6_E2M3_DYNAMIC),
    "mxfp4 mxfp8": scheme(MXFP4, MXFP8_DYNAMIC),
    "mxfp6": scheme(MXFP6_E3M2, MXFP6_E3M2_DYNAMIC),
    "mxfp8": scheme(MXFP8, MXFP8_DYNAMIC),
    "nvfp4": scheme(NVFP4, NVFP4_DYNAMIC),
    "inputs alone": scheme(None, FP8_TOKEN),
    "up alone": QuantSpec(w13=str(NVFP4), a1=str(NVFP4_DYNAMIC)),
    "down alone": QuantSpec(w2=str(INT8_CHANNEL), a2=str(INT8_DYNAMIC)),
}


def listed(q: Quantised) -> Quantised:
    """The same, each part a list of the experts'."""
    codes, scale, zero, whole = (None if t is None else list(t) for t in (q.codes, q.scale, q.zero, q.global_scale))
    return Quantised(q.key, codes, scale, zero, whole)


FORMS: dict[str, Callable[[Quantised], Matrices]] = {"stacked": lambda q: q, "list": listed}


@cache
def plain() -> dict[str, Tensor]:
    """gate, up [E, I, H], down [E, H, I] and their biases, float64; one expert a hundred times smaller."""
    draw = torch.Generator().manual_seed(1)
    sizes = {"gate": (E, I, H), "up": (E, I, H), "down": (E, H, I), "b_gate": (E, I), "b_up": (E, I), "b_down": (E, H)}
    found = {name: 0.3 * torch.randn(size, generator=draw, dtype=DOUBLE) for name, size in sizes.items()}
    found["up"][1] *= 0.01
    return found


@cache
def held(name: str, key: QuantKey) -> tuple[Quantised, Tensor]:
    """(the codes of those matrices, what they stand for by hand); "w13" is gate then up."""
    matrices = torch.cat([plain()["gate"], plain()["up"]], 1) if name == "w13" else plain()[name]
    q = quantise(matrices, key)
    return q, torch.stack([torch.from_numpy(values_of(q[e])) for e in range(E)])


@dataclass(frozen=True)
class Case:
    """A block under a scheme.  split: gate and up are two operands."""

    quant: QuantSpec
    weight_on: str = "output"
    form: str = "stacked"
    split: bool = False
    gated: bool = True

    @property
    def spec(self) -> MoESpec:
        act = "silu" if self.gated else "relu2"
        expert = ExpertSpec(E, H, I, act, gated=self.gated, w13_bias=True, w2_bias=True)
        return MoESpec(K, expert, CombineSpec(self.weight_on), quant=self.quant)  # type: ignore[arg-type]

    def matrices(self, name: str, by: str) -> tuple[Matrices, Tensor]:
        """(as stored, as it is in float64)"""
        key = self.quant.key("w2" if name == "down" else "w13")
        if key is None:
            whole = torch.cat([plain()["gate"], plain()["up"]], 1) if name == "w13" else plain()[name]
            return whole, whole
        q, values = held(name, key)
        return FORMS[by](q), values

    @property
    def scales(self) -> InputScales:
        """Of static keys; the second product has one for each expert."""
        a1, a2 = (self.quant.key(a) for a in ("a1", "a2"))
        each = torch.tensor([0.3, 0.01, 0.02, 0.05])
        return InputScales(torch.tensor(0.02) if a1 and a1.static else None, each if a2 and a2.static else None)

    def parts(self) -> tuple[Experts, dict[str, Tensor]]:
        """(the operands, gate, up and down as they are in float64)"""
        b = plain()
        down, exact = self.matrices("down", self.form)
        if not self.gated:
            gate, values = self.matrices("gate", self.form)
            return Experts((gate,), down, (b["b_gate"],), b["b_down"], None, "gate_up", self.scales), {
                "gate": values,
                "down": exact,
            }
        if self.split:
            both = [self.matrices(n, self.form) for n in ("gate", "up")]
            bias = (b["b_gate"], b["b_up"])
            up, halves = tuple(m for m, _ in both), [v for _, v in both]
        else:
            w13, values = self.matrices("w13", self.form)
            bias, up, halves = (torch.cat([b["b_gate"], b["b_up"]], 1),), (w13,), list(values.split(I, 1))
        return Experts(up, down, bias, b["b_down"], None, "gate_up", self.scales), dict(
            zip(("gate", "up", "down"), [*halves, exact], strict=True)
        )


def inputs(seed: int = 0, tokens: int = T) -> tuple[Tensor, Tensor, Tensor]:
    """x, ids, weights: one expert without tokens, a token twice to one expert, ids outside [0, E)."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, H, generator=draw, dtype=DOUBLE)
    ids = torch.randint(0, E - 1, (tokens, K), generator=draw)
    if tokens > 2:
        ids[0, 0], ids[1, 1], ids[2] = -1, E, ids[2, 0]
        ids[tokens - 1], x[tokens - 1] = -1, 3 * x[tokens - 1]  # the largest values belong to no expert
    return x, ids, torch.rand(tokens, K, generator=draw, dtype=DOUBLE) + 0.1


def rounded(rows: Tensor, es: list[int], key: QuantKey | None, scale: Tensor | None, everything: Tensor) -> Tensor:
    """rows [n, in] of the experts ``es``, row by row by hand; the derivative is that of the identity.

    everything: what dynamic scales over rows are taken from.
    """
    if key is None or not es:
        return rows
    whole = by_hand(everything.detach().numpy(), key)
    found = []
    for row, e in zip(rows.detach().numpy(), es, strict=True):
        given = None if scale is None else float(scale if scale.dim() == 0 else scale[e])
        if key.group.row == -1 and not key.static:
            given = float(whole.scale[0, 0])
        found.append(by_hand(row[None], key, given, whole.global_scale if key.global_scale else None).values)
    return rows + (torch.from_numpy(np.concatenate(found)) - rows).detach()


def dense(case: Case, x: Tensor, ids: Tensor, weights: Tensor, b: dict[str, Tensor]) -> Tensor:
    """The block pair by pair; b: the biases and, as they are, the matrices."""
    pairs = [(t, k) for t in range(len(x)) for k in range(K) if 0 <= int(ids[t, k]) < E]
    es = [int(ids[pair]) for pair in pairs]
    y = torch.zeros(x.shape, dtype=DOUBLE)
    if not pairs:
        return y
    on_input = case.weight_on == "input"
    every = (x[:, None] * weights[:, :, None]).reshape(-1, H) if on_input else x
    rows = torch.stack([x[t] * weights[t, k] if on_input else x[t] for t, k in pairs])
    rows = rounded(rows, es, case.quant.key("a1"), case.scales.a1, every)
    g = torch.stack([b["gate"][e] @ row + b["b_gate"][e] for e, row in zip(es, rows, strict=True)])
    if case.gated:
        u = torch.stack([b["up"][e] @ row + b["b_up"][e] for e, row in zip(es, rows, strict=True)])
        hidden = g * torch.sigmoid(g) * u
    else:
        hidden = torch.relu(g) ** 2
    hidden = rounded(hidden, es, case.quant.key("a2"), case.scales.a2, hidden)
    for (t, k), e, h in zip(pairs, es, hidden, strict=True):
        out = b["down"][e] @ h + b["b_down"][e]
        place = torch.zeros(len(x), 1, dtype=DOUBLE)
        place[t] = 1
        y = y + place * (out if on_input else weights[t, k] * out)
    return y


def forward(case: Case, x: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """(the reference, the sum by hand)"""
    experts, exact = case.parts()
    y = experts_forward(x, ids, weights, experts, case.spec)
    return y, dense(case, x, ids, weights, plain() | exact)


def close(actual: Tensor, expected: Tensor) -> bool:
    return bool((actual - expected).norm() <= 1e-12 * expected.norm())


@pytest.mark.parametrize("weight_on", ["output", "input"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", SCHEMES)
def test_forward_is_the_dense_sum(name: str, form: str, weight_on: str) -> None:
    y, expected = forward(Case(SCHEMES[name], weight_on, form), *inputs())
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["int4 w4a16", "mxfp4 mxfp8", "nvfp4", "int8 dynamic", "down alone"])
def test_gate_and_up_apart_and_no_gate(name: str) -> None:
    for case in (Case(SCHEMES[name], split=True), Case(SCHEMES[name], gated=False)):
        torch.testing.assert_close(*forward(case, *inputs(1)), rtol=1e-12, atol=1e-12)


ROUTINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "all to one": lambda ids: torch.full_like(ids, 2),
    "to no one": lambda ids: torch.full_like(ids, -1),
    "one row": lambda ids: torch.full_like(ids, E).index_put((torch.tensor(3), torch.tensor(1)), torch.tensor(1)),
    "far outside": lambda ids: ids.where(ids > 0, 10**6),
}


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("name", SCHEMES)
def test_any_routing(name: str, routing: str) -> None:
    x, ids, weights = inputs(2)
    torch.testing.assert_close(
        *forward(Case(SCHEMES[name]), x, ROUTINGS[routing](ids), weights), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("tokens", [0, 1])
@pytest.mark.parametrize("weight_on", ["output", "input"])
@pytest.mark.parametrize("name", SCHEMES)
def test_few_tokens(name: str, weight_on: str, tokens: int) -> None:
    case = Case(SCHEMES[name], weight_on)
    x, ids, weights = inputs(3, tokens)
    y, expected = forward(case, x, ids, weights)
    assert y.shape == (tokens, H)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    experts, _ = case.parts()
    dx, dweights = experts_backward(x, x, ids, weights, experts, case.spec, gradients(experts))
    assert (dx.shape, dweights.shape) == (x.shape, weights.shape)


def gradients(experts: Experts) -> Experts:
    """Zeros like the operands; codes as they are."""

    def zeros(m: Matrices) -> Matrices:
        return m if isinstance(m, Quantised) else torch.zeros_like(m)

    up, bias = (tuple(zeros(m) for m in part) for part in (experts.up, experts.up_bias))
    return Experts(up, zeros(experts.down), bias, zeros(experts.down_bias), None, experts.order)


@pytest.mark.parametrize("weight_on", ["output", "input"])
@pytest.mark.parametrize("name", SCHEMES)
def test_backward_is_that_of_autograd(name: str, weight_on: str) -> None:
    """Rounding is the identity, codes have no gradient, biases and plain weights do."""
    case = Case(SCHEMES[name], weight_on, split=True)
    x, ids, weights = inputs(4)
    experts, exact = case.parts()
    dy = torch.randn(T, H, generator=torch.Generator().manual_seed(5), dtype=DOUBLE)
    grads = gradients(experts)
    dx, dweights = experts_backward(dy, x, ids, weights, experts, case.spec, grads)
    leaves = {n: t.clone().requires_grad_() for n, t in ({"x": x, "weights": weights} | plain() | exact).items()}
    y = dense(case, leaves["x"], ids, leaves["weights"], leaves)
    expected = dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy), strict=True))
    found: dict[str, Matrices | None] = {"x": dx, "weights": dweights, "b_down": grads.down_bias, "down": grads.down}
    found |= dict(zip(("gate", "up", "b_gate", "b_up"), (*grads.up, *grads.up_bias), strict=True))
    for what, gradient in found.items():
        if not isinstance(gradient, Quantised):
            torch.testing.assert_close(
                gradient, expected[what], rtol=1e-10, atol=1e-11, msg=lambda m, w=what: f"{w}: {m}"
            )
    assert any(isinstance(g, Quantised) for g in found.values()) == bool(case.quant.w13 or case.quant.w2)


def test_static_scales() -> None:
    """One number or one for each expert; without one, an error that says so."""
    case = Case(SCHEMES["int8 static"])
    x, ids, weights = inputs()
    experts, _ = case.parts()

    def run(a2: Tensor) -> Tensor:
        experts.scales = InputScales(torch.tensor([0.02]), a2)
        return experts_forward(x, ids, weights, experts, case.spec)

    assert torch.equal(run(torch.tensor(0.03)), run(torch.full((E,), 0.03)))
    assert not close(run(torch.tensor(0.03)), run(torch.tensor([0.03, 0.02, 0.03, 0.03])))
    experts.scales = InputScales()
    with pytest.raises(ValueError, match="is static: give it"):
        experts_forward(x, ids, weights, experts, case.spec)


def test_given_global_scales() -> None:
    """The same numbers that the values ask for change nothing; others do."""
    case = Case(SCHEMES["nvfp4"])
    x, ids, weights = inputs()
    experts, _ = case.parts()
    own = quantise(x, NVFP4_DYNAMIC).global_scale
    y = experts_forward(x, ids, weights, experts, case.spec)
    experts.scales = InputScales(a1_global=own)
    assert torch.equal(experts_forward(x, ids, weights, experts, case.spec), y)
    experts.scales = InputScales(a1_global=1.3 * own)
    assert not close(experts_forward(x, ids, weights, experts, case.spec), y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", [n for n, s in SCHEMES.items() if s.w13 and s.w2 and not s.a1])
def test_codes_compute_in_the_dtype_of_x(name: str, dtype: torch.dtype) -> None:
    """To the bit what plain weights of that dtype give, where those are what the codes stand for."""
    case = Case(SCHEMES[name])
    x, ids, weights = inputs()
    x = x.to(dtype)
    experts, exact = case.parts()
    assert compute_dtype(experts, case.spec.expert, dtype) == dtype
    y = experts_forward(x, ids, weights, experts, case.spec)
    up = codes_module.dequantise(experts.up[0], dtype)
    torch.testing.assert_close(
        up.double(), torch.cat([exact["gate"], exact["up"]], 1), rtol=torch.finfo(dtype).eps, atol=1e-7
    )
    usual = replace(experts, up=(up,), down=codes_module.dequantise(experts.down, dtype))
    assert y.dtype == dtype
    assert torch.equal(y, experts_forward(x, ids, weights, usual, replace(case.spec, quant=QuantSpec())))


def test_the_spec_may_name_the_compute_dtype() -> None:
    experts, _ = Case(SCHEMES["mxfp4 w4a16"]).parts()
    expert = Case(SCHEMES["mxfp4 w4a16"]).spec.expert
    assert compute_dtype(experts, replace(expert, compute_dtype="bfloat16")) == torch.bfloat16
    with pytest.raises(ValueError, match="give that of x"):
        compute_dtype(experts, expert)


def test_one_expert_is_dequantised_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    case, shapes = Case(SCHEMES["int4 w4a16"]), []
    experts, _ = case.parts()
    original = codes_module.dequantise
    monkeypatch.setattr(codes_module, "dequantise", lambda q, dtype: shapes.append(q.codes.dim()) or original(q, dtype))
    x, ids, weights = inputs()
    experts_forward(x, torch.full_like(ids, 1), weights, experts, case.spec)
    assert shapes == [2, 2]


# --- defects


def _of_the_next_expert(matrices: Matrices, e: int, dtype: torch.dtype) -> Tensor:
    q = matrices if isinstance(matrices, Tensor) else replace(matrices, scale=matrices.scale.float().roll(1, 0))
    return codes_module.matrix(q, e, dtype)


def _one_scale_an_expert(rounding: module.Rounding, _: Callable[[], Tensor]) -> module.Rounding:
    return rounding


def _as_they_are(rounding: module.Rounding, rows: Tensor, _: int) -> Tensor:
    return rows


DEFECTS: list[tuple[str, object, str, object]] = [
    ("fp8 channel token", module, "matrix", _of_the_next_expert),
    ("fp8 tensor dynamic", module.Rounding, "over", _one_scale_an_expert),
    ("nvfp4", module.Rounding, "over", _one_scale_an_expert),
    ("int8 token", module.Rounding, "__call__", _as_they_are),
    ("fp8 tensor", module, "_of", lambda scale, e: scale if scale is None or scale.dim() == 0 else scale[0]),
]


@pytest.mark.parametrize("number", range(len(DEFECTS)))
def test_a_defect_is_seen(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    name, place, attribute, planted = DEFECTS[number]
    assert close(*forward(Case(SCHEMES[name]), *inputs()))
    monkeypatch.setattr(place, attribute, planted)
    assert not close(*forward(Case(SCHEMES[name]), *inputs()))
