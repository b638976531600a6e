"""Products over codes, by a library's op or with rounded inputs, read as products with plain matrices.

before: y = gemm_4bit(x, codes, [N, K], scale, 64, "nf4")
after:  m = held(codes, scale, "nf4:1x64:float32", dtype);  y = linear(x, m)

before: s = x.abs().amax(-1) / 448;  q = (x / s).to(float8);  y = _scaled_mm(q, codes.t(), s, scale)
after:  m = held(codes, scale, …);  y = linear(rounded(x, "float8_e4m3fn:1x-1:float32:dynamic"), m)

A reading is for FIND and MATCH, which know matrices.  What no block takes is put back as it was (``restore``).  Before
the call of a library is read so, it and its reading are run on a sample of its own shapes, and must agree.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, Node

from moe_fx.binding import Quantised
from moe_fx.passes.codes import draw
from moe_fx.passes.dataflow import fake, identity, tensor, value
from moe_fx.passes.exact import grouped_mm
from moe_fx.passes.fingerprint import describe_value, text_of
from moe_fx.passes.isolation import isolated
from moe_fx.passes.regions import runnable
from moe_fx.passes.rewrite import insert_call
from moe_fx.passes.sampling import evaluate, free_symbols
from moe_fx.quant import parse_key
from moe_fx.reference.quantise import dequantise, round_to


def held(codes: Tensor, scale: Tensor, key: str, dtype: torch.dtype) -> Tensor:
    """The matrices [..., rows, cols] that codes [..., rows, bytes of a row] and their scales stand for."""
    return dequantise(Quantised(parse_key(key), codes, scale), dtype)


def rounded(x: Tensor, key: str) -> Tensor:
    """x [..., in] rounded to codes and back.  In float64, where a block is its formula alone, x itself."""
    if x.dtype == torch.float64:
        return x
    return round_to(x.reshape(-1, x.shape[-1]), parse_key(key)).view(x.shape)


@dataclass(frozen=True, slots=True)
class Meaning:
    """What a call multiplies.  x: rows [..., in].  codes, scale: as ``held`` takes them, made by ``Builder``.  key: of
    them; inputs: of x, "" where it is not rounded.  ends: of each expert's rows, where codes are of many matrices."""

    x: Node
    codes: Node
    scale: Node
    key: str
    inputs: str = ""
    bias: Node | None = None
    ends: Node | None = None


_ROWS, _LARGE = 48, 1 << 24  # rows of a sample; codes of a matrix that takes too much room in float64
_AGREED: dict[str, bool] = {}

# name of an op → what a call of it means; None for a call that it does not read.  Views are made by the builder.
Reader = Callable[["Builder", Node], Meaning | None]
READERS: dict[str, Reader] = {}


def reader(*names: str) -> Callable[[Reader], Reader]:
    """Registers a reader for ops ("namespace::name")."""

    def register(function: Reader) -> Reader:
        READERS.update(dict.fromkeys(names, function))
        return function

    return register


@dataclass(slots=True)
class Builder:
    """Inserts nodes before one call and remembers where its inputs went.  calls: what they are read from, in order."""

    graph: Graph
    calls: list[Node]
    new: list[Node] = field(default_factory=list)
    places: dict[Node, tuple[Node, int]] = field(default_factory=dict)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """A call of a function, or of the method that ``target`` names."""
        with self.graph.inserting_before(self.calls[-1]):
            node = insert_call(
                self.graph, "call_method" if isinstance(target, str) else "call_function", target, args, kwargs
            )
        self.note(node)
        return node

    def put(self, target: Any, *args: Any, like: Tensor) -> Node:
        """A call whose value is as ``like``."""
        with self.graph.inserting_before(self.calls[-1]):
            node = self.graph.call_function(target, args)
        node.meta["example_value"] = like
        self.note(node)
        return node

    def note(self, node: Node) -> None:
        self.new.append(node)
        for i, arg in enumerate(node.args):
            if isinstance(arg, Node):
                self.places.setdefault(arg, (node, i))

    def sized(self, node: Node, *size: int) -> Node:
        """The node in that shape."""
        return node if tuple(fake(node).shape) == size else self.call("reshape", node, size)

    def drop(self) -> None:
        for node in reversed(self.new):
            if not node.users:
                self.graph.erase_node(node)


@dataclass(frozen=True, slots=True)
class _Call:
    """A node as it was."""

    node: Node
    op: str
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    meta: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Reading:
    """y: the result as it is read now.  before: the calls that gave it.  new: all nodes of the reading.  places: where
    what the calls read stands now, (node, position in its args)."""

    y: Node
    before: tuple[_Call, ...]
    new: tuple[Node, ...]
    places: dict[Node, tuple[Node, int]]


def read_products(graph: Graph, found: list[Reading]) -> None:
    """Reads every call that a reader understands, in place, and adds the readings to ``found``."""
    for node in list(graph.nodes):
        op = op_of(node)
        function = None if op is None else READERS.get(op._schema.name)
        if function is not None and tensor(node) is not None:
            builder = Builder(graph, [node])
            meaning = function(builder, node)
            reading = None if meaning is None else _read(builder, meaning)
            if reading is None:
                builder.drop()
            else:
                found.append(reading)


def restore(graph: Graph, readings: list[Reading]) -> None:
    """Puts the calls back whose results are still read from their readings."""
    for reading in readings:
        if not reading.y.users:  # a block took it: ``rewrite`` erases nodes that nothing reads
            continue
        copies = {old: at.args[i] for old, (at, i) in reading.places.items()}
        with graph.inserting_before(reading.y):
            for call in reading.before:
                now = partial(_now, copies)
                args: Any = torch.fx.node.map_arg(call.args, now)
                kwargs: Any = torch.fx.node.map_arg(call.kwargs, now)
                node = graph.create_node(call.op, call.target, args, kwargs)
                node.meta = call.meta
                copies[call.node] = node
        reading.y.replace_all_uses_with(copies[reading.before[-1].node])  # type: ignore[arg-type]
        for node in reversed(reading.new):
            if not node.users:
                graph.erase_node(node)
    if readings and graph.owning_module is not None:
        graph.owning_module.recompile()


def _now(copies: dict[Node, Any], node: Node) -> Any:
    return copies.get(node, node)  # a placeholder stays what it is


def op_of(node: Node) -> torch._ops.OpOverload | None:
    """The op that a node calls, by itself or as a function of torch."""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target
    name = getattr(node.target, "__name__", "")
    if node.op != "call_function" or getattr(torch, name, None) is not node.target:
        return None
    return getattr(getattr(torch.ops.aten, name, None), "default", None)


def _read(builder: Builder, meaning: Meaning) -> Reading | None:
    """The calls of ``builder`` as one product; None where the two differ, or some input got lost."""
    graph = builder.graph
    order = {node: i for i, node in enumerate(graph.nodes)}
    calls = builder.calls = sorted(builder.calls, key=order.__getitem__)
    last = calls[-1]
    op = op_of(last)
    ours = op is not None and op.namespace == "moe_fx"  # their meaning is tested with them, and needs no bank of codes
    if not ours and not _agrees(builder, meaning):
        return None
    x, dtype = meaning.x, fake(meaning.x).dtype
    *stack, size = fake(meaning.codes).shape
    size = size * 8 // parse_key(meaning.key).bits
    m = builder.put(held, meaning.codes, meaning.scale, meaning.key, dtype, like=fake(x).new_empty(*stack, size))
    rows = builder.put(rounded, x, meaning.inputs, like=torch.empty_like(fake(x))) if meaning.inputs else x
    with graph.inserting_before(last):
        if meaning.ends is None:
            y = graph.call_function(F.linear, (rows, m, meaning.bias))
        else:
            across = builder.call("transpose", m, 1, 2)
            y = graph.call_function(grouped_mm, (rows, across, meaning.ends))
        builder.note(y)
        if dtype != fake(last).dtype:
            y.meta["example_value"] = fake(last)
            y = graph.call_method("to", (y, fake(last).dtype))
            builder.note(y)
    y.meta = dict(last.meta)
    before = tuple(_Call(n, n.op, n.target, n.args, n.kwargs, n.meta) for n in calls)
    if any(n.op != "placeholder" and n not in builder.places for n in _outer(calls)):
        return None
    last.replace_all_uses_with(y)
    for node in reversed(calls):
        if not node.users:
            graph.erase_node(node)
    return Reading(y, before, tuple(builder.new), builder.places)


def _outer(calls: list[Node]) -> list[Node]:
    """What the calls read from elsewhere."""
    return list(dict.fromkeys(i for n in calls for i in n.all_input_nodes if i not in calls))


def _agrees(builder: Builder, meaning: Meaning) -> bool:
    """Whether the calls give the products of rows of zeros but for one element with ``held``; once for calls that read
    the same."""
    outer = _outer(builder.calls)
    names, symbols = {node: f"i{i}" for i, node in enumerate(outer)}, dict[str, str]()
    lines = [describe_value(value(node), symbols, {}) for node in outer]
    for i, node in enumerate(builder.calls):
        lines.append(f"{node.op} {identity(node)} {text_of((node.args, node.kwargs), names, symbols)}")
        names[node] = f"n{i}"
    text = "\n".join([*lines, meaning.key, meaning.inputs])
    if text not in _AGREED:
        with isolated():
            try:
                _AGREED[text] = _compare(builder, meaning, outer)
            except Exception:  # noqa: BLE001  an op may refuse any sample; then it is not read
                _AGREED[text] = False
    return _AGREED[text]


def _compare(builder: Builder, meaning: Meaning, outer: list[Node]) -> bool:
    env = sample(outer, meaning.x)
    x = env[meaning.x]
    found = run(builder.calls, dict(env))[builder.calls[-1]]
    views = run(builder.new, dict(env))
    bias = 0 if meaning.bias is None else views[meaning.bias].double()
    codes = views[meaning.codes]
    wide = torch.float64 if codes.numel() <= _LARGE else torch.float32
    matrix = held(codes, views[meaning.scale], meaning.key, wide)
    exact = (x.to(wide) @ matrix.mT).double()
    bound = 4 * torch.finfo(found.dtype).eps * (exact.abs() + abs(bias))
    if not bool(((found.double() - exact - bias).abs() <= bound).all()):
        return False
    if meaning.inputs:
        return True
    # an op that rounds its inputs loses what stands beside a large one, and a part of what does not
    normal = torch.randn(x.shape, generator=torch.Generator().manual_seed(3)).to(x)
    return all(
        _close(builder.calls, env | {meaning.x: rows}, rows, matrix, bias) for rows in (normal, normal + 2**11 * x)
    )


def _close(calls: list[Node], env: dict[Node, Any], x: Tensor, matrix: Tensor, bias: Any) -> bool:
    """Whether the calls are about as exact as torch's product in the dtype of x."""
    exact = (x.to(matrix.dtype) @ matrix.mT).double() + bias
    own, usual = run(calls, env)[calls[-1]], x @ matrix.mT.to(x) + bias
    return bool((own.double() - exact).norm() <= 4 * (usual.double() - exact).norm())


def sample(nodes: list[Node], x: Node) -> dict[Node, Any]:
    """Values for nodes of a graph.  x: rows of zeros with one element, a power of two; others as ``draw`` makes them;
    symbols: 48."""
    found: dict[Node, Any] = {}
    tensors = [n for n in nodes if tensor(n) is not None and n is not x]
    drawn = draw([(tuple(_size(s) for s in fake(n).shape), fake(n).dtype) for n in tensors]) if tensors else []
    device = runnable(fake(x).device)
    found.update((n, t.to(device)) for n, t in zip(tensors, drawn, strict=True))
    found.update((n, _size(value(n))) for n in nodes if tensor(n) is None)
    *lead, width = (_size(s) for s in fake(x).shape)
    count = math.prod(lead)
    rows = torch.zeros(count, width, dtype=fake(x).dtype)
    rows[torch.arange(count), torch.randint(width, (count,), generator=torch.Generator().manual_seed(2))] = 2.0**-6
    found[x] = rows.reshape(*lead, width).to(device)
    return found


def run(calls: list[Node], env: dict[Node, Any]) -> dict[Node, Any]:
    """``env`` with the results of the calls."""
    for node in calls:
        args: Any = torch.fx.node.map_arg(node.args, env.__getitem__)
        kwargs: Any = torch.fx.node.map_arg(node.kwargs, env.__getitem__)
        target: Any = node.target
        env[node] = (
            getattr(args[0], target)(*args[1:], **kwargs) if isinstance(target, str) else target(*args, **kwargs)
        )
    return env


def _size(size: Any) -> Any:
    return evaluate(size, dict.fromkeys(free_symbols(size), _ROWS))
