"""Near misses whose difference lies in numbers that random samples do not meet: narrow bands, far thresholds, quotients
of places and lengths, numbers that are arguments, casts that wrap round or overflow, rows with NaN."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .harness import TOP_K, hidden_states
from .lookalikes import _register, act, lengths, lookalike, rows, scaled
from .parts import ExpertList, Router, Stacked


def _band(h: Tensor) -> Tensor:
    return torch.where(h > 3, torch.where(h < 3.001, 0.0, h), F.relu(h))


act("Band", _band, inputs=lambda: [*scaled(1)(), *scaled(3, tokens=2000)()])
act("BandByMasks", lambda h: F.relu(h) * (1 - (h > 3).to(h.dtype) * (h < 3.001).to(h.dtype)))
act("BandByXor", lambda h: torch.where(torch.logical_xor(h > 3, h > 3.001), 0.0, F.relu(h)))
act("BandDetached", lambda h: torch.where((h > 3) & (h < 3.001), h.detach(), F.relu(h)), train=True)
act("FarSigmoid", lambda h: F.relu(h) * (1 + torch.sigmoid(h * 1e-3 - 40)), inputs=scaled(1, 1e6))
act("WholePart", lambda h: F.relu(h) * (1 + (h * 1e-3).to(torch.int32)), inputs=scaled(1, 1e4))
act(
    "Exponent",
    lambda h: F.relu(h) * (1 + torch.div(torch.frexp(h)[1], 40, rounding_mode="trunc")),
    inputs=scaled(1, 1e13),
)
act("ThroughHalf", lambda h: F.relu(h).half().to(h.dtype), inputs=scaled(1e6))
rows("WeightsThroughHalf", lambda f, e, x, w: f(x) * ((w * 1e-7).half().to(x.dtype) * 1e7))
act("ReluByWhere", lambda h: torch.where(h > 0, h, 0.0))
act("ReluByMaximumOfNumbers", lambda h: torch.fmax(h, torch.zeros_like(h)))


class _Places(ExpertList):
    """``share`` of a (token, slot) pair's place in its expert's list."""

    def share(self, place: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            share = weights[token, slot] * self.share(torch.arange(token.shape[0], device=x.device))
            out.index_add_(0, token, expert(x[token]) * share[:, None])
        return out


def _places(name: str, share: Callable[[Tensor], Tensor]) -> None:
    lookalike(inputs=lengths(12, 9000), dynamic=True)(
        type(name, (_Places,), {"share": lambda self, place: share(place)})
    )


_places("PlacesDivided", lambda place: 1 - (place // 2000).clamp(max=1))
_places("PlacesShifted", lambda place: 1 - (place >> 11))
_places("PlacesMasked", lambda place: 1 - (place & 2048) / 2048)
_places("PlacesModulo", lambda place: place % 2000 - place + 1)
_places("PlacesFading", lambda place: 1 + torch.sigmoid(place.float() - 2000))
_places("PlacesToAPower", lambda place: 1 + (place / 3000.0) ** 20)
_places("PlacesInBytes", lambda place: 1 + place - place.to(torch.uint8))


@lookalike(inputs=lengths(12, 1500), dynamic=True)
class CountsInBytes(ExpertList):
    """Places among an expert's rows, counted in a dtype that wraps round."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x)
        chosen = F.one_hot(ids.reshape(-1), len(self.experts)).to(torch.uint8)
        place = (chosen.cumsum(0, dtype=torch.uint8) * chosen).sum(-1).view(ids.shape)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where((ids == e) & (place > 0))
            out.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
        return out


@lookalike(inputs=lengths(12, 9000), dynamic=True)
class CutByEllipsis(ExpertList):
    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = (t[..., :2000] for t in torch.where(ids == e))
            out.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
        return out


@lookalike(inputs=lengths(12, 4000), dynamic=True)
class QuotientOfLength(ExpertList):
    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            share = weights[token, slot, None] * (1 + x.shape[0] // 3000)
            out.index_add_(0, token, expert(x[token]) * share)
        return out


class _Numbers(ExpertList):
    """``change(rows, tokens, …)`` of an expert's results, the number of tokens and further arguments, which are not the
    same for every call."""

    def __init__(self, change: Callable[..., Tensor]):
        super().__init__()
        self.change = change

    def forward(self, x: Tensor, *numbers: float) -> Tensor:
        weights, ids = self.router(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            rows = self.change(expert(x[token]), x.shape[0], *numbers)
            out.index_add_(0, token, rows * weights[token, slot, None])
        return out


def _numbers(name: str, change: Callable[..., Tensor], *calls: tuple[float, ...], dynamic: bool | None = True) -> None:
    arguments = [(hidden_states(12), *numbers) for numbers in calls]
    _register(partial(_Numbers, change), name, inputs=lambda: arguments, dynamic=dynamic)


_numbers("NumberOverLength", lambda rows, tokens, a: rows * a / tokens, (3,), (5,))
_numbers("NumberOverFixedLength", lambda rows, tokens, a: rows * a / tokens, (3,), (5,), (7,), dynamic=None)
_numbers("NumberOverNumber", lambda rows, tokens, a, b: rows * a / b, (3, 4), (5, 6))
_numbers("RealOverReal", lambda rows, tokens, a, b: rows * a / b, (3.0, 4.0), (5.0, 6.0))
_numbers("LengthWithoutNumber", lambda rows, tokens, a: rows * (1 + tokens - a), (3,), (5,))
_numbers("RealWithoutReal", lambda rows, tokens, a, b: rows * (1 + a - b), (3.0, 4.0), (5.5, 6.0))


class _Cast(Stacked):
    """Ids in a dtype that does not hold them all."""

    dtype = torch.int8

    def __init__(self) -> None:
        super().__init__(lambda: Router(300, TOP_K))

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x)
        ids = ids.to(self.dtype).long()
        rows = F.silu(torch.einsum("th,tkhi->tki", x, self.w1[ids])) * torch.einsum("th,tkhi->tki", x, self.w3[ids])
        return torch.einsum("tki,tkih,tk->th", rows, self.w2[ids], weights)


@lookalike()
class IdsInBytes(_Cast):
    pass


@lookalike()
class IdsInHalf(_Cast):
    dtype = torch.bfloat16
