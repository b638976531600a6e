"""Mutants of the checks themselves: with a check weakened, something named here must notice.

Each weakened check is paired with the look-alike that it alone keeps right; without the mutant that one is right.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from idioms import lookalikes_effects, lookalikes_numbers  # noqa: F401  register their look-alikes
from idioms.harness import EXPERTS, HIDDEN, compiled, hidden_states, relative, run
from idioms.lookalikes import LOOKALIKES
from idioms.parts import ExpertList, Mlp, Router
from torch import Tensor, nn

import moe_fx
from moe_fx import backend
from moe_fx.passes import coverage, dataflow, exact, fingerprint, id_range, match, rewrite, sampling, verify

from .test_mutants import Gathered

Patch = Callable[[pytest.MonkeyPatch], None]


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    yield
    moe_fx.reset()


# --- mutants of the checks themselves: something else must notice


def _differs(name: str) -> bool:
    """Whether the look-alike ``name`` gives another result than the original, or is fused against its ``never``."""
    found = LOOKALIKES[name]
    torch.manual_seed(0)
    module = found.make()
    function = compiled(module, found.dynamic)
    wrong = False
    for args in found.inputs():
        fused, own = run(function, module, args, found.train), run(module, module, args, found.train)
        wrong |= any(relative(a, b) > 1e-5 for a, b in zip(fused.outputs, own.outputs, strict=True))
        wrong |= any(relative(fused.grads[n], g) > 1e-4 for n, g in own.grads.items())
    return wrong or (found.never and moe_fx.last_report().num_fused > 0)


def _no_coverage(patch: pytest.MonkeyPatch) -> None:
    """Nor planted numbers and rows with NaN, which find the same defects."""
    patch.setattr(coverage.Coverage, "missing", lambda self: [])
    _nothing_planted(patch)
    _finite_rows_only(patch)


def _nothing_planted(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(verify, "planted", lambda *_: [])


def _finite_rows_only(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(verify, "_same_where_finite", lambda *_: None)


def _casts_keep_all(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(verify, "loses", lambda *_: None)


def _ids_survive_casts(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(id_range, "LIMITS", {})


def _quotients_decide_nothing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(coverage.Coverage, "_by_constant", lambda *_: False)


def _sizes_are_exact(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(coverage.Coverage, "_sizes", lambda _: [])


def _positive_weights(patch: pytest.MonkeyPatch) -> None:
    _no_coverage(patch)
    original = sampling.Sampler._routing_weights
    patch.setattr(
        sampling.Sampler, "_routing_weights", lambda self, *args, **_: original(self, *args[:2], special=False)
    )


def _ids_believed_inside(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(backend, "id_range", lambda node, buffers, top_k: (0.0, EXPERTS - 1.0, True))


def _always_the_first_experts(patch: pytest.MonkeyPatch) -> None:
    _no_coverage(patch)
    original = sampling.Sampler._ids
    patch.setattr(sampling.Sampler, "_ids", lambda self, t, k, pattern, chosen: original(self, t, k, "first", [0, 1]))


def _writes_unseen(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(dataflow, "_asks_inplace", lambda node: False)


def _silent_effects_unseen(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(dataflow.Dataflow, "is_assertion", staticmethod(lambda node: dataflow.value(node) is None))


def _no_gradients_compared(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(verify, "_same_gradients", lambda *args, **kwargs: None)


def _loose_tolerance(patch: pytest.MonkeyPatch) -> None:
    """The comparison in the true dtypes is with the reference, so it finds no other formula: this one is alone."""
    patch.setattr(verify, "_FORMULA", float("inf"))


def _one_sequence_only(patch: pytest.MonkeyPatch) -> None:
    original = sampling.Sampler._assignment

    def assignment(self: Any, tokens: int) -> tuple[int, dict[Any, int]]:
        """One symbol holds all tokens."""
        free = [s for s in self.symbols if s in sampling.free_symbols(sampling.numel(self.region.x))]
        if not free:
            return original(self, tokens)
        return tokens, {s: tokens if s is free[-1] or s not in free else 1 for s in self.symbols}

    patch.setattr(sampling.Sampler, "_assignment", assignment)


def _rows_of_one_scale(patch: pytest.MonkeyPatch) -> None:
    _no_coverage(patch)
    patch.setattr(sampling.Sampler, "_special_rows", lambda self, x: x)


WEAKENED: dict[str, tuple[Patch, str]] = {
    "decisions seen one way only": (_no_coverage, "NaNToNumber"),
    "capacity never reached": (_no_coverage, "CutTokens"),
    "routing weights positive": (_positive_weights, "WeightsFloored"),
    "ids believed inside": (_ids_believed_inside, "CopyingExpert1of1"),
    "one routing for all samples": (_always_the_first_experts, "OneExpertTwice"),
    "writes unseen": (_writes_unseen, "HardtanhInPlace"),
    "effects unseen": (_silent_effects_unseen, "Asserted"),
    "gradients not compared": (_no_gradients_compared, "OneExpertDetached"),
    "tolerance": (_loose_tolerance, "WeightsSquared"),
    "one sequence": (_one_sequence_only, "OtherOrderOfRows"),
    "nothing planted": (_nothing_planted, "Band"),
    "no NaN": (_finite_rows_only, "ReluByWhere"),
    "casts keep all": (_casts_keep_all, "PlacesInBytes"),
    "ids survive casts": (_ids_survive_casts, "IdsInBytes"),
    "quotients": (_quotients_decide_nothing, "PlacesShifted"),
    "sizes": (_sizes_are_exact, "QuotientOfLength"),
    "rows of one scale": (_rows_of_one_scale, "Ceiling1e+05"),
}


@pytest.mark.parametrize("name", WEAKENED)
def test_a_lookalike_notices(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    patch, lookalike = WEAKENED[name]
    assert not _differs(lookalike), "wrong without the mutant"
    patch(monkeypatch)
    assert _differs(lookalike)


# --- REWRITE and the cache


def _first_and_second(first: nn.Module, second: nn.Module, train: bool = False) -> bool:
    """Whether ``second``, compiled after ``first`` with its verdicts kept, gives another result than the original."""
    run(compiled(first), first, (hidden_states(10),), train)
    function = compiled(second, fresh=False)
    fused, own = (run(f, second, (hidden_states(10) * 40,), train) for f in (function, second))
    return any(relative(a, b) > 1e-5 for a, b in zip(fused.outputs, own.outputs, strict=True)) or any(
        relative(fused.grads[n], g) > 1e-4 for n, g in own.grads.items()
    )


def _leaky(slope: float) -> nn.Module:
    torch.manual_seed(0)
    return ExpertList(partial(Mlp, partial(F.leaky_relu, negative_slope=slope)))


def test_constants_are_in_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not _first_and_second(_leaky(0.01), _leaky(0.3))
    moe_fx.reset()
    original = fingerprint.text_of
    monkeypatch.setattr(
        fingerprint, "text_of", lambda tree, *rest: "f" if isinstance(tree, float) else original(tree, *rest)
    )
    assert _first_and_second(_leaky(0.01), _leaky(0.3))


def _opaque(function: Callable[[Tensor], Tensor]) -> nn.Module:
    def act(rows: Tensor) -> Tensor:  # every one has this name
        return function(rows)

    torch.manual_seed(0)
    return ExpertList(partial(Mlp, torch.compiler.allow_in_graph(act)))


def test_functions_of_one_name_are_two(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not _first_and_second(_opaque(F.silu), _opaque(F.gelu))
    moe_fx.reset()
    monkeypatch.setattr(fingerprint, "identity", dataflow.target_name)
    assert _first_and_second(_opaque(F.silu), _opaque(F.gelu))


class _Detached(ExpertList):
    """Left alone in training, right in inference."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, expert(x[token]).detach() * weights[token, slot, None])
        return out


def _inference_then_training() -> bool:
    moe_fx.reset()
    torch.manual_seed(0)
    module = _Detached()
    run(compiled(module), module, (hidden_states(10),), False)
    function = compiled(module, fresh=False)
    fused, own = (run(f, module, (hidden_states(10),), True) for f in (function, module))
    return any(relative(fused.grads[n], g) > 1e-4 for n, g in own.grads.items())


def test_training_is_in_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not _inference_then_training()
    monkeypatch.setattr(backend, "fingerprint", lambda region, *context: "the same for all")
    assert _inference_then_training()


def _keys(*programs: tuple[nn.Module, Tensor, bool]) -> list[str]:
    """The key of each program's block."""
    found: list[str] = []
    original = fingerprint.fingerprint
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "fingerprint", lambda *args: found.append(original(*args)) or found[-1])
        for module, x, train in programs:
            run(compiled(module), module, (x,), train)
    assert len(found) == len(programs)
    return found


class _StridedWeights(Gathered):
    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Parameter(self.w1.detach().transpose(1, 2).contiguous().transpose(1, 2))


class _OtherIds(Gathered):
    """One id more than experts."""

    def __init__(self) -> None:
        super().__init__()
        self.router = Router(EXPERTS + 1)


def test_the_key_tells_apart() -> None:
    x = hidden_states(10)
    strided = hidden_states(20).view(10, 2, HIDDEN)[:, 0]
    keys = _keys(
        (Gathered(), x, False),
        (Gathered(), hidden_states(11), False),
        (Gathered(), x, True),
        (Gathered().to(torch.bfloat16), x.bfloat16(), False),
        (_StridedWeights(), x, False),
        (Gathered(), strided, False),
        (_OtherIds(), x, False),
    )
    assert len(set(keys)) == len(keys)
    assert _keys((Gathered(), x, False), (Gathered(), x, False)) == [keys[0]] * 2


def test_rewrite_of_another_node_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """VERIFY saw another node than the one that REWRITE makes: what is left is the comparison of results."""
    original = rewrite.rewrite
    torch.manual_seed(0)
    module, x = Gathered(), hidden_states(10)
    monkeypatch.setattr(backend, "rewrite", lambda g, r, p, plan: original(g, r, _swapped(p), plan))
    fused, own = (run(f, module, (x,), False) for f in (compiled(module), module))
    assert relative(fused.outputs[0], own.outputs[0]) > 1e-2


def _swapped(proposal: match.Proposal) -> match.Proposal:
    first, second, *rest = proposal.operands
    return dataclasses.replace(proposal, operands=(second, first, *rest))


def test_float64_is_not_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were casts not neutralised, a block that computes in float32 inside would differ by its rounding."""
    monkeypatch.setattr(exact, "_real", lambda wanted: wanted)
    torch.manual_seed(0)
    module = ExpertList(lambda: Mlp(lambda a: F.relu(a.to(torch.bfloat16)).float()))
    run(compiled(module), module, (hidden_states(10),), False)
    assert moe_fx.last_report().num_fused == 0
