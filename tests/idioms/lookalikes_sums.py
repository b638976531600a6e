"""Near misses by where a sum starts, who else sees what is written in place, and what a mask leaves."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .harness import EXPERTS, HIDDEN, TOP_K, hidden_states
from .lookalikes import act, lookalike, scaled
from .parts import ExpertList, Stacked
from .programs_routing import add_experts

# --- the start of the sum


class _From(ExpertList):
    """``start(x)`` is what the experts' results are added to, in place; ``after`` makes the result of it."""

    def start(self, x: Tensor) -> Tensor:
        return x.clone()

    def after(self, x: Tensor, start: Tensor, out: Tensor) -> Tensor:
        return out

    def forward(self, x: Tensor) -> Tensor:
        start = self.start(x)
        return self.after(x, start, add_experts(self.experts, x, *self.router(x), start))


@lookalike(never=False)
class StartReadLater(_From):
    """By its first name."""

    def after(self, x: Tensor, start: Tensor, out: Tensor) -> Tensor:
        return start * 2 + x


@lookalike()
class PartOfStartReadLater(ExpertList):
    """A view of some columns, made before, read after."""

    def forward(self, x: Tensor) -> Tensor:
        start = x.clone()
        part = start[:, :16]
        return add_experts(self.experts, x, *self.router(x), start).sum() + part.square()


@lookalike()
class TurnedStartReadLater(ExpertList):
    """A view of the same shape, in another order."""

    def forward(self, x: Tensor) -> Tensor:
        start = x.clone()
        turned = start.t()
        return add_experts(self.experts, x, *self.router(x), start).sum() + turned


LOOKALIKES_OF_A_SQUARE = lambda: [(hidden_states(HIDDEN),)]  # noqa: E731
lookalike(inputs=LOOKALIKES_OF_A_SQUARE)(type("TurnedSquareReadLater", (TurnedStartReadLater,), {}))


@lookalike()
class AddedToTurned(ExpertList):
    """Added to a transposed view, read straight."""

    def forward(self, x: Tensor) -> Tensor:
        start = torch.zeros(HIDDEN, HIDDEN)
        add_experts(self.experts, x, *self.router(x), start.t())
        return start


lookalike(inputs=LOOKALIKES_OF_A_SQUARE)(type("AddedToTurnedSquare", (AddedToTurned,), {}))


@lookalike()
class StartReadInTheMiddle(ExpertList):
    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x)
        out = x.clone()
        half = torch.zeros(())
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
            half = out.square().sum() if e == 2 else half
        return out + half


@lookalike()
class SumSeenByNextExpert(ExpertList):
    """Each expert reads the sum so far."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x)
        out = x
        for e, expert in enumerate(self.experts):
            out = out + expert(out) * (weights * (ids == e)).sum(-1, keepdim=True)
        return out


@lookalike()
class StartOverwritten(ExpertList):
    """Rows that an expert takes keep nothing of the start."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x)
        out = x.clone()
        for e, expert in enumerate(self.experts[:-1]):
            token, slot = torch.where(ids == e)
            out[token] = expert(x[token]) * weights[token, slot, None]
        return out


@lookalike()
class StartDecays(ExpertList):
    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x)
        out = x
        for e, expert in enumerate(self.experts):
            out = out * 0.9 + expert(x) * (weights * (ids == e)).sum(-1, keepdim=True)
        return out


@lookalike()
class StartForEveryExpert(ExpertList):
    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x)
        out = x
        for e, expert in enumerate(self.experts):
            out = out + expert(x) * (weights * (ids == e)).sum(-1, keepdim=True) + x
        return out


@lookalike()
class StartDoubled(ExpertList):
    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x)
        out = x
        for e, expert in enumerate(self.experts):
            out = torch.add(expert(x) * (weights * (ids == e)).sum(-1, keepdim=True), out, alpha=2)
        return out


@lookalike()
class OtherRowsOfStart(ExpertList):
    """``out[token] = out[token - 1] + …``."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x)
        out = x.clone()
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            out[token] = out[token - 1] + expert(x[token]) * weights[token, slot, None]
        return out


@lookalike(never=False, train=True)
class DetachedStart(_From):
    def start(self, x: Tensor) -> Tensor:
        return x.detach().clone()


@lookalike(never=False, train=True)
class DetachedSum(ExpertList):
    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x)
        out = x.tanh()
        for e, expert in enumerate(self.experts):
            out = out.detach() if e == 0 else out
            out = out + expert(x) * (weights * (ids == e)).sum(-1, keepdim=True)
        return out


@lookalike(never=False, train=True)
class SmallStart(ExpertList):
    """One row for all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x)
        out = self.bias
        for e, expert in enumerate(self.experts):
            out = out + expert(x) * (weights * (ids == e)).sum(-1, keepdim=True)
        return out


@lookalike()
class AddedToArgument(ExpertList):
    """The caller sees what was added."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.tanh()
        return add_experts(self.experts, rows, *self.router(rows), x)


@lookalike()
class AddedToBuffer(ExpertList):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("memory", torch.zeros(12, HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        add_experts(self.experts, x, *self.router(x), self.memory)
        return self.memory * 1.0


# --- what is written in place, and who sees it


class _Picked(ExpertList):
    """Routing weights that the ids pick, which ``change`` writes to."""

    def forward(self, x: Tensor) -> Tensor:
        scores = self.router.logits(x).sigmoid()
        ids = scores.topk(TOP_K, dim=-1)[1]
        return self.run(x, scores.gather(1, ids), ids)

    def run(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        raise NotImplementedError


@lookalike(never=False, train=False)
class WeightsChangedAfterwards(_Picked):
    def run(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        out = add_experts(self.experts, x, weights, ids, torch.zeros_like(x))
        weights /= weights.sum(-1, keepdim=True)
        return out + weights.square().sum(-1, keepdim=True)


@lookalike(never=False, train=True)
class WeightsReadBeforeAndAfter(_Picked):
    def run(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        before = weights.exp().sum()
        weights /= weights.sum(-1, keepdim=True)
        return add_experts(self.experts, x, weights, ids, torch.zeros_like(x)) + before + weights.square().sum()


@lookalike()
class WeightsChangedInTheMiddle(_Picked):
    def run(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
            weights.mul_(0.9)
        return out


@lookalike(never=False, train=True)
class OneColumnOfWeightsChanged(_Picked):
    """Through a view."""

    def run(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        weights[:, 0].mul_(3.0)
        return add_experts(self.experts, x, weights, ids, torch.zeros_like(x))


@lookalike()
class IdsChangedThroughAView(Stacked):
    """What topk says of its ids is no longer true."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x)
        ids.view(-1)[1::2] = -1
        ids = ids.reshape(-1, TOP_K)
        hidden = F.silu(torch.einsum("th,tkhi->tki", x, self.w1[ids])) * torch.einsum("th,tkhi->tki", x, self.w3[ids])
        return torch.einsum("tki,tkih,tk->th", hidden, self.w2[ids], weights)


@lookalike(never=False)
class ParameterChangedBefore(Stacked):
    """A copy of it, by half as much again."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x)
        out = torch.zeros_like(x)
        w1 = self.w1.clone()
        w1.mul_(1.5)
        for e in range(EXPERTS):
            token, slot = torch.where(ids == e)
            hidden = F.silu(x[token] @ w1[e]) * (x[token] @ self.w3[e])
            out.index_add_(0, token, hidden @ self.w2[e] * weights[token, slot, None])
        return out


# --- masks that leave something


class _Shares(ExpertList):
    def share(self, logits: Tensor, chosen: Tensor, ids: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        logits = self.router.logits(x)
        share = self.share(logits, *logits.topk(TOP_K, dim=-1))
        return sum(expert(x) * share[:, e, None] for e, expert in enumerate(self.experts))  # type: ignore[return-value]


@lookalike()
class SoftmaxOfAll(_Shares):
    def share(self, logits: Tensor, chosen: Tensor, ids: Tensor) -> Tensor:
        return logits.scatter(1, ids, chosen * 1.5).softmax(-1)


for _number in (-1.0, -20.0, -100.0, -1e4, -1e9):

    def _share(self: nn.Module, logits: Tensor, chosen: Tensor, ids: Tensor, number: float = _number) -> Tensor:
        return torch.full_like(logits, number).scatter(1, ids, chosen).softmax(-1)

    def _masked(self: nn.Module, logits: Tensor, chosen: Tensor, ids: Tensor, number: float = _number) -> Tensor:
        mask = torch.zeros_like(logits).scatter(1, ids, 1.0)
        return (logits + (1 - mask) * number).softmax(-1)

    # logits below the number, where the mask lifts instead of hiding
    far = scaled(1, 10, 10 * abs(_number))
    lookalike(inputs=far)(type(f"MaskedBy{_number:.0f}", (_Shares,), {"share": _share}))
    lookalike(inputs=far)(type(f"LoweredBy{_number:.0f}", (_Shares,), {"share": _masked}))


@lookalike()
class TiedThreshold(_Shares):
    """All that are not below the k-th: more than k where logits are equal."""

    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            self.router.weight[1] = self.router.weight[0]
            self.router.weight[3] = self.router.weight[2]

    def share(self, logits: Tensor, chosen: Tensor, ids: Tensor) -> Tensor:
        return logits.masked_fill(logits < chosen[:, -1:], -torch.inf).softmax(-1)


@lookalike(never=False, train=True)
class StraightThrough(_Shares):
    """The mask as a value, the probabilities as its gradient."""

    def share(self, logits: Tensor, chosen: Tensor, ids: Tensor) -> Tensor:
        probabilities = logits.softmax(-1)
        return torch.zeros_like(logits).scatter(1, ids, 1.0) + probabilities - probabilities.detach()


@lookalike(never=False, train=True)
class SharesOfNoGradient(_Shares):
    def share(self, logits: Tensor, chosen: Tensor, ids: Tensor) -> Tensor:
        return torch.full_like(logits, -torch.inf).scatter(1, ids, chosen).softmax(-1).detach()


class _Rows(ExpertList):
    """An expert takes the tokens that ``takes`` says."""

    def gates(self, chosen: Tensor) -> Tensor:
        return chosen.softmax(-1)

    def takes(self, gates: Tensor) -> Tensor:
        return gates > 0

    def weigh(self, gates: Tensor) -> Tensor:
        return gates

    def forward(self, x: Tensor) -> Tensor:
        chosen, ids = self.router.logits(x).topk(TOP_K, dim=-1)
        gates = torch.zeros(x.shape[0], EXPERTS, dtype=x.dtype).scatter(1, ids, self.gates(chosen))
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token = torch.where(self.takes(gates[:, e]))[0]
            out[token] += expert(x[token]) * self.weigh(gates[token, e, None])
        return out


@lookalike(inputs=scaled(1, 5))
class NegativeGatesDropped(_Rows):
    def gates(self, chosen: Tensor) -> Tensor:
        return chosen - 1.0


@lookalike(inputs=scaled(1, 5))
class SmallGatesDropped(_Rows):
    def takes(self, gates: Tensor) -> Tensor:
        return gates > 0.3


@lookalike(inputs=scaled(1, 30))
class TinyGatesDropped(_Rows):
    def takes(self, gates: Tensor) -> Tensor:
        return gates > 1e-6


@lookalike()
class GatesSquared(_Rows):
    def weigh(self, gates: Tensor) -> Tensor:
        return gates.square()


@lookalike(never=False, train=True)
class GatesWithoutGradient(_Rows):
    def weigh(self, gates: Tensor) -> Tensor:
        return gates.detach()


# --- bends away from zero: the same values, another derivative where a bend is met exactly

act("Relu6ByClamp", lambda h: F.relu(h).clamp(max=6.0), train=True)
act("HardswishByHand", lambda h: h * F.relu6(h + 3) / 6, train=True)
act("LeakySlopeNegative", lambda h: F.leaky_relu(h, -0.2), never=False, train=True)
act("LeakyOfTwoSlopes", lambda h: F.leaky_relu(h, 0.2) + 0.0 * F.leaky_relu(h, 0.1), never=False, train=True)
act("SoftplusEarlyLinear", lambda h: F.softplus(h, 1.0, 5.0), inputs=scaled(1, 8))
