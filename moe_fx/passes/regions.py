"""A region: a MoE block in a graph, closed between {hidden states, ids, routing weights} and the combined output."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from moe_fx.passes.banks import Bank, is_weight
from moe_fx.passes.dataflow import Mode, fake, is_integer, value


@dataclass(slots=True)
class Region:
    """A block in the graph.

    nodes: in order of position.  x, ids, weights: the nodes it reads (weights None: every chosen expert counts 1).
    scores: an inner dense [T, E] (or [E, T]) routing matrix, where the block does not gather by ids.
    sizes: (symbolic) numbers it reads, and tensors of which it reads only the shape; a start and ``dense`` too.
    end: the last node; out: the node whose value leaves (``end``, or what ``end`` writes to); aliases: nodes of the
    same storage whose later readers get the new value too.
    overwritten: the first later node that writes to what the region reads.
    masked: it reads a dense [T, E] matrix in the place of routing weights, and masks it by the ids: the last of sizes.
    onto: where the block adds to a tensor from outside, the start: (position in nodes, of the argument) that are it.
    ups, down: its expert weights.  params: other parameters it reads.  mode: autocast and grad mode around it.
    """

    nodes: list[Node]
    x: Node
    ids: Node
    weights: Node | None
    end: Node
    out: Node
    aliases: list[Node]
    ups: list[Bank]
    down: Bank
    params: list[Node]
    sizes: list[Node]
    scores: Node | None = None
    mode: Mode = field(default_factory=Mode)
    overwritten: str = ""
    masked: bool = False
    onto: tuple[tuple[int, int], ...] = ()

    @property
    def weight_nodes(self) -> list[Node]:
        return [p for bank in (*self.ups, self.down) for p in bank.params]

    @property
    def inputs(self) -> list[Node]:
        """Order of the placeholders of ``module``."""
        routing = [self.x, self.ids] + ([self.weights] if self.weights is not None else [])
        return routing + self.weight_nodes + self.params + self.sizes

    @property
    def hidden(self) -> int:
        """H: the last size of x."""
        return int(fake(self.x).shape[-1])

    @property
    def intermediate(self) -> int:
        """I: the size of the down projection's input."""
        _, a, b = self.down.sizes
        return a if b == self.hidden else b

    @property
    def top_k(self) -> int:
        """k: ids per token."""
        return hint(numel(self.ids)) * self.hidden // max(hint(numel(self.x)), 1)

    @property
    def dense(self) -> Node | None:
        """The matrix that it reads in the place of routing weights."""
        return self.sizes[-1] if self.masked else None

    @property
    def start(self) -> Node | None:
        """The tensor from outside to which the block adds; its value is in no result of the region."""
        found = [self.nodes[at].args[i] for at, i in self.onto[:1]]
        return found[0] if found else None  # type: ignore[return-value]

    @property
    def training(self) -> bool:
        """Whether the graph that is being compiled takes gradients through the block."""
        grad = torch.is_grad_enabled() if self.mode.grad is None else self.mode.grad
        return grad and any(t.requires_grad for n in self.inputs if isinstance(t := value(n), Tensor))

    def run(self, inputs: list[object]) -> tuple[Tensor, ...]:
        """The region's results in its own dtypes, under its autocast."""
        with self.autocast():
            return tuple(self.module()(*inputs))

    def autocast(self) -> AbstractContextManager[object]:
        """The autocast that the graph enters around the block, if it does."""
        if self.mode.autocast is None:
            return nullcontext()
        device, dtype, enabled, cache = self.mode.autocast
        return torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=cache)  # type: ignore[arg-type]

    def module(self) -> GraphModule:
        """The region alone, as a module from ``inputs`` to (out,), or (out, scores [T, E] or [E, T]).  It starts from
        zeros."""
        graph = Graph()
        copies: dict[Node, Node] = {}
        for node in self.inputs:
            copies[node] = graph.placeholder(node.name)
            copies[node].meta = dict(node.meta)
        zeros = None if self.start is None else graph.call_function(torch.zeros_like, (copies[self.start],))
        for at, node in enumerate(self.nodes):
            copies[node] = graph.node_copy(node, copies.__getitem__)
            for argument in (i for position, i in self.onto if position == at):
                copies[node].update_arg(argument, zeros)
        results = [zeros if self.out is self.start and zeros is not None else copies[self.out]]
        if self.scores is not None:
            scores = copies[self.scores]
            flat = fake(self.scores).ndim == 2
            results.append(scores if flat else graph.call_method("flatten", (scores, 0, -2)))
        graph.output(tuple(results))
        owner = self.out.graph.owning_module
        return GraphModule(owner if owner is not None else torch.nn.Module(), graph)


def graph_parts(gm: GraphModule, examples: list[object]) -> Iterator[tuple[Graph, set[Node], dict[Node, Tensor]]]:
    """The graph and the bodies of its higher-order ops (activation checkpointing puts every block into one), each with
    its placeholders that hold the model's weights, and its integer buffers with their values."""
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    pairs = list(zip(placeholders, examples, strict=False))
    weights = {n for n, e in pairs if is_weight(n, e)}
    buffers = {n: e for n, e in pairs if isinstance(e, Tensor) and n in weights and is_integer(e)}
    yield from _parts(gm, weights, buffers)


def _parts(
    gm: GraphModule, weights: set[Node], buffers: dict[Node, Tensor]
) -> Iterator[tuple[Graph, set[Node], dict[Node, Tensor]]]:
    yield gm.graph, weights, {n: t for n, t in buffers.items() if not isinstance(t, FakeTensor)}
    for node in gm.graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, HigherOrderOperator):
            continue
        for i, arg in enumerate(node.args):
            body = _attribute(gm, arg) if isinstance(arg, Node) and arg.op == "get_attr" else None
            if not isinstance(body, GraphModule):
                continue
            inner = [n for n in body.graph.nodes if n.op == "placeholder"]
            outer = [a for a in node.args[i + 1 :] if not (isinstance(a, Node) and a.op == "get_attr")]
            if len(inner) == len(outer):
                pairs = [(a, b) for a, b in zip(inner, outer, strict=True) if isinstance(b, Node)]
                yield from _parts(
                    body, {a for a, b in pairs if b in weights}, {a: buffers[b] for a, b in pairs if b in buffers}
                )


def _attribute(gm: GraphModule, node: Node) -> object:
    found: object = gm
    for name in str(node.target).split("."):
        found = getattr(found, name, None)
    return found


def runnable(device: torch.device) -> torch.device:
    """Where samples for ``device`` run: values on the meta device are none, so the host stands in."""
    return torch.device("cpu") if device.type == "meta" else device


def numel(node: Node) -> object:
    """Number of elements, an int or a SymInt."""
    return math.prod(fake(node).shape)


def hint(size: object) -> int:
    """The value that a size had when the graph was captured."""
    return size if isinstance(size, int) else int(size.node.hint or 0)  # type: ignore[attr-defined]


def same(a: object, b: object) -> bool:
    """a == b for certain, without a guard."""
    return bool(statically_known_true(a == b))


def describe(node: Node) -> str:
    """name, shape and dtype, for reports."""
    found = value(node)
    return f"{node.name} {list(found.shape)} {found.dtype}" if isinstance(found, Tensor) else node.name
