"""MoE blocks as people write them: each must be fused, whole and in one graph."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .harness import EXPERTS, HIDDEN, INNER, TOP_K
from .parts import (
    ExpertList,
    Gated,
    InFloat32,
    Joined,
    Mlp,
    Router,
    SigmoidWithGroups,
    SoftmaxOfChosen,
    Stacked,
    StaysFloat32,
    sequential,
)
from .registry import program

# --- loops over the experts


@program()
class OneHotLoop(ExpertList):
    """Mixtral before transformers 5."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x)
        out = torch.zeros_like(x)
        mask = F.one_hot(ids, EXPERTS).permute(2, 1, 0)
        for e in range(EXPERTS):
            slot, token = torch.where(mask[e])
            out.index_add_(0, token, self.experts[e](x[token]) * weights[token, slot, None])
        return out


@program()
class IndexedAddition(ExpertList):
    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            out[token] += weights[token, slot, None] * expert(x[token])
        return out


@program()
class FunctionalIndexAdd(ExpertList):
    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x)
        out = x.new_zeros(x.shape)
        for e, expert in enumerate(self.experts):
            token, slot = (ids == e).nonzero(as_tuple=True)
            out = out.index_add(0, token, expert(x.index_select(0, token)) * weights[token, slot].unsqueeze(1))
        return out


@program()
class BooleanMask(ExpertList):
    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            chosen = ids == e
            mask = chosen.any(dim=-1)
            share = (weights * chosen).sum(-1, keepdim=True)
            out[mask] += expert(x[mask]) * share[mask]
        return out


@program()
class LoopOverSlots(ExpertList):
    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x)
        out = torch.zeros_like(x)
        for k in range(TOP_K):
            for e, expert in enumerate(self.experts):
                mask = (ids[:, k] == e).unsqueeze(-1)
                out = out + torch.where(mask, expert(x), 0.0) * weights[:, k, None]
        return out


for _name, _expert in {
    "SequentialGelu": sequential,
    "GeluTanh": lambda: Mlp(partial(F.gelu, approximate="tanh")),
    "Relu": lambda: Mlp(F.relu),
    "ReluWithoutBias": lambda: Mlp(F.relu, bias=False),
    "Silu": lambda: Mlp(F.silu),
    "ReluSquared": lambda: Mlp(lambda a: F.relu(a) ** 2),
    "InPlaceRelu": lambda: Mlp(lambda a: F.relu(a, True)),
    "GatedWithBias": lambda: Gated(bias=True),
}.items():
    program(name=_name)(partial(ExpertList, _expert))


@program()
class ModuleDict(ExpertList):
    """Switch Transformers: experts by name."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleDict({f"expert_{e}": Gated() for e in range(EXPERTS)})

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x)
        out = torch.zeros_like(x)
        for e in range(EXPERTS):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, self.experts[f"expert_{e}"](x[token]) * weights[token, slot, None])
        return out


@program()
class ParameterLists(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = Router()
        self.up = nn.ParameterList(torch.randn(HIDDEN, INNER) * HIDDEN**-0.5 for _ in range(EXPERTS))
        self.down = nn.ParameterList(torch.randn(INNER, HIDDEN) * INNER**-0.5 for _ in range(EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x)
        out = torch.zeros_like(x)
        for e in range(EXPERTS):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, (F.gelu(x[token] @ self.up[e]) @ self.down[e]) * weights[token, slot, None])
        return out


# --- every expert on every token


@program()
class DenseMaskedSum(ExpertList):
    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x)
        share = torch.zeros(x.shape[0], EXPERTS, dtype=x.dtype).scatter(1, ids, weights)
        return sum(expert(x) * share[:, e, None] for e, expert in enumerate(self.experts))  # type: ignore[return-value]


@program()
class DenseStack(ExpertList):
    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x)
        share = torch.zeros(x.shape[0], EXPERTS, dtype=x.dtype).scatter_(1, ids, weights)
        return (torch.stack([expert(x) for expert in self.experts], 1) * share.unsqueeze(-1)).sum(1)


@program()
class StackAndGather(ExpertList):
    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x)
        results = torch.stack([expert(x) for expert in self.experts], 1)
        chosen = results.gather(1, ids.unsqueeze(-1).expand(-1, -1, HIDDEN))
        return (chosen * weights.unsqueeze(-1)).sum(1)


@program()
class EinsumOfOneHot(Stacked):
    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x)
        share = (F.one_hot(ids, EXPERTS) * weights.unsqueeze(-1)).sum(1)
        hidden = F.silu(torch.einsum("th,ehi->tei", x, self.w1)) * torch.einsum("th,ehi->tei", x, self.w3)
        return torch.einsum("tei,eih,te->th", hidden, self.w2, share)


@program()
class DispatchEinsum(Stacked):
    """GShard without capacity: tokens to [E, T, H] and back by a one-hot matrix."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x)
        mask = F.one_hot(ids, EXPERTS).to(x.dtype)
        rows = torch.einsum("tke,th->eth", mask, x)
        out = torch.bmm(F.silu(torch.bmm(rows, self.w1)) * torch.bmm(rows, self.w3), self.w2)
        return torch.einsum("eth,tke,tk->th", out, mask, weights)


@program()
class WeightOnInput(Stacked):
    """Llama 4: sigmoid scores multiply the experts' input; all experts run, zeros for those not chosen."""

    def forward(self, x: Tensor) -> Tensor:
        logits, ids = self.router.logits(x).topk(TOP_K, dim=-1)
        scores = torch.full((x.shape[0], EXPERTS), -torch.inf, dtype=x.dtype).scatter(1, ids, logits).sigmoid()
        rows = x.unsqueeze(0) * scores.t().unsqueeze(-1)
        return torch.bmm(F.silu(torch.bmm(rows, self.w1)) * torch.bmm(rows, self.w3), self.w2).sum(0)


# --- weights picked per token


@program()
class GatherEinsum(Stacked):
    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x)
        gate, up = (torch.einsum("th,tkhi->tki", x, w[ids]) for w in (self.w1, self.w3))
        return torch.einsum("tki,tkih,tk->th", F.silu(gate) * up, self.w2[ids], weights)


@program()
class GatherPerSlot(Stacked):
    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x)
        out = torch.zeros_like(x)
        for k in range(TOP_K):
            w1, w3, w2 = (w[ids[:, k]] for w in (self.w1, self.w3, self.w2))
            hidden = F.silu(torch.bmm(x[:, None], w1)) * torch.bmm(x[:, None], w3)
            out = out + torch.bmm(hidden, w2)[:, 0] * weights[:, k, None]
        return out


@program()
class GatherMatmul(Joined):
    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x)
        both = (self.w13[ids] @ x[:, None, :, None]).squeeze(-1)
        return ((self.w2[ids] @ self.act(both).unsqueeze(-1)).squeeze(-1) * weights.unsqueeze(-1)).sum(1)


# --- storage


@program()
class SeparateStacked(Stacked):
    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x)
        out = torch.zeros_like(x)
        for e in range(EXPERTS):
            token, slot = torch.where(ids == e)
            rows = x[token]
            hidden = F.silu(rows @ self.w1[e]) * (rows @ self.w3[e])
            out.index_add_(0, token, hidden @ self.w2[e] * weights[token, slot, None])
        return out


for _split in ("gate_up", "up_gate", "interleaved"):
    program(name=f"Joined_{_split}")(partial(Joined, _split))


@program()
class FlatParameters(nn.Module):
    """MegaBlocks: [E * I, H] viewed as [E, I, H]."""

    def __init__(self) -> None:
        super().__init__()
        self.router = SoftmaxOfChosen()
        self.up = nn.Parameter(torch.randn(EXPERTS * INNER, HIDDEN) * HIDDEN**-0.5)
        self.down = nn.Parameter(torch.randn(EXPERTS * INNER, HIDDEN) * INNER**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x)
        up, down = (w.view(EXPERTS, INNER, HIDDEN) for w in (self.up, self.down))
        out = torch.zeros_like(x)
        for e in range(EXPERTS):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, (F.gelu(x[token] @ up[e].t()) @ down[e]) * weights[token, slot, None])
        return out


# --- routers


class _Argmax(Router):
    """k = 1, without topk."""

    def __init__(self) -> None:
        super().__init__(top_k=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = self.logits(x).softmax(-1).max(dim=-1, keepdim=True)
        return weights, ids


for _router in (_Argmax, SoftmaxOfChosen, SigmoidWithGroups, InFloat32, StaysFloat32):
    program(name=f"Router{_router.__name__.strip('_')}")(partial(ExpertList, Gated, _router))


# --- what stands around a block


@program()
class SharedExpert(ExpertList):
    """Qwen2-MoE: an expert for all tokens with a sigmoid gate of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.shared_gate = Gated(), nn.Linear(HIDDEN, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.sigmoid(self.shared_gate(x)) * self.shared(x)


@program(batched=True)
class ResidualAndAuxiliaryLoss(ExpertList):
    """[B, S, H], a norm before, a residual after, and a load-balancing loss that reads logits, ids and weights."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rows = self.norm(x).view(-1, HIDDEN)
        probabilities = self.router.logits(rows).softmax(-1)
        weights, ids = probabilities.topk(TOP_K, dim=-1)
        out = torch.zeros_like(rows)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, expert(rows[token]) * weights[token, slot, None])
        load = F.one_hot(ids, EXPERTS).to(rows.dtype).mean((0, 1))
        return x + out.view(x.shape), EXPERTS * (load * probabilities.mean(0)).sum() + weights.square().mean()


@program(batched=True, blocks=2)
class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ExpertList() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x.reshape(-1, HIDDEN)).view_as(x)
        return x


@program(blocks=2)
class SharedTwice(nn.Module):
    """One block, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.block = ExpertList()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.block(x)
        return x + self.block(x)


@program()
class Checkpointed(ExpertList):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


@program()
class FrozenRouter(ExpertList):
    def __init__(self) -> None:
        super().__init__()
        self.router.requires_grad_(False)


@program()
class FrozenHalf(ExpertList):
    """Some experts frozen, and every down projection."""

    def __init__(self) -> None:
        super().__init__()
        self.experts[:3].requires_grad_(False)
        for expert in self.experts:
            expert.w2.requires_grad_(False)


program(name="AutocastOutside", autocast=True)(ExpertList)


@program()
class AutocastInside(ExpertList):
    exact = False  # set on the float64 copy

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=not self.exact):
            return super().forward(x)


# --- dense shares that are written in place


class _Shares(ExpertList):
    def shares(self, weights: Tensor, ids: Tensor, size: int) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x)
        share = self.shares(weights, ids, x.shape[0])
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            out = out + expert(x) * share[:, e, None]
        return out


@program()
class SharesByIndex(_Shares):
    def shares(self, weights: Tensor, ids: Tensor, size: int) -> Tensor:
        share = torch.zeros(size, EXPERTS, dtype=weights.dtype)
        share[torch.arange(size)[:, None], ids] = weights
        return share


@program()
class SharesBySlot(_Shares):
    def shares(self, weights: Tensor, ids: Tensor, size: int) -> Tensor:
        share = torch.zeros(size, EXPERTS, dtype=weights.dtype)
        for k in range(TOP_K):
            share[torch.arange(size), ids[:, k]] = weights[:, k]
        return share


@program()
class SharesThroughAView(_Shares):
    def shares(self, weights: Tensor, ids: Tensor, size: int) -> Tensor:
        share = torch.zeros(size, EXPERTS, dtype=weights.dtype).scatter(1, ids, weights)
        share.view(-1).mul_(2.0)
        return share
