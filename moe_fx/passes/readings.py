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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, Node

from moe_fx.binding import Quantised
from moe_fx.passes.codes import draw
from moe_fx.passes.dataflow import Dataflow, fake, identity, tensor, value
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
    """Inserts nodes before one call.  calls: what they are read from.  position: of the nodes in the graph."""

    graph: Graph
    calls: list[Node]
    position: dict[Node, int]
    new: list[Node] = field(default_factory=list)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """A call of a function, or of the method that ``target`` names."""
        op = "call_method" if isinstance(target, str) else "call_function"
        with self.graph.inserting_before(self.calls[-1]):
            self.new.append(insert_call(self.graph, op, target, args, kwargs))
        return self.new[-1]

    def put(self, target: Any, *args: Any, like: Tensor) -> Node:
        """A call of a function whose value is as ``like``."""
        with self.graph.inserting_before(self.calls[-1]):
            self.new.append(self.graph.call_function(target, args))
        self.new[-1].meta["example_value"] = like
        return self.new[-1]

    def sized(self, node: Node, *size: int) -> Node:
        """The node in that shape."""
        return node if tuple(fake(node).shape) == size else self.call("reshape", node, size)


@dataclass(frozen=True, slots=True)
class Reading:
    """y: the result as it is read now.  calls: those that gave it, the last one the product; they stay where they are,
    and nothing reads the product.  new: all nodes of the reading."""

    y: Node
    calls: tuple[Node, ...]
    new: tuple[Node, ...]


def read_products(graph: Graph, found: list[Reading]) -> None:
    """Reads every call that a reader understands, and adds the readings to ``found``."""
    flow: Dataflow | None = None
    for node in list(graph.nodes):
        op = op_of(node)
        function = None if op is None else READERS.get(op._schema.name)
        if function is None or tensor(node) is None:
            continue
        flow = flow or Dataflow(graph)
        builder = Builder(graph, [node], flow.position)
        meaning = function(builder, node)
        y = None if meaning is None or not _together(flow, builder.calls) else _read(builder, meaning)
        if y is None:
            _erase(graph, builder.new)
            continue
        node.replace_all_uses_with(y)
        flow.position.update(dict.fromkeys(builder.new, flow.position[node]))  # calls that follow may read them
        found.append(Reading(y, tuple(builder.calls), tuple(builder.new)))


def settle(graph: Graph, readings: list[Reading], taken: set[Node]) -> None:
    """Before blocks are rewritten: the calls that the readings in ``taken`` stand for go."""
    for reading in readings:
        if reading.y in taken:
            _erase(graph, reading.calls)


def restore(graph: Graph, readings: list[Reading]) -> None:
    """Results that are still read from their readings come from their calls again."""
    there = set(graph.nodes)
    for reading in readings:
        product = reading.calls[-1]
        if reading.y.users and product in there:
            reading.y.replace_all_uses_with(product)
            _erase(graph, reading.new)
    if readings and graph.owning_module is not None:
        graph.owning_module.recompile()


def _erase(graph: Graph, nodes: Sequence[Node]) -> None:
    """Those that nothing reads, the last first."""
    for node in reversed(nodes):
        if not node.users:
            graph.erase_node(node)


def _together(flow: Dataflow, calls: list[Node]) -> bool:
    """Whether the calls see the same as one call in the place of the last: nothing that they touch is written to in
    between, and no mode changes; under autocast torch's product is another than a library's."""
    first, last = (edge(flow.position[node] for node in calls) for edge in (min, max))
    touched = {s for node in calls for n in (node, *node.all_input_nodes) for s in flow.storages.get(n, ())}
    writes = [w for node in flow.nodes[first : last + 1] if node not in calls for w in flow.writes[node]]
    modes = {flow.modes[node] for node in calls}
    quiet = not any(flow.storages[w] & touched for w in writes)
    autocast = next(iter(modes)).autocast is not None or torch.is_autocast_enabled(fake(flow.nodes[last]).device.type)
    return quiet and len(modes) == 1 and not autocast


def op_of(node: Node) -> torch._ops.OpOverload | None:
    """The op that a node calls, by itself or as a function of torch."""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target
    name = getattr(node.target, "__name__", "")
    if node.op != "call_function" or getattr(torch, name, None) is not node.target:
        return None
    return getattr(getattr(torch.ops.aten, name, None), "default", None)


def _read(builder: Builder, meaning: Meaning) -> Node | None:
    """The calls of ``builder`` as one product; None where the two differ."""
    builder.calls.sort(key=builder.position.__getitem__)
    last = builder.calls[-1]
    op = op_of(last)
    ours = op is not None and op.namespace == "moe_fx"  # their meaning is tested with them, and needs no bank of codes
    if not ours and not _agrees(builder, meaning):
        return None
    x, out = meaning.x, fake(last)
    *stack, size = fake(meaning.codes).shape
    matrices = fake(x).new_empty(*stack, size * 8 // parse_key(meaning.key).bits)
    m = builder.put(held, meaning.codes, meaning.scale, meaning.key, fake(x).dtype, like=matrices)
    rows = builder.put(rounded, x, meaning.inputs, like=torch.empty_like(fake(x))) if meaning.inputs else x
    like = torch.empty_like(out, dtype=fake(x).dtype)
    if meaning.ends is None:
        y = builder.put(F.linear, rows, m, meaning.bias, like=like)
    else:
        y = builder.put(grouped_mm, rows, builder.call("transpose", m, 1, 2), meaning.ends, like=like)
    if out.dtype != like.dtype:
        y = builder.call("to", y, out.dtype)
    y.meta = last.meta | {"example_value": y.meta["example_value"]}
    return y


def outer(calls: list[Node]) -> list[Node]:
    """What the calls read from elsewhere."""
    return list(dict.fromkeys(i for n in calls for i in n.all_input_nodes if i not in calls))


def text(calls: list[Node], *more: str) -> str:
    """The calls, with the shapes, dtypes and devices of what they read: the same for calls that read the same."""
    reads = outer(calls)
    names, symbols = {node: f"i{i}" for i, node in enumerate(reads)}, dict[str, str]()
    lines = [describe_value(value(node), symbols, {}) for node in reads]
    for i, node in enumerate(calls):
        lines.append(f"{node.op} {identity(node)} {text_of((node.args, node.kwargs), names, symbols)}")
        names[node] = f"n{i}"
    return "\n".join([*lines, *more])


def _agrees(builder: Builder, meaning: Meaning) -> bool:
    """Whether the calls give the products of rows of zeros but for one element with ``held``; once for calls that read
    the same."""
    key = text(builder.calls, meaning.key, meaning.inputs)
    if key not in _AGREED:
        with isolated():
            try:
                _AGREED[key] = _compare(builder, meaning)
            except Exception:  # noqa: BLE001  an op may refuse any sample; then it is not read
                _AGREED[key] = False
    return _AGREED[key]


def _compare(builder: Builder, meaning: Meaning) -> bool:
    calls = builder.calls
    env = sample(outer(calls), meaning.x)
    x = env[meaning.x]
    found = run(calls, dict(env))[calls[-1]]
    views = run(builder.new, dict(env))
    bias = 0 if meaning.bias is None else views[meaning.bias].double()
    codes = views[meaning.codes]
    wide = torch.float64 if codes.numel() <= _LARGE else torch.float32
    matrix = held(codes, views[meaning.scale], meaning.key, wide)
    exact = (x.to(wide) @ matrix.mT).double()
    bound = 4 * torch.finfo(found.dtype).eps * (exact.abs() + abs(bias))
    if not bool(((found.double() - exact - bias).abs() <= bound).all()):
        return False
    # an op that rounds its inputs otherwise loses what stands beside a large one, and a part of what does not
    normal = torch.randn(x.shape, generator=torch.Generator().manual_seed(3)).to(x)
    for rows in (normal, normal + 2**11 * x):
        seen = rounded(rows, meaning.inputs) if meaning.inputs else rows
        if not _close(calls, env | {meaning.x: rows}, seen, matrix, bias):
            return False
    return True


def _close(calls: list[Node], env: dict[Node, Any], x: Tensor, matrix: Tensor, bias: Any) -> bool:
    """Whether the calls are about as exact as torch's product with rows x, in their dtype."""
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
    generator = torch.Generator().manual_seed(2)
    sign = torch.randint(2, (count,), generator=generator) * 2 - 1
    rows[torch.arange(count), torch.randint(width, (count,), generator=generator)] = (sign * 2.0**-6).to(rows.dtype)
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
