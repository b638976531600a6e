"""FlashInfer's TRT-LLM experts for Blackwell: from ids and weights, or from logits with the router inside.

Weights are shuffled in blocks by the layout.  Not run: no such GPU here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_fx.binding import Experts, Matrices
from moe_fx.kernels.capability import NO_ALL2ALL
from moe_fx.kernels.config import FUSED_MOE_UNQUANTIZED_CONFIG, FusedMoEConfig, FusedMoEQuantConfig
from moe_fx.kernels.libraries.adapter import (
    LibraryExperts,
    RoutedExperts,
    Routing,
    adapter,
    attribute,
    packed,
    rounded_rows,
    scheme_of,
    swiglu_params,
    tensors_of,
)
from moe_fx.kernels.libraries.flashinfer_cutlass import one
from moe_fx.kernels.libraries.rows import library
from moe_fx.kernels.modular_kernel.experts import FusedMoEExpertsMonolithic, Up
from moe_fx.quant import FP8_BLOCK, FP8_GROUP
from moe_fx.reasons import MoEFxRuntimeError
from moe_fx.spec import MoESpec, RouterSpec

SWIGLU, GEGLU = 3, 4  # ActivationType
BLOCK_MAJOR_K, DEEPSEEK_FP8 = 2, 1  # WeightLayout, Fp8QuantizationType
FUNCTIONS = {  # scheme → (from ids, from logits)
    "bf16": ("trtllm_bf16_routed_moe", "trtllm_bf16_moe"),
    "fp8_block": ("trtllm_fp8_block_scale_routed_moe", "trtllm_fp8_block_scale_moe"),
    "fp8_tensor": ("", "trtllm_fp8_per_tensor_scale_moe"),
    "nvfp4": ("trtllm_fp4_block_scale_routed_moe", "trtllm_fp4_block_scale_moe"),
    "mxfp4": ("trtllm_fp4_block_scale_routed_moe", "trtllm_fp4_block_scale_moe"),
}
BLOCKS = frozenset({(FP8_BLOCK, FP8_GROUP)})  # of float8; mxfp8 wants a layout of its own


class TrtLlm(RoutedExperts):
    """From ids and weights."""

    @classmethod
    def layout_for(cls, spec: MoESpec) -> str:
        return packed("flashinfer_trtllm", scheme_of(spec))

    @classmethod
    def refuses(cls, spec: MoESpec) -> tuple[str, str] | None:
        return _padded_sizes(spec) or super().refuses(spec)

    def call(self, x: Tensor, routed: Routing, experts: Experts, spec: MoESpec) -> Tensor:
        function = attribute("flashinfer.fused_moe", FUNCTIONS[scheme_of(spec)][0])
        found = arguments(x, experts, spec, self.quant_config)
        return first(function(topk_ids=(routed.ids, routed.weights), **found))


@adapter("flashinfer_trtllm", rank=9, all2all=library("flashinfer_trtllm").capability.all2all | {NO_ALL2ALL})
class TrtLlmExperts(TrtLlm):
    """Plain weights."""


@adapter("flashinfer_trtllm_fp8", rank=9, schemes=BLOCKS)
class TrtLlmFp8Experts(TrtLlm):
    """float8 in blocks of 128."""


@adapter("flashinfer_trtllm_nvfp4", rank=9)
class TrtLlmNvfp4Experts(TrtLlm):
    """nvfp4 weights and inputs."""


@adapter("flashinfer_trtllm_mxfp4", rank=9)
class TrtLlmMxfp4Experts(TrtLlm):
    """mxfp4 weights, inputs as they are."""


@adapter("flashinfer_trtllm_mxfp4_mxfp8", rank=9)
class TrtLlmMxfp4Mxfp8Experts(TrtLlm):
    """mxfp4 weights, mxfp8 inputs."""


class TrtLlmMonolithic(FusedMoEExpertsMonolithic):
    """From logits.  expert_scale: refused, the router inside has none.  storage: of the weights, which are packed."""

    def __init__(
        self,
        moe_config: FusedMoEConfig,
        quant_config: FusedMoEQuantConfig = FUSED_MOE_UNQUANTIZED_CONFIG,
        norm: Tensor | None = None,
        expert_scale: Tensor | None = None,
        **storage: Any,
    ) -> None:
        super().__init__(moe_config, quant_config, norm)
        if expert_scale is not None:
            raise MoEFxRuntimeError("the router of TRT-LLM has no scale for each expert")
        self.held = _View(moe_config, quant_config, norm, **storage)

    @classmethod
    def layout_for(cls, spec: MoESpec) -> str:
        return TrtLlm.layout_for(spec)

    @classmethod
    def refuses(cls, spec: MoESpec) -> tuple[str, str] | None:
        return _padded_sizes(spec)

    @property
    def expects_unquantized_inputs(self) -> bool:
        return True

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
        spec = self.spec
        router = spec.router or RouterSpec()
        groups = num_expert_group or (router.groups if router.groups > 1 else None)
        scale = routed_scaling_factor if routed_scaling_factor is not None else router.scale
        routed = dict(
            routing_logits=router_logits,
            routing_bias=e_score_correction_bias,
            n_group=groups,
            topk_group=topk_group or (router.topk_groups if groups else None),
            routed_scaling_factor=scale if scale != 1.0 else None,
            routing_method_type=int(self.moe_config.routing_method),
        )
        found = arguments(hidden_states.contiguous(), self.held.view(w1, w2), spec, self.quant_config)
        return first(attribute("flashinfer.fused_moe", FUNCTIONS[scheme_of(spec)][1])(**found | routed))


class _View(LibraryExperts):
    """The weights of a monolithic kernel, as the others see them."""

    def compute(self, *_: Any) -> Tensor:
        raise MoEFxRuntimeError("this kernel contains the router: call apply_monolithic")


@adapter("flashinfer_trtllm_monolithic", rank=9)
class TrtLlmMonolithicExperts(TrtLlmMonolithic):
    """Plain weights."""


@adapter("flashinfer_trtllm_fp8_monolithic", rank=9, schemes=BLOCKS)
class TrtLlmFp8MonolithicExperts(TrtLlmMonolithic):
    """float8 in blocks of 128."""


@adapter("flashinfer_trtllm_fp8_tensor_monolithic", rank=9)
class TrtLlmFp8TensorMonolithicExperts(TrtLlmMonolithic):
    """float8 with one scale an expert, and given ones of the inputs."""


@adapter("flashinfer_trtllm_nvfp4_monolithic", rank=9)
class TrtLlmNvfp4MonolithicExperts(TrtLlmMonolithic):
    """nvfp4 weights and inputs."""


@adapter("flashinfer_trtllm_mxfp4_monolithic", rank=9)
class TrtLlmMxfp4MonolithicExperts(TrtLlmMonolithic):
    """mxfp4 weights, inputs as they are."""


@adapter("flashinfer_trtllm_mxfp4_mxfp8_monolithic", rank=9)
class TrtLlmMxfp4Mxfp8MonolithicExperts(TrtLlmMonolithic):
    """mxfp4 weights, mxfp8 inputs."""


def _padded_sizes(spec: MoESpec) -> tuple[str, str] | None:
    """Sizes that the layout would pad in x and the result too."""
    e = spec.expert
    if spec.quant.w13 and scheme_of(spec).endswith("fp4") and (e.hidden % 256 or e.intermediate % 128):
        return "veto.shape", f"H={e.hidden}, I={e.intermediate}: it pads H to 256 and I to 128, and x is not padded"
    return None


def first(result: Tensor | list[Tensor]) -> Tensor:
    """Some of the functions give a list of one."""
    return result[0] if isinstance(result, (list, tuple)) else result


def arguments(x: Tensor, experts: Experts, spec: MoESpec, quant: FusedMoEQuantConfig) -> dict[str, Any]:
    """What both functions of a scheme take: all but ids and weights, and all but what the router needs."""
    e, (up,) = spec.expert, experts.up
    w13, s13 = tensors_of(up)
    w2, s2 = tensors_of(experts.down)
    found: dict[str, Any] = dict(
        hidden_states=x,
        gemm1_weights=w13,
        gemm2_weights=w2,
        num_experts=e.experts,
        top_k=spec.top_k,
        n_group=None,
        topk_group=None,
        intermediate_size=e.intermediate,
        local_expert_offset=0,
        local_num_experts=e.experts,
        routed_scaling_factor=None,
        routing_method_type=1,  # not looked at where ids are given
        activation_type=GEGLU if e.act == "gelu" else SWIGLU,
    )
    params = swiglu_params(e)
    vectors = [None] * 3 if params is None else [torch.full((e.experts,), v, device=x.device) for v in params]
    gated = dict(zip(("gemm1_alpha", "gemm1_beta", "gemm1_clamp_limit"), vectors, strict=True))
    shuffled = dict(use_shuffled_weight=True, weight_layout=BLOCK_MAJOR_K)
    scales = dict(gemm1_weights_scale=s13, gemm2_weights_scale=s2)
    match scheme_of(spec):
        case "bf16":
            return found | gated | shuffled
        case "fp8_block":
            codes, scale = rounded_rows(x, spec, "a1")
            inputs = dict(hidden_states=codes, hidden_states_scale=scale.t().contiguous())
            kind = dict(fp8_quantization_type=DEEPSEEK_FP8)
            return found | gated | shuffled | scales | inputs | kind | ROUTED_BIAS
        case "fp8_tensor":
            assert s13 is not None
            assert s2 is not None
            a1, a2 = one(quant.a1_scale, "a1_scale"), one(quant.a2_scale, "a2_scale")
            codes, _ = rounded_rows(x, spec, "a1", a1)
            gate = s13.reshape(-1) * a1
            outputs = dict(
                output1_scales_scalar=gate / a2,
                output1_scales_gate_scalar=gate,
                output2_scales_scalar=s2.reshape(-1) * a2,
                use_routing_scales_on_input=False,
            )
            return found | outputs | dict(hidden_states=codes) | ROUTED_BIAS
        case "nvfp4" | "mxfp4":
            return found | gated | scales | _fp4(x, experts, spec, quant) | ROUTED_BIAS
        case other:
            raise MoEFxRuntimeError(f"TRT-LLM has no scheme {other or spec.quant.w13!r}")


ROUTED_BIAS: dict[str, Any] = dict(routing_bias=None)


def _fp4(x: Tensor, experts: Experts, spec: MoESpec, quant: FusedMoEQuantConfig) -> dict[str, Any]:
    """What nvfp4 and mxfp4 add: biases, quantised inputs, and factors of the two products."""
    e = spec.expert
    b13, b2 = (_padded(b) for b in (experts.up_bias[0] if experts.up_bias else None, experts.down_bias))
    found: dict[str, Any] = dict(gemm1_bias=b13, gemm2_bias=b2, hidden_states_scale=None)
    names = ("output1_scale_scalar", "output1_scale_gate_scalar", "output2_scale_scalar")
    if spec.quant.key("a1") is None:
        return found | dict.fromkeys(names)
    if scheme_of(spec) == "mxfp4":
        codes, scale = rounded_rows(x, spec, "a1")
        return found | dict.fromkeys(names) | dict(hidden_states=codes, hidden_states_scale=scale.view(torch.uint8))
    a1, a2 = one(quant.a1_gscale, "a1_gscale"), one(quant.a2_gscale, "a2_gscale")
    codes, scale = rounded_rows(x, spec, "a1", whole=a1)
    g13, g2 = experts.up[0].global_scale, experts.down.global_scale  # type: ignore[union-attr]
    if isinstance(g13, list) or isinstance(g2, list) or g13 is None or g2 is None:
        raise MoEFxRuntimeError(f"nvfp4 wants global scales of the {e.experts} experts as one tensor each")
    values = (g13 * a1 / a2, g13 * a1, g2 * a2)
    factors = dict(zip(names, values, strict=True))
    return found | factors | dict(hidden_states=codes, hidden_states_scale=scale)


def _padded(bias: Tensor | list[Tensor] | None) -> Tensor | None:
    """Biases as the layout made them, of padded sizes."""
    if isinstance(bias, list):
        raise MoEFxRuntimeError("TRT-LLM wants biases as one tensor")
    return bias
