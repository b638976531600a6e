"""From results of experts to one row a token: the routing weights and the sum over the k slots.

Which of them a kernel needs, its experts say (``finalize_weight_and_reduce_impl``); who runs it is prepare/finalize.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_fx.reasons import MoEFxUnsupportedError


class TopKWeightAndReduce(ABC):
    @abstractmethod
    def apply(
        self,
        output: Tensor | None,
        fused_expert_output: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        apply_router_weight_on_input: bool,
    ) -> Tensor:
        """Results of the experts, topk_weights and topk_ids [T, k] → [T, H], in ``output`` where it is given.

        apply_router_weight_on_input: the weights were multiplied in before the experts.
        """


@dataclass(frozen=True, slots=True)
class TopKWeightAndReduceDelegate(TopKWeightAndReduce):
    """The experts leave it to prepare/finalize, which has to choose another one."""

    def apply(
        self,
        output: Tensor | None,
        fused_expert_output: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        apply_router_weight_on_input: bool,
    ) -> Tensor:
        raise MoEFxUnsupportedError("these experts leave weights and sum to prepare/finalize, which has to choose one")


@dataclass(frozen=True, slots=True)
class TopKWeightAndReduceNoOP(TopKWeightAndReduce):
    """The experts did it: fused_expert_output [T, H] is the result."""

    def apply(
        self,
        output: Tensor | None,
        fused_expert_output: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        apply_router_weight_on_input: bool,
    ) -> Tensor:
        if output is None or output is fused_expert_output:
            return fused_expert_output
        return output.copy_(fused_expert_output)


@dataclass(frozen=True, slots=True)
class TopKWeightAndReduceContiguous(TopKWeightAndReduce):
    """fused_expert_output [T, k, H] (or [T * k, H]) in order of tokens and slots; slots of ids outside the rank's
    experts hold zeros."""

    def apply(
        self,
        output: Tensor | None,
        fused_expert_output: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        apply_router_weight_on_input: bool,
    ) -> Tensor:
        rows = fused_expert_output.view(*topk_ids.shape, fused_expert_output.shape[-1])
        wide = torch.promote_types(rows.dtype, torch.float32)
        rows = rows.to(wide)
        if not apply_router_weight_on_input:
            rows = rows * topk_weights.to(wide).unsqueeze(-1)
        return _into(output, rows.sum(1), fused_expert_output.dtype)


@dataclass(frozen=True, slots=True)
class TopKWeightAndReduceNaiveBatched(TopKWeightAndReduce):
    """fused_expert_output [El, max_tokens, H]: row r of expert e is the r-th (token, slot), in order, whose id is
    rank * El + e."""

    rank: int = 0

    def apply(
        self,
        output: Tensor | None,
        fused_expert_output: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        apply_router_weight_on_input: bool,
    ) -> Tensor:
        experts, most, hidden = fused_expert_output.shape
        place, local = batched_places(topk_ids, experts, self.rank)
        rows = fused_expert_output.reshape(experts * most, hidden)
        picked = rows.index_select(0, (local.clamp(min=0) * most + place).flatten().clamp(max=experts * most - 1))
        wide = torch.promote_types(rows.dtype, torch.float32)
        mine = (local >= 0).unsqueeze(-1)
        picked = picked.view(*topk_ids.shape, hidden).to(wide)
        if not apply_router_weight_on_input:
            picked = picked * topk_weights.to(wide).unsqueeze(-1)
        return _into(output, picked.masked_fill(~mine, 0).sum(1), fused_expert_output.dtype)


def batched_places(topk_ids: Tensor, experts: int, rank: int) -> tuple[Tensor, Tensor]:
    """topk_ids [T, k] → (row within its expert's batch, local expert or -1), both int64 [T, k]."""
    local = topk_ids.long() - rank * experts
    local = local.masked_fill((local < 0) | (local >= experts), -1)
    chosen = torch.nn.functional.one_hot(local.flatten() + 1, experts + 1)
    place = (chosen.cumsum(0) - 1).gather(1, (local.flatten() + 1).unsqueeze(1))
    return place.view_as(local).masked_fill(local < 0, 0), local


def _into(output: Tensor | None, result: Tensor, dtype: torch.dtype) -> Tensor:
    return result.to(dtype) if output is None else output.copy_(result)
