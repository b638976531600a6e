"""Experts: the two products and the activation between them, over tokens as prepare/finalize hands them over.

What a class can do is its ``capability``, set where it is registered (``kernels.registry``); every ``_supports_…``
reads it, and ``is_supported_config`` walks the whole ladder.  Letters: M tokens, K hidden, N rows of w13, E experts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from moe_fx.binding import Matrices
from moe_fx.hardware import detect
from moe_fx.kernels.capability import Capability
from moe_fx.kernels.config import (
    FUSED_MOE_UNQUANTIZED_CONFIG,
    FusedMoEConfig,
    FusedMoEParallelConfig,
    FusedMoEQuantConfig,
    RoutingMethodType,
)
from moe_fx.kernels.config.moe import FIELD_ACTIVATIONS
from moe_fx.kernels.ladder import Question, ladder, own_reasons
from moe_fx.kernels.modular_kernel.formats import ExpertTokensMetadata, FusedMoEActivationFormat
from moe_fx.kernels.weight_and_reduce import TopKWeightAndReduce, TopKWeightAndReduceNoOP
from moe_fx.quant import QuantKey
from moe_fx.reasons import MoEFxOptionError
from moe_fx.spec import MoESpec

Up = Matrices | tuple[Matrices, ...]  # w13, or its gate and its up part apart
Shape = tuple[int, ...]


class FusedMoEExperts(ABC):
    """moe_config: the layer.  quant_config: how its operands are quantised, and their scales and biases.
    norm: weight [H] of a norm of the experts' outputs, where ``ExpertSpec.norm`` has one."""

    name: ClassVar[str] = ""
    capability: ClassVar[Capability]
    hoards: ClassVar[float] = 0.0  # memory that it keeps beside the weights it is given, in their size

    def __init__(
        self,
        moe_config: FusedMoEConfig,
        quant_config: FusedMoEQuantConfig = FUSED_MOE_UNQUANTIZED_CONFIG,
        norm: Tensor | None = None,
    ) -> None:
        self.moe_config, self.quant_config, self.norm = moe_config, quant_config, norm
        spec = moe_config.mathematics
        said = spec.quant or quant_config is FUSED_MOE_UNQUANTIZED_CONFIG
        self.spec = spec if said else replace(spec, quant=quant_config.spec)
        self.max_num_tokens: int | None = None
        self.num_dispatchers: int | None = None

    @classmethod
    def make_standard_experts(cls, moe_config: FusedMoEConfig, quant_config: FusedMoEQuantConfig) -> FusedMoEExperts:
        """Experts over a list of tokens.  MoEFxOptionError for a class that takes batches."""
        if cls.capability.batched:
            raise MoEFxOptionError(f"{cls.__name__} takes one batch an expert: use make_batched_experts")
        return cls(moe_config, quant_config)

    @classmethod
    def make_batched_experts(
        cls,
        moe_config: FusedMoEConfig,
        quant_config: FusedMoEQuantConfig,
        max_num_tokens: int,
        num_dispatchers: int,
    ) -> FusedMoEExperts:
        """Experts over one batch each, of at most max_num_tokens rows a dispatcher.  MoEFxOptionError for a class that
        takes a list of tokens."""
        if not cls.capability.batched:
            raise MoEFxOptionError(f"{cls.__name__} takes a list of tokens: use make_standard_experts")
        experts = cls(moe_config, quant_config)
        experts.max_num_tokens, experts.num_dispatchers = max_num_tokens, num_dispatchers
        return experts

    @classmethod
    def layout_for(cls, spec: MoESpec) -> str:
        """The packed layout that it reads for this layer; "" where it reads what ``capability`` says."""
        return ""

    @classmethod
    def refuses(cls, spec: MoESpec) -> tuple[str, str] | None:
        """(code, text) of a reason against this layer that hangs on two of its values together; None if there is none.
        What hangs on one value is in ``capability``."""
        return None

    @classmethod
    def waits_in_backward(cls, spec: MoESpec) -> bool:
        """Whether its backward reads values of the device on the host."""
        return True

    @classmethod
    def activation_format(cls) -> FusedMoEActivationFormat:
        """How tokens have to come."""
        formats = FusedMoEActivationFormat
        return formats.BatchedExperts if cls.capability.batched else formats.Standard

    @classmethod
    def _supports_current_device(cls) -> bool:
        """It runs on the device of this process, with what is installed."""
        device = detect(_current_device())
        known = cls.capability
        arch = known.archs is None or device.arch in known.archs
        return device.kind in known.devices and arch and known.packages <= device.installed

    @classmethod
    def _supports_no_act_and_mul(cls) -> bool:
        """Experts without a gate."""
        return False in cls.capability.gated

    @classmethod
    def _supports_activation(cls, activation: str) -> bool:
        """By the field's name ("silu", "relu2_no_mul", …)."""
        known = cls.capability
        own = activation.removesuffix("_no_mul")
        act, gated = FIELD_ACTIVATIONS.get(activation, (own, own == activation))
        return act in known.activations and gated in known.gated

    @classmethod
    def _supports_quant_scheme(cls, weight_key: QuantKey | None, activation_key: QuantKey | None) -> bool:
        """Of weights and of the inputs of products; None: plain floats."""
        return (weight_key, activation_key) in cls.capability.schemes

    @classmethod
    def _supports_parallel_config(cls, moe_parallel_config: FusedMoEParallelConfig) -> bool:
        """It works behind what carries tokens there, and with experts of other ranks."""
        uses = moe_parallel_config.use_all2all_kernels
        return (moe_parallel_config.all2all_backend if uses else "none") in cls.capability.all2all and (
            cls.capability.expert_parallel or not moe_parallel_config.use_ep
        )

    @classmethod
    def _supports_routing_method(
        cls,
        routing_method: RoutingMethodType,
        weight_key: QuantKey | None = None,
        activation_key: QuantKey | None = None,
    ) -> bool:
        """Of the router inside; experts without one take any."""
        return not cls.capability.monolithic or routing_method.name in cls.capability.routing

    @classmethod
    def _supports_router_logits_dtype(
        cls, router_logits_dtype: torch.dtype | None, routing_method: RoutingMethodType = RoutingMethodType.Unspecified
    ) -> bool:
        """Of the router inside; experts without one take any."""
        name = str(router_logits_dtype).removeprefix("torch.")
        return not cls.capability.monolithic or router_logits_dtype is None or name in cls.capability.logits

    @classmethod
    def _supports_shape(cls, hidden_dim: int) -> bool:
        """Whether H is a size it takes."""
        return hidden_dim % cls.capability.size_multiple == 0 and all(
            hidden_dim <= most for name, most in cls.capability.most if name == "hidden"
        )

    @classmethod
    def is_supported_config(
        cls,
        moe_config: FusedMoEConfig,
        weight_key: QuantKey | None = None,
        activation_key: QuantKey | None = None,
        activation_format: FusedMoEActivationFormat = FusedMoEActivationFormat.Standard,
    ) -> tuple[bool, str | None]:
        """(whether it can run the layer on this machine, else every reason against it)."""
        question = Question(
            cls.name or cls.__name__,
            cls.capability,
            moe_config,
            detect(_current_device()),
            str(moe_config.in_dtype).removeprefix("torch."),
            (weight_key, activation_key),
            activation_format is FusedMoEActivationFormat.BatchedExperts,
        )
        reasons = ladder(question) + own_reasons(question, cls.refuses)
        return not reasons, "; ".join(map(str, reasons)) or None

    def supports_chunking(self) -> bool:
        """Tokens may be handed over a part at a time."""
        return not self.capability.batched

    def supports_expert_map(self) -> bool:
        """Takes ids of all ranks and the map from them to local experts."""
        return self.capability.expert_parallel

    @property
    def expects_unquantized_inputs(self) -> bool:
        """It quantises its input itself: prepare has to leave it."""
        return False

    def supports_packed_ue8m0_act_scales(self) -> bool:
        """Takes scales of activations as powers of two, four in an int32."""
        return False


class FusedMoEExpertsModular(FusedMoEExperts):
    """Experts that start from ids and weights."""

    @abstractmethod
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
        """(workspace13, workspace2, output) for M tokens; a size of 0: not needed.  workspace13 may hold what the first
        and what the last product give."""

    def temporary_shapes(self, M: int, N: int, K: int, topk: int, activation: str) -> tuple[Shape, ...]:
        """What ``apply`` allocates itself for M tokens: it counts as workspaces do."""
        return ()

    def workspace_dtype(self, act_dtype: torch.dtype) -> torch.dtype:
        """dtype of both workspaces."""
        return act_dtype

    def moe_problem_size(self, a1: Tensor, w1: Up, w2: Matrices, topk_ids: Tensor) -> tuple[int, int, int, int, int]:
        """(E, M, N, K, top-k).  Batched tokens: M rows a batch.  Packed formats override it."""
        members = w1 if isinstance(w1, tuple) else (w1,)
        N = sum(self._rows(member) for member in members)
        E = self.spec.expert.experts
        M = a1.shape[1] if a1.dim() == 3 else a1.shape[0]
        return E, M, N, a1.shape[-1], topk_ids.shape[1]

    @staticmethod
    def _rows(matrices: Matrices) -> int:
        one = matrices[0]
        return one.shape[0]

    def adjust_N_for_activation(self, N: int, activation: str) -> int:
        """Width after the activation: half of N for a gated one, N for "…_no_mul"."""
        return N if activation.endswith("_no_mul") else N // 2

    def finalize_weight_and_reduce_impl(self) -> TopKWeightAndReduce:
        """What is left to do with the result of ``apply``."""
        return TopKWeightAndReduceNoOP()

    @abstractmethod
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
        """Writes ``output``.  hidden_states may be quantised, with a1q_scale; apply_router_weight_on_input: they carry
        the routing weights already."""


class FusedMoEExpertsMonolithic(FusedMoEExperts):
    """Experts that contain the router."""

    @abstractmethod
    def apply(
        self,
        hidden_states: Tensor,
        w1: Up,
        w2: Matrices,
        router_logits: Tensor,
        activation: str,
        global_num_experts: int,
        expert_map: Tensor | None,
        a1q_scale: Tensor | None,
        apply_router_weight_on_input: bool,
        num_expert_group: int | None = None,
        e_score_correction_bias: Tensor | None = None,
        routed_scaling_factor: float | None = None,
        topk_group: int | None = None,
    ) -> Tensor:
        """hidden_states [T, H], router_logits [T, E] → [T, H]."""


def _current_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
