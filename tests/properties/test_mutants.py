"""Defects planted on purpose: each must be caught, at compile time by VERIFY (the block is left alone with verify.*, or
MATCH finds nothing), or by a check named here.  A mutant that nobody catches means a check that cannot fail.

Every mutant is tried on a program that is fused without it, which a first test makes sure of.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from idioms.harness import EXPERTS, compiled, hidden_states, run
from idioms.parts import ExpertList, Gated, Joined, Mlp, Stacked
from torch import Tensor, nn

import moe_fx
from moe_fx import backend, ops
from moe_fx.passes import match, verify
from moe_fx.reference import activations
from moe_fx.reference import experts as reference

Patch = Callable[[pytest.MonkeyPatch], None]


class WeightOnInput(ExpertList):
    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, expert(x[token] * weights[token, slot, None]))
        return out


class Gathered(Stacked):
    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x)
        gate, up = (torch.einsum("th,tkhi->tki", x, w[ids]) for w in (self.w1, self.w3))
        return torch.einsum("tki,tkih,tk->th", F.silu(gate) * up, self.w2[ids], weights)


PROGRAMS: dict[str, Callable[[], nn.Module]] = {
    "gated": ExpertList,
    "biased": partial(ExpertList, partial(Gated, bias=True)),
    "relu": partial(ExpertList, partial(Mlp, bias=False)),
    "gelu": partial(ExpertList, partial(Mlp, F.gelu)),
    "joined": Joined,
    "interleaved": partial(Joined, "interleaved"),
    "stacked": Gathered,
    "on_input": WeightOnInput,
}


@dataclass(frozen=True, slots=True)
class Mutant:
    """program: on which it is planted.  train: with gradients.  by: codes of which one must be given."""

    patch: Patch
    program: str = "gated"
    train: bool = False
    by: tuple[str, ...] = ("verify.",)


MUTANTS: dict[str, Mutant] = {}


def mutant(program: str = "gated", train: bool = False, by: tuple[str, ...] = ("verify.",)) -> Callable[[Patch], Patch]:
    def register(patch: Patch) -> Patch:
        MUTANTS[patch.__name__] = Mutant(patch, program, train, by)
        return patch

    return register


def _proposals(patch: pytest.MonkeyPatch, change: Callable[[match.Proposal], match.Proposal]) -> None:
    """Every proposal, changed."""
    original = match.propose

    def propose(*args: Any, **kwargs: Any) -> Any:
        found = original(*args, **kwargs)
        return [change(p) for p in found] if isinstance(found, list) else found

    patch.setattr(backend, "propose", propose)


def _spec(patch: pytest.MonkeyPatch, part: str, **values: Any) -> None:
    def change(p: match.Proposal) -> match.Proposal:
        inner = dataclasses.replace(getattr(p.spec, part), **values)
        return dataclasses.replace(p, spec=dataclasses.replace(p.spec, **{part: inner}))

    _proposals(patch, change)


def _binding(patch: pytest.MonkeyPatch, role: str, **values: Any) -> None:
    def change(p: match.Proposal) -> match.Proposal:
        operands = tuple(dataclasses.replace(o, **values) if o.role == role else o for o in p.binding.operands)
        return dataclasses.replace(p, binding=dataclasses.replace(p.binding, operands=operands))

    _proposals(patch, change)


def _activation(patch: pytest.MonkeyPatch, key: tuple[str, bool], **values: Any) -> None:
    changed = dataclasses.replace(activations.ACTIVATIONS[key], **values)
    patch.setitem(activations.ACTIVATIONS, key, changed)


# --- what MATCH says


@mutant()
def gate_and_up_swapped(patch: pytest.MonkeyPatch) -> None:
    def change(p: match.Proposal) -> match.Proposal:
        nodes = list(p.operands)
        nodes[:EXPERTS], nodes[EXPERTS : 2 * EXPERTS] = nodes[EXPERTS : 2 * EXPERTS], nodes[:EXPERTS]
        return dataclasses.replace(p, operands=tuple(nodes))

    _proposals(patch, change)


@mutant()
def two_experts_swapped(patch: pytest.MonkeyPatch) -> None:
    def change(p: match.Proposal) -> match.Proposal:
        nodes = list(p.operands)
        for start in range(0, len(nodes), EXPERTS):
            nodes[start + 4], nodes[start + 5] = nodes[start + 5], nodes[start + 4]
        return dataclasses.replace(p, operands=tuple(nodes))

    _proposals(patch, change)


@mutant("joined")
def halves_swapped(patch: pytest.MonkeyPatch) -> None:
    _binding(patch, "w13", order="up_gate")


@mutant("interleaved")
def interleaving_missed(patch: pytest.MonkeyPatch) -> None:
    _binding(patch, "w13", order="gate_up")


@mutant()
def weight_on_input(patch: pytest.MonkeyPatch) -> None:
    _spec(patch, "combine", weight_on="input")


@mutant("on_input")
def weight_on_output(patch: pytest.MonkeyPatch) -> None:
    _spec(patch, "combine", weight_on="output")


@mutant()
def another_activation(patch: pytest.MonkeyPatch) -> None:
    _spec(patch, "expert", act="gelu", act_params=())


@mutant("biased")
def bias_dropped(patch: pytest.MonkeyPatch) -> None:
    def change(p: match.Proposal) -> match.Proposal:
        kept = tuple(o for o in p.binding.operands if o.role != "w2_bias")
        spec = dataclasses.replace(p.spec, expert=dataclasses.replace(p.spec.expert, w2_bias=False))
        return dataclasses.replace(
            p, spec=spec, binding=dataclasses.replace(p.binding, operands=kept), operands=p.operands[:-EXPERTS]
        )

    _proposals(patch, change)


# --- what the reference says: an activation that is wrong matches nothing, or is found out


@mutant("gelu", by=("match.", "verify."))
def wrong_activation_formula(patch: pytest.MonkeyPatch) -> None:
    _activation(patch, ("gelu", False), forward=lambda a, _: F.gelu(1.001 * a))


@mutant("gelu", train=True)
def wrong_activation_backward(patch: pytest.MonkeyPatch) -> None:
    _activation(patch, ("gelu", False), backward=lambda dh, a, _: (dh * torch.sigmoid(1.7 * a), None))


@mutant("relu", train=True)
def relu_backward_at_zero(patch: pytest.MonkeyPatch) -> None:
    """Wrong where the input is exactly 0 only."""
    _activation(patch, ("relu", False), backward=lambda dh, a, _: (dh * (a >= 0), None))


@mutant(train=True)
def routing_gradient_forgotten(patch: pytest.MonkeyPatch) -> None:
    original = reference.experts_backward

    def backward(*args: Any) -> tuple[Tensor, Tensor]:
        dx, dweights = original(*args)
        return dx, torch.zeros_like(dweights)

    patch.setattr(verify, "experts_backward", backward)


@mutant(train=True)
def input_gradient_of_gate_only(patch: pytest.MonkeyPatch) -> None:
    original = reference.experts_backward

    def backward(dy: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        dx, dweights = original(dy, x, *rest)
        return dx * torch.where(x.norm(dim=-1, keepdim=True) < 1, 1.01, 1.0), dweights

    patch.setattr(verify, "experts_backward", backward)


# --- what the kernel does: the op is compared in its own dtypes


@mutant()
def kernel_drops_the_last_slot(patch: pytest.MonkeyPatch) -> None:
    original = ops._implementation.forward

    def forward(call: ops.Call) -> Tensor:
        kept = torch.cat([call.weights[:, :-1], 0 * call.weights[:, -1:]], 1)
        return original(dataclasses.replace(call, weights=kept))

    patch.setattr(ops._implementation, "forward", forward)


@mutant()
def kernel_is_slightly_off(patch: pytest.MonkeyPatch) -> None:
    original = ops._implementation.forward
    patch.setattr(ops._implementation, "forward", lambda *args: original(*args) * (1 + 1e-4))


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    yield
    moe_fx.reset()


def _report(name: str, train: bool) -> moe_fx.Report:
    torch.manual_seed(0)
    module = PROGRAMS[name]()
    run(compiled(module), module, (hidden_states(10),), train)
    return moe_fx.last_report()


@pytest.mark.parametrize("train", (False, True))
@pytest.mark.parametrize("name", PROGRAMS)
def test_fused_without_mutants(name: str, train: bool) -> None:
    assert _report(name, train).num_fused == 1


@pytest.mark.parametrize("name", MUTANTS)
def test_caught_at_compile_time(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    planted = MUTANTS[name]
    planted.patch(monkeypatch)
    report = _report(planted.program, planted.train)
    codes = {r.code for site in report.sites for r in site.rejects}
    assert report.num_fused == 0
    assert any(code.startswith(planted.by) for code in codes), str(report)


def test_there_are_enough_mutants() -> None:
    assert len(MUTANTS) >= 15
