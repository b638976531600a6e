"""Backends of layers with weights in groups of int4 and fp8 activations."""

from __future__ import annotations

from enum import Enum

from torch import Tensor

from moe_fx.hardware import Device
from moe_fx.kernels.config import FusedMoEConfig, FusedMoEQuantConfig
from moe_fx.kernels.modular_kernel import FusedMoEExperts
from moe_fx.oracle.assemble import described
from moe_fx.oracle.backends import Backend, Oracle, Order
from moe_fx.oracle.conditions import Asked, this_device
from moe_fx.quant import FP8_TOKEN, QuantKey, int_group


class W4A8MoeBackend(Enum):
    CUTLASS = "cutlass"
    HUMMING = "humming"


B = W4A8MoeBackend
WEIGHTS = int_group(4, 128)
TABLE: tuple[Backend[B], ...] = (
    Backend(B.CUTLASS, ("vllm_cutlass_w4a8",)),
    Backend(B.HUMMING, ("humming_fp8",)),
)
ORDER = Order((B.CUTLASS, B.HUMMING))
W4A8 = Oracle("w4a8", TABLE, {"seed": ORDER, "today": ORDER}, ((WEIGHTS, FP8_TOKEN),))


def map_w4a8_backend(name: str) -> W4A8MoeBackend:
    """The backend that ``moe_backend`` calls ``name``; MoEFxOptionError lists the known names."""
    return W4A8.map(name)


def backend_2_kernel_cls(backend: W4A8MoeBackend) -> type[FusedMoEExperts]:
    """The experts class of a backend; MoEFxUnsupportedError says which kernel is missing."""
    return W4A8.kernel_class(backend)


def select_w4a8_moe_backend(
    config: FusedMoEConfig,
    weight_key: QuantKey | None = WEIGHTS,
    activation_key: QuantKey | None = FP8_TOKEN,
    *,
    device: Device | None = None,
) -> tuple[W4A8MoeBackend, type[FusedMoEExperts] | None]:
    """(backend, experts class).  device: None this machine's.  Raises as ``Oracle.select`` does."""
    selection = W4A8.select(Asked(config, device or this_device(), (weight_key, activation_key)))
    return selection.backend, selection.experts_class


def make_w4a8_moe_quant_config(backend: W4A8MoeBackend, w1_scale: Tensor, w2_scale: Tensor) -> FusedMoEQuantConfig:
    """Scales of weights in groups of 128; activations get one a token."""
    W4A8.backend(backend)
    return described(WEIGHTS, FP8_TOKEN, w1_scale, w2_scale)
