"""Backends of layers with int8 weights and int8 activations."""

from __future__ import annotations

from enum import Enum

from torch import Tensor

from moe_fx.hardware import Device, detect
from moe_fx.kernels.config import FusedMoEConfig, FusedMoEQuantConfig
from moe_fx.kernels.config.schemes import int8_w8a8_moe_quant_config
from moe_fx.kernels.modular_kernel import FusedMoEExperts
from moe_fx.oracle.assemble import Layer, layout_of, packed
from moe_fx.oracle.backends import OURS, Backend, Oracle, Order
from moe_fx.oracle.conditions import Asked, on, this_device
from moe_fx.quant import INT8_CHANNEL, INT8_DYNAMIC, INT8_TENSOR, INT8_TOKEN, QuantKey


class Int8MoeBackend(Enum):
    TRITON = "triton"
    HUMMING = "humming"
    CPU = "cpu"


B = Int8MoeBackend
TABLE: tuple[Backend[B], ...] = (
    Backend(B.TRITON, ("triton_int8",)),
    Backend(B.HUMMING, ("humming",)),
    Backend(B.CPU, ("zentorch", "vllm_cpu_int8", *OURS), where=on("cpu")),
)
ORDER = Order((B.TRITON, B.HUMMING, B.CPU))
SCHEMES = ((INT8_CHANNEL, INT8_TOKEN), (INT8_TENSOR, INT8_DYNAMIC))
INT8 = Oracle("int8", TABLE, {"seed": ORDER, "today": ORDER}, SCHEMES)


def map_int8_backend(name: str) -> Int8MoeBackend:
    """The backend that ``moe_backend`` calls ``name``; MoEFxOptionError lists the known names."""
    return INT8.map(name)


def backend_2_kernel_cls(backend: Int8MoeBackend) -> type[FusedMoEExperts]:
    """The experts class of a backend; MoEFxUnsupportedError says which kernel is missing."""
    return INT8.kernel_class(backend)


def select_int8_moe_backend(
    config: FusedMoEConfig,
    weight_key: QuantKey | None = INT8_CHANNEL,
    activation_key: QuantKey | None = INT8_TOKEN,
    *,
    device: Device | None = None,
) -> tuple[Int8MoeBackend, type[FusedMoEExperts] | None]:
    """(backend, experts class).  device: None this machine's.  Raises as ``Oracle.select`` does."""
    selection = INT8.select(Asked(config, device or this_device(), (weight_key, activation_key)))
    return selection.backend, selection.experts_class


def convert_to_int8_moe_kernel_format(
    backend: Int8MoeBackend, layer: Layer, w13: Tensor, w2: Tensor, w13_scale: Tensor, w2_scale: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Canonical weights in int8 and their scales (one a tensor [E, 1, 1] or an output channel [E, rows, 1]) → the same
    four as the backend reads them."""
    scheme = "int8_channel" if w13_scale.shape[1] == w13.shape[1] else "int8_tensor"
    tensors = {"w13": w13, "w2": w2, "w13_scale": w13_scale, "w2_scale": w2_scale}
    keys = (INT8_CHANNEL, INT8_TOKEN) if scheme == "int8_channel" else (INT8_TENSOR, INT8_DYNAMIC)
    out = packed(layout_of(INT8, backend, keys, scheme, layer, detect(w13.device)), tensors, layer)
    return out["w13"], out["w2"], out["w13_scale"], out["w2_scale"]


def make_int8_moe_quant_config(
    backend: Int8MoeBackend,
    w1_scale: Tensor,
    w2_scale: Tensor,
    a1_scale: Tensor | None = None,
    a2_scale: Tensor | None = None,
    per_act_token_quant: bool = False,
) -> FusedMoEQuantConfig:
    """per_act_token_quant: one scale a token, and one an output channel of the weights; else one a tensor."""
    INT8.backend(backend)
    return int8_w8a8_moe_quant_config(w1_scale, w2_scale, a1_scale, a2_scale, per_act_token_quant=per_act_token_quant)
