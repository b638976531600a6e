"""One rank, one batch an expert: tokens are copied into [El, max_num_tokens, H] in order of token and slot.

A token that names one expert twice gets one row there, with the sum of its weights: an expert never has more rows than
there are tokens.  Nothing waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_fx.kernels.config import FusedMoEQuantConfig
from moe_fx.kernels.modular_kernel.formats import ExpertTokensMetadata, FusedMoEActivationFormat
from moe_fx.kernels.modular_kernel.prepare_finalize import FusedMoEPrepareAndFinalizeModular, Prepared
from moe_fx.kernels.prepare_finalize.inputs import local_ids, quantised, weighted
from moe_fx.kernels.weight_and_reduce import (
    TopKWeightAndReduce,
    TopKWeightAndReduceDelegate,
    TopKWeightAndReduceNaiveBatched,
    batched_places,
)
from moe_fx.reasons import MoEFxRuntimeError


class BatchedPrepareAndFinalize(FusedMoEPrepareAndFinalizeModular):
    """max_num_tokens: rows of a batch, None as many as there are tokens.  num_local_experts: El.  rank: whose experts,
    ids rank * El and on."""

    def __init__(
        self, max_num_tokens: int | None, num_local_experts: int, num_dispatchers: int = 1, rank: int = 0
    ) -> None:
        self.max_num_tokens, self.num_local_experts = max_num_tokens, num_local_experts
        self.dispatchers, self.rank = num_dispatchers, rank

    @property
    def activation_format(self) -> FusedMoEActivationFormat:
        return FusedMoEActivationFormat.BatchedExperts

    def max_num_tokens_per_rank(self) -> int | None:
        return self.max_num_tokens

    def topk_indices_dtype(self) -> torch.dtype | None:
        return None

    def num_dispatchers(self) -> int:
        return self.dispatchers

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
        """As the base class; raises MoEFxRuntimeError for more tokens than a batch has rows."""
        tokens, hidden = a1.shape
        most = tokens if self.max_num_tokens is None else self.max_num_tokens
        if tokens > most:
            raise MoEFxRuntimeError(f"{tokens} tokens for batches of at most {most}: raise max_num_tokens")
        a1 = weighted(a1, topk_weights) if apply_router_weight_on_input else a1
        if expert_map is not None:
            local = local_ids(topk_ids.long(), expert_map)
            topk_ids = torch.where(local >= 0, local + self.rank * self.num_local_experts, -1)
        topk_ids, topk_weights = _once(topk_ids.long(), topk_weights)
        place, local = batched_places(topk_ids, self.num_local_experts, self.rank)
        target = torch.where(local >= 0, local * most + place, self.num_local_experts * most)
        rows = a1.new_zeros((self.num_local_experts * most + 1, hidden))  # the last takes what belongs to nobody here
        token = torch.arange(tokens, device=a1.device).repeat_interleave(topk_ids.shape[1])
        rows[target.flatten()] = a1[token]
        batches = rows[:-1].view(self.num_local_experts, most, hidden)
        counts = torch.zeros(self.num_local_experts + 1, dtype=torch.int32, device=a1.device)
        counts.index_add_(0, local.flatten() + 1, torch.ones_like(local.flatten(), dtype=torch.int32))
        counts = counts[1:]
        a1q, scale = batches, None
        if not defer_input_quant:
            flat, scale = quantised(batches.view(-1, hidden), quant_config)
            a1q = flat.view(self.num_local_experts, most, flat.shape[-1])
            shape = quant_config.batched_scale_shape(self.num_local_experts, most, hidden)
            if scale is not None and shape is not None:
                scale = scale.expand(shape) if scale.shape[0] == 1 else scale.view(shape)
        meta = ExpertTokensMetadata(counts, counts if counts.device.type == "cpu" else None)
        return a1q, scale, meta, topk_ids, topk_weights

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
            weight_and_reduce_impl = TopKWeightAndReduceNaiveBatched(self.rank)
        weight_and_reduce_impl.apply(output, fused_expert_output, topk_weights, topk_ids, apply_router_weight_on_input)


def _once(topk_ids: Tensor, topk_weights: Tensor) -> tuple[Tensor, Tensor]:
    """An id that a token names again becomes -1, and its weight goes to where the token named it first."""
    same = topk_ids.unsqueeze(2) == topk_ids.unsqueeze(1)  # [T, k, k]
    first = same.int().argmax(2)  # the first slot with the same id
    slots = torch.arange(topk_ids.shape[1], device=topk_ids.device)
    again = first != slots
    weights = torch.zeros_like(topk_weights).scatter_add(1, first, topk_weights)
    return topk_ids.masked_fill(again, -1), weights
