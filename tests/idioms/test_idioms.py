"""Every program × dtype × mode × shapes: fused, in one graph, within the tolerance rule, gradients included."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from . import programs, programs_routing  # noqa: F401  they register them
from .harness import fused_within_rule, hidden_states, relative, run, widened
from .registry import PROGRAMS, Program

DTYPES, MODES, SHAPES = ("float32", "bfloat16"), ("eval", "train"), ("static", "dynamic")
CELLS = list(itertools.product(DTYPES, MODES, SHAPES))
# four cells that hold every pair of values; each program runs one of them by default, in turn
PAIRWISE = [CELLS[0b000], CELLS[0b011], CELLS[0b101], CELLS[0b110]]


def _cases() -> list[object]:
    cases = []
    for i, (name, found) in enumerate(PROGRAMS.items()):
        for cell in CELLS:
            if found.autocast and cell[0] != "float32":
                continue  # autocast is for float32 models
            if cell[1] == "train" and not found.trains:
                continue
            default = PAIRWISE[i % 4] if found.trains else PAIRWISE[i % 2 * 2]
            marks = [] if cell == default or (found.autocast and cell == CELLS[1]) else [pytest.mark.slow]
            if found.missing:
                marks.append(pytest.mark.xfail(reason=found.missing, strict=True))
            cases.append(pytest.param(name, *cell, marks=marks, id="-".join((name, *cell))))
    return cases


@pytest.mark.parametrize("name, dtype, mode, shapes", _cases())
def test_fused(name: str, dtype: str, mode: str, shapes: str) -> None:
    found, kind = PROGRAMS[name], getattr(torch, dtype)
    torch.manual_seed(0)
    module = found.make()
    leading = [(2, 5), (3, 7)] if found.batched else [(10,), (23,)]
    arguments = [(_inputs(found, module, shape, kind),) for shape in leading[: 1 + (shapes == "dynamic")]]
    dynamic = True if shapes == "dynamic" else None
    fused_within_rule(module, arguments, found.blocks, kind, mode == "train", dynamic, found.autocast)


def _inputs(found: Program, module: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Hidden states on which rounding does not change the choice of experts: the rule holds for equal ids."""
    module.to(dtype)
    wide = widened(module)
    coarse = dtype == torch.bfloat16 or found.autocast or "Autocast" in type(module).__name__
    for seed in range(50):
        x = hidden_states(*shape, seed=seed).to(dtype)
        own, truth = run(module, module, (x,), False, found.autocast), run(wide, wide, (x.double(),), False)
        if relative(own.outputs[0], truth.outputs[0]) < (0.02 if coarse else 1e-5):
            return x
    raise AssertionError("no seed without a near-tie in the router")


def test_the_default_cells_hold_every_pair() -> None:
    for i, j in itertools.combinations(range(3), 2):
        assert {(c[i], c[j]) for c in PAIRWISE} == set(
            itertools.product((DTYPES, MODES, SHAPES)[i], (DTYPES, MODES, SHAPES)[j])
        )


def test_there_are_enough_programs() -> None:
    assert len(PROGRAMS) >= 25
