"""Quantisation: what the codes and scales of a matrix are, and what they stand for.

Enters: a matrix [..., rows, cols], weights [out, in] or activations [tokens, in], and a ``QuantKey``.  Leaves: codes,
scales, zero points, a global scale (``Quantised``), or the numbers they stand for, by the formulas of ``quant``.

How the scale of a group comes from its largest magnitude a, MAX that of a code::

    float32, float16, bfloat16      a / MAX, rounded to float32, then to the dtype
    float8_e8m0fnu                  2**(floor(log2(a)) - floor(log2(MAX)))                      MX 1.0
    float8_e4m3fn, global scale G   a / G / MAX rounded to e4m3; G = largest of the matrix / (448 * MAX), float32
    with zero points                (high - low) / (codes - 1); low and high the ends of the group and of {0};
                                    zero = first code - low / scale, rounded

A scale that would be 0 or infinite is the smallest or largest of its dtype; the scale of a group of zeros is 1.  A
group with a NaN or an infinity has a scale of NaN and stands for NaN as a whole (with a global scale that is not given:
the matrix).  Under a given scale an infinity saturates and a NaN is NaN in e4m3, else 0.
Codes are the nearest to value / scale: of two as near the even one (for integers: the even multiple of the scale),
beyond the ends the end.  All of it is computed in float64, so that one matrix has one meaning whatever its dtype.
A second ``quantise`` of what the first stands for, in float64, gives the same codes and scales for symmetric keys, but
for e4m3 scales below 2**-6, scales at the ends of their dtype's range, and groups whose codes are all 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_fx.binding import Matrices, Quantised
from moe_fx.quant import MAX_OF, ZERO_OF, GroupShape, QuantKey
from moe_fx.reference.formats import CODED, decode, encode, pack, power_of_two, unpack


class Scales(NamedTuple):
    """scale, zero: [..., *key.group.scales(rows, cols)].  global_scale: float32 [...]."""

    scale: Tensor
    zero: Tensor | None
    global_scale: Tensor | None


def quantise(
    matrix: Tensor, key: QuantKey, global_scale: Tensor | None = None, scale: Tensor | None = None
) -> Quantised:
    """matrix [..., rows, cols] → codes and scales; global_scale [...] is computed for each matrix unless given.

    The scales come from the values, of a static key too, unless ``scale`` gives those of one matrix, as to
    ``round_to``.  Rows and cols need not be multiples of the group: the last
    groups are smaller.  ValueError where a row of packed codes is no whole number of bytes.
    """
    if scale is None:
        scales = scales_of(matrix, key, global_scale)
    else:
        scales = Scales(_given(scale, key, matrix, global_scale), None, global_scale)
    codes = pack(_encode(matrix, key, scales), key.dtype)
    return Quantised(key, codes, scales.scale, scales.zero, scales.global_scale)


def dequantise(q: Quantised, dtype: torch.dtype) -> Tensor:
    """What the codes of one or of all experts stand for, [..., rows, cols].

    float64 is computed in float64, any other dtype in float32, from left to right as the formulas of ``quant`` stand,
    and rounded once.
    """
    if isinstance(q.codes, list):
        return torch.stack([dequantise(q[e], dtype) for e in range(len(q.codes))])
    assert isinstance(q.scale, Tensor)
    assert not isinstance(q.zero, list)
    assert not isinstance(q.global_scale, list)
    return _decode(unpack(q.codes, q.key.dtype), q.key, Scales(q.scale, q.zero, q.global_scale), dtype)


def round_to(x: Tensor, key: QuantKey, scale: Tensor | None = None, global_scale: Tensor | None = None) -> Tensor:
    """Activations x [tokens, in] quantised and back, in the dtype of x.

    scale: [*key.group.scales(tokens, in)] or one number, multiplied with codes, not its inverse; without one it comes
    from the values, or for a static key ValueError.  global_scale: one number, likewise.
    """
    if global_scale is not None:
        global_scale = global_scale.reshape(())
    if scale is None:
        if key.static:
            raise ValueError(f"the scale of {key} is static: give it")
        scales = scales_of(x, key, global_scale)
    else:
        scales = Scales(_given(scale, key, x, global_scale), None, global_scale)
    return _decode(_encode(x, key, scales), key, scales, x.dtype)


def _given(scale: Tensor, key: QuantKey, x: Tensor, global_scale: Tensor | None) -> Tensor:
    """A given scale in the shape of the groups of x; ValueError where it cannot be meant."""
    if key.zero_points:
        raise ValueError(
            f"{key} has zero points, for which a given scale is not enough: they must come from the values"
        )
    if key.global_scale and global_scale is None:
        raise ValueError(f"the scale given for {key} means nothing without its global scale")
    if scale.numel() == 1:
        scale = scale.reshape(1, 1)
    expected = key.group.scales(*x.shape)
    if x.numel() and scale.shape != expected:
        raise ValueError(f"activations {list(x.shape)} have scales {list(expected)} of {key}, not {list(scale.shape)}")
    return scale


def matrix(matrices: Matrices, e: int, dtype: torch.dtype) -> Tensor:
    """The matrix [out, in] or bias [out] of expert ``e`` in ``dtype``, plain or quantised; of no other expert."""
    found = matrices[e]
    return dequantise(found, dtype) if isinstance(found, Quantised) else found.to(dtype)


def scales_of(matrix: Tensor, key: QuantKey, global_scale: Tensor | None = None) -> Scales:
    """The scales that the values of a matrix [..., rows, cols] ask for; see the module's text."""
    if key.zero_points and key.dtype in CODED:
        raise ValueError(f"{key}: only integers have zero points")
    wide = matrix.to(torch.float64)
    if not key.zero_points:
        largest = _reduce(wide.abs(), key.group)
        if key.global_scale:
            if global_scale is None:
                whole = F.pad(largest, (0, 1, 0, 1)).amax((-2, -1))  # without a row there is nothing else to reduce
                global_scale = _scale(whole, MAX_OF["float8_e4m3fn"] * MAX_OF[key.dtype], "float32")
            largest = largest / global_scale.double()[..., None, None]
        return Scales(_scale(largest, MAX_OF[key.dtype], key.scale), None, global_scale)
    first, last = _ends(key)
    high, low = _reduce(wide, key.group), -_reduce(-wide, key.group)
    scale = _scale(high - low, last - first, key.scale)
    zero = first - (low / scale.double()).round().nan_to_num()
    return Scales(scale, zero.clamp(first, last).to(torch.uint8 if key.dtype in ZERO_OF else torch.int8), None)


def _reduce(x: Tensor, group: GroupShape) -> Tensor:
    """The largest of each group and of 0: [..., rows, cols] → [..., *group.scales(rows, cols)]."""
    rows, cols = x.shape[-2:]
    (row, col), (down, across) = group.extent(rows, cols), group.scales(rows, cols)
    row, col = max(row, 1), max(col, 1)
    x = F.pad(x, (0, across * col - cols, 0, down * row - rows))
    return x.reshape(*x.shape[:-2], down, row, across, col).amax((-3, -1)).clamp(min=0)


def _scale(largest: Tensor, limit: float, name: str) -> Tensor:
    """Scales of that dtype, so that ``largest`` (float64) becomes about ``limit``."""
    if name == "float8_e8m0fnu":
        return power_of_two(largest, limit)
    dtype = getattr(torch, name)
    info = torch.finfo(dtype)
    step = (largest / limit).clamp(info.smallest_normal * info.eps, info.max).masked_fill(largest == 0, 1)
    step = step.masked_fill(~largest.isfinite(), torch.nan)
    return encode(step, name) if name in CODED else step.to(torch.float32).to(dtype)


def _ends(key: QuantKey) -> tuple[int, int]:
    """First and last code of integers: without zero points as many on both sides of the one that means 0."""
    middle, reach = ZERO_OF.get(key.dtype, 0), int(MAX_OF[key.dtype])
    return middle - reach - (1 if key.zero_points else 0), middle + reach


def _encode(matrix: Tensor, key: QuantKey, scales: Scales) -> Tensor:
    """Codes [..., rows, cols], not packed."""
    scale = scales.scale.double()
    if scales.global_scale is not None:
        scale = scale * scales.global_scale.double()[..., None, None]
    steps = matrix.to(torch.float64) / _spread(scale, key, matrix.shape)
    if key.dtype in CODED:
        return encode(steps, key.dtype)
    codes = steps.round().nan_to_num() + _zeros(key, scales, matrix.shape, torch.float64)
    return codes.clamp(*_ends(key)).to(torch.uint8 if key.dtype in ZERO_OF else torch.int8)


def _decode(codes: Tensor, key: QuantKey, scales: Scales, dtype: torch.dtype) -> Tensor:
    """Codes [..., rows, cols], not packed → what they stand for."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    scale = scales.scale.to(wide)
    if scales.global_scale is not None:
        scale = scales.global_scale.to(wide)[..., None, None] * scale
    if key.dtype in CODED:
        numbers = decode(codes, key.dtype, wide)
    else:
        numbers = codes.to(wide) - _zeros(key, scales, codes.shape, wide)
    return (_spread(scale, key, codes.shape) * numbers).to(dtype)


def _zeros(key: QuantKey, scales: Scales, shape: torch.Size, dtype: torch.dtype) -> Tensor | int:
    """For each element the code that means 0."""
    return ZERO_OF.get(key.dtype, 0) if scales.zero is None else _spread(scales.zero.to(dtype), key, shape)


def _spread(groups: Tensor, key: QuantKey, shape: torch.Size) -> Tensor:
    """One value a group [..., *key.group.scales(rows, cols)] → one an element [..., rows, cols]."""
    rows, cols = shape[-2:]
    row, col = key.group.extent(rows, cols)
    groups = groups.repeat_interleave(row, -2)[..., :rows, :]
    return groups.repeat_interleave(col, -1)[..., :cols]
