"""Every activation in registers against the registered one, and its derivative."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moe_fx.reference.activations import ACTIVATIONS, activation
from tests.kernels.cases import PARAMS

from .here import DEVICE, needs_device

pytestmark = needs_device
SIZE = 4096


def run(
    name: str, gated: bool, params: tuple[float, ...], gate: torch.Tensor, up: torch.Tensor, dh: torch.Tensor
) -> Any:
    from .kernels import activation_kernel

    out = [torch.empty_like(gate) for _ in range(3)]
    p0, p1 = (*params, 0.0, 0.0)[:2]
    activation_kernel[(SIZE // 256,)](gate, up, dh, *out, p0, p1, ACT=name, GATED=gated, BLOCK=256)
    return out


def values(seed: int) -> torch.Tensor:
    """Many sizes, both signs, the bends of every activation exactly."""
    draw = torch.Generator().manual_seed(seed)
    found = torch.randn(SIZE, generator=draw) * torch.exp2(torch.randint(-20, 6, (SIZE,), generator=draw))
    bends = torch.tensor([0.0, -0.0, 0.5, -0.5, 3.0, -3.0, 6.0, 20 / 1.5, *PARAMS.values(), torch.inf, -torch.inf])
    found[: len(bends)] = bends
    return found[torch.randperm(SIZE, generator=draw)].to(DEVICE)


@pytest.mark.parametrize(("name", "gated"), ACTIVATIONS, ids=str)
def test_as_registered(name: str, gated: bool) -> None:
    act = activation(name, gated)
    params = tuple(PARAMS[p] for p in act.params)
    gate, up, dh = values(0), values(1), values(2).clamp(-8, 8)
    found = run(name, gated, params, gate, up, dh)
    second = up if gated else None
    exact = [None if t is None else t.double() for t in (gate, second)]
    h = act.forward(*exact, *params)
    dgate, dup = act.backward(dh.double(), *exact, *params)
    for ours, usual, truth, what in zip(
        found,
        (act.forward(gate, second, *params), *act.backward(dh, gate, second, *params)),
        (h, dgate, dup),
        ("h", "dgate", "dup"),
        strict=True,
    ):
        if truth is None or usual is None:
            continue
        same = (ours.double() == truth) | (ours.isnan() & truth.isnan())
        size = (1 + gate.abs()) * (1 + up.abs()) * (1 + dh.abs())
        least = 1e-15 * size  # float64 loses the tails of 1 + tanh
        if what == "dgate":  # where the slope crosses 0, terms of this size cancel
            least = least + 2e-7 * (dh * up if gated else dh).abs()
        near = (ours - truth).abs() <= 2e-6 * truth.abs() + 2 * (usual - truth).abs() + least
        clear = usual.isfinite() | truth.isnan()  # where float32 itself overflows, nothing is asked
        bad = ~(same | near) & clear & truth.isfinite()
        shown = torch.stack([t[bad][:4].double() for t in (gate, up, dh, ours, usual, truth)])
        assert not bad.any(), f"{what}: gate, up, dh, found, usual, exact\n{shown}"


def test_nan_stays_nan() -> None:
    for name, gated in ACTIVATIONS:
        params = tuple(PARAMS[p] for p in activation(name, gated).params)
        nan = torch.full((SIZE,), torch.nan, device=DEVICE)
        h = run(name, gated, params, nan, torch.ones_like(nan), torch.ones_like(nan))[0]
        assert bool(h.isnan().all()) == bool(activation(name, gated).forward(nan, nan * 0 + 1, *params).isnan().all())


def test_every_activation_is_there() -> None:
    from moe_fx.kernels.triton.activations import PAIRED, POINTWISE

    assert {*POINTWISE, *PAIRED} == {name for name, _ in ACTIVATIONS}
