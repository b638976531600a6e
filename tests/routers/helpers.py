"""A block whose router is a function of logits, and a backend that fuses experts and router."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moe_fx.ops_moe  # noqa: F401  registers the op
from moe_fx.backend import moe_fx as backend
from moe_fx.passes.routers import Outcome, fuse_routers

from .formulas import E, K, Written

H, I = 16, 12  # noqa: E741


class Block(nn.Module):
    """x [.., H] → (y, logits): ``written`` routes; stacked experts, gathered and multiplied in one batch."""

    def __init__(self, written: Written, dtype: torch.dtype = torch.float32, seed: int = 0):
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.written = written
        self.gate = nn.Parameter((torch.randn(E, H, generator=draw) * H**-0.5).to(dtype))
        self.w13 = nn.Parameter((torch.randn(E, 2 * I, H, generator=draw) * H**-0.5).to(dtype))
        self.w2 = nn.Parameter((torch.randn(E, H, I, generator=draw) * I**-0.5).to(dtype))
        self.scale = nn.Parameter((torch.rand(E, generator=draw) + 0.5).to(dtype))
        self.register_buffer("bias", torch.randn(E, generator=draw) * 0.1)

    def logits(self, rows: Tensor) -> Tensor:
        return F.linear(rows, self.gate)

    def forward(self, x: Tensor) -> tuple[Any, ...]:
        rows = x.reshape(-1, H)
        logits = self.logits(rows)
        ids, weights = self.written(logits, self.bias, self.scale)
        return self.experts(rows, ids, weights).view(x.shape), logits

    def experts(self, rows: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        flat = ids.reshape(-1)
        chosen = rows.repeat_interleave(K, 0).unsqueeze(-1)
        gate, up = torch.bmm(self.w13[flat], chosen).squeeze(-1).chunk(2, -1)
        out = torch.bmm(self.w2[flat], (F.silu(gate) * up).unsqueeze(-1)).squeeze(-1)
        out = out.view(-1, K, H) * weights.unsqueeze(-1)
        return out.sum(1).to(rows.dtype)


class Fused:
    """``module`` compiled with experts and router fused.  outcomes, graphs: of every graph that was compiled."""

    def __init__(self, module: nn.Module, **compile_options: Any):
        torch._dynamo.reset()
        self.outcomes: list[Outcome] = []
        self.graphs: list[torch.fx.GraphModule] = []
        self.compiled = torch.compile(module, backend=self._backend, **compile_options)

    def _backend(self, gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        backend(gm, inputs, options={"inner_backend": "eager", "strict": True})
        self.outcomes += fuse_routers(gm, inputs)
        self.graphs.append(gm)
        return gm.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.compiled(*args, **kwargs)

    def calls(self, name: str) -> int:
        return sum(name in str(n.target) for gm in self.graphs for n in gm.graph.nodes if n.op != "placeholder")


def x_of(rows: int = 24, dtype: torch.dtype = torch.float32, seed: int = 5) -> Tensor:
    return torch.randn(rows, H, generator=torch.Generator().manual_seed(seed)).to(dtype)


def results(module: Any, owner: nn.Module, x: Tensor) -> tuple[list[Tensor], dict[str, Tensor]]:
    """(floating outputs, gradients by name of x and of every parameter that has one)."""
    x = x.clone().requires_grad_()
    owner.zero_grad()
    outputs = [o for o in module(x) if o.is_floating_point()]
    draw = torch.Generator().manual_seed(9)
    loss = sum((o * torch.randn(o.shape, generator=draw)).sum() for o in outputs if o.requires_grad)
    loss.backward()  # type: ignore[union-attr]
    grads = {n: p.grad.clone() for n, p in owner.named_parameters() if p.grad is not None}
    return [o.detach() for o in outputs], {"x": x.grad, **grads}  # type: ignore[dict-item]
