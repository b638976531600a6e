"""REWRITE for routers: a fused experts call and the router that feeds it become one call of ``moe_fx::moe``.

before: logits → softmax, topk, … → ids, weights;  y = moe_fx.experts(x, ids, weights, operands, …)
after:  y, ids, weights = moe_fx.moe(x, logits [T, E], [*operands, bias?, scale?], …)

Readers of ids and weights that come later read the op's; earlier ones keep the router that they had.  The logits stay.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch.fx import Graph, GraphModule, Node

from moe_fx.binding import Operand, parse_binding
from moe_fx.passes.dataflow import Dataflow, fake, target_name, tensor
from moe_fx.passes.isolation import isolated
from moe_fx.passes.regions import graph_parts, same
from moe_fx.passes.rewrite import flattened, following, insert_call
from moe_fx.passes.routers.match import Hypothesis, recognise
from moe_fx.passes.routers.region import RouterRegion, find_routers
from moe_fx.reasons import Reject
from moe_fx.spec import MoESpec, RouterSpec, parse

_SAME_VALUES = {"reshape", "view", "flatten", "contiguous", "to", "long", "type_as", "clone"}
_VERDICTS: dict[str, Hypothesis | Reject] = {}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of the router of one experts call.

    call: the node of ``moe_fx::experts``, in the graph no more where the router was fused.  router, binding: what the
    whole block is then; else the router stays for ``reason``.
    """

    call: Node
    router: RouterSpec | None
    binding: str = ""
    reason: Reject | None = None


Replan = Callable[[Node, MoESpec], str | None]  # experts call, what the block is with its router → plan, None: as it is


def fuse_routers(gm: GraphModule, examples: list[object], replan: Replan = lambda *_: None) -> list[Outcome]:
    """Every router of ``gm`` that a RouterSpec describes goes into its experts' call; one outcome for each call."""
    outcomes: list[Outcome] = []
    for graph, weights, _ in graph_parts(gm, examples):
        calls = [n for n in graph.nodes if n.op == "call_function" and n.target is torch.ops.moe_fx.experts.default]
        if not calls:
            continue
        flow = Dataflow(graph)
        judged = [(call, _judge(flow, call, weights)) for call in calls]
        rewritten: list[Node] = []
        late = []
        for call, verdict in reversed(judged):
            if isinstance(verdict, Reject):
                late.append(Outcome(call, None, reason=verdict))
                continue
            region, hypothesis = verdict
            moe = rewrite_router(graph, flow, call, region, hypothesis, replan)
            late.append(Outcome(call, hypothesis.spec, str(moe.args[4])))
            rewritten += [*region.nodes, call]
        outcomes += reversed(late)
        if rewritten:
            _erase_dead(graph, rewritten)
            graph.lint()
            if graph.owning_module is not None:
                graph.owning_module.recompile()
    return outcomes


def forget() -> None:
    """Drops every verdict."""
    _VERDICTS.clear()


def _judge(flow: Dataflow, call: Node, weights: set[Node]) -> tuple[RouterRegion, Hypothesis] | Reject:
    """The first candidate that a hypothesis describes; else a reason: that of the furthest, which holds the most."""
    rejects: list[Reject] = []
    for region in find_routers(flow, call, weights):
        verdict = region if isinstance(region, Reject) else _recognise(region)
        if isinstance(verdict, Hypothesis):
            assert isinstance(region, RouterRegion)
            return region, verdict
        rejects.append(verdict)
    return max(reversed(rejects), key=lambda r: r.code != "verify.values")


def _recognise(region: RouterRegion) -> Hypothesis | Reject:
    grad = torch.is_grad_enabled() if region.mode.grad is None else region.mode.grad
    training = grad and any(fake(n).requires_grad for n in (region.logits, *region.params))
    state = [(torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")]
    key = region.key(training, state)
    if key not in _VERDICTS:
        with isolated():
            _VERDICTS[key] = recognise(region, training)
    return _VERDICTS[key]


def rewrite_router(
    graph: Graph,
    flow: Dataflow,
    call: Node,
    region: RouterRegion,
    found: Hypothesis,
    replan: Replan = lambda *_: None,
) -> Node:
    """Replaces ``call`` by ``moe_fx::moe`` and returns it; dead nodes are left for ``_erase_dead``."""
    x, ids, weights, operands, spec, binding, plan = call.args
    assert isinstance(ids, Node) and isinstance(weights, Node) and isinstance(operands, (list, tuple))
    mine = [("router_bias", found.bias), ("expert_scale", found.scale)]
    roles = [Operand(role) for role, at in mine if at is not None]  # type: ignore[arg-type]
    bound = parse_binding(str(binding))
    bound = replace(bound, operands=(*bound.operands, *roles))
    whole = replace(parse(str(spec)), router=found.spec)
    plan = replan(call, whole) or plan
    rest = set(following(call))
    with graph.inserting_before(call):
        extra = [_vector(graph, region.params[at], region.experts) for _, at in mine if at is not None]
        logits = flattened(graph, region.logits, region.experts)
        args = (x, logits, [*operands, *extra], str(whole), str(bound), plan)
        moe = insert_call(graph, "call_function", torch.ops.moe_fx.moe.default, args)
        y, new_ids, new_weights = (insert_call(graph, "call_function", operator.getitem, (moe, i)) for i in range(3))
    for node in (moe, y, new_ids, new_weights):
        node.meta.update({k: call.meta[k] for k in ("stack_trace", "nn_module_stack") if k in call.meta})
    call.replace_all_uses_with(y)
    later = [n for n in flow.nodes[flow.position[call] + 1 :] if n in rest]
    for old, new in ((ids, new_ids), (weights, new_weights)):
        written = any(flow.storages[w] & flow.storages[old] for n in later for w in flow.writes[n])
        for alias in [] if written else _aliases(old, new, region):
            alias.replace_all_uses_with(new, delete_user_cb=lambda user: user in rest)
    return moe


def _vector(graph: Graph, node: Node, experts: int) -> Node:
    """A parameter of E elements as [E]."""
    if fake(node).ndim == 1:
        return node
    return insert_call(graph, "call_method", "reshape", (node, (experts,)))


def _aliases(old: Node, new: Node, region: RouterRegion) -> list[Node]:
    """``old`` and the nodes of the region that it only reshapes, where they have the shape and dtype of ``new``."""
    found = []
    inside = set(region.nodes)
    node: object = old
    while isinstance(node, Node) and node in inside:
        t, mine = tensor(node), fake(new)
        if t is None or t.dtype != mine.dtype:
            break
        if t.ndim == mine.ndim and all(same(a, b) for a, b in zip(t.shape, mine.shape, strict=True)):
            found.append(node)
        if target_name(node) not in _SAME_VALUES:
            break
        node = node.args[0]
    return found


def _erase_dead(graph: Graph, nodes: list[Node]) -> None:
    """Erases those of ``nodes`` that no value or effect of the graph needs."""
    flow = Dataflow(graph)
    for node in sorted(set(nodes), key=flow.position.__getitem__, reverse=True):
        if node not in flow.live and not node.users:
            graph.erase_node(node)
