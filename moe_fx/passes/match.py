"""MATCH: from what a region does to its expert weights, to the specification that says the same.

The region is run once in float64 under a watch (``exact``).  What enters and leaves each projection is compared with
every registered activation; shapes, taps and dtypes give the rest.  Whatever stays open (which of two square sizes is
the input, where a norm's weight goes) becomes several proposals: VERIFY decides, so matching may be liberal.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor
from torch.fx import Node

from moe_fx.binding import Operand, Order, WeightBinding, split_gate_up
from moe_fx.passes.banks import Bank
from moe_fx.passes.dataflow import fake, target_name, tensor
from moe_fx.passes.exact import Product, Watch, run_exact
from moe_fx.passes.regions import Region
from moe_fx.passes.sampling import Sample, Sampler, constants
from moe_fx.reasons import Reject, not_run
from moe_fx.reference import ACTIVATIONS
from moe_fx.reference.activations import Activation
from moe_fx.spec import CombineSpec, DTypeName, ExpertSpec, MoESpec, Norm

_CLOSE = 1e-9
_MOST = 4  # activations proposed: one is right, and several only where samples cannot tell them apart
_ORDERS: tuple[Order, ...] = get_args(Order)


@dataclass(frozen=True, slots=True)
class Proposal:
    """operands: the region's parameter nodes in the order of ``binding`` (E of them for a "list")."""

    spec: MoESpec
    binding: WeightBinding
    operands: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class _Seen:
    """ups: what left each up bank.  hidden: what entered the down bank.  All [n, .] with the same rows, or (dense
    spellings) tensors of one shape.  biases: the parameters added after each bank's products, the down bank's last."""

    ups: tuple[Tensor, ...]
    hidden: Tensor
    biases: tuple[tuple[Node, ...], ...]


@dataclass(frozen=True, slots=True)
class _Parts:
    """What the values decided: activation, its parameters, order of gate and up, the up banks as (gate, up)."""

    act: str
    params: tuple[float, ...]
    gated: bool
    order: Order
    banks: tuple[Bank, ...]


def propose(region: Region, sampler: Sampler) -> list[Proposal] | Reject:
    """Proposals, likeliest first; or why there is none."""
    sample = sampler.draw(sampler.token_counts()[0], "random", torch.float64)
    watch = Watch()
    for node, t in sample.operands.items():
        watch.tag(t, node.name)
    try:
        with torch.no_grad():
            run_exact(region.module(), sample.inputs, watch)
    except Exception as error:  # noqa: BLE001  any failure of the user's code on samples means: not understood
        return not_run(error, region.out.name)
    views = [seen for seen in (_by_product(region, watch), *_by_node(region, watch)) if seen is not None]
    if not views:
        return Reject("match.products", "not every expert weight takes part in a matrix product", region.out.name)
    for seen in views:
        if found := list(itertools.islice(_activations(region, seen), _MOST)):
            return [p for parts in found for p in _proposals(region, seen, parts)] or Reject(
                "match.shapes", f"experts {region.down.sizes} do not map {region.hidden} to itself", region.out.name
            )
    return Reject("match.activation", _nearest_activation(region), region.down.uses[0].name)


def _by_product(region: Region, watch: Watch) -> _Seen | None:
    """The watched products of each bank in order of execution, their rows one after the other."""
    banks = (*region.ups, region.down)
    names = [{p.name for p in bank.params} for bank in banks]
    products: list[list[Product]] = [[] for _ in banks]
    for product in watch.products:
        for i, members in enumerate(names):
            if product.tag & members:
                products[i].append(product)
    if not all(products):
        return None

    def bias(group: list[Product]) -> tuple[Node, ...]:
        tags = frozenset().union(*(p.bias for p in group))
        return tuple(n for n in region.params if n.name in tags)

    ups = tuple(torch.cat([p.out for p in group]) for group in products[:-1] if _one_width(group))
    if len(ups) != len(region.ups) or not _one_width(products[-1]):
        return None
    hidden = torch.cat([p.rows for p in products[-1]])
    return _Seen(ups, hidden, tuple(bias(group) for group in products))


def _one_width(group: list[Product]) -> bool:
    return len({(p.rows.shape[-1], p.out.shape[-1]) for p in group}) == 1


def _by_node(region: Region, watch: Watch) -> Iterator[_Seen]:
    """For products that an einsum folded otherwise: the values of the nodes themselves, which keep their shape from the
    up projections through a pointwise activation."""
    ups = [watch.values.get(bank.uses[-1].name) for bank in region.ups]
    if any(u is None for u in ups):
        return
    inner = _inner(region)
    for node in reversed(region.nodes):
        hidden = watch.values.get(node.name)
        if node in inner and hidden is not None and hidden.is_floating_point():
            yield _Seen(tuple(u for u in ups if u is not None), hidden, ((),) * (len(ups) + 1))


def _activations(region: Region, seen: _Seen) -> Iterator[_Parts]:
    """Every registered activation that turns what leaves the up projection into what enters the down projection."""
    inner = _inner(region)
    numbers, called = [*constants(inner), math.inf], {target_name(n) for n in inner}
    for gate, up, order, banks in _gate_up_choices(region, seen):
        if gate.shape != seen.hidden.shape or (up is not None and up.shape != gate.shape):
            continue
        for (name, gated), act in ACTIVATIONS.items():
            if gated == (up is not None) and not (region.training and act.bends and called.isdisjoint(act.bends)):
                for params in itertools.product((*act.usual, *numbers), repeat=len(act.params)):
                    if _fits(act, params, gate, up, seen.hidden):
                        yield _Parts(name, params, gated, order, banks)


def _gate_up_choices(region: Region, seen: _Seen) -> Iterator[tuple[Tensor, Tensor | None, Order, tuple[Bank, ...]]]:
    if len(seen.ups) == 1:
        for order in _ORDERS:
            gate, up = split_gate_up(seen.ups[0], order)
            yield gate, up, order, tuple(region.ups)
        yield seen.ups[0], None, "gate_up", tuple(region.ups)
    else:
        first, second = seen.ups
        yield first, second, "gate_up", tuple(region.ups)
        yield second, first, "gate_up", tuple(reversed(region.ups))


def _fits(act: Activation, params: tuple[float, ...], gate: Tensor, up: Tensor | None, hidden: Tensor) -> bool:
    """A few rows first, then all.  Row by row: rows differ in scale by decades."""
    for rows in (slice(8), slice(None)):
        found = act.forward(gate[rows], None if up is None else up[rows], *params)
        error, scale = (found - hidden[rows]).norm(dim=-1), hidden[rows].norm(dim=-1)
        if not bool((error <= _CLOSE * scale).all()):
            return False
    return bool((scale > 0).any())


def _nearest_activation(region: Region) -> str:
    between = [target_name(n) for n in region.nodes if n in _inner(region)]
    known = ", ".join(sorted({n for n, _ in ACTIVATIONS}))
    return f"the values between the projections come from {between}; known activations: {known}"


def _inner(region: Region) -> set[Node]:
    """Nodes after an up projection and before the down projection."""
    after: set[Node] = set()
    uses = {u for b in region.ups for u in b.uses}
    ends = set(region.down.uses)
    for node in region.nodes:
        if node not in ends and any(p in uses or p in after for p in node.all_input_nodes):
            after.add(node)
    before: set[Node] = set()
    for node in reversed(region.nodes):
        if any(u in ends or u in before for u in node.users):
            before.add(node)
    return after & before


def _proposals(region: Region, seen: _Seen, parts: _Parts) -> Iterator[Proposal]:
    h = region.hidden
    experts, *sizes = region.down.sizes
    if h not in sizes:
        return
    inner = sizes[0] if sizes[1] == h else sizes[1]
    norm_nodes = [
        n
        for n in region.params
        if n not in itertools.chain(*seen.biases) and tuple(tensor(n).shape) == (h,)  # type: ignore[union-attr]
    ]
    base = ExpertSpec(
        experts,
        h,
        inner,
        act=parts.act,
        act_params=parts.params,
        gated=parts.gated,
        w13_bias=bool(seen.biases[0]),
        w2_bias=bool(seen.biases[-1]),
        act_dtype=_act_dtype(region),
        compute_dtype=_compute_dtype(region),
    )
    bindings = _bindings(region, seen, parts, inner)
    for expert, on, (binding, operands) in itertools.product(
        _with_norms(base, norm_nodes, region), ("output", "input"), bindings
    ):
        combine = CombineSpec(on, *_combine_dtypes(region))  # type: ignore[arg-type]
        norm = ((Operand("norm"),), tuple(norm_nodes)) if expert.norm else ((), ())
        yield Proposal(
            MoESpec(region.top_k, expert, combine),
            WeightBinding((*binding, *norm[0])),
            (*operands, *norm[1]),
        )


def _with_norms(base: ExpertSpec, norm_nodes: list[Node], region: Region) -> list[ExpertSpec]:
    if len(norm_nodes) != 1:
        return [base]
    kinds: tuple[Norm, ...] = ("rms", "rms_plus_one", "rms_input_scaled")
    small = [c for c in constants(region.nodes) if c < 0.1] or [0.0]
    return [dataclasses.replace(base, norm=kind, norm_eps=eps) for kind in kinds for eps in small]


def _bindings(
    region: Region, seen: _Seen, parts: _Parts, inner: int
) -> list[tuple[tuple[Operand, ...], tuple[Node, ...]]]:
    """Ways to read the banks: one, or two per bank whose last two sizes are equal."""
    names = ("w13",) if len(parts.banks) == 1 and parts.gated else ("w1", "w3")[: len(parts.banks)]
    out = 2 * inner if len(parts.banks) == 1 and parts.gated else inner
    choices: list[list[Operand]] = []
    operands: list[Node] = []
    for name, bank, rows, columns in [
        *((n, b, out, region.hidden) for n, b in zip(names, parts.banks, strict=True)),
        ("w2", region.down, region.hidden, inner),
    ]:
        form = "stacked" if bank.stacked else "list"
        order = parts.order if name == "w13" else "gate_up"
        _, a, b = bank.sizes
        turned = [t for t, sizes in ((False, (rows, columns)), (True, (columns, rows))) if (a, b) == sizes]
        choices.append([Operand(name, form, t, order) for t in turned])  # type: ignore[arg-type]
        operands += bank.params
    biases: list[Operand] = []
    for name, bank in zip((*names, "w2"), (*parts.banks, region.down), strict=True):
        index = region.ups.index(bank) if bank in region.ups else -1
        if mine := _by_expert(bank, seen.biases[index]):
            form = "stacked" if len(mine) == 1 else "list"
            order = parts.order if name == "w13" else "gate_up"
            biases.append(Operand(f"{name}_bias", form, False, order))  # type: ignore[arg-type]
            operands += mine
    return [((*choice, *biases), tuple(operands)) for choice in itertools.product(*choices)]


def _by_expert(bank: Bank, biases: tuple[Node, ...]) -> tuple[Node, ...]:
    """Biases in the order of the bank's experts: those that belong to the same modules."""
    owners = [str(p.target).rsplit("_parameters_", 1)[0] for p in bank.params]
    if len(biases) <= 1 or any(str(n.target).rsplit("_parameters_", 1)[0] not in owners for n in biases):
        return biases
    return tuple(sorted(biases, key=lambda n: owners.index(str(n.target).rsplit("_parameters_", 1)[0])))


def _act_dtype(region: Region) -> DTypeName:
    """float32 when the activation of a half-precision block is evaluated in float32."""
    own = tensor(region.down.uses[0])
    inner = {t.dtype for n in _inner(region) if (t := tensor(n)) is not None}
    return "float32" if own is not None and own.dtype.itemsize < 4 and torch.float32 in inner else ""


def _compute_dtype(region: Region) -> DTypeName:
    """The dtype of the products where it is not that of the weights."""
    product, weight = fake(region.down.uses[0]), fake(region.down.params[0])
    return "" if product.dtype == weight.dtype else str(product.dtype).removeprefix("torch.")  # type: ignore[return-value]


def _combine_dtypes(region: Region) -> tuple[str, str]:
    """(accumulate, out_dtype): a sum over k accumulates in float32 inside; an in-place addition in its own dtype."""
    x, out = fake(region.x), fake(region.out)
    in_place = [n for n in region.nodes if target_name(n).rstrip("_") in ("index_add", "scatter_add", "index_put")]
    kept = [tensor(n.args[0]) for n in in_place if isinstance(n.args[0], Node)]
    halves = [t for t in kept if t is not None and t.dtype.is_floating_point and t.dtype.itemsize < 4]
    accumulate = "" if halves or x.dtype.itemsize >= 4 else "float32"
    return accumulate, "" if x.dtype == out.dtype else str(out.dtype).removeprefix("torch.")


def sample_operands(proposal: Proposal, sample: Sample) -> list[Tensor]:
    """The sampled tensors in the order of the proposal's operands."""
    return [sample.operands[node] for node in proposal.operands]
