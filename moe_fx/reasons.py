"""Why something was not done, as values: every stage returns its reasons, and all of them are kept for the report.

A code is registered once with what it means and what the user can do; docs/troubleshooting.md is written from this
table, and a test sees every code produced.
"""

from __future__ import annotations

import errno
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Reject:
    """One reason: ``code`` (a key of CODES), ``text`` (this case), ``where`` (node, kernel or source line)."""

    code: str
    text: str
    where: str = ""

    def __post_init__(self) -> None:
        if self.code not in CODES:
            raise KeyError(f"reason code {self.code!r} is not registered in moe_fx.reasons.CODES")

    def __str__(self) -> str:
        return f"{self.code}: {self.text}" + (f" [{self.where}]" if self.where else "")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on the host or on a device."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return getattr(error, "errno", None) == errno.ENOMEM or "can't allocate memory" in str(error)


def not_run(error: Exception, where: str, what: str = "") -> Reject:
    """Why a block did not run on samples: the user's code may raise anything, and memory may not suffice."""
    code = "verify.memory" if out_of_memory(error) else "verify.run"
    return Reject(code, f"{what}{type(error).__name__}: {error}".splitlines()[0], where)


CODES: dict[str, str] = {
    # FIND
    "find.no_experts": "experts are chosen, but no matrices that come E at a time depend on the choice",
    "find.no_routing": "expert-shaped weights are used, but no integer expert ids lead to them",
    "find.no_exit": "no single tensor collects the results of all experts",
    "find.escape": "a value from inside the block is used outside it",
    "find.inputs": "the block does not read exactly one hidden-states tensor and one routing-weights tensor",
    "find.effect": "the block writes to a tensor it does not own, draws random numbers or communicates",
    "find.autocast": "the block changes autocast or grad mode half way",
    # MATCH
    "match.products": "the products with expert weights are not an up and a down projection",
    "match.activation": "no known activation gives the values between the two projections",
    "match.shapes": "the shapes of the expert weights do not fit together",
    "match.weights": "expert weights are computed, quantised or of a dtype that is not supported",
    # VERIFY
    "verify.values": "the block and its specification give different values",
    "verify.gradients": "the block and its specification give different gradients",
    "verify.coverage": "a threshold, limit or cut in the block was never seen from both sides",
    "verify.rounding": "the fused result is less exact than the original by more than the tolerance rule allows",
    "verify.run": "the block could not be run on sampled inputs",
    "verify.memory": "the block could not be verified within the memory budget",
    # PLAN
    "veto.device": "the kernel does not run on this device",
    "veto.compiler": "the kernel is written for a compiler that this graph does not go through",
    "veto.dtype": "the kernel does not take this dtype",
    "veto.activation": "the kernel does not implement this activation",
    "veto.bias": "the kernel does not take biases",
    "veto.norm": "the kernel does not normalise expert outputs",
    "veto.combine": "the kernel does not combine expert outputs in this way",
    "veto.storage": "the kernel does not read weights stored like this, and the layout may not be copied",
    "veto.shape": "the kernel does not take these sizes",
    "veto.training": "the kernel has no backward",
    "veto.capture": "CUDA graphs are asked for, and a call of the kernel may wait for the device",
    "veto.package": "a package that the kernel needs is not installed or too old",
    "veto.request": "another kernel or layout was requested",
    "veto.scheme": "the kernel does not run weights or activations quantised like this",
    "veto.parallel": "the kernel does not work with experts or tokens spread over ranks like this",
    "veto.routing": "the kernel contains a router, and the block's router is not one of its own or not in the block",
    "veto.format": "tokens come as a list and the kernel takes one batch an expert, or the other way round",
    "veto.invariance": "a token's result must not depend on the other tokens, and in the kernel it may",
    "veto.lora": "the experts have LoRA adapters and the kernel takes none",
    "veto.spec": "the kernel does not know a value of the specification",
    # any stage
    "internal": "moe_fx failed; the block was left as it was",
    "capture.untrusted": "the experts loop could not be shown equal to its traceable form",
    "capture.data_dependent": "data decide which code runs on the way from the routing to the experts",
    "capture.unavailable": "this torch lacks the hook that capturing data-dependent loops needs",
}


class MoEFxError(Exception):
    """Base of all errors of moe_fx."""


class MoEFxOptionError(MoEFxError, ValueError):
    """An option is unknown, has a value that is not allowed, or asks for something that is not built."""


class MoEFxUnsupportedError(MoEFxError, NotImplementedError):
    """A kernel, layout or transform was asked for explicitly and cannot be had; the message holds every reason."""


class MoEFxRuntimeError(MoEFxError, RuntimeError):
    """A fused op was called with inputs it cannot take."""


class MoEFxInternalError(MoEFxError):
    """With ``strict=True``: a stage failed on a block."""


class MoEFxWarning(UserWarning):
    """Nothing matched, or a block was left as it was because a stage failed."""
