"""Every family × implementation × dtype through torch.compile(backend="moe_fx"): the table that stands in docs/zoo.md.

python -m tests.zoo.run [FAMILY ...] [--implementation default ...] [--dtype float32 ...] [--write docs/zoo.md]
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import math
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import moe_fx
from moe_fx.backend import moe_fx as backend

from .families import FAMILIES, Family
from .samples import Sample, build, unavailable

DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True, slots=True)
class Cell:
    """One run.

    verdict: "fused" (every block, one graph, within the rule of DESIGN §5), "left alone" (on purpose, with the reason),
    "waits" (needs the capture of arbitrary loops), "not here" (this transformers lacks the family) or "FAILED".
    error, own_error: of the compiled and of the original model against the next wider dtype, relative RMS.
    """

    family: str
    implementation: str
    dtype: str
    verdict: str
    fused: int = 0
    expected: int = 0
    graphs: int = 0
    error: float = math.inf
    own_error: float = 0.0
    seconds: float = 0.0
    detail: str = ""

    def __str__(self) -> str:
        return (
            f"{self.family:24} {self.implementation:11} {self.dtype:9} {self.verdict:10} {self.fused}/{self.expected} "
            f"{self.graphs}g {self.error:.1e} (own {self.own_error:.1e}) {self.seconds:5.1f}s {self.detail}"
        )


def cells(names: list[str], implementations: list[str], dtypes: list[str]) -> Iterator[tuple[Family, str, str]]:
    """The cells of the table, in its order; an empty list means all."""
    for name in names or list(FAMILIES):
        for implementation in FAMILIES[name].implementations:
            label = implementation or "default"
            if not implementations or label in implementations:
                yield from ((FAMILIES[name], label, dtype) for dtype in dtypes or DTYPES)


def must_fuse(family: Family, implementation: str) -> bool:
    waits = family.default_waits and implementation in ("default", "eager")
    return family.status == "fuse" and not waits


def run(family: Family, implementation: str, dtype: str, inner: str = "eager") -> Cell:
    """Builds the model, runs the original in its dtype and in the next wider one, compiles, and judges."""
    torch._dynamo.reset()
    cell = Cell(family.name, implementation, dtype, "FAILED", expected=family.moe_layers)
    if missing := unavailable(family.name):
        return dataclasses.replace(cell, verdict="not here", detail=missing)
    started = time.perf_counter()
    sample = build(family.name, None if implementation == "default" else implementation, getattr(torch, dtype))
    required = must_fuse(family, implementation)
    options = {"inner_backend": inner, "strict": True}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = outputs(sample, sample.model)
        exact = _wider(sample, theirs)
        compiled = torch.compile(sample.model, backend=backend, fullgraph=required, options=options)
        try:
            ours = outputs(sample, compiled)
        except Exception as error:  # noqa: BLE001  any failure is a row of the table
            return dataclasses.replace(
                cell, detail=f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
            )
    report = moe_fx.last_report()
    own, error = relative(theirs, exact), relative(ours, exact)
    complete = report.num_fused == family.moe_layers and report.num_graphs == 1
    verdict = "FAILED"
    if error <= 2 * own + 4 * torch.finfo(getattr(torch, dtype)).eps and (complete or not required):
        kinds = {"route_b": "waits", "fuse": "waits", "left_alone": "left alone"}
        verdict = "fused" if complete else kinds[family.status]
    reasons = sorted({f"{r.code}: {r.text}" for s in report.sites if not s.fused for r in s.rejects})
    return dataclasses.replace(
        cell,
        verdict=verdict,
        fused=report.num_fused,
        graphs=report.num_graphs,
        error=error,
        own_error=own,
        seconds=time.perf_counter() - started,
        detail="" if verdict == "fused" else "; ".join(reasons),
    )


def outputs(sample: Sample, model: Any) -> tuple[Tensor, ...]:
    """What the model gives for the sample's inputs."""
    torch.manual_seed(0)
    return tuple(t.detach().clone() for t in sample.output(model(**copy.deepcopy(sample.inputs))))


def _wider(sample: Sample, theirs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The original in the next wider dtype; itself where the model names a dtype and refuses."""
    wide = torch.float64 if theirs[0].dtype == torch.float32 else torch.float32
    wider = dataclasses.replace(sample, model=copy.deepcopy(sample.model).to(wide))
    try:
        return outputs(wider, wider.model)
    except RuntimeError:
        return theirs


def relative(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> float:
    """Root mean square of a - b over that of b, over all outputs; inf where one is finite and the other is not."""
    pairs = [(x.double(), y.double()) for x, y in zip(a, b, strict=True)]
    if not all(torch.equal(x.isfinite(), y.isfinite()) for x, y in pairs):
        return math.inf
    pairs = [(x[y.isfinite()], y[y.isfinite()]) for x, y in pairs]
    difference = math.sqrt(sum(float((x - y).square().sum()) for x, y in pairs))
    scale = math.sqrt(sum(float(y.square().sum()) for _, y in pairs))
    return difference / max(scale, 1e-30)


def markdown(found: list[Cell]) -> str:
    """The table as docs/zoo.md."""
    import transformers

    columns = ("default", "eager", "batched_mm", "grouped_mm")
    versions = f"torch {torch.__version__.split('+')[0]} (CPU) and transformers {transformers.__version__}"
    lines = [
        "# Hugging Face families",
        "",
        "Printed by `python -m tests.zoo.run --write docs/zoo.md`: tiny random models of every family, compiled with",
        f'`torch.compile(model, backend="moe_fx", fullgraph=True)` on {versions}.',
        "",
        "A cell gives `float32 / bfloat16`. **2/2** means that both blocks of the model were fused in one graph and",
        "that the result is within twice the original's own error plus 4 eps (relative RMS against the next wider",
        "dtype); *left alone* and *waits* (needs the capture of arbitrary expert loops) are explained below; – cannot",
        "be chosen.",
        "",
        "| family | router | experts | " + " | ".join(columns) + " |",
        "|---|---|---|" + "---|" * len(columns),
    ]
    by_key = {(c.family, c.implementation, c.dtype): c for c in found}
    for name in dict.fromkeys(c.family for c in found):
        family = FAMILIES[name]
        row = [_entry([by_key.get((name, column, dtype)) for dtype in DTYPES]) for column in columns]
        lines.append(f"| {name} | {family.router} | {family.experts} | " + " | ".join(row) + " |")
    verdicts = ("fused", "waits", "left alone", "FAILED")
    counts = {v: len({c.family for c in found if c.verdict == v}) for v in verdicts}
    summary = ", ".join(f"{verdict} {count}" for verdict, count in counts.items())
    lines += ["", f"Families by verdict: {summary}.", "", "## Left alone", ""]
    for name in dict.fromkeys(c.family for c in found if c.verdict != "fused"):
        detail = next(c.detail for c in found if c.family == name and c.verdict != "fused")
        why = FAMILIES[name].why or "a data-dependent loop"
        lines.append(f"- **{name}**: {why}. Reported: {detail or 'no block seen'}")
    return "\n".join(lines) + "\n"


def _entry(found: list[Cell | None]) -> str:
    entries = []
    for cell in found:
        if cell is None:
            return "–"
        entries.append(f"**{cell.fused}/{cell.expected}**" if cell.verdict == "fused" else cell.verdict)
    return " / ".join(entries) if len(set(entries)) > 1 else entries[0]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.zoo.run", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("families", nargs="*")
    parser.add_argument("--implementation", action="append", default=[])
    parser.add_argument("--dtype", action="append", default=[])
    parser.add_argument("--write", type=Path, help="write the table here")
    args = parser.parse_args(argv)
    found = []
    for family, implementation, dtype in cells(args.families, args.implementation, args.dtype):
        found.append(run(family, implementation, dtype))
        print(found[-1], flush=True)
    if args.write:
        args.write.write_text(markdown(found))
    return 1 if any(cell.verdict == "FAILED" for cell in found) else 0


if __name__ == "__main__":
    sys.exit(main())
