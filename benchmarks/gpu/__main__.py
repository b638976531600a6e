"""Checks, times and reports on the experts of this GPU: ours, PyTorch's, transformers' and those of other libraries.

    python benchmarks/gpu                         all of it, in eight minutes at most
    python benchmarks/gpu --tune --parts tune     tile sizes
    TRITON_INTERPRET=1 python benchmarks/gpu --dry-run    without a GPU: everything in small, to try the script itself

README.md beside this says what each number means.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

if not __package__:  # run as a folder: its own modules are those of the package benchmarks.gpu
    sys.path[0] = str(Path(__file__).parents[2])

import torch

import benchmarks.gpu.peers  # noqa: F401  registers them
from benchmarks.gpu import layers, models, report, timing, training
from benchmarks.gpu.contenders import CONTENDERS
from benchmarks.gpu.session import Session
from benchmarks.gpu.shapes import DRY_TOKENS, SHAPES, TOKENS

# in order of worth; shares of the time that is left, of which a part need not use all
SHARES = {"correctness": 14, "limits": 2, "kernels": 34, "peers": 10, "training": 10, "models": 18, "rest": 12}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        "benchmarks/gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument(
        "--seconds", type=float, default=480, help="for all parts together; what is not reached is listed"
    )
    made.add_argument("--out", type=Path, help="the report; benchmarks/results/<device>-<date>.json by default")
    made.add_argument("--parts", nargs="+", default=list(SHARES), choices=[*SHARES, "tune"], metavar="PART")
    made.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES), metavar="SHAPE")
    made.add_argument("--tokens", nargs="+", type=int)
    made.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS), metavar="NAME")
    made.add_argument("--tune", action="store_true", help="also search tile sizes of our Triton kernels")
    made.add_argument("--dry-run", action="store_true", help="no GPU: small sizes, the interpreter, no graphs")
    return made


def limits(session: Session, part: str) -> Iterator[str]:
    yield "a matrix product and a copy"
    session.found["limits"] = timing.limits(session.clock)


def main() -> int:
    options = parser()
    args = options.parse_args()
    if args.dry_run:
        if os.environ.get("TRITON_INTERPRET") != "1":
            options.error("a dry run needs Triton's interpreter: start it with TRITON_INTERPRET=1 in the environment")
        from tests.device_code import interpreter

        interpreter.mend()
    elif not torch.cuda.is_available():
        options.error("there is no CUDA device: give --dry-run, with TRITON_INTERPRET=1 in the environment")
    warnings.filterwarnings("ignore")  # of compilers, in every cell
    device = torch.device("cpu" if args.dry_run else "cuda")
    tokens = args.tokens or list(DRY_TOKENS if args.dry_run else TOKENS)
    share = {part: float(weight) for part, weight in SHARES.items() if part in args.parts or part == "limits"}
    if args.tune or "tune" in args.parts:
        share["tune"] = 50
    session = Session(
        device,
        timing.Clock(device),
        args.dry_run,
        args.out or report.default_path(device),
        time.perf_counter() + args.seconds,
        {},
        args.shapes,
        tokens,
        args.contenders,
        share,
    )
    session.found |= {
        "format": report.FORMAT,
        "provenance": report.provenance(device, args.dry_run),
        "units": report.UNITS,
        "flushed_bytes": session.clock.flushed.numel(),
        "shapes": {name: _described(session, name) for name in args.shapes},
        "contenders": {
            n: dict(part=CONTENDERS[n].part, absent=CONTENDERS[n].available(device)) for n in args.contenders
        },
        "limits": {},
        **{kind: [] for kind in ("correctness", "times", "training", "models", "tuning")},
        "parts": {},
        "lost": "",
    }
    status = _run(session, list(share))
    report.save(session.found, session.out)
    report.show(session.found)
    picture = session.out.with_suffix(".png")
    print(f"report: {session.out}" + (f", plot: {picture}" if report.plot(session.found, picture) else ""))
    return status


def _described(session: Session, name: str) -> dict[str, object]:
    s = session.shape(name)
    sizes = dict(experts=s.experts, top_k=s.top_k, hidden=s.hidden, intermediate=s.intermediate, of=s.of or s.experts)
    return sizes | dict(act=s.spec.expert.act, biases=s.oai, dtype="bfloat16", weight_bytes=s.experts * s.expert_bytes)


def _run(session: Session, parts: list[str]) -> int:
    """Every part in turn; 1 where something of ours is wrong or the device was lost."""
    shapes = session.shapes
    try:
        with torch.no_grad():
            for part in parts:
                match part:
                    case "correctness":
                        session.part(part, layers.correctness, shapes)
                    case "limits":
                        session.part(part, limits, ["a matrix product and a copy"])
                    case "training":
                        session.part(part, training.training, training.shapes(session))
                    case "models":
                        session.part(part, models.models, models.items(session))
                    case "tune":
                        from benchmarks.gpu import tune

                        session.part(part, tune.tune, [layers.item(n, t) for n in shapes for t in session.tokens])
                    case _:
                        session.part(part, layers.times, layers.items(session, part))
    except timing.Lost as lost:
        session.found["lost"] = str(lost)
        print(f"the device is lost: {lost}")
        return 1
    wrong = [r for r in session.found["correctness"] if r["contender"].startswith("moe_fx") and not r["right"]]
    return 1 if wrong or any(state["error"] for state in session.found["parts"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
