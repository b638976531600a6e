"""Which tiny models Dynamo captures whole: one line per family and implementation.

Enters: `python -m tests.zoo.capture_table [--only name,...] [--dtype bf16]`. Leaves: lines on standard output: the MoE
blocks run, whether torch.compile(fullgraph=True) with a backend that does nothing gives one graph, the compiled
output's error against the uncompiled one, the implementation's error against the family's default one (both relative to
the largest value), seconds. Exit status 1 if any of it is not what the catalogue and HF-MOE.md say. The eager
implementation is run and not compiled: its loop over experts is no graph without our backend.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass

import torch
import transformers
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from . import FAMILIES, Family, Sample, blocks_run, build, relative_error, unavailable
from .families import Implementation

_DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
_COMPILED_TOLERANCE = {"f32": 1e-5, "bf16": 1e-2}
_IMPLEMENTATION_TOLERANCE = {"f32": 1e-4, "bf16": float("inf")}  # in bf16 a rounding may change a later router's choice


@dataclass(frozen=True, slots=True)
class Capture:
    """graphs: Dynamo's count. error: compiled against uncompiled. refusal: Dynamo's reason in one line, or empty."""

    graphs: int = 0
    error: float = float("nan")
    refusal: str = ""


def captures(family: Family, implementation: Implementation | None) -> bool:
    """Whether HF-MOE.md says that Dynamo makes one graph of the model: loops over experts are what it refuses."""
    if implementation is None:
        return family.status != "route_b" and not family.default_waits and family.name != "nllb_moe"
    return implementation != "eager"


@torch.no_grad()
def capture(sample: Sample, expected: tuple[Tensor, ...]) -> Capture:
    """Compiles the model with fullgraph=True and a backend that only counts; expected: the uncompiled output."""
    graphs: list[torch.fx.GraphModule] = []

    def counting(graph: torch.fx.GraphModule, example_inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    try:
        out = torch.compile(sample.model, backend=counting, fullgraph=True)(**sample.inputs)
    except (torch._dynamo.exc.TorchDynamoException, GuardOnDataDependentSymNode) as error:
        return Capture(refusal=str(error).strip().partition("\n")[0])
    return Capture(len(graphs), relative_error(sample.output(out), expected))


@torch.no_grad()
def rows(family: Family, dtype: str) -> bool:
    """Prints a family's lines; leaves whether everything was as expected."""
    good, default = True, None
    for implementation in family.implementations:
        start = time.perf_counter()
        sample = build(family.name, implementation, _DTYPES[dtype])
        expected = sample.output(sample.model(**sample.inputs))
        default = expected if default is None else default
        difference, blocks = relative_error(expected, default), len(blocks_run(sample))
        found = Capture() if implementation == "eager" else capture(sample, expected)
        faults = {
            "capture": implementation != "eager" and (found.graphs == 1) != captures(family, implementation),
            "compiled": found.error > _COMPILED_TOLERANCE[dtype],
            "default": difference > _IMPLEMENTATION_TOLERANCE[dtype],
            "blocks": blocks != family.moe_layers,
        }
        wrong = [fault for fault, present in faults.items() if present]
        verdict = "refused" if found.refusal else f"{found.graphs} graph"
        print(
            f"{family.name:24}{implementation or 'default':12}{blocks} blocks",
            f" {'not compiled' if implementation == 'eager' else verdict:13}compiled {found.error:7.1e} ",
            f"default {difference:7.1e} {time.perf_counter() - start:5.1f} s  {found.refusal}",
            f"<-- {', '.join(wrong)}" if wrong else "",
            flush=True,
        )
        good = good and not wrong
    return good


def main() -> int:
    """Runs the command line; leaves the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.zoo.capture_table", description=__doc__)
    parser.add_argument("--only", default=",".join(FAMILIES), help="families, separated by commas")
    parser.add_argument("--dtype", default="f32", choices=_DTYPES)
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    start, bad = time.perf_counter(), []
    for name in arguments.only.split(","):
        if reason := unavailable(name):
            print(f"{name:24}unavailable: {reason}")
        elif not rows(FAMILIES[name], arguments.dtype):
            bad.append(name)
    print(f"{time.perf_counter() - start:.0f} s; not as expected: {', '.join(bad) or 'none'}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
