"""The mathematics of a MoE block, and nothing else: no layout, no device, no token count.

For token ``t`` with hidden state ``x[t]``, expert ids ``id[t, k]`` and routing weights ``w[t, k]``::

    y[t] = scale * sum_k  w[t, k] * f_id[t,k](x[t])        weight_on="output"
    y[t] = scale * sum_k  f_id[t,k](w[t, k] * x[t])        weight_on="input"
    f_e(v) = norm(W2_e . act(W13_e . v + b13_e) + b2_e)

An id outside ``[0, E)`` adds nothing.  A spec prints to one line and parses back: ``parse(str(s)) == s``.  That line is
the attribute of the op in the graph, because a string survives export, AOTInductor and every cache.

Letters: T tokens, H hidden, I intermediate, E experts, k top-k.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields
from functools import lru_cache
from typing import Any, Literal

from moe_fx.quant import QuantSpec

GRAMMAR = "moe/1"

DTypeName = Literal["", "float16", "bfloat16", "float32", "float64"]
Norm = Literal["", "rms", "rms_plus_one", "rms_input_scaled"]


@dataclass(frozen=True, slots=True)
class ExpertSpec:
    """One expert, E times.

    experts, hidden, intermediate: E, H and I.
    act, act_params: a name of ``reference.activations`` and its parameters in the order it declares them.
    gated: w13 has 2I rows (gate and up) instead of I.
    w13_bias, w2_bias: the two biases exist.
    norm, norm_eps: RMSNorm of an expert's output o before the routing weight, with n(v) = v / rms(v) and its weight g:
        "rms" n(o) * g, "rms_plus_one" n(o) * (1 + g), "rms_input_scaled" n(o * (1 + g)), "" none.
    act_dtype: dtype in which the activation is evaluated ("" the compute dtype).
    compute_dtype: dtype to which x and the weights are cast before each product ("" as they come).
    """

    experts: int
    hidden: int
    intermediate: int
    act: str = "silu"
    act_params: tuple[float, ...] = ()
    gated: bool = True
    w13_bias: bool = False
    w2_bias: bool = False
    norm: Norm = ""
    norm_eps: float = 0.0
    act_dtype: DTypeName = ""
    compute_dtype: DTypeName = ""


@dataclass(frozen=True, slots=True)
class CombineSpec:
    """How the k expert outputs of a token become one row.

    weight_on: the routing weight multiplies the expert's output or its input.
    accumulate: dtype of the sum over k ("" the dtype of x).
    out_dtype: dtype of y ("" the dtype of x).
    """

    weight_on: Literal["output", "input"] = "output"
    accumulate: DTypeName = ""
    out_dtype: DTypeName = ""


@dataclass(frozen=True, slots=True)
class RouterSpec:
    """From router logits [T, E] to ids and weights [T, k]; ``reference.router`` is the definition.

    score: function of the logits; ``order`` says whether it is applied before the selection or to the selected logits.
    score_dtype: dtype of the score and of all that follows ("" that of the logits).
    bias: an operand [E] is added to the scores (or to the logits) for the choice only.
    groups, topk_groups, group_score, group_fill: only experts of the best groups can be chosen; a group is worth its
    best expert ("max") or its two best ("top2_sum"); experts of other groups get the fill value.
    weights_from: the chosen experts' "scores", or those scores after the fill ("masked": topk's own values).
    renormalise, eps, eps_form: weights are divided by (their sum + eps), or by max(their sum, eps) ("clamp").
    scale: routed_scaling_factor.  expert_scale: an operand [E] multiplies the weights of the experts it belongs to.
    sorted: topk's flag: without it the order within a row is the algorithm's own.
    weight_dtype: dtype of the weights handed to the experts ("" as computed).
    """

    score: Literal["softmax", "sigmoid", "sqrtsoftplus"] = "softmax"
    order: Literal["score_first", "topk_first"] = "score_first"
    score_dtype: DTypeName = ""
    bias: Literal["", "scores", "logits"] = ""
    groups: int = 1
    topk_groups: int = 1
    group_score: Literal["max", "top2_sum"] = "max"
    group_fill: float = 0.0
    weights_from: Literal["scores", "masked"] = "scores"
    renormalise: bool = False
    eps: float = 0.0
    eps_form: Literal["add", "clamp"] = "add"
    scale: float = 1.0
    expert_scale: bool = False
    sorted: bool = True
    weight_dtype: DTypeName = ""


@dataclass(frozen=True, slots=True)
class MoESpec:
    """A whole block: ``top_k`` experts a token, the experts, the combination, how the operands of its products are held
    and, where recognised, the router."""

    top_k: int
    expert: ExpertSpec
    combine: CombineSpec = field(default_factory=CombineSpec)
    router: RouterSpec | None = None
    quant: QuantSpec = field(default_factory=QuantSpec)

    def __str__(self) -> str:
        parts = [GRAMMAR, f"top_k={self.top_k}"]
        parts += [f"expert.{p}" for p in _fields_to_text(self.expert)]
        parts += [f"combine.{p}" for p in _fields_to_text(self.combine)]
        parts += [f"quant.{p}" for p in _fields_to_text(self.quant)]
        if self.router is not None:
            parts += ["router"] + [f"router.{p}" for p in _fields_to_text(self.router)]
        return " ".join(parts)


def _fields_to_text(part: Any) -> list[str]:
    """Fields that differ from their default, in order of declaration."""
    out = []
    for f in fields(part):
        value = getattr(part, f.name)
        if f.default is MISSING or value != f.default:
            out.append(f"{f.name}={_value_to_text(value)}")
    return out


def _value_to_text(value: Any) -> str:
    if isinstance(value, tuple):
        return "(" + ",".join(map(repr, value)) + ")"
    return value if isinstance(value, str) else repr(value)


def _text_to_value(text: str, kind: str) -> Any:
    match kind:
        case "int":
            return int(text)
        case "float":
            return float(text)
        case "bool":
            return {"True": True, "False": False}[text]
        case "tuple[float, ...]":
            inner = text.strip("()")
            return tuple(float(v) for v in inner.split(",") if v)
        case _:
            return text


@lru_cache(maxsize=4096)
def parse(text: str) -> MoESpec:
    """The spec that prints as ``text``.  Raises ValueError naming the part that is not of the grammar."""
    head, *parts = text.split()
    if head != GRAMMAR:
        raise ValueError(f"a spec of grammar {head!r} cannot be read; this version reads {GRAMMAR!r}")
    groups: dict[str, tuple[type, dict[str, Any]]] = {
        "expert": (ExpertSpec, {}),
        "combine": (CombineSpec, {}),
        "quant": (QuantSpec, {}),
        "router": (RouterSpec, {}),
    }
    top_k, has_router = 0, False
    for part in parts:
        name, _, value = part.partition("=")
        group, _, leaf = name.partition(".")
        if name == "top_k":
            top_k = int(value)
        elif name == "router":
            has_router = True
        elif group in groups and leaf in (kinds := {f.name: str(f.type) for f in fields(groups[group][0])}):
            groups[group][1][leaf] = _text_to_value(value, kinds[leaf])
        else:
            raise ValueError(f"unknown part {part!r} in spec {text!r}")
    built = {name: cls(**values) for name, (cls, values) in groups.items() if name != "router"}
    router = RouterSpec(**groups["router"][1]) if has_router else None
    return MoESpec(top_k, built["expert"], built["combine"], router, built["quant"])
