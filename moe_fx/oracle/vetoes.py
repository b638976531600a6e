"""The vetoes of the oracle: one candidate, a kernel over a layout, enters; all the reasons against it leave.

What the kernel can do is asked by ``kernels.ladder``; the rules here are about storage, memory, training and wishes.
Every field of the spec is read by a rule or stands in IRRELEVANT with a reason; a test holds the two together.
The reference defines what a spec means: its capability holds open sets, so only layout and request can veto it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from moe_fx.binding import MATRICES, WeightBinding
from moe_fx.hardware import Device
from moe_fx.kernels.capability import Capability, Open, RowSchemes
from moe_fx.kernels.config import FusedMoEConfig, FusedMoEParallelConfig
from moe_fx.kernels.ladder import Question, Rule, ladder, names, own_reasons
from moe_fx.kernels.layouts import find_layout
from moe_fx.kernels.layouts.quantised import QUANTISED
from moe_fx.kernels.layouts.registry import LIBRARY_LAYOUTS
from moe_fx.kernels.registry import Kernel
from moe_fx.oracle.price import held_as_codes
from moe_fx.oracle.request import VIEW, Request, itemsize, layouts
from moe_fx.reasons import Reject
from moe_fx.spec import MoESpec


def quantises(spec: MoESpec, binding: WeightBinding) -> bool:
    """Weights that the spec holds as codes are floats in the model: they have no scales there."""
    scales = {f"{matrix}_scale" for matrix in MATRICES}
    return bool(spec.quant.w13 or spec.quant.w2) and scales.isdisjoint(o.role for o in binding.operands)


def candidate_layouts(spec: MoESpec, binding: WeightBinding, request: Request) -> tuple[str, ...]:
    """The layouts to judge: what is to be quantised has one of its own, and of those of floats "view" says why not."""
    known = (VIEW, QUANTISED) if quantises(spec, binding) else layouts()
    asked = [name for name in (request.layout,) if name is not None]
    return tuple(dict.fromkeys((*known, *asked)))


@dataclass(frozen=True, slots=True)
class Case:
    """One candidate (a kernel over a layout) and all that may speak against it."""

    spec: MoESpec
    binding: WeightBinding
    request: Request
    device: Device
    kernel: Kernel
    layout: str
    parallel: FusedMoEParallelConfig = field(default_factory=FusedMoEParallelConfig)

    @property
    def candidate(self) -> str:
        return f"{self.kernel.name}/{self.layout}"

    @property
    def capability(self) -> Capability:
        return self.kernel.capability

    @property
    def stored(self) -> WeightBinding:
        """The storage that the kernel would read."""
        return self.binding if self.layout == VIEW else find_layout(self.layout, self.spec.quant).binding(self.binding)

    @property
    def quantises(self) -> bool:
        """The spec speaks of codes and the model holds floats."""
        return quantises(self.spec, self.binding)

    @property
    def question(self) -> Question:
        """What is asked of the kernel alone."""
        spec, dtype = self.spec, getattr(torch, self.request.dtype)
        config = FusedMoEConfig.of(spec, dtype, moe_parallel_config=self.parallel)
        scheme = (spec.quant.key("w13"), spec.quant.key("a1"))
        weights = self.request.weights if scheme[0] is None else self.request.dtype
        # one rank may lay tokens out as the kernel wants them
        batched = self.parallel.use_batched_activation_format if self.parallel.use_all2all_kernels else None
        return Question(self.kernel.name, self.capability, config, self.device, weights, scheme, batched)

    def reject(self, code: str, text: str) -> Reject:
        return Reject(code, text, self.kernel.name)


def _router(case: Case) -> Reject | None:
    if case.spec.router is not None or not case.capability.monolithic:
        return None
    return case.reject("veto.routing", "it contains the router, and this block's router stays in the graph")


def _quantised_alike(case: Case) -> Reject | None:
    """Kernels are asked for one scheme; a block whose two products have different ones is the dequantising kernels'."""
    quant = case.spec.quant
    if (quant.w13, quant.a1) == (quant.w2, quant.a2) or isinstance(case.capability.schemes, Open | RowSchemes):
        return None
    return case.reject("veto.scheme", "the two products are quantised in different ways")


def _codes(case: Case) -> Reject | None:
    """Layout "quantised" makes codes of floats; no other does."""
    if case.quantises == (case.layout == QUANTISED):
        return None
    if case.quantises:
        weights = case.spec.quant.w13 or case.spec.quant.w2
        text = f"the weights are to be {weights} and layout {case.layout!r} holds the model's floats"
    else:
        text = f"layout {QUANTISED!r} makes codes of floats, and none are to be made here"
    return case.reject("veto.storage", text)


def _whole_bytes(case: Case) -> Reject | None:
    if case.layout != QUANTISED:
        return None
    e, quant = case.spec.expert, case.spec.quant
    sizes = ((quant.key("w13"), "H", e.hidden), (quant.key("w2"), "I", e.intermediate))
    odd = [f"{name}={size}" for key, name, size in sizes if key is not None and size * key.bits % 8]
    text = f"{' and '.join(odd)}: codes of a row of weights must fill whole bytes"
    return case.reject("veto.shape", text) if odd else None


def _layout(case: Case) -> Reject | None:
    """What is packed for a library is read by the kernels that name it, and they read nothing else."""
    own = case.kernel.experts.layout_for(case.spec)
    if own and own == case.layout:
        left = LIBRARY_LAYOUTS[own].left(case.binding)
        text = f"weights are held as {names(left)}, which layout {own!r} does not pack"
        return case.reject("veto.storage", text) if left else None
    if own:
        return case.reject("veto.storage", f"it reads layout {own!r} alone")
    if case.layout in LIBRARY_LAYOUTS:
        return case.reject("veto.storage", f"layout {case.layout!r} is packed for a library's kernel")
    return None


def _forms(case: Case) -> Reject | None:
    if case.layout in LIBRARY_LAYOUTS:
        return None
    stored = {o.form for o in case.stored.operands if o.role != "norm"}
    known = case.capability.forms
    unknown = [form for form in stored if form not in known]
    if not unknown:
        return None
    return case.reject("veto.storage", f"weights are stored as {names(unknown)}; it reads {names(known)}")


def _orientation(case: Case) -> Reject | None:
    if case.layout in LIBRARY_LAYOUTS:
        return None
    known = case.capability.transposed
    stored = {o.transposed for o in case.stored.operands if o.role.startswith("w") and not o.role.endswith("_bias")}
    if stored <= known:
        return None
    words = {False: "[out, in]", True: "[in, out]"}
    unknown, listed = (sorted(words[t] for t in some) for some in (stored - known, known))
    text = f"weights are stored as {' and '.join(unknown)}; it reads {' and '.join(listed)}"
    return case.reject("veto.storage", text)


def _order(case: Case) -> Reject | None:
    w13 = case.stored.role("w13")
    if case.layout in LIBRARY_LAYOUTS:
        return None
    if w13 is None or not case.spec.expert.gated or w13.order in case.capability.orders:
        return None
    text = f"gate and up rows are stored as {w13.order!r}; it reads {names(case.capability.orders)}"
    return case.reject("veto.storage", text)


def _training(case: Case) -> Reject | None:
    if not case.request.training or case.capability.backward:
        return None
    return case.reject("veto.training", "gradients are wanted and it is forward only")


def _captured(case: Case) -> Reject | None:
    """On a device without graphs nothing is captured, whatever is asked for."""
    if not case.request.captured or case.device.kind not in ("cuda", "rocm"):
        return None
    if case.device.arch not in case.capability.captures:
        return case.reject("veto.capture", f"a call of it may wait for the device on {case.device.arch!r}")
    if case.layout != VIEW:
        text = "a graph that replays does not see that weights changed since they were copied"
        return case.reject("veto.capture", text)
    if case.request.training and case.kernel.experts.waits_in_backward(case.spec):
        return case.reject("veto.capture", "its backward waits for the device")
    if case.request.training and "list" in {operand.form for operand in case.binding.operands}:
        text = "gradients of matrices that lie apart are found by addresses, which are new in every call"
        return case.reject("veto.capture", text)
    return None


def _compiled(case: Case) -> Reject | None:
    if not case.capability.compiled:
        return None
    if not case.request.compiled:
        return case.reject("veto.compiler", "it is written for a compiler: only inner_backend='inductor' makes it fast")
    if case.layout != VIEW:
        return case.reject("veto.storage", "it becomes part of the graph, which holds the model's own weights")
    return None


def _copy_allowed(case: Case) -> Reject | None:
    if case.layout in (VIEW, QUANTISED) or case.request.memory != "view":  # to quantise is to allow it
        return None
    if case.layout in LIBRARY_LAYOUTS and not any(map(LIBRARY_LAYOUTS[case.layout].copies, case.binding.operands)):
        return None
    text = f"layout {case.layout!r} is a packed copy and memory='view' forbids it; allow 'copy'"
    return case.reject("veto.storage", text)


def _copy_trains(case: Case) -> Reject | None:
    if case.layout == VIEW or not case.request.training:
        return None
    if case.layout == QUANTISED:
        return case.reject("veto.training", "gradients are wanted, and weights that are quantised have none")
    return case.reject("veto.storage", f"layout {case.layout!r} would be a copy of weights that require gradients")


def _copy_fits(case: Case) -> Reject | None:
    """The block's weights, and their copy unless it replaces them, fit the memory of the device."""
    e = case.spec.expert
    weights = e.experts * e.hidden * e.intermediate * (3 if e.gated else 2) * itemsize(case.request.weights)
    copy = e.experts * held_as_codes(case.spec)[1] if case.layout == QUANTISED else weights
    copy += int(weights * case.kernel.experts.hoards)
    needed = copy + (0 if case.request.memory == "replace" else weights)
    if case.layout == VIEW or needed <= case.device.memory_bytes:
        return None
    text = f"original and copy need {needed / 2**30:.1f} of {case.device.memory_bytes / 2**30:.1f} GiB"
    return case.reject("veto.storage", text)


def _wish(name: str) -> Rule:
    def check(case: Case) -> Reject | None:
        wish, offered = getattr(case.request, name), {"kernel": case.kernel.name, "layout": case.layout}[name]
        return None if wish in (None, offered) else case.reject("veto.request", f"{name}={wish!r} was requested")

    return Rule((f"request.{name}",), check)


RULES: tuple[Rule, ...] = (
    Rule(("spec.router",), _router),
    Rule(("spec.quant",), _quantised_alike),
    Rule(("spec.quant", "binding.role"), _codes),
    Rule(("spec.quant", "spec.expert.hidden", "spec.expert.intermediate"), _whole_bytes),
    Rule(("binding.role",), _layout),
    Rule(("binding.form", "binding.role"), _forms),
    Rule(("binding.transposed", "binding.role"), _orientation),
    Rule(("binding.order", "binding.role"), _order),
    Rule(("request.training",), _training),
    Rule(("request.captured", "request.training", "device.arch", "device.kind", "binding.form"), _captured),
    Rule(("request.compiled",), _compiled),
    Rule(("request.memory",), _copy_allowed),
    Rule(("request.training",), _copy_trains),
    Rule(("request.memory", "device.memory_bytes"), _copy_fits),
    _wish("kernel"),
    _wish("layout"),
)

IRRELEVANT: dict[str, str] = {
    "spec.top_k": "a size: every kernel takes any k",
    "spec.expert.act_params": "numbers for the activation; a kernel that lists an activation takes its parameters",
    "spec.expert.norm_eps": "a number handed to the norm; a kernel that lists a norm takes any",
    "request.dtype": "x may have any floating dtype (Capability.dtypes)",
    "request.weight_dtype": "read as request.weights",
    "request.workspace_bytes": "bounds the chunks of a call, whatever the kernel",
    "request.policy": "decides between survivors, never who survives",
}


def vetoes(case: Case) -> tuple[Reject, ...]:
    """Every reason against the candidate, in the order of the ladder; empty when it survives."""
    question = case.question
    rules = tuple(reject for rule in RULES if (reject := rule.check(case)) is not None)
    return ladder(question) + own_reasons(question, case.kernel.experts.refuses) + rules
