"""What every quantisation scheme costs in accuracy and saves in bytes, on one gated-SiLU block.

    python benchmarks/quantisation_error.py                  prints the table
    python benchmarks/quantisation_error.py --write          and puts it into docs/quantisation.md, between the markers

The block runs in float64 (``moe_fx.reference``): the error is that of codes and scales alone, against the same block
without them.  ``bfloat16`` is the plain block in that dtype, for comparison.

Numbers, seeded: 8 experts, 2 a token, H 1024, I 512, 256 tokens.  Inputs are normal; 8 of the 1024 channels are 8 times
larger, as outlier features of language models are.  Weights are normal with standard deviation 1 / sqrt(in), each
output row scaled by a log-normal factor (sigma 0.3), and 4 input channels of each matrix are 6 times larger.
Static scales of activations are the largest values of other 256 tokens through all experts, over the largest code.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_fx.binding import Experts, InputScales, Quantised
from moe_fx.quant import (
    FP4_BNB,
    FP8_BLOCK,
    FP8_CHANNEL,
    FP8_DYNAMIC,
    FP8_GROUP,
    FP8_TENSOR,
    FP8_TOKEN,
    INT8_CHANNEL,
    INT8_DYNAMIC,
    INT8_TOKEN,
    MAX_OF,
    MXFP4,
    MXFP4_DYNAMIC,
    MXFP6_E2M3_DYNAMIC,
    MXFP6_E3M2_DYNAMIC,
    MXFP8,
    MXFP8_DYNAMIC,
    NF4,
    NVFP4,
    NVFP4_DYNAMIC,
    QuantKey,
    int_group,
)
from moe_fx.reference.experts import experts_forward
from moe_fx.reference.quantise import quantise
from moe_fx.spec import ExpertSpec, MoESpec, QuantSpec

E, K, H, I, T = 8, 2, 1024, 512, 256  # noqa: E741
DOUBLE = torch.float64
DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "quantisation.md"
MARKERS = ("<!-- table of benchmarks/quantisation_error.py -->", "<!-- end of the table -->")

# name → (weights, inputs of the products)
SCHEMES: dict[str, tuple[QuantKey, QuantKey | None]] = {
    "fp8 w8a8, tensor": (FP8_TENSOR, FP8_TENSOR),
    "fp8 w8a8, tensor, dynamic": (FP8_TENSOR, FP8_DYNAMIC),
    "fp8 w8a8, channel and token": (FP8_CHANNEL, FP8_TOKEN),
    "fp8 w8a8, block": (FP8_BLOCK, FP8_GROUP),
    "fp8 w8a16, tensor": (FP8_TENSOR, None),
    "fp8 w8a16, channel": (FP8_CHANNEL, None),
    "fp8 w8a16, block": (FP8_BLOCK, None),
    "int8 w8a8, channel and token": (INT8_CHANNEL, INT8_TOKEN),
    "int8 w8a8, channel and tensor": (INT8_CHANNEL, INT8_DYNAMIC),
    "int8 w8a16, channel": (int_group(8, -1), None),
    "int8 w8a16, channel, zero points": (int_group(8, -1, zero_points=True), None),
    "int8 w8a16, g = 128": (int_group(8, 128), None),
    "int8 w8a16, g = 128, zero points": (int_group(8, 128, zero_points=True), None),
    "int4 w4a16, g = 128": (int_group(4, 128), None),
    "int4 w4a16, g = 128, zero points": (int_group(4, 128, zero_points=True), None),
    "int4 w4a16, g = 32": (int_group(4, 32), None),
    "int4 w4a16, g = 32, zero points": (int_group(4, 32, zero_points=True), None),
    "mxfp4 w4a16": (MXFP4, None),
    "mxfp4, mxfp8 inputs": (MXFP4, MXFP8_DYNAMIC),
    "mxfp4, mxfp6 e3m2 inputs": (MXFP4, MXFP6_E3M2_DYNAMIC),
    "mxfp4, mxfp6 e2m3 inputs": (MXFP4, MXFP6_E2M3_DYNAMIC),
    "mxfp4, mxfp4 inputs": (MXFP4, MXFP4_DYNAMIC),
    "mxfp8": (MXFP8, MXFP8_DYNAMIC),
    "nvfp4 w4a16": (NVFP4, None),
    "nvfp4": (NVFP4, NVFP4_DYNAMIC),
    "nf4 w4a16": (NF4, None),
    "fp4_bnb w4a16": (FP4_BNB, None),
}


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table.  size: bytes of all weights over their number."""

    name: str
    size: float
    error: float
    cosine: float

    def __str__(self) -> str:
        return f"| {self.name} | {self.size:.3f} | {self.error:.2e} | {self.cosine:.6f} |"


def activations(seed: int) -> Tensor:
    """[T, H]"""
    x = torch.randn(T, H, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)
    x[:, torch.randperm(H, generator=torch.Generator().manual_seed(0))[:8]] *= 8  # the same channels for any seed
    return x


@cache
def weights(name: str) -> Tensor:
    """w13 [E, 2I, H] or w2 [E, H, I]"""
    rows, cols = (2 * I, H) if name == "w13" else (H, I)
    draw = torch.Generator().manual_seed(rows)
    w = torch.randn(E, rows, cols, generator=draw, dtype=DOUBLE) * cols**-0.5
    w *= torch.exp(0.3 * torch.randn(E, rows, 1, generator=draw, dtype=DOUBLE))
    for matrix in w:
        matrix[:, torch.randperm(cols, generator=draw)[:4]] *= 6
    return w


@cache
def held(name: str, key: QuantKey) -> Quantised:
    return quantise(weights(name), key)


def routing() -> tuple[Tensor, Tensor]:
    """ids and weights [T, k]: softmax of random logits, the chosen renormalised."""
    logits = torch.randn(T, E, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    chosen, ids = logits.softmax(-1).topk(K)
    return ids, chosen / chosen.sum(-1, keepdim=True)


def spec(quant: QuantSpec) -> MoESpec:
    return MoESpec(K, ExpertSpec(E, H, I), quant=quant)


def plain(dtype: torch.dtype) -> Experts:
    w13, w2 = (weights(n).to(dtype) for n in ("w13", "w2"))
    return Experts((w13,), w2, (), None, None, "gate_up")


@cache
def calibrated(limit: float) -> InputScales:
    """Static scales; limit: the largest code."""
    x = activations(3)
    rows = (torch.einsum("nh,rh->nr", x, w).chunk(2, -1) for w in weights("w13"))
    hidden = max(float((F.silu(gate) * up).abs().max()) for gate, up in rows)
    return InputScales(torch.tensor(float(x.abs().max()) / limit), torch.tensor(hidden / limit))


def run(w: QuantKey, a: QuantKey | None) -> tuple[Tensor, float]:
    """(y [T, H] under the scheme, bytes per weight)"""
    x, (ids, shares) = activations(2), routing()
    quant = QuantSpec(str(w), str(w), str(a or ""), str(a or ""))
    scales = calibrated(MAX_OF[a.dtype]) if a is not None and a.static else InputScales()
    experts = Experts((held("w13", w),), held("w2", w), (), None, None, "gate_up", scales)
    size = (w.nbytes(2 * I, H) + w.nbytes(H, I)) / (3 * H * I)
    return experts_forward(x, ids, shares, experts, spec(quant)), size


def table() -> list[Row]:
    x, (ids, shares) = activations(2), routing()
    exact = experts_forward(x, ids, shares, plain(DOUBLE), spec(QuantSpec()))

    def row(name: str, y: Tensor, size: float) -> Row:
        y = y.double()
        cosine = F.cosine_similarity(y.flatten(), exact.flatten(), dim=0)
        return Row(name, size, float((y - exact).norm() / exact.norm()), float(cosine))

    half = torch.bfloat16
    usual = experts_forward(x.to(half), ids, shares.to(half), plain(half), spec(QuantSpec()))
    return [row("bfloat16", usual, 2.0), *(row(name, *run(*keys)) for name, keys in SCHEMES.items())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", nargs="?", const=DOCUMENT, type=Path, metavar="FILE", help="a page with the markers")
    arguments = parser.parse_args()
    head = ["| scheme | bytes per weight | relative RMS error | cosine |", "|---|---|---|---|"]
    text = "\n".join([*head, *map(str, table())])
    print(text)
    if arguments.write:
        before, _, rest = arguments.write.read_text().partition(MARKERS[0])
        _, end, after = rest.partition(MARKERS[1])
        if not end:
            raise SystemExit(f"{arguments.write} lacks {MARKERS[0]} … {MARKERS[1]}")
        arguments.write.write_text(f"{before}{MARKERS[0]}\n{text}\n{MARKERS[1]}{after}")


if __name__ == "__main__":
    main()
