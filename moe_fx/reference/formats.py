"""Element formats: from a number to its code, from a code to its number, and codes packed into bytes.

A small float is one sign bit, ``exponent`` bits and ``mantissa`` bits, with subnormals and without infinities::

    value = 2**(field - bias) * (1 + fraction)      field > 0; bias = 2**(exponent - 1) - 1
    value = 2**(1 - bias) * fraction                field = 0

Only e4m3 has a NaN: all bits but the sign are set.  Sources: OCP Microscaling Formats (MX) 1.0, sections 5.3 and 6.3;
OCP 8-bit Floating Point (OFP8) 1.0 for e4m3.

A codebook is a table: the code is a place in it.  nf4 has numbers that a normal distribution makes equally frequent
(QLoRA, arXiv 2305.14314, appendix E), fp4_bnb is bitsandbytes' own fp4: 0 and, of either sign, 1/16, 2, 3, 4, 6, 8 and
12 twelfths.

Numbers are encoded from float64 in one step.  torch's own cast goes through float32, which rounds twice, and past the
largest number some versions of it give NaN.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moe_fx.quant import BITS_OF

PACKS = {4: (2, 1), 6: (4, 3)}  # bits of a code → (codes, bytes) of the smallest whole number of bytes
HIGHEST_FIRST = frozenset({"nf4", "fp4_bnb"})  # the first code lies in the highest bits, as bitsandbytes packs
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

# the numbers of all codes, as float32 has them: so the library keeps its tables
_FP4_BNB = (0.0052083334885537624, 0.6666666865348816, 1.0, 0.3333333432674408, 0.5, 0.1666666716337204, 0.25)
CODEBOOKS: dict[str, tuple[float, ...]] = {
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    "fp4_bnb": (0.0, *_FP4_BNB, 0.0, *(-n for n in _FP4_BNB)),
}  # fmt: skip
CODED = FLOATS.keys() | CODEBOOKS.keys()  # what ``encode`` and ``decode`` know; the others are integers


def encode(values: Tensor, name: str) -> Tensor:
    """values, any shape → codes of the format ``name``: float8_e4m3fn, or uint8 of which the lower bits are used.

    The nearest number, of two as near the one with an even code (bitsandbytes 0.50.2: the lower number).  Beyond the
    largest: the largest, infinities too.  The sign of a zero is kept, but by codebooks, which have one zero, of two
    codes of it the lower.  NaN: NaN in e4m3, +0 in the formats without one.
    """
    wide = values.to(torch.float64)
    if name == "float8_e4m3fn":
        return _encode_e4m3(wide)
    if name in CODEBOOKS:
        book = CODEBOOKS[name]
        return _nearest(wide, {n: book.index(n) for n in sorted(book)}).masked_fill(wide.isnan(), book.index(0.0))
    codes = _nearest(wide.abs(), {n: code for code, n in enumerate(FLOATS[name])})
    codes = codes + torch.signbit(wide) * 2 ** (BITS_OF[name] - 1)
    return codes.masked_fill(wide.isnan(), 0).to(torch.uint8)


def _nearest(values: Tensor, code_of: dict[float, int]) -> Tensor:
    """float64 values → uint8 codes of the nearest of some ascending numbers; the parity of their codes alternates."""
    numbers = torch.tensor(list(code_of), dtype=torch.float64, device=values.device)
    codes = torch.tensor(list(code_of.values()), dtype=torch.uint8, device=values.device)
    middles, values = (numbers[1:] + numbers[:-1]) / 2, values.contiguous()
    below, above = (codes[torch.searchsorted(middles, values, right=right)] for right in (False, True))
    return below.where(below % 2 == 0, above)  # they differ in the middle only


def _encode_e4m3(wide: Tensor) -> Tensor:
    """The same for the format of whole banks of weights, five times faster: in steps of each number's own binade."""
    _, exponent = torch.frexp(wide.nan_to_num(posinf=1.0, neginf=1.0))
    step = torch.ldexp(torch.ones_like(wide), (exponent - 1).clamp(min=-6) - 3)  # three bits, of -6 and below as of -6
    nearest = (wide / step).round() * step  # ties to even
    codes = nearest.clamp(-448, 448).to(torch.float32).to(torch.float8_e4m3fn)  # exact: it is one of the numbers
    return codes.view(torch.uint8).masked_fill(wide.isnan(), 127).view(torch.float8_e4m3fn)


def decode(codes: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    """Codes, not packed → their numbers in ``dtype``, exact in floats of 16 bits or more, of codebooks 32 or more."""
    if name == "float8_e4m3fn":
        return codes.to(dtype)
    numbers = CODEBOOKS[name] if name in CODEBOOKS else (*FLOATS[name], *(-n for n in FLOATS[name]))
    return torch.tensor(numbers, dtype=dtype, device=codes.device)[codes.long()]


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
    """uint8 codes [..., n] of fewer than eight bits → bytes [..., n * bits / 8], the first code in the lowest bits, in
    the highest where HIGHEST_FIRST says so.

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
    shifts = _shifts(name, codes.device)
    words = (codes.unflatten(-1, (-1, count)).int() << shifts).sum(-1, keepdim=True, dtype=torch.int32)
    places = torch.arange(0, size * 8, 8, dtype=torch.int32, device=codes.device)
    return ((words >> places) & 255).to(torch.uint8).flatten(-2)


def unpack(packed: Tensor, name: str) -> Tensor:
    """The inverse of ``pack``: bytes [..., n * bits / 8] → codes [..., n]."""
    bits = BITS_OF[name]
    if bits == 8:
        return packed
    size = PACKS[bits][1]
    places = torch.arange(0, size * 8, 8, dtype=torch.int32, device=packed.device)
    words = (packed.unflatten(-1, (-1, size)).int() << places).sum(-1, keepdim=True, dtype=torch.int32)
    return ((words >> _shifts(name, packed.device)) & (2**bits - 1)).to(torch.uint8).flatten(-2)


def _shifts(name: str, device: torch.device) -> Tensor:
    """Where the codes of one word begin, in their order."""
    bits = BITS_OF[name]
    shifts = torch.arange(0, PACKS[bits][0] * bits, bits, dtype=torch.int32, device=device)
    return shifts.flip(0) if name in HIGHEST_FIRST else shifts
