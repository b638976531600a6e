"""Element formats: from a number to its code, from a code to its number, and codes packed into bytes.

A small float is one sign bit, ``exponent`` bits and ``mantissa`` bits, with subnormals and without infinities::

    value = 2**(field - bias) * (1 + fraction)      field > 0; bias = 2**(exponent - 1) - 1
    value = 2**(1 - bias) * fraction                field = 0

Only e4m3 has a NaN: all bits but the sign are set.  Sources: OCP Microscaling Formats (MX) 1.0, sections 5.3 and 6.3;
OCP 8-bit Floating Point (OFP8) 1.0 for e4m3.

Numbers are encoded from float64 in one step.  torch's own cast goes through float32, which rounds twice, and past the
largest number some versions of it give NaN.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moe_fx.quant import BITS_OF

PACKS = {4: (2, 1), 6: (4, 3)}  # bits of a code → (codes, bytes) of the smallest whole number of bytes
E8M0_BIAS, E8M0_NAN = 127, 255


def _magnitudes(exponent: int, mantissa: int) -> tuple[float, ...]:
    """The numbers of the codes 0, 1, 2, … without a sign, ascending; that many bits in the two fields."""
    bias, steps = 2 ** (exponent - 1) - 1, 2**mantissa
    found = []
    for code in range(2 ** (exponent + mantissa)):
        field, fraction = code >> mantissa, (code % steps) / steps
        found.append(math.ldexp(1 + fraction, field - bias) if field else math.ldexp(fraction, 1 - bias))
    return tuple(found)


# the numbers of the codes without a sign
FLOATS: dict[str, tuple[float, ...]] = {
    "float8_e4m3fn": _magnitudes(4, 3)[:-1],  # the last code is NaN
    "float4_e2m1": _magnitudes(2, 1),
    "float6_e3m2": _magnitudes(3, 2),
    "float6_e2m3": _magnitudes(2, 3),
}


def encode(values: Tensor, name: str) -> Tensor:
    """values, any shape → codes of the small float ``name``: float8_e4m3fn, or uint8 of which the lower bits are used.

    The nearest number, of two as near the one with an even code.  Beyond the largest: the largest, infinities too.
    The sign of a zero is kept.  NaN: NaN in e4m3, +0 in the formats without one.
    """
    wide = values.to(torch.float64)
    if name == "float8_e4m3fn":
        return _encode_e4m3(wide)
    numbers = torch.tensor(FLOATS[name], dtype=torch.float64, device=values.device)
    middles = (numbers[1:] + numbers[:-1]) / 2
    size = wide.abs().contiguous()
    below, above = torch.searchsorted(middles, size), torch.searchsorted(middles, size, right=True)
    codes = below.where(below % 2 == 0, above)  # they differ in the middle only
    codes = codes + torch.signbit(wide) * 2 ** (BITS_OF[name] - 1)
    return codes.masked_fill(wide.isnan(), 0).to(torch.uint8)


def _encode_e4m3(wide: Tensor) -> Tensor:
    """The same for the format of whole banks of weights, five times faster: in steps of each number's own binade."""
    _, exponent = torch.frexp(wide.nan_to_num(posinf=1.0, neginf=1.0))
    step = torch.ldexp(torch.ones_like(wide), (exponent - 1).clamp(min=-6) - 3)  # three bits, of -6 and below as of -6
    nearest = (wide / step).round() * step  # ties to even
    codes = nearest.clamp(-448, 448).to(torch.float32).to(torch.float8_e4m3fn)  # exact: it is one of the numbers
    return codes.view(torch.uint8).masked_fill(wide.isnan(), 127).view(torch.float8_e4m3fn)


def decode(codes: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    """Codes of ``encode``, not packed → their numbers in ``dtype``, exact in every float of 16 bits or more."""
    if name == "float8_e4m3fn":
        return codes.to(dtype)
    numbers = FLOATS[name]
    table = torch.tensor([*numbers, *(-n for n in numbers)], dtype=dtype, device=codes.device)
    return table[codes.long()]


def power_of_two(largest: Tensor, limit: float) -> Tensor:
    """Largest magnitudes → e8m0 scales: 2**(floor(log2(largest)) - floor(log2(limit))), MX 1.0 section 6.3.

    limit: MAX_OF the elements.  The elements can exceed it, by less than a factor of two, and saturate.  The exponent
    is kept within -127 … 127.  0 → 1; NaN and infinity → NaN.  Codes are exponent + 127; 255 is NaN.
    """
    wide = largest.to(torch.float64)
    exponent = torch.frexp(wide).exponent - math.frexp(limit)[1]
    codes = exponent.clamp(-E8M0_BIAS, E8M0_BIAS).masked_fill(wide == 0, 0) + E8M0_BIAS
    return codes.masked_fill(~wide.isfinite(), E8M0_NAN).to(torch.uint8).view(torch.float8_e8m0fnu)


def pack(codes: Tensor, name: str) -> Tensor:
    """uint8 codes [..., n] of fewer than eight bits → bytes [..., n * bits / 8], the first code in the lowest bits.

    Codes of eight bits come back as they are.  ValueError where n codes are no whole number of bytes.
    """
    bits = BITS_OF[name]
    if bits == 8:
        return codes
    count, size = PACKS[bits]
    if codes.shape[-1] % count:
        raise ValueError(
            f"the last size of {name} codes must be a multiple of {count} to fill bytes; {codes.shape[-1]} is not"
        )
    shifts = torch.arange(0, count * bits, bits, dtype=torch.int32, device=codes.device)
    words = (codes.unflatten(-1, (-1, count)).int() << shifts).sum(-1, keepdim=True, dtype=torch.int32)
    places = torch.arange(0, size * 8, 8, dtype=torch.int32, device=codes.device)
    return ((words >> places) & 255).to(torch.uint8).flatten(-2)


def unpack(packed: Tensor, name: str) -> Tensor:
    """The inverse of ``pack``: bytes [..., n * bits / 8] → codes [..., n]."""
    bits = BITS_OF[name]
    if bits == 8:
        return packed
    count, size = PACKS[bits]
    places = torch.arange(0, size * 8, 8, dtype=torch.int32, device=packed.device)
    words = (packed.unflatten(-1, (-1, size)).int() << places).sum(-1, keepdim=True, dtype=torch.int32)
    shifts = torch.arange(0, count * bits, bits, dtype=torch.int32, device=packed.device)
    return ((words >> shifts) & (2**bits - 1)).to(torch.uint8).flatten(-2)
