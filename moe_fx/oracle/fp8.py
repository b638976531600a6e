"""Backends of fp8 layers: which there are, in which order, and what each needs of weights and scales.

Orders: "seed" is the one that the field's modular kernel came with; "today" is that of vLLM 0.33, which puts Triton
first for blocks on Hopper (FlashInfer was 30 % slower for DeepSeek-R1 on 8 H200) unless experts are spread over ranks,
and batched backends behind all others.
"""

from __future__ import annotations

from enum import Enum
from typing import Any

import torch
from torch import Tensor

from moe_fx.hardware import Device, detect
from moe_fx.kernels.capability import Scheme
from moe_fx.kernels.config import FusedMoEConfig, FusedMoEQuantConfig
from moe_fx.kernels.config.schemes import fp8_w8a8_moe_quant_config, fp8_w8a16_moe_quant_config
from moe_fx.kernels.modular_kernel import FusedMoEExperts, FusedMoEKernel, FusedMoEPrepareAndFinalize
from moe_fx.oracle.assemble import Layer, layout_of, make_kernel, packed
from moe_fx.oracle.backends import OURS, Backend, Move, Oracle, Order, Refusal
from moe_fx.oracle.conditions import BLACKWELL, BLOCKS, DEEPEP_V2, EP, HOPPER, LORA, Asked, no, on, this_device
from moe_fx.quant import (
    FP8_BLOCK,
    FP8_CHANNEL,
    FP8_DYNAMIC,
    FP8_GROUP,
    FP8_TENSOR,
    FP8_TOKEN,
    QuantKey,
)
from moe_fx.reasons import MoEFxOptionError


class Fp8MoeBackend(Enum):
    NONE = "none"
    FLASHINFER_TRTLLM = "flashinfer_trtllm"
    FLASHINFER_CUTLASS = "flashinfer_cutlass"
    DEEPGEMM = "deepgemm"
    BATCHED_DEEPGEMM = "batched_deepgemm"
    MARLIN = "marlin"
    TRITON = "triton"
    BATCHED_TRITON = "batched_triton"
    AITER = "aiter"
    VLLM_CUTLASS = "vllm_cutlass"
    BATCHED_VLLM_CUTLASS = "batched_vllm_cutlass"
    HUMMING = "humming"
    XPU = "xpu"
    CPU = "cpu"
    CPU_W8A8 = "cpu_w8a8"
    HPC = "hpc"
    EMULATION = "emulation"  # this one and those below: oracle.mxfp8 alone
    TRITON_MXFP8 = "triton_mxfp8"
    AITER_MXFP8 = "aiter_mxfp8"


B = Fp8MoeBackend
TABLE: tuple[Backend[B], ...] = (
    Backend(
        B.FLASHINFER_TRTLLM,
        (
            "flashinfer_trtllm_fp8_monolithic",
            "flashinfer_trtllm_fp8_tensor_monolithic",
            "flashinfer_trtllm_fp8",
        ),
    ),
    Backend(B.FLASHINFER_CUTLASS, ("flashinfer_cutlass", "flashinfer_cutlass_hopper")),
    Backend(B.DEEPGEMM, ("triton_or_deepgemm", "deepgemm"), ("deep_gemm",), twin=B.BATCHED_DEEPGEMM),
    Backend(B.BATCHED_DEEPGEMM, ("batched_deepgemm",), ("batched_deep_gemm",)),
    Backend(B.MARLIN, ("marlin",), weights_only=True),
    Backend(B.TRITON, ("triton_fp8",), twin=B.BATCHED_TRITON),
    Backend(B.BATCHED_TRITON, ("batched_triton_fp8",)),
    Backend(B.AITER, ("aiter", "aiter_block")),
    Backend(B.VLLM_CUTLASS, ("vllm_cutlass",), ("cutlass",), twin=B.BATCHED_VLLM_CUTLASS),
    Backend(B.BATCHED_VLLM_CUTLASS, ("batched_vllm_cutlass",)),
    Backend(B.HUMMING, ("humming_fp8", "humming", "batched_humming")),
    Backend(B.XPU, ("xpu_fp8",), where=on("xpu")),
    Backend(B.CPU, ("vllm_cpu_fp8", *OURS), where=on("cpu"), weights_only=True),
    Backend(B.CPU_W8A8, ("vllm_cpu_amx_fp8", *OURS), where=on("cpu")),
    Backend(B.HPC, ("hpc",)),
)
ADAPTERS = Refusal("veto.lora", "experts with LoRA adapters run on TRITON", (LORA,), but=(B.TRITON,))
SEED = Order(
    (
        B.AITER,
        B.FLASHINFER_TRTLLM,
        B.FLASHINFER_CUTLASS,
        B.DEEPGEMM,
        B.BATCHED_DEEPGEMM,
        B.VLLM_CUTLASS,
        B.TRITON,
        B.BATCHED_TRITON,
        B.MARLIN,
        B.BATCHED_VLLM_CUTLASS,  # from here on: those that came later
        B.HUMMING,
        B.XPU,
        B.CPU_W8A8,
        B.CPU,
        B.HPC,
    ),
    refusals=(ADAPTERS,),
)
TODAY = Order(
    (
        B.AITER,
        B.FLASHINFER_TRTLLM,
        B.FLASHINFER_CUTLASS,
        B.DEEPGEMM,
        B.VLLM_CUTLASS,
        B.TRITON,
        B.MARLIN,
        B.HUMMING,
        B.BATCHED_DEEPGEMM,
        B.BATCHED_VLLM_CUTLASS,
        B.BATCHED_TRITON,
        B.XPU,
        B.CPU_W8A8,
        B.CPU,
        B.HPC,
    ),
    (
        Move((B.HUMMING,), "before", (HOPPER,), B.MARLIN),
        Move((B.FLASHINFER_TRTLLM,), "front", (BLACKWELL, DEEPEP_V2, BLOCKS)),
        Move((B.FLASHINFER_CUTLASS,), "front", (HOPPER, BLOCKS, EP)),
        Move((B.TRITON,), "front", (HOPPER, BLOCKS, no(EP))),
        Move((B.XPU,), "front", (on("xpu"),)),
        Move((B.CPU_W8A8, B.CPU), "front", (on("cpu"),)),
    ),
    (ADAPTERS,),
)
SCHEMES = (
    (FP8_BLOCK, FP8_GROUP),
    (FP8_CHANNEL, FP8_TOKEN),
    (FP8_TENSOR, FP8_TENSOR),
    (FP8_TENSOR, FP8_DYNAMIC),
    (FP8_TENSOR, FP8_TOKEN),
)
FP8 = Oracle("fp8", TABLE, {"seed": SEED, "today": TODAY}, SCHEMES, nothing=B.NONE)

SCHEME_KEYS: dict[str, Scheme] = {  # of the rows of kernels.layouts.packed
    "fp8_block": (FP8_BLOCK, FP8_GROUP),
    "fp8_channel": (FP8_CHANNEL, FP8_TOKEN),
    "fp8_tensor": (FP8_TENSOR, FP8_DYNAMIC),
}
CUTLASS_OUT = "vLLM's CUTLASS kernels are not wanted: pass allow_vllm_cutlass=True"


def map_fp8_backend(name: str) -> Fp8MoeBackend:
    """The backend that ``moe_backend`` calls ``name``; MoEFxOptionError lists the known names."""
    return FP8.map(name)


def backend_2_kernel_cls(backend: Fp8MoeBackend) -> type[FusedMoEExperts]:
    """The experts class of a backend; MoEFxUnsupportedError says which kernel is missing."""
    return FP8.kernel_class(backend)


def select_fp8_moe_backend(
    config: FusedMoEConfig,
    weight_key: QuantKey | None,
    activation_key: QuantKey | None,
    allow_vllm_cutlass: bool = False,
    *,
    order: str = "seed",
    device: Device | None = None,
) -> tuple[Fp8MoeBackend, type[FusedMoEExperts] | None]:
    """(backend, experts class), (NONE, None) where nothing fits on a device that is no GPU.

    order: "seed" or "today".  device: None this machine's.  Raises as ``Oracle.select`` does.
    """
    found = this_device() if device is None else device
    without = {} if allow_vllm_cutlass else dict.fromkeys((B.VLLM_CUTLASS, B.BATCHED_VLLM_CUTLASS), CUTLASS_OUT)
    selection = FP8.select(Asked(config, found, (weight_key, activation_key), without=without), order)
    return selection.backend, selection.experts_class


def convert_to_fp8_moe_kernel_format(
    backend: Fp8MoeBackend,
    layer: Layer,
    w13: Tensor,
    w2: Tensor,
    w13_scale: Tensor,
    w2_scale: Tensor,
    w13_input_scale: Tensor | None = None,
    w2_input_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Canonical w13 [E, 2I, H], w2 [E, H, I] in float8_e4m3fn and their scales (one a tensor [E], one an output channel
    [E, rows, 1], or one a block) → the same four as the backend reads them.

    The input scales are those of FlashInfer's per-tensor kernels, which need both.  Raises MoEFxUnsupportedError where
    the backend has no layout for them, MoEFxOptionError for scales that are missing or of no known shape.
    """
    scheme = _scheme(w13, w13_scale)
    keys = SCHEME_KEYS[scheme] if w13_input_scale is None else (SCHEME_KEYS[scheme][0], FP8_TENSOR)
    static = backend in (B.FLASHINFER_CUTLASS, B.FLASHINFER_TRTLLM) and scheme == "fp8_tensor"
    if static and (w13_input_scale is None or w2_input_scale is None):
        raise MoEFxOptionError(
            f"{backend.name} with one scale a tensor needs the scales of its inputs: give w13_input_scale and "
            "w2_input_scale"
        )
    scales = {"w13_scale": w13_scale, "w2_scale": w2_scale}
    tensors = {"w13": w13, "w2": w2} | {r: s.view(len(s), 1, 1) if s.dim() == 1 else s for r, s in scales.items()}
    half = backend is B.MARLIN and layer.moe_config.in_dtype == torch.float16  # the exponents of its scales
    row = layout_of(FP8, backend, keys, scheme + "_fp16" * half, layer, detect(w13.device))
    out = packed(row, tensors, layer)
    return out["w13"], out["w2"], out["w13_scale"], out["w2_scale"]


def _scheme(codes: Tensor, scale: Tensor) -> str:
    """Which of the layouts' schemes the shape of the scales says."""
    experts, rows, cols = codes.shape
    shapes: dict[str, list[tuple[int, ...]]] = {
        "fp8_tensor": [(experts,), (experts, 1, 1)],
        "fp8_channel": [(experts, rows, 1)],
        "fp8_block": [(experts, -(-rows // 128), -(-cols // 128))],
    }
    for name, allowed in shapes.items():
        if tuple(scale.shape) in allowed:
            return name
    said = "; ".join(f"{name} {' or '.join(map(str, allowed))}" for name, allowed in shapes.items())
    raise MoEFxOptionError(f"scales {tuple(scale.shape)} of w13 {tuple(codes.shape)} are none of: {said}")


def make_fp8_moe_quant_config(
    backend: Fp8MoeBackend,
    w1_scale: Tensor,
    w2_scale: Tensor,
    a1_scale: Tensor | None = None,
    a2_scale: Tensor | None = None,
    block_shape: list[int] | None = None,
    per_act_token_quant: bool = False,
    per_out_ch_quant: bool = False,
) -> FusedMoEQuantConfig | None:
    """The scales as the backend wants them: weights only (MARLIN, CPU), as the factors of the products and the inverse
    of the inputs' scales (FLASHINFER_CUTLASS with one scale a tensor), not at all (FLASHINFER_TRTLLM takes them with
    the weights: None), else as they are."""
    row = FP8.backend(backend)
    if backend is B.FLASHINFER_TRTLLM:
        return None
    if row.weights_only:
        return fp8_w8a16_moe_quant_config(w1_scale, w2_scale, block_shape, per_out_ch_quant)
    factors: dict[str, Any] = {}
    if backend is B.FLASHINFER_CUTLASS and block_shape is None:
        if a1_scale is None or a2_scale is None:
            raise MoEFxOptionError(f"{backend.name} with one scale a tensor needs a1_scale and a2_scale")
        factors = dict(
            g1_alphas=(w1_scale * a1_scale).squeeze(),
            g2_alphas=(w2_scale * a2_scale).squeeze(),
            a1_gscale=1.0 / a1_scale,
            a2_gscale=1.0 / a2_scale,
        )
    return fp8_w8a8_moe_quant_config(
        w1_scale,
        w2_scale,
        a1_scale,
        a2_scale,
        per_act_token_quant=per_act_token_quant,
        per_out_ch_quant=per_out_ch_quant,
        block_shape=block_shape,
        **factors,
    )


def make_fp8_moe_kernel(
    moe_quant_config: FusedMoEQuantConfig | None,
    moe_config: FusedMoEConfig,
    fp8_backend: Fp8MoeBackend,
    experts_cls: type[FusedMoEExperts] | None = None,
    prepare_finalize: FusedMoEPrepareAndFinalize | None = None,
    **more: Any,
) -> tuple[FusedMoEKernel, bool]:
    """(the kernel, whether its result may take the place of its input).

    experts_cls: None that of the backend.  The rest as ``assemble.make_kernel``.  The input is never overwritten: in a
    traced model others may read it, so the second is False.
    """
    experts = backend_2_kernel_cls(fp8_backend) if experts_cls is None else experts_cls
    return make_kernel(experts, moe_config, moe_quant_config, prepare_finalize, **more), False
