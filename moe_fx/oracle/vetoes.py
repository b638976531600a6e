"""The veto ladder: one candidate enters, all the reasons against it leave.

A rule says which fields it reads and gives a Reject or None.  Most rules are rows of LISTED: a value against the set
that the kernel's Capability lists, and a value that is not listed is a veto (closed world).  Every field of the spec is
read by a rule or stands in IRRELEVANT with a reason; a test holds the two together.
The reference defines what a spec means: its capability holds open sets, so only layout and request can veto it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from operator import attrgetter

from moe_fx.binding import WeightBinding
from moe_fx.hardware import Device
from moe_fx.kernels.layouts import find_layout
from moe_fx.kernels.registry import Kernel
from moe_fx.oracle.request import VIEW, Request, itemsize
from moe_fx.reasons import Reject
from moe_fx.spec import MoESpec


@dataclass(frozen=True, slots=True)
class Case:
    """One candidate (a kernel over a layout) and all that may speak against it."""

    spec: MoESpec
    binding: WeightBinding
    request: Request
    device: Device
    kernel: Kernel
    layout: str

    @property
    def candidate(self) -> str:
        return f"{self.kernel.name}/{self.layout}"

    @property
    def stored(self) -> WeightBinding:
        """The storage that the kernel would read."""
        return self.binding if self.layout == VIEW else find_layout(self.layout).binding(self.binding)

    def reject(self, code: str, text: str) -> Reject:
        return Reject(code, text, self.kernel.name)


@dataclass(frozen=True, slots=True)
class Rule:
    """reads: the fields of the case it looks at."""

    reads: tuple[str, ...]
    check: Callable[[Case], Reject | None]


def _names(values: Iterable[object]) -> str:
    return ", ".join(sorted(map(repr, values))) or "nothing"


def _listed(path: str, allowed: str, code: str) -> Rule:
    """The value at ``path`` of the case is in the set ``allowed`` of the kernel's capability."""
    value_of, allowed_of = attrgetter(path), attrgetter(allowed)

    def check(case: Case) -> Reject | None:
        value, known = value_of(case), allowed_of(case.kernel.capability)
        return None if value in known else case.reject(code, f"{path} is {value!r}; it takes {_names(known)}")

    return Rule((path,), check)


def _biases(case: Case) -> Reject | None:
    present = [n for n in ("w13_bias", "w2_bias") if getattr(case.spec.expert, n)]
    if not present or case.kernel.capability.biases:
        return None
    return case.reject("veto.bias", f"the experts have {' and '.join(present)}; it takes none")


def _forms(case: Case) -> Reject | None:
    stored = {o.form for o in case.stored.operands if o.role != "norm"}
    known = case.kernel.capability.forms
    unknown = [form for form in stored if form not in known]
    if not unknown:
        return None
    return case.reject("veto.storage", f"weights are stored as {_names(unknown)}; it reads {_names(known)}")


def _orientation(case: Case) -> Reject | None:
    known = case.kernel.capability.transposed
    stored = {o.transposed for o in case.stored.operands if o.role.startswith("w") and not o.role.endswith("_bias")}
    if stored <= known:
        return None
    names = {False: "[out, in]", True: "[in, out]"}
    unknown, listed = (sorted(names[t] for t in some) for some in (stored - known, known))
    text = f"weights are stored as {' and '.join(unknown)}; it reads {' and '.join(listed)}"
    return case.reject("veto.storage", text)


def _sizes(case: Case) -> Reject | None:
    multiple = case.kernel.capability.size_multiple
    odd = [f"{n}={v}" for n in ("hidden", "intermediate") if (v := getattr(case.spec.expert, n)) % multiple]
    return case.reject("veto.shape", f"{' and '.join(odd)}: not a multiple of {multiple}") if odd else None


def _packages(case: Case) -> Reject | None:
    missing = case.kernel.capability.packages - case.device.installed
    return case.reject("veto.package", f"not installed: {_names(missing)}") if missing else None


def _training(case: Case) -> Reject | None:
    if not case.request.training or case.kernel.capability.backward:
        return None
    return case.reject("veto.training", "gradients are wanted and it is forward only")


def _compiled(case: Case) -> Reject | None:
    if not case.kernel.capability.compiled:
        return None
    if not case.request.compiled:
        return case.reject("veto.compiler", "it is written for a compiler: only inner_backend='inductor' makes it fast")
    if case.layout != VIEW:
        return case.reject("veto.storage", "it becomes part of the graph, which holds the model's own weights")
    return None


def _copy_allowed(case: Case) -> Reject | None:
    if case.layout == VIEW or case.request.memory != "view":
        return None
    text = f"layout {case.layout!r} is a packed copy and memory='view' forbids it; allow 'copy'"
    return case.reject("veto.storage", text)


def _copy_trains(case: Case) -> Reject | None:
    if case.layout == VIEW or not case.request.training:
        return None
    return case.reject("veto.storage", f"layout {case.layout!r} would be a copy of weights that require gradients")


def _copy_fits(case: Case) -> Reject | None:
    """The block's weights, twice if the original stays, fit the memory of the device."""
    e = case.spec.expert
    weights = e.experts * e.hidden * e.intermediate * (3 if e.gated else 2) * itemsize(case.request.weights)
    needed = weights * (1 if case.request.memory == "replace" else 2)
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
    _listed("device.kind", "devices", "veto.device"),
    Rule(("device.installed",), _packages),
    _listed("request.weights", "dtypes", "veto.dtype"),
    _listed("spec.expert.compute_dtype", "compute_dtypes", "veto.dtype"),
    _listed("spec.expert.act", "activations", "veto.activation"),
    _listed("spec.expert.gated", "gated", "veto.activation"),
    _listed("spec.expert.act_dtype", "act_dtypes", "veto.spec"),
    Rule(("spec.expert.w13_bias", "spec.expert.w2_bias"), _biases),
    _listed("spec.expert.norm", "norms", "veto.norm"),
    _listed("spec.combine.weight_on", "weight_on", "veto.combine"),
    _listed("spec.combine.accumulate", "accumulate", "veto.combine"),
    _listed("spec.combine.out_dtype", "out_dtypes", "veto.combine"),
    Rule(("spec.expert.hidden", "spec.expert.intermediate"), _sizes),
    Rule(("binding.form", "binding.role"), _forms),
    Rule(("binding.transposed", "binding.role"), _orientation),
    Rule(("request.training",), _training),
    Rule(("request.compiled",), _compiled),
    Rule(("request.memory",), _copy_allowed),
    Rule(("request.training",), _copy_trains),
    Rule(("request.memory", "device.memory_bytes"), _copy_fits),
    _wish("kernel"),
    _wish("layout"),
)

IRRELEVANT: dict[str, str] = {
    "spec.top_k": "a size: every kernel takes any k",
    "spec.router": "an experts kernel starts from ids and weights",
    "spec.expert.experts": "a size: every kernel takes any number of experts",
    "spec.expert.act_params": "numbers for the activation; a kernel that lists an activation takes its parameters",
    "spec.expert.norm_eps": "a number handed to the norm; a kernel that lists a norm takes any",
    "binding.order": "bind() tells every kernel the order of gate and up rows",
    "request.dtype": "x may have any floating dtype (Capability.dtypes)",
    "request.weight_dtype": "read as request.weights",
    "request.policy": "decides between survivors, never who survives",
}


def vetoes(case: Case) -> tuple[Reject, ...]:
    """Every reason against the candidate, in the order of the ladder; empty when it survives."""
    return tuple(reject for rule in RULES if (reject := rule.check(case)) is not None)
