"""Element formats, packed bytes and scales against values written by hand; and defects, planted, that these tests and
``number_formats`` see."""

from __future__ import annotations

from collections.abc import Callable
from statistics import NormalDist

import numpy as np
import pytest
import torch
from torch import Tensor

from moe_fx.quant import (
    BITS_OF,
    FP4_BNB,
    FP8_CHANNEL,
    INT8_CHANNEL,
    MAX_OF,
    MXFP4,
    MXFP6_E2M3,
    MXFP8,
    NF4,
    NVFP4,
    GroupShape,
    QuantKey,
    int_group,
)
from moe_fx.reference import formats
from moe_fx.reference import quantise as module
from moe_fx.reference.formats import CODEBOOKS, FLOATS, decode, encode, pack, power_of_two, unpack
from moe_fx.reference.quantise import Scales, dequantise, quantise

from .number_formats import BOOKS, TABLES, by_hand, codes_of

DOUBLE = torch.float64
SMALL = [name for name in FLOATS if BITS_OF[name] < 8]


@pytest.mark.parametrize("name", FLOATS)
def test_numbers_are_those_of_the_standard(name: str) -> None:
    assert list(FLOATS[name]) == TABLES[name]
    assert FLOATS[name][-1] == MAX_OF[name]


@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", FLOATS)
def test_every_code_comes_back(name: str, dtype: torch.dtype) -> None:
    codes = torch.arange(2 ** BITS_OF[name], dtype=torch.uint8)
    typed = codes.view(torch.float8_e4m3fn) if name == "float8_e4m3fn" else codes
    numbers = decode(typed, name, dtype)
    half = len(codes) // 2
    expected = torch.tensor(TABLES[name], dtype=dtype)
    assert torch.equal(numbers[: len(expected)], expected)
    assert torch.equal(numbers[half : half + len(expected)], -expected)
    again = encode(numbers, name).view(torch.uint8)
    kept = ~numbers.isnan()  # the sign of a NaN is not kept
    assert torch.equal(again[kept], codes[kept])
    assert decode(encode(numbers, name), name, dtype)[~kept].isnan().all()


def test_e4m3_is_rounded_once() -> None:
    """A little over the middle of 1 and 1.125: float32 would put it on the middle, and from there it goes to 1."""
    assert float(encode(torch.tensor(1.0625 + 2**-40, dtype=DOUBLE), "float8_e4m3fn")) == 1.125
    assert float(encode(torch.tensor(1.0625, dtype=DOUBLE), "float8_e4m3fn")) == 1.0


@pytest.mark.parametrize(
    "name, value, expected",
    [
        ("float4_e2m1", 0.25, 0.0),
        ("float4_e2m1", -0.75, -1.0),
        ("float4_e2m1", 1.25, 1.0),
        ("float4_e2m1", 1.75, 2.0),
        ("float4_e2m1", 2.5, 2.0),
        ("float4_e2m1", -3.5, -4.0),
        ("float4_e2m1", 5.0, 4.0),
        ("float4_e2m1", 5.01, 6.0),
        ("float4_e2m1", -100.0, -6.0),
        ("float6_e3m2", 26.0, 24.0),
        ("float6_e3m2", 1e9, 28.0),
        ("float6_e3m2", 0.03125, 0.0),
        ("float6_e2m3", 7.25, 7.0),
        ("float6_e2m3", 1.9375, 2.0),
        ("float8_e4m3fn", 400.0, 384.0),
        ("float8_e4m3fn", 470.0, 448.0),
        ("float8_e4m3fn", torch.inf, 448.0),
        ("float8_e4m3fn", 2**-10, 0.0),
        ("float8_e4m3fn", 1.5 * 2**-9, 2**-8),
    ],
)
def test_rounding_and_saturation(name: str, value: float, expected: float) -> None:
    assert float(decode(encode(torch.tensor(value, dtype=DOUBLE), name), name, DOUBLE)) == expected


# --- codebooks


@pytest.mark.parametrize("name", BOOKS)
def test_numbers_are_those_of_the_source(name: str) -> None:
    assert set(CODEBOOKS) == set(BOOKS)
    assert decode(torch.arange(16, dtype=torch.uint8), name, DOUBLE).tolist() == BOOKS[name]
    assert max(map(abs, BOOKS[name])) == MAX_OF[name]


def test_nf4_is_made_of_quantiles() -> None:
    """From the middle of a normal distribution to the outermost quantile seven steps down and eight up, scaled to 1."""
    outermost = 1 - (1 / 32 + 1 / 30) / 2
    made = [[NormalDist().inv_cdf(0.5 + (outermost - 0.5) * i / n) for i in range(n + 1)] for n in (7, 8)]
    below, above = ([q / side[-1] for q in side] for side in made)
    expected = [*(-q for q in below[:0:-1]), *above]
    np.testing.assert_allclose(decode(torch.arange(16, dtype=torch.uint8), "nf4", DOUBLE), expected, atol=1e-6)


@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", BOOKS)
def test_every_code_of_a_book_comes_back(name: str, dtype: torch.dtype) -> None:
    """But the second zero of fp4_bnb."""
    codes = torch.arange(16, dtype=torch.uint8)
    numbers = decode(codes, name, dtype)
    assert numbers.dtype == dtype
    assert torch.equal(numbers, torch.tensor(BOOKS[name], dtype=dtype))
    expected = [0 if (name, c) == ("fp4_bnb", 8) else c for c in range(16)]
    assert encode(numbers, name).tolist() == expected


@pytest.mark.parametrize("name", BOOKS)
def test_codes_of_a_book_are_the_nearest(name: str) -> None:
    """By trying all, on a dense grid that goes beyond both ends; of two as near, in the middles, the even code."""
    grid = np.concatenate([np.linspace(-1.25, 1.25, 40_001), 10 * np.linspace(-1.0, 1.0, 21)])
    book = np.array(BOOKS[name])
    codes = encode(torch.from_numpy(grid), name)
    assert codes.dtype == torch.uint8
    np.testing.assert_array_equal(abs(grid - book[codes]), abs(grid[:, None] - book).min(-1))
    ends = np.unique(book)
    middles = (ends[1:] + ends[:-1]) / 2  # exact: the numbers are float32
    for at, low, high in zip(middles, ends, ends[1:], strict=False):
        between = encode(torch.tensor([np.nextafter(at, -2), at, np.nextafter(at, 2)]), name)
        pair = [BOOKS[name].index(low), BOOKS[name].index(high)]
        assert between.tolist() == [pair[0], next(c for c in pair if c % 2 == 0), pair[1]]


@pytest.mark.parametrize("name", BOOKS)
def test_no_numbers_and_zeros_in_a_book(name: str) -> None:
    zero = {"nf4": 7, "fp4_bnb": 0}[name]
    codes = encode(torch.tensor([torch.nan, -0.0, 0.0, torch.inf, -torch.inf]), name)
    assert codes.tolist() == [zero] * 3 + [BOOKS[name].index(1), BOOKS[name].index(-1)]


def test_books_are_scaled_by_the_largest() -> None:
    """Codes and bytes by hand: -½ and ½ are nearest to 2 and 12 in nf4, are 13 and 5 in fp4_bnb; the first is high."""
    w = torch.tensor([[3.0, -1.5, 1.5, 0.0]])
    for key, expected in ((NF4, [0xF2, 0xC7]), (FP4_BNB, [0x3D, 0x50])):
        q = quantise(w, key)
        assert q.scale.tolist() == [[3.0]]
        assert q.codes.tolist() == [expected]


# --- packing


def test_bytes_by_hand() -> None:
    assert pack(torch.tensor([1, 2, 15, 0], dtype=torch.uint8), "int4").tolist() == [0x21, 0x0F]
    for name in BOOKS:
        assert pack(torch.tensor([1, 2, 15, 0], dtype=torch.uint8), name).tolist() == [0x12, 0xF0]
    six = torch.tensor([0b000001, 0b100010, 0b111100, 0b101101], dtype=torch.uint8)
    assert pack(six, "float6_e3m2").tolist() == [0b10_000001, 0b1100_1000, 0b101101_11]


@pytest.mark.parametrize("shape", [(4,), (3, 8), (2, 3, 12), (0, 8), (2, 0, 4)], ids=str)
@pytest.mark.parametrize("name", BITS_OF)
def test_unpack_inverts_pack(name: str, shape: tuple[int, ...]) -> None:
    codes = torch.randint(0, 2 ** BITS_OF[name], shape, generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    packed = pack(codes, name)
    assert packed.shape == (*shape[:-1], shape[-1] * BITS_OF[name] // 8)
    assert torch.equal(unpack(packed, name), codes)


# --- scales


@pytest.mark.parametrize(
    "largest, limit, code",
    [
        (1.0, 6.0, 125),
        (4.0, 6.0, 127),
        (6.0, 6.0, 127),
        (7.999, 6.0, 127),  # saturates
        (8.0, 6.0, 128),
        (448.0, 448.0, 127),
        (511.0, 448.0, 127),
        (512.0, 448.0, 128),
        (28.0, 28.0, 127),
        (7.5, 7.5, 127),
        (0.0, 6.0, 127),
        (3e38, 448.0, 246),
        (1e300, 6.0, 254),
        (2.0**-125, 6.0, 0),
        (2.0**-124, 6.0, 1),
        (1e-320, 6.0, 0),
        (torch.nan, 6.0, 255),
        (torch.inf, 6.0, 255),
    ],
)
def test_e8m0_scales_by_hand(largest: float, limit: float, code: int) -> None:
    scale = power_of_two(torch.tensor([largest], dtype=DOUBLE), limit)
    assert scale.view(torch.uint8).tolist() == [code]
    if code != 255:
        assert float(scale.double()) == 2.0 ** (code - 127)
    else:
        assert scale.isnan().all()


@pytest.mark.parametrize(
    "largest, expected",
    [
        (6.0, 1.0),
        (6 * 1.0625, 1.0),  # a half goes to the even one
        (6 * 1.1875, 1.25),
        (6 * 1.07, 1.125),
        (6 * 450.0, 448.0),
        (6 * 1e6, 448.0),
        (6 * 2.0**-6, 2.0**-6),
        (6 * 2.0**-9, 2.0**-9),
        (6 * 2.0**-12, 2.0**-9),  # not 0
        (0.0, 1.0),
    ],
)
def test_e4m3_scales_by_hand(largest: float, expected: float) -> None:
    w = torch.tensor([[largest, 0.0]], dtype=DOUBLE)
    assert float(quantise(w, NVFP4, torch.tensor(1.0)).scale) == expected


def test_global_scale_by_hand() -> None:
    q = quantise(torch.tensor([[2688.0, 0.0], [-5376.0, 1.0]], dtype=DOUBLE), NVFP4)
    assert float(q.global_scale) == 2.0
    assert q.scale.double().tolist() == [[224.0], [448.0]]


def test_zero_points_by_hand() -> None:
    """-1 … 2 in 16 codes: steps of 0.2, 0 is code 5; a group of positive numbers starts at 0."""
    q = quantise(torch.tensor([[-1.0, 0.0, 0.31, 2.0], [3.0, 1.0, 0.0, 1.45]]), int_group(4, -1, True, "float32"))
    assert codes_of(q).tolist() == [[0, 5, 7, 15], [15, 5, 0, 7]]
    assert q.zero.tolist() == [[5], [0]]
    np.testing.assert_allclose(q.scale, [[0.2], [0.2]], rtol=1e-7)
    q = quantise(torch.tensor([[-1.0, 0.0, 0.31, 1.55]]), int_group(8, -1, True, "float32"))
    assert codes_of(q).tolist() == [[-128, -28, 3, 127]]
    assert q.zero.tolist() == [[-28]]


# --- defects


def _up_the_book(values: Tensor, name: str) -> Tensor:
    return formats.encode(values + 0.02, name)


def _in_ascending_order(codes: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    return torch.tensor(sorted(BOOKS[name]), dtype=dtype)[codes.long()]


def _toward_zero(values: Tensor, name: str) -> Tensor:
    numbers = torch.tensor(FLOATS[name], dtype=DOUBLE)
    codes = (torch.searchsorted(numbers, values.abs().contiguous(), right=True) - 1).clamp(min=0)
    codes = (codes + torch.signbit(values) * 2 ** (BITS_OF[name] - 1)).to(torch.uint8)
    return codes.view(torch.float8_e4m3fn) if name == "float8_e4m3fn" else codes


def _half_away(values: Tensor, name: str) -> Tensor:
    return formats.encode(values * (1 + 1e-12), name)


def _no_sign_of_zero(values: Tensor, name: str) -> Tensor:
    return formats.encode(values.where(values != 0, 0.0), name)


def _swapped(codes: Tensor, name: str) -> Tensor:
    packed = formats.pack(codes, name)
    return (packed >> 4) | (packed << 4) if BITS_OF[name] == 4 else packed


def _unswapped(packed: Tensor, name: str) -> Tensor:
    return formats.unpack((packed >> 4) | (packed << 4) if BITS_OF[name] == 4 else packed, name)


def _big_end_first(codes: Tensor, name: str) -> Tensor:
    packed = formats.pack(codes, name)
    return packed.unflatten(-1, (-1, 3)).flip(-1).flatten(-2) if BITS_OF[name] == 6 else packed


def _one_more(largest: Tensor, limit: float) -> Tensor:
    return (formats.power_of_two(largest, limit).view(torch.uint8) + 1).view(torch.float8_e8m0fnu)


def _to_nearest_power(largest: Tensor, limit: float) -> Tensor:
    return formats.power_of_two(largest * 2**0.5, limit)


def _no_zero_point(key: QuantKey, *_: object) -> int:
    return 8 if key.dtype == "int4" else 0


def _wrong_axis(groups: Tensor, key: QuantKey, shape: torch.Size) -> Tensor:
    return SPREAD(groups, key, shape).mT


def _next_group(groups: Tensor, key: QuantKey, shape: torch.Size) -> Tensor:
    return SPREAD(groups.roll(1, -1), key, shape)


def _without_global_scale(codes: Tensor, key: QuantKey, scales: Scales, dtype: torch.dtype) -> Tensor:
    return DECODE(codes, key, scales._replace(global_scale=None), dtype)


SPREAD, DECODE = module._spread, module._decode
DEFECTS: list[tuple[dict[str, Callable[..., object]], QuantKey]] = [
    ({"encode": _toward_zero}, FP8_CHANNEL),
    ({"encode": _toward_zero}, MXFP4),
    ({"encode": _half_away}, MXFP6_E2M3),
    ({"encode": _no_sign_of_zero}, MXFP4),
    ({"pack": _swapped}, MXFP4),
    ({"pack": _swapped, "unpack": _unswapped}, int_group(4, 32)),
    ({"pack": _big_end_first}, MXFP6_E2M3),
    ({"power_of_two": _one_more}, MXFP8),
    ({"power_of_two": _to_nearest_power}, MXFP4),
    ({"_zeros": _no_zero_point}, int_group(4, 32, zero_points=True)),
    ({"_spread": _wrong_axis}, INT8_CHANNEL),
    ({"_spread": _next_group}, MXFP8),
    ({"_decode": _without_global_scale}, NVFP4),
    ({"_ends": lambda key: (-128, 126)}, INT8_CHANNEL),
    ({"encode": _up_the_book}, NF4),
    ({"decode": _in_ascending_order}, FP4_BNB),
    ({"pack": _swapped}, NF4),
    ({"pack": _swapped, "unpack": _unswapped}, FP4_BNB),
    ({"_spread": _next_group}, QuantKey("nf4", GroupShape(1, 32))),
]


def _as_by_hand(key: QuantKey) -> bool:
    """Quarters from -16 to 16, so that middles occur; both sizes 64, so that a wrong axis raises nothing."""
    draw = torch.Generator().manual_seed(0)
    w = torch.randint(-64, 65, (64, 64), generator=draw).double() / 4
    w *= 2.0 ** torch.randint(0, 4, (64, 64), generator=draw)
    w[0, 0] = -0.0
    q, expected = quantise(w, key), by_hand(w.numpy(), key)
    return (
        np.array_equal(q.scale.double(), expected.scale)
        and np.array_equal(codes_of(q), expected.codes)
        and np.allclose(dequantise(q, DOUBLE), expected.values, rtol=1e-12, atol=0)
    )


@pytest.mark.parametrize("number", range(len(DEFECTS)))
def test_a_defect_is_seen(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    planted, key = DEFECTS[number]
    assert _as_by_hand(key)
    for name, function in planted.items():
        monkeypatch.setattr(module, name, function)
    assert not _as_by_hand(key)
