"""Backends of layers with mxfp4 weights: e2m1 codes with a power of two for 32 elements (gpt-oss, DeepSeek-V4).

A backend has its activations in its name or in INPUTS.  Those that leave activations as they are also serve a layer
whose activations should be rounded, behind all that round them: nothing is less exact.
Orders: "seed" and "today" are that for gpt-oss, "deepseek_v4" is for its fp8 activations in groups of 128.
"""

from __future__ import annotations

from enum import Enum

from torch import Tensor

from moe_fx.hardware import Device, detect
from moe_fx.kernels.config import FusedMoEConfig, FusedMoEQuantConfig
from moe_fx.kernels.modular_kernel import FusedMoEExperts
from moe_fx.oracle.assemble import Layer, described, layout_of, packed
from moe_fx.oracle.backends import OURS, Backend, Move, Oracle, Order, Refusal
from moe_fx.oracle.conditions import BLACKWELL_RTX, LORA, ROUNDED, Asked, on, this_device
from moe_fx.quant import FP8_GROUP, FP8_TENSOR, MXFP4, MXFP4_DYNAMIC, MXFP8_DYNAMIC, QuantKey


class Mxfp4MoeBackend(Enum):
    NONE = "none"
    FLASHINFER_TRTLLM_BF16 = "flashinfer_trtllm_bf16"
    FLASHINFER_TRTLLM_MXFP8 = "flashinfer_trtllm_mxfp8"
    AITER_MXFP4_BF16 = "aiter_mxfp4_bf16"
    AITER_TRITON_BF16 = "aiter_triton_bf16"
    AITER_FP8 = "aiter_fp8"
    AITER_MXFP4 = "aiter_mxfp4"
    TRITON = "triton"
    TRITON_UNFUSED = "triton_unfused"
    FLASHINFER_CUTLASS_BF16 = "flashinfer_cutlass_bf16"
    FLASHINFER_CUTLASS_MXFP8 = "flashinfer_cutlass_mxfp8"
    CUTLASS_MXFP4 = "cutlass_mxfp4"
    DEEPGEMM_MXFP4 = "deepgemm_mxfp4"
    MARLIN = "marlin"
    BATCHED_MARLIN = "batched_marlin"
    HUMMING = "humming"
    XPU = "xpu"
    CPU = "cpu"
    EMULATION = "emulation"


B = Mxfp4MoeBackend
TABLE: tuple[Backend[B], ...] = (
    Backend(
        B.FLASHINFER_TRTLLM_BF16,
        ("flashinfer_trtllm_mxfp4_monolithic", "flashinfer_trtllm_mxfp4"),
        ("flashinfer_trtllm",),
        weights_only=True,
    ),
    Backend(
        B.FLASHINFER_TRTLLM_MXFP8,
        ("flashinfer_trtllm_mxfp4_mxfp8_monolithic", "flashinfer_trtllm_mxfp4_mxfp8"),
        ("flashinfer_trtllm_afp8",),
    ),
    Backend(B.AITER_MXFP4_BF16, ("aiter_mxfp4_bf16",), ("aiter",), weights_only=True),
    Backend(B.AITER_TRITON_BF16, ("aiter_triton_mxfp4_bf16",), ("aiter_triton_mxfp4_bf16",), weights_only=True),
    Backend(B.AITER_FP8, ("aiter_mxfp4_fp8",)),
    Backend(B.AITER_MXFP4, ("aiter_mxfp4",)),
    Backend(
        B.TRITON,
        ("triton_kernels_monolithic", "triton_kernels"),
        lora=("triton_kernels_unfused",),
        weights_only=True,
    ),
    Backend(B.TRITON_UNFUSED, ("triton_kernels_unfused",), weights_only=True),
    Backend(B.FLASHINFER_CUTLASS_BF16, ("flashinfer_cutlass_mxfp4",), ("flashinfer_cutlass",), weights_only=True),
    Backend(B.FLASHINFER_CUTLASS_MXFP8, ("flashinfer_cutlass_mxfp4_mxfp8",), ("flashinfer_cutlass_afp8",)),
    Backend(B.CUTLASS_MXFP4, ("vllm_cutlass_mxfp4",), ("cutlass",)),
    Backend(B.DEEPGEMM_MXFP4, ("deepgemm_mxfp4",), ("deep_gemm",)),
    Backend(B.MARLIN, ("marlin",), twin=B.BATCHED_MARLIN, weights_only=True),
    Backend(B.BATCHED_MARLIN, ("batched_marlin",), weights_only=True),
    Backend(B.HUMMING, ("humming", "batched_humming"), weights_only=True),
    Backend(B.XPU, ("xpu_mxfp4",), where=on("xpu"), weights_only=True),
    Backend(B.CPU, ("vllm_cpu_mxfp4", *OURS), where=on("cpu"), weights_only=True),
    Backend(B.EMULATION, OURS),
)
PLAIN_INPUTS = tuple(row.member for row in TABLE if row.weights_only)
INPUTS: dict[B, QuantKey] = {
    B.FLASHINFER_TRTLLM_MXFP8: MXFP8_DYNAMIC,
    B.FLASHINFER_CUTLASS_MXFP8: MXFP8_DYNAMIC,
    B.AITER_FP8: FP8_TENSOR,
    B.AITER_MXFP4: MXFP4_DYNAMIC,
    B.CUTLASS_MXFP4: MXFP4_DYNAMIC,
    B.DEEPGEMM_MXFP4: FP8_GROUP,
}
SCHEME_OF = {  # the rows of kernels.layouts.packed that are not called mxfp4
    B.FLASHINFER_CUTLASS_MXFP8: "mxfp4_mxfp8",
    B.AITER_MXFP4_BF16: "mxfp4_bf16",
}
ADAPTERS = Refusal(
    "veto.lora",
    "experts with LoRA adapters run on MARLIN or TRITON",
    (LORA,),
    but=(B.MARLIN, B.TRITON, B.TRITON_UNFUSED),
)
GPT_OSS = Order(
    (
        B.FLASHINFER_TRTLLM_BF16,
        B.FLASHINFER_TRTLLM_MXFP8,
        B.AITER_MXFP4_BF16,
        B.AITER_TRITON_BF16,
        B.AITER_FP8,
        B.AITER_MXFP4,
        B.TRITON,
        B.FLASHINFER_CUTLASS_BF16,
        B.FLASHINFER_CUTLASS_MXFP8,
        B.CUTLASS_MXFP4,
        B.MARLIN,
        B.BATCHED_MARLIN,
        B.HUMMING,
        B.XPU,
        B.CPU,
        B.EMULATION,
    ),
    (
        Move((B.TRITON,), "after", (BLACKWELL_RTX,), B.BATCHED_MARLIN),
        Move((*PLAIN_INPUTS, B.EMULATION), "back", (ROUNDED,)),
        Move((B.MARLIN,), "front", (LORA,)),
    ),
    (ADAPTERS,),
)
DEEPSEEK_V4 = Order(
    (B.FLASHINFER_TRTLLM_MXFP8, B.DEEPGEMM_MXFP4, B.MARLIN, B.BATCHED_MARLIN, B.HUMMING),
    refusals=(ADAPTERS,),
)
MX4 = Oracle(
    "mxfp4",
    TABLE,
    {"seed": GPT_OSS, "today": GPT_OSS, "deepseek_v4": DEEPSEEK_V4},
    ((MXFP4, None), *((MXFP4, key) for key in dict.fromkeys(INPUTS.values()))),
    nothing=B.NONE,
)


def map_mxfp4_backend(name: str) -> Mxfp4MoeBackend:
    """The backend that ``moe_backend`` calls ``name``; MoEFxOptionError lists the known names."""
    return MX4.map(name)


def backend_2_kernel_cls(backend: Mxfp4MoeBackend) -> type[FusedMoEExperts]:
    """The experts class of a backend; MoEFxUnsupportedError says which kernel is missing."""
    return MX4.kernel_class(backend)


def select_mxfp4_moe_backend(
    config: FusedMoEConfig,
    activation_key: QuantKey | None = None,
    *,
    order: str = "seed",
    device: Device | None = None,
) -> tuple[Mxfp4MoeBackend, type[FusedMoEExperts] | None]:
    """(backend, experts class), (NONE, None) where nothing fits on a device that is no GPU.

    order: "seed", "today" or "deepseek_v4".  device: None this machine's.  Raises as ``Oracle.select`` does.
    """
    selection = MX4.select(Asked(config, device or this_device(), (MXFP4, activation_key)), order)
    return selection.backend, selection.experts_class


def convert_to_mxfp4_moe_kernel_format(
    backend: Mxfp4MoeBackend,
    layer: Layer,
    w13: Tensor,
    w2: Tensor,
    w13_scale: Tensor,
    w2_scale: Tensor,
    w13_bias: Tensor | None = None,
    w2_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Canonical codes (two a byte), scales [E, rows, cols / 32] and biases [E, rows] → the same six as the backend
    reads them.  MoEFxUnsupportedError for a backend whose layout is not known."""
    biases = {role: bias for role, bias in (("w13_bias", w13_bias), ("w2_bias", w2_bias)) if bias is not None}
    tensors = {"w13": w13, "w2": w2, "w13_scale": w13_scale, "w2_scale": w2_scale, **biases}
    keys, scheme = (MXFP4, INPUTS.get(backend)), SCHEME_OF.get(backend, "mxfp4")
    out = packed(layout_of(MX4, backend, keys, scheme, layer, detect(w13.device)), tensors, layer)
    return out["w13"], out["w2"], out["w13_scale"], out["w2_scale"], out.get("w13_bias"), out.get("w2_bias")


def make_mxfp4_moe_quant_config(
    backend: Mxfp4MoeBackend,
    w1_scale: Tensor,
    w2_scale: Tensor,
    w1_bias: Tensor | None = None,
    w2_bias: Tensor | None = None,
    a1_scale: Tensor | None = None,
    a2_scale: Tensor | None = None,
) -> FusedMoEQuantConfig:
    """Scales and biases of the weights; activations as the backend rounds them (INPUTS; a1_scale, a2_scale: given ones,
    which AITER_FP8 needs)."""
    MX4.backend(backend)
    inputs = INPUTS.get(backend)
    return described(MXFP4, inputs, w1_scale, w2_scale, a1_scale, a2_scale, w1_bias=w1_bias, w2_bias=w2_bias)
