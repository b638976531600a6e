"""Prepare and finalize: quantise tokens and bring them to their experts; bring results back and add them up.

T tokens of this rank, H hidden, k top-k, El local experts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moe_fx.kernels.config import FusedMoEQuantConfig
from moe_fx.kernels.modular_kernel.formats import ExpertTokensMetadata, FusedMoEActivationFormat
from moe_fx.kernels.weight_and_reduce import TopKWeightAndReduce
from moe_fx.reasons import MoEFxUnsupportedError

if TYPE_CHECKING:
    from moe_fx.kernels.modular_kernel.experts import FusedMoEExperts

# dispatched and maybe quantised tokens, their scales, counts, ids and weights (None: the caller's still hold)
Prepared = tuple[Tensor, Tensor | None, ExpertTokensMetadata | None, Tensor | None, Tensor | None]
Receiver = Callable[[], Any]
Async = Receiver | tuple[Callable[[], None], Receiver]  # a hook makes sure that data have arrived, before the receiver


class FusedMoEPrepareAndFinalize(ABC):
    """What both variants have in common."""

    @property
    @abstractmethod
    def activation_format(self) -> FusedMoEActivationFormat:
        """How ``prepare`` hands tokens over."""

    @abstractmethod
    def max_num_tokens_per_rank(self) -> int | None:
        """Most tokens that one rank may hand over; None: any number."""

    @abstractmethod
    def topk_indices_dtype(self) -> torch.dtype | None:
        """dtype that ids must have; None: any integer."""

    @abstractmethod
    def num_dispatchers(self) -> int:
        """Ranks that tokens may come from."""

    @abstractmethod
    def output_is_reduced(self) -> bool:
        """The result is the sum over all ranks already."""

    def supports_async(self) -> bool:
        """Has ``prepare_async`` and ``finalize_async``."""
        return False

    def post_init_setup(self, experts: FusedMoEExperts) -> None:  # noqa: B027  most need none
        """Called once by the kernel with the experts it works with."""


class FusedMoEPrepareAndFinalizeModular(FusedMoEPrepareAndFinalize):
    """The variant for experts that start from ids and weights."""

    @abstractmethod
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
        """a1 [T, H], topk_weights and topk_ids [T, k] → what the experts get.

        num_experts: of all ranks.  expert_map: int32 [num_experts] → local expert or -1.  defer_input_quant: the
        experts quantise their input themselves.  apply_router_weight_on_input asks for k = 1.
        """

    def prepare_async(
        self,
        a1: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        num_experts: int,
        expert_map: Tensor | None,
        apply_router_weight_on_input: bool,
        quant_config: FusedMoEQuantConfig,
        defer_input_quant: bool = False,
    ) -> Async:
        """``prepare`` in two steps: starts, and returns what waits.  The receiver gives what ``prepare`` gives."""
        raise MoEFxUnsupportedError(f"{type(self).__name__} has no asynchronous prepare; supports_async() says so")

    @abstractmethod
    def finalize(
        self,
        output: Tensor,
        fused_expert_output: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        apply_router_weight_on_input: bool,
        weight_and_reduce_impl: TopKWeightAndReduce,
    ) -> None:
        """Results of the experts → ``output`` [T, H], written in place."""

    def finalize_async(
        self,
        output: Tensor,
        fused_expert_output: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        apply_router_weight_on_input: bool,
        weight_and_reduce_impl: TopKWeightAndReduce,
    ) -> Async:
        """``finalize`` in two steps; ``output`` holds the result after the receiver has run."""
        raise MoEFxUnsupportedError(f"{type(self).__name__} has no asynchronous finalize; supports_async() says so")


class FusedMoEPrepareAndFinalizeMonolithic(FusedMoEPrepareAndFinalize):
    """The variant for experts that contain the router."""

    @abstractmethod
    def prepare(
        self, a1: Tensor, router_logits: Tensor, quant_config: FusedMoEQuantConfig, defer_input_quant: bool = False
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """a1 [T, H], router_logits [T, E] → (tokens, their scales, logits) as the experts get them."""

    @abstractmethod
    def finalize(self, fused_expert_output: Tensor) -> Tensor:
        """Results of the experts → [T, H]."""
