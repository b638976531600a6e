"""Where a graph holds expert weights: parameters that come E at a time.

A *bank* is one stacked parameter [E, a, b], or E parameters of one shape whose names differ in one number.  Module and
parameter names decide nothing; only "numbered alike" does.  Banks of one block are an up projection (one bank, or gate
and up apart) and the down projection that depends on it.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from torch.fx import Node
from torch.nn import Parameter

from moe_fx.passes.dataflow import Dataflow, fake, target_name, tensor, tensors

PRODUCTS = {"linear", "matmul", "__matmul__", "mm", "bmm", "addmm", "baddbmm", "einsum", "grouped_mm", "_grouped_mm"}
PRODUCTS |= {"grouped_mm_fallback", "rmatmul", "__rmatmul__"}
GATHERS = {"getitem", "__getitem__", "index_select", "embedding", "gather", "index"}
_NUMBER = re.compile(r"(?<=_)\d+(?=_)")


@dataclass(frozen=True, slots=True)
class Bank:
    """params: one stacked placeholder, or E of them in order of their number.  uses: the products that read them, in
    order of position.  views: nodes between that only rearrange, cast or pick (``w[ids]``)."""

    params: tuple[Node, ...]
    uses: tuple[Node, ...]
    views: frozenset[Node]

    @property
    def stacked(self) -> bool:
        return len(self.params) == 1

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(E, the last two sizes)."""
        *stack, a, b = (int(s) for s in fake(self.params[0]).shape)
        return (stack[0] if stack else len(self.params)), a, b


def find_banks(flow: Dataflow, weights: set[Node], computed: Sequence[tuple[Node, ...]] = ()) -> list[Bank]:
    """All banks of the graph, by first use.  ``weights``: placeholders that are parameters or buffers of the model;
    ``computed``: groups of matrices that the graph makes of them."""
    stacked = [n for n in weights if (t := tensor(n)) is not None and t.ndim == 3 and t.is_floating_point()]
    groups: list[tuple[Node, ...]] = [(n,) for n in stacked]
    groups += numbered_alike([n for n in weights if (t := tensor(n)) is not None and t.ndim == 2])
    groups += computed
    made = {node for group in computed for node in group}
    banks = [bank for group in groups for bank in _banks(flow, group, weights | set(group), made - set(group))]
    return sorted(banks, key=lambda b: flow.position[b.uses[0]])


def partners(flow: Dataflow, banks: list[Bank], down: Bank) -> list[list[Bank]]:
    """Up projections that may belong to ``down``: the nearest fitting bank before it that it depends on, or the nearest
    two of one size that do not depend on each other (gate and up apart), which come first."""
    fitting = [b for b in banks if _fits(b, down) and flow.depends(down.uses[-1], b.uses[-1])]
    if not fitting:
        return []
    last = fitting[-1]
    pairs = [b for b in fitting[:-1] if b.sizes == last.sizes and not flow.depends(last.uses[-1], b.uses[-1])]
    return [[pairs[-1], last], [last]] if pairs else [[last]]


def _fits(up: Bank, down: Bank) -> bool:
    """[E, 2I or I, H] and [E, H, I] up to the order of the last two sizes."""
    (e_up, *a), (e_down, *b) = up.sizes, down.sizes
    return e_up == e_down and any(a[i] == b[j] and a[1 - i] in (b[1 - j], 2 * b[1 - j]) for i in (0, 1) for j in (0, 1))


def numbered_alike(nodes: list[Node]) -> list[tuple[Node, ...]]:
    """Groups of two or more placeholders of one shape whose names differ in one whole number only; the last number in
    a name that makes a group is taken, so ``layers.0.experts.3`` groups over experts."""
    by_pattern: dict[tuple[str, object], list[tuple[int, Node]]] = defaultdict(list)
    for node in nodes:
        name = str(node.target)
        t = fake(node)
        for match in _NUMBER.finditer(name):
            pattern = f"{name[: match.start()]}*{name[match.end() :]}"
            by_pattern[pattern, (tuple(t.shape), t.dtype)].append((int(match.group()), node))
    taken: set[Node] = set()
    groups = []
    for _, members in sorted(by_pattern.items(), key=lambda item: -item[0][0].index("*")):
        free = sorted((number, node) for number, node in members if node not in taken)
        if len(free) > 1 and [n for n, _ in free] == list(range(len(free))):
            groups.append(tuple(node for _, node in free))
            taken.update(groups[-1])
    return groups


def _banks(flow: Dataflow, params: tuple[Node, ...], weights: set[Node], made: set[Node]) -> list[Bank]:
    """The bank of ``params``, once for every block that uses it (tied blocks use one after the other); none when they
    are used otherwise than in products, to make other weights (``made``) say, or are alike layers in a row."""
    uses: list[Node] = []
    views: set[Node] = set()
    stack = list(params)
    while stack:
        for user in flow.users(stack.pop()):
            if user in views or user in uses or flow.is_assertion(user):
                continue
            sources = [p for p in user.all_input_nodes if tensors(p)]
            if target_name(user) in GATHERS:  # w[ids]: still a weight, picked by row
                sources = [p for p in sources if p not in flow.integers]
            if user in made:
                return []
            if all(p in weights or p in views for p in sources) and not flow.writes[user]:
                views.add(user)
                stack.append(user)
            elif target_name(user) in PRODUCTS:
                uses.append(user)
            else:
                return []
    uses.sort(key=flow.position.__getitem__)
    if not uses or (len(params) > 1 and len(uses) > 1 and flow.depends(uses[1], uses[0])):
        return []
    turns: list[list[Node]] = [[]]
    for use in uses:
        if turns[-1] and flow.depends(use, turns[-1][0]):
            turns.append([])
        turns[-1].append(use)
    return [Bank(params, tuple(turn), frozenset(views)) for turn in turns]


def is_weight(node: Node, example: object) -> bool:
    """Whether a placeholder holds a parameter or a buffer of the model (not an activation)."""
    described = node.meta.get("tensor_dict") or {}
    return isinstance(example, Parameter) or "_dynamo_static_input_type" in described
