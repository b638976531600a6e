"""Rounding by hand: what each scheme of ``quantize`` makes of a block, and blocks in other storage.

Codes are found by ``round`` and by a search in the list of e2m1's numbers; everything is computed in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .helpers import Block, twin
from .quantised import NF4

H, I, E, K = 256, 128, 4, 2  # noqa: E741  more than one group in every direction, of every scheme
SIZES = ((2 * I, H), (H, I))  # of w13 and w2
LARGEST = {"e4m3": 448.0, "int8": 127.0, "int4": 7.0, "e2m1": 6.0, "nf4": 1.0}
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float64)


@dataclass(frozen=True)
class Scheme:
    """The weights: element, group (0: the whole size), scale; the inputs: their group, None where they stay."""

    element: str
    group: tuple[int, int]
    scale: str
    inputs: tuple[int, int] | None = None


INDEPENDENT = {
    "fp8_w8a8": Scheme("e4m3", (1, 0), "float32", (1, 0)),
    "fp8_w8a8_block": Scheme("e4m3", (128, 128), "float32", (1, 128)),
    "fp8_w8a8_tensor": Scheme("e4m3", (0, 0), "float32", (0, 0)),
    "fp8_w8a16": Scheme("e4m3", (1, 0), "float32"),
    "int8_w8a8": Scheme("int8", (1, 0), "float32", (1, 0)),
    "int8_w8a16": Scheme("int8", (1, 0), "float32"),
    "int4_w4a16": Scheme("int4", (1, 128), "bfloat16"),
    "int4_w4a16_g32": Scheme("int4", (1, 32), "bfloat16"),
    "mxfp4_w4a16": Scheme("e2m1", (1, 32), "power"),
    "mxfp8": Scheme("e4m3", (1, 32), "power", (1, 32)),
    "mxfp4": Scheme("e2m1", (1, 32), "power", (1, 32)),
    "nvfp4": Scheme("e2m1", (1, 16), "two", (1, 16)),
    "nf4_w4a16": Scheme("nf4", (1, 64), "float32"),
}
BYTES = {"float32": 4, "bfloat16": 2, "power": 1, "two": 1}  # of one scale


def nearest(v: Tensor, element: str) -> Tensor:
    match element:
        case "e4m3":
            unit = torch.exp2(v.abs().clamp(min=2.0**-6).log2().floor() - 3)  # torch's cast rounds to float32 before
            return ((v / unit).round() * unit).clamp(-448, 448)
        case "int8" | "int4":
            return v.round().clamp(-LARGEST[element], LARGEST[element])
        case "nf4":
            book = torch.tensor(NF4, dtype=v.dtype)
            return book[(v[..., None] - book).abs().argmin(-1)]
        case _:
            distance = (v.abs()[..., None] - E2M1.to(v.dtype)).abs() + 1e-12 * (torch.arange(8) % 2)  # of two the even
            return E2M1.to(v.dtype)[distance.argmin(-1)].copysign(v)


def by_hand(m: Tensor, element: str, group: tuple[int, int], scale: str) -> Tensor:
    """The matrix [rows, cols] after rounding."""
    (rows, cols), largest = m.shape, LARGEST[element]
    r, c = group[0] or rows, min(group[1] or cols, cols)
    parts = m.view(rows // r, r, cols // c, c)
    top = parts.abs().amax((1, 3), keepdim=True)
    match scale:
        case "power":
            step = torch.exp2(top.log2().floor() - math.floor(math.log2(largest)))
        case "two":
            whole = (m.abs().max() / (448 * largest)).float().to(m.dtype)
            step = whole * nearest(top / whole / largest, "e4m3").clamp(min=2.0**-9)  # its smallest number
        case _:
            step = (top / largest).float().to(getattr(torch, scale)).to(m.dtype)
    return (step * nearest(parts / step, element)).view(rows, cols)


def dense(model: Any, x: Tensor, scheme: Scheme | None) -> Tensor:
    """A block with stacked ``w13`` and ``w2`` in float64, rounded as the scheme says; None: not at all."""

    def weight(m: Tensor) -> Tensor:
        return m if scheme is None else by_hand(m, scheme.element, scheme.group, scheme.scale)

    def inputs(rows: Tensor) -> Tensor:
        if scheme is None or scheme.inputs is None:
            return rows
        return by_hand(rows, scheme.element, scheme.inputs, scheme.scale)

    weights, ids = model.route(x)
    up = torch.stack([inputs(x) @ weight(m).t() for m in model.w13.detach()])
    rows = torch.stack([up[ids[:, k], torch.arange(len(x))] for k in range(K)], 1)
    gate, second = rows.chunk(2, -1)
    hidden = inputs((F.silu(gate) * second).flatten(0, 1)).view(len(x), K, -1)
    down = torch.stack([weight(m) for m in model.w2.detach()])
    return torch.einsum("tki,tkhi,tk->th", hidden, down[ids], weights)


def block(seed: int = 0) -> Block:
    """One expert is a hundred times smaller, some rows are far larger than others."""
    made = Block(E, H, I, K, seed)
    with torch.no_grad():
        made.w13[1] *= 0.01
        made.w13[:, ::7] *= 5
    return made


class Transposed(Block):
    """[E, in, out], as transformers keeps gpt-oss."""

    def __init__(self, **sizes: int):
        super().__init__(**sizes)
        self.w13, self.w2 = (nn.Parameter(w.detach().transpose(1, 2).contiguous()) for w in (self.w13, self.w2))

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.route(x)
        flat = ids.reshape(-1)
        chosen = x.repeat_interleave(self.top_k, 0).unsqueeze(1)
        gate, up = torch.bmm(chosen, self.w13[flat]).squeeze(1).chunk(2, -1)
        out = torch.bmm((F.silu(gate) * up).unsqueeze(1), self.w2[flat]).view(-1, self.top_k, self.hidden)
        return (out * weights.unsqueeze(-1)).sum(1)


class Interleaved(Block):
    """Gate and up rows in turn, with biases, which stay as they are."""

    def __init__(self, **sizes: int):
        super().__init__(**sizes)
        experts, rows, _ = self.w13.shape
        self.b13 = nn.Parameter(torch.linspace(-1, 1, experts * rows).view(experts, rows))

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.route(x)
        flat = ids.reshape(-1)
        chosen = x.repeat_interleave(self.top_k, 0).unsqueeze(-1)
        rows = torch.bmm(self.w13[flat], chosen).squeeze(-1) + self.b13[flat]
        out = torch.bmm(self.w2[flat], (F.silu(rows[:, ::2]) * rows[:, 1::2]).unsqueeze(-1)).squeeze(-1)
        return (out.view(-1, self.top_k, self.hidden) * weights.unsqueeze(-1)).sum(1)


class Flat(Block):
    """[E * out, in], as dbrx keeps them."""

    def __init__(self, **sizes: int):
        super().__init__(**sizes)
        self.w13, self.w2 = (nn.Parameter(w.detach().flatten(0, 1)) for w in (self.w13, self.w2))

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.route(x)
        out = torch.zeros_like(x)
        w13, w2 = (w.view(len(self.router), -1, w.shape[1]) for w in (self.w13, self.w2))
        for e in range(len(self.router)):
            share = (weights * (ids == e)).sum(-1, keepdim=True)
            gate, up = F.linear(x, w13[e]).chunk(2, -1)
            out = out + share * F.linear(F.silu(gate) * up, w2[e])
        return out


@torch.no_grad()
def rounded(model: nn.Module, scheme: Scheme) -> nn.Module:
    """A copy whose expert matrices are what their codes stand for."""
    copy = twin(model)
    for name, p in copy.named_parameters():
        if "router" in name or "b13" in name:
            continue
        whole = p.view(6, -1, p.shape[1]) if isinstance(model, Flat) else p if p.dim() == 3 else p[None]
        for matrix in whole.transpose(1, 2) if isinstance(model, Transposed) else whole:
            matrix.copy_(by_hand(matrix.double().contiguous(), scheme.element, scheme.group, scheme.scale))
    return copy
