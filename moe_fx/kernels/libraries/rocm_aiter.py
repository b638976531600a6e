"""AITER's fused experts for ROCm: the whole block of a token is one function.  Not run: no such GPU here."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from moe_fx.binding import Experts
from moe_fx.kernels.libraries.adapter import (
    RoutedExperts,
    Routing,
    adapter,
    attribute,
    biases_of,
    packed,
    scheme_of,
    tensors_of,
)
from moe_fx.quant import FP8_TENSOR
from moe_fx.spec import MoESpec

ACTIVATIONS = {"silu": "Silu", "gelu": "Gelu", "swiglu_oai": "Swiglu"}  # ActivationType
KINDS = {  # QuantType by scheme
    "bf16": "No",
    "fp8_tensor": "per_Tensor",
    "fp8_channel": "per_Token",
    "fp8_block": "per_128x128",
    "mxfp8": "per_1x32",
    "mxfp4": "per_1x32",
}


class Aiter(RoutedExperts):
    """One function for all schemes."""

    @classmethod
    def layout_for(cls, spec: MoESpec) -> str:
        plain = scheme_of(spec) == "mxfp4" and spec.quant.key("a1") is None
        return packed("aiter", scheme_of(spec) + "_bf16" * plain)

    @classmethod
    def refuses(cls, spec: MoESpec) -> tuple[str, str] | None:
        e = spec.expert
        if e.act == "swiglu_oai" and e.act_params != (1.702, 7.0):
            return "veto.activation", f"swiglu_oai with {e.act_params}; it has (1.702, 7.0) built in"
        return super().refuses(spec)

    def call(self, x: Tensor, routed: Routing, experts: Experts, spec: MoESpec) -> Tensor:
        function = attribute("aiter.fused_moe", "fused_moe")
        found = arguments(x, routed, experts, spec, self.quant_config.a1_scale, self.quant_config.a2_scale)
        found["activation"] = getattr(attribute("aiter", "ActivationType"), found["activation"])
        found["quant_type"] = getattr(attribute("aiter", "QuantType"), found["quant_type"])
        return function(**found)


@adapter("aiter", rank=8)
class AiterExperts(Aiter):
    """Plain weights, float8 with one scale or one a channel."""


@adapter("aiter_block", rank=8)
class AiterBlockExperts(Aiter):
    """float8 in blocks of 128."""


@adapter("aiter_mxfp8", rank=8)
class AiterMxfp8Experts(Aiter):
    """float8 weights and inputs, 32 share a power of two."""


@adapter("aiter_mxfp4", rank=8)
class AiterMxfp4Experts(Aiter):
    """mxfp4 weights and inputs."""


@adapter("aiter_mxfp4_bf16", rank=8)
class AiterMxfp4PlainExperts(Aiter):
    """mxfp4 weights, inputs as they are."""


def arguments(
    x: Tensor, routed: Routing, experts: Experts, spec: MoESpec, a1: object = None, a2: object = None
) -> dict[str, Any]:
    """Of ``aiter.fused_moe.fused_moe``; the two enumerations by the names of their members.  a1, a2: static scales."""
    e, (up,) = spec.expert, experts.up
    w13, s13 = tensors_of(up)
    w2, s2 = tensors_of(experts.down)
    b13, b2 = biases_of(experts, ((e.experts, 2 * e.intermediate), (e.experts, e.hidden)), x.dtype)
    static = spec.quant.key("w13") == FP8_TENSOR
    found = dict(
        hidden_states=x,
        w1=w13,
        w2=w2,
        topk_weight=routed.weights,
        topk_ids=routed.ids,
        activation=ACTIVATIONS[e.act],
        quant_type=KINDS[scheme_of(spec)],
        doweight_stage1=False,
        w1_scale=s13,
        w2_scale=s2,
        a1_scale=a1 if static else None,
        a2_scale=a2 if static else None,
    )
    return found | ({} if b13 is None and b2 is None else dict(bias1=b13, bias2=b2))
