"""From a registered kernel and the weights of a layer to a FusedMoEKernel that runs it on one rank."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from moe_fx.binding import Experts, Matrices, Quantised
from moe_fx.kernels.config import FUSED_MOE_UNQUANTIZED_CONFIG, FusedMoEConfig, FusedMoEQuantConfig
from moe_fx.kernels.config.quant import FusedMoEQuantDesc, Parts
from moe_fx.kernels.experts.torch_experts import Scratch
from moe_fx.kernels.modular_kernel import FusedMoEKernel, FusedMoEPrepareAndFinalize
from moe_fx.kernels.prepare_finalize import (
    BatchedPrepareAndFinalize,
    MonolithicPrepareAndFinalizeNoEP,
    PrepareAndFinalizeNoEP,
)
from moe_fx.kernels.registry import Kernel
from moe_fx.plan import WORKSPACE_BYTES
from moe_fx.quant import QuantKey, QuantSpec
from moe_fx.spec import MoESpec

config_of = lru_cache(maxsize=4096)(FusedMoEConfig.of)  # (spec, dtype of x) → the layer on one rank


def build(
    kernel: Kernel,
    spec: MoESpec,
    experts: Experts,
    dtype: torch.dtype,
    workspace_bytes: int = WORKSPACE_BYTES,
    **more: Any,
) -> FusedMoEKernel:
    """kernel over ``experts`` for x of ``dtype``; more: further arguments of its class."""
    config, quant = config_of(spec, dtype), quant_config(spec.quant, experts)
    made = kernel.experts(config, quant, experts.norm, order=experts.order, **more)
    return FusedMoEKernel(_prepare_finalize(kernel, spec), made, workspace_bytes=workspace_bytes)


def run(
    kernel: Kernel,
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    experts: Experts,
    spec: MoESpec,
    workspace_bytes: int = WORKSPACE_BYTES,
    **more: Any,
) -> Tensor:
    """x [T, H], ids and weights [T, k] → y [T, H], by a modular kernel."""
    built = build(kernel, spec, experts, x.dtype, workspace_bytes, **more)
    y = built.apply(x, experts.up, experts.down, ids, weights, built.experts.moe_config.activation)
    assert isinstance(y, Tensor)
    return y


def trace(kernel: Kernel, x: Tensor, ids: Tensor, weights: Tensor, experts: Experts, spec: MoESpec) -> Tensor:
    """``run`` for a compiler: the ops of the experts alone, without workspaces or writes."""
    made = build(kernel, spec, experts, x.dtype).experts
    nothing = x.new_empty(0)
    return made.compute(x, ids, weights, experts, spec, Scratch(nothing, nothing))


def quant_config(quant: QuantSpec, experts: Experts) -> FusedMoEQuantConfig:
    """Scales, zero points and biases of ``experts``, as a configuration."""
    if not quant and not experts.up_bias and experts.down_bias is None:
        return FUSED_MOE_UNQUANTIZED_CONFIG
    scales = experts.scales
    return FusedMoEQuantConfig(
        _a1=FusedMoEQuantDesc.of(quant.key("a1"), scales.a1, whole=scales.a1_global),
        _a2=FusedMoEQuantDesc.of(quant.key("a2"), scales.a2, whole=scales.a2_global),
        _w1=_described(quant.key("w13"), experts.up[0], experts.up_bias or None),
        _w2=_described(quant.key("w2"), experts.down, experts.down_bias),
    )


def _described(key: QuantKey | None, matrices: Matrices, bias: Parts | None) -> FusedMoEQuantDesc:
    """Of weights; a global scale stays with the matrices, an alpha would hold that of the activations too."""
    scale, zero = (matrices.scale, matrices.zero) if isinstance(matrices, Quantised) else (None, None)
    return FusedMoEQuantDesc.of(key, scale, bias, zero=zero)


def _prepare_finalize(kernel: Kernel, spec: MoESpec) -> FusedMoEPrepareAndFinalize:
    if kernel.capability.monolithic:
        return MonolithicPrepareAndFinalizeNoEP()
    if kernel.capability.batched:
        return BatchedPrepareAndFinalize(None, spec.expert.experts)
    return PrepareAndFinalizeNoEP()
