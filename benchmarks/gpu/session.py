"""What all parts of a run share: the device, the report so far, what time is left, and which contenders are right."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import report
from benchmarks.gpu.contenders import CONTENDERS, Contender
from benchmarks.gpu.shapes import BOUND, CHECKED, DRY_CHECKED, SHAPES, Layer, Shape, build, error, truth
from benchmarks.gpu.timing import Clock, Lost, Run, attempt, reason_of


@dataclass(slots=True)
class Session:
    """found: the report, as it will be written.  share: of the time that is left, of each part still to come."""

    device: torch.device
    clock: Clock
    dry: bool
    out: Path
    ends: float
    found: dict[str, Any]
    shapes: list[str]
    tokens: list[int]
    names: list[str]
    share: dict[str, float]
    layer: Layer | None = None
    runs: dict[str, Run] = field(default_factory=dict)  # of ``layer``
    verdicts: dict[tuple[str, str], str] = field(default_factory=dict)  # (shape, contender) → why it is not timed
    part_ends: float = 0.0

    def shape(self, name: str) -> Shape:
        return SHAPES[name].small() if self.dry else SHAPES[name]

    def load(self, name: str) -> Layer:
        """The layer of that shape; the one before is let go first."""
        if self.layer is None or self.layer.name != name:
            self.layer = None
            self.runs.clear()
            torch._dynamo.reset()
            if self.clock.cuda:
                torch.cuda.empty_cache()
            self.layer = build(name, self.shape(name), self.device)
        return self.layer

    def contenders(self, *parts: str) -> list[Contender]:
        return [CONTENDERS[name] for name in self.names if CONTENDERS[name].part in parts]

    def run_of(self, layer: Layer, contender: Contender) -> tuple[Run | None, str]:
        """Its call on the layer, checked once a shape; None and why where it cannot be timed."""
        key = (layer.name, contender.name)
        if key not in self.verdicts:
            reason = contender.available(self.device) or contender.takes(layer.shape, 1)
            if not reason:
                reason = self._check(layer, contender)
            self.verdicts[key] = reason
        if not self.verdicts[key] and contender.name not in self.runs:
            run, self.verdicts[key] = attempt(self.device, lambda: contender.prepare(layer))
            if run is not None:
                self.runs[contender.name] = run
        return self.runs.get(contender.name), self.verdicts[key]

    def _check(self, layer: Layer, contender: Contender) -> str:
        """Lists its errors at every number of tokens that is checked; why it is wrong, or empty."""
        run, reason = attempt(self.device, lambda: contender.prepare(layer))
        if run is None:
            return f"failed: {reason}"
        wrong = ""
        for tokens in DRY_CHECKED if self.dry else CHECKED:
            if contender.takes(layer.shape, tokens):
                continue
            inputs = layer.inputs(tokens, seed=1)
            errors = []
            for one in inputs if tokens == 1 else inputs[:1]:
                y, reason = attempt(self.device, lambda one=one: run(*one))  # type: ignore[misc]
                errors.append(float("inf") if y is None else error(y, truth(layer, one)))
            right = max(errors) <= BOUND
            if not right:
                wrong = f"wrong: relative RMS error {max(errors):.1e} at T = {tokens}"
            if reason:
                wrong = f"failed: {reason}"
            self.found["correctness"].append(
                dict(
                    shape=layer.name,
                    tokens=tokens,
                    contender=contender.name,
                    error=report.number(max(errors)),
                    bound=BOUND,
                    right=right,
                    reason=reason,
                )
            )
        if not wrong:
            self.runs[contender.name] = run
        return wrong

    def part(self, name: str, work: Callable[[Session, str], Iterator[str]], items: Sequence[str]) -> None:
        """Does a part: ``work`` yields the item that it is about to do, and is stopped where the part's time is up."""
        started = time.perf_counter()
        share = self.share.pop(name)
        left = max(0.0, self.ends - started)
        self.part_ends = started + left * share / (share + sum(self.share.values()))
        state: dict[str, Any] = dict(seconds=0.0, reached=[], not_reached=list(items), error="")
        self.found["parts"][name] = state
        try:
            for item in work(self, name):
                if time.perf_counter() >= self.part_ends:
                    break
                state["reached"].append(item)
                state["not_reached"] = [i for i in items if i not in state["reached"]]
                print(f"[{self.ends - time.perf_counter():5.0f} s left] {name}: {item}", flush=True)
        except Lost:
            raise
        except Exception as fault:  # noqa: BLE001  the other parts are worth having
            traceback.print_exc()
            state["error"] = reason_of(fault)
        finally:
            state["seconds"] = time.perf_counter() - started
            report.save(self.found, self.out)

    def slice(self, cells: int) -> float:
        """Seconds for one of so many cells that are still to come in this part."""
        return max(0.0, self.part_ends - time.perf_counter()) / max(1, cells)
