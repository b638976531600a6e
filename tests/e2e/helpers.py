"""What the end-to-end tests share: two blocks without transformers, ways to compile them, and how results are compared.

`compiled` uses the entry point, as a user does; the rest of the graph goes to eager unless a test says otherwise.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from importlib.metadata import entry_points
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import moe_fx
from moe_fx.backend import moe_fx as function
from moe_fx.lowerings.dispatch import Dispatch
from moe_fx.ops import Call
from moe_fx.report import Report

INSTALLED = any(e.name == "moe_fx" for e in entry_points(group="torch_dynamo_backends"))
BACKEND: Any = "moe_fx" if INSTALLED else function


class Block(nn.Module):
    """A top-k block with stacked weights: gathered and multiplied in one batch, so Dynamo captures it whole."""

    def __init__(self, experts: int = 6, hidden: int = 16, inner: int = 12, top_k: int = 2, seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.hidden, self.top_k = hidden, top_k
        self.router = nn.Parameter(torch.randn(experts, hidden, generator=generator) * hidden**-0.5)
        self.w13 = nn.Parameter(torch.randn(experts, 2 * inner, hidden, generator=generator) * hidden**-0.5)
        self.w2 = nn.Parameter(torch.randn(experts, hidden, inner, generator=generator) * inner**-0.5)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = F.linear(x, self.router).softmax(-1).topk(self.top_k, dim=-1)
        return weights / weights.sum(-1, keepdim=True), ids

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.hidden)
        weights, ids = self.route(rows)
        flat = ids.reshape(-1)
        chosen = rows.repeat_interleave(self.top_k, 0).unsqueeze(-1)
        gate, up = torch.bmm(self.w13[flat], chosen).squeeze(-1).chunk(2, -1)
        out = torch.bmm(self.w2[flat], (F.silu(gate) * up).unsqueeze(-1)).squeeze(-1)
        out = out.view(-1, self.top_k, self.hidden) * weights.unsqueeze(-1)
        return out.sum(1).view(x.shape)


class ListBlock(nn.Module):
    """The same with one Linear per projection and expert: every expert on every token, weighted."""

    def __init__(self, experts: int = 4, hidden: int = 16, inner: int = 12, top_k: int = 2, seed: int = 0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.router = nn.Linear(hidden, experts, bias=False)
            self.gate = nn.ModuleList(nn.Linear(hidden, inner, bias=False) for _ in range(experts))
            self.up = nn.ModuleList(nn.Linear(hidden, inner, bias=False) for _ in range(experts))
            self.down = nn.ModuleList(nn.Linear(inner, hidden, bias=False) for _ in range(experts))
        self.top_k = top_k

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        weights, ids = self.router(rows).softmax(-1).topk(self.top_k, dim=-1)
        out = torch.zeros_like(rows)
        for e in range(len(self.down)):
            share = (weights * (ids == e)).sum(-1, keepdim=True)
            out = out + share * self.down[e](F.silu(self.gate[e](rows)) * self.up[e](rows))
        return out.view(x.shape)


class Stack(nn.Module):
    """Two blocks of one shape with a residual, between two linears."""

    def __init__(self, block: Callable[[], nn.Module] = Block, hidden: int = 16):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first, self.last = nn.Linear(hidden, hidden), nn.Linear(hidden, hidden)
        self.blocks = nn.ModuleList(block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return self.last(x)


def compiled(model: Any, *, fullgraph: bool = True, dynamic: bool | None = None, **options: Any) -> Any:
    """``torch.compile(model, backend="moe_fx", options=...)`` with inner_backend="eager" unless given."""
    chosen = {"inner_backend": "eager", **options}
    return torch.compile(model, backend=BACKEND, fullgraph=fullgraph, dynamic=dynamic, options=chosen)


def fresh() -> None:
    """Forgets all compiled code, reports, verdicts and packed weights."""
    torch._dynamo.reset()
    moe_fx.reset()


def all_fused(blocks: int) -> Report:
    """The last report, which must show ``blocks`` blocks and all of them fused."""
    report = moe_fx.last_report()
    left = sorted({f"{s.fqn} in graph {s.graph}: {r}" for s in report.sites if not s.fused for r in s.rejects})
    assert (report.num_fused, report.num_blocks) == (blocks, blocks), left
    return report


def tokens(*shape: int, hidden: int = 16, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random hidden states [*shape, hidden]."""
    return torch.randn(*shape, hidden, generator=torch.Generator().manual_seed(seed)).to(dtype)


def relative(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of ``expected``; infinite where a shape or finiteness differs."""
    if actual.shape != expected.shape or not torch.equal(actual.isfinite(), expected.isfinite()):
        return float("inf")
    actual, expected = actual.detach(), expected.detach()
    scale = expected.double().norm()
    error = (actual.double() - expected.double()).norm()
    return float(error / scale) if scale > 0 else float(error)


def assert_close(actual: Tensor, expected: Tensor, bound: float = 1e-5, what: str = "") -> None:
    error = relative(actual, expected)
    assert error <= bound, f"{what}: relative error {error:.1e} > {bound:.0e}"


def twin(model: nn.Module) -> nn.Module:
    """A copy that shares nothing."""
    return copy.deepcopy(model)


class Largest(TorchDispatchMode):
    """The most elements of a floating tensor that any op makes."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, Tensor) and t.dtype in (torch.float32, torch.bfloat16, torch.float64) and t._base is None:
                self.most = max(self.most, t.numel())
        return out


def watched(monkeypatch: pytest.MonkeyPatch) -> Largest:
    """Sees every op of the graphs that are compiled from now on, and every op inside the fused ones, when they run."""
    seen, forward, running = Largest(), Dispatch.forward, False

    def inner(gm: Any, *_: object) -> Any:
        def run(*args: Any) -> Any:
            nonlocal running
            running = True
            try:
                with seen:
                    return gm(*args)
            finally:
                running = False

        return run

    def inside(self: Dispatch, call: Call) -> Tensor:
        with seen if running else nullcontext():
            return forward(self, call)

    monkeypatch.setattr("moe_fx.backend.compile_inner", inner)
    monkeypatch.setattr(Dispatch, "forward", inside)
    return seen
