"""Who depends on whom in a Dynamo graph, in-place writes included.

Dynamo's torch IR is not functional: ``out.index_add_(...)`` returns a value that nobody reads, and later readers name
``out``.  Here a reader depends on every earlier write to the storage it reads, so a block that accumulates in place has
an end like any other.  Nodes are numbered; an edge always goes from a smaller to a larger number.
"""

from __future__ import annotations

import heapq
import inspect
import operator
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.fx import Graph, Node

_INPLACE_OPERATORS = {
    operator.setitem,
    operator.delitem,
    *(getattr(operator, name) for name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow")),
    *(getattr(operator, name) for name in ("iand", "ior", "ixor")),
}
_RANDOM = {"dropout", "rand", "randn", "randint", "rand_like", "randn_like", "bernoulli", "multinomial", "normal_"}
_RANDOM |= {"uniform_", "bernoulli_", "exponential_", "random_", "randperm", "normal", "alpha_dropout", "rrelu"}
_RANDOM |= {"poisson", "log_normal_", "cauchy_", "geometric_", "binomial", "gumbel_softmax", "feature_dropout"}
ASSERTIONS = ("_check", "_assert", "sym_constrain_range", "constrain_as")


def value(node: Node) -> object:
    """What Dynamo saw at this node: a FakeTensor, a (Sym)Int, a tuple, …"""
    return node.meta.get("example_value", node.meta.get("val"))


def tensor(node: Node) -> Tensor | None:
    """The node's FakeTensor, or None when it is not one tensor."""
    found = value(node)
    return found if isinstance(found, Tensor) else None


def fake(node: Node) -> Tensor:
    """The node's FakeTensor; TypeError for a node of another kind."""
    found = value(node)
    if not isinstance(found, Tensor):
        raise TypeError(f"{node.name} is {type(found).__name__}, not a tensor")
    return found


def tensors(node: Node) -> list[Tensor]:
    """All FakeTensors of the node's value."""
    found = value(node)
    if isinstance(found, Tensor):
        return [found]
    return [t for t in found if isinstance(t, Tensor)] if isinstance(found, (tuple, list)) else []


def target_name(node: Node) -> str:
    """Short name of what a node calls: "linear", "index_add_", "getitem", "grouped_mm_fallback"."""
    return target_name_of(node.target)


def target_name_of(target: object) -> str:
    if isinstance(target, str):
        return target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[1]
    return getattr(target, "__name__", str(target))


_TARGETS: dict[object, int] = {}  # strong references: a number is never given twice


def identity(node: Node) -> str:
    """What a node calls, the same for two nodes exactly if they call the same: two functions of one name differ."""
    target = node.target
    if isinstance(target, (str, torch._ops.OpOverload)):
        return str(target)
    return f"{target_name(node)}#{_TARGETS.setdefault(target, len(_TARGETS))}"


def is_integer(t: Tensor) -> bool:
    return not t.dtype.is_floating_point and not t.dtype.is_complex


class Dataflow:
    """The graph's nodes with their positions, dependencies, writes and liveness."""

    def __init__(self, graph: Graph):
        self.nodes = list(graph.nodes)
        self.position = {node: i for i, node in enumerate(self.nodes)}
        self.storages = {node: _storages(node) for node in self.nodes}
        self.writes = {node: written(node) for node in self.nodes}
        self.preds: dict[Node, list[Node]] = {}
        self.succs: dict[Node, list[Node]] = {node: [] for node in self.nodes}
        self.modes = _modes(self.nodes)
        self._link()
        self.live = self._closure(self._roots(), self.preds)

    def _link(self) -> None:
        writers: dict[int, Node] = {}  # the last one: it reads what it writes to, so it depends on those before it
        for node in self.nodes:
            preds = list(node.all_input_nodes)
            known = set(preds)
            for read in node.all_input_nodes:
                for storage in self.storages[read]:
                    writer = writers.get(storage, read)
                    if writer not in known and self.position[writer] > self.position[read]:
                        known.add(writer)
                        preds.append(writer)
            self.preds[node] = preds
            for pred in preds:
                self.succs[pred].append(node)
            for written in self.writes[node]:
                for storage in self.storages[written]:
                    writers[storage] = node

    def _roots(self) -> list[Node]:
        """The output, and nodes whose effect outlives the graph: a write to an input, random numbers, mode switches,
        and what gives no value (it can only have an effect)."""
        inputs = {s for n in self.nodes if n.op in ("placeholder", "get_attr") for s in self.storages[n]}
        roots = []
        for node in self.nodes:
            outlives = any(self.storages[w] & inputs for w in self.writes[node])
            silent = node.op.startswith("call_") and value(node) is None and not self.writes[node]
            effect = self.is_random(node) or self.is_mode_switch(node) or (silent and not self.is_assertion(node))
            if node.op == "output" or outlives or effect:
                roots.append(node)
        return roots

    @staticmethod
    def _closure(seeds: Iterable[Node], relation: dict[Node, list[Node]]) -> set[Node]:
        seen: set[Node] = set()
        stack = list(seeds)
        while stack:
            node = stack.pop()
            if node not in seen:
                seen.add(node)
                stack.extend(relation[node])
        return seen

    def within(self, seeds: Iterable[Node], relation: dict[Node, list[Node]], low: int, high: int) -> set[Node]:
        """Nodes reached from ``seeds`` along ``relation`` at positions low..high (seeds included)."""
        seen: set[Node] = set()
        stack = list(seeds)
        while stack:
            node = stack.pop()
            if node not in seen and low <= self.position[node] <= high:
                seen.add(node)
                stack.extend(relation[node])
        return seen

    def depends(self, node: Node, on: Node) -> bool:
        """Whether ``node`` needs ``on``, directly or not."""
        return on in self.within([node], self.preds, self.position[on], self.position[node])

    def funnels(self, seeds: Iterable[Node], forward: bool, keep: Callable[[Node], bool]) -> Iterator[Node]:
        """Nodes through which every path from ``seeds`` (forward: to users, else: to inputs) must pass, nearest first.

        A sweep in order of position: when the frontier holds one node only, that node is such a place.  Paths are
        followed through nodes that ``keep`` accepts.  The cost is the size of what is swept, not of the graph.
        """
        sign = 1 if forward else -1
        relation = self.succs if forward else self.preds
        heap = sorted({sign * self.position[n] for n in seeds})
        queued = set(heap)
        while heap:
            at = heapq.heappop(heap)
            node = self.nodes[sign * at]
            if not heap:
                yield node
            for following in relation[node]:
                mark = sign * self.position[following]
                if mark not in queued and keep(following):
                    queued.add(mark)
                    heapq.heappush(heap, mark)

    @cached_property
    def integers(self) -> set[Node]:
        """Nodes whose tensors are integers, or floats made of integers only (a histogram, a cumulative sum)."""
        found: set[Node] = set()
        for node in self.nodes:
            own = tensors(node)
            sources = [p for p in self.preds[node] if tensors(p)]
            derived = node.op not in ("placeholder", "get_attr") and bool(sources) and all(p in found for p in sources)
            if own and (all(is_integer(t) for t in own) or derived):
                found.add(node)
        return found

    def derived(self, weights: set[Node]) -> set[Node]:
        """Nodes computed from ``weights`` (and constants) alone, without a write but to what nothing else reads."""
        found: set[Node] = set()
        constants: set[Node] = set()  # tables and the like: made of numbers in the code
        for node in self.nodes:
            sources = [p for p in self.preds[node] if tensors(p) or self.writes[p]]
            if sources and all(p in weights or p in found or p in constants for p in sources):
                if node.op != "output" and all(self._own(node, target) for target in self.writes[node]):
                    (constants if all(p in constants for p in sources) else found).add(node)
            elif not self.preds[node] and node.op == "call_function" and not self.is_random(node):
                constants.add(node)
        return found

    def _own(self, writer: Node, target: Node) -> bool:
        """Whether nobody but ``writer`` ever reads what stood in ``target`` before it."""
        sharing = {n for storage in self.storages[target] for n in self._holders[storage]}
        before = [n for n in sharing if self.position[n] < self.position[writer]]
        return all(n.op.startswith("call") and len(n.users) == 1 for n in before)

    @cached_property
    def _holders(self) -> dict[int, list[Node]]:
        """The nodes of each storage."""
        found: dict[int, list[Node]] = defaultdict(list)
        for node in self.nodes:
            for storage in self.storages[node]:
                found[storage].append(node)
        return found

    def users(self, node: Node) -> list[Node]:
        """Live readers."""
        return [n for n in self.succs[node] if n in self.live]

    @staticmethod
    def is_random(node: Node) -> bool:
        name = target_name(node)
        if name in ("dropout", "alpha_dropout"):  # (input, p, training, inplace)
            p, training = (*node.args[1:3], None, None)[:2]
            return node.kwargs.get("training", training) is not False and bool(node.kwargs.get("p", p) != 0.0)
        return name in _RANDOM

    @staticmethod
    def is_mode_switch(node: Node) -> bool:
        name = target_name(node)
        return "autocast" in name or "_set_grad_enabled" in name or "inference_mode" in name

    @staticmethod
    def is_assertion(node: Node) -> bool:
        """An assertion about sizes.  One that reads a tensor is the user's: its error is part of what the code does."""
        named = target_name(node).lstrip("_").startswith(tuple(a.lstrip("_") for a in ASSERTIONS))
        return named and not any(tensors(p) for p in node.all_input_nodes)


def _storages(node: Node) -> set[int]:
    found = set()
    for t in tensors(node):
        try:
            found.add(t.untyped_storage()._cdata)
        except (NotImplementedError, RuntimeError):  # sparse and wrapper tensors have no storage of their own
            found.add(id(t))
    return found


def written(node: Node) -> list[Node]:
    """Arguments that the node writes to."""
    if node.op not in ("call_function", "call_method"):
        return []
    name = target_name(node)
    if name == "set_" and isinstance(node.args[0], Node) and list(node.args[0].users) == [node]:
        return []  # another memory for a tensor that nothing else reads (``module.weight.data = codes``)
    found: list[object] = [node.kwargs.get("out")]
    if node.target in _INPLACE_OPERATORS or name == "__setitem__":
        found.append(node.args[0])
    elif isinstance(node.target, torch._ops.OpOverload):
        for i, declared in enumerate(node.target._schema.arguments):
            if declared.alias_info is not None and declared.alias_info.is_write:
                found.append(node.args[i] if i < len(node.args) else node.kwargs.get(declared.name))
    elif isinstance(node.target, torch._ops.HigherOrderOperator):
        found += node.all_input_nodes if "mutation" in name else []
    elif node.target in (operator.and_, operator.or_):
        pass  # the underscore keeps a keyword of Python apart
    elif (name.endswith("_") and not name.endswith("__") and node.args) or _asks_inplace(node):
        found.append(node.args[0] if node.args else node.kwargs.get("input"))
    leaves = torch.utils._pytree.tree_leaves(found)  # ``out=(a, b)``, ``_foreach_mul_([a, b], 2)``
    return [w for w in leaves if isinstance(w, Node)]


def _asks_inplace(node: Node) -> bool:
    """``F.relu(h, inplace=True)``, or ``F.relu(h, True)``: the parameter's place is in the function's signature."""
    if node.kwargs.get("inplace") is True:
        return True
    if node.op != "call_function" or not any(a is True for a in node.args):
        return False
    try:
        bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)  # type: ignore[arg-type]
    except (TypeError, ValueError):  # a builtin without a signature takes no such flag
        return False
    return bound.arguments.get("inplace") is True


@dataclass(frozen=True, slots=True)
class Mode:
    """autocast: the arguments of the innermost ``torch.autocast`` entered in the graph (None: the surrounding state).
    grad: the grad mode last set in the graph (None: the surrounding one)."""

    autocast: tuple[object, ...] | None = None
    grad: bool | None = None


def _modes(nodes: list[Node]) -> dict[Node, Mode]:
    autocast: list[tuple[object, ...] | None] = [None]
    grad: bool | None = None
    modes = {}
    for node in nodes:
        name = target_name(node) if node.op == "call_function" else ""
        if "_enter_autocast" in name:
            autocast.append(node.args)
        elif "_exit_autocast" in name:
            autocast.pop()
        elif "_set_grad_enabled" in name:
            grad = bool(node.args[0])
        modes[node] = Mode(autocast[-1], grad)
    return modes
