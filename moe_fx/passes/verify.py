"""VERIFY: the region against its proposed specification.  Soundness comes from here.

1. Mathematics: both in float64 on random weights and routings; any difference above 1e-9 is another formula.  With
   gradients of x, routing weights and parameters when the graph trains.
2. Rounding: the region as it is, and the fused op, in their own dtypes, both against float64: the op's error may be at
   most twice the region's own plus 4 eps (root mean square, and likewise the maximum).  Not for weights on meta, which
   no device can run.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from moe_fx.binding import bind
from moe_fx.passes.coverage import Coverage
from moe_fx.passes.dataflow import fake
from moe_fx.passes.exact import run_exact
from moe_fx.passes.id_range import IdRange
from moe_fx.passes.match import Proposal, sample_operands
from moe_fx.passes.narrow import loses
from moe_fx.passes.planting import at_zero, planted
from moe_fx.passes.regions import Region
from moe_fx.passes.sampling import Sample, Sampler
from moe_fx.passes.shrink import Twin
from moe_fx.reasons import Reject, not_run
from moe_fx.reference import experts_backward, experts_forward

Fused = Callable[[Tensor, Tensor, Tensor, list[Tensor], Proposal], list[Tensor]]
_FORMULA = 1e-9


def verify(twin: Twin, proposal: Proposal, bounds: IdRange, training: bool, fused: Fused) -> Reject | None:
    """None when ``proposal`` for the small region holds.  bounds: of the ids.  ``fused(x, ids, weights, operands,
    proposal)`` runs, in the true dtypes, whatever may stand in the place of the block for so many tokens."""
    reject = _formula(twin.region, proposal, Sampler(twin.region, bounds, seed=1), training)
    if reject is not None or fake(twin.original.down.params[0]).device.type == "meta":
        return reject
    sampler = Sampler(twin.original, bounds, seed=2)
    patterns = sampler.patterns()[: 1 if sampler.large else 3]
    for sample in sampler.samples(None, patterns):
        if reject := _same_rounding(twin.original, twin.enlarge(proposal), sample, fused):
            return reject
    return None


def _formula(region: Region, proposal: Proposal, sampler: Sampler, training: bool) -> Reject | None:
    """The mathematics, on samples that reach both sides of every decision in the block."""
    if reject := loses(region, sampler.bounds):
        return reject
    module = region.module()
    patterns = sampler.patterns()
    coverage = Coverage(region, *sampler.bounds[:2])
    for sample in sampler.samples(torch.float64, patterns):
        if reject := _same_formula(module, region, proposal, sample, coverage):
            return reject
    for sample in sampler.more():
        if not coverage.missing():
            break
        if reject := _same_formula(module, region, proposal, sample, coverage):
            return reject
    if missing := coverage.missing():
        text = f"no sample takes these decisions both ways: {', '.join(missing[:4])}"
        return Reject("verify.coverage", text, region.out.name)
    for sample in itertools.chain(planted(sampler, proposal), _far_below(sampler)):
        if reject := _same_formula(module, region, proposal, sample):
            return reject
    if reject := _same_where_finite(module, region, proposal, sampler):
        return reject
    if training and (reject := _same_derivatives(module, region, proposal, sampler)):
        return reject
    return None


def _same_formula(
    module: Any, region: Region, proposal: Proposal, sample: Sample, coverage: Coverage | None = None
) -> Reject | None:
    with torch.no_grad():
        try:
            theirs, *scores = run_exact(module, sample.inputs, coverage=coverage)
        except Exception as error:  # noqa: BLE001  the user's code may raise anything on ids that it never sees
            if coverage is not None:
                coverage.drop()
            if sample.label.startswith("outside"):
                return None  # this id out of range is an error there: nothing to preserve
            return not_run(error, sample.label)
        try:
            ours = _reference(proposal, sample, _weights(sample, scores))
        except (IndexError, RuntimeError, ValueError) as error:
            return Reject("match.shapes", f"the proposal does not fit: {error}".splitlines()[0], sample.label)
    difference = _by_row(ours, theirs.reshape(ours.shape))
    if difference > _FORMULA:
        return Reject("verify.values", f"relative difference {difference:.1e} in float64", sample.label)
    if coverage is not None:
        coverage.commit()
    return None


def _far_below(sampler: Sampler) -> Iterator[Sample]:
    """Where shares are made inside: every chosen weight far below 0, and what is put elsewhere must be lower yet."""
    for size in (20.0, 60.0, 600.0) if sampler.region.scores is not None else ():
        sample = sampler.draw(max(sampler.token_counts()), "random", torch.float64)
        sample.weights.abs_().clamp_(0.1, 1.0).mul_(-size)
        yield sample


def _same_where_finite(module: Any, region: Region, proposal: Proposal, sampler: Sampler) -> Reject | None:
    """A row of x that holds NaN or infinity: where the original is finite all the same, so must the op be."""
    for value in (torch.nan, torch.inf):
        sample = sampler.draw(max(sampler.token_counts()), "random", torch.float64)
        sample.x[0, 0] = value
        with torch.no_grad():
            try:
                theirs, *scores = run_exact(module, sample.inputs)
            except Exception:  # noqa: BLE001  such a row is an error there: nothing to preserve
                continue
            ours = _reference(proposal, sample, _weights(sample, scores))
        theirs = theirs.reshape(ours.shape)
        finite = theirs.isfinite().all(-1)
        if not bool(ours[finite].isfinite().all()):
            return Reject("verify.values", f"finite there and not here for rows with {value}", sample.label)
    return None


def _neutral(proposal: Proposal) -> Any:
    """The spec in float64 throughout, weights cast expert by expert: the formula alone."""
    spec = proposal.spec
    return dataclasses.replace(
        spec,
        expert=dataclasses.replace(spec.expert, act_dtype="", compute_dtype="float64"),
        combine=dataclasses.replace(spec.combine, accumulate="", out_dtype=""),
    )


def _weights(sample: Sample, scores: list[Tensor]) -> Tensor:
    """The routing weights [T, k]: an input of the region, or picked from the dense scores that it makes."""
    if not scores:
        return sample.weights
    matrix = scores[0] if scores[0].shape[0] == sample.x.shape[0] else scores[0].t()
    return matrix.gather(1, sample.ids)


def _reference(proposal: Proposal, sample: Sample, weights: Tensor) -> Tensor:
    experts = bind(proposal.binding, sample_operands(proposal, sample), proposal.spec.expert.experts)
    return experts_forward(sample.x, sample.ids, weights, experts, _neutral(proposal))


def _same_derivatives(module: Any, region: Region, proposal: Proposal, sampler: Sampler) -> Reject | None:
    """A few samples, every expert once, and as many more as every decision takes: a branch may detach."""
    check = _same_tangents if sampler.large else _same_gradients
    coverage = Coverage(region, *sampler.bounds[:2])
    patterns = sampler.patterns()
    every = [p for p in patterns if p.startswith("every")]
    few = max(3, 2 * len(sampler.token_counts()))
    rest = [p for p in patterns[few:] if p not in every]
    draw = partial(sampler.samples, torch.float64)
    needed = itertools.chain(draw([*patterns[:few], *every]), planted(sampler, proposal), at_zero(sampler, proposal))
    further = itertools.chain(draw(rest), sampler.more())
    for sample in itertools.chain(needed, itertools.takewhile(lambda _: coverage.missing(), further)):
        try:
            reject = check(module, region, proposal, sample, coverage)
        except Exception:
            if not sample.label.startswith("outside"):
                raise
            coverage.drop()
            continue
        if reject:
            return reject
        coverage.commit()
    if missing := coverage.missing():
        text = f"no sample with gradients takes these decisions both ways: {', '.join(missing[:4])}"
        return Reject("verify.coverage", text, region.out.name)
    return None


def _same_gradients(
    module: Any, region: Region, proposal: Proposal, sample: Sample, coverage: Coverage | None = None
) -> Reject | None:
    """Gradients of x, routing weights and operands for a random gradient of the result.

    Rows differ in scale by decades: the gradient of the result is divided by the size of its row, so that all count.
    """
    nodes = region.inputs
    wanted = [region.x, *([region.weights] if region.weights is not None else []), *proposal.operands]
    by_node = dict(zip(nodes, sample.inputs, strict=True))
    for node in wanted:
        by_node[node] = by_node[node].detach().clone().requires_grad_()
    with torch.enable_grad():
        theirs, *scores = run_exact(module, [by_node[n] for n in nodes], coverage=coverage)
        weights = _weights(sample, scores)
        dy = torch.randn(sample.x.shape, generator=torch.Generator().manual_seed(1), dtype=theirs.dtype)
        dy = (dy.to(theirs.device) / _size(theirs.detach().reshape(dy.shape))).reshape(theirs.shape)
        if not theirs.requires_grad:
            return Reject("verify.gradients", "the block has no gradient at all", sample.label)
        expected = torch.autograd.grad(theirs, [by_node[n] for n in wanted], dy, allow_unused=True, retain_graph=True)
    spec = _neutral(proposal)
    operands = sample_operands(proposal, sample)
    grads = [torch.zeros_like(o) for o in operands]
    e = spec.expert.experts
    with torch.no_grad():
        dx, dweights = experts_backward(
            dy.reshape(sample.x.shape),
            sample.x,
            sample.ids,
            weights.detach(),
            bind(proposal.binding, operands, e),
            spec,
            bind(proposal.binding, grads, e),
        )
    if scores and region.weights is not None:  # on through what makes the scores
        (dweights,) = torch.autograd.grad(weights, [by_node[region.weights]], dweights)
    ours = [dx, *([dweights] if region.weights is not None else []), *grads]
    sizes = {region.x: _size(sample.x), region.weights: _size(sample.weights.unsqueeze(-1)).squeeze(-1)}
    for node, mine, other in zip(wanted, ours, expected, strict=True):
        other = torch.zeros_like(mine) if other is None else other.reshape(mine.shape)
        size = sizes.get(node, 1.0)
        error = _relative(mine * size, other * size)
        if error > _FORMULA:
            text = f"gradient of {node.name} differs by {error:.1e} in float64"
            return Reject("verify.gradients", text, sample.label)
    return None


def _size(rows: Tensor) -> Tensor:
    """The norm of each row, 1 for a row of zeros."""
    norm = rows.norm(dim=-1, keepdim=True)
    return torch.where(norm > 0, norm, 1.0)


def _same_tangents(
    module: Any, region: Region, proposal: Proposal, sample: Sample, coverage: Coverage | None = None
) -> Reject | None:
    """As ``_same_gradients`` for large experts: the derivative of all inputs at once, each along itself at a rate of
    its own, which needs no gradient of the size of the bank."""
    wanted = [region.x, *([region.weights] if region.weights is not None else []), *proposal.operands]
    by_node = dict(zip(region.inputs, sample.inputs, strict=True))
    factors = torch.Generator().manual_seed(1)
    with forward_ad.dual_level(), torch.no_grad():
        for node in wanted:
            held = by_node[node]
            tangent = held * (float(torch.rand(1, generator=factors)) * 2 - 1)
            if node in (region.x, region.weights):  # small enough for a direction of its own
                tangent = tangent * torch.randn(held.shape, generator=factors, dtype=held.dtype).to(held.device)
            by_node[node] = forward_ad.make_dual(held, tangent)
        theirs, *scores = run_exact(module, [by_node[n] for n in region.inputs], coverage=coverage)
        dual = dataclasses.replace(
            sample,
            x=by_node[region.x].reshape(sample.x.shape),
            weights=sample.weights if region.weights is None else by_node[region.weights].reshape(sample.ids.shape),
            operands={n: by_node[n] for n in sample.operands},
        )
        ours = _reference(proposal, dual, _weights(dual, scores))
        tangents = [forward_ad.unpack_dual(t.reshape(ours.shape)).tangent for t in (theirs, ours)]
        if any(t is None for t in tangents):
            return Reject("verify.gradients", "the block has no gradient at all", sample.label)
        error = _by_row(tangents[1], tangents[0])
    if error > _FORMULA:
        return Reject("verify.gradients", f"the derivative differs by {error:.1e} in float64", sample.label)
    return None


def _same_rounding(region: Region, proposal: Proposal, sample: Sample, fused: Fused) -> Reject | None:
    """The tolerance rule on the true dtypes; the float64 reference runs on the same rounded inputs."""
    with torch.no_grad():
        try:
            theirs, *scores = region.run(sample.inputs)
        except Exception as error:  # noqa: BLE001  as above: anything may be raised
            return not_run(error, sample.label)
        operands = sample_operands(proposal, sample)
        weights = _weights(sample, scores)
        results = fused(sample.x, sample.ids, weights, operands, proposal)
        exact = Sample(
            [],
            sample.x.double(),
            sample.ids,
            weights.double(),
            sample.operands,
            sample.label,
        )
        truth = _reference(proposal, exact, exact.weights)
    theirs = theirs.reshape(truth.shape)
    eps = torch.finfo(theirs.dtype).eps
    for ours, (name, measure) in itertools.product(results, (("rms", _relative), ("maximum", _relative_max))):
        if theirs.dtype != ours.dtype:
            return Reject("verify.rounding", f"result is {theirs.dtype}, the op gives {ours.dtype}", sample.label)
        own, fused_error = measure(theirs.double(), truth), measure(ours.double(), truth)
        if not fused_error <= 2 * own + 4 * eps:
            text = f"{name} error {fused_error:.1e} against the original's {own:.1e}"
            return Reject("verify.rounding", text, sample.label)
    return None


def _by_row(a: Tensor, b: Tensor) -> float:
    """The largest relative difference of a row; rows differ in scale by decades."""
    if a.numel() == 0:
        return 0.0
    error, scale = (a - b).norm(dim=-1), b.norm(dim=-1)
    ratio = torch.where(error == 0, 0.0, error / scale)
    return float(ratio.nan_to_num(nan=torch.inf).max())


def _relative(a: Tensor, b: Tensor) -> float:
    """Root mean square of a - b over that of b; inf where either is not finite while the other is."""
    if a.numel() == 0:
        return 0.0
    scale = b.double().norm()
    error = (a.double() - b.double()).norm()
    if not torch.isfinite(error):
        return float("inf")
    return float(error / scale) if scale > 0 else float(error)


def _relative_max(a: Tensor, b: Tensor) -> float:
    if a.numel() == 0:
        return 0.0
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))
