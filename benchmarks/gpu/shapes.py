"""The layers that are measured: sizes of public models, their weights, routings that rotate, and what is true of them.

From a ``Shape`` comes a ``Layer``: transformers' own experts module with random bfloat16 weights, the same weights as
``moe_fx`` sees them, and inputs (x [T, H], ids [T, k], weights [T, k]).  ``truth`` is y by definition in float32.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_fx.binding import Experts, bind, parse_binding
from moe_fx.spec import ExpertSpec, MoESpec

ROUTINGS = 4  # that measurements rotate over
BOUND = 2e-2  # of the relative RMS error: three roundings to bfloat16 give 4e-3, one wrong expert of eight 0.35
Inputs = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Shape:
    """experts, top_k, hidden, intermediate: E, k, H, I.  of: experts of the whole model, of which this device holds the
    first E (0: all of them); ids of the others are E.  oai: gpt-oss' experts, that is clamped SwiGLU, biases, gate and
    up in turn, matrices stored as [in, out]."""

    experts: int
    top_k: int
    hidden: int
    intermediate: int
    of: int = 0
    oai: bool = False

    @property
    def spec(self) -> MoESpec:
        sizes = (self.experts, self.hidden, self.intermediate)
        if self.oai:
            return MoESpec(self.top_k, ExpertSpec(*sizes, "swiglu_oai", (1.702, 7.0), w13_bias=True, w2_bias=True))
        return MoESpec(self.top_k, ExpertSpec(*sizes))

    @property
    def expert_bytes(self) -> int:
        """Of the matrices of one expert, bfloat16."""
        return 6 * self.hidden * self.intermediate

    def small(self) -> Shape:
        """The same kind of layer at the sizes of a dry run."""
        return replace(self, experts=4, top_k=2, hidden=64, intermediate=32, of=8 if self.of else 0)


SHAPES = {
    "qwen3-30b-a3b": Shape(128, 8, 2048, 768),
    "mixtral-8x7b": Shape(8, 2, 4096, 14336),
    "olmoe-1b-7b": Shape(64, 8, 2048, 1024),
    "gpt-oss-20b": Shape(32, 4, 2880, 2880, oai=True),
    "deepseek-v3-ep8": Shape(32, 8, 7168, 2048, of=256),
    "granite-1b-a400m": Shape(32, 8, 1024, 512),
}
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 1024, 4096, 16384)
CHECKED = (1, 17, 512)
DRY_TOKENS, DRY_CHECKED = (1, 2, 4, 8), (1, 5, 8)


@dataclass(slots=True)
class Layer:
    """module: transformers' experts, called with (x, ids, weights); its parameters are all the weights there are."""

    name: str
    shape: Shape
    module: Any
    device: torch.device

    @property
    def operands(self) -> list[Tensor]:
        """As ``experts`` reads them: w13, w2, and where there are biases those of both."""
        m = self.module
        found = [m.gate_up_proj, m.down_proj]
        if self.shape.oai:
            found += [m.gate_up_proj_bias, m.down_proj_bias]
        return [p.detach() for p in found]

    @property
    def experts(self) -> Experts:
        return self.views(self.operands)

    def views(self, operands: list[Tensor]) -> Experts:
        """Tensors in the model's storage as [E, out, in]."""
        text = "bind/1 w13:stacked:out_in:gate_up w2:stacked:out_in:gate_up"
        if self.shape.oai:
            text = (
                "bind/1 w13:stacked:in_out:interleaved w2:stacked:in_out:gate_up "
                "w13_bias:stacked:out_in:interleaved w2_bias:stacked:out_in:gate_up"
            )
        return bind(parse_binding(text), operands, self.shape.experts)

    def implementation(self, name: str) -> None:
        """Which of transformers' experts functions the module runs."""
        self.module.config._experts_implementation = name

    def inputs(self, tokens: int, seed: int = 0) -> list[Inputs]:
        """ROUTINGS times (x bfloat16, ids int64, weights bfloat16): uniform routing, all different."""
        s, draw = self.shape, torch.Generator(self.device).manual_seed(1000 * tokens + seed)
        found = []
        for _ in range(ROUTINGS):
            x = torch.randn(tokens, s.hidden, device=self.device, generator=draw)
            scores = torch.rand(tokens, s.of or s.experts, device=self.device, generator=draw)
            weights, ids = scores.topk(s.top_k, dim=-1)
            weights = weights / weights.sum(-1, keepdim=True)
            found.append((x.bfloat16(), ids.clamp(max=s.experts), weights.bfloat16()))
        return found


def build(name: str, shape: Shape, device: torch.device) -> Layer:
    """Random weights N(0, 1/in), the same on every run."""
    sizes = dict(hidden_size=shape.hidden)
    module: nn.Module
    with torch.device("meta"):
        if shape.oai:
            from transformers import GptOssConfig
            from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

            module = GptOssExperts(
                GptOssConfig(num_local_experts=shape.experts, intermediate_size=shape.intermediate, **sizes)
            )
        else:
            from transformers import Qwen3MoeConfig
            from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

            module = Qwen3MoeExperts(
                Qwen3MoeConfig(num_experts=shape.experts, moe_intermediate_size=shape.intermediate, **sizes)
            )
    module = module.to(torch.bfloat16).to_empty(device=device).requires_grad_(False)
    draw = torch.Generator(device).manual_seed(0)
    for parameter in module.parameters():
        fan_in = {3: parameter.shape[1 if shape.oai else -1], 2: 4}[parameter.dim()]
        for one in parameter:  # an expert at a time: drawn in float32
            one.copy_(torch.randn(one.shape, device=device, generator=draw) * fan_in**-0.5)
    layer = Layer(name, shape, module, device)
    layer.implementation("grouped_mm")
    layer.module._is_expert_parallel = bool(shape.of)  # then an id of E is that of another device's expert
    return layer


def apply(gate_up: Tensor, shape: Shape) -> Tensor:
    """Rows of w13's product, in the order that they are stored in → hidden."""
    if shape.oai:
        gate, up = gate_up[..., ::2].clamp(max=7.0), gate_up[..., 1::2].clamp(-7.0, 7.0)
        return gate * torch.sigmoid(1.702 * gate) * (up + 1)
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def truth(layer: Layer, inputs: Inputs, operands: list[Tensor] | None = None) -> Tensor:
    """y [T, H] float32: expert by expert, by definition.  operands: others in place of the layer's, same storage."""
    s, (x, ids, weights) = layer.shape, inputs
    w13, w2, *biases = (t.unbind() for t in operands or layer.operands)
    y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for e in range(s.experts):
        token, slot = torch.where(ids == e)
        first, second = (w[e].float() if s.oai else w[e].float().t() for w in (w13, w2))
        b13, b2 = (b[e].float() for b in biases) if biases else (0.0, 0.0)
        out = apply(x[token].float() @ first + b13, s) @ second + b2
        y = y.index_add(0, token, out * weights[token, slot, None].float())
    return y


def error(actual: Tensor, exact: Tensor) -> float:
    """Root mean square of the difference over that of ``exact``; where that is 0, of the difference; inf if not finite
    or of another shape."""
    if actual.shape != exact.shape or not bool(actual.isfinite().all()):
        return float("inf")
    scale = exact.double().norm()
    difference = (actual.double() - exact.double()).norm()
    return float(difference / scale) if scale > 0 else float(difference)


def work(shape: Shape, inputs: list[Inputs]) -> tuple[float, float]:
    """(FLOP, bytes of the matrices of experts that some token reached), the mean of the routings."""
    rows = [int((ids < shape.experts).sum()) for _, ids, _ in inputs]
    reached = [int(ids[ids < shape.experts].unique().numel()) for _, ids, _ in inputs]
    flop = sum(rows) / len(rows) * 6 * shape.hidden * shape.intermediate
    return flop, sum(reached) / len(reached) * shape.expert_bytes
