"""Values inside a block that their dtype may not hold: VERIFY's mathematics, in float64, does not see it.

before: ``ids.to(torch.int8)`` with 300 experts, ``position.to(torch.uint8)``, ``h.half().float()`` in float32 experts
after:  a Reject; ids whose range fits, masks and one-hot codes are left alone
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.fx import Node

from moe_fx.passes.dataflow import fake, is_integer, target_name, tensor
from moe_fx.passes.id_range import LIMITS, SAME_IDS, IdRange
from moe_fx.passes.regions import Region
from moe_fx.reasons import Reject

_KEEPS = SAME_IDS | {"unflatten", "select", "unbind", "split", "chunk", "float", "half", "bfloat16", "byte"}
_SUMS, _COUNTS = {"sum", "cumsum"}, {"bincount", "histc", "where", "nonzero", "argsort"}
_DEEPEST = 40


def loses(region: Region, bounds: IdRange) -> Reject | None:
    """The first value that its dtype may not hold; bounds: of the ids."""
    kept = {fake(n).dtype for n in (region.x, *region.weight_nodes, *region.params)}
    kept |= {fake(use).dtype for bank in (*region.ups, region.down) for use in bank.uses}
    if region.weights is not None:
        kept.add(fake(region.weights).dtype)
    least = min(fake(n).dtype.itemsize for n in (region.x, region.down.params[0]))
    whole = {region.ids}  # integers, and floats made of integers alone
    for node in region.nodes:
        t = tensor(node)
        if t is None:
            continue
        sources = [n for n in node.all_input_nodes if tensor(n) is not None]
        if is_integer(t) or (sources and whole.issuperset(sources)):
            whole.add(node)
            limit = LIMITS.get(t.dtype, math.inf)
            if limit < math.inf and (bound := _bound(node, region, bounds, _DEEPEST)) > limit:
                text = f"{node.name} may reach {bound}, and {t.dtype} holds whole numbers up to {limit}"
                return Reject("match.weights", text, node.name)
        elif t.is_floating_point() and t.dtype.itemsize < least and t.dtype not in kept:
            text = f"the block passes through {t.dtype}, which is narrower than what it reads"
            return Reject("match.weights", text, node.name)
    return None


def _bound(node: Node, region: Region, bounds: IdRange, depth: int) -> float:
    """The largest absolute value of a tensor of whole numbers; inf where nothing is known."""
    if node is region.ids:
        return max(abs(bounds[0]), abs(bounds[1]))
    t, name = tensor(node), target_name(node)
    if (t is not None and t.dtype == torch.bool) or name in ("one_hot", "ones", "ones_like", "new_ones"):
        return 1
    if name in ("zeros", "zeros_like", "new_zeros"):
        return 0
    inputs = [n for n in node.all_input_nodes if tensor(n) is not None or target_name(n) in ("sort", "where", "split")]
    if depth == 0 or not inputs:
        return _length(t) if name == "arange" and len(node.args) == 1 else math.inf
    values = [_bound(n, region, bounds, depth - 1) for n in inputs]
    if name in _KEEPS:
        return values[0]
    if name in _SUMS:
        return 0 if values[0] == 0 else values[0] * _length(tensor(inputs[0]))
    if name in _COUNTS:
        return _length(tensor(inputs[0]))
    numbers = [abs(float(a)) for a in node.args if isinstance(a, (int, float))]
    if name in ("mul", "imul"):
        return math.prod([*values, *numbers])
    return sum([*values, *numbers]) if name in ("add", "iadd", "sub", "isub") else math.inf


def _length(t: Tensor | None) -> float:
    """The number of elements; inf where it varies."""
    return math.prod(s if isinstance(s, int) else math.inf for s in t.shape) if t is not None else math.inf
