"""Who is timed: our kernels, PyTorch and transformers, and in ``peers`` other libraries.

One class a contender.  ``available`` says why it cannot take a shape here ("" where it can), ``prepare`` lays out what
it needs and leaves a call of (x [T, H], ids [T, k], weights [T, k]) → y [T, H].
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import moe_fx
import moe_fx.kernels.experts
from benchmarks.gpu.shapes import Layer, Shape, apply
from benchmarks.gpu.timing import Run
from moe_fx.kernels.build import run
from moe_fx.kernels.registry import kernel

GATHERED = 24 << 30  # bytes of weights that a call may copy before it is left out

Part = Literal["kernels", "peers", "rest"]
CONTENDERS: dict[str, Contender] = {}
BASE = "hf_grouped_mm"  # what speeds are compared with


class Contender:
    """captures: a CUDA graph may hold a call.  part: of the run, in which it is timed."""

    name: ClassVar[str] = ""
    part: ClassVar[Part] = "kernels"
    captures: ClassVar[bool] = True

    def __init_subclass__(cls) -> None:
        if cls.name in CONTENDERS:
            raise ValueError(f"contender {cls.name!r} is registered twice")
        if cls.name:
            CONTENDERS[cls.name] = cls()

    def available(self, device: torch.device) -> str:
        """Why it cannot run on this machine; empty where it can."""
        return ""

    def takes(self, shape: Shape, tokens: int) -> str:
        """Why it cannot run such a layer; empty where it can."""
        return ""

    def prepare(self, layer: Layer) -> Run:
        raise NotImplementedError


class Ours(Contender):
    """One of our registered kernels, as the op calls it."""

    kernel: ClassVar[str] = ""

    def prepare(self, layer: Layer) -> Run:
        chosen, experts, spec = kernel(self.kernel), layer.experts, layer.shape.spec
        return lambda x, ids, weights: run(chosen, x, ids, weights, experts, spec)


class Triton(Ours):
    name, kernel = "moe_fx:triton", "triton"


class TorchGrouped(Ours):
    name, kernel = "moe_fx:torch_grouped", "torch_grouped"


class Plain(Contender):
    """``torch.nn.functional.grouped_mm`` with nothing around it that a layer does not need."""

    name = "torch_grouped_mm"

    def available(self, device: torch.device) -> str:
        return "" if hasattr(F, "grouped_mm") else "this torch has no torch.nn.functional.grouped_mm"

    def prepare(self, layer: Layer) -> Run:
        s = layer.shape
        w13, w2, *biases = layer.operands
        first, second = (w13, w2) if s.oai else (w13.transpose(1, 2), w2.transpose(1, 2))
        each = torch.arange(s.experts, device=w13.device)

        def call(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            expert, order = ids.flatten().sort()
            ends = torch.searchsorted(expert, each, right=True, out_int32=True)
            token = order // s.top_k
            rows = F.grouped_mm(x[token], first, offs=ends)
            if biases:
                rows += biases[0][expert]
            rows = F.grouped_mm(apply(rows, s), second, offs=ends)
            if biases:
                rows += biases[1][expert]
            rows = rows.float() * weights.flatten()[order, None]
            if s.of:  # rows after the last end are undefined
                rows = rows.masked_fill((expert == s.experts)[:, None], 0)
            return torch.zeros_like(x, dtype=torch.float32).index_add_(0, token, rows).to(x.dtype)

        return call


class Transformers(Contender):
    """transformers' experts module under one of its implementations."""

    implementation: ClassVar[str] = ""

    def prepare(self, layer: Layer) -> Run:
        def call(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            layer.implementation(self.implementation)
            found: Tensor = layer.module(x, ids, weights)
            return found

        return call


class GroupedMM(Transformers):
    name, implementation = BASE, "grouped_mm"


class Eager(Transformers):
    name, implementation, part, captures = "hf_eager", "eager", "rest", False


class BatchedMM(Transformers):
    name, implementation, part = "hf_batched_mm", "batched_mm", "rest"

    def takes(self, shape: Shape, tokens: int) -> str:
        copied = tokens * shape.top_k * shape.expert_bytes
        return "" if copied <= GATHERED else f"it would copy {copied / 1e9:.0f} GB of weights"


class Block(torch.nn.Module):
    """x [T, H] and scores [T, E] → y: the k best scores are ids and weights.  moe_fx wants to see the choice: ids that
    somebody hands in may be any."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.experts, self.top_k = layer.module, layer.shape.top_k

    def forward(self, x: Tensor, scores: Tensor) -> Tensor:
        weights, ids = scores.topk(self.top_k, dim=-1)
        found: Tensor = self.experts(x, ids, weights)
        return found


class Compiled(Contender):
    """A block of transformers' experts under grouped_mm, compiled for a number of tokens that may change.  Its time
    holds a scatter and a topk more than that of others."""

    part: ClassVar[Part] = "rest"

    def takes(self, shape: Shape, tokens: int) -> str:
        return "the block that is compiled holds all experts" if shape.of else ""

    def compile(self, block: Block, device: torch.device) -> Any:
        raise NotImplementedError

    def prepare(self, layer: Layer) -> Run:
        torch._dynamo.reset()
        compiled = self.compile(Block(layer), layer.device)

        def call(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            layer.implementation("grouped_mm")  # Dynamo guards on it
            scores = weights.new_zeros(len(x), layer.shape.experts).scatter(1, ids, weights)
            for t in (x, scores):
                torch._dynamo.maybe_mark_dynamic(t, 0)
            found: Tensor = compiled(x, scores)
            return found

        return call


class CompiledOurs(Compiled):
    """Raises where the block is not fused: that would time the inner backend."""

    name = "moe_fx:compiled"

    def compile(self, block: Block, device: torch.device) -> Any:
        return moe_fx.compile(block, inner_backend=inner(device))

    def prepare(self, layer: Layer) -> Run:
        call, fused = super().prepare(layer), False

        def checked(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            nonlocal fused
            y: Tensor = call(x, ids, weights)
            if not fused and not (report := moe_fx.last_report()).num_fused:
                reasons = sorted({str(r) for site in report.sites for r in site.rejects})
                raise RuntimeError(f"not fused: {'; '.join(reasons)}")
            fused = True
            return y

        return checked


class CompiledGrouped(Compiled):
    name = "inductor_grouped_mm"

    def compile(self, block: Block, device: torch.device) -> Any:
        return torch.compile(block, backend=inner(device))


def inner(device: torch.device) -> str:
    """What compiles graphs: in a dry run nothing does, so that it takes no time."""
    return "inductor" if device.type == "cuda" else "aot_eager"
