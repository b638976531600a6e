"""What is certain about expert ids from how they were computed: it decides which routings VERIFY has to try.

logits.topk(k)[1] → [0, E - 1], all of a row distinct; masked_fill, where, clamp and cat keep what they can.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from moe_fx.passes.dataflow import target_name, tensor

IdRange = tuple[float, float, bool]  # lowest, highest, distinct within a row
UNKNOWN_IDS: IdRange = (-math.inf, math.inf, False)
_Range = tuple[float, float, int]  # lowest, highest, how many neighbours in a row are distinct (0: unknown)
_UNKNOWN: _Range = (-math.inf, math.inf, 0)
_DEEPEST = 40
# dtypes that do not hold every index: whole numbers up to here are kept
LIMITS = {torch.int8: 127, torch.uint8: 255, torch.int16: 32767, torch.bfloat16: 256, torch.float16: 2048}
# results hold their input's values: in another shape; in another dtype too; in other places too
RESHAPES = {"reshape", "view", "flatten", "unsqueeze", "squeeze", "contiguous", "clone", "detach"}
_KEEPS_VALUES = RESHAPES | {"to", "long", "int", "type"}
SAME_IDS = _KEEPS_VALUES | {"expand", "getitem", "__getitem__", "transpose", "t", "permute", "repeat_interleave"}
SAME_IDS |= {"sort", "index_select", "gather"}


def id_range(node: Node, buffers: dict[Node, Tensor], top_k: int) -> IdRange:
    """Of the ids [T, top_k], or any reshape of them.  buffers: values of the model's integer buffers."""
    low, high, width = _range(node, buffers, _DEEPEST)
    return low, high, width == top_k


def _range(node: Node, buffers: dict[Node, Tensor], depth: int) -> _Range:
    name, args = target_name(node), node.args or tuple(node.kwargs.values())
    if depth == 0 or (not args and node not in buffers):
        return _UNKNOWN
    if node in buffers:
        held = buffers[node]
        return (float(held.min()), float(held.max()), 0) if held.numel() else _UNKNOWN
    if name in ("getitem", "__getitem__") and isinstance(args[0], Node):
        if target_name(args[0]) in ("topk", "max", "min", "sort") and args[1] == 1:
            return _selection(args[0])
        low, high, _ = _range(args[0], buffers, depth - 1)
        return low, high, 0
    if name in ("argmax", "argmin", "argsort"):
        return _selection(node)
    if name in _KEEPS_VALUES and isinstance(args[0], Node):
        known, out = _range(args[0], buffers, depth - 1), tensor(node)
        limit = math.inf if out is None else LIMITS.get(out.dtype, math.inf)
        return known if max(abs(known[0]), abs(known[1])) <= limit else _UNKNOWN
    if name == "expand" and isinstance(args[0], Node):
        return *_range(args[0], buffers, depth - 1)[:2], 0
    if name in ("clamp", "clamp_", "clip") and isinstance(args[0], Node):
        bounds = [*args[1:], None, None]
        low, high, _ = _range(args[0], buffers, depth - 1)
        floor, ceiling = node.kwargs.get("min", bounds[0]), node.kwargs.get("max", bounds[1])
        return _at(floor, low, max), _at(ceiling, high, min), 0
    if name in ("masked_fill", "where", "cat", "concat", "concatenate", "stack"):
        return _joined(node, name, args, buffers, depth)
    return _UNKNOWN


def _joined(node: Node, name: str, args: tuple[Any, ...], buffers: dict[Node, Tensor], depth: int) -> _Range:
    """Of values that come from several places."""
    operands = {"where": args[1:], "masked_fill": (args[0], args[-1])}.get(name, args[0])
    ranges = [
        _range(o, buffers, depth - 1) if isinstance(o, Node) else (float(o), float(o), 0)
        for o in operands
        if isinstance(o, (Node, int, float))
    ]
    if name == "masked_fill":
        ranges[0] = _without(ranges[0], args[0], args[1])
    if not ranges:  # where(mask): positions
        return _UNKNOWN
    return min(r[0] for r in ranges), max(r[1] for r in ranges), 0


def _selection(node: Node) -> _Range:
    """Of the indices that topk, sort, argmax … select along a dimension of their input."""
    source, name = (*node.args, *node.kwargs.values())[0], target_name(node)
    found = tensor(source) if isinstance(source, Node) else None
    given = node.args[2:] if name == "topk" else node.args[1:]
    dim = node.kwargs.get("dim", given[0] if given else None)
    if found is None or isinstance(dim, Node) or (name in ("max", "min") and dim is None):
        return _UNKNOWN  # of two tensors, or of all elements
    if dim is None and name in ("argmax", "argmin"):
        return _UNKNOWN
    dim = -1 if dim is None else dim
    if not isinstance(dim, int):
        return _UNKNOWN
    size, last = found.shape[dim], dim in (-1, found.ndim - 1)
    width: object = 1
    if name in ("topk", "sort", "argsort"):
        width = node.args[1] if name == "topk" and len(node.args) > 1 else node.kwargs.get("k", size)
    high = float(size - 1) if isinstance(size, int) else math.inf
    return 0.0, high, width if last and isinstance(width, int) else 0


def _without(found: _Range, node: object, mask: object) -> _Range:
    """The range left where ``mask`` is ``node == highest`` (or ``node >= n``) and those values are replaced."""
    if not isinstance(mask, Node) or not mask.args or mask.args[0] is not node:
        return found
    low, high, width = found
    bound = mask.args[1]
    name = target_name(mask).strip("_")
    if isinstance(bound, int) and ((name == "ge" and bound <= high) or (name == "eq" and bound == high)):
        return low, float(bound - 1), width
    return found


def _at(bound: object, current: float, pick: Any) -> float:
    return pick(current, float(bound)) if isinstance(bound, (int, float)) else current
