"""Casts inside a block that can lose what float64 keeps: VERIFY's mathematics does not see them, so they are refused.

before: ``ids.to(torch.int8)`` with 300 experts, ``position.to(torch.uint8)``, ``h.half().float()`` in float32 experts
after:  a Reject; ids whose range fits, masks and one-hot codes are left alone
"""

from __future__ import annotations

import math

import torch
from torch.fx import Node

from moe_fx.passes.dataflow import fake, is_integer, target_name, tensor
from moe_fx.passes.id_range import LIMITS, IdRange
from moe_fx.passes.regions import Region
from moe_fx.reasons import Reject

_KEEPS = {"reshape", "view", "flatten", "unflatten", "to", "long", "int", "type", "contiguous", "clone", "detach"}
_KEEPS |= {"unsqueeze", "squeeze", "expand", "transpose", "t", "permute", "getitem", "__getitem__", "select", "gather"}
_KEEPS |= {"index_select", "sort", "repeat_interleave", "unbind", "split", "chunk"}
_DEEPEST = 40


def loses(region: Region, bounds: IdRange) -> Reject | None:
    """The first cast that can lose something; bounds: of the ids."""
    kept = {fake(n).dtype for n in (region.x, *region.weight_nodes, *region.params)}
    kept |= {fake(use).dtype for bank in (*region.ups, region.down) for use in bank.uses}
    if region.weights is not None:
        kept.add(fake(region.weights).dtype)
    least = min(fake(n).dtype.itemsize for n in (region.x, region.down.params[0]))
    for node in region.nodes:
        t = tensor(node)
        if t is None:
            continue
        if t.is_floating_point() and t.dtype.itemsize < least and t.dtype not in kept:
            text = f"the block passes through {t.dtype}, which is narrower than what it reads"
            return Reject("match.weights", text, node.name)
        limit = LIMITS.get(t.dtype, math.inf)
        sources = [(n, s) for n in node.all_input_nodes if (s := tensor(n)) is not None]
        if not all(is_integer(s) for _, s in sources):
            continue  # picks by indices
        for source, before in sources:
            if before.dtype in (t.dtype, torch.bool):
                continue
            if (bound := _bound(source, region, bounds, _DEEPEST)) > limit:
                text = f"{source.name} may exceed {limit}, and {t.dtype} would not hold it ({bound})"
                return Reject("match.weights", text, node.name)
    return None


def _bound(node: Node, region: Region, bounds: IdRange, depth: int) -> float:
    """The largest absolute value of an integer tensor of the region; inf where nothing is known."""
    if node is region.ids:
        return max(abs(bounds[0]), abs(bounds[1]))
    t, name = tensor(node), target_name(node)
    if (t is not None and t.dtype == torch.bool) or name == "one_hot":
        return 1
    inputs = [n for n in node.all_input_nodes if tensor(n) is not None or target_name(n) == "sort"]
    if depth == 0 or not inputs:
        return math.inf
    if name in _KEEPS:
        return _bound(inputs[0], region, bounds, depth - 1)
    if name in ("sum", "cumsum", "bincount", "histc"):
        source = tensor(inputs[0])
        size = math.inf if source is None else math.prod(s if isinstance(s, int) else math.inf for s in source.shape)
        return size * _bound(inputs[0], region, bounds, depth - 1) if name in ("sum", "cumsum") else size
    return math.inf
