"""Blocks over quantised operands: as kernels get them, and as a sum over (token, slot) pairs in float64.

What codes stand for and what rounding makes of activations comes from ``tests.reference.number_formats``: tables and
loops, nothing of ``moe_fx.reference``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from moe_fx import quant
from moe_fx.binding import Experts, InputScales, Matrices, Quantised
from moe_fx.kernels.capability import RowSchemes
from moe_fx.quant import GroupShape, QuantKey, QuantSpec, int_group
from moe_fx.reference.quantise import quantise
from moe_fx.spec import CombineSpec, ExpertSpec, MoESpec
from tests.reference.number_formats import by_hand, values_of

E, K, H, I, T = 4, 2, 48, 40, 9  # noqa: E741  no multiples of the groups
DOUBLE = torch.float64


def scheme(weights: QuantKey, inputs: QuantKey | None = None) -> QuantSpec:
    w, a = str(weights), str(inputs or "")
    return QuantSpec(w, w, a, a)


WEIGHTS = {
    name: getattr(quant, name)
    for name in (
        "FP8_TENSOR", "FP8_CHANNEL", "FP8_BLOCK", "INT8_CHANNEL", "INT8_TENSOR", "MXFP8", "MXFP4", "MXFP6_E3M2",
        "MXFP6_E2M3", "NVFP4", "NF4", "FP4_BNB",
    )
} | {
    "INT4_32": int_group(4, 32), "INT4_32_ZERO": int_group(4, 32, zero_points=True),
    "INT4_CHANNEL": int_group(4, -1, scale="float16"), "INT4_128_ZERO": int_group(4, 128, True, "float32"),
    "INT8_32": int_group(8, 32), "INT8_CHANNEL_ZERO": int_group(8, -1, zero_points=True),
    "NF4_32_BF16": QuantKey("nf4", GroupShape(1, 32), "bfloat16"),
}  # fmt: skip
PARTNERS = {  # weights → what their activations are rounded to
    "FP8_TENSOR": ("FP8_TENSOR", "FP8_DYNAMIC", "FP8_TOKEN"),
    "FP8_CHANNEL": ("FP8_TENSOR", "FP8_TOKEN"),
    "FP8_BLOCK": ("FP8_GROUP",),
    "INT8_CHANNEL": ("INT8_TENSOR", "INT8_DYNAMIC", "INT8_TOKEN"),
    "INT8_TENSOR": ("INT8_TENSOR", "INT8_DYNAMIC"),
    "MXFP8": ("MXFP8_DYNAMIC",),
    "MXFP4": ("MXFP4_DYNAMIC", "MXFP6_E3M2_DYNAMIC", "MXFP6_E2M3_DYNAMIC", "MXFP8_DYNAMIC", "FP8_GROUP"),
    "MXFP6_E3M2": ("MXFP6_E3M2_DYNAMIC",),
    "MXFP6_E2M3": ("MXFP6_E2M3_DYNAMIC",),
    "NVFP4": ("NVFP4_DYNAMIC",),
    "INT4_32": ("FP8_TOKEN",),
}
SCHEMES = {name: scheme(key) for name, key in WEIGHTS.items()} | {
    f"{w}-{a}": scheme(WEIGHTS[w], getattr(quant, a)) for w, others in PARTNERS.items() for a in others
}
SHARED = [name for name, s in SCHEMES.items() if (s.key("w13"), s.key("a1")) not in RowSchemes()]


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


def listed(q: Quantised) -> Quantised:
    parts = (None if t is None else list(t) for t in (q.codes, q.scale, q.zero, q.global_scale))
    return Quantised(q.key, *parts)  # type: ignore[arg-type]


FORMS: dict[str, Callable[[Quantised], Matrices]] = {"stacked": lambda q: q, "list": listed}


@dataclass(frozen=True)
class Case:
    quant: QuantSpec
    form: str = "stacked"
    bias: bool = True
    gated: bool = True
    split: bool = False
    weight_on: Literal["output", "input"] = "output"

    @property
    def spec(self) -> MoESpec:
        act = "silu" if self.gated else "relu2"
        expert = ExpertSpec(E, H, I, act, gated=self.gated, w13_bias=self.bias, w2_bias=self.bias)
        return MoESpec(K, expert, CombineSpec(self.weight_on), quant=self.quant)

    @property
    def given(self) -> InputScales:
        """Of static keys: one number for x, one for each expert for the down product."""
        a1, a2 = (self.quant.key(a) for a in ("a1", "a2"))  # type: ignore[arg-type]
        each = torch.tensor([0.3, 0.01, 0.02, 0.05])
        return InputScales(torch.tensor(0.02) if a1 and a1.static else None, each if a2 and a2.static else None)

    def experts(self) -> tuple[Experts, dict[str, Tensor]]:
        """(as stored, the matrices and biases as they are)"""
        names = ("gate", "up") if self.split else ("w13",) if self.gated else ("gate",)
        both = [held(n, self.quant.key("w13")) for n in names]  # type: ignore[arg-type]
        down, exact = held("down", self.quant.key("w2"))  # type: ignore[arg-type]
        whole = torch.cat([values for _, values in both], 1)
        matrices = dict(zip(("gate", "up"), whole.split(I, 1), strict=False)) | {"down": exact}
        b = {n: t if self.bias else torch.zeros_like(t) for n, t in plain().items() if n.startswith("b_")}
        parts = [b[f"b_{n}"] for n in ("gate", "up")[: 1 + self.gated]]
        bias = tuple(parts) if self.split or not self.gated else (torch.cat(parts, 1),)
        up = tuple(FORMS[self.form](q) for q, _ in both)
        stored = Experts(
            up, FORMS[self.form](down), bias * self.bias, b["b_down"] if self.bias else None, None, "gate_up"
        )
        stored.scales = self.given
        return stored, matrices | b


def inputs(seed: int = 0, tokens: int = T) -> tuple[Tensor, Tensor, Tensor]:
    """x, ids, weights: one expert without tokens, a token twice to one expert, ids outside [0, E)."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, H, generator=draw, dtype=DOUBLE)
    ids = torch.randint(0, E - 1, (tokens, K), generator=draw)
    ids[0, 0], ids[1, 1], ids[2] = -1, E, ids[2, 0]
    ids[tokens - 1], x[tokens - 1] = -1, 3 * x[tokens - 1]  # the largest values belong to no expert
    return x, ids, torch.rand(tokens, K, generator=draw, dtype=DOUBLE) + 0.1


def rounded(rows: Tensor, es: list[int], key: QuantKey | None, scale: Tensor | None, everything: Tensor) -> Tensor:
    """rows of the experts ``es``, one by one; backward the identity.  everything: where scales of all rows are from."""
    if key is None:
        return rows
    shared = by_hand(everything.detach().numpy(), key) if (None, key) not in RowSchemes() else None
    found = []
    for row, e in zip(rows.detach().numpy(), es, strict=True):
        given = None if scale is None else float(scale if scale.dim() == 0 else scale[e])
        if shared is not None and key.group.row == -1:
            given = float(shared.scale[0, 0])
        whole = shared.global_scale if shared is not None and key.global_scale else None
        found.append(by_hand(row[None], key, given, whole).values)
    return rows + (torch.from_numpy(np.concatenate(found)) - rows).detach()


def dense(case: Case, x: Tensor, ids: Tensor, weights: Tensor, m: dict[str, Tensor]) -> Tensor:
    """The block pair by pair, in float64."""
    pairs = [(t, k) for t in range(len(x)) for k in range(K) if 0 <= int(ids[t, k]) < E]
    es, given = [int(ids[pair]) for pair in pairs], case.given
    on_input = case.weight_on == "input"
    w = torch.stack([weights[pair] for pair in pairs])[:, None]
    rows, every = torch.stack([x[t] for t, _ in pairs]), x
    if on_input:
        rows, every = rows * w, (x[:, None] * weights[:, :, None]).flatten(0, 1)
    rows = rounded(rows, es, case.quant.key("a1"), given.a1, every)
    g = torch.stack([m["gate"][e] @ row + m["b_gate"][e] for e, row in zip(es, rows, strict=True)])
    if case.gated:
        u = torch.stack([m["up"][e] @ row + m["b_up"][e] for e, row in zip(es, rows, strict=True)])
        hidden = g * torch.sigmoid(g) * u
    else:
        hidden = torch.relu(g) ** 2
    hidden = rounded(hidden, es, case.quant.key("a2"), given.a2, hidden)
    out = torch.stack([m["down"][e] @ h + m["b_down"][e] for e, h in zip(es, hidden, strict=True)])
    return torch.zeros_like(x).index_add(0, torch.tensor([t for t, _ in pairs]), out if on_input else w * out)
