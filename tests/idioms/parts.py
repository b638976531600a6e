"""What the programs are put together from: routers, experts, and bases that hold both."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .harness import EXPERTS, HIDDEN, INNER, TOP_K


class Router(nn.Module):
    """softmax, top-k, weights that sum to 1."""

    def __init__(self, experts: int = EXPERTS, top_k: int = TOP_K):
        super().__init__()
        self.top_k = top_k
        self.weight = nn.Parameter(torch.randn(experts, HIDDEN) * 0.4)

    def logits(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = torch.topk(self.logits(x).softmax(-1), self.top_k, dim=-1)
        return weights / weights.sum(-1, keepdim=True), ids


class SoftmaxOfChosen(Router):
    """top-k of the logits, then softmax."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits, ids = self.logits(x).topk(self.top_k, dim=-1)
        return logits.softmax(-1), ids


class SigmoidWithGroups(Router):
    """DeepSeek-V3: sigmoid scores, a selection bias, the best groups only, a scaling factor."""

    def __init__(self) -> None:
        super().__init__(experts=8)
        self.register_buffer("bias", torch.randn(8) * 0.1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.logits(x).sigmoid()
        choice = (scores + self.bias).view(-1, 4, 2)
        best = choice.sum(-1).topk(2, dim=-1)[1]
        kept = torch.zeros_like(choice[..., 0]).scatter_(1, best, 1).unsqueeze(-1).expand(-1, 4, 2).reshape(-1, 8)
        ids = (scores + self.bias).masked_fill(kept == 0, 0.0).topk(self.top_k, dim=-1)[1]
        weights = scores.gather(1, ids)
        return weights / (weights.sum(-1, keepdim=True) + 1e-20) * 2.5, ids


class InFloat32(Router):
    """Scores in float32 whatever the model's dtype; the weights go back to it."""

    exact = False  # set on the float64 copy

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        wide = torch.float64 if self.exact else torch.float32
        weights, ids = torch.topk(F.softmax(self.logits(x), dim=-1, dtype=wide), self.top_k, dim=-1)
        return (weights / weights.sum(-1, keepdim=True)).to(x.dtype), ids


class StaysFloat32(InFloat32):
    """As above, but the weights stay float32."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        wide = torch.float64 if self.exact else torch.float32
        return torch.topk(F.softmax(self.logits(x), dim=-1, dtype=wide), self.top_k, dim=-1)  # type: ignore[return-value]


class Gated(nn.Module):
    """w2(silu(w1 x) * w3 x)."""

    def __init__(self, bias: bool = False):
        super().__init__()
        self.w1, self.w3 = (nn.Linear(HIDDEN, INNER, bias=bias) for _ in range(2))
        self.w2 = nn.Linear(INNER, HIDDEN, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Mlp(nn.Module):
    """down(act(up x)), with biases."""

    def __init__(self, act: Callable[[Tensor], Tensor] = F.relu, bias: bool = True):
        super().__init__()
        self.up, self.down = nn.Linear(HIDDEN, INNER, bias=bias), nn.Linear(INNER, HIDDEN, bias=bias)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


def sequential() -> nn.Module:
    return nn.Sequential(nn.Linear(HIDDEN, INNER), nn.GELU(), nn.Linear(INNER, HIDDEN))


class ExpertList(nn.Module):
    """A router and a ModuleList of experts."""

    def __init__(self, expert: Callable[[], nn.Module] = Gated, router: Callable[[], Router] = Router):
        super().__init__()
        self.router = router()
        self.experts = nn.ModuleList(expert() for _ in range(self.router.weight.shape[0]))

    def forward(self, x: Tensor) -> Tensor:
        """The loop that most people write; programs override it."""
        weights, ids = self.router(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            rows = expert(x[token]) * weights[token, slot, None]
            out.index_add_(0, token, rows.to(out.dtype))
        return out


class Stacked(nn.Module):
    """A router and w1, w3 [E, H, I], w2 [E, I, H]."""

    def __init__(self, router: Callable[[], Router] = SoftmaxOfChosen):
        super().__init__()
        self.router = router()
        experts = self.router.weight.shape[0]
        self.w1, self.w3 = (nn.Parameter(torch.randn(experts, HIDDEN, INNER) * HIDDEN**-0.5) for _ in range(2))
        self.w2 = nn.Parameter(torch.randn(experts, INNER, HIDDEN) * INNER**-0.5)


class Joined(nn.Module):
    """A router and w13 [E, 2I, H], w2 [E, H, I]; ``split`` says which rows are the gate's."""

    def __init__(self, split: str = "gate_up"):
        super().__init__()
        self.router, self.split = Router(), split
        self.w13 = nn.Parameter(torch.randn(EXPERTS, 2 * INNER, HIDDEN) * HIDDEN**-0.5)
        self.w2 = nn.Parameter(torch.randn(EXPERTS, HIDDEN, INNER) * INNER**-0.5)

    def act(self, both: Tensor) -> Tensor:
        if self.split == "interleaved":
            return F.silu(both[..., ::2]) * both[..., 1::2]
        first, second = both.chunk(2, dim=-1)
        return F.silu(second) * first if self.split == "up_gate" else F.silu(first) * second

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x)
        out = torch.zeros_like(x)
        for e in range(EXPERTS):
            token, slot = torch.where(ids == e)
            rows = F.linear(self.act(F.linear(x[token], self.w13[e])), self.w2[e])
            out.index_add_(0, token, rows * weights[token, slot, None])
        return out
