"""Choice: which layout, which kernel for how many tokens, why, and what was vetoed for which reasons.

A plan is frozen and replays from JSON (``Plan.from_json(plan.to_json()) == plan``).  ``Plan.op_string`` is the short
form that goes into the graph as the op's attribute: only what running needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from moe_fx.reasons import Reject

VERSION = "plan/1"
WORKSPACE_BYTES = 1 << 30  # enough for thousands of tokens of any model, little beside its weights


@dataclass(frozen=True, slots=True)
class Range:
    """``kernel`` serves t_min <= T <= t_max (None: no upper end)."""

    t_min: int
    t_max: int | None
    kernel: str

    def __contains__(self, tokens: int) -> bool:
        return self.t_min <= tokens and (self.t_max is None or tokens <= self.t_max)

    def __str__(self) -> str:
        return f"{self.kernel}:{self.t_min}-{'' if self.t_max is None else self.t_max}"

    def to_json(self) -> dict[str, Any]:
        return {"t_min": self.t_min, "t_max": self.t_max, "kernel": self.kernel}


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the oracle thought of one candidate (a kernel over a layout).

    price_us: microseconds of one forward at each T of ``Plan.priced_at``; empty when vetoed.
    measured_us: likewise at ``Plan.measured_at``, None where it was not measured; empty when nothing was.
    """

    candidate: str
    status: Literal["chosen", "survived", "vetoed"]
    reasons: tuple[Reject, ...] = ()
    price_us: tuple[float, ...] = ()
    measured_us: tuple[float | None, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "candidate": self.candidate,
            "status": self.status,
            "reasons": [r.to_json() for r in self.reasons],
            "price_us": list(self.price_us),
            "measured_us": list(self.measured_us),
        }


@dataclass(frozen=True, slots=True)
class Plan:
    """layout: "view" (the model's own storage), or the name of a packed copy.

    backward: "recompute" the activations, or "save" them in the forward.
    ranges: cover 1 <= T without gap or overlap.  inline: the kernel that stands in the graph in the place of the op
    where T is known when the graph is compiled, and in this range.  priced_at, measured_at: token counts of the
    verdicts' prices and measurements.  workspace_bytes: most that a call's workspaces take; more tokens than that go
    through a part at a time.
    """

    layout: str
    ranges: tuple[Range, ...]
    backward: Literal["recompute", "save"] = "recompute"
    priced_at: tuple[int, ...] = ()
    verdicts: tuple[Verdict, ...] = ()
    inline: Range | None = None
    measured_at: tuple[int, ...] = ()
    workspace_bytes: int = WORKSPACE_BYTES

    @property
    def spans(self) -> tuple[Range, ...]:
        """Every range, the inline one first."""
        return (*([] if self.inline is None else [self.inline]), *self.ranges)

    def kernel_for(self, tokens: int) -> str:
        """Name of the kernel that serves ``tokens`` (0 counts as 1)."""
        tokens = max(tokens, 1)
        return next(r.kernel for r in self.ranges if tokens in r)

    def op_string(self) -> str:
        inline = "" if self.inline is None else f" inline={self.inline}"
        room = "" if self.workspace_bytes == WORKSPACE_BYTES else f" workspace={self.workspace_bytes}"
        ranges = ";".join(map(str, self.ranges))
        return f"{VERSION} layout={self.layout} ranges={ranges} backward={self.backward}{inline}{room}"

    def to_json(self) -> dict[str, Any]:
        return {
            "version": VERSION,
            "layout": self.layout,
            "ranges": [r.to_json() for r in self.ranges],
            "backward": self.backward,
            "inline": None if self.inline is None else self.inline.to_json(),
            "priced_at": list(self.priced_at),
            "measured_at": list(self.measured_at),
            "workspace_bytes": self.workspace_bytes,
            "verdicts": [v.to_json() for v in self.verdicts],
        }

    @staticmethod
    def from_json(data: dict[str, Any]) -> Plan:
        """Inverse of ``to_json``; ValueError for another version."""
        if data.get("version") != VERSION:
            raise ValueError(f"plan version {data.get('version')!r} cannot be read; this version reads {VERSION!r}")
        verdicts = tuple(
            Verdict(
                v["candidate"],
                v["status"],
                tuple(Reject(**r) for r in v["reasons"]),
                tuple(v["price_us"]),
                tuple(v["measured_us"]),
            )
            for v in data["verdicts"]
        )
        ranges = tuple(Range(**r) for r in data["ranges"])
        inline = None if data["inline"] is None else Range(**data["inline"])
        return Plan(
            layout=data["layout"],
            ranges=ranges,
            backward=_backward(data["backward"]),
            priced_at=tuple(data["priced_at"]),
            verdicts=verdicts,
            inline=inline,
            measured_at=tuple(data["measured_at"]),
            workspace_bytes=data["workspace_bytes"],
        )


def _backward(name: str) -> Literal["recompute", "save"]:
    match name:
        case "recompute" | "save":
            return name
        case _:
            raise ValueError(f"backward={name!r} is neither 'recompute' nor 'save'")


@lru_cache(maxsize=4096)
def parse_plan(text: str) -> Plan:
    """The plan (without verdicts) whose ``op_string`` is ``text``."""
    version, *parts = text.split()
    if version != VERSION:
        raise ValueError(f"plan version {version!r} cannot be read; this version reads {VERSION!r}")
    values = dict(part.split("=", 1) for part in parts)
    ranges = tuple(map(_range, values["ranges"].split(";")))
    inline = _range(values["inline"]) if "inline" in values else None
    room = int(values.get("workspace", WORKSPACE_BYTES))
    return Plan(values["layout"], ranges, _backward(values["backward"]), inline=inline, workspace_bytes=room)


def _range(text: str) -> Range:
    kernel, _, span = text.rpartition(":")
    low, _, high = span.partition("-")
    return Range(int(low), int(high) if high else None, kernel)
