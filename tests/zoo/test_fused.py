"""Every family is fused, or left alone with a reason: a cell of each family by default, all cells in ``make full``."""

from __future__ import annotations

import pytest

from .families import FAMILIES
from .run import Cell, cells, must_fuse, run

ALL = [(family.name, implementation, dtype) for family, implementation, dtype in cells([], [], [])]


def _sampled() -> list[tuple[str, str, str]]:
    """One cell a family: implementations and dtypes in turn, so that every pair of them comes with many families."""
    chosen = []
    for i, name in enumerate(FAMILIES):
        own = [cell for cell in ALL if cell[0] == name]
        chosen.append(own[(3 * i) % len(own)])
    return chosen


SAMPLED = _sampled()


def _check(cell: Cell) -> None:
    family = FAMILIES[cell.family]
    if cell.verdict == "not here":
        pytest.skip(cell.detail)
    assert cell.verdict != "FAILED", str(cell)
    if must_fuse(family, cell.implementation):
        assert cell.verdict == "fused", str(cell)
    elif cell.verdict == "left alone":
        assert cell.detail, f"{cell.family} was left alone without a reason"


@pytest.mark.parametrize(("name", "implementation", "dtype"), SAMPLED)
def test_family(name: str, implementation: str, dtype: str) -> None:
    _check(run(FAMILIES[name], implementation, dtype))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "implementation", "dtype"), [c for c in ALL if c not in SAMPLED])
def test_every_cell(name: str, implementation: str, dtype: str) -> None:
    _check(run(FAMILIES[name], implementation, dtype))


def test_a_wrong_kernel_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeded defect: experts that ignore the routing weights fail the table's own check."""
    from moe_fx.lowerings.dispatch import Dispatch

    original = Dispatch.forward

    def careless(self, x, ids, weights, *rest):
        return original(self, x, ids, weights.new_ones(weights.shape), *rest)

    monkeypatch.setattr(Dispatch, "forward", careless)
    assert run(FAMILIES["mixtral"], "default", "float32").verdict == "FAILED"
