"""Backends of nvfp4 layers: e2m1 codes with an e4m3 scale for 16 elements and a float a matrix."""

from __future__ import annotations

from enum import Enum
from typing import Any

from torch import Tensor

from moe_fx.hardware import Device, detect
from moe_fx.kernels.config import FusedMoEConfig, FusedMoEQuantConfig
from moe_fx.kernels.config.schemes import nvfp4_moe_quant_config
from moe_fx.kernels.layouts.transforms import MarlinS0E5M3
from moe_fx.kernels.modular_kernel import FusedMoEExperts
from moe_fx.oracle.assemble import Layer, described, fitted, layout_of, packed
from moe_fx.oracle.backends import OURS, Backend, Oracle, Order
from moe_fx.oracle.conditions import Asked, this_device
from moe_fx.quant import NVFP4, NVFP4_DYNAMIC, QuantKey
from moe_fx.reasons import MoEFxOptionError


class NvFp4MoeBackend(Enum):
    FLASHINFER_TRTLLM = "flashinfer_trtllm"
    FLASHINFER_CUTEDSL = "flashinfer_cutedsl"
    FLASHINFER_CUTEDSL_BATCHED = "flashinfer_cutedsl_batched"
    FLASHINFER_CUTLASS = "flashinfer_cutlass"
    VLLM_CUTLASS = "vllm_cutlass"
    MARLIN = "marlin"
    HUMMING = "humming"
    EMULATION = "emulation"


B = NvFp4MoeBackend
TABLE: tuple[Backend[B], ...] = (
    Backend(B.FLASHINFER_TRTLLM, ("flashinfer_trtllm_nvfp4_monolithic", "flashinfer_trtllm_nvfp4")),
    Backend(B.FLASHINFER_CUTEDSL, ("flashinfer_cutedsl",), twin=B.FLASHINFER_CUTEDSL_BATCHED),
    Backend(B.FLASHINFER_CUTEDSL_BATCHED, ("batched_flashinfer_cutedsl",)),
    Backend(B.FLASHINFER_CUTLASS, ("flashinfer_cutlass_nvfp4",)),
    Backend(B.VLLM_CUTLASS, ("vllm_cutlass_nvfp4",), ("cutlass",)),
    Backend(B.MARLIN, ("marlin",), weights_only=True),
    Backend(B.HUMMING, ("humming", "batched_humming"), weights_only=True),
    Backend(B.EMULATION, OURS),
)
ORDER = Order(
    (
        B.FLASHINFER_TRTLLM,
        B.FLASHINFER_CUTEDSL,
        B.FLASHINFER_CUTEDSL_BATCHED,
        B.FLASHINFER_CUTLASS,
        B.VLLM_CUTLASS,
        B.MARLIN,
        B.HUMMING,
        B.EMULATION,
    )
)
NV = Oracle("nvfp4", TABLE, {"seed": ORDER, "today": ORDER}, ((NVFP4, NVFP4_DYNAMIC), (NVFP4, None)))


def map_nvfp4_backend(name: str) -> NvFp4MoeBackend:
    """The backend that ``moe_backend`` calls ``name``; MoEFxOptionError lists the known names."""
    return NV.map(name)


def backend_2_kernel_cls(backend: NvFp4MoeBackend) -> type[FusedMoEExperts]:
    """The experts class of a backend; MoEFxUnsupportedError says which kernel is missing."""
    return NV.kernel_class(backend)


def select_nvfp4_moe_backend(
    config: FusedMoEConfig,
    weight_key: QuantKey | None = NVFP4,
    activation_key: QuantKey | None = NVFP4_DYNAMIC,
    *,
    device: Device | None = None,
) -> tuple[NvFp4MoeBackend, type[FusedMoEExperts] | None]:
    """(backend, experts class).  device: None this machine's.  Raises as ``Oracle.select`` does."""
    selection = NV.select(Asked(config, device or this_device(), (weight_key, activation_key)))
    return selection.backend, selection.experts_class


def convert_to_nvfp4_moe_kernel_format(
    backend: NvFp4MoeBackend,
    layer: Layer,
    w13: Tensor,
    w2: Tensor,
    w13_scale: Tensor,
    w2_scale: Tensor,
    w13_scale_2: Tensor,
    w2_scale_2: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Canonical codes (two a byte), scales [E, rows, cols / 16] and global scales [E] → the same six as the backend
    reads them; Marlin's scales are lifted, and its global scales lowered, by a power of two."""
    tensors = {"w13": w13, "w2": w2, "w13_scale": w13_scale, "w2_scale": w2_scale}
    found = layout_of(NV, backend, (NVFP4, NVFP4_DYNAMIC), "nvfp4", layer, detect(w13.device))
    if found is None:
        return w13, w2, w13_scale, w2_scale, w13_scale_2, w2_scale_2
    row = fitted(found, tensors)
    out = packed(row, tensors, layer)
    last = {role: row.chain(role)[-1] for role in ("w13_scale", "w2_scale")}
    lifted = {role: step.factor if isinstance(step, MarlinS0E5M3) else 1.0 for role, step in last.items()}
    whole = w13_scale_2 / lifted["w13_scale"], w2_scale_2 / lifted["w2_scale"]
    return out["w13"], out["w2"], out["w13_scale"], out["w2_scale"], *whole


def make_nvfp4_moe_quant_config(
    backend: NvFp4MoeBackend,
    w13_scale: Tensor,
    w2_scale: Tensor,
    w13_scale_2: Tensor,
    w2_scale_2: Tensor,
    a13_scale: Tensor | None = None,
    a2_scale: Tensor | None = None,
) -> FusedMoEQuantConfig:
    """w13_scale_2, w2_scale_2: global scales of the weights [E]; a13_scale, a2_scale: of the activations, one float.

    Libraries get the factors of both products (g = weights' * activations') and the inverse of the activations'; MARLIN
    and HUMMING, which round no activations, and our own kernels get the scales as they are.
    """
    row = NV.backend(backend)
    plain: dict[str, Any] = dict(w1_gscale=w13_scale_2, w2_gscale=w2_scale_2)
    if row.weights_only:
        return described(NVFP4, None, w13_scale, w2_scale, **plain)
    if a13_scale is None or a2_scale is None:
        raise MoEFxOptionError(f"{backend.name} rounds activations and needs their global scales: a13_scale, a2_scale")
    if backend is B.EMULATION:
        plain |= dict(a1_gscale=a13_scale, a2_gscale=a2_scale)
        return described(NVFP4, NVFP4_DYNAMIC, w13_scale, w2_scale, **plain)
    alphas = w13_scale_2 * a13_scale, w2_scale_2 * a2_scale
    return nvfp4_moe_quant_config(*alphas, 1.0 / a13_scale, 1.0 / a2_scale, w13_scale, w2_scale)
