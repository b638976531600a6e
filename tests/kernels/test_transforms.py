"""Every registered transform against its rule, element by element, and against its own inverse.

The cases walk the registry; the rules, plain loops, are in transform_rules.py.
"""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from moe_fx.kernels.layouts.transforms import (
    TRANSFORMS,
    AiterLanes,
    AiterScales,
    AiterShuffle,
    BlockMajorK,
    Cast,
    Clamp,
    ColumnMajor,
    DeinterleaveRows,
    ExpandRows,
    Flatten,
    FlipBits,
    InterleaveRows,
    MarlinBias,
    MarlinByteScales,
    MarlinExponent,
    MarlinS0E5M3,
    MarlinScales,
    MarlinWeights,
    PackE8M0,
    PackNibbles,
    Pad,
    RequantiseCodes,
    RequantiseScales,
    ShuffleMatrixA,
    SwapHalves,
    Swizzle128x4,
    Transform,
    Transpose,
    Vnni,
    VnniInt8,
    VnniNibbles,
    WholeBlocks,
    find_transform,
    requantise,
    span,
    transform,
)

from .transform_rules import RULES, VALUES, e4m3_step, places, raw, slow_requantise

F8, E8, U8, I8 = torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.uint8, torch.int8
BF16, F16, F32, I32 = torch.bfloat16, torch.float16, torch.float32, torch.int32


def noise(dtype: torch.dtype, *shape: int) -> Tensor:
    """Random bits, all bytes of them different enough to tell elements apart; scales and floats are finite."""
    seed = torch.Generator().manual_seed(sum(shape) + dtype.itemsize)
    if dtype in (F32, F16):
        return torch.randn(shape, generator=seed).to(dtype)
    if dtype == F8:  # no sign, no NaN
        return torch.randint(0, 0x7E, shape, dtype=U8, generator=seed).view(F8)
    raw = torch.randint(0, 256, (*shape[:-1], shape[-1] * dtype.itemsize), dtype=U8, generator=seed)
    return raw.view(dtype)


def fp8_scales(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 3 + 1e-3


Case = tuple[Transform, Tensor, Tensor | None]
ALONE: list[tuple[Transform, torch.dtype, tuple[int, ...]]] = [
    *((SwapHalves(), d, s) for d, s in product((F8, U8, I8, BF16, F32), ((6, 5), (8,), (2, 3)))),
    *((InterleaveRows(), d, s) for d, s in product((F8, BF16, F32), ((8, 3), (10,)))),
    (InterleaveRows(first="up"), BF16, (12, 3)),
    (InterleaveRows(64, first="up"), U8, (256, 2)),
    (InterleaveRows(2, first="gate"), F8, (12, 2)),
    (DeinterleaveRows(), BF16, (8, 3)),
    (DeinterleaveRows(2), F32, (12,)),
    *((ShuffleMatrixA(t), d, s) for t, d, s in product((64, 128), (F8, BF16, U8, F32), ((64, 3), (32,)))),
    *((BlockMajorK(128), d, (5, 256)) for d in (F8, BF16, U8)),
    (BlockMajorK(64), F32, (3, 32)),
    *((Swizzle128x4(), d, s) for d, s in product((F8, E8, U8), ((128, 4), (130, 5), (256, 12), (7, 3)))),
    *((Pad(rows=16, cols=8), d, s) for d, s in product((F8, U8, BF16, F32), ((24, 12), (16, 8), (3, 1)))),
    (Pad(rows=16, halves=2), BF16, (40, 3)),
    (Pad(rows=16, halves=2, fill=0x88), U8, (40, 3)),
    (Pad(rows=8, cols=4, halves=2, fill=127), E8, (6, 3)),
    (Pad(rows=32, halves=2), F32, (10,)),
    (Pad(rows=128, halves=2, small=(192, 64)), F8, (2 * 70, 2)),
    (Pad(rows=128, halves=2, small=(192, 64)), F8, (2 * 192, 1)),
    (Pad(cols=128, small=(192, 64)), BF16, (2, 193)),
    (ColumnMajor(), F8, (5, 3)),
    (ColumnMajor(16), F32, (5, 3)),
    (ColumnMajor(16), I32, (8, 2)),
    *((Transpose(), d, (5, 3)) for d in (F8, U8, I8, BF16, F32)),
    (Flatten(), F32, (4, 3)),
    (MarlinScales(), BF16, (128, 3)),
    (MarlinScales(), BF16, (64, 1)),
    (MarlinScales(8), F32, (64, 3)),
    (MarlinBias(), BF16, (96,)),
    (MarlinByteScales(), E8, (3, 16)),
    *((AiterShuffle(), d, (32, 64)) for d in (F8, BF16, U8, F32)),
    *((AiterLanes(halves), d, (64, 128)) for halves, d in product((1, 2), (F8, U8))),
    *((AiterScales(halves), E8, (64, 16)) for halves in (1, 2)),
    *((Vnni(g, r), d, (64, 16)) for g, r, d in ((2, 32, BF16), (2, 32, F8), (4, 32, I8), (1, 16, BF16), (2, 16, BF16))),
    *((FlipBits(m), d, (4, 6)) for m, d in ((0x80, I8), (0x88, U8))),
    *((Cast(d), s, (4, 6)) for d, s in (("bfloat16", F32), ("float16", F32), ("float32", BF16), ("float32", F16))),
    (Clamp(0.5), F32, (4, 6)),
    (MarlinExponent("float16"), F16, (4, 6)),
    (MarlinS0E5M3(), F8, (8, 40)),
    (MarlinS0E5M3(0.5), F8, (8, 40)),
    *((PackE8M0(), d, s) for d, s in product((E8, U8), ((6, 8), (3, 5)))),
    *((MarlinWeights(4, a), U8, (64, 32)) for a in (16, 8)),
    *((MarlinWeights(8, a), d, (128, 64)) for a, d in product((16, 8), (U8, I8, F8))),
    (VnniInt8(), I8, (64, 12)),
    (VnniNibbles(), U8, (64, 6)),
]
OTHERS: list[Case] = [
    (MarlinExponent(), noise(F32, 4, 6).to(BF16), None),
    (PackE8M0(), torch.tensor([[2.0**-126, 1.0, 0.5], [2.0**127, 4.0, 0.0]]), None),
    *((PackNibbles(w), noise(U8, 3, 16) & 15, None) for w in ("uint8", "int32")),
    (ExpandRows(4), noise(F32, 3, 2), noise(F8, 10, 1)),
    (ExpandRows(-1), noise(F32, 1, 1), noise(F8, 10, 1)),
    (WholeBlocks(4), noise(F32, 4, 2), noise(F8, 16, 1)),
    (RequantiseCodes(4), noise(F8, 10, 6), fp8_scales(3, 2)),
    (RequantiseScales(4), fp8_scales(3, 2), noise(F8, 10, 6)),
]
CASES: list[Case] = [*((step, noise(dtype, *shape), None) for step, dtype, shape in ALONE), *OTHERS]


def name_of(value: object) -> str:
    return str(list(value.shape)) + str(value.dtype) if isinstance(value, Tensor) else str(value)


every_case = pytest.mark.parametrize("step, tensor, partner", CASES, ids=name_of)


def test_every_transform_has_a_case_and_a_rule() -> None:
    assert {step.name for step, _, _ in CASES} == set(TRANSFORMS)
    assert set(RULES) | set(VALUES) | {"requantise_codes", "requantise_scales"} == set(TRANSFORMS)


@every_case
def test_it_is_what_the_rule_says(step: Transform, tensor: Tensor, partner: Tensor | None) -> None:
    packed = step.pack(tensor, partner)
    if step.name in RULES:
        size, source = tensor.element_size(), raw(tensor)
        flat = {at: source[n * size : (n + 1) * size] for n, at in enumerate(places(tensor))}
        want = b""
        for at in places(packed):
            place = RULES[step.name](step, tensor, at)
            want += bytes([place] * size) if isinstance(place, int) else flat[place]
        assert raw(packed) == want
    elif step.name in VALUES:
        assert raw(packed) == VALUES[step.name](step, tensor)
    elif step.name == "requantise_codes":
        assert partner is not None
        assert list(raw(packed)) == slow_requantise(tensor, partner, step.block)[0]
    else:
        assert partner is not None
        assert packed.flatten().tolist() == slow_requantise(partner, tensor, step.block)[1]


@every_case
def test_unpack_brings_back_all_but_the_stated_loss(step: Transform, tensor: Tensor, partner: Tensor | None) -> None:
    before = tensor.clone()
    back = step.unpack(step.pack(tensor, partner), tensor.to("meta"))
    assert raw(tensor) == raw(before), "packing wrote into its input"
    assert (back.shape, back.dtype) == (tensor.shape, tensor.dtype)
    assert (raw(back) == raw(tensor)) == (step.loss == ""), step.loss or "not bitwise, and no loss is stated"


@every_case
def test_meta_tensors_tell_what_comes_out(step: Transform, tensor: Tensor, partner: Tensor | None) -> None:
    packed = step.pack(tensor, partner)
    meta = step.pack(tensor.to("meta"), None if partner is None else partner.to("meta"))
    assert meta.is_meta
    assert (meta.shape, meta.dtype) == (packed.shape, packed.dtype)
    assert meta.is_contiguous() == packed.is_contiguous() and span(meta) == span(packed)


@pytest.mark.parametrize("step, tensor, partner", [c for c in CASES if c[1].dim() == 2], ids=name_of)
def test_views_pack_like_copies(step: Transform, tensor: Tensor, partner: Tensor | None) -> None:
    """A model's matrix may be stored [in, out]."""
    turned = tensor.mT.contiguous().mT
    assert raw(step.pack(turned, partner)) == raw(step.pack(tensor, partner))


@pytest.mark.parametrize("first", ["gate", "up"])
def test_up_first_is_swap_then_interleave(first: str) -> None:
    rows = noise(BF16, 24, 3)
    both = InterleaveRows().pack(SwapHalves().pack(rows) if first == "up" else rows)
    assert raw(InterleaveRows(first=first).pack(rows)) == raw(both)


def test_both_halves_are_padded_by_themselves() -> None:
    gate, up = torch.ones(3, 2), torch.full((3, 2), 2.0)
    packed = Pad(rows=4, cols=3, halves=2).pack(torch.cat([gate, up]))
    assert packed[:, 0].tolist() == [1, 1, 1, 0, 2, 2, 2, 0]
    assert packed[0].tolist() == [1, 1, 0]


def test_padding_of_scales_can_be_one() -> None:
    packed = Pad(rows=4, fill=127).pack(torch.tensor([[2.0]]).to(E8))
    assert packed.float().flatten().tolist() == [2, 1, 1, 1]


def test_nothing_is_copied_where_nothing_is_padded() -> None:
    tensor = torch.ones(8, 4)
    assert Pad(rows=4, cols=4, halves=2).pack(tensor) is tensor


def test_columns_start_at_aligned_addresses_and_holes_are_zero() -> None:
    packed = ColumnMajor(16).pack(torch.ones(5, 3))
    assert packed.stride() == (1, 8)
    assert packed.as_strided((24,), (1,)).view(3, 8)[:, 5:].eq(0).all()


@pytest.mark.parametrize("seed", range(4))
def test_requantised_values_keep_their_size(seed: int) -> None:
    """Error at most half a step of e4m3 under the new scale; scales are powers of two that no code overflows."""
    torch.manual_seed(seed)
    codes = torch.randn(70, 50).mul(60).clamp(-448, 448).to(F8)
    scale = torch.rand(5, 4) * 10.0 ** (seed - 3) + 1e-6
    new_codes, new = requantise(codes, scale, 16)
    assert raw(PackE8M0().unpack(PackE8M0().pack(new), new)) == raw(new), "not powers of two"
    wide = [s.repeat_interleave(16, 0)[:70].repeat_interleave(16, 1)[:, :50] for s in (scale, new)]
    before, after = codes.float() * wide[0], new_codes.float() * wide[1]
    bound = torch.tensor([e4m3_step(v) for v in (before / wide[1]).flatten().tolist()]).view(70, 50) * wide[1] / 2
    assert ((before - after).abs() <= bound).all()
    assert (before != after).any()


def test_requantising_again_changes_no_value() -> None:
    """A largest code of 224 is kept as 448 under half of the scale, once."""
    codes = torch.tensor([[225.0, 3.0], [-1.0, 0.013]]).to(F8)
    once = requantise(codes, torch.tensor([[1.01]]), 2)
    twice = requantise(*once, 2)
    assert once[0].float().max() == 224 and twice[0].float().max() == 448
    assert twice[1].item() == once[1].item() / 2
    assert torch.equal(once[0].float() * once[1], twice[0].float() * twice[1])
    thrice = requantise(*twice, 2)
    assert raw(thrice[0]) == raw(twice[0]) and raw(thrice[1]) == raw(twice[1])


def test_dead_blocks_have_a_scale() -> None:
    codes, scale = requantise(torch.zeros(4, 4).to(F8), torch.zeros(1, 1), 4)
    assert not codes.float().any() and scale.item() == 2.0**-22  # 1e-4 / 448, up


def test_the_factor_of_nvfp4_scales_uses_the_range() -> None:
    experts = [torch.tensor([48.0, 0.0]).to(F8), torch.tensor([2.0**-9, 1.0]).to(F8)]
    fitted = MarlinS0E5M3().fit(experts)
    assert fitted.factor == 8.0  # 48 * 8 ≤ 448 < 48 * 16
    for scales in experts:
        assert raw(fitted.unpack(fitted.pack(scales), scales)) == raw(scales)
    assert raw(MarlinS0E5M3().pack(experts[1])) == bytes([0, 0xB0])  # 2^7: exponent 22 of bias 15, mantissa 0
    assert MarlinS0E5M3().fit([torch.zeros(3).to(F8)]).factor == 1.0


def test_the_factor_of_nvfp4_scales_lets_none_overflow() -> None:
    experts = [torch.tensor([448.0]).to(F8), torch.tensor([2.0**-9]).to(F8)]
    fitted = MarlinS0E5M3().fit(experts)
    assert fitted.factor == 1.0
    assert fitted.unpack(fitted.pack(experts[0]), experts[0]).item() == 448
    with pytest.raises(ValueError, match="takes scales from 0 to 255"):
        MarlinS0E5M3(2.0).pack(experts[0])


@pytest.mark.parametrize(
    "step, tensor, partner, message",
    [
        (SwapHalves(), noise(F32, 3, 2), None, "rows in multiples of 2"),
        (ShuffleMatrixA(), noise(F32, 16, 2), None, "rows in multiples of 32.*pad first"),
        (BlockMajorK(), noise(BF16, 4, 32), None, "cols in multiples of 64"),
        (MarlinWeights(), noise(U8, 64, 4), None, "cols in multiples of 8"),
        (MarlinWeights(8), noise(F8, 32, 16), None, "rows in multiples of 64"),
        (MarlinScales(), noise(BF16, 32, 2), None, "cols in multiples of 64"),
        (AiterShuffle(), noise(BF16, 16, 16), None, "cols in multiples of 32"),
        (AiterScales(), noise(E8, 16, 8), None, "rows in multiples of 32"),
        (Vnni(), noise(BF16, 16, 4), None, "rows in multiples of 32"),
        (FlipBits(), noise(F8, 2, 2), None, "takes torch.int8"),
        (PackNibbles(), noise(U8, 2, 2) | 16, None, "some are over 15"),
        (PackE8M0(), torch.tensor([[3.0]]), None, "requantise first"),
        (PackE8M0(), torch.tensor([[-2.0]]), None, "requantise first"),
        (MarlinExponent(), torch.tensor([256.0]), None, "takes torch.bfloat16"),
        (MarlinExponent(), torch.tensor([256.0]).to(BF16), None, "over bfloat16's range"),
        (MarlinS0E5M3(), torch.tensor([-1.0]).to(F8), None, "takes scales from 0"),
        (MarlinS0E5M3(), torch.tensor([math.nan]).to(F8), None, "takes scales from 0"),
        (ExpandRows(), noise(F32, 1, 1), None, "give both"),
        (ExpandRows(4), noise(F32, 2, 1), noise(F8, 12, 1), "2 rows of scales for 12 rows"),
        (WholeBlocks(), noise(F32, 2, 1), noise(F8, 192, 1), "96 rows each share a block of 128"),
        (WholeBlocks(), noise(F32, 1, 1), noise(F8, 128, 1), "64 rows each share a block of 128"),
        (RequantiseCodes(), noise(F8, 2, 2), None, "give both"),
        (RequantiseCodes(), noise(BF16, 2, 2), noise(F32, 1, 1), "takes torch.float8_e4m3fn"),
    ],
    ids=name_of,
)
def test_what_cannot_be_packed_is_refused(
    step: Transform, tensor: Tensor, partner: Tensor | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        step.pack(tensor, partner)


def test_registry() -> None:
    with pytest.raises(KeyError, match="no transform 'no_such'; known: aiter_lanes, aiter_scales"):
        find_transform("no_such")
    with pytest.raises(ValueError, match="registered twice"):
        transform("pad")(Pad)
    assert find_transform("pad") is Pad and Pad().name == "pad"
