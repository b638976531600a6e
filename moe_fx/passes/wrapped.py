"""Expert weights that are tensor subclasses around codes (torchao and the like).

A subclass decides what its ops do, so nothing is taken from its name: an instance is made around random insides.  The
product of the identity with it says which matrix it stands for; that products with other rows are products with this
matrix, and that it is what a scheme that fits the insides says, must show in the values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from moe_fx.passes.codes import Recipe, as_quantised, candidates, draw
from moe_fx.passes.dataflow import fake
from moe_fx.passes.isolation import isolated
from moe_fx.reference.quantise import dequantise


@dataclass(frozen=True, slots=True)
class Inside:
    """recipe: the scheme of the parts ``names``, where it is known.  plain: ``dequantize()`` gives the matrix."""

    names: tuple[str, ...]
    recipe: Recipe | None
    plain: bool


_KNOWN: dict[tuple[type, str], Inside | None] = {}  # by the class itself: two may have one name


def is_wrapped(node: Node) -> bool:
    return is_traceable_wrapper_subclass(fake(node))


def inside_of(node: Node) -> Inside | None:
    """What a wrapped matrix holds; None where products with it are not those with one matrix, and for a stack of them,
    whose experts could each go another way."""
    whole: Any = fake(node)
    names, context = whole.__tensor_flatten__()
    parts = [getattr(whole, name) for name in names]
    text = f"{[(tuple(p.shape), p.dtype) for p in parts]} {context} {tuple(whole.shape)} {whole.dtype}"
    key = type(whole), text
    if key not in _KNOWN:
        with isolated(), torch._C._EnableTorchFunction():  # Dynamo calls a backend without it
            _KNOWN[key] = _inside(whole, tuple(names), context, parts)
    return _KNOWN[key]


def _inside(whole: Any, names: tuple[str, ...], context: Any, parts: list[Any]) -> Inside | None:
    if not all(isinstance(p, Tensor) and not is_traceable_wrapper_subclass(p) for p in parts):
        return None
    if whole.ndim != 2:
        return None
    a, b = (int(s) for s in whole.shape)
    stored = [(tuple(int(s) for s in p.shape), p.dtype) for p in parts]
    values = draw(stored)
    try:
        insides = dict(zip(names, values, strict=True))
        made = type(whole).__tensor_unflatten__(insides, context, whole.shape, whole.stride())
        matrix = F.linear(torch.eye(b, dtype=whole.dtype), made).t()
        x = torch.randn(64, b, generator=torch.Generator().manual_seed(1))
        x[torch.arange(64), torch.arange(64) % b] *= 30  # rows that are rounded on the way lose the rest
        x = x.to(whole.dtype)
        exact = x.double() @ matrix.double().t()
        error, usual = (F.linear(x, w).double() - exact for w in (made, matrix))
        dequantised = made.dequantize()
    except Exception:  # noqa: BLE001  a subclass may refuse anything
        return None
    eps = torch.finfo(whole.dtype).eps
    if not error.norm() <= 3 * usual.norm() + eps / 4 * exact.norm():
        return None

    def close(found: Tensor, expected: Tensor) -> bool:
        """Codes, scales and their product may each be rounded to the subclass's own dtype."""
        return bool(((found.double() - expected).abs() <= 2 * eps * expected.abs()).all())

    plain = isinstance(dequantised, Tensor) and close(dequantised, matrix.double())
    for recipe in candidates(stored, a, b):
        if close(matrix, dequantise(as_quantised(recipe, values, (), a, b), torch.float64)):
            return Inside(names, recipe, plain)
    return Inside(names, None, plain)
