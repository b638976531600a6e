"""Code that a reading could get wrong: each gives what eager gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import ScalingType, scaled_mm
from transformers.integrations import finegrained_fp8

import moe_fx

from .fp8_models import HIDDEN, pair
from .test_scaled_products import Block, ByRow, H, compiled


class Between(ByRow):
    """What rounding read is written to before the product."""

    what = "x"

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        codes, scale = self.codes(x)
        if self.what == "x":
            x += 5
        elif self.what == "scale":
            scale.view(-1).mul_(2)
        else:
            codes.view(torch.uint8).bitwise_and_(0xF0)
        way = ScalingType.RowWise
        return scaled_mm(codes, self.weight.t(), scale, way, self.scale.t(), way, output_dtype=x.dtype)


@pytest.mark.parametrize("what", ["x", "scale", "codes"])
@pytest.mark.parametrize("tokens", [40, 1])
def test_writes_between_rounding_and_product(what: str, tokens: int) -> None:
    torch.manual_seed(0)

    class Kind(Between):
        pass

    Kind.what = what
    model, x = Block(Kind), torch.randn(tokens, H, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(compiled(model)(x), model(x))


class OneToken(ByRow):
    """Negative numbers are dropped: with one row of zeros that would be any rounding."""

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().codes(x.relu())


@pytest.mark.parametrize("tokens", [40, 1])
def test_a_rounding_that_drops_numbers(tokens: int) -> None:
    torch.manual_seed(0)
    model, x = Block(OneToken), torch.randn(tokens, H, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(compiled(model)(x), model(x))
    assert not any(site.fused for site in moe_fx.last_report().sites)


class Clipped(ByRow):
    """Scales have an upper bound: larger inputs saturate."""

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scale = (x.float().abs().amax(-1, keepdim=True) / 448).clamp(1e-12, 3.0)
        return (x.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn), scale


def test_a_clipped_scale() -> None:
    torch.manual_seed(0)
    model, x = Block(Clipped), torch.randn(64, H, dtype=torch.bfloat16) * 2000
    with torch.no_grad():
        assert torch.equal(compiled(model)(x), model(x))


class NoGrad(nn.Module):
    """Rounded without gradients, which flow beside."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.linear = nn.Linear(H, H, dtype=torch.bfloat16), ByRow(H, H)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        with torch.no_grad():
            codes, scale = self.linear.codes(h)
        way, linear = ScalingType.RowWise, self.linear
        y = scaled_mm(codes, linear.weight.t(), scale, way, linear.scale.t(), way, output_dtype=x.dtype)
        return y + h


def test_rounding_under_no_grad_trains() -> None:
    torch.manual_seed(0)
    model, x = NoGrad(), torch.randn(40, H, dtype=torch.bfloat16)
    model(x).sum().backward()
    want, model.first.weight.grad = model.first.weight.grad, None
    compiled(model)(x).sum().backward()
    assert torch.equal(model.first.weight.grad, want)  # type: ignore[arg-type]


# --- decisions in code that dequantises, on scales that no model has, or should not have


def asks(kind: str) -> Any:
    def scale(s: Tensor) -> Tensor:
        match kind:
            case "nothing":
                return s
            case "zero":
                return torch.where(s == 0, torch.ones_like(s), s)
            case "floor":
                return torch.where(s.abs() < 1e-4, torch.full_like(s, 1e-4), s)
            case "ceiling":
                return torch.where(s.abs() > 300, torch.full_like(s, 300.0), s)
            case "nan":
                return s.nan_to_num(1.0)
            case "written":
                t = s / 2
                _KEPT.append(t)
                return t
        raise AssertionError(kind)

    return scale


_KEPT: list[Tensor] = []


class Asked(nn.Module):
    """A bank of int8 with a scale a row, which ``asks``."""

    def __init__(self, kind: str, value: float) -> None:
        super().__init__()
        self.kind, generator = kind, torch.Generator().manual_seed(0)
        self.gate = nn.Linear(H, 4, bias=False)
        for name, rows, cols in (("up", 128, H), ("down", H, 64)):
            codes = torch.randint(-127, 128, (4, rows, cols), generator=generator, dtype=torch.int8)
            scale = torch.rand(4, rows, 1, generator=generator) / 1000
            scale[:, ::3] = value
            self.register_buffer(f"{name}_codes", codes)
            self.register_buffer(f"{name}_scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.gate(x).softmax(-1).topk(2, -1)
        _KEPT.clear()
        up = self.up_codes.float() * asks(self.kind)(self.up_scale)
        down = self.down_codes.float() * asks(self.kind)(self.down_scale)
        for t in _KEPT:
            t.mul_(3)  # after the matrices were made of it
        flat = ids.reshape(-1)
        rows = x.repeat_interleave(2, 0).unsqueeze(1)
        gate, second = torch.bmm(rows, up[flat].mT).squeeze(1).chunk(2, -1)
        out = torch.bmm((F.silu(gate) * second).unsqueeze(1), down[flat].mT).view(-1, 2, H)
        return (out * weights.unsqueeze(-1)).sum(1)


@pytest.mark.parametrize(
    ("kind", "value"),
    [("nothing", 0.5), ("zero", 0.0), ("floor", 1e-7), ("ceiling", 2000.0), ("nan", torch.nan), ("written", 0.5)],
)
def test_decisions_on_scales(kind: str, value: float) -> None:
    torch.manual_seed(0)
    model, x = Asked(kind, value), torch.randn(20, H)
    with torch.no_grad():
        want, found = model(x), compiled(model)(x)
    assert not want.isnan().any()
    assert (found - want).norm() <= 1e-5 * want.norm()
    if kind == "nothing":  # the block of all these is one that fuses
        assert any(site.fused for site in moe_fx.last_report().sites)


# --- transformers' fp8 modules that are not what they were


def test_no_token() -> None:
    experts = pair("Qwen3Moe").quantised.model.layers[0].mlp.experts
    with torch.no_grad():
        y = compiled(experts)(torch.zeros(0, HIDDEN), torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2))
    assert y.shape == (0, HIDDEN)


def test_experts_that_became_floats() -> None:
    """The library multiplies with them as they are, without scales."""
    experts = pair("Qwen3Moe").quantised.model.layers[0].mlp.experts
    for name in ("gate_up_proj", "down_proj"):
        setattr(experts, name, nn.Parameter(getattr(experts, name).to(torch.bfloat16) / 448, requires_grad=False))
    experts.config._experts_implementation = "eager"
    x, ids = torch.randn(5, HIDDEN, dtype=torch.bfloat16), torch.tensor([[0, 3]] * 5)
    weights = torch.rand(5, 2, dtype=torch.bfloat16)
    with torch.no_grad():
        want = experts(x, ids, weights)
        assert (compiled(experts)(x, ids, weights) - want).norm() <= 0.02 * want.norm()


def test_a_function_of_the_user_in_the_library_s_place(monkeypatch: pytest.MonkeyPatch) -> None:
    def mine(x: Tensor, weight: Tensor, *_: object) -> Tensor:
        return F.linear(x, weight.to(x.dtype)) * 0.25

    monkeypatch.setattr(finegrained_fp8, "fp8_linear", mine)
    linear = pair("Qwen3Moe").quantised.model.layers[0].self_attn.q_proj
    x = torch.randn(5, HIDDEN, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(compiled(linear)(x), linear(x))
    assert not any(site.fused for site in moe_fx.last_report().sites)
