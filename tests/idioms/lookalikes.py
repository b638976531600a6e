"""Near misses: programs that look like a MoE block and are something else, somewhere.

Each comes with the inputs that show the difference.  ``never``: fusing the whole would be wrong, so it must not be
fused; the others may be fused where that is right.  The result must equal the original's in any case.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .harness import EXPERTS, HIDDEN, TOP_K, Arguments, hidden_states
from .parts import ExpertList, Gated, Joined, Mlp, Router, Stacked

Function = Callable[..., Tensor]


def plain() -> list[Arguments]:
    return [(hidden_states(12),)]


def scaled(*factors: float, tokens: int = 12) -> Callable[[], list[Arguments]]:
    return lambda: [(hidden_states(tokens) * f,) for f in factors]


def special(row: float) -> Callable[[], list[Arguments]]:
    """Some rows constant."""
    return lambda: [(torch.cat([hidden_states(9), torch.full((3, HIDDEN), row)]),)]


def lengths(*counts: int) -> Callable[[], list[Arguments]]:
    return lambda: [(hidden_states(n),) for n in counts]


@dataclass(frozen=True, slots=True)
class Lookalike:
    """inputs: argument lists for one compiled program.  train: compare gradients too.  dynamic: lengths are symbols."""

    make: Callable[[], nn.Module]
    never: bool = True
    inputs: Callable[[], list[Arguments]] = plain
    train: bool = False
    dynamic: bool | None = None


LOOKALIKES: dict[str, Lookalike] = {}


def _register(make: Callable[[], nn.Module], name: str, **fields: object) -> None:
    assert name not in LOOKALIKES, name
    LOOKALIKES[name] = Lookalike(make, **fields)  # type: ignore[arg-type]


def lookalike(**fields: object) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Registers a class."""
    return lambda cls: (_register(cls, cls.__name__, **fields), cls)[1]


def act(name: str, f: Callable[[Tensor], Tensor], **fields: object) -> None:
    """An MLP expert with ``f`` between its projections."""
    _register(partial(ExpertList, lambda: Mlp(f, bias=False)), name, **fields)


class _PerExpert(ExpertList):
    """``change(expert, e, rows, weight)`` stands for ``expert(rows) * weight``."""

    def __init__(
        self,
        change: Callable[..., Tensor],
        expert: Callable[[], nn.Module] = Gated,
        experts: int = EXPERTS,
        k: int = TOP_K,
    ):
        super().__init__(expert, lambda: Router(experts, k))
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, self.change(expert, e, x[token], weights[token, slot, None]))
        return out


def rows(name: str, change: Callable[..., Tensor], *, experts: int = EXPERTS, k: int = TOP_K, **fields: object) -> None:
    _register(partial(_PerExpert, change, experts=experts, k=k), name, **fields)


# --- another formula in every sample


@lookalike()
class ExpertChoice(ExpertList):
    """Experts pick tokens."""

    def forward(self, x: Tensor) -> Tensor:
        weights, token = self.router.logits(x).softmax(-1).t().topk(4, dim=-1)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            out.index_add_(0, token[e], expert(x[token[e]]) * weights[e, :, None])
        return out


@lookalike()
class SoftMixture(ExpertList):
    """All experts, no top-k."""

    def forward(self, x: Tensor) -> Tensor:
        share = self.router.logits(x).softmax(-1)
        return (torch.stack([e(x) for e in self.experts], 1) * share.unsqueeze(-1)).sum(1)


@lookalike(never=False)
class MissingExpert(ExpertList):
    """range(E - 1): right as a block of E - 1 experts with ids beyond."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x)
        out = torch.zeros_like(x)
        for e in range(EXPERTS - 1):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, self.experts[e](x[token]) * weights[token, slot, None])
        return out


@lookalike()
class ShiftedIds(ExpertList):
    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e + 1)
            out.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
        return out


@lookalike()
class OverwrittenRows(ExpertList):
    """``out[t] = ``: the last expert of a token wins."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            out[token] = expert(x[token]) * weights[token, slot, None]
        return out


@lookalike()
class WrappedIds(Stacked):
    """-1 is the last expert, as in Python."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x)
        ids = ids.masked_fill(weights < 0.4, -1)
        hidden = F.silu(torch.einsum("th,tkhi->tki", x, self.w1[ids])) * torch.einsum("th,tkhi->tki", x, self.w3[ids])
        return torch.einsum("tki,tkih,tk->th", hidden, self.w2[ids], weights)


rows("OneExpertTwice", lambda f, e, x, w: f(x) * w * (2 if e == 3 else 1))
rows("OneExpertOtherwise", lambda f, e, x, w: (f.w2(F.gelu(f.w1(x)) * f.w3(x)) if e == 3 else f(x)) * w)
rows("GateAndUpSwappedInOne", lambda f, e, x, w: (f.w2(F.silu(f.w3(x)) * f.w1(x)) if e == 3 else f(x)) * w)
rows("WeightsSquared", lambda f, e, x, w: f(x) * w * w)
rows("WeightsTwice", lambda f, e, x, w: f(x * w) * w)
rows("ResidualInside", lambda f, e, x, w: (x + f(x)) * w)
rows("BatchNormInside", lambda f, e, x, w: f(x - x.sum(0) / (x.shape[0] + 1)) * w)
rows("SoftmaxOverTokens", lambda f, e, x, w: f(x).softmax(0) * w)
rows("FakeQuantised", lambda f, e, x, w: (f(x) * 64).round() / 64 * w)
rows("TinyBias", lambda f, e, x, w: (f(x) + 1e-6) * w)
rows("ParameterSwapped", lambda f, e, x, w: F.linear(F.silu(f.w1(x)) * f.w3(x), f.w2.weight.roll(e // 3, 0)) * w)
act("ThresholdAfterwards", lambda h: torch.where(F.relu(h) > 0.5, h, 0.0))
act("OtherRelu", lambda h: F.relu(h) ** 3)


@lookalike()
class TinyNeighbour(ExpertList):
    """A little of the next token."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            share = (weights * (ids == e)).sum(-1, keepdim=True)
            out = out + expert(x + 1e-6 * x.roll(1, 0)) * share
        return out


@lookalike()
class PositionDependent(ExpertList):
    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, expert(x[token]) * (weights[token, slot] / (1 + token))[:, None])
        return out


# --- another formula on inputs that samples could miss

rows("DroppedBelow", lambda f, e, x, w: f(x) * torch.where(w < 0.1, 0.0, w), inputs=scaled(1, 8))
rows("WeightsFloored", lambda f, e, x, w: f(x) * w.clamp(min=1e-3), inputs=scaled(8))
rows("WeightsCeiled", lambda f, e, x, w: f(x) * w.clamp(max=0.9), inputs=scaled(8))
rows("RowsOfZeros", lambda f, e, x, w: f(x - 1.0) * (x.abs().sum(-1, keepdim=True) > 0) * w, inputs=special(0.0))
rows("NaNToNumber", lambda f, e, x, w: f(x).nan_to_num(0.0) * w, inputs=special(float("nan")))
rows(
    "InfToNumber", lambda f, e, x, w: torch.where(x.isinf().any(-1, True), 0.0, f(x)) * w, inputs=special(float("inf"))
)
for _limit in (1e3, 1e5, 1e8, 1e13):
    act(f"Ceiling{_limit:.0e}", lambda h, c=_limit: F.relu(h).clamp(max=c), inputs=scaled(1, 10 * _limit))
    act(
        f"CeilingOneToken{_limit:.0e}", lambda h, c=_limit: F.relu(h).clamp(max=c), inputs=scaled(10 * _limit, tokens=1)
    )
act("FloorOfNegatives", lambda h: h.clamp(min=-5000.0), inputs=scaled(1e5))
act("FloorOfNegativesByWhere", lambda h: torch.where(h < -5000.0, 0.0, h), inputs=scaled(1e5))
act("TinyDropped", lambda h: torch.where(h.abs() < 1e-9, 0.0, F.relu(h)), inputs=scaled(1e-9))
act("TwoThresholds", lambda h: torch.where((h > 3) & (h < 3.0001), 0.0, F.relu(h)), never=True)
# the clamp may stay in the graph, and the op read its result
rows(
    "ClampedParameters",
    lambda f, e, x, w: F.linear(F.relu(f.w1(x)) * f.w3(x), f.w2.weight.clamp(-0.05, 9.0)) * w,
    never=False,
    train=True,
)
rows(
    "ClampedFarParameters",
    lambda f, e, x, w: F.linear(F.silu(F.linear(x, f.w1.weight.clamp(-2, 2))) * f.w3(x), f.w2.weight) * w,
    never=False,
    train=True,
)
rows("ExpertOfManyTwice", lambda f, e, x, w: f(x) * w * (2 if e == 11 else 1), experts=16, k=1, inputs=lengths(3))
rows("ExpertOfManyDetached", lambda f, e, x, w: (f(x).detach() if e == 11 else f(x)) * w, experts=16, k=1, train=True)


class _Masked(ExpertList):
    """Only some (token, slot) pairs count."""

    def keep(self, mask: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(self.keep(ids == e))
            out.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
        return out


@lookalike(inputs=lengths(12, 400), dynamic=True)
class Capacity(_Masked):
    """Tokens past the 64th of an expert are dropped."""

    def keep(self, mask: Tensor) -> Tensor:
        return mask & (mask.any(-1).cumsum(0)[:, None] <= 64)


@lookalike(inputs=lengths(12, 9000), dynamic=True)
class LargeCapacity(_Masked):
    def keep(self, mask: Tensor) -> Tensor:
        return mask & (mask.any(-1).cumsum(0)[:, None] <= 2000)


@lookalike(inputs=lengths(12, 900), dynamic=True)
class CutTokens(ExpertList):
    """The same by a slice."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = (t[:100] for t in torch.where(ids == e))
            out.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
        return out


@lookalike(inputs=lengths(12, 5000), dynamic=True)
class TokenBudget(ExpertList):
    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x)
        out = torch.zeros_like(x)
        budget = min(x.shape[0], 4096)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids[:budget] == e)
            out.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
        return out


@lookalike(inputs=lengths(12, 5000), dynamic=True)
class ScaleByLength(ExpertList):
    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x)
        out = torch.zeros_like(x)
        share = torch.sym_min(x.shape[0], 4096) / x.shape[0]
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, expert(x[token]) * weights[token, slot, None] * share)
        return out


@lookalike(inputs=lengths(12, 9000), dynamic=True)
class OneHotCapacity(ExpertList):
    """Switch: the place in the expert's queue, as numbers."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x)
        mask = F.one_hot(ids, EXPERTS).to(x.dtype)
        place = mask.sum(1).cumsum(0) * mask.sum(1)
        mask = mask * (place <= 2500).to(x.dtype)[:, None]
        return sum(f(x) * (mask[:, :, e] * weights).sum(-1, keepdim=True) for e, f in enumerate(self.experts))  # type: ignore[return-value]


@lookalike(inputs=lambda: [(hidden_states(4, 5),), (hidden_states(3, 7),)], dynamic=True)
class OtherOrderOfRows(ExpertList):
    """Routed batch first, computed sequence first: the same for one sequence."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x.reshape(-1, HIDDEN))
        x = x.transpose(0, 1).reshape(-1, HIDDEN)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
        return out


class _Copying(nn.Module):
    """``extra`` ids beyond the experts; the last one copies its input (LongCat-Flash, MoE++)."""

    def __init__(self, extra: int, k: int):
        super().__init__()
        self.router, self.last = Router(EXPERTS + extra, k), EXPERTS + extra - 1
        self.experts = nn.ModuleList(Gated() for _ in range(EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x)
        out = x * (weights * (ids == self.last)).sum(-1, keepdim=True)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            out = out.index_add(0, token, expert(x[token]) * weights[token, slot, None])
        return out


for _extra, _k in ((1, 1), (2, 2), (1, 2)):
    _register(partial(_Copying, _extra, _k), f"CopyingExpert{_extra}of{_k}", inputs=scaled(1, 3))


@lookalike(inputs=scaled(1, 3))
class OneHotCopying(_Copying):
    """one_hot raises on negative ids, which says nothing about those beyond."""

    def __init__(self) -> None:
        super().__init__(1, TOP_K)

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x)
        share = (F.one_hot(ids, EXPERTS + 1) * weights.unsqueeze(-1)).sum(1)
        return x * share[:, EXPERTS, None] + sum(f(x) * share[:, e, None] for e, f in enumerate(self.experts))


@lookalike()
class RoutingByName(ExpertList):
    """topk with keywords, raw logits as weights, negative ones dropped."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = torch.topk(input=self.router.logits(x) - 1.5, k=TOP_K)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, expert(x[token]) * weights[token, slot, None].relu())
        return out


# --- ids that repeat within a row, whatever topk says


@lookalike()
class TwoHeadsOfARouter(Joined):
    """Each of two heads chooses its own experts; one that both chose counts once (scatter keeps the last)."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.Linear(HIDDEN, 2 * EXPERTS, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.heads(x).view(-1, 2, EXPERTS).softmax(-1).topk(TOP_K, dim=-1)
        return _scattered(self, x, weights.reshape(-1, 2 * TOP_K), ids.reshape(-1, 2 * TOP_K))


@lookalike(never=False)
class OneChoiceExpanded(Joined):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.gate(x).softmax(-1).topk(1, dim=-1)
        return _scattered(self, x, weights.expand(-1, TOP_K), ids.expand(-1, TOP_K))


@lookalike()
class LargerOfTwoChoices(Joined):
    """``torch.max`` of two tensors selects nothing."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x)
        return _scattered(self, x, weights, torch.max(ids, ids.flip(1)))


def _scattered(block: Joined, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    share = x.new_zeros(x.shape[0], EXPERTS).scatter(1, ids, weights)
    out = torch.einsum("tei,ehi->teh", block.act(torch.einsum("th,eoh->teo", x, block.w13)), block.w2)
    return (out * share.unsqueeze(-1)).sum(1)


@lookalike()
class CopyExpertFarBeyond(ExpertList):
    """The last of many ids beyond the experts copies the token."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS + 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.gate(x).softmax(-1).topk(TOP_K)
        share = x.new_zeros(x.shape[0], EXPERTS + 8).scatter(1, ids, weights)
        out = x * share[:, -1:]
        for e, expert in enumerate(self.experts):
            out = out + expert(x) * share[:, e, None]
        return out


rows(
    "OneOfManyByTable",
    lambda f, e, x, w: f(x) * w * torch.tensor([1.0] * 40 + [2.0] + [1.0] * 23)[e],
    experts=64,
    k=1,
    inputs=lengths(1),
)
act("RoundedSteps", lambda h: F.relu(h) * (1 + torch.round(h * 1e-3)), never=True, inputs=scaled(1e4))
act("PoissonNoise", lambda h: F.relu(h) + 0 * torch.poisson(h.abs()), never=True)
