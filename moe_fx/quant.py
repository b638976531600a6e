"""How the numbers of one operand are held when they are not plain floats: codes, scales, zero points.

A ``QuantKey`` says what codes mean, never where they lie (``binding``, ``kernels/layouts``).  For a matrix of codes c
[rows, cols] in groups of ``group`` elements, g the group of an element::

    value = scale[g] * (c - zero[g])                      zero is ZERO_OF[dtype] where there are no zero points
    value = global_scale * scale[g] * c                   global_scale: one float a matrix, where the key has one

Weights are [out, in], activations [tokens, in]; a group of -1 elements is the whole extent.  Scales of weights, and of
activations if ``static``, are given; dynamic ones come from the values: largest magnitude of the group / MAX_OF[dtype].
A key prints to one word and parses back: ``parse_key(str(key)) == key``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple, get_args

Code = Literal["float8_e4m3fn", "int8", "int4", "float4_e2m1", "float6_e3m2", "float6_e2m3", "nf4", "fp4_bnb"]
ScaleDType = Literal["float32", "float16", "bfloat16", "float8_e8m0fnu", "float8_e4m3fn"]

# largest magnitude of a code; int8 and int4 are used symmetrically unless there are zero points
MAX_OF: dict[str, float] = {
    "float8_e4m3fn": 448.0,
    "int8": 127.0,
    "int4": 7.0,
    "float4_e2m1": 6.0,
    "float6_e3m2": 28.0,
    "float6_e2m3": 7.5,
    "nf4": 1.0,
    "fp4_bnb": 1.0,
}
ZERO_OF: dict[str, int] = {"int4": 8}  # the code that means 0; int4 is stored unsigned, 0 … 15
BITS_OF: dict[str, int] = {
    "float8_e4m3fn": 8,
    "int8": 8,
    "int4": 4,
    "float4_e2m1": 4,
    "float6_e3m2": 6,
    "float6_e2m3": 6,
    "nf4": 4,
    "fp4_bnb": 4,
}


class GroupShape(NamedTuple):
    """Elements that share a scale: (rows, cols), -1 the whole extent."""

    row: int
    col: int

    def extent(self, rows: int, cols: int) -> tuple[int, int]:
        """The group's size on a matrix [rows, cols]."""
        return (rows if self.row == -1 else self.row), (cols if self.col == -1 else self.col)

    def scales(self, rows: int, cols: int) -> tuple[int, int]:
        """How many scales a matrix [rows, cols] has: (ceil(rows / row), ceil(cols / col))."""
        row, col = self.extent(rows, cols)
        return -(-rows // max(row, 1)), -(-cols // max(col, 1))


PER_TENSOR = GroupShape(-1, -1)
PER_TOKEN = GroupShape(1, -1)  # of activations; of weights: one scale an output channel


@dataclass(frozen=True, slots=True)
class QuantKey:
    """See the module's text.  zero_points: one a group, of the codes' dtype.  static: the scales are given."""

    dtype: Code
    group: GroupShape
    scale: ScaleDType = "float32"
    static: bool = True
    zero_points: bool = False
    global_scale: bool = False

    def __str__(self) -> str:
        flags = [
            name
            for name, on in (
                ("dynamic", not self.static),
                ("zero", self.zero_points),
                ("global", self.global_scale),
            )
            if on
        ]
        return ":".join([self.dtype, f"{self.group.row}x{self.group.col}", self.scale, *flags])

    @property
    def bits(self) -> int:
        """Of one code."""
        return BITS_OF[self.dtype]

    def nbytes(self, rows: int, cols: int) -> int:
        """Bytes of a matrix [rows, cols]: codes, scales, zero points, global scale."""
        groups = self.group.scales(rows, cols)
        scales = groups[0] * groups[1] * SCALE_BYTES[self.scale]
        zeros = groups[0] * groups[1] if self.zero_points else 0
        return rows * cols * self.bits // 8 + scales + zeros + (4 if self.global_scale else 0)


SCALE_BYTES: dict[str, int] = {"float32": 4, "float16": 2, "bfloat16": 2, "float8_e8m0fnu": 1, "float8_e4m3fn": 1}
_FLAGS = {"dynamic": ("static", False), "zero": ("zero_points", True), "global": ("global_scale", True)}


@lru_cache(maxsize=1024)
def parse_key(text: str) -> QuantKey:
    """The key that prints as ``text``; ValueError names the part that is wrong."""
    parts = text.split(":")
    if len(parts) < 3:
        raise ValueError(f"{text!r} is not dtype:rowsxcols:scale[:flags]")
    dtype, extent, scale, *flags = parts
    for value, allowed in ((dtype, get_args(Code)), (scale, get_args(ScaleDType)), *((f, _FLAGS) for f in flags)):
        if value not in allowed:
            raise ValueError(f"{value!r} in {text!r} is not one of {', '.join(allowed)}")
    row, _, col = extent.partition("x")
    return QuantKey(dtype, GroupShape(int(row), int(col)), scale, **dict(_FLAGS[f] for f in flags))  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class QuantSpec:
    """How the operands of the products are held, each the text of a ``QuantKey`` ("" plain floats).

    w13, w2: the weights.  a1, a2: the inputs of the up and of the down product, rounded before it.
    """

    w13: str = ""
    w2: str = ""
    a1: str = ""
    a2: str = ""

    def __bool__(self) -> bool:
        return any((self.w13, self.w2, self.a1, self.a2))

    def key(self, operand: Literal["w13", "w2", "a1", "a2"]) -> QuantKey | None:
        """Of that operand; None for plain floats."""
        text: str = getattr(self, operand)
        return parse_key(text) if text else None


UNQUANTISED = QuantSpec()


def _dynamic(dtype: Code, group: GroupShape, scale: ScaleDType = "float32") -> QuantKey:
    return QuantKey(dtype, group, scale, static=False)


def int_group(bits: Literal[4, 8], size: int, zero_points: bool = False, scale: ScaleDType = "bfloat16") -> QuantKey:
    """Integer weights with one scale for ``size`` inputs of an output channel (-1: for all of them)."""
    return QuantKey("int4" if bits == 4 else "int8", GroupShape(1, size), scale, zero_points=zero_points)


FP8_TENSOR = QuantKey("float8_e4m3fn", PER_TENSOR)
FP8_CHANNEL = QuantKey("float8_e4m3fn", PER_TOKEN)
FP8_BLOCK = QuantKey("float8_e4m3fn", GroupShape(128, 128))
FP8_DYNAMIC = _dynamic("float8_e4m3fn", PER_TENSOR)
FP8_TOKEN = _dynamic("float8_e4m3fn", PER_TOKEN)
FP8_GROUP = _dynamic("float8_e4m3fn", GroupShape(1, 128))
INT8_CHANNEL = QuantKey("int8", PER_TOKEN)
INT8_TENSOR = QuantKey("int8", PER_TENSOR)
INT8_DYNAMIC = _dynamic("int8", PER_TENSOR)
INT8_TOKEN = _dynamic("int8", PER_TOKEN)
MXFP8 = QuantKey("float8_e4m3fn", GroupShape(1, 32), "float8_e8m0fnu")
MXFP8_DYNAMIC = _dynamic("float8_e4m3fn", GroupShape(1, 32), "float8_e8m0fnu")
MXFP4 = QuantKey("float4_e2m1", GroupShape(1, 32), "float8_e8m0fnu")
MXFP4_DYNAMIC = _dynamic("float4_e2m1", GroupShape(1, 32), "float8_e8m0fnu")
MXFP6_E3M2 = QuantKey("float6_e3m2", GroupShape(1, 32), "float8_e8m0fnu")
MXFP6_E3M2_DYNAMIC = _dynamic("float6_e3m2", GroupShape(1, 32), "float8_e8m0fnu")
MXFP6_E2M3 = QuantKey("float6_e2m3", GroupShape(1, 32), "float8_e8m0fnu")
MXFP6_E2M3_DYNAMIC = _dynamic("float6_e2m3", GroupShape(1, 32), "float8_e8m0fnu")
NVFP4 = QuantKey("float4_e2m1", GroupShape(1, 16), "float8_e4m3fn", global_scale=True)
NVFP4_DYNAMIC = QuantKey("float4_e2m1", GroupShape(1, 16), "float8_e4m3fn", static=False, global_scale=True)
NF4 = QuantKey("nf4", GroupShape(1, 64))  # the block size of bitsandbytes unless one is given
FP4_BNB = QuantKey("fp4_bnb", GroupShape(1, 64))

# the schemes of the option ``quantize``, by the field's names: keys of the weights and of the inputs of both products
SCHEMES: dict[str, tuple[QuantKey, QuantKey | None]] = {
    "fp8_w8a8": (FP8_CHANNEL, FP8_TOKEN),
    "fp8_w8a8_block": (FP8_BLOCK, FP8_GROUP),
    "fp8_w8a8_tensor": (FP8_TENSOR, FP8_DYNAMIC),
    "fp8_w8a16": (FP8_CHANNEL, None),
    "int8_w8a8": (INT8_CHANNEL, INT8_TOKEN),
    "int8_w8a16": (INT8_CHANNEL, None),
    "int4_w4a16": (int_group(4, 128), None),
    "int4_w4a16_g32": (int_group(4, 32), None),
    "mxfp4_w4a16": (MXFP4, None),
    "mxfp8": (MXFP8, MXFP8_DYNAMIC),
    "mxfp4": (MXFP4, MXFP4_DYNAMIC),
    "nvfp4": (NVFP4, NVFP4_DYNAMIC),
    "nf4_w4a16": (NF4, None),
}


def scheme_of(name: str, hidden: int, intermediate: int) -> QuantSpec:
    """Scheme ``name`` for experts of H ``hidden`` and I ``intermediate``; KeyError lists the known.

    "int4_w4a16" has groups of 128 inputs, of 32 where H or I is no multiple of 128.  In the others the last group of a
    row is smaller where they are no multiples, in "nf4_w4a16" too, where bitsandbytes goes on into the next row.
    """
    if name not in SCHEMES:
        raise KeyError(f"no scheme {name!r}; known: {', '.join(SCHEMES)}")
    if name == "int4_w4a16" and (hidden % 128 or intermediate % 128):
        name = "int4_w4a16_g32"
    weights, inputs = SCHEMES[name]
    w, a = str(weights), "" if inputs is None else str(inputs)
    return QuantSpec(w, w, a, a)
