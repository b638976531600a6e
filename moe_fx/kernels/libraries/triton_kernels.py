"""OpenAI's Triton kernels (``matmul_ogs``): mxfp4 weights, the activation of gpt-oss in the first product.

Weights are read in plain order, [in, out] of each expert with in running fastest.  Not run: no GPU here.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_fx.binding import Experts
from moe_fx.kernels.libraries.adapter import RoutedExperts, Routing, adapter, attribute, biases_of, package, scaled
from moe_fx.spec import MoESpec


def member(module: str, name: str) -> Any:
    """Of the library."""
    return attribute(f"{package('triton_kernels')}.{module}", name)


class Order(NamedTuple):
    """sorted int32 [S]: flat position of each row by expert.  places int32 [S]: the sorted row of each flat position.
    counts int32 [E].  weights [S]: of the sorted rows."""

    sorted: Tensor
    places: Tensor
    counts: Tensor
    weights: Tensor


def order(routed: Routing, experts: int) -> Order:
    """Waits for no device."""
    flat = routed.ids.reshape(-1)
    found = flat.argsort(stable=True)
    counts = torch.zeros(experts, dtype=torch.int32, device=flat.device)
    counts.index_add_(0, flat, torch.ones_like(flat))
    return Order(found.int(), found.argsort().int(), counts, routed.weights.reshape(-1)[found])


@adapter("triton_kernels", rank=17)
class TritonKernelsExperts(RoutedExperts):
    @classmethod
    def layout_for(cls, spec: MoESpec) -> str:
        return "triton_kernels.mxfp4"

    def call(self, x: Tensor, routed: Routing, experts: Experts, spec: MoESpec) -> Tensor:
        matmul = member("matmul_ogs", "matmul_ogs")
        data = RoutingObjects(order(routed, spec.expert.experts), spec)
        up, down = arguments(x, experts, spec, data)
        return matmul(**down | {"x": matmul(**up)})


class RoutingObjects:
    """The library's own objects, made from an Order."""

    def __init__(self, found: Order, spec: MoESpec) -> None:
        e, k, rows = spec.expert.experts, spec.top_k, len(found.sorted)
        blocks = member("routing", "compute_expt_data")(found.counts, e, rows)
        self.data = member("routing", "RoutingData")(found.weights, found.counts, e, k, blocks)
        self.gather = member("routing", "GatherIndx")(src_indx=found.sorted, dst_indx=found.places)
        self.scatter = member("routing", "ScatterIndx")(src_indx=found.places, dst_indx=found.sorted)
        alpha, limit = spec.expert.act_params
        swiglu = member("swiglu", "swiglu_fn")
        specs = member("matmul_ogs", "FnSpecs")("swiglu", swiglu, ("alpha", "limit"))
        self.activation = member("matmul_ogs", "FusedActivation")(specs, (alpha, limit), 2)
        self.precision = member("matmul_ogs", "PrecisionConfig")


def arguments(x: Tensor, experts: Experts, spec: MoESpec, data: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of both calls of ``triton_kernels.matmul_ogs.matmul_ogs``; x of the second is the result of the first.

    data: with the library's ``data``, ``gather``, ``scatter``, ``activation`` and ``precision(weight_scale=…)``.
    """
    e, (up,) = spec.expert, experts.up
    (w13, s13), (w2, s2) = scaled(up), scaled(experts.down)
    shapes = (e.experts, 2 * e.intermediate), (e.experts, e.hidden)
    b13, b2 = biases_of(experts, shapes, torch.float32)

    def turned(tensor: Tensor) -> Tensor:
        return tensor.view(torch.uint8).transpose(-2, -1)

    first = dict(
        x=x,
        w=turned(w13),
        bias=b13,
        routing_data=data.data,
        gather_indx=data.gather,
        precision_config=data.precision(weight_scale=turned(s13)),
        fused_activation=data.activation,
    )
    second = dict(
        w=turned(w2),
        bias=b2,
        routing_data=data.data,
        scatter_indx=data.scatter,
        precision_config=data.precision(weight_scale=turned(s2)),
        gammas=data.data.gate_scal,
    )
    return first, second
