"""One key for blocks that mean the same: equal regions of different layers are matched and verified once."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from moe_fx.passes.dataflow import identity, value
from moe_fx.passes.regions import Region


def fingerprint(region: Region, *context: object) -> str:
    """Hash of targets, constants, wiring, and the shapes, strides, dtypes, devices and aliases of the inputs.

    context: whatever else the verdict depends on (id bounds, options, training).  Symbols are renamed in order of
    appearance.
    """
    names: dict[Node, str] = {}
    symbols: dict[str, str] = {}
    lines = [repr(context), f"{torch.is_autocast_enabled('cpu')} {torch.get_autocast_dtype('cpu')}"]
    lines.append(f"{torch.is_autocast_enabled('cuda')} {torch.get_autocast_dtype('cuda')} {torch.is_grad_enabled()}")
    storages: dict[int, int] = {}
    for i, node in enumerate(region.inputs):
        names[node] = f"i{i}"
        lines.append(f"i{i} {describe_value(value(node), symbols, storages)}")
    for i, node in enumerate(region.nodes):
        names[node] = f"n{i}"
        args = text_of((node.args, node.kwargs), names, symbols)
        lines.append(f"n{i} {node.op} {identity(node)} {args}")
        lines.append(describe_value(value(node), symbols, {}))
    lines.append(repr(region.mode))
    roles = (region.x, region.ids, region.weights, region.out, region.end, region.scores)
    routing = ["-" if n is None else names[n] for n in roles]
    lines.append(f"{routing} {[names.get(a, '') for a in region.aliases]} {region.onto}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:20]


def describe_value(found: object, symbols: dict[str, str], storages: dict[int, int]) -> str:
    """All that a value means to a region: shape, strides, dtype, device, alias.  ``symbols`` and ``storages`` number
    what they meet in order of appearance."""
    if not isinstance(found, Tensor):
        return text_of(found, {}, symbols)
    try:
        storage = found.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # a wrapper tensor without a storage of its own
        storage = id(found)
    alias = storages.setdefault(storage, len(storages))
    shape = text_of(list(found.shape), {}, symbols)
    stride = text_of(list(found.stride()), {}, symbols)
    return f"{shape} {stride} {found.dtype} {found.device} {found.requires_grad} {type(found).__name__} @{alias}"


def text_of(tree: Any, names: dict[Node, str], symbols: dict[str, str]) -> str:
    """An argument tree with nodes by ``names`` and symbols by order of appearance."""
    if isinstance(tree, Node):
        return names[tree]
    if isinstance(tree, (tuple, list)):
        return "[" + ",".join(text_of(t, names, symbols) for t in tree) + "]"
    if isinstance(tree, dict):
        return "{" + ",".join(f"{k}:{text_of(v, names, symbols)}" for k, v in sorted(tree.items())) + "}"
    if isinstance(tree, slice):
        return "slice" + text_of((tree.start, tree.stop, tree.step), names, symbols)
    if isinstance(tree, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        expr = tree.node.expr
        renamed = {s: symbols.setdefault(str(s), f"s{len(symbols)}") for s in sorted(expr.free_symbols, key=str)}
        return str(expr.subs({s: type(s)(name) for s, name in renamed.items()}) if renamed else expr)
    if isinstance(tree, Tensor):
        return "tensor"
    return repr(tree)
