"""MATCH and VERIFY for routers: the RouterSpec that chooses the same experts with the same weights.

1. In float64, on logits without ties, every combination of what ``RouterSpec`` can say (and the router's own numbers
   and shapes suggest) is tried: first what decides the ids, then what decides the weights.
2. With gradients, when the graph trains.
3. In the router's own dtypes, exact ties and saturated scores included: the ids must be the same bits, because the op
   runs the same topk on the same values; the weights the same bits or within the tolerance rule.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Interpreter, Node

from moe_fx.passes.dataflow import fake, target_name, tensor
from moe_fx.passes.exact import run_exact
from moe_fx.passes.routers.region import RouterRegion
from moe_fx.passes.routers.samples import EVERY, EXACT, RouterSample, RouterSampler
from moe_fx.passes.sampling import constants
from moe_fx.reasons import Reject, not_run
from moe_fx.reference.experts import dtype_of
from moe_fx.reference.router import choice_of, route, route_backward, weights_of
from moe_fx.spec import DTypeName, RouterSpec

_EXACT = 1e-10
_FORMULA = 1e-9
_MOST_GROUPS = 16
_SCORES = ("softmax", "sigmoid", "softplus", "sqrt", "exp")


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """bias, scale: which of the region's params they are (None: there is none)."""

    spec: RouterSpec
    bias: int | None = None
    scale: int | None = None

    def operands(self, params: list[Tensor]) -> tuple[Tensor | None, Tensor | None]:
        """(the selection bias, the per-expert scale)."""
        return tuple(None if i is None else params[i] for i in (self.bias, self.scale))  # type: ignore[return-value]

    def route(self, sample: RouterSample, k: int) -> tuple[Tensor, Tensor]:
        return route(sample.logits, *self.operands(sample.params), self.spec, k)


@dataclass(slots=True)
class _Seen:
    """A sample and what the router made of it: ids [T, k], weights [T, k]."""

    sample: RouterSample
    ids: Tensor
    weights: Tensor


def recognise(region: RouterRegion, training: bool) -> Hypothesis | Reject:
    """The hypothesis that holds, or why none does."""
    if len(region.params) > 2:
        names = ", ".join(p.name for p in region.params)
        return Reject("find.inputs", f"router: reads {len(region.params)} parameters ({names})", region.logits.name)
    choice = _choice(region)
    if choice is None:
        text = f"router: no topk chooses {region.top_k} of {region.experts}; {_ops(region)}"
        return Reject("verify.values", text, region.ids.name)
    try:
        exact = [_run_exact(region, s) for s in RouterSampler(region).samples(EXACT, torch.float64)]
    except Exception as error:  # noqa: BLE001  the user's code may raise anything on samples: not understood
        return not_run(error, region.logits.name, "router: ")
    chosen = [h for h in selections(region, choice) if all(_same_ids(h, seen, region.top_k) for seen in exact)]
    if not chosen:
        return Reject(
            "verify.values", f"router: no known way of choosing gives its ids; {_ops(region)}", region.ids.name
        )
    formulas = [w for h in chosen for w in _weightings(region, h, exact)]
    if not formulas:
        text = f"router: its ids are those of {_short(chosen[0].spec)}, its weights of no known formula; {_ops(region)}"
        return Reject("verify.values", text, region.weights.name)
    if training:
        kept = [h for h in formulas if all(_same_gradients(region, h, seen.sample) for seen in exact)]
        if not kept:
            return Reject(
                "verify.gradients", f"router: {_short(formulas[0].spec)} has other gradients", region.weights.name
            )
        formulas = kept
    return _in_own_dtypes(region, choice, formulas)


# --- what decides the ids


def selections(region: RouterRegion, choice: Node) -> Iterator[Hypothesis]:
    """Every way of choosing that the region's parameters, shapes and topk calls allow; likeliest first."""
    in_order = bool(choice.kwargs.get("sorted", choice.args[4] if len(choice.args) > 4 else True))
    for (bias, scale), order, score in itertools.product(
        _roles(len(region.params)), _orders(region, choice), ("softmax", "sigmoid", "sqrtsoftplus")
    ):
        for on in ("scores", "logits") if bias is not None else ("",):
            if order == "topk_first" and on == "scores":
                continue
            spec = RouterSpec(score, order, bias=on, expert_scale=scale is not None, sorted=in_order)  # type: ignore[arg-type]
            yield Hypothesis(spec, bias, scale)
            if order == "score_first":
                for groups in _groupings(region):
                    yield Hypothesis(replace(spec, **groups), bias, scale)


def _roles(params: int) -> list[tuple[int | None, int | None]]:
    return {0: [(None, None)], 1: [(0, None), (None, 0)], 2: [(0, 1), (1, 0)]}[params]  # type: ignore[return-value]


def _choice(region: RouterRegion) -> Node | None:
    """The topk of k out of E from which the ids come, through nothing but integers."""
    seen: set[Node] = set()
    stack = [region.ids]
    while stack:
        node = stack.pop()
        if node in seen or node not in region.nodes:
            continue
        seen.add(node)
        if target_name(node) == "topk":
            return node if (_k(node), _width(node)) == (region.top_k, region.experts) else None
        stack += [n for n in node.all_input_nodes if target_name(n) == "topk" or not _floating(n)]
    return None


def _k(topk: Node) -> int:
    k = topk.kwargs.get("k", topk.args[1] if len(topk.args) > 1 else 0)
    return k if isinstance(k, int) else 0


def _width(topk: Node) -> int:
    """The size that a topk along the last dimension chooses from."""
    source = topk.args[0] if topk.args else None
    t = tensor(source) if isinstance(source, Node) else None
    return int(t.shape[-1]) if t is not None and isinstance(t.shape[-1], int) else 0


def _floating(node: Node) -> bool:
    t = tensor(node)
    return t is not None and t.is_floating_point()


def _orders(region: RouterRegion, choice: Node) -> tuple[str, str]:
    """The order in which score function and choice are written comes first: in float64 a softmax before the choice, and
    renormalised, is the softmax after it."""
    scored = [n for n in region.nodes if target_name(n) in _SCORES]
    late = bool(scored) and region.nodes.index(scored[0]) > region.nodes.index(choice)
    return ("topk_first", "score_first") if late else ("score_first", "topk_first")


def _groupings(region: RouterRegion) -> Iterator[dict[str, Any]]:
    """Group limits for each [.., G, E / G] that the region makes."""
    experts = region.experts
    found: dict[int, None] = {}
    for node in region.nodes:
        t = tensor(node)
        if t is not None and t.ndim >= 3 and isinstance(t.shape[-2], int) and isinstance(t.shape[-1], int):
            count = int(t.shape[-2])
            if 1 < count < experts and count * int(t.shape[-1]) == experts and count <= _MOST_GROUPS:
                found[count] = None
    for count in found:
        written = {k for n in region.nodes if target_name(n) == "topk" and _width(n) == count and (k := _k(n)) < count}
        for kept, score, fill in itertools.product(
            sorted(written) or range(1, count), ("top2_sum", "max"), (-math.inf, 0.0)
        ):
            if score == "max" or experts // count > 1:
                yield {"groups": count, "topk_groups": kept, "group_score": score, "group_fill": fill}


def _same_ids(hypothesis: Hypothesis, seen: _Seen, k: int) -> bool:
    try:
        ids, _ = hypothesis.route(seen.sample, k)
    except (RuntimeError, ValueError):  # a combination that is none
        return False
    return torch.equal(ids, seen.ids)


# --- what decides the weights


def _weightings(region: RouterRegion, chosen: Hypothesis, exact: list[_Seen]) -> Iterator[Hypothesis]:
    """Every formula for the weights that agrees with all of ``exact``."""
    numbers = constants(region.nodes)
    forms = ("clamp", "add") if any("clamp" in target_name(n) for n in region.nodes) else ("add", "clamp")
    sums: list[dict[str, Any]] = [
        {"renormalise": True, "eps": eps, "eps_form": form} for eps in numbers if eps <= 1 for form in forms
    ]
    sums = [{"renormalise": False}, *sums, {"renormalise": True}]
    own = "scores" if any("gather" in target_name(n) for n in region.nodes) else "masked"  # both, where k is small
    origins = sorted(("scores", "masked"), key=lambda o: o != own)
    if chosen.spec.groups == 1 or chosen.bias is not None:
        origins = ["scores"]
    for origin, total in itertools.product(origins, sums):
        spec = replace(chosen.spec, weights_from=origin, **total)
        scale = _ratio(replace(chosen, spec=spec), exact, numbers)
        if scale is None:
            continue
        found = replace(chosen, spec=replace(spec, scale=scale))
        if all(_close(_weights_of(found, seen), seen.weights) for seen in exact):
            yield found


def _weights_of(hypothesis: Hypothesis, seen: _Seen) -> Tensor:
    return weights_of(seen.sample.logits, seen.ids, *hypothesis.operands(seen.sample.params), hypothesis.spec)


def _ratio(hypothesis: Hypothesis, exact: list[_Seen], numbers: list[float]) -> float | None:
    """The factor between the router's weights and the hypothesis', as a number that the router names, or a product or
    quotient of those."""
    ours, theirs = _weights_of(hypothesis, exact[0]), exact[0].weights
    there = ours.abs() > 1e-200
    if not bool(there.any()):
        return None
    found = float((theirs[there] / ours[there]).median())
    named = [1.0, *numbers, *(1 / n for n in numbers), *(a * b for a, b in itertools.combinations(numbers, 2))]
    return next((n for n in named if math.isclose(n, found, rel_tol=_EXACT)), None)


def _close(a: Tensor, b: Tensor) -> bool:
    """Element by element: weights go over decades."""
    same = (a == b) | (a.isnan() & b.isnan())
    return bool((same | ((a - b).abs() <= _EXACT * b.abs())).all())


# --- gradients


def _same_gradients(region: RouterRegion, hypothesis: Hypothesis, sample: RouterSample) -> bool:
    """Gradients of logits and params for a random gradient of the weights."""
    count = 1 + len(region.params)
    leaves = [t.detach().clone().requires_grad_() for t in sample.inputs[:count]]
    with torch.enable_grad():
        ids, weights = run_exact(region.module(), [*leaves, *sample.inputs[count:]])
        ids, weights = ids.reshape(-1, region.top_k).long(), weights.reshape(-1, region.top_k)
        dw = torch.randn(weights.shape, generator=torch.Generator().manual_seed(1), dtype=weights.dtype)
        found: tuple[Tensor | None, ...] = (None,) * count
        if weights.requires_grad:
            found = torch.autograd.grad(weights, leaves, dw, allow_unused=True)
    with torch.no_grad():
        theirs = [torch.zeros_like(a) if g is None else g for a, g in zip(leaves, found, strict=True)]
        bias, scale = hypothesis.operands(sample.params)
        dlogits, dscale = route_backward(dw, sample.logits, ids, bias, scale, hypothesis.spec)
        room = _FORMULA * (dw * weights).norm(dim=-1, keepdim=True)
        ours: list[Tensor] = [torch.zeros_like(p) for p in sample.params]
        if dscale is not None and hypothesis.scale is not None:
            ours[hypothesis.scale] = dscale
        pairs = [(o, t.reshape(o.shape), room.norm()) for o, t in zip(ours, theirs[1:], strict=True)]
        pairs.append((dlogits, theirs[0].reshape(dlogits.shape), room))
        alike = [
            (a == b) | (a.isnan() & b.isnan()) | ((a - b).abs() <= _FORMULA * b.abs() + slack) for a, b, slack in pairs
        ]
        return all(bool(a.all()) for a in alike)


# --- the true dtypes


def _in_own_dtypes(region: RouterRegion, choice: Node, formulas: list[Hypothesis]) -> Hypothesis | Reject:
    """The first formula with the same bits everywhere; else the first with the same ids and weights within the rule."""
    try:
        seen = [_run(region, s) for s in RouterSampler(region, seed=1).samples(EVERY, None)]
    except Exception as error:  # noqa: BLE001  as above
        return not_run(error, region.logits.name, "router: ")
    within: Hypothesis | None = None
    worst = ""
    chosen_from = choice.args[0]
    assert isinstance(chosen_from, Node)
    for hypothesis in _with_dtypes(region, formulas):
        bias, _ = hypothesis.operands(seen[0].sample.params)
        if choice_of(seen[0].sample.logits, bias, hypothesis.spec).dtype != fake(chosen_from).dtype:
            continue  # topk resolves ties by an algorithm of its own for each dtype
        verdicts = [_judge(hypothesis, s, region.top_k) for s in seen]
        if all(v == "same" for v in verdicts):
            return hypothesis
        wrong = [f"{v} on {s.sample.label}" for v, s in zip(verdicts, seen, strict=True) if v not in ("same", "within")]
        worst = worst or (wrong[0] if wrong else "")
        if not wrong:
            within = within or hypothesis
    return within or Reject("verify.rounding", f"router: {_short(formulas[0].spec)}: {worst}", region.weights.name)


def _with_dtypes(region: RouterRegion, formulas: Iterable[Hypothesis]) -> Iterator[Hypothesis]:
    """Each formula with its score in the dtype of the logits and in wider ones, first in one that the region computes a
    score in; weights in the dtype they have."""
    wanted = tensor(region.weights)
    own = tensor(region.logits)
    assert wanted is not None and own is not None
    scored = {fake(n).dtype for n in region.nodes if target_name(n) in _SCORES}
    names: list[DTypeName] = ["", "float32", "float64"]
    names.sort(key=lambda name: dtype_of(name, own.dtype) not in scored)
    for hypothesis, score in itertools.product(formulas, names):
        if score and getattr(torch, score).itemsize <= own.dtype.itemsize:
            continue
        for cast in ("", str(wanted.dtype).removeprefix("torch.")):
            spec = replace(hypothesis.spec, score_dtype=score, weight_dtype=cast)  # type: ignore[arg-type]
            yield replace(hypothesis, spec=spec)


def _judge(hypothesis: Hypothesis, seen: _Seen, k: int) -> str:
    """ "same" bits, "within" the tolerance rule, or what differs."""
    ids, weights = hypothesis.route(seen.sample, k)
    if weights.dtype != seen.weights.dtype:
        return f"weights are {weights.dtype}"
    if not torch.equal(ids, seen.ids):
        return "other experts are chosen"
    if torch.equal(weights.nan_to_num(7.0), seen.weights.nan_to_num(7.0)):
        return "same"
    sample, neutral = seen.sample, replace(hypothesis.spec, score_dtype="", weight_dtype="")
    bias, scale = hypothesis.operands([p.double() for p in sample.params])
    truth = weights_of(sample.logits.double(), ids, bias, scale, neutral)
    rows = truth.isfinite().all(-1) & seen.weights.isfinite().all(-1)
    if not torch.equal(weights.isfinite().all(-1), seen.weights.isfinite().all(-1)):
        return "weights are not finite"
    eps = torch.finfo(weights.dtype).eps
    own, ours = (_errors(w[rows].double(), truth[rows]) for w in (seen.weights, weights))
    for name, measure in (("rms", lambda e: e.square().mean().sqrt()), ("maximum", lambda e: e.max())):
        if ours.numel() and not float(measure(ours)) <= 2 * float(measure(own)) + 4 * eps:
            return f"{name} error of the weights {float(measure(ours)):.1e}, the original's {float(measure(own)):.1e}"
    return "within"


def _errors(a: Tensor, truth: Tensor) -> Tensor:
    """Relative error of each row."""
    error, scale = (a - truth).norm(dim=-1), truth.norm(dim=-1)
    return torch.where(error == 0, 0.0, error / scale.clamp_min(1e-30))


# --- running


def _run_exact(region: RouterRegion, sample: RouterSample) -> _Seen:
    with torch.no_grad():
        ids, weights = run_exact(region.module(), sample.inputs)
    return _seen(region, sample, ids, weights)


def _seen(region: RouterRegion, sample: RouterSample, ids: Tensor, weights: Tensor) -> _Seen:
    return _Seen(sample, ids.reshape(-1, region.top_k).long(), weights.reshape(-1, region.top_k))


class _Replay(Interpreter):
    """Runs the region as it is; TypeError where a dtype is not the one that was captured."""

    def run_node(self, n: Node) -> Any:
        out = super().run_node(n)
        seen = tensor(n)
        if isinstance(out, Tensor) and seen is not None and out.dtype != seen.dtype:
            raise TypeError(f"{n.name} is {out.dtype}, captured as {seen.dtype}")
        return out


def _run(region: RouterRegion, sample: RouterSample) -> _Seen:
    copies = [t.clone() if isinstance(t, Tensor) else t for t in sample.inputs]
    with torch.no_grad(), _autocast(region):
        ids, weights = _Replay(region.module()).run(*copies)
    return _seen(region, sample, ids, weights)


def _autocast(region: RouterRegion) -> AbstractContextManager[object]:
    if region.mode.autocast is None:
        return nullcontext()
    device, dtype, enabled, cache = region.mode.autocast
    return torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=cache)  # type: ignore[arg-type]


def _ops(region: RouterRegion) -> str:
    skipped = ("getitem", "reshape", "view", "to", "float")
    return "it runs " + ", ".join(target_name(n) for n in region.nodes if target_name(n) not in skipped)


def _short(spec: RouterSpec) -> str:
    """The fields that are not the default."""
    default = RouterSpec()
    own = {f.name: getattr(spec, f.name) for f in dataclasses.fields(spec)}
    return " ".join(f"{k}={v}" for k, v in own.items() if v != getattr(default, k)) or "softmax then topk"
