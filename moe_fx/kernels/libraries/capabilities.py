"""What the experts classes of other libraries can do, and what they cost: one row a class, closed world.

A row is data: nothing here imports a library, and a row runs nothing until a class is registered under its name
(``kernels.registry``), which takes capability and cost from here.  A library whose classes differ by scheme or by
architecture has a row for each, so that every row is true for all that it lists::

    <library>[_<scheme or architecture>][_monolithic]        batched_… takes one batch an expert

Sources: the experts classes of vLLM 0.33 and the libraries that they call, read; what a source leaves open is not
listed.  Listed narrower than the libraries are: ungated experts where weights have to be packed (no packed layout is
for them), sizes that a layout pads (H and I share one ``size_multiple``), weights on the input of quantised TRT-LLM.
Costs: shares of the peak in bfloat16, in which the oracle prices all products (more than 1: codes are multiplied
faster), from published runs where a comment names one, else guesses.
Those for ROCm, CPU and XPU are in ``platforms``.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

from moe_fx.kernels.capability import PLAIN, Scheme
from moe_fx.kernels.libraries.rows import (
    BATCHES,
    BF16,
    BOTH,
    CLAMP,
    FP8_BLOCKS,
    FP8_ROWS,
    FP8_TENSORS,
    FP8_TRITON,
    FUSED,
    GATHERED,
    GFX94,
    GFX95,
    GLU,
    INT4_SHARED,
    INT8,
    LIBRARIES,
    LISTS,
    MX8,
    NV,
    NVLINK,
    OAI,
    PACKED,
    PLACES,
    SHARED,
    SM75_UP,
    SM89_UP,
    SM90,
    SM100,
    SM110,
    SM120,
    STAYS,
    STEP,
    SUMS,
    Library,
    add,
    integers,
    library,
    needs,
)
from moe_fx.kernels.registry import Cost
from moe_fx.quant import (
    FP8_BLOCK,
    FP8_CHANNEL,
    FP8_GROUP,
    FP8_TENSOR,
    FP8_TOKEN,
    INT8_CHANNEL,
    INT8_TOKEN,
    MXFP4,
    MXFP4_DYNAMIC,
    MXFP8,
    MXFP8_DYNAMIC,
    NVFP4,
    NVFP4_DYNAMIC,
    int_group,
)

__all__ = ["LIBRARIES", "Library", "library"]

# --- Triton: what the field's kernels do; those of ours that are built stand in their place (``kernels.experts``)

# 523 of 989 TFLOP/s for bfloat16 on an H100 (Liger, 32768 tokens of Qwen3-30B-A3B)
TRITON_COST = Cost("active", lambda E, T, k: 6, ((1, 0.03), (16, 0.3), (64, 0.45), (256, 0.53)))
TRITON = replace(
    FUSED,
    devices=frozenset({"cuda", "rocm", "xpu"}),
    activations=SHARED | {"relu2"},
    gated=BOTH,
    weight_on=PLACES,
    accumulate=SUMS,
    biases=True,
    packages=needs("triton", "moe_fx.triton"),
    most=(("experts", 992),),  # round_up(E, 32) < 1024, what one block counts
    batch_invariant=True,
    lora=True,
)
add("triton", "fused_moe_kernel twice, moe_sum", TRITON, TRITON_COST, "triton", schemes=frozenset({PLAIN}))
add("triton_int8", "fused_moe_kernel twice on int8, moe_sum", TRITON, TRITON_COST, "triton", schemes=INT8)
add(
    "triton_fp8",
    "fused_moe_kernel twice on float8_e4m3fn, moe_sum",
    TRITON,
    TRITON_COST,
    "triton",
    devices=frozenset({"cuda", "rocm"}),
    archs=SM89_UP | GFX94 | GFX95,
    schemes=FP8_TRITON,
)
add(
    "triton_mxfp8",
    "fused_moe_kernel with dot_scaled",
    TRITON,
    TRITON_COST,
    devices=frozenset({"rocm"}),
    archs=GFX95,
    schemes=MX8,
    lora=False,
)
add(
    "triton_wna16",
    "fused_moe_kernel on packed integers",
    TRITON,
    TRITON_COST,
    biases=False,
    batch_invariant=False,
    schemes=INT4_SHARED,
)
BATCHED_TRITON = replace(
    TRITON, all2all=BATCHES, batched=True, biases=False, lora=False, batch_invariant=False, most=()
)
BATCHED_COST = replace(TRITON_COST, launches=lambda E, T, k: 4)
add("batched_triton", "a masked kernel twice", BATCHED_TRITON, BATCHED_COST, "batched_triton")
add(
    "batched_triton_fp8",
    "a masked kernel twice on float8_e4m3fn",
    BATCHED_TRITON,
    BATCHED_COST,
    "batched_triton",
    devices=frozenset({"cuda", "rocm"}),
    archs=SM89_UP | GFX94 | GFX95,
    schemes=FP8_TRITON,
)

# --- FlashInfer, CUTLASS

# Within 4 % of Triton, either way, for Qwen3-30B-A3B in bfloat16 on H100 and H200 (vllm PRs 44220, 54742); behind it
# for one token: 17 us a layer of Mixtral-8x7B over eight H200 (vllm issue 41306), 14 % of experts like Qwen3's in fp8
# on an H100 (sglang PR 21872).  Launched are three for the order, the copy of rows, strides, two products, the sum.
FI_CUTLASS_COST = Cost("active", lambda E, T, k: 8, ((1, 0.03), (16, 0.3), (64, 0.45), (256, 0.54)))
# DeepSeek-R1 over eight H200: some 30 % slower than Triton (vllm PR 33490); inputs are rounded inside
FI_CUTLASS_HOPPER_COST = Cost("active", lambda E, T, k: 10, ((1, 0.02), (16, 0.21), (64, 0.32), (256, 0.38)))
FI_CUTLASS = replace(
    FUSED,
    activations=frozenset({"silu", "gelu_tanh"}) | OAI,
    orders=frozenset({"up_gate"}),
    all2all=LISTS | NVLINK,
    packages=needs("flashinfer"),
)
add(
    "flashinfer_cutlass",
    "flashinfer.fused_moe.cutlass_fused_moe",
    FI_CUTLASS,
    FI_CUTLASS_COST,
    "flashinfer_cutlass",
    archs=SM90 | SM100 | SM120,
    schemes=frozenset({PLAIN, (FP8_TENSOR, FP8_TENSOR)}),
    size_multiple=16,
)
add(
    "flashinfer_cutlass_hopper",
    "cutlass_fused_moe(use_deepseek_fp8_block_scale)",
    FI_CUTLASS,
    FI_CUTLASS_HOPPER_COST,
    "flashinfer_cutlass",
    forms=PACKED,  # scales are clamped
    archs=SM90,
    schemes=FP8_BLOCKS,
    dtypes=BF16,
    size_multiple=128,
)
add(
    "flashinfer_cutlass_mxfp4",
    "cutlass_fused_moe(use_w4_group_scaling), weights interleaved by a function on the GPU",
    FI_CUTLASS,
    FI_CUTLASS_COST,
    forms=PACKED,
    archs=SM90,
    schemes=frozenset({(MXFP4, None)}),
    dtypes=BF16,
    biases=True,
    size_multiple=64,
)
FI_CUTLASS_FP4 = replace(FI_CUTLASS, forms=PACKED, archs=SM100 | SM120, size_multiple=64, dtypes=BF16)
add(
    "flashinfer_cutlass_mxfp4_mxfp8",
    "cutlass_fused_moe(use_mxfp8_act_scaling)",
    FI_CUTLASS_FP4,
    FI_CUTLASS_COST,
    "flashinfer_cutlass",
    schemes=frozenset({(MXFP4, MXFP8_DYNAMIC)}),
    biases=True,
)
add(
    "flashinfer_cutlass_nvfp4",
    "cutlass_fused_moe on nvfp4",
    FI_CUTLASS_FP4,
    FI_CUTLASS_COST,
    "flashinfer_cutlass",
    activations=FI_CUTLASS.activations | CLAMP,
    schemes=NV,
)

# --- FlashInfer, TRT-LLM: Blackwell of data centres only; monolithic ones contain the router

TRTLLM_COST = Cost("active", lambda E, T, k: 3, ((1, 0.03), (16, 0.32), (64, 0.5), (256, 0.6)))
TRTLLM = replace(
    FUSED,
    dtypes=BF16,
    forms=PACKED,
    archs=SM100,
    packages=needs("flashinfer"),
    size_multiple=128,
    most=(("experts", 2048),),
)
BLOCK_ROUTERS = frozenset(
    {"DeepSeekV3", "Renormalize", "RenormalizeNaive", "SigmoidRenorm", "MiniMax2", "Sigmoid"}
)  # of block scales; the others know Llama4's too
ROUTERS = BLOCK_ROUTERS | {"Llama4"}
MONOLITHIC = replace(
    TRTLLM, monolithic=True, routing=ROUTERS, logits=frozenset({"bfloat16", "float32"}), all2all=GATHERED
)
BLOCK_LIMIT = (("experts", 512),)  # one thread an expert
add(
    "flashinfer_trtllm",
    "trtllm_bf16_routed_moe",
    TRTLLM,
    TRTLLM_COST,
    "flashinfer_trtllm",
    all2all=NVLINK | {"deepep_v2"},
)
add("flashinfer_trtllm_monolithic", "trtllm_bf16_moe", MONOLITHIC, TRTLLM_COST, "flashinfer_trtllm")
add(
    "flashinfer_trtllm_lora",
    "trtllm_bf16_routed_moe and adapters beside it",
    TRTLLM,
    TRTLLM_COST,
    "flashinfer_trtllm",
    lora=True,
    all2all=STAYS,
)
add(
    "flashinfer_trtllm_fp8",
    "trtllm_fp8_block_scale_routed_moe",
    TRTLLM,
    TRTLLM_COST,
    "flashinfer_trtllm",
    activations=frozenset({"silu"}) | OAI | CLAMP,
    schemes=FP8_BLOCKS | MX8,
    most=BLOCK_LIMIT,
    all2all=GATHERED | NVLINK | {"deepep_v2"},
)
add(
    "flashinfer_trtllm_fp8_monolithic",
    "trtllm_fp8_block_scale_moe",
    MONOLITHIC,
    TRTLLM_COST,
    "flashinfer_trtllm",
    activations=frozenset({"silu"}) | OAI | CLAMP,
    schemes=FP8_BLOCKS | MX8,
    most=BLOCK_LIMIT,
    routing=BLOCK_ROUTERS,
)
add(
    "flashinfer_trtllm_fp8_tensor_monolithic",
    "trtllm_fp8_per_tensor_scale_moe",
    MONOLITHIC,
    TRTLLM_COST,
    "flashinfer_trtllm",
    schemes=frozenset({(FP8_TENSOR, FP8_TENSOR)}),
    routing=BLOCK_ROUTERS,  # with Llama4's the weights go on the input
)
for scheme, called, layout, known, biases in (
    ("nvfp4", (NVFP4, NVFP4_DYNAMIC), "flashinfer_trtllm", GLU | OAI | CLAMP, False),
    ("mxfp4", (MXFP4, None), "flashinfer_trtllm", frozenset({"silu"}) | OAI, True),
    ("mxfp4_mxfp8", (MXFP4, MXFP8_DYNAMIC), "flashinfer_trtllm", frozenset({"silu"}) | OAI, True),
    ("mxint4", (int_group(4, 32), None), "", frozenset({"silu"}), False),
):
    own = dict(activations=known, biases=biases, schemes=frozenset({called}), size_multiple=64)
    block = "trtllm_mxint4_block_scale" if scheme == "mxint4" else "trtllm_fp4_block_scale"
    together = STAYS if scheme.startswith("mxfp4") else GATHERED
    monolithic = f"flashinfer_trtllm_{scheme}_monolithic"
    add(monolithic, f"{block}_moe", MONOLITHIC, TRTLLM_COST, layout, all2all=together, **own)
    if scheme != "mxint4":
        spread = GATHERED | NVLINK | {"deepep_v2"}
        name = f"flashinfer_trtllm_{scheme}"
        add(name, f"{block}_routed_moe", TRTLLM, TRTLLM_COST, layout, all2all=spread, **own)

# --- FlashInfer, CuTe DSL

CUTEDSL = replace(
    FUSED,
    dtypes=BF16,
    forms=PACKED,
    archs=SM100,
    packages=needs("flashinfer", "cutlass_dsl"),
    schemes=NV,
    size_multiple=64,
)
add(
    "flashinfer_cutedsl",
    "cute_dsl_fused_moe_nvfp4",
    CUTEDSL,
    TRTLLM_COST,
    "flashinfer_cutedsl",
    activations=frozenset({"silu"}) | CLAMP,
)
add(
    "batched_flashinfer_cutedsl",
    "grouped_gemm_nt_masked twice",
    CUTEDSL,
    TRTLLM_COST,
    "flashinfer_cutedsl",
    batched=True,
    all2all=BATCHES,
)

# --- DeepGEMM

# 1346 TFLOP/s on an H800, whose peak in bfloat16 is 989, with 4 groups of 8192 rows; masked 932 with 4 groups of 256
# (its README of April 2025), products alone.  The rows of an expert are padded to 128.
# Around each product the adapter rounds, finds padded places, moves rows there and back: some 30 ops of PyTorch.
DEEPGEMM_COST = Cost("active", lambda E, T, k: 80, ((1, 0.008), (64, 0.5), (128, 1.0), (512, 1.36)), passes=2.0)
# on one rank somebody has to lay tokens out in batches first, and to take them out again
MASKED_COST = Cost("active", lambda E, T, k: 40, ((1, 0.01), (64, 0.6), (256, 0.94)), passes=2.0)
DEEPGEMM = replace(
    FUSED,
    activations=frozenset({"silu"}) | OAI | STEP,
    dtypes=BF16,
    forms=PACKED,  # Hopper reads blocks as they are, Blackwell powers of two, four in an int32
    archs=SM90 | SM100 | SM120,
    schemes=FP8_BLOCKS,
    packages=needs("deep_gemm"),
    weight_on=PLACES,
    accumulate=SUMS,
    size_multiple=128,
)
add("deepgemm", "m_grouped_fp8_gemm_nt_contiguous twice", DEEPGEMM, DEEPGEMM_COST, "deepgemm")
add(
    "triton_or_deepgemm",
    "m_grouped_fp8_gemm_nt_contiguous twice, or fused_moe_kernel for few tokens",
    DEEPGEMM,
    DEEPGEMM_COST,
    "deepgemm",
    packages=DEEPGEMM.packages | TRITON.packages,
    most=TRITON.most,
)
add(
    "deepgemm_mxfp8",
    "m_grouped_fp8_gemm_nt_contiguous, groups of 32",
    DEEPGEMM,
    DEEPGEMM_COST,
    "deepgemm",
    archs=SM100,
    schemes=MX8,
)
add(
    "deepgemm_mxfp4",
    "m_grouped_fp8_fp4_gemm_nt_contiguous",
    DEEPGEMM,
    DEEPGEMM_COST,
    "deepgemm",
    activations=frozenset({"silu"}) | STEP,
    archs=SM100 | SM120,
    schemes=frozenset({(MXFP4, FP8_GROUP)}),
)
add(
    "batched_deepgemm",
    "m_grouped_fp8_gemm_nt_masked twice",
    DEEPGEMM,
    MASKED_COST,
    "batched_deepgemm",
    activations=frozenset({"silu"}),
    batched=True,
    all2all=BATCHES,
)

# --- Marlin: activations stay as they are

MARLIN_COST = Cost("active", lambda E, T, k: 6, ((1, 0.05), (16, 0.45), (64, 0.5)))
WEIGHTS_8 = (FP8_BLOCK, FP8_CHANNEL, FP8_TENSOR, MXFP8)
WEIGHTS_ONLY: frozenset[Scheme] = frozenset((key, None) for key in (*WEIGHTS_8, MXFP4, NVFP4)) | integers(
    (4, 8), (-1, 32, 64, 128), (False, True)
)
MARLIN = replace(
    FUSED,
    activations=SHARED | CLAMP,
    biases=True,
    forms=PACKED,
    archs=SM75_UP,
    packages=needs("vllm"),
    schemes=WEIGHTS_ONLY,
    weight_on=PLACES,
    size_multiple=128,
)
add(
    "marlin",
    "torch.ops._moe_C.moe_wna16_marlin_gemm twice, moe_sum",
    MARLIN,
    replace(MARLIN_COST, launches=lambda E, T, k: 36),  # blocks of rows, the activation and the sum in PyTorch
    "marlin",
    all2all=LISTS | {"flashinfer_nvlink_one_sided"},
    lora=True,
)
add(
    "batched_marlin",
    "torch.ops._moe_C.moe_wna16_marlin_gemm on batches",
    MARLIN,
    MARLIN_COST,
    "batched_marlin",
    batched=True,
    all2all=BATCHES,
)

# --- CUTLASS of vLLM

CUTLASS = replace(
    FUSED,
    activations=SHARED,
    archs=SM90 | SM100,
    packages=needs("vllm"),
    schemes=FP8_ROWS | FP8_TENSORS,
    size_multiple=16,
    all2all=LISTS - {"deepep_high_throughput"},
)
# no faster than Triton (vllm PR 19983, blocks); ours rounds, finds sizes and strides, activates and adds up in PyTorch
CUTLASS_COST = replace(TRITON_COST, launches=lambda E, T, k: 60, passes=2.0)
add("vllm_cutlass", "moe_permute, cutlass_moe_mm twice, moe_unpermute", CUTLASS, CUTLASS_COST, "vllm_cutlass")
add(
    "batched_vllm_cutlass",
    "cutlass_moe_mm twice on batches",
    CUTLASS,
    MASKED_COST,
    "vllm_cutlass",
    batched=True,
    all2all=BATCHES,
)
FP4_CUTLASS = replace(CUTLASS, forms=PACKED, size_multiple=64, activations=SHARED | CLAMP)
add(
    "vllm_cutlass_nvfp4",
    "cutlass_fp4_moe_mm twice",
    FP4_CUTLASS,
    TRITON_COST,
    "vllm_cutlass",
    archs=SM100 | SM110 | SM120,
    schemes=NV,
)
add(
    "vllm_cutlass_mxfp4",
    "cutlass_mxfp4_moe_mm twice",
    FP4_CUTLASS,
    TRITON_COST,
    "vllm_cutlass",
    activations=SHARED,
    archs=SM100,
    schemes=frozenset({(MXFP4, MXFP4_DYNAMIC)}),
)
add(
    "vllm_cutlass_w4a8",
    "cutlass_w4a8_moe_mm twice, weights reordered by a function on the GPU",
    FP4_CUTLASS,
    TRITON_COST,
    activations=SHARED,
    archs=SM90,
    dtypes=BF16,
    schemes=frozenset({(int_group(4, 128), FP8_TOKEN)}),
    size_multiple=128,
)

# --- OpenAI's Triton kernels

OAI_TRITON = replace(
    FUSED,
    devices=frozenset({"cuda", "rocm"}),
    activations=OAI,
    biases=True,
    forms=PACKED,
    archs=SM90 | SM100 | SM120 | GFX94 | GFX95,
    packages=needs("triton", "triton_kernels"),
    schemes=frozenset({(MXFP4, None)}),
    size_multiple=32,
)
add("triton_kernels", "triton_kernels.matmul_ogs twice", OAI_TRITON, TRITON_COST)
add(
    "triton_kernels_unfused",
    "triton_kernels.matmul_ogs, the activation apart, matmul_ogs",
    OAI_TRITON,
    TRITON_COST,
    activations=frozenset({"silu", "gelu"}) | OAI | STEP,
    lora=True,
)
add(
    "triton_kernels_monolithic",
    "triton_kernels.routing, matmul_ogs twice",
    OAI_TRITON,
    TRITON_COST,
    monolithic=True,
    routing=frozenset({"Renormalize", "RenormalizeNaive"}),
    logits=frozenset({"bfloat16", "float16", "float32"}),
    all2all=STAYS,
    expert_parallel=False,
)

# --- Humming, HPC

HUMMING = replace(
    FUSED,
    activations=SHARED,
    forms=PACKED,
    archs=SM75_UP,
    packages=needs("humming"),
    schemes=WEIGHTS_ONLY | {(INT8_CHANNEL, None), (INT8_CHANNEL, INT8_TOKEN)},
    size_multiple=128,
)
FP8_INPUTS: frozenset[Scheme] = frozenset(product((*WEIGHTS_8, MXFP4, int_group(4, 128)), (FP8_TOKEN, FP8_GROUP)))
add("humming", "humming.layer.HummingMethod, indexed", HUMMING, MARLIN_COST)
add(
    "humming_fp8",
    "humming.layer.HummingMethod, indexed, fp8 inputs",
    HUMMING,
    MARLIN_COST,
    archs=SM89_UP,
    schemes=FP8_INPUTS | MX8,
)
add(
    "batched_humming",
    "humming.layer.HummingMethod, grouped batches",
    HUMMING,
    MARLIN_COST,
    batched=True,
    all2all=BATCHES,
)
add(
    "hpc",
    "hpc.fused_moe",
    FUSED,
    TRITON_COST,
    archs=SM90,
    packages=needs("hpc"),
    schemes=FP8_BLOCKS | {(FP8_TENSOR, FP8_TENSOR)},
    size_multiple=128,
    all2all=STAYS,
    expert_parallel=False,
)

# --- PyTorch's grouped products of scaled codes

SCALED = replace(
    FUSED,
    activations=SHARED,
    forms=PACKED,
    weight_on=PLACES,
    accumulate=SUMS,
    packages=needs("torch.scaled_grouped_mm"),
    size_multiple=16,
)
# The product alone 776 TFLOP/s by rows on an H100, whose peak in bfloat16 is 989: 8192 x 5120 x 8192, 16 experts (ao
# PR 2490).  Passes as in ``torch_grouped``, and those that round the inputs; few rows as there, half again as fast.
SCALED_COST = Cost("active", lambda E, T, k: 40, ((1, 0.0015), (128, 0.2), (512, 0.78)), passes=2.0)
add(
    "torch_scaled_grouped",
    "torch.nn.functional.scaled_grouped_mm twice, RowWise",
    SCALED,
    SCALED_COST,
    "torch_scaled_grouped",
    devices=frozenset({"cuda", "rocm"}),
    archs=SM90 | SM100 | GFX94 | GFX95,
    schemes=FP8_ROWS,
)
add(
    "torch_scaled_grouped_mxfp8",
    "torch.nn.functional.scaled_grouped_mm twice, BlockWise1x32",
    SCALED,
    SCALED_COST,
    "torch_scaled_grouped",
    archs=SM100,
    schemes=MX8,
    size_multiple=32,
)
