"""Expert weights made of codes: the fused op reads the codes, and no bank of floats is ever made.

before: w = (codes.to(bf16) - 8) * scale …;  y = moe_fx.experts(x, ids, weights, [w, …], "…")
after:  y = moe_fx.experts(x, ids, weights, [codes, …, scale, …], "… quant.w13=int4:1x32:bfloat16")

A computation (``computed``) is run in float64 on random codes, scales and zero points, and must give what a scheme that
fits their shapes says.  Where it is no known scheme it stays in the graph and the op reads its result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from moe_fx.binding import MATRICES, Operand, Quantised, WeightBinding
from moe_fx.passes.codes import Part, Recipe, as_quantised, candidates, draw, draw_special
from moe_fx.passes.computed import Computed
from moe_fx.passes.dataflow import fake
from moe_fx.passes.exact import run_exact
from moe_fx.passes.isolation import isolated
from moe_fx.passes.match import Proposal
from moe_fx.passes.products import input_keys
from moe_fx.passes.readings import held
from moe_fx.passes.regions import Region
from moe_fx.passes.rewrite import insert_call
from moe_fx.passes.sampling import constants
from moe_fx.passes.wrapped import Inside, inside_of, is_wrapped
from moe_fx.quant import GroupShape, QuantSpec, parse_key
from moe_fx.reasons import Reject
from moe_fx.reference.quantise import dequantise

_MOST = 1 << 25  # elements of one matrix, or of a bank, that are computed as a sample


@dataclass(frozen=True, slots=True)
class _Held:
    """How the matrices of one operand are made.  part(position): the nodes that hold that part, one stacked or one for
    each expert."""

    recipe: Recipe
    stacked: bool
    part: Callable[[int], list[Node]]


def forms(
    graph: Graph, region: Region, proposal: Proposal, found: dict[tuple[Node, ...], Computed]
) -> Iterator[Proposal | Reject]:
    """How the op can read the block's weights, the best first, made when it is asked for: over the codes they are made
    of, as what the graph makes of them.  A Reject where nothing else can be."""
    wrapped = any(is_wrapped(node) for node in proposal.operands)
    keys = input_keys(region)
    if not wrapped and keys == ("", "") and not any(b.params in found for b in (*region.ups, region.down)):
        yield proposal
        return
    if not region.training and keys is not None and (over := over_codes(graph, proposal, found, keys)) is not None:
        yield over
    first = proposal.operands[0]
    if keys != ("", "") or any(node.target is held for node in proposal.operands):
        text = "gradients through" if region.training else "no known scheme is the same for all"
        yield Reject("match.weights", f"{text} products with codes", first.name)
    elif (plain := unwrapped(graph, proposal)) is not None:
        yield plain
    else:
        text = f"a {type(fake(first)).__name__} multiplies otherwise than what it stands for"
        yield Reject("match.weights", text, first.name)


def over_codes(
    graph: Graph, proposal: Proposal, found: dict[tuple[Node, ...], Computed], inputs: tuple[str, str] = ("", "")
) -> Proposal | None:
    """The proposal over codes, with what views of them it needs put into the graph after its inputs; None where not all
    matrices are made of codes by a known scheme, the two of an up projection by the same.  inputs: keys of the inputs
    of the up and the down products, where they are rounded."""
    experts = proposal.spec.expert.experts
    position, keys = 0, dict[str, str]()
    operands: list[tuple[Operand, list[Node]]] = []
    extra: list[tuple[Operand, list[Node]]] = []
    for operand in proposal.binding.operands:
        count = operand.count(experts)
        nodes = proposal.operands[position : position + count]
        position += count
        if operand.role not in MATRICES:
            operands.append((operand, list(nodes)))
            continue
        held = _held(graph, nodes, found)
        if held is None or (operand.transposed and held.recipe.key.bits < 8):
            return None
        recipe, group = held.recipe, held.recipe.key.group
        key = replace(recipe.key, group=GroupShape(group.col, group.row)) if operand.transposed else recipe.key
        keys[operand.role] = str(key)
        mine = replace(operand, form="stacked" if held.stacked else "list")
        *_, a, b = (int(s) for s in fake(nodes[0]).shape)
        parts = [("", recipe.codes), ("_scale", recipe.scale)]
        for suffix, at in parts + ([] if recipe.zero is None else [("_zero", recipe.zero)]):
            role = replace(mine, role=f"{operand.role}{suffix}")  # type: ignore[arg-type]
            (extra if suffix else operands).append((role, _views(graph, held, at, (experts, a, b))))
    ups = {key for role, key in keys.items() if role != "w2"}
    if len(ups) != 1:
        return None
    both = [*operands, *extra]
    return Proposal(
        replace(proposal.spec, quant=QuantSpec(ups.pop(), keys["w2"], *inputs)),
        WeightBinding(tuple(operand for operand, _ in both)),
        tuple(node for _, nodes in both for node in nodes),
    )


def unwrapped(graph: Graph, proposal: Proposal) -> Proposal | None:
    """The proposal over what its wrapped weights dequantise to; None where one of them does not say."""
    operands = []
    for node in proposal.operands:
        if is_wrapped(node):
            inside = inside_of(node)
            if inside is None or not inside.plain:
                return None
            with graph.inserting_after(_last_input(graph)):
                node = insert_call(graph, "call_method", "dequantize", (node,))
        operands.append(node)
    return replace(proposal, operands=tuple(operands))


def _held(graph: Graph, nodes: tuple[Node, ...], found: dict[tuple[Node, ...], Computed]) -> _Held | None:
    if (computed := found.get(nodes)) is not None:
        recipe = recipe_of(computed)
        if recipe is None and (scaled := computed.scaled) is not None:
            computed, recipe = scaled, recipe_of(scaled)
        if recipe is None:
            return None
        sources = computed.sources
        stacked = len(nodes) == 1 or computed.picked
        return _Held(recipe, stacked, lambda at: [each[at] for each in (sources[:1] if stacked else sources)])
    insides = [inside_of(node) if is_wrapped(node) else None for node in nodes]
    inside = insides[0]
    if inside is None or inside.recipe is None or any(i != inside for i in insides):
        return None
    return _Held(inside.recipe, False, lambda at: _inner(graph, nodes, inside, at))


def _inner(graph: Graph, nodes: tuple[Node, ...], inside: Inside, at: int) -> list[Node]:
    with graph.inserting_after(_last_input(graph)):
        return [insert_call(graph, "call_function", getattr, (node, inside.names[at])) for node in nodes]


def _views(graph: Graph, held: _Held, at: int, sizes: tuple[int, int, int]) -> list[Node]:
    """One part as [E, *size], or as [*size] for each expert."""
    experts, a, b = sizes
    size = held.recipe.size(at, a, b)
    found = []
    for node in held.part(at):
        t = fake(node)
        place = node if node.op.startswith("call") else _last_input(graph)
        with graph.inserting_after(place):
            shape = (experts, *size) if held.stacked else size
            if (dtype := held.recipe.dtype(at, t.dtype)) != t.dtype:
                node = place = insert_call(graph, "call_method", "view", (node, dtype))
        if tuple(fake(node).shape) != shape:
            with graph.inserting_after(place):
                node = insert_call(graph, "call_method", "reshape", (node, shape))
        found.append(node)
    return found


_PROVED: dict[str, Recipe | None] = {}


def recipe_of(computed: Computed) -> Recipe | None:
    """The recipe, once for every computation that reads the same; None where it is no known scheme."""
    node = computed.nodes[0]
    if node.target is held and not computed.picked:  # a reading, which was compared with what it reads
        codes, scale, key = node.args[:3]
        at = computed.sources[0].index
        groups = tuple(int(s) for s in fake(scale).shape[-2:])  # type: ignore[arg-type]
        return Recipe(parse_key(str(key)), at(codes), at(scale), None, groups)  # type: ignore[arg-type]
    first = fake(node)
    text = f"{computed.text} {tuple(first.shape)} {first.dtype} {len(computed.nodes)}"
    if text not in _PROVED:
        with isolated():
            _PROVED[text] = _proved(computed)
    return _PROVED[text]


def _proved(computed: Computed) -> Recipe | None:
    """The scheme that gives what the computation of the first matrix, or of a bank, gives."""
    *stack, a, b = (int(s) for s in fake(computed.nodes[0]).shape)
    module = _module(computed)
    count = stack[0] if stack else len(computed.nodes)
    few = count
    if stack and count * a * b > _MOST and not _names_an_expert(module, count):
        few = 2  # every expert of a large bank goes the way of the first two
    if (few if stack else 1) * a * b > _MOST:
        return None
    by_expert = bool(stack) or computed.picked
    whole: list[Part] = []
    one: list[Part] = []
    for source in computed.sources[0]:
        t = fake(source)
        shape = tuple(int(s) for s in t.shape)
        first = by_expert and bool(shape) and shape[0] == count
        if by_expert and not first:
            return None  # what all experts share is no operand of theirs
        whole.append(((few, *shape[1:]) if first and stack else shape, t.dtype))
        one.append((shape[1:] if first else shape, t.dtype))
    lead = (few,) if stack else ()
    samples: list[tuple[list[Tensor], Tensor]] = []
    for drawn in (draw(whole), draw_special(whole, constants(module.graph.nodes))):
        try:
            (found,) = run_exact(module, [t.double() if t.is_floating_point() else t for t in drawn])
        except Exception:  # noqa: BLE001  any failure on samples means: not understood
            return None
        samples.append(([t[0] if computed.picked else t for t in drawn], found))
    for recipe in candidates(one, a, b):
        if all(_same(found, as_quantised(recipe, parts, lead, a, b)) for parts, found in samples):
            return recipe
    return None


def _same(found: Tensor, quantised: Quantised) -> bool:
    """Whether the codes stand for what was computed; NaN for NaN."""
    expected = dequantise(quantised, torch.float64)
    if found.shape != expected.shape:
        return False
    return bool((((found - expected).abs() <= 1e-9 * expected.abs()) | (found.isnan() & expected.isnan())).all())


def _module(computed: Computed) -> GraphModule:
    """The computation of the first matrix, from its sources."""
    root, graph = computed.nodes[0], Graph()
    copies = {source: graph.placeholder(f"p{i}") for i, source in enumerate(computed.sources[0])}
    needed: set[Node] = set()
    stack = [root]
    while stack:
        node = stack.pop()
        if node not in copies and node not in needed:
            needed.add(node)
            stack.extend(node.all_input_nodes)
    for node in root.graph.nodes:
        if node in needed:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output((copies[root],))
    return GraphModule(root.graph.owning_module or torch.nn.Module(), graph)


def _names_an_expert(module: GraphModule, experts: int) -> bool:
    """Whether a number in the code may single out experts beyond the first two (``w[:3]``, ``w[-2:]``)."""
    leaves: list[object] = []
    for node in module.graph.nodes:
        torch.fx.node.map_aggregate((node.args, node.kwargs), leaves.append)
    return any(isinstance(leaf, int) and 2 <= abs(leaf) <= experts for leaf in leaves)


def _last_input(graph: Graph) -> Node:
    return [n for n in graph.nodes if n.op == "placeholder"][-1]
