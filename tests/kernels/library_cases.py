"""Layers for the kernels of libraries: storage as models have it, packed through the weight store, and the truth."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_fx.binding import Operand, WeightBinding, bind
from moe_fx.kernels.build import run
from moe_fx.kernels.registry import kernel
from moe_fx.quant import MAX_OF, UNQUANTISED, QuantSpec
from moe_fx.reference import experts_forward
from moe_fx.reference.quantise import quantise
from moe_fx.spec import CombineSpec, ExpertSpec, MoESpec
from moe_fx.weights import WeightStore

from .cases import assert_as_exact

ACTS = {"silu": (), "gelu": (), "gelu_tanh": (), "swiglu_oai": (1.702, 7.0)}
E, K, H, I = 8, 2, 64, 32  # noqa: E741


@dataclass(slots=True)
class Block:
    """operands: the model's own tensors, as ``binding`` names them."""

    x: Tensor
    ids: Tensor
    weights: Tensor
    operands: list[Tensor]
    binding: WeightBinding
    spec: MoESpec


@dataclass(frozen=True, slots=True)
class Shape:
    act: str = "silu"
    bias: bool = False
    dtype: torch.dtype = torch.bfloat16
    order: str = "gate_up"
    form: str = "stacked"
    transposed: bool = False
    tokens: int = 33
    top_k: int = K
    experts: int = E
    hidden: int = H
    inner: int = I
    weight_on: str = "output"
    quant: QuantSpec = UNQUANTISED


def make(shape: Shape, seed: int = 0) -> Block:
    """Random tensors, scaled so that both clamps of gpt-oss's activation are reached."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(size, generator=draw, dtype=torch.float64) * scale).to(shape.dtype)

    e, k, h, i = shape.experts, shape.top_k, shape.hidden, shape.inner
    matrices = {"w13": normal(e, 2 * i, h, scale=3 * h**-0.5), "w2": normal(e, h, i, scale=i**-0.5)}
    operands, tensors = [], []
    for role, matrix in matrices.items():
        if shape.quant:
            key = shape.quant.key(role)  # type: ignore[arg-type]
            assert key is not None
            held = quantise(matrix, key)
            operands += [Operand(role), Operand(f"{role}_scale")]  # type: ignore[arg-type]
            tensors += [held.codes, held.scale]  # type: ignore[list-item]
            if key.global_scale:
                operands.append(Operand(f"{role}_gscale"))  # type: ignore[arg-type]
                tensors.append(held.global_scale)  # type: ignore[arg-type]
            continue
        operands.append(Operand(role, shape.form, shape.transposed, shape.order))  # type: ignore[arg-type]
        stored = matrix.transpose(1, 2).contiguous() if shape.transposed else matrix
        flat = stored.flatten(0, 1)
        tensors += {"list": [m.clone() for m in stored], "flat": [flat], "stacked": [stored]}[shape.form]
    if shape.bias:
        operands += [Operand("w13_bias", order=shape.order), Operand("w2_bias")]  # type: ignore[arg-type]
        tensors += [normal(e, 2 * i), normal(e, h)]
    for operand, largest in (("a1", 4.0), ("a2", 2.0)):
        inputs = shape.quant.key(operand)  # type: ignore[arg-type]
        if inputs is not None and (inputs.static or inputs.global_scale):
            operands.append(Operand(f"{operand}_gscale" if inputs.global_scale else f"{operand}_scale"))  # type: ignore[arg-type]
            tensors.append(torch.tensor(largest / MAX_OF[inputs.dtype] / (448 if inputs.global_scale else 1)))
    ids = torch.rand(shape.tokens, e, generator=draw).argsort(1)[:, :k]
    expert = ExpertSpec(e, h, i, shape.act, ACTS[shape.act], True, shape.bias, shape.bias)
    spec = MoESpec(k, expert, CombineSpec(shape.weight_on), quant=shape.quant)  # type: ignore[arg-type]
    weights = torch.rand(shape.tokens, k, generator=draw)
    return Block(normal(shape.tokens, h), ids, weights, tensors, WeightBinding(tuple(operands)), spec)  # type: ignore[arg-type]


def packed_run(name: str, block: Block, store: WeightStore | None = None) -> Tensor:
    """Through the weight store, as the op does it."""
    chosen, count = kernel(name), block.spec.expert.experts
    layout = chosen.experts.layout_for(block.spec)
    held = (store or WeightStore()).get(layout, block.binding, block.operands, count, block.spec.quant)
    return run(chosen, block.x, block.ids, block.weights, held, block.spec)


def truth(block: Block) -> Tensor:
    """The reference in float64, of the numbers as they are stored."""
    plain = [t.double() if t.dtype.is_floating_point and t.dtype.itemsize > 1 else t for t in block.operands]
    held = bind(block.binding, plain, block.spec.expert.experts, block.spec.quant)
    return experts_forward(block.x.double(), block.ids, block.weights.double(), held, block.spec)


def usual(block: Block) -> Tensor:
    held = bind(block.binding, block.operands, block.spec.expert.experts, block.spec.quant)
    return experts_forward(block.x, block.ids, block.weights, held, block.spec)


def check(name: str, block: Block, store: WeightStore | None = None) -> Tensor:
    before = [t.clone() for t in (block.x, block.ids, block.weights, *block.operands)]
    y = packed_run(name, block, store)
    after = (block.x, block.ids, block.weights, *block.operands)
    bits = [[t.reshape(-1).contiguous().view(torch.uint8) for t in some] for some in (before, after)]
    assert all(map(torch.equal, *bits)), "an input was written to"
    assert_as_exact(y, usual(block), truth(block), torch.finfo(block.x.dtype).eps, f"{name} {block.spec}")
    return y
