"""Samples that put chosen numbers where a block decides: rows for which the up projections give exactly these values.

Random rows reach both sides of ``h > 3`` and of ``h < 3.001``, and almost never the band between them.  From the
numbers in the code come the points at which decisions may lie (each number, and the sum, difference, product and
quotient of two: ``h * 1e-3 > 40``); between every two neighbours one value is planted, of both signs.  A row of x that
gives several values of the projections at once solves a linear system.  x and the routing weights get them too.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from moe_fx.binding import Operand, split_gate_up
from moe_fx.passes.banks import Bank
from moe_fx.passes.dataflow import target_name, tensor
from moe_fx.passes.match import Proposal
from moe_fx.passes.regions import Region
from moe_fx.passes.sampling import Sample, Sampler

_PLACES = {"getitem", "__getitem__", "view", "reshape", "split", "chunk", "narrow", "permute", "transpose", "unsqueeze"}
_PLACES |= {"squeeze", "sum", "mean", "softmax", "cat", "stack", "expand", "repeat", "unflatten", "flatten", "select"}
_PLACES |= {"index_add_", "index_add", "scatter_add_", "topk", "gather", "index_select", "repeat_interleave", "unbind"}
_MOST_NUMBERS = 8
Where = tuple[Bank, bool] | str  # an up bank and which half of its rows, "x" or "weights"


def targets(nodes: Iterable[Node]) -> list[float]:
    """Values between the points at which ``nodes`` may decide about numbers that are no indices; [] without any."""
    numbers: set[float] = set()
    for node in nodes:
        floats = any((t := tensor(p)) is not None and t.is_floating_point() for p in node.all_input_nodes)
        if floats and target_name(node) not in _PLACES:
            leaves = torch.utils._pytree.tree_leaves((node.args, node.kwargs))
            numbers |= {abs(float(a)) for a in leaves if isinstance(a, (int, float)) and not isinstance(a, bool)}
    chosen = sorted(n for n in numbers if 0 < n < math.inf and n != 1)[:_MOST_NUMBERS]
    if not chosen:
        return []
    pairs = [(a, b) for a in (*chosen, 1.0) for b in (*chosen, 1.0)]
    points = {p for a, b in pairs for p in (a, a / b, a * b, a + b, abs(a - b)) if 1e-12 < p < 1e12}
    ascending = sorted(points)
    between = [(a + b) / 2 for a, b in itertools.pairwise(ascending)]
    found = [ascending[0] / 2, *between, ascending[-1] * 2]
    return [sign * value for value in found for sign in (1, -1)]


def planted(sampler: Sampler, proposal: Proposal) -> Iterator[Sample]:
    """Samples with every target in every up projection, in x and in the routing weights.  Biases are zero in them."""
    region = sampler.region
    values = targets(region.nodes)
    if not values:
        return
    tokens = max(sampler.token_counts())
    at_once = max(1, min(region.hidden, region.intermediate) // 2)
    rows: list[tuple[Where, list[float]]] = [
        ((bank, half), part) for bank in region.ups for half in (False, True) for part in _parts(values, at_once)
    ]
    rows += [("x", part) for part in _parts(values, region.hidden)]
    rows += [("weights", part) for part in _parts(values, region.top_k)]
    biases = [node for operand, node in _operands(proposal, sampler.experts) if operand.role.endswith("_bias")]
    for group in _parts(rows, tokens):
        sample = sampler.draw(tokens, "random", torch.float64, 1.0)
        sample.label = f"planted values in {len(group)} tokens"
        for node in biases:
            sample.operands[node].zero_()
        sample.weights.fill_(1.0)
        for token, (where, part) in enumerate(group[: len(sample.x)]):
            chosen = torch.tensor(part, dtype=torch.float64, device=sample.x.device)
            if isinstance(where, str):
                (sample.x if where == "x" else sample.weights)[token, : len(part)] = chosen
            else:
                bank, half = where
                matrix = _rows(region, sample, bank, half, token, len(part))
                sample.x[token] = torch.linalg.lstsq(matrix, chosen).solution
        yield sample


def at_zero(sampler: Sampler, proposal: Proposal) -> Iterator[Sample]:
    """A sample whose activations are at exactly 0 in the first row, where many bend: no bias there, x is 0."""
    sample = sampler.draw(max(sampler.token_counts()), "random", torch.float64)
    for operand, node in _operands(proposal, sampler.experts):
        if operand.role in ("w1_bias", "w13_bias"):
            bias = sample.operands[node]
            (split_gate_up(bias, operand.order)[0] if operand.role == "w13_bias" else bias).zero_()
    sample.x[0] = 0
    yield sample


def _operands(proposal: Proposal, experts: int) -> Iterator[tuple[Operand, Node]]:
    """Every parameter of the block with what it is in the binding."""
    return zip((o for o in proposal.binding.operands for _ in range(o.count(experts))), proposal.operands, strict=True)


def _parts(values: list[Any], size: int) -> list[list[Any]]:
    return [values[i : i + size] for i in range(0, len(values), size)]


def _rows(region: Region, sample: Sample, bank: Bank, half: bool, token: int, count: int) -> Tensor:
    """[count, H]: rows of one half of the bank's matrices (gate and up may lie in one), the token's experts in turn."""
    found = []
    for i in range(count):
        expert, place = int(sample.ids[token, i % region.top_k]), token + i // region.top_k
        matrix = sample.operands[bank.params[0]][expert] if bank.stacked else sample.operands[bank.params[expert]]
        if matrix.shape[-1] != region.hidden:
            matrix = matrix.t()
        found.append(matrix[(place + half * (len(matrix) // 2 + 1)) % len(matrix)])
    return torch.stack(found)
