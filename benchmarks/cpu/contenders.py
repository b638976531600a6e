"""Who takes part: experts kernels of ours by name, transformers' functions, and libraries that are installed.

A contender is a function of (x, ids, weights).  Libraries run through the same modular kernel as ours, on weights that
were packed before the clock starts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import moe_fx.kernels.experts
import moe_fx.kernels.libraries  # noqa: F401  both register their kernels
from moe_fx import hardware
from moe_fx.binding import Experts, bind, parse_binding
from moe_fx.kernels.build import run
from moe_fx.kernels.experts.torch_experts import TorchExperts
from moe_fx.kernels.registry import KERNELS, Kernel
from moe_fx.spec import ExpertSpec, MoESpec
from moe_fx.weights import WeightStore

BINDING = parse_binding("bind/1 w13:stacked:out_in:gate_up w2:stacked:out_in:gate_up")
OURS = ("cpp", "torch_grouped", "sorted_loop")
PEERS = ("vllm_cpu_sgl", "vllm_cpu", "zentorch")
GATHER_ROWS = 32  # routed rows above which a contender that copies the weights of every row is left out
Run = Callable[[Tensor, Tensor, Tensor], Any]


@dataclass(frozen=True)
class Layer:
    """w13 [E, 2I, H], w2 [E, H, I]; gated SiLU, k experts a token."""

    w13: Tensor
    w2: Tensor
    top_k: int
    store: WeightStore = field(default_factory=WeightStore)

    @classmethod
    def draw(cls, experts: int, top_k: int, hidden: int, intermediate: int, dtype: torch.dtype) -> Layer:
        shapes = (experts, 2 * intermediate, hidden), (experts, hidden, intermediate)
        return cls(*((torch.randn(shape) * 0.02).to(dtype) for shape in shapes), top_k)

    @property
    def spec(self) -> MoESpec:
        experts, hidden, intermediate = self.w2.shape
        return MoESpec(self.top_k, ExpertSpec(experts, hidden, intermediate))

    def view(self, layout: str = "view") -> Experts:
        return self.store.get(layout, BINDING, [self.w13, self.w2], len(self.w2))

    def module(self, w13: Tensor | None = None, w2: Tensor | None = None) -> Any:
        """What transformers' experts functions read from a module."""
        return SimpleNamespace(
            gate_up_proj=self.w13 if w13 is None else w13,
            down_proj=self.w2 if w2 is None else w2,
            num_experts=len(self.w2),
            has_gate=True,
            has_bias=False,
            has_post_expert_norm=False,
            is_transposed=False,
            _is_expert_parallel=False,
            _apply_gate=lambda rows: F.silu(rows.chunk(2, -1)[0]) * rows.chunk(2, -1)[1],
        )

    def routing(self, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        weights, ids = torch.rand(tokens, len(self.w2)).topk(self.top_k, -1)
        x = torch.randn(tokens, self.w2.shape[1])
        return x.to(self.w2.dtype), ids, (weights / weights.sum(-1, keepdim=True)).to(self.w2.dtype)


def forward(layer: Layer, rows: int) -> dict[str, Run]:
    """rows: routed ones."""
    from transformers.integrations.moe import batched_mm_experts_forward, grouped_mm_experts_forward

    device, runs = hardware.detect(torch.device("cpu")), dict[str, Run]()
    for name in (*OURS, *PEERS):
        kernel = KERNELS[name]
        dtype = str(layer.w2.dtype).removeprefix("torch.")
        if kernel.capability.packages <= device.installed and dtype in kernel.capability.dtypes:
            runs[name] = _kernel(kernel, layer)
    module = layer.module()
    runs["hf_grouped_mm"] = lambda *given: grouped_mm_experts_forward(module, *given)
    if rows <= GATHER_ROWS:
        runs["hf_batched_mm"] = lambda *given: batched_mm_experts_forward(module, *given)
    return runs


def _kernel(kernel: Kernel, layer: Layer) -> Run:
    experts = layer.view(kernel.experts.layout_for(layer.spec) or "view")
    return lambda x, ids, weights: run(kernel, x, ids, weights, experts, layer.spec)


def training(layer: Layer) -> dict[str, Run]:
    """Forward and backward with gradients of all: ours by hand, transformers' by autograd."""
    from transformers.integrations.moe import grouped_mm_experts_forward

    def ours(name: str) -> Run:
        kernel = KERNELS[name]
        assert issubclass(kernel.experts, TorchExperts)
        differentiate = kernel.experts.differentiate

        def both(x: Tensor, ids: Tensor, weights: Tensor) -> Any:
            saved: list[Tensor] = []
            y = run(kernel, x, ids, weights, layer.view(), layer.spec, keep=saved)
            grads = bind(BINDING, [torch.empty_like(layer.w13), torch.empty_like(layer.w2)], len(layer.w2))
            return differentiate(torch.ones_like(y), x, ids, weights, layer.view(), layer.spec, grads, saved)

        return both

    def transformers(x: Tensor, ids: Tensor, weights: Tensor) -> Any:
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in (x, weights, layer.w13, layer.w2)]
            y = grouped_mm_experts_forward(layer.module(*leaves[2:]), leaves[0], ids, leaves[1])
            return torch.autograd.grad(y, leaves, torch.ones_like(y))

    installed = hardware.detect(torch.device("cpu")).installed
    names = [name for name in ("cpp", "sorted_loop") if KERNELS[name].capability.packages <= installed]
    return {**{name: ours(name) for name in names}, "hf_grouped_mm": transformers}
