"""Codes, scales and what they stand for, against tables and loops written in ``number_formats``."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_fx.binding import Quantised
from moe_fx.quant import (
    FP8_CHANNEL,
    FP8_TENSOR,
    INT8_TENSOR,
    INT8_TOKEN,
    MAX_OF,
    MXFP4,
    NF4,
    NVFP4,
    NVFP4_DYNAMIC,
    QuantKey,
)
from moe_fx.reference.quantise import dequantise, matrix, quantise, round_to

from .number_formats import BOOKS, KEYS, TABLES, by_hand, codes_of, numbers, values_of

SHAPES = [(1, 4), (3, 40), (2, 64), (130, 160)]  # multiples of the groups and not; 128-blocks with a rest both ways
DOUBLE = torch.float64
SYMMETRIC = {name: key for name, key in KEYS.items() if not key.zero_points}


def sample(rows: int, cols: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Sizes over many orders of magnitude, zeros of both signs, and for more than one row a row of zeros."""
    draw = torch.Generator().manual_seed(seed + rows * cols)
    found = torch.randn(rows, cols, generator=draw) * torch.exp(1.5 * torch.randn(rows, cols, generator=draw))
    found[0, 0], found[-1, 1] = 0.0, -0.0
    if rows > 1:
        found[1] = 0
    return found.to(dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", KEYS)
def test_codes_and_scales_by_hand(name: str, shape: tuple[int, int]) -> None:
    key, w = KEYS[name], sample(*shape)
    q, expected = quantise(w, key), by_hand(w.double().numpy(), key)
    assert q.scale.dtype == getattr(torch, key.scale)
    assert tuple(q.scale.shape) == key.group.scales(*shape)
    np.testing.assert_array_equal(q.scale.double(), expected.scale)
    np.testing.assert_array_equal(codes_of(q), expected.codes)
    if key.zero_points:
        assert q.zero.dtype == (torch.uint8 if key.dtype == "int4" else torch.int8)
        np.testing.assert_array_equal(q.zero, expected.zero)
    else:
        assert q.zero is None
    assert (None if q.global_scale is None else float(q.global_scale)) == (
        expected.global_scale if key.global_scale else None
    )
    np.testing.assert_allclose(dequantise(q, DOUBLE), expected.values, rtol=1e-15)
    assert q.shape == w.shape
    size = sum(t.numel() * t.element_size() for t in (q.codes, q.scale, q.zero, q.global_scale) if t is not None)
    assert size == key.nbytes(*shape)


@pytest.mark.parametrize("name", KEYS)
def test_codes_are_the_nearest_of_all(name: str) -> None:
    """In exact fractions, over every code of the format; of two as near the even one."""
    key, w = KEYS[name], sample(3, 24, seed=7)
    q = quantise(w, key)
    codes, whole = codes_of(q), Fraction(1 if q.global_scale is None else float(q.global_scale))
    row, col = key.group.extent(3, 24)
    for (r, c), value in np.ndenumerate(w.double().numpy()):
        group = r // row, c // col
        table = numbers(key, 0 if q.zero is None else int(q.zero[group]))
        scale = whole * Fraction(float(q.scale[group].double()))
        away = {code: abs(Fraction(float(value)) - scale * Fraction(v)) for code, v in table.items()}
        least, code = min(away.values()), int(codes[r, c])
        near = {table[other] for other in away if away[other] == least}
        assert table[code] in near
        if len(near) == 2:
            assert code % 2 == 0 if key.dtype in TABLES | BOOKS else table[code] % 2 == 0


@pytest.mark.parametrize("name", KEYS)
def test_dtypes(name: str) -> None:
    """Codes do not depend on the dtype a value comes in; values are rounded once, from float64 or from float32."""
    key, w = KEYS[name], sample(3, 40, dtype=torch.bfloat16)
    q = quantise(w, key)
    for other in (w.float(), w.double()):
        again = quantise(other, key)
        assert torch.equal(again.codes.view(torch.uint8), q.codes.view(torch.uint8))
        assert torch.equal(again.scale.float(), q.scale.float())
    expected = values_of(q)
    np.testing.assert_array_equal(dequantise(q, DOUBLE), expected)
    single = dequantise(q, torch.float32)
    np.testing.assert_allclose(single, expected, rtol=2**-23 if key.global_scale else 2**-24, atol=0)
    assert torch.equal(dequantise(q, torch.bfloat16), single.bfloat16())
    assert torch.equal(dequantise(q, torch.float16), single.half())


@pytest.mark.parametrize("name", SYMMETRIC)
def test_a_second_time_changes_nothing(name: str) -> None:
    """What codes stand for has those codes and scales: symmetric keys, scales within the range of their dtype."""
    key = SYMMETRIC[name]
    w = torch.randn(130, 160, generator=torch.Generator().manual_seed(3), dtype=DOUBLE)
    q = quantise(w, key)
    again = quantise(dequantise(q, DOUBLE), key)
    assert torch.equal(again.scale.double(), q.scale.double())
    assert torch.equal(again.codes.view(torch.uint8), q.codes.view(torch.uint8))
    if key.global_scale:
        assert torch.equal(again.global_scale, q.global_scale)


@pytest.mark.parametrize("name", KEYS)
def test_experts_stacked_and_listed(name: str) -> None:
    """[E, out, in] is E matrices; ``matrix`` reads one of them, from a stack or from lists."""
    key, ws = KEYS[name], torch.stack([sample(6, 40, seed=s) for s in range(3)])
    stack, parts = quantise(ws, key), [quantise(w, key) for w in ws]
    listed = Quantised(key, *([getattr(p, field) for p in parts] for field in ("codes", "scale")))
    for field in ("zero", "global_scale"):
        if getattr(stack, field) is not None:
            listed = replace(listed, **{field: [getattr(p, field) for p in parts]})
    for e, part in enumerate(parts):
        expected = torch.from_numpy(values_of(part))
        assert torch.equal(dequantise(stack[e], DOUBLE), expected)
        assert torch.equal(dequantise(stack, DOUBLE)[e], expected)
        assert torch.equal(matrix(stack, e, DOUBLE), expected)
        assert torch.equal(matrix(listed, e, DOUBLE), expected)
        assert torch.equal(dequantise(listed, DOUBLE)[e], expected)


def test_matrix_of_plain_weights() -> None:
    ws = torch.randn(3, 4, 5)
    assert matrix(ws, 1, torch.float32).data_ptr() == ws[1].data_ptr()
    assert torch.equal(matrix(list(ws), 2, torch.bfloat16), ws[2].bfloat16())


# --- activations


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 7])
@pytest.mark.parametrize("name", [n for n, k in KEYS.items() if not k.static])
def test_round_to(name: str, tokens: int, dtype: torch.dtype) -> None:
    key, x = KEYS[name], sample(7, 41, dtype=dtype)[:tokens]  # 41: activations are never packed
    y = round_to(x, key)
    assert (y.dtype, y.shape) == (dtype, x.shape)
    if tokens:
        expected = by_hand(x.double().numpy(), key).values
        np.testing.assert_allclose(y.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=2**-25)


@pytest.mark.parametrize("key", [FP8_TENSOR, INT8_TENSOR], ids=str)
def test_round_to_a_given_scale(key: QuantKey) -> None:
    """Values beyond the largest code saturate."""
    x = sample(7, 41, dtype=DOUBLE)
    limit = 0.1 * float(x.abs().max()) / MAX_OF[key.dtype]
    expected = by_hand(x.numpy(), key, scale=limit).values
    for scale in (torch.tensor(limit, dtype=DOUBLE), torch.tensor([limit], dtype=DOUBLE)):
        np.testing.assert_allclose(round_to(x, key, scale), expected, rtol=1e-15)
    assert expected.max() == pytest.approx(0.1 * float(x.abs().max()))


def test_round_to_a_given_global_scale() -> None:
    x = sample(7, 41, dtype=DOUBLE)
    expected = by_hand(x.numpy(), NVFP4_DYNAMIC, global_scale=0.5).values
    np.testing.assert_array_equal(round_to(x, NVFP4_DYNAMIC, global_scale=torch.tensor([0.5])), expected)
    q = quantise(x[:, :40], NVFP4, torch.tensor(0.5))
    np.testing.assert_array_equal(values_of(q), by_hand(x[:, :40].numpy(), NVFP4, global_scale=0.5).values)


def test_wrong_requests_say_so() -> None:
    x = torch.randn(2, 32)
    with pytest.raises(ValueError, match="is static: give it"):
        round_to(x, FP8_TENSOR)
    with pytest.raises(ValueError, match="zero points"):
        round_to(x, replace(INT8_TOKEN, zero_points=True), torch.ones(2, 1))
    with pytest.raises(ValueError, match=r"have scales \[2, 1\] of .*, not \[1, 1\]"):
        round_to(x, INT8_TOKEN, torch.ones(1))
    with pytest.raises(ValueError, match="without its global scale"):
        round_to(x, NVFP4_DYNAMIC, torch.ones(2, 2))
    with pytest.raises(ValueError, match="only integers have zero points"):
        quantise(x, replace(FP8_CHANNEL, zero_points=True))
    with pytest.raises(ValueError, match="only integers have zero points"):
        quantise(x, replace(NF4, zero_points=True))
    with pytest.raises(ValueError, match="multiple of 2"):
        quantise(x[:, :31], MXFP4)
    with pytest.raises(ValueError, match="multiple of 4"):
        quantise(x[:, :30], KEYS["MXFP6_E2M3"])


# --- values that are no numbers, and the ends


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", KEYS)
def test_a_group_with_a_nan_or_an_infinity_is_nan(name: str, bad: float) -> None:
    """As a whole, and no other group; with a global scale that comes from the values, the matrix."""
    key, w = KEYS[name], sample(6, 40, dtype=DOUBLE)
    w[3, 33] = bad
    row, col = key.group.extent(6, 40)
    expected = torch.zeros(6, 40, dtype=torch.bool)
    expected[3 // row * row : (3 // row + 1) * row, 33 // col * col : (33 // col + 1) * col] = True
    if key.global_scale:
        own = quantise(w.nan_to_num(0, 0, 0), key).global_scale
        assert torch.equal(dequantise(quantise(w, key, own), DOUBLE).isnan(), expected)
        expected[:] = True
    assert torch.equal(dequantise(quantise(w, key), DOUBLE).isnan(), expected)


def test_under_a_given_scale() -> None:
    """Infinities saturate; a NaN is one in e4m3 and 0 in int8, which has none."""
    x = torch.tensor([[torch.inf, -torch.inf, torch.nan, -0.0]], dtype=DOUBLE)
    torch.testing.assert_close(
        round_to(x, FP8_TENSOR, torch.tensor(0.5)),
        torch.tensor([[224.0, -224.0, torch.nan, -0.0]], dtype=DOUBLE),
        equal_nan=True,
    )
    assert round_to(x, INT8_TENSOR, torch.tensor(0.5)).tolist() == [[63.5, -63.5, 0, 0]]


@pytest.mark.parametrize("name", [n for n, k in KEYS.items() if k.dtype in TABLES])
def test_zeros_keep_their_sign(name: str) -> None:
    w = torch.tensor([[0.0, -0.0, 1.0, -1e-9]], dtype=DOUBLE)
    assert torch.equal(torch.signbit(dequantise(quantise(w, KEYS[name]), DOUBLE)), torch.signbit(w))


@pytest.mark.parametrize("name", KEYS)
def test_groups_of_zeros_have_scale_one(name: str) -> None:
    q = quantise(torch.zeros(4, 40), KEYS[name])
    assert (q.scale.float() == 1).all()
    assert (dequantise(q, DOUBLE) == 0).all()


@pytest.mark.parametrize("size", [1e-320, 1e-42, 1e-30, 1e30, 3e38, 1e300])
@pytest.mark.parametrize("name", KEYS)
def test_numbers_at_the_ends_of_a_scale(name: str, size: float) -> None:
    """No scale is 0 or infinite, so nothing becomes NaN; what a scale can hold is held."""
    key, w = KEYS[name], torch.tensor([[1.0, -0.5, 0.25, 0.0]], dtype=DOUBLE) * size
    q = quantise(w, key)
    assert q.scale.double().isfinite().all() and (q.scale.double() > 0).all()
    found = dequantise(q, DOUBLE)
    assert found.isfinite().all()
    if key.scale == "float32" and key.bits == 8 and 1e-35 < size < 1e38:
        torch.testing.assert_close(found, w, rtol=0.02, atol=0.005 * size)


# --- the error of one element


@st.composite
def matrices(draw: st.DrawFn) -> np.ndarray:
    rows, quads = draw(st.integers(1, 4)), draw(st.integers(1, 12))
    floats = st.floats(-(2.0**100), 2.0**100, width=32) | st.floats(-8, 8, width=16)
    count = rows * quads * 4
    return np.array(draw(st.lists(floats, min_size=count, max_size=count)), dtype=float).reshape(rows, quads * 4)


@settings(max_examples=60, deadline=None)
@given(w=matrices(), name=st.sampled_from(sorted(KEYS)))
def test_error_is_at_most_half_a_step(w: np.ndarray, name: str) -> None:
    """Half the distance of the two numbers around a value; beyond the largest, what is missing to it."""
    key = KEYS[name]
    q = quantise(torch.from_numpy(w), key)
    found, whole = dequantise(q, DOUBLE).numpy(), 1.0 if q.global_scale is None else float(q.global_scale)
    row, col = key.group.extent(*w.shape)
    for (r, c), value in np.ndenumerate(w):
        group = r // row, c // col
        table = numbers(key, 0 if q.zero is None else int(q.zero[group]))
        ends = np.unique(list(table.values())) * float(q.scale[group].double()) * whole
        above = int(np.searchsorted(ends, value))
        inside = 0 < above < len(ends)
        allowed = (ends[above] - ends[above - 1]) / 2 if inside else min(abs(ends - value))
        assert abs(found[r, c] - value) <= allowed * (1 + 1e-12)


@settings(max_examples=60, deadline=None)
@given(w=matrices(), name=st.sampled_from(sorted(KEYS)))
def test_any_matrix_by_hand(w: np.ndarray, name: str) -> None:
    q, expected = quantise(torch.from_numpy(w), KEYS[name]), by_hand(w, KEYS[name])
    np.testing.assert_array_equal(q.scale.double(), expected.scale)
    np.testing.assert_array_equal(codes_of(q), expected.codes)
