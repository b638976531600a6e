"""FIND for routers: from the ids and weights that a fused experts call reads, back to the logits.

before the call: logits [T, E] → softmax, topk, gather, division … → ids, weights [T, k]

A place through which everything passes, and which is a float [.., E], may be the logits.  Parameters and buffers (and
what is computed from them alone) may enter beside it, nothing else.  Inner values may have other readers: they stay.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from moe_fx.passes.banks import PRODUCTS
from moe_fx.passes.dataflow import Dataflow, Mode, fake, identity, target_name, tensor, tensors
from moe_fx.passes.fingerprint import describe_value, text_of
from moe_fx.passes.regions import same
from moe_fx.reasons import Reject
from moe_fx.spec import parse

_SHAPE_ONLY = {"type_as", "expand_as", "view_as", "reshape_as"}  # of their second argument they read shape or dtype
_STOPS = PRODUCTS | {"embedding", "layer_norm", "rms_norm", "moe", "experts"}
_MIXES_ROWS = {"cumsum", "cumprod", "cummax", "cummin", "bincount", "histc"}  # capacity, position
_MAX_INNER = 80


@dataclass(slots=True)
class RouterRegion:
    """A router in the graph.

    nodes: in order of position.  logits: [.., E], the one tensor that it reads besides params (of E elements each),
    likes (tensors of which only shape and dtype count) and sizes (numbers).  ids, weights: what the call reads.
    experts, top_k: E and k.  mode: autocast and grad mode around it.
    """

    nodes: list[Node]
    logits: Node
    params: list[Node]
    likes: list[Node]
    sizes: list[Node]
    ids: Node
    weights: Node
    experts: int
    top_k: int
    mode: Mode

    @property
    def inputs(self) -> list[Node]:
        """Order of the placeholders of ``module``."""
        return [self.logits, *self.params, *self.likes, *self.sizes]

    def module(self) -> GraphModule:
        """The region alone, from ``inputs`` to (ids, weights)."""
        graph = Graph()
        copies: dict[Node, Node] = {}
        for node in self.inputs:
            copies[node] = graph.placeholder(node.name)
        for node in self.nodes:
            copies[node] = graph.node_copy(node, copies.__getitem__)
        graph.output((copies[self.ids], copies[self.weights]))
        owner = self.ids.graph.owning_module
        return GraphModule(owner if owner is not None else torch.nn.Module(), graph)

    def key(self, *context: object) -> str:
        """One text for regions that mean the same: targets, constants, wiring, shapes, strides and dtypes."""
        names: dict[Node, str] = {}
        symbols: dict[str, str] = {}
        storages: dict[int, int] = {}
        lines = [repr((context, self.mode, self.experts, self.top_k, len(self.params), len(self.likes)))]
        for i, node in enumerate(self.inputs):
            names[node] = f"i{i}"
            lines.append(describe_value(node.meta.get("example_value", node.meta.get("val")), symbols, storages))
        for i, node in enumerate(self.nodes):
            names[node] = f"n{i}"
            lines.append(f"{node.op} {identity(node)} {text_of((node.args, node.kwargs), names, symbols)}")
        return "\n".join([*lines, names[self.ids], names[self.weights]])


def find_routers(flow: Dataflow, call: Node, weights: set[Node]) -> list[RouterRegion | Reject]:
    """Regions that may be the router of an experts call, that of the nearest logits first, and why others may not; at
    least one."""
    ids, routing = call.args[1], call.args[2]
    assert isinstance(ids, Node) and isinstance(routing, Node)
    experts, top_k = _experts_of(call), int(fake(ids).shape[-1])
    still = flow.derived(weights) | weights
    seeds = _with_writers(flow, call, [ids, routing])
    found: list[RouterRegion | Reject] = []
    widths: list[int] = []
    for node in _funnels(flow, seeds, still):
        t = tensor(node)
        if t is None or not t.is_floating_point() or node in (ids, routing):
            continue
        width = t.shape[-1] if t.ndim > 1 else 0
        rows = math.prod(t.shape[:-1])
        if not same(rows * top_k, math.prod(fake(ids).shape)):
            continue
        if width != experts:
            widths += [int(width)] if width not in (top_k, 1) else []
            continue
        found.append(_carve(flow, call, node, seeds, still))
    if not found:
        text = (
            f"{widths[0]} logits for {experts} experts" if widths else "ids and weights come from no one tensor [T, E]"
        )
        found.append(Reject("find.inputs", f"router: {text}", ids.name))
    return found


def _experts_of(call: Node) -> int:
    return parse(str(call.args[4])).expert.experts


def _with_writers(flow: Dataflow, call: Node, nodes: list[Node]) -> list[Node]:
    """``nodes``, and what writes to them before the call."""
    storages = set().union(*(flow.storages[n] for n in nodes))
    writers = [p for p in flow.preds[call] if any(flow.storages[w] & storages for w in flow.writes[p])]
    return list(dict.fromkeys([*nodes, *writers]))


def _data(flow: Dataflow, node: Node, still: set[Node]) -> list[Node]:
    """Nodes whose values ``node`` needs: tensors that are no parameters, and not those asked for their shape alone."""
    likes = _likes(node)
    return [p for p in flow.preds[node] if tensors(p) and p not in still and p not in likes]


def _likes(node: Node) -> set[Node]:
    """Arguments that give shape or dtype alone."""
    name = target_name(node)
    if name.endswith("_like") or name.startswith("new_"):
        return {a for a in node.args[:1] if isinstance(a, Node)}
    if name in _SHAPE_ONLY or name == "to":
        return {a for a in node.args[1:2] if isinstance(a, Node) and a is not node.args[0]}
    return set()


def _funnels(flow: Dataflow, seeds: list[Node], still: set[Node]) -> Iterator[Node]:
    """Nodes through which every value of ``seeds`` comes, nearest first, up to the first product."""
    heap = sorted({-flow.position[n] for n in seeds})
    queued = set(heap)
    for _ in range(_MAX_INNER):
        if not heap:
            return
        node = flow.nodes[-heapq.heappop(heap)]
        if not heap:
            yield node
        if target_name(node) in _STOPS or node.op == "placeholder":
            return
        for following in _data(flow, node, still):
            mark = -flow.position[following]
            if mark not in queued:
                queued.add(mark)
                heapq.heappush(heap, mark)


def _carve(flow: Dataflow, call: Node, logits: Node, seeds: list[Node], still: set[Node]) -> RouterRegion | Reject:
    """The region between ``logits`` and the call's ids and weights; Reject where it has an effect or reads more."""
    inside: set[Node] = set()
    stack = list(seeds)
    while stack:
        node = stack.pop()
        if node not in inside and node is not logits:
            inside.add(node)
            stack += _data(flow, node, still)
    nodes = sorted(inside, key=flow.position.__getitem__)
    params: dict[Node, None] = {}
    likes: dict[Node, None] = {}
    sizes: dict[Node, None] = {}
    for node in nodes:
        for p in flow.preds[node]:
            if p in inside or p is logits:
                continue
            if not tensors(p):
                sizes[p] = None
            elif p in _likes(node):
                likes[p] = None
            else:
                params[p] = None
    experts = _experts_of(call)
    ids, routing = call.args[1], call.args[2]
    assert isinstance(ids, Node) and isinstance(routing, Node)
    if wide := [p for p in params if tensor(p) is None or not same(math.prod(fake(p).shape), experts)]:
        shape = list(fake(wide[0]).shape) if tensor(wide[0]) is not None else "several tensors"
        return Reject("find.inputs", f"router: reads {wide[0].name} {shape} besides the logits", logits.name)
    likes = {n: None for n in likes if n not in params}
    region = RouterRegion(
        nodes, logits, list(params), list(likes), list(sizes), ids, routing, experts, int(fake(ids).shape[-1]), Mode()
    )
    return _effects(flow, call, region) or region


def _effects(flow: Dataflow, call: Node, region: RouterRegion) -> Reject | None:
    """Random numbers, capacities, mode switches, and writes to what the op will read later than the region did."""
    for node in region.nodes:
        if flow.is_random(node):
            return Reject("find.effect", f"router: {node.name} draws random numbers", node.name)
        if target_name(node).rstrip("_") in _MIXES_ROWS:
            text = f"router: {target_name(node)} lets the routing of a token depend on the tokens before it"
            return Reject("find.inputs", text, node.name)
    floats = [n for n in region.nodes if tensors(n) and n not in flow.integers]
    modes = {flow.modes[n] for n in floats}
    if len(modes) != 1 or {m.grad for m in modes} != {flow.modes[call].grad}:
        return Reject("find.autocast", "router: autocast or grad mode changes inside", region.logits.name)
    region.mode = modes.pop()
    outer = {s for n in (region.logits, *region.params) for s in flow.storages[n]}
    start = min(flow.position[n] for n in (region.logits, *region.params))
    for node in flow.nodes[start + 1 : flow.position[call]]:
        if any(flow.storages[w] & outer for w in flow.writes[node]):
            return Reject("find.effect", f"router: {node.name} writes to what the router reads", node.name)
    if any(isinstance(t, Tensor) and t.is_sparse for n in region.inputs for t in tensors(n)):
        return Reject("find.inputs", "router: sparse tensors", region.logits.name)
    return None
