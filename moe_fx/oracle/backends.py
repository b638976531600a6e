"""Named backends: one engine over the table of a scheme.

A case enters (a layer, the scheme of its operands, a device), a Selection leaves: the backend, the kernel that runs it,
and a verdict on every candidate with every reason against it.  A scheme is data::

    table    backend → its kernels; the first that nothing vetoes runs it
    order    backends from best to worst; moves change it and refusals rule some out, where their conditions hold

Holds: an explicit request is met or raises with all reasons, it never falls back; a kernel that is described
(``kernels.libraries``) but not built is vetoed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Generic, Literal, TypeVar

import moe_fx.kernels.experts  # noqa: F401  registers the built-in kernels
from moe_fx.kernels.capability import Scheme
from moe_fx.kernels.config import FusedMoEConfig
from moe_fx.kernels.ladder import Question, ladder, own_reasons
from moe_fx.kernels.libraries import LIBRARIES, Library
from moe_fx.kernels.modular_kernel import FusedMoEExperts
from moe_fx.kernels.registry import KERNELS, Kernel
from moe_fx.oracle.conditions import Asked, Condition
from moe_fx.plan import Verdict
from moe_fx.quant import QuantSpec
from moe_fx.reasons import MoEFxOptionError, MoEFxUnsupportedError, Reject
from moe_fx.spec import MoESpec

M = TypeVar("M", bound=Enum)
Candidates = Mapping[str, Kernel | Library]  # by name
AUTO = "auto"
OURS = ("sorted_loop", "batched_loop", "reference")  # our own that take any scheme, one expert at a time
MUST = ("cuda", "rocm")  # kinds of device on which nothing else would run the layer


@dataclass(frozen=True, slots=True)
class Backend(Generic[M]):
    """One row of a table.

    kernels: names in ``kernels.registry`` or ``kernels.libraries``, best first, monolithic before modular; none: a
    plugin runs it.  lora: those for experts with LoRA adapters, where they are others.  names: that a request may use,
    beside its own in lower case.  twin: the backend that takes one batch an expert where this one takes a list of
    tokens.  where: the platform that it is for, None any.  weights_only: it leaves activations as they are, whatever
    the scheme rounds them to.
    """

    member: M
    kernels: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    twin: M | None = None
    where: Condition | None = None
    weights_only: bool = False
    lora: tuple[str, ...] = ()

    def kernels_for(self, config: FusedMoEConfig) -> tuple[str, ...]:
        """Names of the kernels for that layer; "" alone: a plugin's."""
        return (self.lora if self.lora and config.is_lora_enabled else self.kernels) or ("",)

    def question_scheme(self, scheme: Scheme) -> Scheme:
        """The scheme that its kernels are asked for."""
        return (scheme[0], None) if self.weights_only else scheme


@dataclass(frozen=True, slots=True)
class Move(Generic[M]):
    """Where all conditions hold, these backends go to the front or the back, or next to ``anchor``, in the order they
    have."""

    members: tuple[M, ...]
    to: Literal["front", "back", "before", "after"]
    when: tuple[Condition, ...]
    anchor: M | None = None

    def applied(self, members: Sequence[M]) -> tuple[M, ...]:
        taken = [m for m in members if m in self.members]
        rest = [m for m in members if m not in self.members]
        if self.anchor is None:
            place = 0 if self.to == "front" else len(rest)
        else:
            place = rest.index(self.anchor) + (self.to == "after")
        return (*rest[:place], *taken, *rest[place:])


@dataclass(frozen=True, slots=True)
class Refusal(Generic[M]):
    """Where all conditions hold, backends are ruled out: ``members``, or with ``but`` all others."""

    code: str
    text: str
    when: tuple[Condition, ...]
    members: tuple[M, ...] = ()
    but: tuple[M, ...] = ()

    def reaches(self, member: M) -> bool:
        return member not in self.but if self.but else member in self.members


@dataclass(frozen=True, slots=True)
class Order(Generic[M]):
    """members: best first.  moves: applied one after the other."""

    members: tuple[M, ...]
    moves: tuple[Move[M], ...] = ()
    refusals: tuple[Refusal[M], ...] = ()


@dataclass(frozen=True, slots=True)
class Selection(Generic[M]):
    """experts: the name of the kernel, "" where a plugin runs the backend.  verdicts: on every candidate
    "BACKEND/kernel", in the order in which they were asked."""

    backend: M
    experts: str
    verdicts: tuple[Verdict, ...]

    @property
    def experts_class(self) -> type[FusedMoEExperts] | None:
        """The registered class; MoEFxUnsupportedError where it is not built (of a described set of candidates)."""
        if not self.experts:
            return None
        if self.experts not in KERNELS:
            raise MoEFxUnsupportedError(
                f"{self.backend.name} needs the kernel {self.experts!r}, which is not built here; "
                f"registered: {', '.join(sorted(KERNELS))}"
            )
        return KERNELS[self.experts].experts


@dataclass(frozen=True, slots=True)
class Oracle(Generic[M]):
    """The backends of one kind of scheme.

    table: a row for each backend.  orders: by name; a backend that an order leaves out runs on request only.
    schemes: that layers of this kind have, the usual one first.  nothing: what stands for "none" off the MUST devices.
    """

    name: str
    table: tuple[Backend[M], ...]
    orders: Mapping[str, Order[M]]
    schemes: tuple[Scheme, ...]
    nothing: M | None = None

    def backend(self, member: M) -> Backend[M]:
        """The row of that backend; MoEFxOptionError lists those that have one."""
        found = next((row for row in self.table if row.member is member), None)
        if found is None:
            known = ", ".join(row.member.name for row in self.table)
            raise MoEFxOptionError(f"{member.name} runs no {self.name} layer; backends that do: {known}")
        return found

    def map(self, name: str) -> M:
        """The backend that a request calls ``name``; MoEFxOptionError lists the known names."""
        names = {n: row.member for row in self.table for n in (row.member.name.lower(), *row.names)}
        if name not in names:
            raise MoEFxOptionError(
                f"moe_backend={name!r} is no backend of {self.name} layers; known: {', '.join((AUTO, *names))}"
            )
        return names[name]

    def order(self, name: str) -> Order[M]:
        """The order of that name; MoEFxOptionError lists the known ones."""
        if name not in self.orders:
            known = ", ".join(self.orders)
            raise MoEFxOptionError(f"order={name!r} is no order of {self.name} backends; known: {known}")
        return self.orders[name]

    def ordered(self, asked: Asked, order: str = "seed") -> tuple[M, ...]:
        """Backends from best to worst for that case."""
        chosen = self.order(order)
        members = chosen.members
        for move in chosen.moves:
            if all(condition.holds(asked) for condition in move.when):
                members = move.applied(members)
        return members

    def verdicts(self, asked: Asked, order: str = "seed", candidates: Candidates | None = None) -> tuple[Verdict, ...]:
        """On every candidate "BACKEND/kernel", in order: the first that nothing vetoes is chosen.  A request: on that
        backend alone, or on its twin for batches.  candidates: the kernels that there are; None: those registered in
        this process.  Raises MoEFxOptionError for an unknown request or order."""
        wish = asked.config.moe_backend
        members = self.ordered(asked, order) if wish == AUTO else (self._wished(wish, asked),)
        out: list[Verdict] = []
        for row in map(self.backend, members):
            for name in row.kernels_for(asked.config):
                against = self.against(row, name, asked, order, candidates)
                open_ = all(verdict.status != "chosen" for verdict in out)
                status: Literal["chosen", "survived", "vetoed"] = "chosen" if open_ else "survived"
                out.append(Verdict(f"{row.member.name}/{name}", "vetoed" if against else status, against))
        return tuple(out)

    def select(self, asked: Asked, order: str = "seed", candidates: Candidates | None = None) -> Selection[M]:
        """What ``verdicts`` chooses.  MoEFxUnsupportedError, with every reason, for a request that is vetoed, and where
        nothing is left (``nothing`` on other devices than MUST, if the table has it)."""
        verdicts = self.verdicts(asked, order, candidates)
        members = {row.member.name: row.member for row in self.table}
        for verdict in verdicts:
            if verdict.status == "chosen":
                backend, _, kernel = verdict.candidate.partition("/")
                return Selection(members[backend], kernel, verdicts)
        if asked.config.moe_backend == AUTO and self.nothing is not None and asked.device.kind not in MUST:
            return Selection(self.nothing, "", verdicts)
        raise MoEFxUnsupportedError(self._refusal(asked, verdicts))

    def against(
        self, row: Backend[M], kernel: str, asked: Asked, order: str = "seed", candidates: Candidates | None = None
    ) -> tuple[Reject, ...]:
        """Every reason against a backend with one of its kernels ("": a plugin's)."""
        name, out = row.member.name, []
        if row.where is not None and not row.where.holds(asked):
            out.append(Reject("veto.device", f"it is used only where {row.where.text}", name))
        if row.member in asked.without:
            out.append(Reject("veto.request", asked.without[row.member], name))
        for refusal in self.order(order).refusals:
            if refusal.reaches(row.member) and all(condition.holds(asked) for condition in refusal.when):
                out.append(Reject(refusal.code, refusal.text, name))
        if not kernel:
            return tuple(out)
        return (*out, *kernel_reasons(kernel, row.question_scheme(asked.scheme), asked, candidates))

    def kernel_class(self, member: M) -> type[FusedMoEExperts]:
        """The first registered class that runs the backend; MoEFxUnsupportedError says which kernels are missing."""
        row = self.backend(member)
        for name in row.kernels:
            if name in KERNELS:
                return KERNELS[name].experts
        missing = " or ".join(map(repr, row.kernels)) or "a plugin, which brings its own"
        raise MoEFxUnsupportedError(f"{member.name} of {self.name} layers is not built here: it needs {missing}")

    def _wished(self, name: str, asked: Asked) -> M:
        row = self.backend(self.map(name))
        return row.twin if asked.batched and row.twin is not None else row.member

    def _refusal(self, asked: Asked, verdicts: Sequence[Verdict]) -> str:
        """Every candidate with every reason against it."""
        weights, inputs = ("plain" if key is None else str(key) for key in asked.scheme)
        wish = asked.config.moe_backend
        what = f"no backend of {self.name} layers" if wish == AUTO else f"moe_backend={wish!r} cannot be had: it"
        verb = "runs" if wish == AUTO else "does not run"
        head = f"{what} {verb} weights {weights} with activations {inputs} on {asked.device.name}:"
        return "\n".join([head, *(f"  {v.candidate}: {r.code}: {r.text}" for v in verdicts for r in v.reasons)])


def quantised(spec: MoESpec, scheme: Scheme) -> MoESpec:
    """spec with both products quantised as ``scheme`` says; as it is where it says something itself."""
    weights, inputs = ("" if key is None else str(key) for key in scheme)
    return spec if spec.quant else replace(spec, quant=QuantSpec(weights, weights, inputs, inputs))


def kernel_reasons(name: str, scheme: Scheme, asked: Asked, candidates: Candidates | None = None) -> tuple[Reject, ...]:
    """Every reason against the kernel for ``scheme``, whatever backend it belongs to.  candidates: see ``select``."""
    known: Candidates = {**LIBRARIES, **KERNELS} if candidates is None else candidates
    built: Mapping[str, object] = KERNELS if candidates is None else candidates
    out = () if name in built else (Reject("veto.package", "not built: nothing is registered by this name", name),)
    if name not in known:
        return out
    found, dtype = known[name], str(asked.config.in_dtype).removeprefix("torch.")
    config = replace(asked.config, spec=quantised(asked.config.mathematics, scheme))
    question = Question(name, found.capability, config, asked.device, dtype, scheme, asked.batched)
    own = own_reasons(question, found.experts.refuses) if isinstance(found, Kernel) else ()
    return (*out, *ladder(question), *own)
