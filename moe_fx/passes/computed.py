"""Expert weights that a graph computes: codes times scales, a matrix plus an adapter, a normalised matrix.

The last node of such a computation is taken for a parameter (``banks``): what stands before it stays in the graph, or
is shown to be a dequantisation (``recipes``) and goes too.

before: w = (codes[e].to(bf16) - 8) * scale[e];  y = x @ w.t()        parameters: codes, scale
found:  y = x @ w.t()                                                 parameter: w, made by ``Computed``
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch.fx import Graph, Node

from moe_fx.passes.banks import GATHERS, PRODUCTS, numbered_alike
from moe_fx.passes.dataflow import Dataflow, fake, identity, target_name, tensor, tensors
from moe_fx.passes.readings import held

_SAME_MATRIX = {"t", "transpose", "contiguous", "detach", "to", "type_as", "float", "half", "bfloat16", "clone"}
_SAME_MATRIX |= {"transpose_", "mT", "T", "getattr", "numpy_T", "adjoint"}
_PARTS = {"unbind"}


@dataclass(frozen=True, slots=True)
class Computed:
    """nodes: one result [E, a, b], or E of [a, b] in order of expert.  sources: of each the placeholders it is made of,
    in the order in which ``text``, the same for all of them, names them.  picked: each takes its own expert's part of
    stacked sources.  scaled: the same computation from scales that the graph computes apart (``absmax / 127``), which
    stay in the graph; None where there are none."""

    nodes: tuple[Node, ...]
    sources: tuple[tuple[Node, ...], ...]
    text: str
    picked: bool
    scaled: Computed | None = None

    @property
    def of_codes(self) -> bool:
        """Something of eight bits or an integer is in it."""
        kinds = [fake(source).dtype for source in self.sources[0]]
        return any(not kind.is_floating_point or kind.itemsize == 1 for kind in kinds)


def find_computed(flow: Dataflow, weights: set[Node], derived: set[Node]) -> list[Computed]:
    """Every group of computed matrices that products read, in order of position."""
    roots = {root for use in flow.nodes if target_name(use) in PRODUCTS for root in _roots(flow, use, derived)}
    written = {storage for node in flow.nodes for target in flow.writes[node] for storage in flow.storages[target]}
    found: list[Computed] = []
    apart: dict[tuple[tuple[Node, ...], str], list[tuple[int, Node, tuple[Node, ...]]]] = defaultdict(list)
    listed: dict[str, dict[Node, tuple[Node, tuple[Node, ...]]]] = defaultdict(dict)
    for root in sorted(roots, key=flow.position.__getitem__):
        read = _Reading(flow, weights)
        text = read.text(root)
        sources, ndim = tuple(read.sources), fake(root).ndim
        if not sources or not read.computes or any(flow.storages[s] & written for s in sources):
            continue
        if ndim == 3:
            found.append(Computed((root,), (sources,), text, False))
        elif ndim == 2 and len(read.picks) == 1:
            apart[sources, text].append((next(iter(read.picks)), root, sources))
        elif ndim == 2 and not read.picks:
            listed[text].setdefault(_placeholder(sources[0]), (root, sources))
    for (_, spelt), members in apart.items():
        members.sort(key=lambda member: member[0])
        if len(members) > 1 and [e for e, *_ in members] == list(range(len(members))):
            found.append(Computed(tuple(n for _, n, _ in members), tuple(s for *_, s in members), spelt, True))
    for spelt, by_source in listed.items():
        for group in numbered_alike(list(by_source)):
            members_of = [by_source[node] for node in group]
            found.append(Computed(tuple(n for n, _ in members_of), tuple(s for _, s in members_of), spelt, False))
    found = [replace(c, scaled=_from_scales(c, flow, written)) for c in found]
    return sorted(found, key=lambda c: flow.position[c.nodes[0]])


def _from_scales(computed: Computed, flow: Dataflow, written: set[int]) -> Computed | None:
    if computed.picked:
        return None
    sources = tuple(_small(node) for node in computed.nodes)
    if sources == computed.sources or any(flow.storages[s] & written for each in sources for s in each):
        return None
    return Computed(computed.nodes, sources, f"from scales: {computed.text}", False)


def _small(root: Node) -> tuple[Node, ...]:
    """The inputs of a matrix's computation: placeholders, and what is much smaller than the matrix."""
    found: dict[Node, None] = {}
    stack, most = [root], fake(root).numel() // 8
    while stack:
        node = stack.pop()
        t = tensor(node)
        if node.op == "placeholder" or (t is not None and t.is_floating_point() and t.numel() <= most):
            found.setdefault(node)
        else:
            stack.extend(reversed(node.all_input_nodes))
    return tuple(found)


def _placeholder(source: Node) -> Node:
    """The parameter that a source is a view of."""
    while source.op != "placeholder" and source.all_input_nodes:
        source = source.all_input_nodes[0]
    return source


def _roots(flow: Dataflow, use: Node, derived: set[Node]) -> list[Node]:
    """The computed matrices that a product reads, before what only turns, casts or picks them."""
    found = []
    for node in use.all_input_nodes:
        source = _same_matrix(flow, node)
        while source is not None and (node not in derived or source in derived):
            node, source = source, _same_matrix(flow, source)
        if node in derived and (t := tensor(node)) is not None and t.is_floating_point():
            found.append(node)
    return found


def _same_matrix(flow: Dataflow, node: Node) -> Node | None:
    """What ``node`` only turns, casts or picks from; None where it does more."""
    name = target_name(node)
    sources = [p for p in node.all_input_nodes if tensors(p) and not (name in GATHERS and p in flow.integers)]
    return sources[0] if name in _SAME_MATRIX | GATHERS | _PARTS and len(sources) == 1 else None


def sweep(graph: Graph, computed: Iterable[Computed]) -> None:
    """Erases computations that nothing reads any more, with the views of their results."""
    mine: set[Node] = set()
    for group in computed:
        above, below = list(group.nodes), list(group.nodes)
        while above:
            node = above.pop()
            if node.op.startswith("call") and node not in mine:
                mine.add(node)
                above.extend(node.all_input_nodes)
        while below:
            for user in below.pop().users:
                if target_name(user) in _SAME_MATRIX | GATHERS | _PARTS and user not in mine:
                    mine.add(user)
                    below.append(user)
    for node in reversed(graph.nodes):
        if node in mine and not node.users:
            graph.erase_node(node)


class _Reading:
    """One computation as a text: what it calls, with its sources numbered and the expert it picks left out."""

    def __init__(self, flow: Dataflow, weights: set[Node]):
        self.flow, self.weights = flow, weights
        self.sources: dict[Node, int] = {}
        self.picks: set[int] = set()
        self.computes = False  # anything beside turns, casts and picks
        self._texts: dict[Node, str] = {}

    def text(self, node: Node) -> str:
        if node in self.weights:
            return self.source(node)
        if node not in self._texts:
            self._texts[node] = self._call(node)
        return self._texts[node]

    def source(self, node: Node) -> str:
        t = fake(node)
        return f"p{self.sources.setdefault(node, len(self.sources))}:{list(t.shape)}:{t.dtype}"

    def _call(self, node: Node) -> str:
        if node.target is held:  # what it is made of are its sources, whatever makes them
            self.computes = True
            parts = [self.text(part) if self._picks(part) else self.source(part) for part in node.all_input_nodes]
            return f"held({','.join(parts)};{node.args[2:]})"
        if self._picks(node):
            self.picks.add(node.args[1])  # type: ignore[arg-type]
            return f"{self.text(node.args[0])}[e]"  # type: ignore[arg-type]
        if target_name(node) not in _SAME_MATRIX | GATHERS and tensors(node):
            self.computes = True
        return f"{identity(node)}({self._args(node.args)};{self._args(node.kwargs)})"

    def _picks(self, node: Node) -> bool:
        """Whether it is one expert's part of a stacked parameter."""
        return node.target is operator.getitem and node.args[0] in self.weights and isinstance(node.args[1], int)

    def _args(self, tree: object) -> str:
        if isinstance(tree, Node):
            return self.text(tree)
        if isinstance(tree, (tuple, list)):
            return "(" + ",".join(map(self._args, tree)) + ")"
        if isinstance(tree, dict):
            return "{" + ",".join(f"{k}:{self._args(v)}" for k, v in tree.items()) + "}"
        if isinstance(tree, slice):
            return f"slice({self._args(tree.start)},{self._args(tree.stop)},{self._args(tree.step)})"
        return repr(tree)
