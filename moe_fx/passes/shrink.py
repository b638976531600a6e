"""The same region at small sizes: what is true of the formula at H = 4096 can be shown at H = 40.

Large experts make float64 runs slow and big.  Here a region is copied with H, I and 2I replaced by small sizes of the
same relations (equal stays equal, double stays double), wherever they stand as a size: in the shapes of what it reads
and as whole numbers in its code.  That is only sound if no other number could mean a size, so a region is copied only
if every whole number from 8 on in it is H, I, 2I or one that stays as it is (E, T, k and their products), and none is
both.  The rounding of the block, at its true sizes and dtypes, is checked all the same.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import Graph, Node

from moe_fx.passes.banks import Bank
from moe_fx.passes.dataflow import fake, value
from moe_fx.passes.match import Proposal
from moe_fx.passes.regions import Region, numel

_FREE = 8  # numbers below are dimensions, counts of slots, constants of the code
_WORTHWHILE = 1 << 17  # elements of one expert
_CANDIDATES = [(h, i) for h in (40, 56, 72, 88, 104) for i in (28, 36, 44, 52, 68)]


@dataclass(frozen=True, slots=True)
class Twin:
    """A region at small sizes.  nodes: copy → original."""

    region: Region
    original: Region
    nodes: dict[Node, Node]

    def enlarge(self, proposal: Proposal) -> Proposal:
        """A proposal for the small region, for the original."""
        if self.region is self.original:
            return proposal
        h = self.original.hidden
        expert = replace(proposal.spec.expert, hidden=h, intermediate=self.original.intermediate)
        operands = tuple(self.nodes[n] for n in proposal.operands)
        return replace(proposal, spec=replace(proposal.spec, expert=expert), operands=operands)


def shrink(region: Region) -> Twin:
    """The small twin; the region itself where it is small already or a number in it leaves doubt."""
    same = Twin(region, region, {})
    sizes = _sizes(region)
    if sizes is None or sum(fake(n).numel() for n in region.weight_nodes) // region.down.sizes[0] < _WORTHWHILE:
        return same
    graph = Graph()
    copies: dict[Node, Node] = {}
    for node in region.inputs:
        copies[node] = graph.placeholder(node.name)
        copies[node].target = node.target
        copies[node].meta = {**node.meta, "example_value": _small(region, node, sizes)}
    for node in region.nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
        copies[node].args = _substitute(copies[node].args, sizes)
        copies[node].kwargs = _substitute(copies[node].kwargs, sizes)
    graph.output(copies[region.end])

    def bank(old: Bank) -> Bank:
        return Bank(tuple(copies[p] for p in old.params), tuple(copies[u] for u in old.uses), frozenset())

    small = replace(
        region,
        nodes=[copies[n] for n in region.nodes],
        x=copies[region.x],
        ids=copies[region.ids],
        weights=None if region.weights is None else copies[region.weights],
        end=copies[region.end],
        out=copies[region.out],
        aliases=[],
        ups=[bank(b) for b in region.ups],
        down=bank(region.down),
        params=[copies[n] for n in region.params],
        sizes=[copies[n] for n in region.sizes],
        scores=None if region.scores is None else copies[region.scores],
    )
    return Twin(small, region, {copy: node for node, copy in copies.items()})


def _sizes(region: Region) -> dict[int, int] | None:
    """Large size → small size; None where some number of the region could be either."""
    experts, *down = region.down.sizes
    h, i = region.hidden, region.intermediate
    if h not in down:
        return None
    k, size = region.top_k, numel(region.x)
    kept = {experts, experts - 1, experts + 1, k, k * experts}
    if isinstance(size, int):  # a captured number of tokens may stand anywhere
        kept |= {n * (size // h) for n in (1, k, experts, k * experts)}
    kept |= set(_numbers(fake(region.x).shape[:-1]))
    large = {h, i, 2 * i}
    numbers = {n for node in region.nodes for n in _numbers((node.args, node.kwargs))}
    numbers |= {n for node in region.sizes for n in _numbers(value(node))}
    symbolic = {n for node in region.inputs for n in _in_symbols(value(node))}
    unknown = any(n >= _FREE and n not in large | kept for n in numbers)
    if min(large) < _FREE or unknown or large & kept & numbers or large & symbolic:
        return None
    for small_h, small_i in _CANDIDATES:
        small_h = {i: small_i, 2 * i: 2 * small_i}.get(h, small_h)
        found = {i: small_i, 2 * i: 2 * small_i, h: small_h}
        if len(set(found.values())) == len(found) and not set(found.values()) & kept:
            return found
    return None


def _numbers(tree: Any) -> list[int]:
    """Whole numbers in a value or in arguments; the shape of a tensor counts, symbols do not."""
    if isinstance(tree, bool):
        return []
    if isinstance(tree, int):
        return [abs(tree)]
    if isinstance(tree, Tensor):
        return [s for s in tree.shape if isinstance(s, int)]
    if isinstance(tree, slice):
        return _numbers((tree.start, tree.stop, tree.step))
    if isinstance(tree, dict):
        return [n for v in tree.values() for n in _numbers(v)]
    return [n for v in tree for n in _numbers(v)] if isinstance(tree, (tuple, list)) else []


def _in_symbols(tree: Any) -> set[int]:
    """Whole numbers inside symbolic sizes, where they cannot be replaced."""
    sizes = tree.shape if isinstance(tree, Tensor) else tree if isinstance(tree, (tuple, list)) else [tree]
    symbolic = [s.node.expr for s in sizes if isinstance(s, torch.SymInt)]
    return {int(n) for expr in symbolic for n in expr.atoms(sympy.Integer)}


def _substitute(tree: Any, sizes: dict[int, int]) -> Any:
    if isinstance(tree, bool) or not isinstance(tree, (int, tuple, list, dict, slice)):
        return tree
    if isinstance(tree, int):
        return sizes.get(tree, tree)
    if isinstance(tree, slice):
        return slice(*(_substitute(v, sizes) for v in (tree.start, tree.stop, tree.step)))
    if isinstance(tree, dict):
        return {k: _substitute(v, sizes) for k, v in tree.items()}
    return type(tree)(_substitute(v, sizes) for v in tree)


def _small(region: Region, node: Node, sizes: dict[int, int]) -> Any:
    """The value of an input at the small sizes: of a tensor, only dimensions that are H, I or 2I by role change."""
    found = value(node)
    if not isinstance(found, Tensor):
        return _substitute(found, sizes)
    last = 2 if node in region.weight_nodes else 0 if node in (region.ids, region.weights) else 1
    fixed = found.ndim - min(last, found.ndim)
    shape = [sizes.get(s, s) if d >= fixed and isinstance(s, int) else s for d, s in enumerate(found.shape)]
    with found.fake_mode:  # type: ignore[attr-defined]
        return found.new_empty(shape).requires_grad_(found.requires_grad)
