"""The router and the experts in one kernel: logits in, tokens out, nothing between them leaves.

The router is the spec's own (``reference.router``, which is a handful of ops whatever the number of experts), the
experts are ``sorted_loop``'s.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from moe_fx.binding import Matrices
from moe_fx.kernels.config import (
    FUSED_MOE_UNQUANTIZED_CONFIG,
    FusedMoEConfig,
    FusedMoEQuantConfig,
    RoutingMethodType,
)
from moe_fx.kernels.experts.codes import DEQUANTISE
from moe_fx.kernels.experts.reference import ALL, EFFICIENCY, GPU_EFFICIENCY, PASSES
from moe_fx.kernels.experts.sorted_loop import SortedLoopExperts
from moe_fx.kernels.experts.torch_experts import Scratch
from moe_fx.kernels.modular_kernel.experts import FusedMoEExpertsMonolithic, Up
from moe_fx.kernels.prepare_finalize.inputs import local_ids
from moe_fx.kernels.registry import Cost, experts_kernel, touched
from moe_fx.reasons import MoEFxOptionError
from moe_fx.reference.router import route
from moe_fx.spec import RouterSpec

CAPABILITY = replace(
    ALL,
    backward="",
    monolithic=True,
    routing=frozenset(kind.name for kind in RoutingMethodType),
    logits=frozenset({"float16", "bfloat16", "float32", "float64"}),
)


@experts_kernel(
    "routed_loop",
    capability=CAPABILITY,
    cost=Cost(
        "active", lambda E, T, k: 28 + 4 * touched(E, T, k), EFFICIENCY, DEQUANTISE, GPU_EFFICIENCY, passes=PASSES
    ),
    rank=70,
)
class RoutedLoopExperts(FusedMoEExpertsMonolithic):
    """expert_scale: [E], where the router's spec has one.  The other arguments are those of the experts."""

    def __init__(
        self,
        moe_config: FusedMoEConfig,
        quant_config: FusedMoEQuantConfig = FUSED_MOE_UNQUANTIZED_CONFIG,
        norm: Tensor | None = None,
        expert_scale: Tensor | None = None,
        **storage: object,
    ) -> None:
        super().__init__(moe_config, quant_config, norm)
        self.expert_scale = expert_scale
        self.experts = SortedLoopExperts(moe_config, quant_config, norm, **storage)  # type: ignore[arg-type]

    @property
    def expects_unquantized_inputs(self) -> bool:
        return self.experts.expects_unquantized_inputs

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
        """As the base class.  The router is that of ``moe_config``'s spec; the last arguments, where given, replace its
        groups, bias and scale."""
        router = self._router(num_expert_group, topk_group, routed_scaling_factor, e_score_correction_bias)
        top_k = self.moe_config.experts_per_token
        ids, weights = route(router_logits, e_score_correction_bias, self.expert_scale, router, top_k)
        ids = ids if expert_map is None else local_ids(ids, expert_map)
        spec = self.experts.spec_for(activation)
        if apply_router_weight_on_input:
            spec = replace(spec, combine=replace(spec.combine, weight_on="input"))
        empty = hidden_states.new_empty(0)
        view = self.experts.view(w1, w2)
        return self.experts.compute(hidden_states, ids, weights, view, spec, Scratch(empty, empty))

    def _router(
        self, groups: int | None, topk_groups: int | None, scale: float | None, bias: Tensor | None
    ) -> RouterSpec:
        router = self.spec.router or _known(self.moe_config.routing_method)
        changes: dict[str, object] = {}
        if groups:
            changes |= dict(groups=groups, topk_groups=topk_groups or groups)
        if scale is not None:
            changes["scale"] = scale
        if bias is not None and not router.bias:
            changes["bias"] = "scores"
        return replace(router, **changes)  # type: ignore[arg-type]


def _known(method: RoutingMethodType) -> RouterSpec:
    """The router that a number of the field stands for."""
    kinds = RoutingMethodType
    match method:
        case kinds.Default:
            return RouterSpec()
        case kinds.Renormalize:
            return RouterSpec(order="topk_first")
        case kinds.RenormalizeNaive:
            return RouterSpec(renormalise=True)
        case kinds.Sigmoid:
            return RouterSpec(score="sigmoid")
        case kinds.SigmoidRenorm:
            return RouterSpec(score="sigmoid", renormalise=True)
        case kinds.Llama4:
            return RouterSpec(score="sigmoid", order="topk_first")
        case kinds.DeepSeekV3:
            return RouterSpec(score="sigmoid", renormalise=True, bias="scores", group_score="top2_sum")
        case kinds.MiniMax2:
            return RouterSpec(score="sigmoid", renormalise=True, bias="scores")
    raise MoEFxOptionError(f"routing_method {method.name} says no router: give FusedMoEConfig a spec with one")
