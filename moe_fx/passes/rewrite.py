"""REWRITE: a verified region becomes one call of ``moe_fx::experts``.

before: ids → sort / one_hot / where … products with the expert weights … → out
after:  y = moe_fx.experts(x [T, H], ids [T, k], weights [T, k], operands, spec, binding, plan); readers of out read y
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Graph, Node

from moe_fx.passes.dataflow import Dataflow, fake, target_name, tensors
from moe_fx.passes.isolation import unseen
from moe_fx.passes.match import Proposal
from moe_fx.passes.regions import Region, same


def rewrite(graph: Graph, region: Region, proposal: Proposal, plan: str) -> Node:
    """Replaces ``region`` in ``graph`` and returns the new node; the replaced nodes are erased."""
    before = set(graph.nodes)
    try:
        y, new = _insert(graph, region, proposal, plan)
    except Exception:  # half a replacement would still run
        for node in [n for n in reversed(graph.nodes) if n not in before]:
            graph.erase_node(node)
        raise
    late = {region.out, *region.aliases}
    after = set(following(new))
    for node in late:
        node.replace_all_uses_with(new, delete_user_cb=lambda user: user in after)
    # scores that stay are what their writers made of them: a write has no user, and is needed all the same
    kept: set[Node] = set()
    if region.scores is not None:
        flow = Dataflow(graph)
        kept = flow.within([y], flow.preds, 0, flow.position[y])
    for node in reversed(region.nodes):
        if node in kept:
            continue
        _erase_numbers(graph, node)
        if not node.users:  # what computes ``scores``, or is shared with readers outside, stays
            graph.erase_node(node)
    return y


def _erase_numbers(graph: Graph, node: Node) -> None:
    """Erases what is asserted of a node's sizes, and what was computed from them for that alone."""
    for user in list(node.users):
        if user.op == "call_function" and (not tensors(user) or target_name(user) == "getitem"):
            _erase_numbers(graph, user)
            if not user.users:
                graph.erase_node(user)


def _insert(graph: Graph, region: Region, proposal: Proposal, plan: str) -> tuple[Node, Node]:
    """(the fused op, its result in the shape of the value it replaces)."""
    with graph.inserting_before(region.end.next):
        x = flattened(graph, region.x, region.hidden)
        ids = flattened(graph, region.ids, region.top_k)
        if region.scores is not None:
            weights = _gather(graph, region, ids)
        elif region.weights is None:
            weights = insert_call(graph, "call_function", torch.ones_like, (ids,), {"dtype": fake(region.x).dtype})
        else:
            weights = flattened(graph, region.weights, region.top_k)
        args = (x, ids, weights, list(proposal.operands), str(proposal.spec), str(proposal.binding), plan)
        y = insert_call(graph, "call_function", torch.ops.moe_fx.experts.default, args)
        y.meta["stack_trace"] = region.out.meta.get("stack_trace", "")
        y.meta["nn_module_stack"] = region.out.meta.get("nn_module_stack", {})
        new = _like(graph, y, region)
        if region.start is not None:
            new = insert_call(graph, "call_function", torch.add, (region.start, new))
    return y, new


def _gather(graph: Graph, region: Region, ids: Node) -> Node:
    """The routing weights [T, k] out of a dense matrix of scores."""
    scores = region.scores
    assert scores is not None
    if fake(scores).ndim > 2:
        scores = insert_call(graph, "call_method", "flatten", (scores, 0, -2))
    elif not same(fake(scores).shape[1], region.down.sizes[0]):
        scores = insert_call(graph, "call_method", "transpose", (scores, 0, 1))
    return insert_call(graph, "call_method", "gather", (scores, 1, insert_call(graph, "call_method", "long", (ids,))))


def following(node: Node) -> list[Node]:
    """The nodes after ``node``, in order."""
    found = []
    while (node := node.next).op != "root":
        found.append(node)
    return found


def flattened(graph: Graph, node: Node, last: int) -> Node:
    """The node as [-1, last]."""
    t = fake(node)
    if t.ndim == 2 and same(t.shape[1], last):
        return node
    return insert_call(graph, "call_method", "reshape", (node, (-1, last)))


def _like(graph: Graph, y: Node, region: Region) -> Node:
    """y [T, H] in the shape of the value it replaces."""
    out, x = fake(region.out), fake(region.x)
    if out.ndim == 2:
        return y
    if len(out.shape) == len(x.shape) and all(same(a, b) for a, b in zip(out.shape, x.shape, strict=True)):
        size = insert_call(graph, "call_method", "size", (region.x,))
        return insert_call(graph, "call_method", "reshape", (y, size))
    return insert_call(graph, "call_method", "reshape", (y, tuple(_size(graph, region, s) for s in out.shape)))


def _size(graph: Graph, region: Region, size: object) -> Any:
    """A number, or a node that computes it from the sizes of x."""
    if isinstance(size, int):
        return size
    x = fake(region.x)
    for dim, other in enumerate(x.shape):
        if same(size, other):
            return insert_call(graph, "call_method", "size", (region.x, dim))
    return -1


def insert_call(
    graph: Graph, op: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
) -> Node:
    """A node with its fake value, as Dynamo would have made it."""
    node = graph.create_node(op, target, args, kwargs or {})
    fakes = torch.fx.node.map_arg((args, kwargs or {}), lambda n: n.meta.get("example_value", n.meta.get("val")))
    with _fake_mode(_tensors(fakes)[0]), unseen():
        if op == "call_method":
            node.meta["example_value"] = getattr(fakes[0][0], target)(*fakes[0][1:], **fakes[1])
        else:
            node.meta["example_value"] = target(*fakes[0], **fakes[1])
    return node


def _fake_mode(t: Any) -> FakeTensorMode:
    """Of a FakeTensor, or of those inside a tensor subclass."""
    while not isinstance(t, FakeTensor):
        t = getattr(t, t.__tensor_flatten__()[0][0])
    return t.fake_mode


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
