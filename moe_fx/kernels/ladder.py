"""The veto ladder: what is asked of one kernel enters, all the reasons against it leave.

A rule says which fields it reads and gives a Reject or None.  Most rules are rows of ``listed``: a value against the
set that the kernel's Capability lists, and a value that is not listed is a veto (closed world).  The oracle adds rules
about storage, memory and wishes (``oracle.vetoes``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from moe_fx.hardware import Device
from moe_fx.kernels.capability import NO_ALL2ALL, PLAIN, Capability, Scheme
from moe_fx.kernels.config import FusedMoEConfig
from moe_fx.reasons import Reject
from moe_fx.spec import MoESpec


@dataclass(frozen=True, slots=True)
class Question:
    """Can this kernel run this layer on this device?

    weights: dtype of the weights, or what their codes stand for.  scheme: keys of weights and activations.
    batched: the format in which tokens come; None: as the kernel wants them.
    """

    kernel: str
    capability: Capability
    config: FusedMoEConfig
    device: Device
    weights: str
    scheme: Scheme = PLAIN
    batched: bool | None = False

    @property
    def spec(self) -> MoESpec:
        return self.config.mathematics

    @property
    def all2all(self) -> str:
        """What carries tokens to other ranks."""
        parallel = self.config.moe_parallel_config
        return parallel.all2all_backend if parallel.use_all2all_kernels else NO_ALL2ALL

    @property
    def routing(self) -> str:
        return self.config.routing_method.name

    @property
    def logits(self) -> str:
        return str(self.config.router_logits_dtype or self.config.in_dtype).removeprefix("torch.")

    def reject(self, code: str, text: str) -> Reject:
        return Reject(code, text, self.kernel)


@dataclass(frozen=True, slots=True)
class Rule:
    """reads: the fields of the case it looks at.  The case has ``capability`` and ``reject``."""

    reads: tuple[str, ...]
    check: Callable[[Any], Reject | None]


def names(values: Iterable[object]) -> str:
    """Values as a text."""
    return ", ".join(sorted(map(repr, values))) or "nothing"


def listed(path: str, allowed: str, code: str) -> Rule:
    """The value at ``path`` of the case is in the set ``allowed`` of the kernel's capability."""
    value_of, allowed_of = attrgetter(path), attrgetter(allowed)

    def check(case: Any) -> Reject | None:
        value, known = value_of(case), allowed_of(case.capability)
        return None if value in known else case.reject(code, f"{path} is {value!r}; it takes {names(known)}")

    return Rule((path,), check)


def _packages(case: Question) -> Reject | None:
    missing = case.capability.packages - case.device.installed
    return case.reject("veto.package", f"not installed: {names(missing)}") if missing else None


def _arch(case: Question) -> Reject | None:
    known = case.capability.archs
    if known is None or case.device.arch in known or case.device.kind not in case.capability.devices:
        return None
    return case.reject("veto.device", f"the architecture is {case.device.arch!r}; it runs on {names(known)}")


def _scheme(case: Question) -> Reject | None:
    if case.scheme in case.capability.schemes:
        return None
    weights, inputs = (("plain" if key is None else str(key)) for key in case.scheme)
    return case.reject("veto.scheme", f"weights are {weights} and activations {inputs}; it has no such scheme")


def _expert_parallel(case: Question) -> Reject | None:
    if not case.config.use_ep or case.capability.expert_parallel:
        return None
    return case.reject("veto.parallel", "experts are spread over ranks and it takes no ids of other ranks")


def _routing(case: Question) -> Reject | None:
    if not case.capability.monolithic or case.routing in case.capability.routing:
        return None
    return case.reject(
        "veto.routing", f"the router is {case.routing!r}; the one inside it is one of {names(case.capability.routing)}"
    )


def _logits(case: Question) -> Reject | None:
    if not case.capability.monolithic or case.logits in case.capability.logits:
        return None
    return case.reject("veto.routing", f"router logits are {case.logits!r}; it takes {names(case.capability.logits)}")


def _multiples(case: Question) -> Reject | None:
    multiple = case.capability.size_multiple
    odd = [f"{n}={v}" for n in ("hidden", "intermediate") if (v := getattr(case.spec.expert, n)) % multiple]
    return case.reject("veto.shape", f"{' and '.join(odd)}: not a multiple of {multiple}") if odd else None


def _most(case: Question) -> Reject | None:
    large = [f"{n}={v} > {most}" for n, most in case.capability.most if (v := getattr(case.spec.expert, n)) > most]
    return case.reject("veto.shape", f"{' and '.join(large)}: more than it takes") if large else None


def _format(case: Question) -> Reject | None:
    if case.batched in (None, case.capability.batched):
        return None
    kinds = {False: "a list of tokens", True: "one batch an expert"}
    return case.reject("veto.format", f"tokens come as {kinds[case.batched]}; it takes {kinds[not case.batched]}")


def _invariance(case: Question) -> Reject | None:
    if not case.config.batch_invariant or case.capability.batch_invariant:
        return None
    return case.reject("veto.invariance", "a token's result must not depend on the others, and here it may")


def _lora(case: Question) -> Reject | None:
    if not case.config.is_lora_enabled or case.capability.lora:
        return None
    return case.reject("veto.lora", "experts have LoRA adapters and it takes none")


def _biases(case: Question) -> Reject | None:
    present = [n for n in ("w13_bias", "w2_bias") if getattr(case.spec.expert, n)]
    if not present or case.capability.biases:
        return None
    return case.reject("veto.bias", f"the experts have {' and '.join(present)}; it takes none")


LADDER: tuple[Rule, ...] = (
    listed("device.kind", "devices", "veto.device"),
    Rule(("device.arch",), _arch),
    Rule(("device.installed",), _packages),
    listed("spec.expert.gated", "gated", "veto.activation"),
    listed("spec.expert.act", "activations", "veto.activation"),
    Rule(("spec.quant",), _scheme),
    listed("all2all", "all2all", "veto.parallel"),
    Rule(("config.use_ep",), _expert_parallel),
    Rule(("spec.router",), _routing),
    Rule(("config.router_logits_dtype",), _logits),
    Rule(("spec.expert.hidden", "spec.expert.intermediate"), _multiples),
    Rule(("spec.expert.experts",), _most),
    Rule(("batched",), _format),
    Rule(("config.batch_invariant",), _invariance),
    Rule(("config.is_lora_enabled",), _lora),
    listed("weights", "dtypes", "veto.dtype"),
    listed("spec.expert.compute_dtype", "compute_dtypes", "veto.dtype"),
    listed("spec.expert.act_dtype", "act_dtypes", "veto.spec"),
    Rule(("spec.expert.w13_bias", "spec.expert.w2_bias"), _biases),
    listed("spec.expert.norm", "norms", "veto.norm"),
    listed("spec.combine.weight_on", "weight_on", "veto.combine"),
    listed("spec.combine.accumulate", "accumulate", "veto.combine"),
    listed("spec.combine.out_dtype", "out_dtypes", "veto.combine"),
)


def ladder(question: Question) -> tuple[Reject, ...]:
    """Every reason against the kernel, in the order of LADDER; empty when it can."""
    return tuple(reject for rule in LADDER if (reject := rule.check(question)) is not None)


def own_reasons(question: Question, refuses: Callable[[MoESpec], tuple[str, str] | None]) -> tuple[Reject, ...]:
    """What the experts class itself has against the layer (``FusedMoEExperts.refuses``)."""
    found = refuses(question.spec)
    return () if found is None else (question.reject(*found),)
