"""One row of the table of libraries, and the sets that rows are written with: architectures, schemes, activations."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

from moe_fx.kernels.capability import NO_ALL2ALL, Capability, Scheme
from moe_fx.kernels.config.parallel import ALL2ALL_BACKENDS, BATCHED, DEFAULT_ALL2ALL
from moe_fx.kernels.registry import Cost
from moe_fx.quant import (
    FP8_BLOCK,
    FP8_CHANNEL,
    FP8_DYNAMIC,
    FP8_GROUP,
    FP8_TENSOR,
    FP8_TOKEN,
    INT8_CHANNEL,
    INT8_DYNAMIC,
    INT8_TENSOR,
    INT8_TOKEN,
    MXFP8,
    MXFP8_DYNAMIC,
    NVFP4,
    NVFP4_DYNAMIC,
    GroupShape,
    QuantKey,
    int_group,
)


@dataclass(frozen=True, slots=True)
class Library:
    """calls: the function that an adapter calls, in short.  layout: whose rows of ``kernels.layouts.packed`` hold its
    weights ("" it reads them as they are)."""

    name: str
    calls: str
    capability: Capability
    cost: Cost
    layout: str = ""


LIBRARIES: dict[str, Library] = {}


def library(name: str) -> Library:
    """The library of that name; KeyError lists the known ones."""
    if name not in LIBRARIES:
        raise KeyError(f"no library {name!r}; known: {', '.join(LIBRARIES)}")
    return LIBRARIES[name]


def add(name: str, calls: str, base: Capability, cost: Cost, layout: str = "", **changes: object) -> None:
    """Lists the row ``base`` with ``changes``; a second row of a name is an error."""
    if name in LIBRARIES:
        raise ValueError(f"library {name!r} is listed twice")
    LIBRARIES[name] = Library(name, calls, replace(base, **changes), cost, layout)  # type: ignore[arg-type]


# --- architectures, as hardware.detect names them (it tells no generation of Xe and no fp8 tiles of AMX yet)

SM75_UP = frozenset({"sm75", "sm80", "sm86", "sm87", "sm89", "sm90", "sm100", "sm103", "sm110", "sm120", "sm121"})
SM89_UP = SM75_UP - {"sm75", "sm80", "sm86", "sm87"}  # the first with products of float8_e4m3fn
SM90 = frozenset({"sm90"})
SM100 = frozenset({"sm100", "sm103"})
SM110 = frozenset({"sm110"})
SM120 = frozenset({"sm120", "sm121"})
GFX94 = frozenset({"gfx940", "gfx941", "gfx942"})
GFX95 = frozenset({"gfx950"})
XE2_UP = frozenset({"xe2", "xe3"})
AMX = frozenset({"amx"})
AMX_FP8 = frozenset({"amx_fp8"})
AVX512 = frozenset({"avx512", "avx512_bf16"})  # without the tiles that only Intel has

# --- what carries tokens

NVLINK = frozenset({"flashinfer_nvlink_two_sided", "flashinfer_nvlink_one_sided"})
LISTS = frozenset({NO_ALL2ALL, *ALL2ALL_BACKENDS}) - BATCHED - NVLINK
BATCHES = frozenset({NO_ALL2ALL, *BATCHED})
STAYS = frozenset({NO_ALL2ALL})
GATHERED = frozenset({NO_ALL2ALL, DEFAULT_ALL2ALL})

# --- schemes

FP8_ROWS: frozenset[Scheme] = frozenset({(FP8_CHANNEL, FP8_TOKEN)})
FP8_TENSORS: frozenset[Scheme] = frozenset({(FP8_TENSOR, FP8_TENSOR), (FP8_TENSOR, FP8_DYNAMIC)})
FP8_BLOCKS: frozenset[Scheme] = frozenset({(FP8_BLOCK, FP8_GROUP)})
FP8_REFINED: frozenset[Scheme] = frozenset(  # blocks of 128 cut by a shard, down to 32
    (QuantKey("float8_e4m3fn", GroupShape(r, c)), QuantKey("float8_e4m3fn", GroupShape(1, c), static=False))
    for r, c in product((32, 64, 128), repeat=2)
)
FP8_TRITON = FP8_ROWS | FP8_TENSORS | FP8_BLOCKS | FP8_REFINED | {(FP8_TENSOR, FP8_TOKEN)}
INT8: frozenset[Scheme] = frozenset({(INT8_CHANNEL, INT8_TOKEN), (INT8_TENSOR, INT8_DYNAMIC)})
MX8: frozenset[Scheme] = frozenset({(MXFP8, MXFP8_DYNAMIC)})
NV: frozenset[Scheme] = frozenset({(NVFP4, NVFP4_DYNAMIC)})
SCALES = ("bfloat16", "float16")  # of groups of integers


def integers(bits: tuple[int, ...], groups: tuple[int, ...], zero_points: tuple[bool, ...]) -> frozenset[Scheme]:
    """Weights of so many bits with a scale for so many inputs; activations as they are."""
    kinds = product(bits, groups, zero_points, SCALES)
    return frozenset((int_group(b, g, z, s), None) for b, g, z, s in kinds)  # type: ignore[arg-type]


INT4_SHARED = integers((4,), (32, 64, 128), (False, True)) | integers((8,), (32, 64, 128), (False,))

# --- activations: those that libraries apply between the products, and all that one shared function knows

GLU = frozenset({"silu", "gelu", "gelu_tanh"})
OAI, STEP, CLAMP = frozenset({"swiglu_oai"}), frozenset({"swiglu_step"}), frozenset({"swiglu_clamp"})
SHARED = GLU | OAI | STEP
BOTH = frozenset({True, False})
PLACES = frozenset({"output", "input"})  # of the routing weight; on the input prepare multiplies, for k = 1

NARROW = frozenset({""})
FUSED = Capability(
    devices=frozenset({"cuda"}),
    dtypes=frozenset({"bfloat16", "float16"}),
    activations=frozenset({"silu"}),
    forms=frozenset({"stacked"}),
    biases=False,
    norms=NARROW,
    weight_on=frozenset({"output"}),
    act_dtypes=NARROW,
    compute_dtypes=NARROW,
    accumulate=NARROW,
    out_dtypes=NARROW,
    transposed=frozenset({False}),
    orders=frozenset({"gate_up"}),
    gated=frozenset({True}),
    all2all=LISTS,
)
BF16 = frozenset({"bfloat16"})
PACKED: frozenset[str] = frozenset()  # forms: none of a model's, only a packed copy
SUMS = frozenset({"", "float32"})  # accumulate: the sum over k is taken in float32


def needs(*packages: str) -> frozenset[str]:
    """Names in ``Device.installed``."""
    return frozenset(packages)
