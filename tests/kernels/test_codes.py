"""Matrices out of codes, fast: the same bits as the reference's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moe_fx.binding import Quantised
from moe_fx.kernels.experts import codes as fast
from moe_fx.quant import (
    FP4_BNB,
    FP8_BLOCK,
    FP8_CHANNEL,
    FP8_TENSOR,
    INT8_CHANNEL,
    MXFP4,
    MXFP6_E2M3,
    MXFP8,
    NF4,
    NVFP4,
    GroupShape,
    QuantKey,
    int_group,
)
from moe_fx.reference.quantise import dequantise, quantise

KEYS = [
    FP8_TENSOR, FP8_CHANNEL, FP8_BLOCK, MXFP8, INT8_CHANNEL, MXFP4, MXFP6_E2M3, NVFP4, NF4, FP4_BNB,
    QuantKey("float8_e4m3fn", GroupShape(-1, 32), "bfloat16"), QuantKey("int8", GroupShape(48, 32), "float16"),
    int_group(8, 32), int_group(8, 32, zero_points=True), int_group(8, -1, zero_points=True),
    int_group(4, 32), int_group(4, 32, zero_points=True), int_group(4, 128, zero_points=True),
]  # fmt: skip
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def made(key: QuantKey, rows: int, cols: int) -> Quantised:
    """Two experts; rows of different magnitude, one of zeros."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(2, rows, cols, generator=generator, dtype=torch.float64)
    w *= torch.exp2(torch.randint(-6, 3, (2, rows, 1), generator=generator))
    w[:, 0] = 0
    return quantise(w, key)


def same(a: Tensor, b: Tensor) -> bool:
    """To the bit; any NaN is one."""
    return a.dtype == b.dtype and a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(64, 128), (72, 160), (1, 64), (130, 96)])
@pytest.mark.parametrize("key", KEYS, ids=str)
def test_same_bits(key: QuantKey, size: tuple[int, int], dtype: torch.dtype) -> None:
    q = made(key, *size)
    for e in range(2):
        assert same(fast.matrix(q, e, dtype), dequantise(q[e], dtype))


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_every_code_of_e4m3(dtype: torch.dtype) -> None:
    """NaN among them; at an even and at an odd place in memory, and turned."""
    every = torch.arange(256).to(torch.uint8)
    whole = torch.cat([every, every[:1], every]).view(torch.float8_e4m3fn)
    scale = torch.tensor([[0.75]])
    for codes in (whole[:256].view(2, 128), whole[257:].view(2, 128), whole[:256].view(128, 2).t()):
        q = Quantised(FP8_TENSOR, codes[None], scale[None])
        assert same(fast.matrix(q, 0, dtype), dequantise(q[0], dtype))


@pytest.mark.parametrize("name", ["float4_e2m1", "int4", "nf4", "fp4_bnb"])
def test_every_pair_of_four_bits(name: str) -> None:
    codes = torch.arange(256).to(torch.uint8).view(1, 2, 128)
    q = Quantised(replace(NF4, dtype=name), codes, torch.rand(1, 2, 4))  # type: ignore[arg-type]
    for dtype in DTYPES[:3]:
        assert same(fast.matrix(q, 0, dtype), dequantise(q[0], dtype))


def test_plain_weights_are_cast() -> None:
    w = torch.randn(2, 3, 4)
    assert torch.equal(fast.matrix(w, 1, torch.bfloat16), w[1].to(torch.bfloat16))


def test_a_table_with_an_error_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    own = fast._pairs
    monkeypatch.setattr(fast, "_pairs", lambda *a: own(*a).flip(0))
    q = made(NF4, 64, 128)
    assert not same(fast.matrix(q, 0, torch.bfloat16), dequantise(q[0], torch.bfloat16))
