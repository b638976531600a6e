"""Backends of layers with weights in groups of int4 or int8, activations as they are (GPTQ, AWQ, …).

Left out: the kernel for RDNA3, of which too little is known here.
"""

from __future__ import annotations

from enum import Enum

from torch import Tensor

from moe_fx.hardware import Device, detect
from moe_fx.kernels.config import FusedMoEConfig, FusedMoEQuantConfig
from moe_fx.kernels.config.schemes import int4_w4a16_moe_quant_config, int8_w8a16_moe_quant_config
from moe_fx.kernels.modular_kernel import FusedMoEExperts
from moe_fx.oracle.assemble import Layer, layout_of, packed
from moe_fx.oracle.backends import OURS, Backend, Move, Oracle, Order
from moe_fx.oracle.conditions import HOPPER, Asked, on, this_device
from moe_fx.quant import QuantKey, int_group
from moe_fx.reasons import MoEFxUnsupportedError


class IntWNA16MoeBackend(Enum):
    ZEN_CPU = "zen_cpu"
    CPU = "cpu"
    XPU = "xpu"
    FLASHINFER_TRTLLM = "flashinfer_trtllm"
    MARLIN = "marlin"
    BATCHED_MARLIN = "batched_marlin"
    TRITON = "triton"
    HUMMING = "humming"
    EMULATION = "emulation"


B = IntWNA16MoeBackend
TABLE: tuple[Backend[B], ...] = (
    Backend(B.ZEN_CPU, ("zentorch_int4",), where=on("cpu")),
    Backend(B.CPU, ("vllm_cpu_int4", *OURS), where=on("cpu")),
    Backend(B.XPU, ("xpu_int4",), where=on("xpu")),
    Backend(B.FLASHINFER_TRTLLM, ("flashinfer_trtllm_mxint4_monolithic",)),
    Backend(B.MARLIN, ("marlin",), twin=B.BATCHED_MARLIN),
    Backend(B.BATCHED_MARLIN, ("batched_marlin",)),
    Backend(B.TRITON, ("triton_wna16",)),
    Backend(B.HUMMING, ("humming", "batched_humming")),
    Backend(B.EMULATION, OURS),
)
ORDER = Order(
    (
        B.ZEN_CPU,
        B.CPU,
        B.XPU,
        B.FLASHINFER_TRTLLM,
        B.MARLIN,
        B.BATCHED_MARLIN,
        B.TRITON,
        B.HUMMING,
        B.EMULATION,
    ),
    (Move((B.HUMMING,), "before", (HOPPER,), B.MARLIN),),
)
SCHEMES = (
    (int_group(4, 128), None),
    (int_group(4, 32), None),
    (int_group(4, 128, zero_points=True), None),
    (int_group(8, 128), None),
)
INT_WNA16 = Oracle("int_wna16", TABLE, {"seed": ORDER, "today": ORDER}, SCHEMES)


def map_int_wna16_backend(name: str) -> IntWNA16MoeBackend:
    """The backend that ``moe_backend`` calls ``name``; MoEFxOptionError lists the known names."""
    return INT_WNA16.map(name)


def backend_2_kernel_cls(backend: IntWNA16MoeBackend) -> type[FusedMoEExperts]:
    """The experts class of a backend; MoEFxUnsupportedError says which kernel is missing."""
    return INT_WNA16.kernel_class(backend)


def select_int_wna16_moe_backend(
    config: FusedMoEConfig, weight_key: QuantKey, *, device: Device | None = None
) -> tuple[IntWNA16MoeBackend, type[FusedMoEExperts] | None]:
    """(backend, experts class).  device: None this machine's.  Raises as ``Oracle.select`` does."""
    selection = INT_WNA16.select(Asked(config, device or this_device(), (weight_key, None)))
    return selection.backend, selection.experts_class


def convert_to_int_wna16_moe_kernel_format(
    backend: IntWNA16MoeBackend,
    layer: Layer,
    weight_key: QuantKey,
    w13: Tensor,
    w2: Tensor,
    w13_scale: Tensor,
    w2_scale: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Canonical codes and scales of ``weight_key`` → the same four as the backend reads them.  MoEFxUnsupportedError
    for zero points and for a backend whose layout is not known."""
    group = "channel" if weight_key.group.col == -1 else weight_key.group.col
    scheme = f"{weight_key.dtype}_{group}"
    row = layout_of(INT_WNA16, backend, (weight_key, None), scheme, layer, detect(w13.device))
    if row is not None and weight_key.zero_points:
        raise MoEFxUnsupportedError(f"{backend.name} packs its weights, and no packed layout is for zero points")
    tensors = {"w13": w13, "w2": w2, "w13_scale": w13_scale, "w2_scale": w2_scale}
    out = packed(row, tensors, layer)
    return out["w13"], out["w2"], out["w13_scale"], out["w2_scale"]


def make_int_wna16_moe_quant_config(
    backend: IntWNA16MoeBackend,
    weight_key: QuantKey,
    w1_scale: Tensor,
    w2_scale: Tensor,
    w1_zp: Tensor | None = None,
    w2_zp: Tensor | None = None,
) -> FusedMoEQuantConfig:
    """Scales and zero points of weights as ``weight_key`` says."""
    INT_WNA16.backend(backend)
    make = {"int4": int4_w4a16_moe_quant_config, "int8": int8_w8a16_moe_quant_config}[weight_key.dtype]
    block = None if weight_key.group.col == -1 else [1, weight_key.group.col]
    return make(w1_scale, w2_scale, w1_zp, w2_zp, block)
