"""Every family × implementation × dtype through torch.compile(backend="moe_fx"): the table that stands in docs/zoo.md.

python -m tests.zoo.run [FAMILY ...] [--implementation default …] [--dtype float32 …] [--training] [--write]
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
    """One run.  verdict: "fused" (every block, one graph, within the rule), "left alone", "waits" (Route B) or "FAILED"."""

    family: str
    implementation: str
    dtype: str
    verdict: str
    fused: int
    expected: int
    graphs: int
    error: float
    own_error: float
    seconds: float
    detail: str = ""


def cells(names: list[str], implementations: list[str], dtypes: list[str]) -> Iterator[tuple[Family, str, str]]:
    """The cells of the table, in its order."""
    for name in names or list(FAMILIES):
        for implementation in FAMILIES[name].implementations:
            label = implementation or "default"
            for dtype in dtypes:
                if not implementations or label in implementations:
                    yield FAMILIES[name], label, dtype


def run(family: Family, implementation: str, dtype: str, inner: str = "eager") -> Cell:
    """Builds, runs the original in its dtype and in float64, compiles, and judges."""
    torch._dynamo.reset()
    started = time.perf_counter()
    if missing := unavailable(family.name):
        return Cell(family.name, implementation, dtype, "not here", 0, 0, 0, 0.0, 0.0, 0.0, missing)
    sample = build(family.name, None if implementation == "default" else implementation, getattr(torch, dtype))
    must_fuse = family.status == "fuse" and not (family.default_waits and implementation in ("default", "eager"))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = _outputs(sample, sample.model)
        exact = _exact(sample, theirs)
        compiled = torch.compile(
            sample.model, backend=backend, fullgraph=must_fuse, options={"inner_backend": inner, "strict": True}
        )
        try:
            ours = _outputs(sample, compiled)
        except Exception as error:  # any failure is a row of the table
            detail = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
            seconds = time.perf_counter() - started
            return Cell(
                family.name, implementation, dtype, "FAILED", 0, family.moe_layers, 0, math.inf, 0, seconds, detail
            )
    report = moe_fx.last_report()
    own, error = relative(theirs, exact), relative(ours, exact)
    bound = 2 * own + 4 * torch.finfo(getattr(torch, dtype)).eps
    reasons = sorted({f"{r.code}: {r.text}" for s in report.sites if not s.fused for r in s.rejects})
    ok = error <= bound and (not must_fuse or (report.num_fused == family.moe_layers and report.num_graphs == 1))
    verdict = "FAILED"
    if ok and must_fuse:
        verdict = "fused"
    elif ok:
        verdict = "waits" if family.status in ("route_b", "fuse") else "left alone"
        if report.num_fused == family.moe_layers:
            verdict = "fused"
    detail = "" if verdict == "fused" else "; ".join(reasons)
    seconds = time.perf_counter() - started
    expected = family.moe_layers
    return Cell(
        family.name,
        implementation,
        dtype,
        verdict,
        report.num_fused,
        expected,
        report.num_graphs,
        error,
        own,
        seconds,
        detail,
    )


def _outputs(sample: Sample, model: Any) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    return tuple(t.detach().clone() for t in sample.output(model(**copy.deepcopy(sample.inputs))))


def _exact(sample: Sample, theirs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The original in the next wider dtype; itself where a model refuses that."""
    wide = torch.float64 if theirs[0].dtype == torch.float32 else torch.float32
    wider = dataclasses.replace(sample, model=copy.deepcopy(sample.model).to(wide))
    try:
        found = _outputs(wider, wider.model)
    except RuntimeError:  # a model that names its dtypes
        return theirs
    return found


def relative(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> float:
    """Root mean square of a - b over that of b, over all outputs."""
    pairs = [(x.double(), y.double()) for x, y in zip(a, b, strict=True)]
    finite = all(torch.equal(x.isfinite(), y.isfinite()) for x, y in pairs)
    pairs = [(x[y.isfinite()], y[y.isfinite()]) for x, y in pairs]
    difference = math.sqrt(sum(float((x - y).square().sum()) for x, y in pairs))
    scale = math.sqrt(sum(float(y.square().sum()) for _, y in pairs))
    return difference / max(scale, 1e-30) if finite else math.inf


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.zoo.run", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("families", nargs="*")
    parser.add_argument("--implementation", action="append", default=[])
    parser.add_argument("--dtype", action="append", default=[])
    args = parser.parse_args(argv)
    failed = 0
    for family, implementation, dtype in cells(args.families, args.implementation, args.dtype or list(DTYPES)):
        cell = run(family, implementation, dtype)
        failed += cell.verdict == "FAILED"
        print(
            f"{cell.family:24} {cell.implementation:11} {cell.dtype:9} {cell.verdict:10} {cell.fused}/{cell.expected} "
            f"{cell.graphs}g {cell.error:.1e} {cell.seconds:5.1f}s {cell.detail}",
            flush=True,
        )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
