"""Experts of other libraries, called as their own documentation says, where they can be imported.

Their weights are laid out once, before anything is timed.  None has been run by us: a failure is a row of the report.
"""

from __future__ import annotations

import importlib
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.contenders import Contender, Part
from benchmarks.gpu.shapes import Layer, Shape
from benchmarks.gpu.timing import Run, reason_of


class Peer(Contender):
    """module, function: what has to be importable, the first place that has it."""

    part: ClassVar[Part] = "peers"
    places: ClassVar[tuple[tuple[str, str], ...]] = ()

    def available(self, device: torch.device) -> str:
        if device.type != "cuda":
            return "it needs CUDA"
        return self.find()[1]

    def find(self) -> tuple[Any, str]:
        """(the function, "") or (None, why it cannot be had)."""
        reasons = []
        for module, name in self.places:
            try:
                return getattr(importlib.import_module(module), name), ""
            except Exception as fault:  # noqa: BLE001  a library may fail in any way as it is imported
                reasons.append(reason_of(fault))
        return None, "; ".join(dict.fromkeys(reasons))


def plain_only(shape: Shape) -> str:
    return "it knows no gpt-oss experts" if shape.oai else ""


def straight(layer: Layer) -> tuple[Tensor, ...]:
    """(w13 [E, 2I, H], w2 [E, H, I], biases …) in rows, as most libraries read them; a copy where the model's are
    stored the other way."""
    w13, w2, *biases = layer.operands
    if layer.shape.oai:
        w13, w2 = w13.transpose(1, 2).contiguous(), w2.transpose(1, 2).contiguous()
    return w13, w2, *biases


class Liger(Peer):
    """Its routing asks the device how many tiles there are."""

    name, captures = "liger", False
    places = (("liger_kernel.ops.fused_moe", "LigerFusedMoEFunction"),)

    def takes(self, shape: Shape, tokens: int) -> str:
        return plain_only(shape) or ("it knows no experts of other devices" if shape.of else "")

    def prepare(self, layer: Layer) -> Run:
        function = self.find()[0]
        w13, w2 = layer.operands
        return lambda x, ids, weights: function.apply(x, w13, w2, ids.int(), weights)


class Vllm(Peer):
    """Its Triton experts, with the tile sizes that it ships for this device or else its defaults."""

    name = "vllm_triton"
    places = (("vllm.model_executor.layers.fused_moe.fused_moe", "fused_experts"),)

    def prepare(self, layer: Layer) -> Run:
        function, s = self.find()[0], layer.shape
        w13, w2, *biases = straight(layer)
        more: dict[str, Any] = {}
        if s.oai:
            kinds = importlib.import_module("vllm.model_executor.layers.fused_moe.activation")
            config = importlib.import_module("vllm.model_executor.layers.fused_moe.config")
            more["activation"] = kinds.MoEActivation.SWIGLUOAI  # gate and up in turn, 1.702 and 7 built in
            more["quant_config"] = config.biased_moe_quant_config(*biases)
        if s.of:  # -1: not of this device
            places = torch.arange(s.experts + 1, dtype=torch.int32, device=layer.device)
            places[s.experts] = -1
            more |= dict(global_num_experts=s.experts + 1, expert_map=places)
        return lambda x, ids, weights: function(x, w13, w2, weights.float(), ids.int(), **more)


class FlashInfer(Peer):
    """Compiles its kernels at the first call, which takes minutes: run it once before."""

    name = "flashinfer_cutlass"
    places = (("flashinfer.fused_moe", "cutlass_fused_moe"),)

    def prepare(self, layer: Layer) -> Run:
        function, s = self.find()[0], layer.shape
        w13, w2, *biases = straight(layer)
        more: dict[str, Any] = {}
        if s.oai:
            w13, biases[0] = (torch.cat([t[:, 1::2], t[:, ::2]], 1) for t in (w13, biases[0]))
            params = dict(swiglu_alpha=1.702, swiglu_beta=1.0, swiglu_limit=7.0)
            more = {n: torch.full((s.experts,), v, device=layer.device) for n, v in params.items()}
            more |= dict(fc1_expert_biases=biases[0], fc2_expert_biases=biases[1])
        else:
            w13 = torch.cat(w13.chunk(2, 1)[::-1], 1)  # up before gate
        if s.of:  # this device is the first
            more |= dict(ep_size=s.of // s.experts, ep_rank=0)

        def call(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            y = torch.empty_like(x)
            function(x, ids.int(), weights.float(), w13, w2, x.dtype, [], output=y, **more)
            return y

        return call


class DeepGemm(Peer):
    """Its grouped products of bfloat16, PyTorch around them.  Rows of an expert start at multiples of 128."""

    name = "deep_gemm"
    places = (
        ("deep_gemm", "m_grouped_bf16_gemm_nt_contiguous"),
        ("vllm.third_party.deep_gemm", "m_grouped_bf16_gemm_nt_contiguous"),
    )
    alignment: ClassVar[int] = 128

    def takes(self, shape: Shape, tokens: int) -> str:
        return plain_only(shape)

    def prepare(self, layer: Layer) -> Run:
        product, s, step = self.find()[0], layer.shape, self.alignment
        w13, w2 = layer.operands

        def call(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            expert, order = ids.flatten().sort()
            ends = torch.searchsorted(expert, torch.arange(s.experts + 1, device=x.device), right=True)
            counts = ends.diff(prepend=ends.new_zeros(1))
            room = (counts + step - 1) // step * step
            size = (-(-len(expert) // step) + min(len(expert), s.experts + 1)) * step
            place = (room.cumsum(0) - room - ends + counts)[expert] + torch.arange(len(expert), device=x.device)
            layout = torch.full((size,), -1, dtype=torch.int32, device=x.device)
            layout[place] = expert.where(expert < s.experts, -1).int()
            rows = x.new_zeros(size, s.hidden)
            rows[place] = x[order // s.top_k]
            hidden = x.new_empty(size, 2 * s.intermediate)
            product(rows, w13, hidden, layout)
            gate, up = hidden.chunk(2, -1)
            out = x.new_empty(size, s.hidden)
            product(F.silu(gate) * up, w2, out, layout)
            mine = out[place].float() * weights.flatten()[order, None]
            mine = mine.masked_fill((expert == s.experts)[:, None], 0)
            return torch.zeros_like(x, dtype=torch.float32).index_add_(0, order // s.top_k, mine).to(x.dtype)

        return call
