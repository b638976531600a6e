"""MoE blocks by how they route and how they sum: shares by masked logits, weights in place, sums that go on."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .harness import EXPERTS, HIDDEN, INNER, TOP_K
from .parts import ExpertList, Gated, Mlp, Router, SoftmaxOfChosen
from .registry import program

# --- activations beyond the usual ones


class GatedBy(nn.Module):
    """w2(act(w1 x) * w3 x)."""

    def __init__(self, act: Callable[[Tensor], Tensor]):
        super().__init__()
        self.w1, self.w3 = (nn.Linear(HIDDEN, INNER, bias=False) for _ in range(2))
        self.w2, self.act = nn.Linear(INNER, HIDDEN, bias=False), act

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.act(self.w1(x)) * self.w3(x))


for _name, _act in {
    "Selu": F.selu,
    "Softplus": F.softplus,
    "SoftplusOf2": lambda a: F.softplus(a, beta=2.0),
    "Softsign": F.softsign,
    "Hardswish": F.hardswish,
    "Hardsigmoid": F.hardsigmoid,
    "Relu6": F.relu6,
    "LeakyRelu": F.leaky_relu,
    "LeakyRelu0.2": lambda a: F.leaky_relu(a, 0.2),
    "Elu0.5": lambda a: F.elu(a, 0.5),
    "Swish1.5": lambda a: a * torch.sigmoid(1.5 * a),
    "Mish": F.mish,
    "Tanh": torch.tanh,
}.items():
    program(name=f"Act{_name}")(partial(ExpertList, partial(Mlp, _act)))
    program(name=f"GatedAct{_name}")(partial(ExpertList, partial(GatedBy, _act)))


# --- routing weights changed in place


def add_experts(experts: nn.ModuleList, x: Tensor, weights: Tensor, ids: Tensor, out: Tensor) -> Tensor:
    """``out`` plus the experts' results, in place."""
    for e, expert in enumerate(experts):
        token, slot = torch.where(ids == e)
        out.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
    return out


class _InPlace(Router):
    """sigmoid, top-k of the scores plus a bias, the scores of the chosen, normalised by ``change``."""

    def __init__(self, change: Callable[[Tensor], Tensor]):
        super().__init__()
        self.change = change
        self.register_buffer("bias", torch.randn(EXPERTS) * 0.1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.logits(x).sigmoid()
        ids = (scores + self.bias).topk(self.top_k, dim=-1)[1]
        return self.change(scores.gather(1, ids)), ids


def _divided(weights: Tensor) -> Tensor:
    weights /= weights.sum(-1, keepdim=True)
    weights *= 2.5
    return weights


def _divided_by_method(weights: Tensor) -> Tensor:
    weights.div_(weights.sum(-1, keepdim=True) + 1e-20)
    return weights


for _change in (_divided, _divided_by_method):
    program(name=f"Weights{_change.__name__}")(partial(ExpertList, Gated, partial(_InPlace, _change)))


# --- shares of all experts, by the logits that are left


class _Shares(ExpertList):
    """Every expert on every token, times a dense matrix of shares."""

    def share(self, logits: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        share = self.share(self.router.logits(x))
        return sum(expert(x) * share[..., e, None] for e, expert in enumerate(self.experts))  # type: ignore[return-value]


@program()
class SoftmaxOfScatteredLogits(_Shares):
    def share(self, logits: Tensor) -> Tensor:
        chosen, ids = logits.topk(TOP_K, dim=-1)
        return torch.full_like(logits, -torch.inf).scatter(-1, ids, chosen).softmax(-1)


@program(trains=False)
class SoftmaxOfMaskedLogits(_Shares):
    def share(self, logits: Tensor) -> Tensor:
        mask = torch.zeros_like(logits).scatter(1, logits.topk(TOP_K, dim=-1)[1], 1.0)
        return logits.masked_fill(mask == 0, -torch.inf).softmax(-1)


@program(trains=False)
class MaskedProbabilities(_Shares):
    def share(self, logits: Tensor) -> Tensor:
        probabilities = logits.softmax(-1)
        kept = F.one_hot(probabilities.topk(TOP_K, dim=-1)[1], EXPERTS).sum(1) * probabilities
        return kept / kept.sum(-1, keepdim=True)


class _NoisyTopK(ExpertList):
    """The tutorials' loop: masks by ids, shares from the softmax of the scattered logits; [B, S, H] or [T, H]."""

    def forward(self, x: Tensor) -> Tensor:
        logits = self.router.logits(x)
        chosen, ids = logits.topk(TOP_K, dim=-1)
        share = F.softmax(torch.full_like(logits, -torch.inf).scatter(-1, ids, chosen), dim=-1)
        out, rows, flat = torch.zeros_like(x), x.view(-1, HIDDEN), share.view(-1, EXPERTS)
        for e, expert in enumerate(self.experts):
            mask = (ids == e).any(dim=-1)
            chosen_rows = mask.view(-1)
            out[mask] += expert(rows[chosen_rows]) * flat[chosen_rows, e].unsqueeze(1)
        return out


program(name="MaskedLoopOverShares")(_NoisyTopK)
program(name="MaskedLoopOverSharesBatched", batched=True, trains=False)(_NoisyTopK)


@program()
class RowsOfShares(ExpertList):
    """An expert takes the tokens of which it has a share."""

    def forward(self, x: Tensor) -> Tensor:
        chosen, ids = self.router.logits(x).topk(TOP_K, dim=-1)
        share = x.new_zeros(x.shape[0], EXPERTS).scatter(1, ids, chosen.softmax(-1))
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token = share[:, e].nonzero().squeeze(-1)
            out.index_add_(0, token, expert(x[token]) * share[token, e, None])
        return out


@program()
class DispatchedByShares(ExpertList):
    """Shazeer 2017: gates above zero say who gets what, results are put together and added at once."""

    def forward(self, x: Tensor) -> Tensor:
        chosen, ids = self.router.logits(x).topk(TOP_K, dim=-1)
        gates = torch.zeros(x.shape[0], EXPERTS, dtype=x.dtype).scatter(1, ids, chosen.softmax(-1))
        tokens = [torch.where(gates[:, e] > 0)[0] for e in range(EXPERTS)]
        results = torch.cat(
            [expert(x[t]) * gates[t, e, None] for e, (t, expert) in enumerate(zip(tokens, self.experts, strict=True))]
        )
        return torch.zeros_like(x).index_add(0, torch.cat(tokens), results)


# --- sorted rows


@program()
class SortedLoop(ExpertList):
    """DeepSeek's inference: rows in order of their expert, back by an indexed assignment."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x)
        order = ids.view(-1).argsort()
        rows, owners = x[order // TOP_K], ids.view(-1)[order]
        results = torch.empty_like(rows)
        for e, expert in enumerate(self.experts):
            results[owners == e] = expert(rows[owners == e])
        back = torch.empty_like(results)
        back[order] = results
        return back.view(*ids.shape, -1).mul_(weights.unsqueeze(-1)).sum(1)


# --- sums that start from something


class _From(ExpertList):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)


@program()
class ResidualInPlace(_From):
    def forward(self, x: Tensor) -> Tensor:
        rows = self.norm(x)
        return add_experts(self.experts, rows, *self.router(rows), x.clone())


@program()
class ResidualAndMore(_From):
    """The sum goes on after the block."""

    def forward(self, x: Tensor) -> Tensor:
        rows = self.norm(x)
        out = x.clone()
        add_experts(self.experts, rows, *self.router(rows), out)
        out += rows
        return out.tanh()


@program()
class ResidualByIndex(ExpertList):
    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x)
        out = x.clone()
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            out[token] += weights[token, slot, None] * expert(x[token])
        return out


@program(batched=True)
class ResidualFunctional(_From):
    """From the same rows that the experts read."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.view(-1, HIDDEN)
        weights, ids = self.router(rows)
        out = rows
        for e, expert in enumerate(self.experts):
            out = out + expert(rows) * (weights * (ids == e)).sum(-1, keepdim=True)
        return out.view_as(x)


@program()
class SharedExpertAsStart(ExpertList):
    def __init__(self) -> None:
        super().__init__(router=SoftmaxOfChosen)
        self.shared = Gated()

    def forward(self, x: Tensor) -> Tensor:
        return add_experts(self.experts, x, *self.router(x), self.shared(x))


class _Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = ExpertList(), ExpertList()

    def blocks(self) -> tuple[ExpertList, ExpertList]:
        return self.first, self.second


@program(blocks=2)
class InPlaceInARow(_Two):
    """The second block reads what the first accumulated in place."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks():
            x = add_experts(block.experts, x, *block.router(x), torch.zeros_like(x))
        return x


@program(blocks=2)
class OneSumOfTwoBlocks(_Two):
    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for block in self.blocks():
            add_experts(block.experts, x, *block.router(x), out)
        return out


@program(blocks=2)
class ResidualStreamInPlace(_Two):
    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        for block in self.blocks():
            rows = x * 0.5  # nothing that a backward would read is written over
            add_experts(block.experts, rows, *block.router(rows), x)
        return x
