"""Experts in PyTorch ops over any storage: the contract of the modular kernel on one side, ``compute`` on the other.

A kernel of ours is a subclass with ``compute``; it reads the model's weights as ``Experts`` views them, and the
mathematics from the spec.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moe_fx.binding import Experts, InputScales, Matrices, Order, Quantised, Vectors
from moe_fx.kernels.capability import RowSchemes
from moe_fx.kernels.config import (
    FUSED_MOE_UNQUANTIZED_CONFIG,
    FusedMoEConfig,
    FusedMoEQuantConfig,
    activation_name,
)
from moe_fx.kernels.config.moe import FIELD_ACTIVATIONS, FIELD_PARAMS
from moe_fx.kernels.config.quant import FusedMoEQuantDesc
from moe_fx.kernels.experts.backward import experts_backward
from moe_fx.kernels.modular_kernel.experts import FusedMoEExpertsModular, Shape, Up
from moe_fx.kernels.modular_kernel.formats import ExpertTokensMetadata
from moe_fx.kernels.prepare_finalize.inputs import local_ids
from moe_fx.kernels.weight_and_reduce import TopKWeightAndReduce, TopKWeightAndReduceDelegate
from moe_fx.reasons import MoEFxOptionError, MoEFxRuntimeError
from moe_fx.reference.experts import dtype_of
from moe_fx.spec import MoESpec

Kept = list[Tensor] | None  # results of the up products, for a backward


@dataclass(frozen=True, slots=True)
class Scratch:
    """The two workspaces of a call; their values are undefined.  result: [T, H] of the spec's ``out_dtype``, where the
    caller has room for y; a kernel may write it there."""

    first: Tensor
    second: Tensor
    result: Tensor | None = None


class TorchExperts(FusedMoEExpertsModular):
    """order: of gate and up rows in one w13.  keep: gets the results of the up products, where a backward wants them;
    tokens are then not chunked."""

    def __init__(
        self,
        moe_config: FusedMoEConfig,
        quant_config: FusedMoEQuantConfig = FUSED_MOE_UNQUANTIZED_CONFIG,
        norm: Tensor | None = None,
        order: Order = "gate_up",
        keep: Kept = None,
    ) -> None:
        super().__init__(moe_config, quant_config, norm)
        self.order, self.keep = order, keep

    @abstractmethod
    def compute(
        self, x: Tensor, ids: Tensor, weights: Tensor, experts: Experts, spec: MoESpec, scratch: Scratch
    ) -> Tensor:
        """x [T, H], ids and weights [T, k] → y [T, H], a new tensor or ``scratch.result``; ids outside [0, E) add
        nothing.  Runs below autograd."""

    differentiate = staticmethod(experts_backward)  # that of all which have no device code of their own

    @property
    def expects_unquantized_inputs(self) -> bool:
        """Inputs are rounded beside the product, not handed over as codes."""
        return self.quant_config.is_quantized

    def supports_chunking(self) -> bool:
        """Not where a result depends on all tokens: one that a backward reads, a scale that comes from them."""
        by_row = (self.quant_config.weight_key, self.quant_config.activation_key) in RowSchemes()
        return super().supports_chunking() and self.keep is None and by_row

    def workspace_dtype(self, act_dtype: torch.dtype) -> torch.dtype:
        """That of the products."""
        key = self.quant_config.weight_key
        return dtype_of(self.spec.expert.compute_dtype, act_dtype if key is not None else self.moe_config.in_dtype)

    def workspace_shapes(
        self,
        M: int,
        N: int,
        K: int,
        topk: int,
        global_num_experts: int,
        local_num_experts: int,
        expert_tokens_meta: ExpertTokensMetadata | None,
        activation: str,
    ) -> tuple[Shape, Shape, Shape]:
        return (0,), (0,), (M, K)

    def temporary_shapes(self, M: int, N: int, K: int, topk: int, activation: str) -> tuple[Shape, ...]:
        """Rows in order of expert, results of the up products, of the activation and of the down products."""
        widths = (K, N, self.adjust_N_for_activation(N, activation), K)
        return tuple((M * topk, width) for width in widths)

    def apply(
        self,
        output: Tensor,
        hidden_states: Tensor,
        w1: Up,
        w2: Matrices,
        topk_weights: Tensor,
        topk_ids: Tensor,
        activation: str,
        global_num_experts: int,
        expert_map: Tensor | None,
        a1q_scale: Tensor | None,
        a2_scale: Tensor | None,
        workspace13: Tensor,
        workspace2: Tensor,
        expert_tokens_meta: ExpertTokensMetadata | None,
        apply_router_weight_on_input: bool,
    ) -> None:
        refuse_codes(a1q_scale)
        ids = topk_ids if expert_map is None else local_ids(topk_ids, expert_map)
        weights = torch.ones_like(topk_weights) if apply_router_weight_on_input else topk_weights
        fits = output.dtype == dtype_of(self.spec.combine.out_dtype, hidden_states.dtype)
        scratch = Scratch(workspace13, workspace2, output if fits else None)
        y = self.compute(hidden_states, ids, weights, self.view(w1, w2), self.spec_for(activation), scratch)
        if y is not output:
            output.copy_(y)

    def spec_for(self, activation: str) -> MoESpec:
        """The layer's mathematics with that activation, by the field's name."""
        if activation == activation_name(self.spec.expert):
            return self.spec
        if activation not in FIELD_ACTIVATIONS:
            raise MoEFxOptionError(f"activation {activation!r} is not one of {', '.join(FIELD_ACTIVATIONS)}")
        act, gated = FIELD_ACTIVATIONS[activation]
        expert = replace(self.spec.expert, act=act, gated=gated, act_params=FIELD_PARAMS.get(activation, ()))
        return replace(self.spec, expert=expert)

    def view(self, w1: Up, w2: Matrices) -> Experts:
        """The weights with their scales, zero points and biases."""
        config = self.quant_config
        up = w1 if isinstance(w1, tuple) else (w1,)
        return Experts(
            up=tuple(_codes(member, config._w1, config.a1_gscale) for member in up),
            down=_codes(w2, config._w2, config.a2_gscale),
            up_bias=_parts(config.w1_bias),
            down_bias=next(iter(_parts(config.w2_bias)), None),
            norm=self.norm,
            order=self.order,
            scales=InputScales(config.a1_scale, config.a2_scale, config.a1_gscale, config.a2_gscale),
        )


class BatchedExperts(TorchExperts):
    """Experts over one batch each: x [El, max_tokens, H] → [El, max_tokens, H]; what lies after a batch's count is
    undefined, and the sum over a token's experts is left to finalize."""

    def workspace_shapes(
        self,
        M: int,
        N: int,
        K: int,
        topk: int,
        global_num_experts: int,
        local_num_experts: int,
        expert_tokens_meta: ExpertTokensMetadata | None,
        activation: str,
    ) -> tuple[Shape, Shape, Shape]:
        return (0,), (0,), (local_num_experts, M, K)

    def finalize_weight_and_reduce_impl(self) -> TopKWeightAndReduce:
        return TopKWeightAndReduceDelegate()

    @abstractmethod
    def batches(
        self, output: Tensor, x: Tensor, experts: Experts, spec: MoESpec, meta: ExpertTokensMetadata, routed: int
    ) -> None:
        """Writes the batches of ``output``.  routed: rows of all batches together, at most."""

    def apply(
        self,
        output: Tensor,
        hidden_states: Tensor,
        w1: Up,
        w2: Matrices,
        topk_weights: Tensor,
        topk_ids: Tensor,
        activation: str,
        global_num_experts: int,
        expert_map: Tensor | None,
        a1q_scale: Tensor | None,
        a2_scale: Tensor | None,
        workspace13: Tensor,
        workspace2: Tensor,
        expert_tokens_meta: ExpertTokensMetadata | None,
        apply_router_weight_on_input: bool,
    ) -> None:
        if expert_tokens_meta is None:
            raise MoEFxRuntimeError("batches of tokens come with a count for each expert; prepare gave none")
        refuse_codes(a1q_scale)
        experts, spec = self.view(w1, w2), self.spec_for(activation)
        self.batches(output, hidden_states, experts, spec, expert_tokens_meta, topk_ids.numel())

    def compute(
        self, x: Tensor, ids: Tensor, weights: Tensor, experts: Experts, spec: MoESpec, scratch: Scratch
    ) -> Tensor:
        raise MoEFxRuntimeError(f"{self.name} takes one batch an expert")


def refuse_codes(a1q_scale: Tensor | None) -> None:
    """MoEFxRuntimeError for tokens that come as codes."""
    if a1q_scale is not None:
        raise MoEFxRuntimeError("these experts round their inputs themselves, and tokens came quantised already")


def _codes(matrices: Matrices, desc: FusedMoEQuantDesc, of_inputs: Vectors | None) -> Matrices:
    """Codes with what the configuration says of them; plain floats, and what is described already, stay.

    of_inputs: the global scale of the product's input, which is in the weights' alpha too.  One scale a matrix may come
    as [E].
    """
    key = desc.key(static=True)
    if key is None or isinstance(matrices, Quantised):
        return matrices
    assert desc.scale is not None
    whole = desc.alpha_or_gscale if key.global_scale else None
    if isinstance(whole, Tensor) and isinstance(of_inputs, Tensor):
        whole = whole / of_inputs
    flat = isinstance(desc.scale, Tensor) and desc.scale.dim() == 1
    return Quantised(key, matrices, desc.scale.view(-1, 1, 1) if flat else desc.scale, desc.zp, whole)


def _parts(biases: Vectors | tuple[Vectors, ...] | None) -> tuple[Vectors, ...]:
    if biases is None:
        return ()
    return biases if isinstance(biases, tuple) else (biases,)
