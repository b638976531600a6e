"""Golden plans: (model, device, request) → the plan in short form, kept in golden_plans.json and reviewed as diffs.

Accept with ``python -m tests.oracle.golden --accept`` or ``pytest tests/oracle --accept-golden``.
Short form: the plan's op string, prices in microseconds at Plan.priced_at, candidates by the codes that vetoed them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_fx.hardware import catalogue
from moe_fx.oracle import Request, choose
from moe_fx.plan import Plan

from .candidates import KERNELS, MODELS

Entries = dict[str, dict[str, Any]]  # name of a case → its short form


@dataclass(frozen=True, slots=True)
class Golden:
    """A file of accepted entries beside this module, and what makes those of today."""

    file: str
    produce: Callable[[], Entries]

    @property
    def path(self) -> Path:
        return Path(__file__).with_name(self.file)

    def accepted(self) -> Entries:
        return json.loads(self.path.read_text())

    def accept(self) -> None:
        self.path.write_text(json.dumps(self.produce(), indent=1) + "\n")

    def main(self) -> None:
        """Ends the process with 1 where an entry differs from the accepted one."""
        parser = argparse.ArgumentParser(description=f"Compare with {self.file}.")
        parser.add_argument("--accept", action="store_true", help="write what is produced today")
        if parser.parse_args().accept:
            self.accept()
            return
        now, then = self.produce(), self.accepted()
        changed = sorted(key for key in now.keys() | then.keys() if now.get(key) != then.get(key))
        print("\n".join(changed) or "no change")
        raise SystemExit(bool(changed))


DEVICES = (
    "h100", "h200", "b200", "mi300x", "a100", "rtx5090", "xeon_amx", "zen5_epyc_2", "zen5_epyc_64", "arm_neon",
    "xe_max1550", "tpu_v5p",
)  # fmt: skip
REQUESTS: dict[str, Request] = {
    "bf16": Request("bfloat16"),
    "bf16 training": Request("bfloat16", training=True),
    "bf16 copy": Request("bfloat16", memory="copy"),
    "bf16 compiled": Request("bfloat16", compiled=True),
    "bf16 priority": Request("bfloat16", policy="priority"),
    "fp32": Request("float32"),
    "fp32 training": Request("float32", training=True),
    "fp16": Request("float16"),
    "bf16 x, fp32 weights": Request("bfloat16", "float32"),
}
VARIED = (("qwen3-30b-a3b", "gpt-oss-20b", "switch-base-8"), ("h100", "zen5_epyc_2", "xeon_amx"))


def pairs() -> Iterator[tuple[str, str, str]]:
    """Every model on every device in bfloat16; three models on three devices with every other request."""
    yield from ((model, device, "bf16") for model in MODELS for device in DEVICES)
    yield from ((m, d, r) for m in VARIED[0] for d in VARIED[1] for r in REQUESTS if r != "bf16")


def plan_of(model: str, device: str, request: str) -> Plan:
    spec, binding = MODELS[model]
    return choose(spec, binding, REQUESTS[request], catalogue()[device], KERNELS)


def short(plan: Plan) -> dict[str, Any]:
    vetoed: dict[str, list[str]] = {}
    for verdict in plan.verdicts:
        if verdict.reasons:
            codes = " ".join(sorted({r.code for r in verdict.reasons}))
            vetoed.setdefault(codes, []).append(verdict.candidate)
    prices = {v.candidate: " ".join(f"{p:g}" for p in v.price_us) for v in plan.verdicts if v.price_us}
    return {
        "plan": plan.op_string(),
        "price_us": prices,
        "vetoed": {codes: " ".join(candidates) for codes, candidates in sorted(vetoed.items())},
    }


def produce() -> Entries:
    return {" | ".join(pair): short(plan_of(*pair)) for pair in pairs()}


FILE = Golden("golden_plans.json", produce)

if __name__ == "__main__":
    FILE.main()
