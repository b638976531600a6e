"""FlashInfer's CUTLASS experts: plain weights, float8 with one scale or blocks, nvfp4, mxfp4 with mxfp8 inputs.

Gate and up change places in the layout.  Inputs are quantised by the reference's definition.  Not run: no GPU here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_fx.binding import Experts
from moe_fx.kernels.config import FusedMoEQuantConfig
from moe_fx.kernels.libraries.adapter import (
    RoutedExperts,
    Routing,
    adapter,
    attribute,
    biases_of,
    packed,
    rounded_rows,
    scheme_of,
    swiglu_params,
    tensors_of,
)
from moe_fx.reasons import MoEFxRuntimeError
from moe_fx.spec import MoESpec

SWIGLU, GEGLU_TANH = 3, 8  # ActivationType; with alpha, beta and limit the first is any SwiGLU


class FlashInferCutlass(RoutedExperts):
    """scheme: of the layout, where it is not that of the weights alone."""

    scheme = ""

    @classmethod
    def layout_for(cls, spec: MoESpec) -> str:
        return packed("flashinfer_cutlass", cls.scheme or scheme_of(spec))

    def call(self, x: Tensor, routed: Routing, experts: Experts, spec: MoESpec) -> Tensor:
        function = attribute("flashinfer.fused_moe", "cutlass_fused_moe")
        kinds = attribute("flashinfer.tllm_enums", "ActivationType")
        found = arguments(x, routed, experts, spec, self.quant_config)
        function(**found | {"activation_type": kinds(found["activation_type"])})
        return found["output"]


@adapter("flashinfer_cutlass", rank=11)
class FlashInferCutlassExperts(FlashInferCutlass):
    """Plain weights, or float8 with one scale an expert."""


@adapter("flashinfer_cutlass_hopper", rank=11)
class FlashInferCutlassBlockExperts(FlashInferCutlass):
    """float8 in blocks of 128; it quantises its inputs itself."""


@adapter("flashinfer_cutlass_nvfp4", rank=11)
class FlashInferCutlassNvfp4Experts(FlashInferCutlass):
    """nvfp4 weights and inputs."""


@adapter("flashinfer_cutlass_mxfp4_mxfp8", rank=11)
class FlashInferCutlassMxfp4Experts(FlashInferCutlass):
    """mxfp4 weights, mxfp8 inputs."""

    scheme = "mxfp4_mxfp8"

    @classmethod
    def refuses(cls, spec: MoESpec) -> tuple[str, str] | None:
        e = spec.expert
        if e.hidden % 128 or e.intermediate % 128:
            return "veto.shape", f"H={e.hidden}, I={e.intermediate}: it pads both to 128, and x is not padded"
        return super().refuses(spec)


def arguments(
    x: Tensor, routed: Routing, experts: Experts, spec: MoESpec, quant: FusedMoEQuantConfig
) -> dict[str, Any]:
    """Of ``flashinfer.fused_moe.cutlass_fused_moe``; ``activation_type`` as a number, ``output`` a new tensor."""
    e, (up,) = spec.expert, experts.up
    E, H, I = e.experts, e.hidden, e.intermediate  # noqa: E741
    w13, s13 = tensors_of(up)
    w2, s2 = tensors_of(experts.down)
    b13, b2 = biases_of(experts, ((E, 2 * I), (E, H)), x.dtype)
    found: dict[str, Any] = dict(
        input=x,
        token_selected_experts=routed.ids,
        token_final_scales=routed.weights,
        fc1_expert_weights=w13,
        fc2_expert_weights=w2,
        output_dtype=x.dtype,
        quant_scales=[],
        fc1_expert_biases=b13,
        fc2_expert_biases=b2,
        output=torch.empty_like(x),
        activation_type=GEGLU_TANH if e.act == "gelu_tanh" else SWIGLU,
    )
    if (params := swiglu_params(e)) is not None:
        names = ("swiglu_alpha", "swiglu_beta", "swiglu_limit")
        found |= {n: torch.full((E,), v, device=x.device) for n, v in zip(names, params, strict=True)}
    match scheme_of(spec):
        case "bf16":
            return found
        case "fp8_tensor":
            a1, a2 = one(quant.a1_scale, "a1_scale"), one(quant.a2_scale, "a2_scale")
            codes, _ = rounded_rows(x, spec, "a1", a1)
            assert s13 is not None
            assert s2 is not None
            scales = [s13.reshape(-1) * a1, a2.reciprocal(), s2.reshape(-1) * a2, a1]
            return found | dict(input=codes, quant_scales=scales)
        case "fp8_block":
            return found | dict(quant_scales=[s13, s2], use_deepseek_fp8_block_scale=True)
        case "nvfp4":
            a1, a2 = one(quant.a1_gscale, "a1_gscale"), one(quant.a2_gscale, "a2_gscale")
            codes, scale = rounded_rows(x, spec, "a1", whole=a1)
            g13, g2 = up.global_scale, experts.down.global_scale  # type: ignore[union-attr]
            s13, s2 = (s.view(torch.int32) for s in (s13, s2))  # type: ignore[union-attr]
            scales = [a1.reciprocal(), s13, g13 * a1, a2.reciprocal(), s2, g2 * a2]
            longs = {n: found[n].view(torch.long) for n in ("fc1_expert_weights", "fc2_expert_weights")}
            return found | longs | dict(input=codes, input_sf=scale, swizzled_input_sf=False, quant_scales=scales)
        case "mxfp4":
            codes, scale = rounded_rows(x, spec, "a1")
            s13, s2 = (s.view(torch.int32) for s in (s13, s2))  # type: ignore[union-attr]
            ones = torch.ones(E, device=x.device)
            longs = {n: found[n].view(torch.long) for n in ("fc1_expert_weights", "fc2_expert_weights")}
            scaled = dict(input_sf=scale.view(torch.uint8), swizzled_input_sf=False, use_mxfp8_act_scaling=True)
            return found | longs | scaled | dict(input=codes, quant_scales=[s13, ones, s2, ones])
        case other:
            raise MoEFxRuntimeError(f"cutlass_fused_moe has no scheme {other or spec.quant.w13!r}")


def one(scale: object, name: str) -> Tensor:
    """A given scale of all inputs."""
    if not isinstance(scale, Tensor) or scale.numel() != 1:
        raise MoEFxRuntimeError(f"the library wants {name} as one given number for all experts")
    return scale.reshape(()).float()
