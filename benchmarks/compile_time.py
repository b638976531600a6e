"""What moe_fx costs at compile time, beside plain Inductor: every cell in a process of its own, with empty caches.

    python benchmarks/compile_time.py --json out.json

granite   Granite-3.0-1B-A400M at its true size (24 layers × 32 experts), one prefill of 64 tokens, bfloat16
loop      one block that loops over a ModuleList of 128 experts with torch.where (static: Dynamo unrolls it), float32

Prints for each backend the seconds of the first call less those of the third, and for moe_fx its own share: the time
spent in its stages, from capture to rewrite, as the report gives it.  The cells of a case run in turn, ``--rounds``
times; the median is printed.  Meant for a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BACKENDS = ("inductor", "moe_fx")
EXPERTS, TOP_K, HIDDEN, INTERMEDIATE, TOKENS = 128, 8, 64, 48, 64


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, INTERMEDIATE, bias=False)
        self.up = nn.Linear(HIDDEN, INTERMEDIATE, bias=False)
        self.down = nn.Linear(INTERMEDIATE, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return y


class Loop(nn.Module):
    """The usual block, written as a loop over all experts."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = nn.ModuleList(Mlp() for _ in range(EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).softmax(-1).topk(TOP_K)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            y.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
        return y


def loop() -> tuple[nn.Module, dict[str, Any]]:
    return Loop(), {"x": torch.randn(TOKENS, HIDDEN)}


def granite() -> tuple[nn.Module, dict[str, Any]]:
    from demo import VOCAB, build_model

    ids = torch.randint(1, VOCAB, (1, TOKENS))
    return build_model(24), {"input_ids": ids, "use_cache": False, "logits_to_keep": 1}


CASES: dict[str, Callable[[], tuple[nn.Module, dict[str, Any]]]] = {"granite": granite, "loop": loop}


@torch.no_grad()
def cell(case: str, backend: str) -> dict[str, Any]:
    """One case with one backend in this process: seconds of compilation, and moe_fx's own."""
    warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`-wrapped function")
    torch.manual_seed(0)
    model, kwargs = CASES[case]()
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)
    torch.compile(lambda x: x.sin(), backend=backend)(torch.ones(4))  # the compiler itself, warmed up
    times = []
    for _ in range(3):
        started = time.perf_counter()
        compiled(**kwargs)
        times.append(time.perf_counter() - started)
    result: dict[str, Any] = {"case": case, "backend": backend, "compile_s": times[0] - times[2]}
    if backend == "moe_fx":
        import moe_fx

        report = moe_fx.last_report()
        result |= {"own": dict(report.seconds), "fused": report.num_fused, "blocks": report.num_blocks}
    return result


def in_a_process(case: str, backend: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder}
        command = [sys.executable, __file__, "--cell", case, backend]
        done = subprocess.run(command, env=env, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{case} with {backend} failed:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def show(case: str, rounds: list[dict[str, dict[str, Any]]]) -> None:
    plain, ours = (statistics.median(r[b]["compile_s"] for r in rounds) for b in BACKENDS)
    own = statistics.median(r["moe_fx"]["own"]["all"] for r in rounds)
    last = rounds[-1]["moe_fx"]
    stages = ", ".join(f"{k} {v:.2f} s" for k, v in last["own"].items())
    print(f"{case}: Inductor {plain:.1f} s, moe_fx {ours:.1f} s ({plain / ours:.2f} × as fast to compile)")
    print(
        f"  {last['fused']} of {last['blocks']} blocks fused; moe_fx itself {own:.2f} s, {own / ours:.1%} of its whole"
    )
    print(f"  {stages}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", metavar="FILE", help="write all figures there")
    parser.add_argument("--cell", nargs=2, metavar=("CASE", "BACKEND"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cell:
        print(json.dumps(cell(*args.cell)))
        return
    records = []
    for case in args.cases:
        rounds = [{b: in_a_process(case, b) for b in BACKENDS} for _ in range(args.rounds)]
        records += [record for r in rounds for record in r.values()]
        show(case, rounds)
    if args.json:
        machine = {"threads": torch.get_num_threads(), "torch": torch.__version__}
        Path(args.json).write_text(json.dumps({"machine": machine, "records": records}, indent=1) + "\n")


if __name__ == "__main__":
    main()
