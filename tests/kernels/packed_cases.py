"""Canonical tensors of every scheme of packed layouts, and what each library says of sizes and padding.

``SIZES`` is the table of packed layouts once more, told by its effects: what I and H are rounded up to, and what
becomes of scales.  It comes from the libraries' documents, not from the table.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

E, H = 3, 256
F8, E8, U8, F32, BF16 = torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.uint8, torch.float32, torch.bfloat16


class Held(NamedTuple):
    """codes: dtype, ``packing`` codes an element.  scales: dtype, one for ``group`` rows x cols; 0: for all."""

    codes: torch.dtype
    packing: int
    scales: torch.dtype
    group: tuple[int, int]


HELD: dict[str, Held] = {
    "bf16": Held(BF16, 1, F32, (0, 0)),
    "fp8_tensor": Held(F8, 1, F32, (0, 0)),
    "fp8_channel": Held(F8, 1, F32, (1, 0)),
    "fp8_block": Held(F8, 1, F32, (128, 128)),
    "mxfp8": Held(F8, 1, E8, (1, 32)),
    "mxfp4": Held(U8, 2, E8, (1, 32)),
    "nvfp4": Held(U8, 2, F8, (1, 16)),
    "int8_tensor": Held(torch.int8, 1, F32, (0, 0)),
    "int8_channel": Held(torch.int8, 1, BF16, (1, 0)),
    "int4_channel": Held(U8, 2, BF16, (1, 0)),
    **{f"int8_{g}": Held(torch.int8, 1, BF16, (1, g)) for g in (32, 64, 128)},
    **{f"int4_{g}": Held(U8, 2, BF16, (1, g)) for g in (32, 64, 128)},
}


def held(scheme: str) -> Held:
    """By the longest name that the scheme begins with."""
    return HELD[max((name for name in HELD if scheme.startswith(name)), key=len)]


def size_of(role: str, inner: int, hidden: int) -> tuple[int, int]:
    """(rows, cols) of the matrix that the role goes with."""
    return (2 * inner, hidden) if role.startswith("w13") else (hidden, inner)


def make(scheme: str, role: str, inner: int, experts: int = E, hidden: int = H) -> list[Tensor]:
    """Canonical tensors of all experts: random bits that are finite; scales are positive."""
    codes, packing, scales, (group_rows, group_cols) = held(scheme)
    rows, cols = size_of(role, inner, hidden)
    if role.endswith("_bias"):
        return [torch.randn(rows).to(BF16) for _ in range(experts)]
    if role.endswith("_scale"):
        size = -(-rows // (group_rows or rows)), -(-cols // (group_cols or cols))
        if scales in (F32, BF16):
            return [(torch.rand(size) + 0.1).to(scales) for _ in range(experts)]
        low, high = (0x08, 0x7E) if scales == F8 else (90, 126)  # no 1.0, which is padding
        return [torch.randint(low, high, size, dtype=U8).view(scales) for _ in range(experts)]
    if codes == BF16:
        return [torch.randn(rows, cols).to(BF16) for _ in range(experts)]
    if codes == F8:
        return [torch.randn(rows, cols).mul(60).clamp(-448, 448).to(F8) for _ in range(experts)]
    return [torch.randint(0, 256, (rows, cols // packing), dtype=U8).view(codes) for _ in range(experts)]


def partners(scheme: str, role: str, inner: int, experts: int = E, hidden: int = H) -> list[Tensor] | None:
    """The scales of codes, the codes of scales; None of biases."""
    if role.endswith("_bias"):
        return None
    other = role.removesuffix("_scale") if role.endswith("_scale") else f"{role}_scale"
    return make(scheme, other, inner, experts, hidden)


class Sizes(NamedTuple):
    """i, h: what I and H are rounded up to.  scales: as they are, in tiles of 128 x 4, one of 16 bits a row and group,
    or as bytes of words in aligned columns.  sums: 4 more bytes a row of codes.  wide: biases are float32."""

    i: int = 1
    h: int = 1
    scales: Literal["as is", "tiles", "rows", "words"] = "as is"
    sums: bool = False
    wide: bool = False


SIZES: dict[str, dict[str, Sizes]] = {
    "triton": {s: Sizes() for s in ("bf16", "fp8_tensor", "fp8_channel", "fp8_block", "int8_tensor", "int8_channel")},
    "vllm_cutlass": {
        **{s: Sizes() for s in ("fp8_tensor", "fp8_channel")},
        **{s: Sizes(scales="tiles") for s in ("nvfp4", "mxfp4")},
    },
    "torch_grouped": {"bf16": Sizes()},
    "torch_scaled_grouped": {"fp8_channel": Sizes(), "mxfp8": Sizes(scales="tiles")},
    "flashinfer_cutlass": {
        "bf16": Sizes(),
        "fp8_tensor": Sizes(16),
        "fp8_block": Sizes(),
        "nvfp4": Sizes(64, 1, "tiles"),
        "mxfp4_mxfp8": Sizes(128, 128, "tiles"),
    },
    "flashinfer_trtllm": {
        "bf16": Sizes(128),
        "fp8_block": Sizes(),
        "fp8_tensor": Sizes(16),
        "mxfp8": Sizes(128, 256, "tiles"),
        "nvfp4": Sizes(64, 256, "tiles"),
        "mxfp4": Sizes(128, 256, "tiles", wide=True),
    },
    "flashinfer_cutedsl": {"nvfp4": Sizes(64, 256, "tiles")},
    "deepgemm": {
        "fp8_block": Sizes(),
        "fp8_block_ue8m0": Sizes(),
        **{s: Sizes(scales="words") for s in ("fp8_block_ue8m0_packed", "mxfp8", "mxfp4")},
    },
    "marlin": {
        **{f"fp8_{g}{d}": Sizes(64, 1, "rows") for g in ("tensor", "channel") for d in ("", "_fp16")},
        **{f"fp8_block{d}": Sizes(128, 1, "rows") for d in ("", "_fp16")},
        **{s: Sizes(64) for s in ("mxfp8", "mxfp4", "nvfp4")},
        **{f"int{b}_{g}": Sizes(64) for b in (4, 8) for g in ("channel", 32, 64)},
        **{f"int{b}_128": Sizes(128) for b in (4, 8)},
    },
    "aiter": {
        **{s: Sizes(64) for s in ("bf16", "fp8_tensor", "fp8_channel")},  # of up to 192; of more: 128
        "fp8_block": Sizes(),
        "mxfp8": Sizes(),
        **{s: Sizes(wide=True) for s in ("mxfp4", "mxfp4_bf16")},
    },
    "xpu": {s: Sizes() for s in ("bf16", "mxfp4", "fp8_tensor", "fp8_block")},
    "cpu": {
        **{s: Sizes(32) for s in ("bf16", "bf16_amx")},
        "fp8_block": Sizes(),
        "int8_channel": Sizes(32, sums=True),
        "mxfp4": Sizes(),
    },
}
