"""A block that adds its experts' results to a tensor from outside: ``out = residual.clone(); out.index_add_(…)``.

before: out = start + c_0 + c_1 + …, each sum an ``index_add_``, ``out[rows] += c``, ``out + c``
after:  out = start + block(zeros)

That is the same for every op that passes the start on with factor one, and no other reads a sum half done; both are
checked op by op, on the data flow.  VERIFY then sees the block with zeros in the place of the start.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from moe_fx.passes.dataflow import Dataflow, fake, target_name, tensor
from moe_fx.passes.regions import numel, same
from moe_fx.reasons import Reject

_SUMS = {"add", "add_", "iadd", "__add__", "__iadd__"}
_ADDS = {"index_add", "index_add_", "scatter_add", "scatter_add_", "index_put", "index_put_"}  # to their first argument
_SAME = {"view", "reshape", "contiguous", "clone"}
Edge = tuple[Node, int]  # (op, position of the argument through which the start passes)


@dataclass(frozen=True, slots=True)
class Start:
    """node: what the block adds to.  edges: the arguments of the block's ops that are this node, as the start."""

    node: Node
    edges: tuple[Edge, ...]

    def read_otherwise(self, inside: set[Node]) -> bool:
        """Whether the block reads it in another role too (``x + experts(x)``)."""
        for node in inside:
            leaves = torch.utils._pytree.tree_leaves((node.args, node.kwargs))
            if sum(a is self.node for a in leaves) != sum(op is node for op, _ in self.edges):
                return True
        return False


def start_of(flow: Dataflow, inside: set[Node], end: Node) -> Start | None:
    """What the result of the block ``inside``, up to ``end``, was added to; None where it starts from nothing."""
    edges = _through(flow, inside, end)
    if not edges:
        return None
    chain, start = {op for op, _ in edges}, edges[-1][0].args[edges[-1][1]]
    out = end if tensor(end) is not None else end.args[0]
    if not isinstance(start, Node) or not isinstance(out, Node) or not _same_shape(start, out):
        return None
    if {fake(n).dtype for n in (start, *chain) if tensor(n) is not None} != {fake(start).dtype}:
        return None
    storages = {s for op in chain for n in (op, *flow.writes[op]) for s in flow.storages[n]}
    for node in inside:  # only those ops may see a sum half done, and each once
        passed = [op.args[i] for op, i in edges if op is node]
        carrying = [a for a in node.all_input_nodes if a in chain or flow.storages[a] & storages]
        leaves = torch.utils._pytree.tree_leaves((node.args, node.kwargs))
        if sum(a in carrying for a in leaves if isinstance(a, Node)) != sum(a in carrying for a in passed):
            return None
        if any(a not in passed for a in carrying) or any(a is not start and a not in chain for a in passed):
            return None
    return Start(start, tuple((op, i) for op, i in edges if op.args[i] is start))


def _through(flow: Dataflow, inside: set[Node], op: Node) -> list[Edge]:
    """The way of the start through ``op`` and all before it, last edge first; empty where it is none."""
    name = target_name(op)
    if name in ("setitem", "__setitem__"):
        return _assigned(flow, inside, op)
    if not op.args or "out" in op.kwargs or tensor(op) is None:
        return []
    if name in ("index_put", "index_put_") and True not in (*op.args[3:4], op.kwargs.get("accumulate")):
        return []
    places = (0, 1) if name in _SUMS and not op.kwargs else (0,) if name in _SUMS | _ADDS | _SAME else ()
    for i in places:
        source = op.args[i] if i < len(op.args) else None
        if isinstance(source, Node) and tensor(source) is not None and same(numel(source), numel(op)):
            way = _before(flow, inside, source, op)
            if way is not None:
                return [(op, i), *way]
    return []


def _assigned(flow: Dataflow, inside: set[Node], op: Node) -> list[Edge]:
    """``out[key] = out[key] + c``, where nothing is written to ``out`` in between and ``out[key]`` is a copy."""
    out, key, total = op.args
    if not isinstance(out, Node) or not isinstance(total, Node) or total not in inside:
        return []
    if target_name(total) not in _SUMS or (total.kwargs and total.args[0] is not out):
        return []
    for i, rows in enumerate(total.args[:2]):
        if not isinstance(rows, Node) or rows not in inside or target_name(rows) not in ("getitem", "__getitem__"):
            continue
        fits = rows.args[0] is out and rows.args[1] == key and same(numel(rows), numel(total))
        unchanged = _writer(flow, out, rows) is _writer(flow, out, op)
        if fits and unchanged and not flow.storages[rows] & flow.storages[out] and (i == 0 or not total.kwargs):
            way = _before(flow, inside, out, rows)
            if way is not None:
                return [(op, 2), (total, i), (op, 0), (rows, 0), *way]
    return []


def _before(flow: Dataflow, inside: set[Node], source: Node, reader: Node) -> list[Edge] | None:
    """The way to what ``reader`` finds in ``source``: empty where that comes from outside, None where it is no sum."""
    writer = _writer(flow, source, reader)
    if writer is not None and writer in inside:
        return _through(flow, inside, writer) or None
    if source not in inside:
        return []
    return None if writer is not None else _through(flow, inside, source) or None


def _writer(flow: Dataflow, source: Node, reader: Node) -> Node | None:
    """The last write to ``source`` between it and ``reader``."""
    storages = flow.storages[source]
    found = [p for p in flow.preds[reader] if any(flow.storages[w] & storages for w in flow.writes[p])]
    later = [p for p in found if flow.position[p] > flow.position[source]]
    return max(later, key=flow.position.__getitem__, default=None)


def escapes(flow: Dataflow, start: Node, inside: set[Node], end: Node) -> Reject | None:
    """A start that is written in place: why others would miss the writes, or see them where there are none now."""
    storages, last = flow.storages[start], flow.position[end]
    sharing = [n for n in flow.nodes if flow.storages[n] & storages]
    if any(n.op in ("placeholder", "get_attr") for n in sharing):
        return Reject("find.effect", f"adds to {start.name}, an input of the graph, in place", start.name)
    first = min(flow.position[n] for n in inside if any(flow.storages[w] & storages for w in flow.writes[n]))
    for node in sharing:
        for user in flow.users(node):
            if user not in inside and first < flow.position[user] <= last and not flow.is_assertion(user):
                return Reject("find.escape", f"{user.name} reads {node.name} in the middle of the block", user.name)
    return None


def _same_shape(a: Node, b: Node) -> bool:
    one, other = fake(a).shape, fake(b).shape
    return len(one) == len(other) and all(same(p, q) for p, q in zip(one, other, strict=True))
