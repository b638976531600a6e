"""Near misses by what they do beside the formula: gradients, writes, random numbers, values that get out, dtypes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .harness import EXPERTS, HIDDEN, hidden_states
from .lookalikes import _register, act, lookalike, rows, scaled, special
from .parts import ExpertList, Gated, Router, Stacked

LOG: list[float] = []


@torch.library.custom_op("moe_fx_lookalikes::log", mutates_args=())
def log(h: Tensor) -> None:
    LOG.append(float(h.sum()))


@torch.library.custom_op("moe_fx_lookalikes::scale_", mutates_args={"h"})
def scale_(h: Tensor, by: float) -> None:
    h.mul_(by)


for _op in (log, scale_):
    _op.register_fake(lambda *_, **__: None)


class _Doubled(torch.autograd.Function):
    """relu with twice its gradient."""

    @staticmethod
    def forward(ctx: object, h: Tensor) -> Tensor:
        ctx.save_for_backward(h)  # type: ignore[attr-defined]
        return h.relu()

    @staticmethod
    def backward(ctx: object, g: Tensor) -> Tensor:
        return g * (ctx.saved_tensors[0] > 0) * 2  # type: ignore[attr-defined]


def _then(effect: object, h: Tensor) -> Tensor:
    """``h``, after what was done to it as a statement."""
    return h


# --- gradients: values agree

rows("Detached", lambda f, e, x, w: f(x).detach() * w, train=True)
rows("DetachedInput", lambda f, e, x, w: f(x.detach()) * w, train=True)
rows("OneExpertDetached", lambda f, e, x, w: (f(x).detach() if e == 3 else f(x)) * w, train=True)
rows(
    "DetachedSmallRows", lambda f, e, x, w: torch.where(x.abs().amax(-1, True) < 2, f(x).detach(), f(x)) * w, train=True
)
act("ReluByClamp", lambda h: h.clamp(min=0), inputs=special(0.0), train=True)
act("ReluByMaximum", lambda h: torch.maximum(h, torch.zeros_like(h)), inputs=special(0.0), train=True)
act("OwnGradient", _Doubled.apply, train=True)


@lookalike(train=True)
class NoGradInside(ExpertList):
    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            with torch.no_grad():
                hidden = F.silu(expert.w1(x[token])) * expert.w3(x[token])
            out = out.index_add(0, token, expert.w2(hidden) * weights[token, slot, None])
        return out


# --- writes

act("LeakyReluInPlace", lambda h: _then(F.leaky_relu(h, 0.01, True), h), never=False)
act("EluInPlace", lambda h: _then(F.elu(h, 1.0, True), h), never=False)
act("HardtanhInPlace", lambda h: _then(F.hardtanh(h, -1.0, 1.0, True), h))
act("ForeachInPlace", lambda h: _then(torch._foreach_mul_([h], 3.0), h))
act("CustomOpInPlace", lambda h: _then(torch.ops.moe_fx_lookalikes.scale_(h, 3.0), F.relu(h)))
act("CustomOpInPlaceByName", lambda h: _then(torch.ops.moe_fx_lookalikes.scale_(h=h, by=3.0), F.relu(h)))
act("CustomOpWithEffect", lambda h: _then(torch.ops.moe_fx_lookalikes.log(h), F.relu(h)))
act("Asserted", lambda h: _then(torch._assert_async((h < 1e3).all()), F.relu(h)))


@lookalike()
class ParameterChangedBetweenUses(Stacked):
    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x)
        out = torch.zeros_like(x)
        w1 = self.w1.clone()
        for e in range(EXPERTS):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, F.silu(x[token] @ w1[e]) @ self.w2[e] * weights[token, slot, None])
            w1.mul_(1.5)
        return out


@lookalike(never=False)
class InputChangedAfterRouting(ExpertList):
    """Right when the block reads x after the write."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        weights, ids = self.router(x)
        x.mul_(2)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
        return out


@lookalike()
class InputChangedInTheMiddle(ExpertList):
    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        weights, ids = self.router(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
            F.leaky_relu(x, 0.5, True)
        return out


@lookalike()
class AddedToInput(ExpertList):
    """Accumulates into x itself, which later experts read."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        weights, ids = self.router(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            x.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
        return x


@lookalike()
class IdsOverwritten(Stacked):
    """A sentinel written into the ids in place, which then wraps around."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x)
        ids[:, 1] = -1
        return torch.einsum(
            "tki,tkih,tk->th", F.silu(torch.einsum("th,tkhi->tki", x, self.w1[ids])), self.w2[ids], weights
        )


@lookalike()
class Counter(ExpertList):
    """Counts the tokens of each expert in a buffer, in the loop."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("load", torch.zeros(EXPERTS, dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            self.load[e] += (expert.w1(x[token]) > 0).sum()
            out.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
        return out + self.load.sum()


# --- values that get out, random numbers


@lookalike()
class ReturnsInnerValue(ExpertList):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        weights, ids = self.router(x)
        out = torch.zeros_like(x)
        inner = x.new_zeros(())
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            hidden = F.silu(expert.w1(x[token])) * expert.w3(x[token])
            inner = inner + hidden.square().sum()
            out.index_add_(0, token, expert.w2(hidden) * weights[token, slot, None])
        return out, inner


@lookalike()
class Hooked(ExpertList):
    """A forward hook keeps what an expert's projection gave."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []
        self.experts[2].w1.register_forward_hook(lambda module, args, out: self.kept.append(out))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        self.kept.clear()
        return super().forward(x), self.kept[0].sum()


@lookalike()
class PartialResultRead(ExpertList):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        weights, ids = self.router(x)
        out, half = torch.zeros_like(x), x.new_zeros(())
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
            if e == 2:
                half = out.sum()
        return out, half


for _p in (0.1, 0.0005):
    _register(
        lambda p=_p: ExpertList(
            lambda: nn.Sequential(nn.Linear(HIDDEN, 9), nn.Dropout(p), nn.ReLU(), nn.Linear(9, HIDDEN))
        ),
        f"Dropout{_p}",
        never=True,
        inputs=list,  # nothing to compare: eager and the compiled program draw different numbers
    )


# --- sharing, dtypes, kinds of ids


@lookalike(never=False)
class SharedParameters(nn.Module):
    """Two blocks with one set of experts and routers of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = ExpertList(), ExpertList()
        self.second.experts = self.first.experts

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) - self.second(x)


@lookalike()
class PartlyTied(ExpertList):
    """Expert 3 is expert 5."""

    def __init__(self) -> None:
        super().__init__()
        self.experts[3] = self.experts[5]


rows("ThroughFloat8", lambda f, e, x, w: f(x).to(torch.float8_e4m3fn).to(x.dtype) * w)
rows("ThroughInt8", lambda f, e, x, w: f((x * 32).to(torch.int8).to(x.dtype)) * w)


class _Kind(Router):
    """Ids of another dtype."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = super().forward(x)
        return weights, ids.to(self.dtype)


for _dtype in (torch.int32, torch.uint8, torch.int16, torch.float32):
    _register(lambda d=_dtype: ExpertList(Gated, lambda: _Kind(d)), f"Ids{_dtype}", never=False, train=True)


@lookalike(never=False, inputs=scaled(1.0))
class BooleanIds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, 1, bias=False)
        self.experts = nn.ModuleList(Gated() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        logits = self.gate(x)
        ids, out = logits > 0, torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, expert(x[token]) * logits.sigmoid()[token, slot, None])
        return out


@lookalike(never=False, inputs=lambda: [(hidden_states(EXPERTS),)])
class TransposedShares(ExpertList):
    """[E, T] where E = T."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x)
        share = torch.zeros(x.shape[0], EXPERTS).scatter(1, ids, weights).t()
        return sum(f(x) * share[e][:, None] for e, f in enumerate(self.experts))  # type: ignore[return-value]


@lookalike(never=False, inputs=lambda: [(hidden_states(24).view(12, 2, HIDDEN)[:, 0],), (torch.randn(HIDDEN, 12).t(),)])
class StridedInput(ExpertList):
    pass


@lookalike(never=False, train=True)
class StridedParameters(Stacked):
    """Expert dimension innermost in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w3, self.w2 = (
            nn.Parameter(w.detach().permute(1, 2, 0).contiguous().permute(2, 0, 1)) for w in (self.w1, self.w3, self.w2)
        )

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x)
        hidden = F.silu(torch.einsum("th,tkhi->tki", x, self.w1[ids])) * torch.einsum("th,tkhi->tki", x, self.w3[ids])
        return torch.einsum("tki,tkih,tk->th", hidden, self.w2[ids], weights)


class _Wide(nn.Module):
    """hidden → 512 → hidden; ``last`` units of 512, or of the result, count twice."""

    def __init__(self, units: int, results: int):
        super().__init__()
        self.units, self.results = units, results
        self.up, self.down = nn.Linear(256, 512, bias=False), nn.Linear(512, 256, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return _twice(self.down(_twice(F.relu(self.up(x)), self.units)), self.results)


def _twice(a: Tensor, last: int) -> Tensor:
    return torch.cat([a[:, :-last], a[:, -last:] * 2], 1) if last else a


class _WideRouter(Router):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, 256) * 0.1)


for _name, _units, _results in (("LastUnits", 13, 0), ("LastResults", 0, 13)):
    _register(
        lambda u=_units, r=_results: ExpertList(lambda: _Wide(u, r), _WideRouter),
        f"{_name}OfWideExperts",
        inputs=lambda: [(hidden_states(80).view(10, 256),)],
    )
