"""What one MoE layer is: sizes, dtypes, routing, ranks, and what the user insists on."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

import torch

from moe_fx.kernels.config.parallel import FusedMoEParallelConfig
from moe_fx.reasons import MoEFxOptionError
from moe_fx.spec import ExpertSpec, MoESpec, RouterSpec


class RoutingMethodType(IntEnum):
    """Routers that libraries know by number."""

    Default = 0  # softmax, then top-k
    Renormalize = 1  # top-k, then softmax
    DeepSeekV3 = 2  # sigmoid, bias for the choice, groups, renormalised, scaled
    Llama4 = 3  # top-1, then sigmoid
    RenormalizeNaive = 4  # softmax, then top-k, renormalised
    TopK = 5  # top-k of the logits as they are
    SigmoidRenorm = 6  # sigmoid, then top-k, renormalised
    MiniMax2 = 7  # sigmoid, bias for the choice, renormalised, no groups
    Sigmoid = 8  # sigmoid, then top-k
    Unspecified = 9  # any other


def routing_method(router: RouterSpec | None, top_k: int) -> RoutingMethodType:
    """The number of a router; Unspecified where there is none, or none of the known ones."""
    kinds = RoutingMethodType
    if router is None or router.score not in ("softmax", "sigmoid") or router.expert_scale:
        return kinds.Unspecified
    first = router.order == "score_first"
    if router.score == "sigmoid" and first and router.bias == "scores" and router.renormalise:
        if router.groups > 1 and router.group_score != "top2_sum":
            return kinds.Unspecified
        return kinds.DeepSeekV3 if router.groups > 1 or router.scale != 1.0 else kinds.MiniMax2
    if router.bias or router.groups > 1 or router.scale != 1.0:
        return kinds.Unspecified
    match router.score, first, router.renormalise:
        case "softmax", True, renormalised:
            return kinds.RenormalizeNaive if renormalised else kinds.Default
        case "softmax", False, False:
            return kinds.Renormalize
        case "sigmoid", True, renormalised:
            return kinds.SigmoidRenorm if renormalised else kinds.Sigmoid
        case "sigmoid", False, False:
            return kinds.Llama4 if top_k == 1 else kinds.Unspecified
    return kinds.Unspecified


# the field's names → (act, gated, names of the parameters that have to be given) of an ExpertSpec
FIELD_ACTIVATIONS: dict[str, tuple[str, bool]] = {
    "silu": ("silu", True),
    "gelu": ("gelu", True),
    "gelu_tanh": ("gelu_tanh", True),
    "swigluoai": ("swiglu_oai", True),
    "swiglustep": ("swiglu_step", True),
    "silu_no_mul": ("silu", False),
    "gelu_no_mul": ("gelu", False),
    "gelu_tanh_no_mul": ("gelu_tanh", False),
    "relu2_no_mul": ("relu2", False),
    "relu_no_mul": ("relu", False),
}
FIELD_PARAMS: dict[str, tuple[float, ...]] = {"swigluoai": (1.702, 7.0), "swiglustep": (7.0,)}


def activation_name(expert: ExpertSpec) -> str:
    """The field's name of an activation; "<act>" or "<act>_no_mul" where it has none."""
    known = {where: name for name, where in FIELD_ACTIVATIONS.items()}
    name = known.get((expert.act, expert.gated))
    return name or (expert.act if expert.gated else f"{expert.act}_no_mul")


@dataclass(frozen=True, slots=True)
class FusedMoEConfig:
    """One MoE layer on one rank.

    num_experts, num_local_experts: of all ranks, of this one.  experts_per_token: k.  hidden_dim, intermediate_size: H
    and this rank's I.  in_dtype: of x.  max_num_tokens: most that a rank hands over at once.  activation: a field's
    name ("silu", "gelu_tanh", "relu2_no_mul", …).  moe_backend: "auto", or the one the user insists on.
    batch_invariant: a token's result may not depend on the others.  spec: the whole mathematics where these fields say
    too little; made from them where it is None.
    Raises MoEFxOptionError for sizes that are not positive and an activation that is not known.
    """

    num_experts: int
    experts_per_token: int
    hidden_dim: int
    num_local_experts: int
    moe_parallel_config: FusedMoEParallelConfig = field(default_factory=FusedMoEParallelConfig)
    in_dtype: torch.dtype = torch.bfloat16
    max_num_tokens: int = 8192
    has_bias: bool = False
    activation: str = "silu"
    routing_method: RoutingMethodType = RoutingMethodType.Unspecified
    is_lora_enabled: bool = False
    moe_backend: str = "auto"
    intermediate_size: int = 0
    router_logits_dtype: torch.dtype | None = None
    batch_invariant: bool = False
    spec: MoESpec | None = None

    def __post_init__(self) -> None:
        sizes = ("num_experts", "experts_per_token", "hidden_dim", "num_local_experts", "max_num_tokens")
        for name in sizes:
            if getattr(self, name) < 1:
                raise MoEFxOptionError(f"{name} must be positive, got {getattr(self, name)}")
        if self.spec is None and self.activation not in FIELD_ACTIVATIONS:
            raise MoEFxOptionError(f"activation {self.activation!r} is not one of {', '.join(FIELD_ACTIVATIONS)}")

    @staticmethod
    def of(spec: MoESpec, in_dtype: torch.dtype, **others: object) -> FusedMoEConfig:
        """The layer that computes ``spec`` on one rank."""
        e = spec.expert
        fields: dict[str, object] = dict(
            num_local_experts=e.experts,
            has_bias=e.w13_bias or e.w2_bias,
            activation=activation_name(e),
            routing_method=routing_method(spec.router, spec.top_k),
            intermediate_size=e.intermediate,
            spec=spec,
        )
        return FusedMoEConfig(e.experts, spec.top_k, e.hidden, in_dtype=in_dtype, **(fields | others))  # type: ignore[arg-type]

    @property
    def mathematics(self) -> MoESpec:
        """What this rank computes: ``spec``, or what the fields say."""
        if self.spec is not None:
            return self.spec
        act, gated = FIELD_ACTIVATIONS[self.activation]
        expert = ExpertSpec(
            self.num_local_experts,
            self.hidden_dim,
            max(self.intermediate_size, 1),
            act,
            FIELD_PARAMS.get(self.activation, ()),
            gated,
            w13_bias=self.has_bias,
            w2_bias=self.has_bias,
        )
        return MoESpec(self.experts_per_token, expert)

    @property
    def is_act_and_mul(self) -> bool:
        """Experts have a gate."""
        return self.mathematics.expert.gated

    @property
    def tp_size(self) -> int:
        return self.moe_parallel_config.tp_size

    @property
    def dp_size(self) -> int:
        return self.moe_parallel_config.dp_size

    @property
    def ep_size(self) -> int:
        return self.moe_parallel_config.ep_size

    @property
    def tp_rank(self) -> int:
        return self.moe_parallel_config.tp_rank

    @property
    def dp_rank(self) -> int:
        return self.moe_parallel_config.dp_rank

    @property
    def ep_rank(self) -> int:
        return self.moe_parallel_config.ep_rank

    @property
    def use_ep(self) -> bool:
        return self.moe_parallel_config.use_ep

    @property
    def use_pplx_kernels(self) -> bool:
        return self.moe_parallel_config.use_pplx_kernels

    @property
    def use_deepep_ht_kernels(self) -> bool:
        return self.moe_parallel_config.use_deepep_ht_kernels

    @property
    def use_deepep_ll_kernels(self) -> bool:
        return self.moe_parallel_config.use_deepep_ll_kernels
