"""What adapters to libraries share: registration, loading, safe routing, products of sorted rows.

A library is loaded at the first call of its kernel, never before; whether it is there is ``hardware``'s to know.
Libraries read and write past their buffers where an id is no expert's, so no such id reaches them.
The arguments of a library's function are made by one pure function, which is tested without the library.
"""

from __future__ import annotations

import importlib
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

import moe_fx.kernels.layouts  # noqa: F401  registers them
from moe_fx.binding import Experts, Matrices, Quantised
from moe_fx.hardware import library_file
from moe_fx.kernels.experts.rows import ByExpert, SortedRows, activate, by_expert, empty_result, finish, inside
from moe_fx.kernels.experts.torch_experts import Scratch, TorchExperts
from moe_fx.kernels.layouts.registry import LIBRARY_LAYOUTS
from moe_fx.kernels.libraries import capabilities, platforms  # noqa: F401  the rows
from moe_fx.kernels.libraries.rows import library
from moe_fx.kernels.modular_kernel.experts import Up
from moe_fx.kernels.registry import Class, experts_kernel
from moe_fx.quant import (
    FP8_BLOCK,
    FP8_CHANNEL,
    FP8_TENSOR,
    INT8_CHANNEL,
    INT8_TENSOR,
    MXFP4,
    MXFP8,
    NVFP4,
    QuantKey,
)
from moe_fx.reasons import MoEFxRuntimeError, MoEFxUnsupportedError
from moe_fx.reference.experts import dtype_of
from moe_fx.reference.quantise import quantise
from moe_fx.spec import ExpertSpec, MoESpec

SCHEMES: dict[QuantKey, str] = {  # key of the weights → the name of its rows in ``layouts.packed``
    FP8_TENSOR: "fp8_tensor",
    FP8_CHANNEL: "fp8_channel",
    FP8_BLOCK: "fp8_block",
    INT8_TENSOR: "int8_tensor",
    INT8_CHANNEL: "int8_channel",
    MXFP4: "mxfp4",
    MXFP8: "mxfp8",
    NVFP4: "nvfp4",
}


def adapter(name: str, rank: int, **narrower: Any) -> Callable[[Class], Class]:
    """Registers the decorated class as the kernel of that name, with capability and cost from ``capabilities``.

    narrower: fields of the capability of which the adapter serves less than the library.
    """
    row = library(name)
    return experts_kernel(name, capability=replace(row.capability, **narrower), cost=row.cost, rank=rank)


def attribute(module: str, name: str) -> Any:
    """What the library calls ``name``; MoEFxUnsupportedError where there is none."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise MoEFxUnsupportedError(
            f"{module}.{name} cannot be loaded ({error}): the package is missing, of another version, or another "
            "package of that name; choose another kernel"
        ) from error


def package(name: str) -> str:
    """The module of that library: its own, or the copy inside vllm."""
    path = library_file(name)
    return f"vllm.third_party.{name}" if path is not None and "third_party" in path.parts else name


def scheme_of(spec: MoESpec) -> str:
    """The name that the weights' scheme has in ``layouts.packed``; "" where it has none."""
    key = spec.quant.key("w13")
    if key is None:
        return "bf16"
    if key.dtype in ("int4", "int8") and key.group.row == 1 and not key.zero_points and key not in SCHEMES:
        size = "channel" if key.group.col == -1 else str(key.group.col)
        return f"{key.dtype}_{size}"
    return SCHEMES.get(key, "")


def packed(library_: str, scheme: str) -> str:
    """The layout of that library for a scheme; of another scheme where it has none: the ladder says that it has not."""
    name = f"{library_}.{scheme}"
    return name if name in LIBRARY_LAYOUTS else next(n for n in LIBRARY_LAYOUTS if n.startswith(f"{library_}."))


class LibraryExperts(TorchExperts):
    """Experts that a library computes.  Sizes come from the spec: packed weights have others."""

    def moe_problem_size(self, a1: Tensor, w1: Up, w2: Matrices, topk_ids: Tensor) -> tuple[int, int, int, int, int]:
        e = self.spec.expert
        rows = a1.shape[1] if a1.dim() == 3 else a1.shape[0]
        return e.experts, rows, e.intermediate * (2 if e.gated else 1), e.hidden, topk_ids.shape[1]


@dataclass(frozen=True, slots=True)
class Routing:
    """ids int32 [T, k], every one an expert's; weights float32 [T, k], 0 where the id was none; both contiguous.

    nobody: bool [T, 1], tokens without an expert; None where every id was one.  An id that was none became one that its
    token has, whose result is added 0 times; tokens in ``nobody`` have expert 0, and their result is to be cleared.
    """

    ids: Tensor
    weights: Tensor
    nobody: Tensor | None


def routing(ids: Tensor, weights: Tensor, experts: int) -> Routing:
    """ids [T, k], any integers, and weights [T, k] → what a library may be given.  Waits for no device."""
    valid, nobody = inside(ids, experts), None
    if ids.device.type != "cpu" or not bool(valid.all()):
        ids = ids.where(valid, ids.where(valid, 0).amax(1, keepdim=True))
        weights, nobody = weights.masked_fill(~valid, 0), ~valid.any(1, keepdim=True)
    return Routing(ids.to(torch.int32).contiguous(), weights.to(torch.float32).contiguous(), nobody)


class RoutedExperts(LibraryExperts):
    """Experts over a list of tokens."""

    @classmethod
    def refuses(cls, spec: MoESpec) -> tuple[str, str] | None:
        if spec.combine.weight_on == "input" and spec.top_k != 1:
            return "veto.combine", f"routing weights on the input of {spec.top_k} experts a token; it takes one"
        return None

    @abstractmethod
    def call(self, x: Tensor, routed: Routing, experts: Experts, spec: MoESpec) -> Tensor:
        """x [T, H] contiguous, T > 0 → the sums over k [T, H]."""

    def compute(
        self, x: Tensor, ids: Tensor, weights: Tensor, experts: Experts, spec: MoESpec, scratch: Scratch
    ) -> Tensor:
        if not x.shape[0]:
            return empty_result(x, spec)
        dtype = experts.down.dtype if isinstance(experts.down, Tensor) else x.dtype
        if spec.combine.weight_on == "input":
            x, weights = x * weights, torch.ones_like(weights)
        routed = routing(ids, weights, spec.expert.experts)
        y = self.call(x.to(dtype).contiguous(), routed, experts, spec)
        if routed.nobody is not None:
            y = y.masked_fill(routed.nobody, 0)
        return y.to(dtype_of(spec.combine.out_dtype, x.dtype))


class GroupedExperts(RoutedExperts):
    """A library with products of sorted rows alone: between them the activation, and after them the sum, are ours."""

    @abstractmethod
    def products(self, rows: Tensor, matrices: Matrices, operand: Literal["a1", "a2"], sorted_: ByExpert) -> Tensor:
        """rows [S, in] by expert times each row's matrix [out, in] → [S, out].  operand: which inputs they are."""

    def call(self, x: Tensor, routed: Routing, experts: Experts, spec: MoESpec) -> Tensor:
        sorted_ = by_expert(routed.ids, spec.expert.experts)
        rows = x.index_select(0, sorted_.order // spec.top_k)
        up = self.products(rows, experts.up[0], "a1", sorted_)
        out = self.products(activate([up], experts, spec.expert), experts.down, "a2", sorted_)
        added = replace(spec, combine=replace(spec.combine, weight_on="output"))  # weights on the input are in x
        return finish(out, SortedRows(sorted_.order, [], 0), routed.weights, added, x.dtype)

    def rounded(self, rows: Tensor, operand: Literal["a1", "a2"]) -> tuple[Tensor, Tensor]:
        """(codes, scales) of inputs of a product, as the spec says."""
        config = self.quant_config
        given, whole = (config.a1_scale, config.a1_gscale) if operand == "a1" else (config.a2_scale, config.a2_gscale)
        return rounded_rows(rows, self.spec, operand, given, whole)


def rounded_rows(
    rows: Tensor, spec: MoESpec, operand: Literal["a1", "a2"], scale: Tensor | None = None, whole: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """rows [n, in] → (codes, scales) by the key of the operand; scale, whole: what is given of them."""
    key = spec.quant.key(operand)
    assert key is not None
    found = quantise(rows, key, global_scale=whole, scale=scale)
    assert isinstance(found.codes, Tensor)
    assert isinstance(found.scale, Tensor)
    return found.codes, found.scale


def tensors_of(matrices: Matrices, shape: tuple[int, ...] | None = None) -> tuple[Tensor, Tensor | None]:
    """(weights or codes, scales), each one tensor.

    shape: codes must have it and be contiguous; MoEFxRuntimeError otherwise, as a library would read past the end.
    """
    codes, scale = (matrices.codes, matrices.scale) if isinstance(matrices, Quantised) else (matrices, None)
    if not isinstance(codes, Tensor) or isinstance(scale, list):
        raise MoEFxRuntimeError("a library wants one tensor for the weights of all experts, got a list")
    if shape is not None and (tuple(codes.shape) != shape or not codes.is_contiguous()):
        got = f"{list(codes.shape)} with strides {codes.stride()}"
        raise MoEFxRuntimeError(f"a library wants contiguous weights {list(shape)} in its own layout, got {got}")
    return codes, None if scale is None else scale.contiguous()


def scaled(matrices: Matrices) -> tuple[Tensor, Tensor]:
    """(codes, scales) of quantised matrices."""
    codes, scale = tensors_of(matrices)
    if scale is None:
        raise MoEFxRuntimeError("a library wants codes with scales, got plain weights")
    return codes, scale


def biases_of(
    experts: Experts, shapes: tuple[tuple[int, int], tuple[int, int]], dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """The biases of both products as one tensor each; None where there are none."""
    up = experts.up_bias[0] if experts.up_bias else None
    found = []
    for bias, shape in zip((up, experts.down_bias), shapes, strict=True):
        if isinstance(bias, list) or (bias is not None and tuple(bias.shape) != shape):
            raise MoEFxRuntimeError(f"a library wants biases as one tensor {list(shape)}")
        found.append(None if bias is None else bias.to(dtype).contiguous())
    return found[0], found[1]


def swiglu_params(e: ExpertSpec) -> tuple[float, float, float] | None:
    """(alpha, beta, limit) of gate * sigmoid(alpha * gate) * (up + beta), both cut at the limit; None for SiLU."""
    match e.act:
        case "swiglu_oai":
            alpha, limit = e.act_params
            return alpha, 1.0, limit
        case "swiglu_clamp":
            return 1.0, 0.0, e.act_params[0]
        case _:
            return None
