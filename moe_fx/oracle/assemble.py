"""From a chosen backend to what runs: weights in its layout, the configuration of its scales, the kernel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol

from torch import Tensor

from moe_fx.binding import Vectors
from moe_fx.hardware import Device
from moe_fx.kernels.capability import Scheme
from moe_fx.kernels.config import FUSED_MOE_UNQUANTIZED_CONFIG, FusedMoEConfig, FusedMoEQuantConfig
from moe_fx.kernels.config.quant import FusedMoEQuantDesc
from moe_fx.kernels.layouts.library import LibraryLayout
from moe_fx.kernels.layouts.packed import PackedLayout, find_packed
from moe_fx.kernels.layouts.registry import LIBRARY_LAYOUTS
from moe_fx.kernels.libraries import LIBRARIES
from moe_fx.kernels.modular_kernel import FusedMoEExperts, FusedMoEKernel, FusedMoEPrepareAndFinalize
from moe_fx.kernels.prepare_finalize import (
    BatchedPrepareAndFinalize,
    MonolithicPrepareAndFinalizeNoEP,
    PrepareAndFinalizeNoEP,
)
from moe_fx.kernels.registry import KERNELS
from moe_fx.oracle.backends import M, Oracle, kernel_reasons, quantised
from moe_fx.oracle.conditions import Asked
from moe_fx.quant import QuantKey
from moe_fx.reasons import MoEFxUnsupportedError

PARTNERS = {"w13": "w13_scale", "w13_scale": "w13", "w2": "w2_scale", "w2_scale": "w2"}


class Layer(Protocol):
    """What a conversion has to know of a layer."""

    @property
    def moe_config(self) -> FusedMoEConfig: ...


def layout_of(
    oracle: Oracle[M], backend: M, keys: Scheme, scheme: str, layer: Layer, device: Device
) -> PackedLayout | None:
    """How the weights of that backend lie; None: as the model has them.

    That of the kernel which runs it on ``device``; where none does (packing for another machine), the row ``scheme`` of
    its first library.  MoEFxUnsupportedError lists the known rows.
    """
    row, config = oracle.backend(backend), layer.moe_config
    asked = Asked(config, device, row.question_scheme(keys))
    for name in row.kernels:
        if not kernel_reasons(name, asked.scheme, asked):
            spec = quantised(config.mathematics, asked.scheme)
            own = LIBRARY_LAYOUTS.get(KERNELS[name].experts.layout_for(spec))
            return own.row if isinstance(own, LibraryLayout) else None
    of = LIBRARIES[row.kernels[0]].layout if row.kernels and row.kernels[0] in LIBRARIES else ""
    try:
        return find_packed(of, scheme) if of else None
    except KeyError as error:
        raise MoEFxUnsupportedError(str(error.args[0])) from error


def packed(row: PackedLayout | None, tensors: Mapping[str, Tensor], layer: Layer) -> dict[str, Tensor]:
    """Canonical tensors of all experts [E, …] by role → packed ones; what the layout leaves alone is not copied.

    Raises MoEFxUnsupportedError for a role that the kernel does not take, and for ungated experts where something has
    to be packed.
    """
    if row is None:
        return dict(tensors)
    if left := [role for role in tensors if role not in row.chains]:
        raise MoEFxUnsupportedError(f"{row.backend} takes no {' and '.join(left)} of {row.scheme}")
    if not layer.moe_config.is_act_and_mul and any(map(row.copies, tensors)):
        raise MoEFxUnsupportedError(f"{row.backend} packs {row.scheme} weights, and has no layout for ungated experts")
    partners = {role: tensors.get(PARTNERS.get(role, "")) for role in tensors}
    return {r: row.pack(r, t, partners[r]) if row.copies(r) else t for r, t in tensors.items()}


def fitted(row: PackedLayout, tensors: Mapping[str, Tensor]) -> PackedLayout:
    """The row with what its steps need to know of all experts together."""
    for role in row.chains.keys() & tensors.keys():
        row = row.fitted(role, tensors[role])
    return row


def described(
    weights: QuantKey | None,
    inputs: QuantKey | None,
    w1_scale: Vectors | None,
    w2_scale: Vectors | None,
    a1_scale: Tensor | None = None,
    a2_scale: Tensor | None = None,
    **more: Any,
) -> FusedMoEQuantConfig:
    """The configuration of a scheme by its keys.  more: ``w1_gscale``, ``w2_gscale``, ``a1_gscale``, ``a2_gscale``
    (second factors), ``w1_bias``, ``w2_bias``, ``w1_zp``, ``w2_zp``."""
    of = FusedMoEQuantDesc.of
    w1 = of(weights, w1_scale, more.get("w1_bias"), more.get("w1_gscale"))
    w2 = of(weights, w2_scale, more.get("w2_bias"), more.get("w2_gscale"))
    return FusedMoEQuantConfig(
        _a1=of(inputs, a1_scale, whole=more.get("a1_gscale")),
        _a2=of(inputs, a2_scale, whole=more.get("a2_gscale")),
        _w1=replace(w1, zp=more.get("w1_zp")),
        _w2=replace(w2, zp=more.get("w2_zp")),
    )


def make_kernel(
    experts: type[FusedMoEExperts],
    config: FusedMoEConfig,
    quant: FusedMoEQuantConfig | None,
    prepare_finalize: FusedMoEPrepareAndFinalize | None = None,
    **more: Any,
) -> FusedMoEKernel:
    """experts over the layer ``config``.

    prepare_finalize: None: tokens stay on this rank; MoEFxUnsupportedError where ``config`` sends them to others.
    more: further arguments of FusedMoEKernel (``shared_experts``, ``workspace_bytes``).
    """
    quant = FUSED_MOE_UNQUANTIZED_CONFIG if quant is None else quant
    between = _stays(experts, config) if prepare_finalize is None else prepare_finalize
    if not experts.capability.batched:
        return FusedMoEKernel(between, experts.make_standard_experts(config, quant), **more)
    most = between.max_num_tokens_per_rank() or config.max_num_tokens
    made = experts.make_batched_experts(config, quant, most, between.num_dispatchers())
    return FusedMoEKernel(between, made, **more)


def _stays(experts: type[FusedMoEExperts], config: FusedMoEConfig) -> FusedMoEPrepareAndFinalize:
    parallel = config.moe_parallel_config
    if parallel.use_all2all_kernels:
        raise MoEFxUnsupportedError(
            f"tokens travel by {parallel.all2all_backend}: pass the prepare_finalize that carries them"
        )
    if experts.capability.monolithic:
        return MonolithicPrepareAndFinalizeNoEP()
    if experts.capability.batched:
        return BatchedPrepareAndFinalize(config.max_num_tokens, config.num_local_experts)
    return PrepareAndFinalizeNoEP()
