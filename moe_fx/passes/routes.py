"""Where a block's ids come from, and what becomes of its routing weights inside.

From the products with expert weights backwards along integers: a node through which every index passes is a candidate
for the ids.  A dense block has no indices; its ids are those from which its shares were scattered.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator

import torch
from torch.fx import Node

from moe_fx.passes.banks import GATHERS, PRODUCTS
from moe_fx.passes.dataflow import Dataflow, fake, is_integer, target_name, tensor, tensors
from moe_fx.passes.id_range import RESHAPES
from moe_fx.passes.readings import rounded
from moe_fx.passes.regions import Region, numel, same

SPREADS = RESHAPES | {"expand", "repeat", "repeat_interleave", "expand_as", "transpose", "permute", "t", "unflatten"}
SPREADS |= {"_unsafe_view"}
CASTS = {"to", "type", "type_as", "float", "half", "bfloat16"}
FILLS = {"zeros", "ones", "full", "empty", "arange", "zeros_like", "ones_like", "empty_like", "full_like", "tensor"}
FILLS |= {"new_zeros", "new_ones", "new_empty", "new_full", "new_tensor", "scalar_tensor"}
_PIECES = {"split", "chunk", "tensor_split", "unbind", "cat", "concat", "stack", "narrow", "getitem", "__getitem__"}
_SELECTIONS = {"topk", "max", "min", "argmax", "argmin", "sort", "argsort"}
_ENDS_OF_SCORES = PRODUCTS | _SELECTIONS | {"embedding", "layer_norm", "rms_norm"}
_CHOSEN = PRODUCTS | GATHERS | _SELECTIONS | {"take_along_dim"}
_COMPARES = {"gt", "lt", "ge", "le", "eq", "ne", "greater", "less", "isclose"}
_NUMERIC = {"add", "sub", "rsub", "mul", "div", "truediv", "where", "masked_fill", "full", "full_like", "new_full"}
_NUMERIC |= {"fill", "iadd", "isub", "imul", "itruediv", "setitem", "clamp", "scatter", "maximum", "minimum"}
_NUMERIC |= _COMPARES
_FADES = {"exp", "exp2", "expm1", "softmax", "log_softmax", "softmin", "sigmoid", "expit", "tanh", "erf", "softplus"}
_FADES |= {"pow"}
_LOUD = 16.0  # exp(-16) shows at the precision of VERIFY
_DENSE_ENDS = 8


def keeps_nothing(node: Node) -> bool:
    """Whether a node takes the shape and dtype of its input alone (``full_like(input, 0.0)``)."""
    name = target_name(node)
    return name in FILLS and (name.endswith("_like") or name.startswith("new_"))


class Routes:
    """Routing of the block around ``uses``, the products with expert weights; ``views`` are those weights, picked or
    rearranged.  weights: the model's parameters and buffers.  derived: what is made of them alone."""

    def __init__(self, flow: Dataflow, uses: list[Node], views: set[Node], weights: set[Node], derived: set[Node]):
        self.flow, self.uses, self.views, self.weights, self.derived = flow, uses, views, weights, derived
        self.seeds = {p for u in uses for p in self._index_sources(u)}
        self.indexed = bool(self.seeds)

    def candidates(self, ends: list[Node]) -> Iterator[tuple[Node, Node]]:
        """(ids, end) to try; a dense block's ids depend on where it ends."""
        if self.indexed:
            yield from itertools.product(self._funnel(self.seeds), ends)
            # indices read off a dense matrix (``share[:, e].nonzero()``): the ids are what it was scattered by
            yield from itertools.product(self._funnel(self._scattered_by(self._floats_behind(self.seeds))), ends)
        else:
            for end in ends[:_DENSE_ENDS]:
                # rows of a block behind a residual lead back to the ids of the block before: without them first
                for rows in (False, True):
                    sources = self._dense_sources(end, rows)
                    behind = self._scattered_by(self._floats_behind(sources))
                    yield from ((ids, end) for found in (behind, sources) for ids in self._funnel(found))

    def _funnel(self, seeds: set[Node]) -> list[Node]:
        """Integer nodes through which every index into the block passes, nearest first."""
        flow = self.flow

        def indexes(node: Node) -> bool:
            return node in flow.integers and node not in self.weights and target_name(node) not in FILLS

        funnel = flow.funnels(seeds, forward=False, keep=lambda n: indexes(n) or target_name(n) == "sort")
        found = [(n, tensor(n)) for n in funnel if n in flow.integers]
        return [n for n, t in found if t is not None and is_integer(t) and t.ndim >= 1]

    def _index_sources(self, use: Node) -> list[Node]:
        """Integer tensors that a product depends on: indices that picked its weights or rows, offsets."""
        flow = self.flow
        found: list[Node] = []
        seen: set[Node] = set()
        stack = list(use.all_input_nodes)
        while stack:
            node = stack.pop()
            if node in seen or node in self.weights or node in self.derived:  # integers there pick no rows
                continue
            seen.add(node)
            if node in flow.integers:
                found.append(node)
            elif node in self.views or target_name(node) in SPREADS | CASTS or node.target is rounded:
                stack += node.all_input_nodes
            elif node not in self.uses:
                indices = [p for p in node.all_input_nodes if p in flow.integers]
                found += indices
                if not indices and target_name(node) in _PIECES:
                    stack += node.all_input_nodes
        return found

    def _floats_behind(self, seeds: Iterable[Node]) -> set[Node]:
        """The nearest floats from which integers were made: what was compared, or asked for what is not zero."""
        flow = self.flow
        found: set[Node] = set()
        seen: set[Node] = set()
        stack = list(seeds)
        while stack:
            node = stack.pop()
            if node in seen or not tensors(node) or target_name(node) in _SELECTIONS:
                continue
            seen.add(node)
            if node in flow.integers:
                stack += flow.preds[node]
            else:
                found.add(node)
        return found

    def _dense_sources(self, end: Node, rows: bool) -> set[Node]:
        """For a block that runs all experts on all tokens: integers that pick from its results, or from which a matrix
        that it multiplies by was scattered."""
        flow = self.flow
        reach = flow.within(self.uses, flow.succs, 0, flow.position[end])
        readers = reach if rows else reach - set(self.uses)
        outer = [p for n in readers for p in n.all_input_nodes if p not in reach]
        picks = {p for p in outer if p in flow.integers}
        return self._routing(picks) | self._scattered_by(p for p in outer if p not in flow.integers)

    def _scattered_by(self, floats: Iterable[Node]) -> set[Node]:
        """Integers that placed or picked values of ``floats``, looked for backwards up to the nearest product."""
        flow = self.flow
        sources: set[Node] = set()
        seen: set[Node] = set()
        stack = list(floats)
        while stack:
            node = stack.pop()
            name = target_name(node).rstrip("_")
            if node in seen or node in self.weights or name in _ENDS_OF_SCORES or name in FILLS:
                continue
            seen.add(node)
            indices = {p for p in node.all_input_nodes if p in flow.integers}
            sources |= indices
            if not indices:
                stack += flow.preds[node]
        return self._routing(sources)

    @staticmethod
    def _routing(sources: set[Node]) -> set[Node]:
        return {s for s in sources if s.op != "placeholder" and target_name(s) not in FILLS}

    def of_router(self, inside: set[Node], ids: Node) -> set[Node]:
        """Routing weights that the ids themselves picked (``scores.gather(1, ids)``) and what was made of them, in
        place too, up to the last [.., k] floats: they are computed before the block, which reads them."""
        flow = self.flow
        hot = flow.within(self.uses, flow.succs, 0, len(flow.nodes))
        before = [n for n in sorted(inside, key=flow.position.__getitem__) if n not in hot]
        for node in reversed(before):
            floats = tensor(node) is not None and node not in flow.integers
            if not floats or not same(numel(node), numel(ids)):
                continue
            made = flow.within([node], flow.preds, 0, flow.position[node]) & inside
            if flow.writes[node] and not made.issuperset(flow.writes[node]):
                continue
            last = {n for n in made if flow.writes[node] and flow.storages[n] & flow.storages[node]} | {node}
            readers = [u for n in made - last for u in flow.users(n)]  # later, all of ``last`` are ``node``
            readers += [u for n in last for u in flow.users(n) if flow.position[u] < flow.position[node]]
            known = made | flow.integers | {ids}
            picked = any(tensors(p) and p not in known for n in made for p in flow.preds[n])
            if picked and not made & hot and all(u in made for u in readers if u in inside):
                return made
        return set()

    def overwritten(self, ids: Node, end: Node) -> Node | None:
        """A write to the ids, or to integers that they are made of: what is known of their source is not true then."""
        flow = self.flow
        storages: set[int] = set()
        seen: set[Node] = set()
        stack = [ids]
        while stack:
            node = stack.pop()
            if node in flow.integers and node not in seen:
                seen.add(node)
                storages |= flow.storages[node]
                stack += flow.preds[node]
        writes = (
            n for n in flow.nodes[: flow.position[end] + 1] for w in flow.writes[n] if flow.storages[w] & storages
        )
        return next(writes, None)

    def reads_values(self, inside: set[Node]) -> bool:
        """Whether the block chooses by what floats are (``share > 0``), not by the ids alone."""
        flow = self.flow
        hot = flow.within(self.uses, flow.succs, 0, len(flow.nodes))
        floats = {n for n in inside - hot if tensors(n) and n not in flow.integers}
        return any(n in flow.integers and not floats.isdisjoint(flow.preds[n]) for n in inside - hot)

    def shaping(self, inside: set[Node], ids: Node) -> set[Node]:
        """What makes the weights of what was chosen (``topk(…)[0].softmax(-1)``): with it their sign is known."""
        flow = self.flow
        read = {p for n in inside for p in n.all_input_nodes if p not in inside and p not in flow.integers}
        made: set[Node] = set()
        stack = [n for n in read if tensor(n) is not None and same(numel(n), numel(ids))]
        while stack:
            node = stack.pop()
            if node in made or target_name(node) in _CHOSEN or node.op in ("placeholder", "get_attr"):
                continue
            made.add(node)
            stack += [p for p in node.all_input_nodes if tensor(p) is not None]
        small = all(same(numel(n), numel(ids)) or same(numel(n) * fake(ids).shape[-1], numel(ids)) for n in made)  # type: ignore[operator]
        return made if small else set()

    def scores(self, region: Region) -> Node | None:
        """The last [T, E] (else [E, T]) float matrix made from the ids and not from x, where the block does not gather
        by ids, or where the routing weights (or the matrix that it reads instead) act through it alone."""
        flow = self.flow
        hot, routed = {region.x}, {region.ids}
        for node in region.nodes:
            for kind in (hot, routed):
                if not kind.isdisjoint(flow.preds[node]) and not keeps_nothing(node):
                    kind.update((node, *flow.writes[node]))
        found = [
            (not by_expert, flow.position[n], n)
            for n in region.nodes
            if n in routed and n not in hot and (by_expert := self._by_expert(n, region)) is not None
        ]
        matrix = max(found, key=lambda f: f[:2])[2] if found else None
        sources = {n for n in (region.weights, region.dense) if n is not None}
        if matrix is None or (self.indexed and not self._only_through(matrix, region, sources)):
            return None
        return matrix

    def faint(self, region: Region) -> Node | None:
        """Where the routing weights, or places and counts, meet a number that samples pass by: -1e4 before a softmax,
        which leaves the others out only while logits are small; 5000 before a sigmoid, which shows in long inputs only;
        a limit other than 0 that tells who has a share."""
        flow = self.flow
        hot: set[Node] = {region.x}
        carrying = {n for n in (region.weights, region.dense) if n is not None}
        cold: list[Node] = []
        for node in region.nodes:
            for kind in (hot, carrying):
                if not kind.isdisjoint(flow.preds[node]) and not keeps_nothing(node):
                    kind.add(node)
            if node not in hot and tensors(node):
                cold.append(node)
        fades = any(target_name(n).strip("_").removeprefix("special_") in _FADES for n in cold)
        for node in cold:
            name, t = target_name(node).strip("_"), tensor(node)
            leaves = torch.utils._pytree.tree_leaves((node.args, node.kwargs))
            numbers = [abs(a) for a in leaves if isinstance(a, float) or (type(a) is int and name in _NUMERIC)]
            compared = {p for p in node.all_input_nodes if p not in flow.integers} if name in _COMPARES else set()
            compares = region.scores is not None and not compared.isdisjoint(carrying)
            lowest = torch.finfo(t.dtype).max if t is not None and t.is_floating_point() else math.inf
            if any((fades and _LOUD < a < lowest) or (compares and a) for a in numbers):
                return node
        return None

    def _by_expert(self, node: Node, region: Region) -> bool | None:
        """Whether a float matrix with one number for each token and expert is [E, T]; None where it is none."""
        t, experts = tensor(node), region.down.sizes[0]
        if t is None or t.ndim < 2 or node in self.flow.integers:
            return None
        if not same(numel(node) * region.hidden, numel(region.x) * experts):  # type: ignore[operator]
            return None
        if same(t.shape[-1], experts):
            return False
        return True if t.ndim == 2 and same(t.shape[0], experts) else None

    def _only_through(self, matrix: Node, region: Region, sources: set[Node]) -> bool:
        """Whether every way from ``sources`` to the result leads through ``matrix``."""
        flow, own = self.flow, self.flow.storages[matrix]
        carrying, passed = set(sources), False
        for node in region.nodes:
            if carrying.isdisjoint(flow.preds[node]) or keeps_nothing(node):
                continue
            if node is matrix or any(flow.storages[w] & own for w in flow.writes[node]):
                passed = True
            else:
                carrying.add(node)
        return passed and region.end not in carrying
