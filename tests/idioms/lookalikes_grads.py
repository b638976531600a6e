"""Near misses with the right values and another gradient: sums under no_grad, detached aliases, bends at exactly 0."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .harness import HIDDEN
from .lookalikes import _register, lookalike, scaled
from .parts import ExpertList, Mlp
from .programs_routing import add_experts


class _Onto(ExpertList):
    """The loop adds to ``start``; a linear layer makes that."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(HIDDEN, HIDDEN)

    def add(self, x: Tensor, out: Tensor) -> Tensor:
        return add_experts(self.experts, x, *self.router(x), out)


@lookalike(train=True)
class AddsWithoutGradient(_Onto):
    """What was there keeps its gradient."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.linear(x)
        with torch.no_grad():
            self.add(x, out)
        return out


@lookalike(train=True)
class AddsToDetached(_Onto):
    """The same memory, and no gradient of the experts."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.linear(x)
        self.add(x, out.detach())
        return out


@lookalike(train=True)
class DetachedAlias(_Onto):
    """Another name of the result, without its gradient."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        out = torch.zeros_like(x)
        alias = out.detach()
        self.add(x, out)
        return out, alias * 2


class _ZeroRows(ExpertList):
    """Biases that are 0, and rows that are 0: every activation is at 0 exactly."""

    def __init__(self, act: Callable[[Tensor], Tensor]):
        super().__init__(lambda: Mlp(act, bias=True))
        for name, p in self.named_parameters():
            if "bias" in name:
                nn.init.zeros_(p)


def _bend(name: str, act: Callable[[Tensor], Tensor], never: bool = True) -> None:
    _register(partial(_ZeroRows, act), name, never=never, inputs=scaled(1, 0), train=True)


_bend("BendOfClamp", lambda h: h.clamp(min=0))
_bend("BendOfMaximum", lambda h: torch.maximum(h, torch.zeros_like(h)))
_bend("BendAtZero", lambda h: h * (h >= 0))
_bend("BendOfLeaky", lambda h: torch.where(h >= 0, h, 0.1 * h))
_bend("BendOfRelu", F.relu, never=False)


@lookalike(train=False, inputs=scaled(1, 40))
class FarLogits(ExpertList):
    """-15 leaves an expert out only while the logits of the chosen ones are larger."""

    def forward(self, x: Tensor) -> Tensor:
        logits, ids = self.router.logits(x.abs()).abs().neg().topk(2, -1)
        shares = (torch.full((x.shape[0], len(self.experts)), -15.0).scatter(1, ids, logits) * 4).softmax(-1)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            out = out + expert(x) * shares[:, e, None]
        return out
