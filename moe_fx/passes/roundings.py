"""Activations that a graph rounds to codes: from codes and their scales back to the tensor that was rounded, and how.

before: a = x.float().abs().amax(-1, keepdim=True) / 448;  q = (x.float() / a).clamp(-448, 448).to(float8_e4m3fn)
found:  q and a stand for x.float() rounded by "float8_e4m3fn:1x-1:float32:dynamic"

The calls in between are run on a sample, and must give for each element the code that is nearest under that key.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.fx import Node

from moe_fx.passes.dataflow import fake, target_name, tensor, value, written
from moe_fx.passes.isolation import isolated
from moe_fx.passes.readings import outer, run, sample, text
from moe_fx.quant import GroupShape, QuantKey
from moe_fx.reference.quantise import round_to

_MOST_CALLS, _DRAWS = 24, 8
_CODES = {torch.float8_e4m3fn: "float8_e4m3fn", torch.int8: "int8"}


class Rounding(NamedTuple):
    """x: what was rounded.  key: text of the ``QuantKey``.  calls: what stands between, in order."""

    x: Node
    key: str
    calls: list[Node]


_KNOWN: dict[str, bool] = {}


def rounding_of(codes: Node, scale: Node, position: dict[Node, int]) -> Rounding | None:
    """How codes [n, in] with scales [n, groups], or one, came about; None where they are no known rounding.  Calls that
    read the same are run once.  position: of the nodes in the graph."""
    found = _between(codes, scale, position)
    if found is None or fake(codes).dtype not in _CODES:
        return None
    x, calls = found
    width, across = fake(codes).shape[-1], fake(scale).shape
    group = GroupShape(-1, -1)
    if fake(scale).ndim == 2 and not (isinstance(across[0], int) and across[0] == 1):
        group = GroupShape(1, -1 if across[1] == 1 else -(-int(width) // int(across[1])))
    key = QuantKey(_CODES[fake(codes).dtype], group, static=False)  # type: ignore[arg-type]
    read = text(calls, str(key), f"codes {calls.index(codes)} scale {calls.index(scale)}")
    if read not in _KNOWN:
        with isolated():
            try:
                _KNOWN[read] = _rounds(x, calls, codes, scale, key)
            except Exception:  # noqa: BLE001  what cannot be run on a sample is not understood
                _KNOWN[read] = False
    return Rounding(x, str(key), calls) if _KNOWN[read] else None


def _between(codes: Node, scale: Node, position: dict[Node, int]) -> tuple[Node, list[Node]] | None:
    """The nearest float tensor of which both are made, and the calls from it to them."""
    front, calls = {codes, scale}, set[Node]()
    while len(front) > 1 or codes in front or scale in front:
        node = max(front, key=position.__getitem__)
        if not node.op.startswith("call") or len(calls) == _MOST_CALLS or written(node):
            return None
        front.remove(node)
        calls.add(node)
        front.update(
            n for n in node.all_input_nodes if n not in calls and (n.op != "placeholder" or tensor(n) is not None)
        )
    (x,) = front
    known = value(x)
    if not isinstance(known, Tensor) or not known.is_floating_point() or known.dtype.itemsize < 2:
        return None
    if known.ndim != 2 or known.shape[-1] != fake(codes).shape[-1]:
        return None
    while target_name(x) in ("to", "float", "double") and _widens(x):
        calls.add(x)
        (x,) = x.all_input_nodes
    return x, sorted(calls, key=position.__getitem__)


def _widens(cast: Node) -> bool:
    source = tensor(cast.all_input_nodes[0]) if len(cast.all_input_nodes) == 1 else None
    return source is not None and source.is_floating_point() and 2 <= source.dtype.itemsize <= fake(cast).dtype.itemsize


def _rounds(x: Node, calls: list[Node], codes: Node, scale: Node, key: QuantKey) -> bool:
    env = sample(outer(calls), x)
    generator = torch.Generator().manual_seed(4)
    size, most = env[x].shape, math.frexp(torch.finfo(env[x].dtype).max)[1]
    for _ in range(_DRAWS):
        rows = torch.randn(size, generator=generator)
        rows *= torch.exp2(torch.randint(-9, min(most - 4, 40), (size[0], 1), generator=generator))
        if size[0] > 1:
            rows[0] = 0
        env[x] = given = rows.to(env[x])
        done = run(calls, dict(env))
        spread = done[scale].double()
        if spread.ndim == 2 and spread.shape[1] > 1:
            spread = spread.repeat_interleave(key.group.col, 1)[:, : given.shape[1]]
        wide = given.double()
        found, nearest = done[codes].double() * spread, round_to(wide, key)
        # in the middle between two codes both are right
        if not bool(((found - wide).abs() <= (nearest - wide).abs() + 1e-5 * wide.abs()).all()):
            return False
    return True
