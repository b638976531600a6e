"""One rank, a list of tokens: nothing travels; tokens are quantised if the experts want them so."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_fx.kernels.config import FusedMoEQuantConfig
from moe_fx.kernels.modular_kernel.formats import FusedMoEActivationFormat
from moe_fx.kernels.modular_kernel.prepare_finalize import (
    FusedMoEPrepareAndFinalizeModular,
    FusedMoEPrepareAndFinalizeMonolithic,
    Prepared,
)
from moe_fx.kernels.prepare_finalize.inputs import quantised, weighted
from moe_fx.kernels.weight_and_reduce import (
    TopKWeightAndReduce,
    TopKWeightAndReduceContiguous,
    TopKWeightAndReduceDelegate,
)


class PrepareAndFinalizeNoEP(FusedMoEPrepareAndFinalizeModular):
    """For experts that start from ids and weights."""

    @property
    def activation_format(self) -> FusedMoEActivationFormat:
        return FusedMoEActivationFormat.Standard

    def max_num_tokens_per_rank(self) -> int | None:
        return None

    def topk_indices_dtype(self) -> torch.dtype | None:
        return None

    def num_dispatchers(self) -> int:
        return 1

    def output_is_reduced(self) -> bool:
        return False

    def prepare(
        self,
        a1: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        num_experts: int,
        expert_map: Tensor | None,
        apply_router_weight_on_input: bool,
        quant_config: FusedMoEQuantConfig,
        defer_input_quant: bool = False,
    ) -> Prepared:
        a1 = weighted(a1, topk_weights) if apply_router_weight_on_input else a1
        a1q, scale = (a1, None) if defer_input_quant else quantised(a1, quant_config)
        return a1q, scale, None, None, None

    def finalize(
        self,
        output: Tensor,
        fused_expert_output: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        apply_router_weight_on_input: bool,
        weight_and_reduce_impl: TopKWeightAndReduce,
    ) -> None:
        if isinstance(weight_and_reduce_impl, TopKWeightAndReduceDelegate):
            weight_and_reduce_impl = TopKWeightAndReduceContiguous()
        weight_and_reduce_impl.apply(output, fused_expert_output, topk_weights, topk_ids, apply_router_weight_on_input)


class MonolithicPrepareAndFinalizeNoEP(FusedMoEPrepareAndFinalizeMonolithic):
    """For experts that contain the router."""

    @property
    def activation_format(self) -> FusedMoEActivationFormat:
        return FusedMoEActivationFormat.Standard

    def max_num_tokens_per_rank(self) -> int | None:
        return None

    def topk_indices_dtype(self) -> torch.dtype | None:
        return None

    def num_dispatchers(self) -> int:
        return 1

    def output_is_reduced(self) -> bool:
        return False

    def prepare(
        self, a1: Tensor, router_logits: Tensor, quant_config: FusedMoEQuantConfig, defer_input_quant: bool = False
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        a1q, scale = (a1, None) if defer_input_quant else quantised(a1, quant_config)
        return a1q, scale, router_logits

    def finalize(self, fused_expert_output: Tensor) -> Tensor:
        return fused_expert_output
