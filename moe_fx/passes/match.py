"""MATCH: from what a region does to its expert weights, to the specification that says the same.

The region is run once in float64 under a watch (``exact``).  What enters and leaves each projection is compared with
every registered activation; shapes, taps and dtypes give the rest.  Whatever stays open (which of two square sizes is the
input, where a norm's weight goes) becomes several proposals: VERIFY decides, so matching may be liberal.
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
from moe_fx.passes.dataflow import target_name, tensor
from moe_fx.passes.exact import Product, Watch, run_exact
from moe_fx.passes.regions import Region
from moe_fx.passes.sampling import Sample, Sampler, constants
from moe_fx.reasons import Reject
from moe_fx.reference import ACTIVATIONS
from moe_fx.spec import CombineSpec, DTypeName, ExpertSpec, MoESpec, Norm

_CLOSE = 1e-9
_ORDERS: tuple[Order, ...] = get_args(Order)


@dataclass(frozen=True, slots=True)
class Proposal:
    """operands: the region's parameter nodes in the order of ``binding`` (E of them for a "list")."""

    spec: MoESpec
    binding: WeightBinding
    operands: tuple[Node, ...]


@dataclass(slots=True)
class _Seen:
    """The projections of one run: rows into and out of the up banks (by bank) and the down bank."""

    ups: list[tuple[Tensor, Tensor]]
    down: tuple[Tensor, Tensor]
    up_bias: list[Node]
    down_bias: list[Node]


def propose(region: Region, sampler: Sampler) -> list[Proposal] | Reject:
    """Proposals, likeliest first; or why there is none."""
    module = region.module()
    sample = sampler.draw(sampler.token_counts()[-1], "random", torch.float64)
    watch = Watch()
    for node, t in sample.operands.items():
        watch.tag(t, node.name)
    try:
        with torch.no_grad():
            run_exact(module, sample.inputs, watch)
    except Exception as error:  # any failure of the user's code on samples means: not understood
        return Reject("verify.run", f"{type(error).__name__}: {error}", region.out.name)
    seen = _projections(region, watch)
    if isinstance(seen, Reject):
        return seen
    found = list(_activations(region, seen))
    if not found:
        return Reject("match.activation", _nearest_activation(region), region.down.uses[0].name)
    return [p for parts in found for p in _proposals(region, seen, parts)]


def _projections(region: Region, watch: Watch) -> _Seen | Reject:
    """Sorts the watched products into up and down, in order of execution."""
    names = [{p.name for p in bank.params} for bank in (*region.ups, region.down)]
    by_bank: dict[int, list[Product]] = {}
    for product in watch.products:
        bank = next((i for i, members in enumerate(names) if product.tag & members), None)
        if bank is not None:
            by_bank.setdefault(bank, []).append(product)
    if len(by_bank) != len(region.ups) + 1:
        return Reject("match.products", "not every expert weight takes part in a matrix product", region.out.name)

    def rows(bank: int) -> tuple[Tensor, Tensor]:
        products = by_bank[bank]
        return torch.cat([p.rows for p in products]), torch.cat([p.out for p in products])

    def bias(bank: int) -> list[Node]:
        tags = frozenset().union(*(p.bias for p in by_bank[bank]))
        return [n for n in region.params if n.name in tags]

    last = len(region.ups)
    ups = [rows(i) for i in range(last)]
    return _Seen(ups, rows(last), [b for i in range(last) for b in bias(i)], bias(last))


@dataclass(frozen=True, slots=True)
class _Parts:
    """What the values decided: activation, its parameters, order of gate and up, and which up bank is the gate."""

    act: str
    params: tuple[float, ...]
    gated: bool
    order: Order
    banks: tuple[Bank, ...]


def _activations(region: Region, seen: _Seen) -> Iterator[_Parts]:
    """Every registered activation that turns what leaves the up projection into what enters the down projection."""
    hidden = seen.down[0]
    numbers = [*constants(region), math.inf]
    for pair, order, banks in _gate_up_choices(region, seen):
        gate, up = pair
        if gate.shape != hidden.shape:
            continue
        for (name, gated), act in ACTIVATIONS.items():
            if gated != (up is not None):
                continue
            for params in itertools.product(numbers, repeat=len(act.params)):
                if _close(act.forward(gate, up, *params), hidden):
                    yield _Parts(name, params, gated, order, banks)


def _gate_up_choices(
    region: Region, seen: _Seen
) -> Iterator[tuple[tuple[Tensor, Tensor | None], Order, tuple[Bank, ...]]]:
    outs = [out for _, out in seen.ups]
    if len(outs) == 1:
        (out,) = outs
        for order in _ORDERS:
            yield split_gate_up(out, order), order, tuple(region.ups)
        yield (out, None), "gate_up", tuple(region.ups)
    elif len(outs) == 2:
        yield (outs[0], outs[1]), "gate_up", tuple(region.ups)
        yield (outs[1], outs[0]), "gate_up", tuple(reversed(region.ups))


def _close(a: Tensor, b: Tensor) -> bool:
    """Row by row: rows differ in scale by decades."""
    error, scale = (a - b).norm(dim=-1), b.norm(dim=-1)
    return bool((error <= _CLOSE * scale).all()) and bool(scale.max() > 0)


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
    experts, *_ = region.down.sizes
    inner = seen.down[0].shape[-1]
    if seen.ups[0][0].shape[-1] != h or seen.down[1].shape[-1] != h:
        return
    norm_nodes = [
        n for n in region.params if n not in (*seen.up_bias, *seen.down_bias) and tuple(tensor(n).shape) == (h,)  # type: ignore[union-attr]
    ]
    base = ExpertSpec(
        experts,
        h,
        inner,
        act=parts.act,
        act_params=parts.params,
        gated=parts.gated,
        w13_bias=bool(seen.up_bias),
        w2_bias=bool(seen.down_bias),
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
    small = [c for c in constants(region) if c < 0.1] or [0.0]
    return [dataclasses.replace(base, norm=kind, norm_eps=eps) for kind in kinds for eps in small]


def _bindings(
    region: Region, seen: _Seen, parts: _Parts, inner: int
) -> list[tuple[tuple[Operand, ...], tuple[Node, ...]]]:
    """Ways to read the banks: one, or two per bank whose last two sizes are equal."""
    names = ("w13",) if len(parts.banks) == 1 and parts.gated else ("w1", "w3")[: len(parts.banks)]
    out_sizes = [seen.ups[region.ups.index(b)][1].shape[-1] for b in parts.banks]
    choices: list[list[Operand]] = []
    operands: list[Node] = []
    for name, bank, out, size in [
        *((n, b, o, region.hidden) for n, b, o in zip(names, parts.banks, out_sizes, strict=True)),
        ("w2", region.down, region.hidden, inner),
    ]:
        form = "stacked" if bank.stacked else "list"
        order = parts.order if name == "w13" else "gate_up"
        _, a, b = bank.sizes
        turned = [t for t, sizes in ((False, (out, size)), (True, (size, out))) if (a, b) == sizes]
        choices.append([Operand(name, form, t, order) for t in turned])  # type: ignore[arg-type]
        operands += bank.params
    biases: list[Operand] = []
    for name, bank, group in [
        *((n, b, seen.up_bias) for n, b in zip(names, parts.banks, strict=True)),
        ("w2", region.down, seen.down_bias),
    ]:
        mine = _bias_of(bank, group, list(region.ups), single=name == "w13" or name == "w2" or len(names) == 1)
        if mine:
            form = "stacked" if len(mine) == 1 else "list"
            biases.append(Operand(f"{name}_bias", form, False, parts.order if name == "w13" else "gate_up"))  # type: ignore[arg-type]
            operands += mine
    return [((*choice, *biases), tuple(operands)) for choice in itertools.product(*choices)]


def _bias_of(bank: Bank, group: list[Node], ups: list[Bank], single: bool) -> list[Node]:
    """The bias nodes of ``bank`` among those seen, in order of its experts."""
    nodes = list(group)
    if not single:
        half = len(nodes) // 2
        nodes = nodes[:half] if bank is ups[0] else nodes[half:]
    if bank.stacked or len(nodes) == 1:
        return nodes
    prefix = [str(p.target).rsplit("_parameters_", 1)[0] for p in bank.params]
    return sorted(nodes, key=lambda n: prefix.index(str(n.target).rsplit("_parameters_", 1)[0]))


def _act_dtype(region: Region) -> DTypeName:
    """float32 when the activation of a half-precision block is evaluated in float32."""
    own = tensor(region.down.uses[0])
    inner = {t.dtype for n in _inner(region) if (t := tensor(n)) is not None}
    return "float32" if own is not None and own.dtype.itemsize < 4 and torch.float32 in inner else ""


def _compute_dtype(region: Region) -> DTypeName:
    """The dtype of the products where it is not that of the weights."""
    product, weight = tensor(region.down.uses[0]), tensor(region.down.params[0])
    assert product is not None and weight is not None
    return "" if product.dtype == weight.dtype else str(product.dtype).removeprefix("torch.")  # type: ignore[return-value]


def _combine_dtypes(region: Region) -> tuple[str, str]:
    """(accumulate, out_dtype): a sum over k accumulates in float32 inside; an in-place addition in its target's dtype."""
    x, out = tensor(region.x), tensor(region.out)
    assert x is not None and out is not None
    in_place = [n for n in region.nodes if target_name(n).rstrip("_") in ("index_add", "scatter_add", "index_put")]
    kept = [tensor(n.args[0]) for n in in_place if isinstance(n.args[0], Node)]
    halves = [t for t in kept if t is not None and t.dtype.is_floating_point and t.dtype.itemsize < 4]
    accumulate = "" if halves or x.dtype.itemsize >= 4 else "float32"
    return accumulate, "" if x.dtype == out.dtype else str(out.dtype).removeprefix("torch.")


def sample_operands(proposal: Proposal, sample: Sample) -> list[Tensor]:
    """The sampled tensors in the order of the proposal's operands."""
    return [sample.operands[node] for node in proposal.operands]
