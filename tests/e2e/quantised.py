"""Naive blocks over quantised weights, as public code writes them: dequantise, then multiply."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

E, H, I, K = 6, 64, 32, 2  # noqa: E741
Dequantise = Callable[..., Tensor]  # (codes, scale, zero | None, dtype) of one expert or of all → matrices


def fp8(codes: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype) -> Tensor:
    return codes.to(dtype) * scale.to(dtype)


def fp8_float32(codes: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype) -> Tensor:
    return (codes.float() * scale).to(dtype)


def blocks(codes: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype) -> Tensor:
    """One scale for a block: spread to its rows and columns."""
    rows, cols = codes.shape[-2] // scale.shape[-2], codes.shape[-1] // scale.shape[-1]
    spread = scale.repeat_interleave(rows, -2).repeat_interleave(cols, -1)
    return codes.to(dtype) * spread.to(dtype)


def groups(codes: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype) -> Tensor:
    """One scale for some inputs of an output channel."""
    apart = codes.to(dtype).unflatten(-1, (scale.shape[-1], -1))
    if zero is not None:
        apart = apart - zero.to(dtype).unsqueeze(-1)
    return (apart * scale.to(dtype).unsqueeze(-1)).flatten(-2)


def nibbles(codes: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Two codes a byte, the first lowest; 8 means 0 unless there are zero points."""
    whole = torch.stack([codes & 15, codes >> 4], -1).flatten(-2)
    shifted = whole.to(dtype) - 8 if zero is None else whole.to(dtype)
    return groups(shifted, scale, zero, dtype)


FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def mxfp4(codes: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A table of values, and exponents as bytes."""
    table = torch.tensor(FP4, dtype=dtype)
    whole = torch.stack([table[(codes & 15).long()], table[(codes >> 4).long()]], -1).flatten(-2)
    apart = whole.unflatten(-1, (scale.shape[-1], -1))
    return torch.ldexp(apart, (scale.int() - 127).unsqueeze(-1)).flatten(-2)


NF4 = (  # QLoRA, arXiv 2305.14314, appendix E
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
FP4_BNB = tuple(n / 12 for n in (0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3))


def by_book(numbers: tuple[float, ...], codes: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    """A table of values, the first code in the upper half of a byte, and the largest magnitude of each block."""
    table = torch.tensor(numbers, dtype=torch.float32)
    whole = table[torch.stack([codes >> 4, codes & 15], -1).flatten(-2).long()].to(dtype)
    return (whole.unflatten(-1, (absmax.shape[-1], -1)) * absmax.to(dtype).unsqueeze(-1)).flatten(-2)


def nf4(codes: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype) -> Tensor:
    return by_book(NF4, codes, scale, dtype)


def fp4_bnb(codes: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype) -> Tensor:
    return by_book(FP4_BNB, codes, scale, dtype)


SHRUNK = {"fp8": 8, "int8": 500, "int4": 40, "mxfp4": 1, "nf4": 4, "fp4_bnb": 4}  # so that results are about 1


class Bank(nn.Module):
    """Codes of E matrices [out, in] with their scales.  kind: of the codes.  group: (rows, cols) of a scale."""

    def __init__(
        self, out: int, inner: int, kind: str, group: tuple[int, int], zeros: bool, dtype: torch.dtype
    ) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(out + inner)
        rows, cols = (out if group[0] < 0 else group[0]), (inner if group[1] < 0 else group[1])
        sizes = (E, out // rows, inner // cols)
        if kind == "fp8":
            codes = torch.randn(E, out, inner, generator=draw).to(torch.float8_e4m3fn)
        elif kind == "int8":
            codes = torch.randint(-127, 128, (E, out, inner), generator=draw, dtype=torch.int8)
        else:
            codes = torch.randint(0, 256, (E, out, inner // 2), generator=draw, dtype=torch.uint8)
        scale = (torch.rand(sizes, generator=draw) + 0.5) / SHRUNK[kind]
        if kind == "mxfp4":
            scale = torch.randint(122, 126, sizes, generator=draw, dtype=torch.uint8)
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale if kind == "mxfp4" else scale.to(dtype))
        top = 16 if kind == "int4" else 10
        kept = torch.uint8 if kind == "int4" else torch.int8
        self.register_buffer("zero", torch.randint(0, top, sizes, generator=draw, dtype=kept) if zeros else None)

    def parts(self, e: int | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Of one expert, or of all."""
        pick = slice(None) if e is None else e
        zero = None if self.zero is None else self.zero[pick]
        return self.codes[pick], self.scale[pick], zero

    @property
    def nbytes(self) -> int:
        return sum(b.numel() * b.element_size() for b in self.buffers())


class Block(nn.Module):
    """A loop over experts.  how: "whole" dequantises the bank at once, "each" one expert after the other."""

    def __init__(
        self,
        dequantise: Dequantise,
        kind: str,
        group: tuple[int, int],
        zeros: bool = False,
        how: str = "each",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.dequantise, self.how = dequantise, how
        self.gate = nn.Linear(H, E, bias=False, dtype=dtype)
        self.up, self.down = (Bank(*s, kind, group, zeros, dtype) for s in ((2 * I, H), (H, I)))

    def weights(self, bank: Bank, dtype: torch.dtype) -> list[Tensor]:
        if self.how == "whole":
            return list(self.dequantise(*bank.parts(None), dtype).unbind(0))
        return [self.dequantise(*bank.parts(e), dtype) for e in range(E)]

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.gate(x).softmax(-1).topk(K, -1)
        y = torch.zeros_like(x)
        up, down = self.weights(self.up, x.dtype), self.weights(self.down, x.dtype)
        for e in range(E):
            token, slot = torch.where(ids == e)
            gate, rest = F.linear(x[token], up[e]).chunk(2, -1)
            y.index_add_(0, token, F.linear(F.silu(gate) * rest, down[e]) * weights[token, slot, None])
        return y


class Packed(nn.Module):
    """One Linear with packed codes, as libraries replace nn.Linear with."""

    def __init__(self, out: int, inner: int, dequantise: Dequantise, kind: str, group: tuple[int, int]) -> None:
        super().__init__()
        bank = Bank(out, inner, kind, group, False, torch.float32)
        self.dequantise = dequantise
        self.register_buffer("weight_packed", bank.codes[0].clone())
        self.weight_scale = nn.Parameter(bank.scale[0].clone(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dequantise(self.weight_packed, self.weight_scale, None, x.dtype))


class Expert(nn.Module):
    def __init__(self, dequantise: Dequantise, kind: str, group: tuple[int, int]) -> None:
        super().__init__()
        made = dict(dequantise=dequantise, kind=kind, group=group)
        self.gate_proj, self.up_proj = Packed(I, H, **made), Packed(I, H, **made)  # type: ignore[arg-type]
        self.down_proj = Packed(H, I, **made)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class ListBlock(nn.Module):
    """Experts as modules of three packed Linears each."""

    def __init__(self, dequantise: Dequantise, kind: str, group: tuple[int, int]) -> None:
        super().__init__()
        self.gate = nn.Linear(H, E, bias=False)
        self.experts = nn.ModuleList(Expert(dequantise, kind, group) for _ in range(E))
        draw = torch.Generator().manual_seed(1)
        for name, buffer in self.named_buffers():  # experts must differ
            if name.endswith("weight_packed") and buffer.dtype is not torch.float8_e4m3fn:
                low, high = (0, 256) if buffer.dtype is torch.uint8 else (-127, 128)
                buffer.copy_(torch.randint(low, high, buffer.shape, generator=draw))

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.gate(x).softmax(-1).topk(K, -1)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            y.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
        return y


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "fp8, a scale a channel": lambda: Block(fp8, "fp8", (1, -1)),
    "fp8, a scale a channel, whole bank": lambda: Block(fp8, "fp8", (1, -1), how="whole"),
    "fp8, a scale a tensor": lambda: Block(fp8, "fp8", (-1, -1)),
    "fp8, bfloat16": lambda: Block(fp8_float32, "fp8", (1, -1), dtype=torch.bfloat16),
    "fp8, blocks": lambda: Block(blocks, "fp8", (16, 16)),
    "fp8, blocks, whole bank": lambda: Block(blocks, "fp8", (16, 16), how="whole"),
    "int8, a scale a channel": lambda: Block(fp8, "int8", (1, -1)),
    "int8, bfloat16, whole bank": lambda: Block(fp8, "int8", (1, -1), how="whole", dtype=torch.bfloat16),
    "int8, groups": lambda: Block(groups, "int8", (1, 16)),
    "int8, groups and zero points": lambda: Block(groups, "int8", (1, 16), zeros=True),
    "int4, groups": lambda: Block(nibbles, "int4", (1, 16)),
    "int4, groups, whole bank": lambda: Block(nibbles, "int4", (1, 16), how="whole"),
    "int4, groups and zero points": lambda: Block(nibbles, "int4", (1, 16), zeros=True),
    "int4, bfloat16": lambda: Block(nibbles, "int4", (1, 32), zeros=True, dtype=torch.bfloat16),
    "mxfp4": lambda: Block(mxfp4, "mxfp4", (1, 32)),
    "mxfp4, whole bank": lambda: Block(mxfp4, "mxfp4", (1, 32), how="whole"),
    "nf4": lambda: Block(nf4, "nf4", (1, 16)),
    "nf4, whole bank": lambda: Block(nf4, "nf4", (1, 32), how="whole"),
    "nf4, bfloat16": lambda: Block(nf4, "nf4", (1, 32), dtype=torch.bfloat16),
    "fp4_bnb": lambda: Block(fp4_bnb, "fp4_bnb", (1, 16)),
    "modules, nf4": lambda: ListBlock(nf4, "nf4", (1, 16)),
    "modules, int8": lambda: ListBlock(fp8, "int8", (1, -1)),
    "modules, int4": lambda: ListBlock(nibbles, "int4", (1, 16)),
    "modules, fp8 blocks": lambda: ListBlock(blocks, "fp8", (16, 16)),
}
