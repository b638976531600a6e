"""FIND: from expert weights to the closed region between {hidden states, ids, routing weights} and the combined output.

No module names and no spelling decide.  From the products with expert weights, forward: the first node through which
everything passes and which has the size of the hidden states is the end.  Backward along integers: a node through which
every index passes is a candidate for the ids.  The region is what lies between; it must read one hidden-states tensor
and at most one routing-weights tensor, let no inner value out, and write nothing that it does not own.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice

from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from moe_fx.passes.additions import Start, start_of
from moe_fx.passes.banks import Bank, find_banks, partners
from moe_fx.passes.computed import Computed, find_computed
from moe_fx.passes.dataflow import Dataflow, fake, target_name, tensor, tensors, value
from moe_fx.passes.effects import effects
from moe_fx.passes.readings import rounded
from moe_fx.passes.regions import Region, numel, same
from moe_fx.passes.routes import CASTS, FILLS, SPREADS, Routes, keeps_nothing
from moe_fx.reasons import Reject

_DISTANCE = {"find.no_exit": 1, "find.inputs": 2}  # a candidate that failed on these was further from a block
_MAX_ENDS = 24


@dataclass(slots=True)
class Found:
    """Result of FIND: regions, one (anchor node, reasons) for every place that looked like a block and is none, and by
    their nodes the weights that the graph computes."""

    regions: list[Region] = field(default_factory=list)
    rejects: list[tuple[Node, list[Reject]]] = field(default_factory=list)
    computed: dict[tuple[Node, ...], Computed] = field(default_factory=dict)


def find_regions(graph: Graph, weights: set[Node]) -> Found:
    """All regions of one graph.  ``weights``: placeholders that are parameters or buffers of the model."""
    flow = Dataflow(graph)
    found = Found()
    derived = flow.derived(weights)
    free: list[Bank] = []
    misses: dict[Bank, list[Reject]] = {}
    tried: set[Bank] = set()
    found.computed = {group.nodes: group for group in find_computed(flow, weights, derived)}
    # matrices made of floats are in many layers (weights viewed as groups): those that do not fit are no near misses
    plain = {nodes for nodes, group in found.computed.items() if not group.of_codes}
    for down in find_banks(flow, weights, list(found.computed)):
        if not derived.isdisjoint(down.uses):
            continue  # a product of weights alone makes weights
        for ups in partners(flow, free, down):
            result = _Finder(flow, ups, down, weights, derived).find()
            if isinstance(result, Region):
                found.regions.append(result)
                free = [b for b in free if b not in ups]
                for bank in (down, *ups):
                    misses.pop(bank, None)
                break
            if down.params not in plain:
                misses.setdefault(down, result)
            tried.update(ups)
        else:
            free.append(down)
            if (
                down not in misses
                and down.params not in plain
                and (reject := _Finder(flow, [], down, weights, derived).no_partner())
            ):
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
        self.uses = [u for bank in banks for u in bank.uses]
        self.where = self.uses[0].name
        views = {v for bank in banks for v in bank.views}
        self.routes = Routes(flow, self.uses, views, weights, derived)

    def no_partner(self) -> Reject | None:
        """Why a bank alone is no block; None when no ids lead to it either (a convolution, a stacked embedding)."""
        if not self.routes.indexed:
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
        for apart, (ids, end) in itertools.product((False, True), list(self.routes.candidates(ends))):
            if apart and (best is not None or not self.routes.indexed):
                break
            result = self._carve(ids, end, apart)
            if isinstance(result, Reject):
                misses.append(result)
            elif (result.weights or result.dense) and result.top_k < self.down.sizes[0]:
                return result
            else:
                best = result if best is None or (best.weights is None and result.weights is not None) else best
        if best is not None:
            return best
        if not misses:
            return [Reject("find.no_routing", "no integer expert ids lead to these expert weights", self.where)]
        ranked = sorted(dict.fromkeys(misses), key=lambda r: _DISTANCE.get(r.code, 0))
        return ranked[:6]

    def ends(self) -> Iterable[Node]:
        flow = self.flow
        last_use = max(flow.position[u] for u in self.uses)
        for node in flow.funnels(self.uses, forward=True, keep=lambda n: n in flow.live and n.op != "output"):
            if flow.position[node] >= last_use and (tensors(node) or flow.writes[node]):
                yield node

    def _carve(self, ids: Node, end: Node, apart: bool = False) -> Region | Reject:
        flow = self.flow
        low, high = flow.position[ids], flow.position[end]
        if high <= low:
            return Reject("find.no_exit", "the ids are computed after the result", end.name)
        if (write := self.routes.overwritten(ids, end)) is not None:
            return Reject("find.effect", f"{write.name} writes to what the ids are made of", write.name)
        from_ids = flow.within([ids, *self.uses], flow.succs, 0, high) - {ids}
        inside = from_ids & flow.within([end], flow.preds, 0, high)
        if apart:
            inside -= self.routes.of_router(inside, ids)
        elif self.routes.reads_values(inside) and (made := self.routes.shaping(inside, ids)):
            result = self._close(inside | made, ids, end)
            if isinstance(result, Region) and result.scores is not None:
                return result
        return self._close(inside, ids, end)

    def _close(self, inside: set[Node], ids: Node, end: Node) -> Region | Reject:
        """The region of these nodes and of what belongs to them alone."""
        flow = self.flow
        start = start_of(flow, inside, end)
        self._absorb(inside, ids, flow.position[end], start)
        if start is not None and start.node in inside:
            start = None
        boundary = self._boundary(inside)
        roles = [b for b in boundary if start is None or b is not start.node or start.read_otherwise(inside)]
        result = self._classify(roles, inside, ids)
        if isinstance(result, Reject):
            return result
        (x, *dense), weights, params, sizes = result
        if start is None:
            end = self._widen(inside, end)
        elif start.node not in roles:
            sizes.append(start.node)
        out, aliases = self._leaving(inside, end, start)
        if out is None:
            return Reject("find.no_exit", "the result is not one tensor", end.name)
        if not same(numel(out), numel(x)):
            return Reject("find.no_exit", f"{out.name} has not the size of the hidden states {x.name}", out.name)
        sizes += dense
        nodes = sorted(inside, key=flow.position.__getitem__)
        onto = () if start is None else tuple((nodes.index(op), i) for op, i in start.edges)
        region = Region(nodes, x, ids, weights, end, out, aliases, self.ups, self.down, params, sizes)
        region.masked, region.onto = bool(dense), onto
        if not same(numel(ids) * region.hidden, numel(x) * region.top_k):  # type: ignore[operator]
            return Reject("find.inputs", f"{ids.name} has no fixed number of ids per row of {x.name}", ids.name)
        region.scores = self.routes.scores(region)
        if (faint := self.routes.faint(region)) is not None:
            return Reject("match.weights", f"{faint.name} decides by a number that samples may pass by", faint.name)
        if reject := effects(flow, region, self._boundary(inside), self.derived):
            return reject
        if region.dense is not None and (region.scores is None or region.training):
            text = (
                f"reads {region.dense.name} besides {x.name}: {'its gradient' if region.scores else 'more than shares'}"
            )
            return Reject("find.inputs", text, region.dense.name)
        if region.scores is not None and region.training and weights is not None and fake(weights).ndim > 2:
            region.scores = None  # VERIFY follows gradients through scores to weights [T, k] only
        return region

    def _absorb(self, inside: set[Node], ids: Node, high: int, start: Start | None) -> None:
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
                own = all(flow.position[u] > high for u in readers) if target_name(node) in FILLS else not readers
                spread = own and len(sources) == 1 and self._spreads(node, sources[0], ids)
                fill = target_name(node) in FILLS and all(p in inside or keeps_nothing(node) for p in sources)
                kept = start is not None and node is start.node and not fill
                if tensors(node) and not kept and (node in self.derived or spread or (fill and own)):
                    inside.add(node)
                    grew = True

    @staticmethod
    def _spreads(node: Node, source: Node, ids: Node) -> bool:
        """Whether ``node`` rearranges or rounds ``source``, or picks slots of the routing weights (``w[:, k]``)."""
        if tensor(node) is None or tensor(source) is None:
            return False
        if target_name(node) in SPREADS or node.target is rounded:
            return True
        return target_name(node) in ("getitem", "__getitem__", "select") and (
            same(numel(node), numel(source)) or same(numel(source), numel(ids))
        )

    def _only_shape(self, node: Node, inside: set[Node]) -> bool:
        """Whether the block asks ``node`` for its shape and dtype alone (``full_like(node, …)``)."""
        return all(keeps_nothing(u) for u in self.flow.users(node) if u in inside)

    def _boundary(self, inside: set[Node]) -> list[Node]:
        """What the block reads, in order; writes to that before the block are no inputs of their own."""
        reads = {p: None for n in sorted(inside, key=self.flow.position.__getitem__) for p in n.all_input_nodes}
        return [p for p in reads if p not in inside]

    def _classify(
        self, boundary: list[Node], inside: set[Node], ids: Node
    ) -> tuple[list[Node], Node | None, list[Node], list[Node]] | Reject:
        """The boundary as ([x] or [x, dense scores], routing weights, other parameters, sizes)."""
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
        if len(hidden) == 2 and not weights:
            hidden = next((pair for pair in (hidden, hidden[::-1]) if self._is_dense(*pair)), hidden)
        if len(weights) > 1 or not (len(hidden) == 1 or (len(hidden) == 2 and not weights and self._is_dense(*hidden))):
            shapes = ", ".join(f"{n.name} {list(fake(n).shape)}" for n in (*hidden, *weights))
            return Reject("find.inputs", f"reads {shapes or 'no hidden states'}; ids are {ids.name}", self.where)
        return hidden, (weights[0] if weights else None), params, sizes

    def _is_dense(self, x: Node, other: Node) -> bool:
        """Whether ``other`` has one number for each row of ``x`` and each expert."""
        experts, t = self.down.sizes[0], fake(other)
        size = numel(other) * fake(x).shape[-1]  # type: ignore[operator]
        return t.ndim >= 2 and same(t.shape[-1], experts) and same(size, numel(x) * experts)  # type: ignore[operator]

    def _widen(self, inside: set[Node], end: Node) -> Node:
        """Takes trailing casts along: they are free inside the op."""
        flow = self.flow
        while True:
            users = flow.users(end)
            if len(users) != 1 or target_name(users[0]) not in CASTS or flow.writes[users[0]]:
                return end
            following = users[0]
            if any(tensors(p) and p is not end and p not in inside for p in flow.preds[following]):
                return end
            inside.add(following)
            end = following

    def _leaving(self, inside: set[Node], end: Node, start: Start | None) -> tuple[Node | None, list[Node]]:
        """(the node whose value leaves, others of its storage that are read after the end).  An in-place accumulation
        ends in a write; what is read afterwards is the tensor that it wrote to."""
        flow = self.flow
        out = end if tensor(end) is not None else next(iter(flow.writes[end]), None)
        if out is None or tensor(out) is None or (out not in inside and (start is None or out is not start.node)):
            return None, []
        last = flow.position[end]
        owners = inside if start is None else flow.nodes[:last]  # views of a start are anywhere before
        shared = [n for n in owners if n is not out and flow.storages[n] & flow.storages[out]]
        return out, [n for n in shared if any(flow.position[u] > last for u in flow.users(n))]
