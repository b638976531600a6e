"""Expert weights that are tensor subclasses: what is inside is read only where products show what it means."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import moe_fx

from .test_quantised_libraries import Block


class Codes(torch.Tensor):
    """int8 codes with a scale a channel; the whole class decides what a product is."""

    def __new__(cls, codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=dtype)  # type: ignore[attr-defined]

    def __init__(self, codes: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
        self.codes, self.scale = codes, scale

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({list(self.shape)})"

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["codes", "scale"], self.dtype

    @classmethod
    def __tensor_unflatten__(cls, inside: dict[str, Tensor], dtype: Any, size: Any, stride: Any) -> Any:
        return cls(inside["codes"], inside["scale"], dtype)

    def dequantize(self) -> Tensor:  # type: ignore[override]
        return self.codes.to(self.dtype) * self.scale.to(self.dtype)

    def product(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dequantize())

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.linear and isinstance(args[1], Codes):
            return args[1].product(args[0])
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return type(args[0])(args[0].codes, args[0].scale, args[0].dtype)
        raise NotImplementedError(f"{func} on {cls.__name__}")


class RoundedInputs(Codes):
    """Rounds every row of x to seven bits first."""

    def product(self, x: Tensor) -> Tensor:
        step = x.abs().amax(-1, keepdim=True) / 127
        return super().product((x / step).round() * step)


class OtherMatrix(Codes):
    """Multiplies with something else than it dequantises to."""

    def product(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dequantize().clamp(-0.05, 0.05))


class Shifted(Codes):
    """No matrix at all."""

    def product(self, x: Tensor) -> Tensor:
        return super().product(x) + 1


def model_of(kind: type[Codes], dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    model = Block().to(dtype).eval()
    for expert in model.experts:
        for layer in expert.children():
            scale = (layer.weight.detach().abs().amax(1, keepdim=True) / 127).float()
            codes = (layer.weight.detach() / scale).round().to(torch.int8)
            layer.weight = nn.Parameter(kind(codes, scale, dtype), requires_grad=False)
    return model


def run(kind: type[Codes], dtype: torch.dtype, **options: Any) -> Any:
    model = model_of(kind, dtype)
    torch._dynamo.reset()
    moe_fx.reset()
    compiled = torch.compile(model, backend="moe_fx", options={"inner_backend": "aot_eager"} | options)
    with torch.no_grad():
        for tokens in (24, 31):
            x = torch.randn(tokens, 128, dtype=dtype)
            usual = model(x).double()
            assert (compiled(x).double() - usual).norm() <= 4 * torch.finfo(dtype).eps * usual.norm()
    return moe_fx.last_report().sites[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_codes_are_read(dtype: torch.dtype) -> None:
    site = run(Codes, dtype)
    assert site.fused, site.rejects
    assert site.spec.quant.w13 == "int8:1x-1:float32"


def test_a_kernel_without_the_scheme_gets_matrices() -> None:
    site = run(Codes, torch.float32, kernel="gather_bmm", layout="stacked", memory="copy")
    assert site.fused
    assert not site.spec.quant


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [RoundedInputs, OtherMatrix, Shifted])
def test_products_decide(kind: type[Codes], dtype: torch.dtype) -> None:
    site = run(kind, dtype)
    assert not site.fused
    assert site.rejects[0].code == "match.weights"


def test_classes_of_one_name_are_two_classes() -> None:
    """As in a notebook, where a class is defined again."""

    def defined(shift: float) -> type[Codes]:
        class Again(Codes):
            def product(self, x: Tensor) -> Tensor:
                return super().product(x) + shift

        return Again

    assert run(defined(0.0), torch.float32).fused
    assert not run(defined(1.0), torch.float32).fused
