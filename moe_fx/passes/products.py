"""Which ops of libraries, and of torch, are products with codes, and with what: the readers of ``readings``."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from moe_fx.ops_library import grid, scheme
from moe_fx.passes.banks import GATHERS
from moe_fx.passes.dataflow import fake, target_name
from moe_fx.passes.readings import Builder, Meaning, op_of, reader, rounded
from moe_fx.passes.regions import Region
from moe_fx.passes.roundings import rounding_of
from moe_fx.quant import INT8_CHANNEL, GroupShape, QuantKey

_SAME_ROWS = {"reshape", "view", "flatten", "contiguous", "to", "squeeze", "unsqueeze"}
_FOUR_BITS = {"nf4": "nf4", "fp4": "fp4_bnb"}


def arguments(node: Node) -> dict[str, Any]:
    """The arguments of a call of an op, by name, defaults included."""
    op = op_of(node)
    assert op is not None
    schema = op._schema.arguments
    found = {a.name: a.default_value for a in schema if a.has_default_value()}
    return found | dict(zip((a.name for a in schema), node.args, strict=False)) | node.kwargs


@reader("bitsandbytes::gemm_4bit")
def _four_bit(builder: Builder, node: Node) -> Meaning | None:
    """x [..., K], codes of [N, K] in blocks along the flat matrix, the scales of which may be codes again."""
    a = arguments(node)
    (rows, cols), size = a["shapeB"], a["blocksize"]
    name = _FOUR_BITS.get(a["quant_type"])
    if name is None or cols % size:
        return None
    scale = a["absmax"]
    if a.get("absmax_8bit") is not None:
        count = rows * cols // size
        table, inner = a["absmax_code"], a["absmax_8bit"]
        outer = builder.call("repeat_interleave", scale, 256)
        numbers = builder.call("__getitem__", table, builder.call("long", inner))
        product = builder.call("mul", numbers, builder.call("__getitem__", outer, slice(0, count)))
        scale = builder.call("add", product, a["absmax_offset"])
    codes = builder.sized(a["B"], rows, cols // 2)
    scale = builder.sized(scale, rows, cols // size)
    key = QuantKey(name, GroupShape(1, size))  # type: ignore[arg-type]
    return Meaning(a["A"], codes, scale, str(key), bias=a["bias"])


@reader("aten::_scaled_mm", "aten::_scaled_mm_v2")
def _scaled(builder: Builder, node: Node) -> Meaning | None:
    """Codes [n, K], scales [n, 1] or one, times the transposed codes of a matrix [N, K], scales [1, N] or one."""
    a = arguments(node)
    of_rows, of_matrix = (_one(a[name]) for name in ("scale_a", "scale_b"))
    turned = a["mat2"]
    if of_rows is None or of_matrix is None or a.get("contraction_dim"):
        return None
    if target_name(turned) not in ("t", "transpose", "mT", "T"):
        return None
    weights = turned.args[0]
    n = int(fake(weights).shape[0])
    rounding = rounding_of(a["self"], of_rows, builder.position)
    scales = fake(of_matrix).numel()
    if rounding is None or scales not in (1, n) or fake(weights).dtype is not torch.float8_e4m3fn:
        return None
    builder.calls = [turned, *(c for c in rounding.calls if c is not turned), node]
    key = QuantKey("float8_e4m3fn", GroupShape(-1 if scales == 1 else 1, -1))
    return Meaning(rounding.x, weights, builder.sized(of_matrix, scales, 1), str(key), rounding.key, bias=a.get("bias"))


def _one(scales: Any) -> Node | None:
    """The scales of an operand, which may come as a list; None where there are several."""
    found = scales if isinstance(scales, (list, tuple)) else [scales]
    return found[0] if len(found) == 1 and isinstance(found[0], Node) else None


@reader("moe_fx::int8_linear")
def _eight_bit(builder: Builder, node: Node) -> Meaning | None:
    """x [..., K], codes of [N, K], the magnitude that 127 stands for of each row."""
    a = arguments(node)
    scale = builder.call("mul", builder.call("unsqueeze", a["magnitude"], 1), 1 / 127)
    return Meaning(a["x"], a["codes"], scale, str(INT8_CHANNEL), bias=a["bias"])


@reader("moe_fx::fp8_linear", "moe_fx::fp8_grouped_mm")
def _fine_grained(builder: Builder, node: Node) -> Meaning | None:
    """x [n, K] rounded by row or by 128 of it, times codes [..., N, K] in blocks."""
    a = arguments(node)
    if a.get("input_scale") is not None:
        return None
    weights, scale = a["weight"], a["scale"]
    key, inputs = scheme(fake(weights), fake(scale), a["block"])
    *stack, _, _ = (int(s) for s in fake(weights).shape)
    if key.bits == 4:
        weights = builder.call("view", weights, torch.uint8)
    scale = builder.sized(scale, *stack, *grid(fake(scale)))
    return Meaning(a["x"], weights, scale, str(key), str(inputs), a.get("bias"), a.get("ends"))


def input_keys(region: Region) -> tuple[str, str] | None:
    """Keys of the inputs of the up and of the down products, "" where they are not rounded; None where products of one
    projection differ, or something else is rounded."""
    ups = [_rounded(use) for bank in region.ups for use in bank.uses]
    downs = [_rounded(use) for use in region.down.uses]
    if not {node for node in region.nodes if node.target is rounded} <= {*ups, *downs}:
        return None
    up, down = ({"" if node is None else str(node.args[1]) for node in side} for side in (ups, downs))
    return (up.pop(), down.pop()) if len(up) == len(down) == 1 else None


def _rounded(use: Node) -> Node | None:
    """Where the input of a product is rounded; picking rows of it changes nothing."""
    node = use.args[0]
    while isinstance(node, Node) and node.target is not rounded and target_name(node) in GATHERS | _SAME_ROWS:
        node = node.args[0]
    return node if isinstance(node, Node) and node.target is rounded else None
