"""Backends of mxfp8 layers: e4m3 codes with a power of two for 32 elements, of weights and activations."""

from __future__ import annotations

from torch import Tensor

from moe_fx.hardware import Device, detect
from moe_fx.kernels.config import FusedMoEConfig, FusedMoEQuantConfig
from moe_fx.kernels.modular_kernel import FusedMoEExperts
from moe_fx.oracle.assemble import Layer, described, layout_of, packed
from moe_fx.oracle.backends import OURS, Backend, Move, Oracle, Order
from moe_fx.oracle.conditions import HOPPER, Asked, on, this_device
from moe_fx.oracle.fp8 import Fp8MoeBackend
from moe_fx.quant import MXFP8, MXFP8_DYNAMIC

B = Fp8MoeBackend
TABLE: tuple[Backend[B], ...] = (
    Backend(B.FLASHINFER_TRTLLM, ("flashinfer_trtllm_fp8_monolithic", "flashinfer_trtllm_fp8")),
    Backend(B.DEEPGEMM, ("deepgemm_mxfp8",), ("deep_gemm",)),
    Backend(B.MARLIN, ("marlin",), weights_only=True),
    Backend(B.XPU, ("xpu_mxfp8",), where=on("xpu")),
    Backend(B.AITER_MXFP8, ("aiter_mxfp8",), ("aiter",)),
    Backend(B.HUMMING, ("humming_fp8",)),
    Backend(B.TRITON_MXFP8, ("triton_mxfp8",), ("triton",)),
    Backend(B.EMULATION, OURS),
)
ORDER = Order(
    (
        B.FLASHINFER_TRTLLM,
        B.DEEPGEMM,
        B.MARLIN,
        B.XPU,
        B.AITER_MXFP8,
        B.HUMMING,
        B.TRITON_MXFP8,
        B.EMULATION,
    ),
    (Move((B.HUMMING,), "before", (HOPPER,), B.MARLIN),),
)
MX8 = Oracle("mxfp8", TABLE, {"seed": ORDER, "today": ORDER}, ((MXFP8, MXFP8_DYNAMIC),))


def map_mxfp8_backend(name: str) -> Fp8MoeBackend:
    """The backend that ``moe_backend`` calls ``name``; MoEFxOptionError lists the known names."""
    return MX8.map(name)


def backend_2_kernel_cls(backend: Fp8MoeBackend) -> type[FusedMoEExperts]:
    """The experts class of a backend; MoEFxUnsupportedError says which kernel is missing."""
    return MX8.kernel_class(backend)


def select_mxfp8_moe_backend(
    config: FusedMoEConfig, *, device: Device | None = None
) -> tuple[Fp8MoeBackend, type[FusedMoEExperts] | None]:
    """(backend, experts class).  device: None this machine's.  Raises as ``Oracle.select`` does."""
    selection = MX8.select(Asked(config, device or this_device(), (MXFP8, MXFP8_DYNAMIC)))
    return selection.backend, selection.experts_class


def convert_to_mxfp8_moe_kernel_format(
    backend: Fp8MoeBackend, layer: Layer, w13: Tensor, w2: Tensor, w13_scale: Tensor, w2_scale: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Canonical codes in float8_e4m3fn and scales [E, rows, cols / 32] → the same four as the backend reads them."""
    tensors = {"w13": w13, "w2": w2, "w13_scale": w13_scale, "w2_scale": w2_scale}
    row = layout_of(MX8, backend, (MXFP8, MXFP8_DYNAMIC), "mxfp8", layer, detect(w13.device))
    out = packed(row, tensors, layer)
    return out["w13"], out["w2"], out["w13_scale"], out["w2_scale"]


def make_mxfp8_moe_quant_config(backend: Fp8MoeBackend, w1_scale: Tensor, w2_scale: Tensor) -> FusedMoEQuantConfig:
    """Scales of the weights; activations get theirs from the values, or stay as they are (MARLIN)."""
    inputs = None if MX8.backend(backend).weights_only else MXFP8_DYNAMIC
    return described(MXFP8, inputs, w1_scale, w2_scale)
