"""Experts whose Linears a library has quantised, with the real library; `make peers` installs it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import moe_fx

from .helpers import watched

H, I, E, K = 128, 64, 4, 2  # noqa: E741


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(H, I, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(I, H, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(H, E, bias=False)
        self.experts = nn.ModuleList(Mlp() for _ in range(E))

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.gate(x).softmax(-1).topk(K, -1)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            y.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
        return y


def _torchao(config: str, **arguments: Any) -> nn.Module:
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed: `make peers` runs this")
    torch.manual_seed(0)
    model = Block().to(torch.bfloat16).eval()
    torchao.quantize_(model.experts, getattr(torchao, config)(**arguments))
    return model


def _run(model: nn.Module, inner: str, lengths: tuple[int, ...] = (9, 1, 20)) -> Any:
    torch._dynamo.reset()
    moe_fx.reset()
    run = torch.compile(model, backend="moe_fx", options={"inner_backend": inner})
    with torch.no_grad():
        for tokens in lengths:
            x = torch.randn(tokens, H, dtype=torch.bfloat16)
            y, usual = run(x).double(), model(x).double()
            assert (y - usual).norm() <= 0.02 * usual.norm(), tokens
    return moe_fx.last_report().sites[0]


@pytest.mark.parametrize("inner", ["eager", "inductor"])
@pytest.mark.parametrize(
    ("config", "key"),
    [
        ("Int8WeightOnlyConfig", "int8:1x-1:float32"),
        ("Float8WeightOnlyConfig", "float8_e4m3fn:1x-1:float32"),
        ("IntxWeightOnlyConfig", "int8:1x-1:bfloat16:zero"),
    ],
)
def test_torchao_weight_only(config: str, key: str, inner: str) -> None:
    site = _run(_torchao(config), inner)
    assert site.fused, site.rejects
    assert site.spec.quant.w13 == site.spec.quant.w2 == key


@pytest.mark.parametrize("config", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig"])
def test_torchao_runs_on_codes(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No weight is dequantised beside the codes that the op reads."""
    model = _torchao(config)
    _run(model, "eager", (9,))  # makes tables
    seen = watched(monkeypatch)
    _run(model, "eager", (9,))
    assert seen.most == H * I


def _replaced(make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    """The block with its experts' Linears replaced."""
    torch.manual_seed(0)
    model = Block().to(torch.bfloat16).eval()
    for expert in model.experts:
        for name, linear in list(expert.named_children()):
            setattr(expert, name, make(linear))
    return model.eval()


def _eight_bits(linear: nn.Linear) -> nn.Module:
    library = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: `make peers` runs this")
    made = library.nn.Linear8bitLt(linear.in_features, linear.out_features, bias=False, has_fp16_weights=False)
    made.weight = library.nn.Int8Params(linear.weight.data.clone(), requires_grad=False)
    return made.to("cpu")


def _four_bits(linear: nn.Linear, kind: str, nested: bool) -> nn.Module:
    library = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: `make peers` runs this")
    sizes = linear.in_features, linear.out_features
    made = library.nn.Linear4bit(*sizes, bias=False, compute_dtype=torch.bfloat16, quant_type=kind)
    made.support_avx512bf16_for_cpu = False  # a packing of its own, for CPUs that have those instructions
    made.weight = library.nn.Params4bit(
        linear.weight.data.clone(), requires_grad=False, quant_type=kind, compress_statistics=nested
    )
    return made.to("cpu")


@pytest.mark.parametrize("inner", ["eager", "inductor"])
@pytest.mark.parametrize("form", ["int8", "int8, outliers", "int8, training", "nf4", "fp4", "nf4, nested"])
def test_bitsandbytes(form: str, inner: str) -> None:
    kind, _, more = form.partition(", ")
    make = _eight_bits if kind == "int8" else partial(_four_bits, kind=kind, nested=more == "nested")
    model = _replaced(make)
    for module in model.modules():
        if more == "outliers" and hasattr(module, "state"):
            module.state.threshold = 6.0
    model.experts.train(more == "training")  # without rounding its inputs
    with torch.no_grad():
        model(torch.randn(64, H, dtype=torch.bfloat16))  # every expert has made its state
    site = _run(model, inner)
    assert site.fused, site.rejects
    assert (
        site.spec.quant.w13
        == {
            "int8": "int8:1x-1:float32",
            "nf4": "nf4:1x64:float32",
            "fp4": "fp4_bnb:1x64:float32",
        }[kind]
    )


def test_bitsandbytes_runs_on_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest floating tensor that any op makes is one expert's matrix; the scales of nested ones are small."""
    model = _replaced(partial(_four_bits, kind="nf4", nested=True))
    seen = watched(monkeypatch)
    _run(model, "eager", (9,))
    assert seen.most == H * I  # gate and up are apart


@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_eight_bits_that_no_block_takes_are_the_library_s(threshold: float) -> None:
    """A Linear by itself gives what it gave, to the bit, rounded inputs and outliers included."""
    torch.manual_seed(0)
    model = nn.Sequential(_eight_bits(nn.Linear(H, I, bias=False, dtype=torch.bfloat16)), nn.ReLU()).eval()
    model[0].state.threshold = threshold
    x = torch.randn(9, H, dtype=torch.bfloat16)
    with torch.no_grad():
        usual = model(x.clone())
        torch._dynamo.reset()
        run = torch.compile(model, backend="moe_fx", options={"inner_backend": "eager"})
        assert torch.equal(run(x.clone()), usual)


def test_a_gradient_through_bitsandbytes_is_left_to_the_library() -> None:
    model = _replaced(partial(_four_bits, kind="nf4", nested=False))
    torch._dynamo.reset()
    moe_fx.reset()
    x = torch.randn(9, H, dtype=torch.bfloat16, requires_grad=True)
    torch.compile(model, backend="moe_fx", options={"inner_backend": "eager"})(x).float().sum().backward()
    own, x.grad = x.grad, None
    model(x).float().sum().backward()
    assert (own - x.grad).norm() <= 0.02 * x.grad.norm()
    assert not any(site.fused for site in moe_fx.last_report().sites)


def test_torchao_that_quantises_activations_is_no_matrix() -> None:
    """Its products are not those with one matrix, whatever Dynamo makes of it."""
    from moe_fx.passes import wrapped

    model = _torchao("Int8DynamicActivationInt8WeightConfig")
    weight = model.experts[0].up_proj.weight
    names, context = weight.__tensor_flatten__()
    assert wrapped._inside(weight, tuple(names), context, [getattr(weight, n) for n in names]) is None
    assert not _run(model, "eager", (64,)).fused
