"""FIND: from expert weights to the closed region between {hidden states, ids, routing weights} and the combined output.

No module names and no spelling decide.  From the products with expert weights, forward: the first node through which
everything passes and which has the size of the hidden states is the end.  Backward along integers: a node through which
every index passes is a candidate for the ids.  The region is what lies between; it must read one hidden-states tensor
and at most one routing-weights tensor, let no inner value out, and write nothing that it does not own.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice

from torch._ops import OpOverload
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from moe_fx.passes.banks import PRODUCTS, Bank, find_banks, partners
from moe_fx.passes.dataflow import Dataflow, fake, is_integer, target_name, tensor, tensors, value
from moe_fx.passes.regions import Region, numel, same
from moe_fx.reasons import Reject

_RESHAPES = {"reshape", "view", "flatten", "unsqueeze", "squeeze", "contiguous", "clone", "detach", "_unsafe_view"}
_SPREADS = _RESHAPES | {"expand", "repeat", "repeat_interleave", "expand_as", "transpose", "permute", "t", "unflatten"}
_CASTS = {"to", "type", "type_as", "float", "half", "bfloat16"}
_FILLS = {"zeros", "ones", "full", "empty", "arange", "zeros_like", "ones_like", "empty_like", "full_like", "tensor"}
_FILLS |= {"new_zeros", "new_ones", "new_empty", "new_full", "new_tensor", "scalar_tensor"}
_PIECES = {"split", "chunk", "tensor_split", "unbind", "cat", "concat", "stack", "narrow", "getitem", "__getitem__"}
_ENDS_OF_SCORES = PRODUCTS | {"topk", "softmax", "embedding", "layer_norm", "rms_norm"}
_DISTANCE = {"find.no_exit": 1, "find.inputs": 2}  # a candidate that failed on these was further from a block
_MAX_ENDS = 24
_DENSE_ENDS = 8


@dataclass(slots=True)
class Found:
    """Result of FIND: regions, and one (anchor node, reasons) for every place that looked like a block and is none."""

    regions: list[Region] = field(default_factory=list)
    rejects: list[tuple[Node, list[Reject]]] = field(default_factory=list)


def find_regions(graph: Graph, weights: set[Node]) -> Found:
    """All regions of one graph.  ``weights``: placeholders that are parameters or buffers of the model."""
    flow = Dataflow(graph)
    found = Found()
    derived = flow.derived(weights)
    free: list[Bank] = []
    misses: dict[Bank, list[Reject]] = {}
    tried: set[Bank] = set()
    for down in find_banks(flow, weights):
        for ups in partners(flow, free, down):
            result = _Finder(flow, ups, down, weights, derived).find()
            if isinstance(result, Region):
                found.regions.append(result)
                free = [b for b in free if b not in ups]
                for bank in (down, *ups):
                    misses.pop(bank, None)
                break
            misses.setdefault(down, result)
            tried.update(ups)
        else:
            free.append(down)
            if down not in misses and (reject := _Finder(flow, [], down, weights, derived).no_partner()):
                misses[down] = [reject]
    if not found.regions and not misses:
        found.rejects = _selections(flow)
        return found
    found.rejects = [(bank.uses[0], rejects) for bank, rejects in misses.items() if bank not in tried]
    return found


def _selections(flow: Dataflow) -> list[tuple[Node, list[Reject]]]:
    """Where nothing looks like experts: selections that look like routing."""
    text = "a selection of k out of many leads to no expert matrices: neither one [E, a, b] nor E numbered alike"
    return [
        (node, [Reject("find.no_experts", text, node.name)])
        for node in flow.nodes
        if target_name(node) in ("topk", "one_hot") and node in flow.live
    ]


class _Finder:
    """FIND for one pair of banks."""

    def __init__(self, flow: Dataflow, ups: list[Bank], down: Bank, weights: set[Node], derived: set[Node]):
        self.flow, self.ups, self.down, self.weights, self.derived = flow, ups, down, weights, derived
        banks = [*ups, down]
        self.params = {p for bank in banks for p in bank.params}
        self.views = {v for bank in banks for v in bank.views}
        self.uses = [u for bank in banks for u in bank.uses]
        self.experts = banks[0].sizes[0]
        self.where = self.uses[0].name
        self.indexed = True

    def no_partner(self) -> Reject | None:
        """Why a bank alone is no block; None when no ids lead to it either (a convolution, a stacked embedding)."""
        if not any(self._index_sources(u) for u in self.uses):
            return None
        sizes = list(self.down.sizes)
        return Reject("match.products", f"expert weights {sizes} have no second projection that fits", self.where)

    def find(self) -> Region | list[Reject]:
        """The region, or every reason why none of the candidates is one (the nearest misses first)."""
        misses: list[Reject] = []
        ends = list(islice(self.ends(), _MAX_ENDS))
        if not ends:
            return [Reject("find.no_exit", "the experts' results do not come together in one tensor", self.where)]
        best: Region | None = None
        for apart, (ids, end) in itertools.product((False, True), list(self._candidates(ends))):
            if apart and (best is not None or not self.indexed):
                break
            result = self._carve(ids, end, apart)
            if isinstance(result, Reject):
                misses.append(result)
            elif result.weights is not None:
                return result
            else:
                best = best or result
        if best is not None:
            return best
        if not misses:
            return [Reject("find.no_routing", "no integer expert ids lead to these expert weights", self.where)]
        ranked = sorted(dict.fromkeys(misses), key=lambda r: _DISTANCE.get(r.code, 0))
        return ranked[:6]

    def _candidates(self, ends: list[Node]) -> Iterator[tuple[Node, Node]]:
        """(ids, end) to try; a dense block's ids depend on where it ends."""
        seeds = {p for u in self.uses for p in self._index_sources(u)}
        self.indexed = bool(seeds)
        if seeds:
            yield from itertools.product(self._funnel(seeds), ends)
        else:
            for end in ends[:_DENSE_ENDS]:
                # rows of a block behind a residual lead back to the ids of the block before: without them first
                for rows in (False, True):
                    yield from ((ids, end) for ids in self._funnel(self._dense_sources(end, rows)))

    def ends(self) -> Iterable[Node]:
        flow = self.flow
        last_use = max(flow.position[u] for u in self.uses)
        for node in flow.funnels(self.uses, forward=True, keep=lambda n: n in flow.live and n.op != "output"):
            if flow.position[node] >= last_use and (tensors(node) or flow.writes[node]):
                yield node

    def _funnel(self, seeds: set[Node]) -> list[Node]:
        """Integer nodes through which every index into the block passes, nearest first."""
        flow = self.flow

        def indexes(node: Node) -> bool:
            return node in flow.integers and node not in self.weights and target_name(node) not in _FILLS

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
            if node in seen or node in self.weights:
                continue
            seen.add(node)
            if node in flow.integers:
                found.append(node)
            elif node in self.views or target_name(node) in _SPREADS | _CASTS:
                stack += node.all_input_nodes
            elif node not in self.uses:
                indices = [p for p in node.all_input_nodes if p in flow.integers]
                found += indices
                if not indices and target_name(node) in _PIECES:
                    stack += node.all_input_nodes
        return found

    def _dense_sources(self, end: Node, rows: bool) -> set[Node]:
        """For a block that runs all experts on all tokens: integers that pick from its results, or from which a matrix
        that it multiplies by was scattered, looked for backwards no further than the nearest product."""
        flow = self.flow
        reach = flow.within(self.uses, flow.succs, 0, flow.position[end])
        readers = reach if rows else reach - set(self.uses)
        outer = [p for n in readers for p in n.all_input_nodes if p not in reach]
        sources = {p for p in outer if p in flow.integers}
        seen: set[Node] = set()
        stack = [p for p in outer if p not in flow.integers]
        while stack:
            node = stack.pop()
            name = target_name(node).rstrip("_")
            if node in seen or node in self.weights or name in _ENDS_OF_SCORES or name in _FILLS:
                continue
            seen.add(node)
            indices = {p for p in node.all_input_nodes if p in flow.integers}
            sources |= indices
            if not indices:
                stack += flow.preds[node]
        return {s for s in sources if s.op != "placeholder" and target_name(s) not in _FILLS}

    def _carve(self, ids: Node, end: Node, apart: bool = False) -> Region | Reject:
        flow = self.flow
        low, high = flow.position[ids], flow.position[end]
        if high <= low:
            return Reject("find.no_exit", "the ids are computed after the result", end.name)
        from_ids = flow.within([ids, *self.uses], flow.succs, 0, high) - {ids}
        inside = from_ids & flow.within([end], flow.preds, 0, high)
        if apart:
            inside -= self._of_router(inside, ids)
        self._absorb(inside, ids, high)
        boundary = self._boundary(inside)
        result = self._classify(boundary, inside, ids)
        if isinstance(result, Reject):
            return result
        x, weights, params, sizes = result
        end = self._widen(inside, end)
        out, aliases = self._leaving(inside, end)
        if out is None:
            return Reject("find.no_exit", "the result is not one tensor", end.name)
        if not same(numel(out), numel(x)):
            return Reject("find.no_exit", f"{out.name} has not the size of the hidden states {x.name}", out.name)
        nodes = sorted(inside, key=flow.position.__getitem__)
        region = Region(nodes, x, ids, weights, end, out, aliases, self.ups, self.down, params, sizes)
        if not same(numel(ids) * region.hidden, numel(x) * region.top_k):  # type: ignore[operator]
            return Reject("find.inputs", f"{ids.name} has no fixed number of ids per row of {x.name}", ids.name)
        if not self.indexed:
            region.scores = self._scores(region)
        return self._effects(region, set(inside), self._boundary(inside)) or region

    def _of_router(self, inside: set[Node], ids: Node) -> set[Node]:
        """Routing weights that the ids themselves picked (``scores.gather(1, ids)``) and what was made of them, up to
        the last [.., k] floats: they are computed before the block, which reads them."""
        flow = self.flow
        hot = flow.within(self.uses, flow.succs, 0, len(flow.nodes))
        before = [n for n in sorted(inside, key=flow.position.__getitem__) if n not in hot]
        for node in reversed(before):
            floats = tensor(node) is not None and node not in flow.integers
            if not floats or not same(numel(node), numel(ids)) or flow.writes[node]:
                continue
            made = flow.within([node], flow.preds, 0, flow.position[node]) & inside
            outside = [u for n in made - {node} for u in flow.users(n) if u in inside and u not in made]
            known = made | flow.integers | {ids}
            picked = any(tensors(p) and p not in known for n in made for p in flow.preds[n])
            if picked and not outside and not made & hot:
                return made
        return set()

    def _scores(self, region: Region) -> Node | None:
        """The last [T, E] (else [E, T]) float matrix made from the ids and not from x."""
        flow = self.flow
        hot = {region.x}
        found: list[tuple[bool, int, Node]] = []
        for node in region.nodes:
            t = tensor(node)
            if any(p in hot for p in flow.preds[node]):
                hot.add(node)
            elif t is not None and t.ndim == 2 and node not in flow.integers and node not in self.derived:
                by_token = same(t.shape[1], self.experts)
                if by_token or same(t.shape[0], self.experts):
                    found.append((by_token, flow.position[node], node))
        return max(found, key=lambda f: f[:2])[2] if found else None

    def _absorb(self, inside: set[Node], ids: Node, high: int) -> None:
        """Adds what only the block uses and what carries no data: reshapes, casts of parameters, fills, assertions."""
        flow = self.flow
        grew = True
        while grew:
            grew = False
            for node in self._boundary(inside):
                if node.op in ("placeholder", "get_attr") or node is ids or flow.writes[node] or node in self.params:
                    continue
                sources = [p for p in flow.preds[node] if tensors(p)]
                readers = [u for u in flow.users(node) if u not in inside and not flow.is_assertion(u)]
                own = all(flow.position[u] > high for u in readers) if target_name(node) in _FILLS else not readers
                spread = own and len(sources) == 1 and self._spreads(node, sources[0], ids)
                fill = target_name(node) in _FILLS and all(p in inside or self._keeps_nothing(node) for p in sources)
                if tensors(node) and (node in self.derived or spread or (fill and own)):
                    inside.add(node)
                    grew = True

    @staticmethod
    def _spreads(node: Node, source: Node, ids: Node) -> bool:
        """Whether ``node`` only rearranges ``source``, or picks slots of the routing weights (``w[:, k]``)."""
        if tensor(node) is None or tensor(source) is None:
            return False
        if target_name(node) in _SPREADS:
            return True
        return target_name(node) in ("getitem", "__getitem__", "select") and (
            same(numel(node), numel(source)) or same(numel(source), numel(ids))
        )

    def _only_shape(self, node: Node, inside: set[Node]) -> bool:
        """Whether the block asks ``node`` for its shape and dtype alone (``full_like(node, …)``)."""
        return all(target_name(u) in _FILLS and self._keeps_nothing(u) for u in self.flow.users(node) if u in inside)

    @staticmethod
    def _keeps_nothing(node: Node) -> bool:
        return target_name(node).endswith("_like") or target_name(node).startswith("new_")

    def _boundary(self, inside: set[Node]) -> list[Node]:
        reads = {p: None for n in sorted(inside, key=self.flow.position.__getitem__) for p in self.flow.preds[n]}
        return [p for p in reads if p not in inside]

    def _classify(
        self, boundary: list[Node], inside: set[Node], ids: Node
    ) -> tuple[Node, Node | None, list[Node], list[Node]] | Reject:
        """The boundary as (x, routing weights, other parameters, sizes)."""
        params: list[Node] = []
        sizes: list[Node] = []
        weights: list[Node] = []
        hidden: list[Node] = []
        for node in boundary:
            if node is ids or node in self.params:
                continue
            t = tensor(node)
            if not tensors(node) and free_unbacked_symbols(value(node)):
                return Reject("find.inputs", f"reads {node.name}, a size that depends on data", node.name)
            if not tensors(node) or self._only_shape(node, inside):
                sizes.append(node)
            elif t is None or node in self.flow.integers:
                return Reject("find.inputs", f"reads {node.name} besides the ids {ids.name}", node.name)
            elif node in self.weights:
                params.append(node)
            elif same(numel(node), numel(ids)):
                weights.append(node)
            else:
                hidden.append(node)
        if len(hidden) != 1 or len(weights) > 1:
            shapes = ", ".join(f"{n.name} {list(fake(n).shape)}" for n in (*hidden, *weights))
            return Reject("find.inputs", f"reads {shapes or 'no hidden states'}; ids are {ids.name}", self.where)
        return hidden[0], (weights[0] if weights else None), params, sizes

    def _widen(self, inside: set[Node], end: Node) -> Node:
        """Takes trailing casts along: they are free inside the op."""
        flow = self.flow
        while True:
            users = flow.users(end)
            if len(users) != 1 or target_name(users[0]) not in _CASTS or flow.writes[users[0]]:
                return end
            following = users[0]
            if any(tensors(p) and p is not end and p not in inside for p in flow.preds[following]):
                return end
            inside.add(following)
            end = following

    def _leaving(self, inside: set[Node], end: Node) -> tuple[Node | None, list[Node]]:
        """(the node whose value leaves, others of its storage that are read after the end).  An in-place accumulation
        ends in a write; what is read afterwards is the tensor that it wrote to."""
        flow = self.flow
        out = end if tensor(end) is not None else next(iter(flow.writes[end]), None)
        if out is None or tensor(out) is None or out not in inside:
            return None, []
        shared = [n for n in inside if n is not out and flow.storages[n] & flow.storages[out]]
        last = flow.position[end]
        return out, [n for n in shared if any(flow.position[u] > last for u in flow.users(n))]

    def _effects(self, region: Region, inside: set[Node], boundary: list[Node]) -> Reject | None:
        """Values that escape, writes to foreign tensors, mode switches, random numbers."""
        flow = self.flow
        end = flow.position[region.end]
        shared = flow.storages[region.out]
        for node in region.nodes:
            if node in self.derived:
                continue  # stays in the graph for its other readers
            late = node in (region.out, *region.aliases) or any(flow.storages[w] & shared for w in flow.writes[node])
            for user in flow.users(node):
                if user not in inside and not flow.is_assertion(user) and not (late and flow.position[user] > end):
                    return Reject("find.escape", f"{node.name} is also used by {user.name}", node.name)
            if flow.is_random(node):
                return Reject("find.effect", f"{node.name} draws random numbers", node.name)
            if isinstance(node.target, OpOverload) and "c10d" in node.target.namespace:
                return Reject("find.effect", f"{node.name} communicates with other processes", node.name)
        for node in region.aliases:
            if fake(node).shape != fake(region.out).shape:
                return Reject("find.escape", f"{node.name} views the result in another shape", node.name)
        outer = {s for b in boundary for s in flow.storages[b]}
        start = flow.position[region.nodes[0]]
        for node in flow.nodes[start : end + 1]:
            for written in flow.writes[node]:
                if flow.storages[written] & outer:
                    text = f"{node.name} writes to {written.name}, which the block reads"
                    return Reject("find.effect", text, node.name)
        later = (n for n in flow.nodes[end + 1 :] if any(flow.storages[w] & outer for w in flow.writes[n]))
        region.overwritten = next((n.name for n in later), "")
        if flow.storages[region.out] & outer:
            return Reject("find.escape", f"the result {region.out.name} is a view of an input", region.out.name)
        floats = [n for n in region.nodes if tensors(n) and n not in flow.integers]
        if len({flow.modes[n] for n in floats}) > 1:
            return Reject("find.autocast", "autocast or grad mode changes inside the block", region.nodes[0].name)
        region.mode = flow.modes[floats[0]]
        return None
