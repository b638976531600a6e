"""Products of codes with codes, as torch has them: inputs rounded in the graph, then ``scaled_mm``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import ScalingType, scaled_mm
from transformers.integrations.compressed_tensors import CompressedTensorsFP8Linear

import moe_fx
from moe_fx.quant import FP8_TOKEN, PER_TENSOR, QuantKey

H, I, E, K = 128, 64, 4, 2  # noqa: E741
LARGEST = 448.0
CHANNEL, TENSOR = "float8_e4m3fn:1x-1:float32", "float8_e4m3fn:-1x-1:float32"


class ByRow(nn.Module):
    """Inputs [n, in] with a scale each, weights [out, in] with one for each row."""

    group: tuple[int, ...] = (-1,)

    def __init__(self, size_in: int, size_out: int) -> None:
        super().__init__()
        w = torch.randn(size_out, size_in) * size_in**-0.5
        scale = w.abs().amax(self.group, keepdim=True) / LARGEST
        self.weight = nn.Parameter((w / scale).to(torch.float8_e4m3fn), requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scale = x.float().abs().amax(self.group, keepdim=True).clamp(min=1e-12) / LARGEST
        return (x.float() / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scale

    def forward(self, x: Tensor) -> Tensor:
        codes, scale = self.codes(x)
        way = ScalingType.RowWise if self.group == (-1,) else ScalingType.TensorWise
        return scaled_mm(codes, self.weight.t(), scale, way, self.scale.t(), way, output_dtype=x.dtype)


class Private(ByRow):
    """By the name that torch had before."""

    def forward(self, x: Tensor) -> Tensor:
        codes, scale = self.codes(x)
        return torch._scaled_mm(codes, self.weight.t(), scale, self.scale.t(), out_dtype=x.dtype)


class ByTensor(ByRow):
    """One scale for all inputs, one for a matrix."""

    group = (0, 1)


class ByShifted(ByRow):
    """The scale of a row is that of the row before: no rounding that is known."""

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        codes, scale = super().codes(x)
        return codes, scale.roll(1, 0)


class ByHalf(ByRow):
    """Inputs are halved on the way: rounding is not all that happens."""

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        codes, scale = super().codes(x)
        return codes, scale / 2


class ByCoarse(ByRow):
    """Codes lose their last two bits: another rounding."""

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        codes, scale = super().codes(x)
        return (codes.view(torch.uint8) & 0xFC).view(torch.float8_e4m3fn), scale


class Library(CompressedTensorsFP8Linear):
    """transformers' module for compressed-tensors checkpoints."""

    def __init__(self, size_in: int, size_out: int) -> None:
        super().__init__(size_in, size_out)
        own = ByRow(size_in, size_out)
        self.weight, self.weight_scale = own.weight, nn.Parameter(own.scale.t().contiguous(), requires_grad=False)


class Block(nn.Module):
    """Private products, whose sizes torch asks for, run over all tokens."""

    def __init__(self, linear: Any) -> None:
        super().__init__()
        self.gate, self.all_tokens = nn.Linear(H, E, bias=False, dtype=torch.bfloat16), linear is Private
        sizes = {"gate_proj": (H, I), "up_proj": (H, I), "down_proj": (I, H)}
        self.experts = nn.ModuleList(nn.ModuleDict({n: linear(*s) for n, s in sizes.items()}) for _ in range(E))

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.gate(x).softmax(-1).topk(K, -1)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e) if not self.all_tokens else (slice(None), 0)
            rows = x[token]
            out = expert["down_proj"](F.silu(expert["gate_proj"](rows)) * expert["up_proj"](rows))
            if self.all_tokens:
                y = y + out * weights.where(ids == e, 0).sum(-1, keepdim=True)
            else:
                y.index_add_(0, token, out * weights[token, slot, None])
        return y


def exact(model: Block, x: Tensor) -> Tensor:
    """The block of the numbers that the codes stand for, in float64, routed as it routes."""
    weights, ids = model.gate(x).softmax(-1).topk(K, -1)
    y = torch.zeros_like(x, dtype=torch.float64)
    for e, expert in enumerate(model.experts):
        gate, up, down = (
            m.weight.double() * (m.weight_scale.t() if isinstance(m, Library) else m.scale).double()
            for m in (expert["gate_proj"], expert["up_proj"], expert["down_proj"])
        )
        token, slot = torch.where(ids == e)
        rows = x[token].double()
        hidden = (F.silu(rows @ gate.t()) * (rows @ up.t())) @ down.t()
        y.index_add_(0, token, hidden * weights[token, slot, None].double())
    return y


def compiled(model: nn.Module) -> Any:
    torch._dynamo.reset()
    moe_fx.reset()
    return torch.compile(model.eval(), backend="moe_fx", options={"inner_backend": "eager"})


@pytest.mark.parametrize(
    ("linear", "key"), [(ByRow, CHANNEL), (Private, CHANNEL), (ByTensor, TENSOR), (Library, CHANNEL)]
)
def test_runs_on_codes(linear: Any, key: str) -> None:
    torch.manual_seed(0)
    model = Block(linear)
    run = compiled(model)
    with torch.no_grad():
        for tokens in (40, 33, 64):
            x = torch.randn(tokens, H, dtype=torch.bfloat16)
            truth = exact(model, x)
            own, usual = ((y.double() - truth).norm() / truth.norm() for y in (run(x), model(x)))
            assert own <= usual, tokens  # inputs are not rounded on a CPU
    site = moe_fx.last_report().sites[0]
    assert site.fused, site.rejects
    assert site.spec.quant.w13 == site.spec.quant.w2 == key
    inputs = FP8_TOKEN if key == CHANNEL else QuantKey("float8_e4m3fn", PER_TENSOR, static=False)
    assert str(inputs) in site.note


@pytest.mark.parametrize("linear", [ByShifted, ByHalf, ByCoarse])
def test_other_roundings_are_left_alone(linear: Any) -> None:
    torch.manual_seed(0)
    model = Block(linear)
    x = torch.randn(40, H, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(compiled(model)(x), model(x))
    assert not any(site.fused for site in moe_fx.last_report().sites)


def test_gradients_are_left_to_torch() -> None:
    """Nothing is fused that has a backward of its own."""
    torch.manual_seed(0)
    model = Block(ByRow)
    x = torch.randn(40, H, dtype=torch.bfloat16)
    assert torch.equal(compiled(model)(x).detach(), model(x).detach())  # the gate trains
    assert not any(site.fused for site in moe_fx.last_report().sites)
