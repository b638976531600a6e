"""Blocks over quantised weights run on their codes: the same values, one expert dequantised at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moe_fx

from .helpers import Largest, watched
from .quantised import BLOCKS, FP4_BNB, NF4, Block, E, H, ListBlock, blocks, by_book, fp8, groups, nf4


def compiled(model: nn.Module, **options: Any) -> Any:
    torch._dynamo.reset()
    moe_fx.reset()
    return torch.compile(model.eval(), backend="moe_fx", options={"inner_backend": "eager"} | options)


def only_site() -> Any:
    """The one that all graphs have; without a token there is nothing to fuse."""
    sites = [s for s in moe_fx.last_report().sites if s.graph < 3]
    assert len({(s.fqn, str(s.spec)) for s in sites}) == 1, sites
    return sites[0]


@pytest.mark.parametrize("name", BLOCKS)
def test_runs_on_codes(name: str) -> None:
    torch.manual_seed(0)
    model = BLOCKS[name]()
    dtype = model.gate.weight.dtype
    run = compiled(model)
    with torch.no_grad():
        for tokens in (7, 1, 23, 0):
            x = torch.randn(tokens, H, dtype=dtype)
            y, usual = run(x), model(x)
            exact = _exact(model, x)
            bound = 2 * (usual.double() - exact).norm() + 4 * torch.finfo(dtype).eps * exact.norm()
            assert (y.double() - exact).norm() <= bound, tokens
    site = only_site()
    assert site.fused, site.rejects
    kind = name.split(",")[0].replace("modules", name.rpartition(" ")[2])
    assert {"fp8": "float8_e4m3fn", "blocks": "float8_e4m3fn", "mxfp4": "float4_e2m1"}.get(
        kind, kind
    ) in site.spec.quant.w13
    assert ("zero" in site.spec.quant.w13) == ("zero points" in name or name == "int4, bfloat16")


def _exact(model: nn.Module, x: Tensor) -> Tensor:
    """The same in float64, routed as the model routes."""
    wide = _in_float64(model)
    weights, ids = model.gate(x).softmax(-1).topk(2, -1)
    y = torch.zeros_like(x, dtype=torch.float64)
    for e in range(E):
        token, slot = torch.where(ids == e)
        gate, up, down = wide(e)
        rows = x[token].double()
        out = (torch.nn.functional.silu(rows @ gate.t()) * (rows @ up.t())) @ down.t()
        y.index_add_(0, token, out * weights[token, slot, None].double())
    return y


def _in_float64(model: nn.Module) -> Any:
    if isinstance(model, Block):

        def stacked(e: int) -> tuple[Tensor, ...]:
            up = model.dequantise(*model.up.parts(e), torch.float64)
            return (*up.chunk(2), model.dequantise(*model.down.parts(e), torch.float64))

        return stacked

    def apart(e: int) -> tuple[Tensor, ...]:
        expert = model.experts[e]  # type: ignore[index]
        layers = (expert.gate_proj, expert.up_proj, expert.down_proj)
        return tuple(m.dequantise(m.weight_packed, m.weight_scale, None, torch.float64) for m in layers)

    return apart


class Flattened(nn.Module):
    """One Linear of 128 × 128 as bitsandbytes stores it: all is flat, blocks are of 64 weights."""

    def __init__(self, numbers: tuple[float, ...], seed: int) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.numbers = numbers
        self.register_buffer("codes", torch.randint(0, 256, (128 * 64, 1), generator=draw, dtype=torch.uint8))
        self.register_buffer("absmax", torch.rand(128 * 2, generator=draw) / 4 + 0.1)

    def forward(self, x: Tensor) -> Tensor:
        table = torch.tensor(self.numbers)
        values = table[torch.cat([self.codes >> 4, self.codes & 15], 1).flatten().long()]
        return x @ (values.view(-1, 64) * self.absmax[:, None]).view(128, 128).t()


@pytest.mark.parametrize("numbers, name", [(NF4, "nf4"), (FP4_BNB, "fp4_bnb")], ids=["nf4", "fp4_bnb"])
def test_flat_blocks_of_a_book(numbers: tuple[float, ...], name: str) -> None:
    model = ListBlock(nf4, "nf4", (1, 16))
    model.gate = nn.Linear(128, E, bias=False)
    for e, expert in enumerate(model.experts):
        for n, role in enumerate(("gate_proj", "up_proj", "down_proj")):
            setattr(expert, role, Flattened(numbers, 3 * e + n))
    run = compiled(model)
    with torch.no_grad():
        for tokens in (7, 1):
            x = torch.randn(tokens, 128)
            torch.testing.assert_close(run(x), model(x), rtol=1e-5, atol=1e-5)
    quant = only_site().spec.quant
    assert quant.w13 == quant.w2 == f"{name}:1x64:float32"


@pytest.mark.parametrize("name", [n for n in BLOCKS if "whole" in n or "modules" in n])
def test_the_bank_is_never_dequantised_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is anything as large made in the graph: what computed it is gone."""
    seen = watched(monkeypatch)
    model = BLOCKS[name]()
    x = torch.randn(3, H, dtype=model.gate.weight.dtype)
    with torch.no_grad():
        compiled(model)(x)
        with Largest() as usual:
            model(x)
    one = 64 * 64  # the larger matrix of one expert
    assert 0 < seen.most <= one
    assert "modules" in name or usual.most == E * one


@pytest.mark.parametrize("name", ["int4, groups", "fp8, blocks, whole bank"])
def test_under_inductor(name: str) -> None:
    model = BLOCKS[name]()
    run = compiled(model, inner_backend="inductor")
    with torch.no_grad():
        for tokens in (5, 1, 9):
            x = torch.randn(tokens, H)
            torch.testing.assert_close(run(x), model(x), rtol=1e-5, atol=1e-5)
    assert only_site().fused


def test_codes_may_change() -> None:
    """The op reads the model's own buffers."""
    model = BLOCKS["int8, groups"]()
    run = compiled(model)
    x = torch.randn(5, H)
    with torch.no_grad():
        before = run(x)
        model.down.scale.mul_(2)
        model.up.codes.neg_()
        after = run(x)
        torch.testing.assert_close(after, model(x), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(before, after)


class Clamped(Block):
    """Not a dequantisation that anybody knows: stays in the graph, and the block is fused all the same."""

    def weights(self, bank: Any, dtype: torch.dtype) -> list[Tensor]:
        return [m.clamp(-0.05, 0.05) for m in super().weights(bank, dtype)]


class OneExpertDiffers(Block):
    def weights(self, bank: Any, dtype: torch.dtype) -> list[Tensor]:
        first, *rest = super().weights(bank, dtype)
        return [first * 2, *rest]


class NeighboursScale(Block):
    def weights(self, bank: Any, dtype: torch.dtype) -> list[Tensor]:
        return [self.dequantise(bank.codes[e], bank.scale[(e + 1) % E], None, dtype) for e in range(E)]


class ScaleWritten(Block):
    """The scale changes between the dequantisation and the products."""

    def weights(self, bank: Any, dtype: torch.dtype) -> list[Tensor]:
        found = super().weights(bank, dtype)
        bank.scale.mul_(1.5)
        return found


class ScaleClamped(Block):
    def weights(self, bank: Any, dtype: torch.dtype) -> list[Tensor]:
        return [self.dequantise(bank.codes[e], bank.scale[e].clamp(min=0.0015), None, dtype) for e in range(E)]


class Adapted(Block):
    """Low-rank adapters merged into each matrix."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.a = nn.Parameter(torch.randn(E, 2, H) * 0.1)

    def weights(self, bank: Any, dtype: torch.dtype) -> list[Tensor]:
        found = super().weights(bank, dtype)
        return found if bank is self.down else [m + m[:, :2] @ a for m, a in zip(found, self.a, strict=True)]


@pytest.mark.parametrize("kind", [Clamped, OneExpertDiffers, NeighboursScale, ScaleWritten, ScaleClamped, Adapted])
def test_near_misses_give_the_right_result(kind: type[Block]) -> None:
    model, twin = kind(fp8, "int8", (1, -1)), kind(fp8, "int8", (1, -1))
    twin.load_state_dict(model.state_dict())
    run = compiled(model)
    with torch.no_grad():
        for tokens in (6, 11):
            x = torch.randn(tokens, H)
            torch.testing.assert_close(run(x), twin(x), rtol=1e-5, atol=1e-5)
    site = only_site()
    assert site.spec is None or not site.spec.quant


def _another_book(codes: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype) -> Tensor:
    return by_book((*NF4[:5], -0.184773, *NF4[6:]), codes, scale, dtype)


def _first_lowest(codes: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype) -> Tensor:
    return nf4(codes >> 4 | (codes & 15) << 4, scale, zero, dtype)


@pytest.mark.parametrize("dequantise", [_another_book, _first_lowest])
def test_what_is_almost_nf4(dequantise: Any) -> None:
    model = Block(dequantise, "nf4", (1, 16))
    run = compiled(model)
    x = torch.randn(9, H)
    with torch.no_grad():
        torch.testing.assert_close(run(x), model(x), rtol=1e-5, atol=1e-5)
    assert only_site().fused
    assert not only_site().spec.quant


def _from_the_fourth(codes: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype) -> Tensor:
    w = fp8(codes, scale, zero, dtype)
    return torch.cat([w[:3], 2 * w[3:]])


def _the_last_two(codes: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype) -> Tensor:
    w = fp8(codes, scale, zero, dtype)
    return torch.cat([w[:-2], 2 * w[-2:]])


def _by_place(codes: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype) -> Tensor:
    return fp8(codes, scale, zero, dtype) * torch.where(torch.arange(E) > 3.5, 2.0, 1.0)[:, None, None]


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("dequantise", [_from_the_fourth, _the_last_two, _by_place])
def test_experts_of_a_bank_that_differ(dequantise: Any, large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever of the bank is computed as a sample: a large one is not computed whole."""
    monkeypatch.setattr("moe_fx.passes.recipes._MOST", (E if not large else 2) * 64 * 64)
    monkeypatch.setattr("moe_fx.passes.recipes._PROVED", {})
    model = Block(dequantise, "int8", (1, -1), how="whole")
    run = compiled(model)
    x = torch.randn(23, H)
    with torch.no_grad():
        torch.testing.assert_close(run(x), model(x), rtol=1e-5, atol=1e-5)
    assert not only_site().spec.quant


def test_a_large_bank_is_shown_by_two_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_fx.passes.recipes._MOST", 2 * 64 * 64)
    monkeypatch.setattr("moe_fx.passes.recipes._PROVED", {})
    model = BLOCKS["fp8, a scale a channel, whole bank"]()
    run = compiled(model)
    x = torch.randn(23, H)
    with torch.no_grad():
        torch.testing.assert_close(run(x), model(x), rtol=1e-5, atol=1e-5)
    assert only_site().spec.quant


def test_gradients_reach_scales() -> None:
    """A scale that learns: its block is fused over the computed matrices, and autograd goes on from there."""
    model, twin = (Block(groups, "int8", (1, 16)) for _ in range(2))
    for each in (model, twin):
        each.up.scale.requires_grad_()
    twin.load_state_dict(model.state_dict())
    run = compiled(model)
    x = torch.randn(9, H, generator=torch.Generator().manual_seed(2))
    run(x).square().sum().backward()
    twin(x).square().sum().backward()
    for own, usual in ((model.up.scale, twin.up.scale), (model.gate.weight, twin.gate.weight)):
        assert (own.grad - usual.grad).norm() <= 1e-5 * usual.grad.norm()  # single elements are sums that cancel


def test_a_kernel_that_reads_no_codes_gets_matrices() -> None:
    model = Block(blocks, "fp8", (16, 16), how="whole", dtype=torch.bfloat16)
    run = compiled(model, kernel="torch_grouped")
    x = torch.randn(9, H, dtype=torch.bfloat16)
    with torch.no_grad():
        torch.testing.assert_close(run(x), model(x), rtol=3e-2, atol=3e-2)
    site = only_site()
    assert site.fused
    assert not site.spec.quant
    assert site.plan.kernel_for(9) == "torch_grouped"
