"""Times one layer of experts on this machine's CPU: our kernels, transformers', and other libraries', taking turns.

    python benchmarks/cpu --shapes olmoe granite --tokens 1 16 64 256 1024 --json out.json
    python benchmarks/cpu --training

vLLM's and zentorch's kernels take part where they are installed: ``make peers`` makes an environment, .venv-peers.
All run in one process with one OpenMP runtime, on random routings that rotate; every first result is compared with
float32.  Printed are median and fastest ms, weights read per second, FLOP/s, the share of what a square product and a
long read reach in the same run, and how many times as long the best of the others takes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.cpu.contenders import Layer, Run, forward, training
from moe_fx.reference import experts_forward

SHAPES = {  # E, k, H, I
    "olmoe": (64, 8, 2048, 1024),
    "granite": (32, 8, 1024, 512),
    "qwen3": (128, 8, 2048, 768),
    "gpt-oss": (32, 4, 2880, 2880),
    "mixtral": (8, 2, 4096, 14336),
    "deepseek-v2-lite": (64, 6, 2048, 1408),
    "qwen1.5": (60, 4, 2048, 1408),
    "tiny": (4, 2, 32, 32),
}
ROTATE = 8  # routings
LONG = 1 << 28  # bytes that a read goes through


def read_rate() -> float:
    """Bytes/s of one sum over a long buffer: the best of three."""
    buffer = torch.ones(LONG // 4)
    return LONG / min(_seconds(lambda *_: buffer.sum()) for _ in range(3))


def product_rate(dtype: torch.dtype) -> float:
    """FLOP/s of a square product: the best of ten."""
    a = torch.randn(1024, 1024).to(dtype)
    return 2 * 1024**3 / min(_seconds(lambda *_: a @ a) for _ in range(10))


def _seconds(run: Any, *given: Tensor) -> float:
    start = time.perf_counter()
    run(*given)
    return time.perf_counter() - start


def one_openmp() -> list[str]:
    """The OpenMP runtimes of this process; more than one would share the cores badly."""
    maps = Path("/proc/self/maps")
    text = maps.read_text().split() if maps.exists() else []
    return sorted({Path(word).name for word in text if "libgomp" in word or "libiomp" in word or "libomp" in word})


def measure(runs: dict[str, Run], inputs: list[tuple[Tensor, ...]], seconds: float) -> dict[str, list[float]]:
    """Rounds of all contenders in turn until the time is up, three at least."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    end, rounds = time.perf_counter() + seconds, 0
    while rounds < 3 or (time.perf_counter() < end and rounds < 60):
        for name, run in runs.items():
            times[name].append(_seconds(run, *inputs[rounds % len(inputs)]))
        rounds += 1
    return times


def rows(layer: Layer, tokens: int, args: argparse.Namespace, limits: tuple[float, float]) -> list[dict[str, Any]]:
    """One record a contender."""
    inputs = [layer.routing(tokens) for _ in range(ROTATE)]
    runs = training(layer) if args.training else forward(layer, tokens * layer.top_k)
    runs = {name: run for name, run in runs.items() if not args.kernels or name in args.kernels}
    x, ids, weights = inputs[0]
    experts = layer.view()
    wide = Layer(layer.w13.float(), layer.w2.float(), layer.top_k).view()
    truth = None if args.training else experts_forward(x.float(), ids, weights.float(), wide, layer.spec)
    del experts, wide
    errors = {}
    for name, run in runs.items():
        found = run(x, ids, weights)
        errors[name] = None if truth is None else float((found.float() - truth).norm() / truth.norm())
    times = measure(runs, inputs, args.seconds)
    hidden, inter = layer.w2.shape[1:]
    touched = statistics.mean(i.unique().numel() for _, i, _ in inputs)
    read = touched * 3 * hidden * inter * layer.w2.element_size()
    flops = 6 * tokens * layer.top_k * hidden * inter * (3 if args.training else 1)
    median = {name: statistics.median(values) for name, values in times.items()}
    records = []
    for name, values in times.items():
        others = [m for other, m in median.items() if other not in ("cpp", name)]
        record = {
            "tokens": tokens, "name": name, "ms": median[name] * 1e3, "fastest_ms": min(values) * 1e3,
            "rounds": len(values), "error": errors[name], "weights_gb_s": read / median[name] / 1e9,
            "gflop_s": flops / median[name] / 1e9, "of_read": read / median[name] / limits[0],
            "of_product": flops / median[name] / limits[1],
            "best_other": min(others) / median[name] if others else None,
        }  # fmt: skip
        records.append(record)
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["olmoe", "granite"], choices=SHAPES)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 4, 16, 64, 256, 1024])
    parser.add_argument("--kernels", nargs="+", default=[], help="contenders by name (default: all)")
    parser.add_argument("--training", action="store_true", help="time forward and backward")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=2.0, help="per number of tokens")
    parser.add_argument("--json", metavar="FILE", help="write all records there")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    records = []
    with torch.no_grad():
        for shape in args.shapes:
            for dtype_name in args.dtypes:
                dtype = getattr(torch, dtype_name)
                limits, layer = (read_rate(), product_rate(dtype)), Layer.draw(*SHAPES[shape], dtype)
                print(
                    f"\n{shape} {dtype_name}, {args.threads} threads; a long read {limits[0] / 1e9:.1f} GB/s, a square "
                    f"product {limits[1] / 1e9:.0f} GFLOP/s\n{'T':>6}  {'contender':<16}{'ms':>10}{'fastest':>10}"
                    f"{'GB/s':>8}{'GFLOP/s':>9}{'of read':>9}{'of product':>12}{'error':>10}{'best other':>12}"
                )
                for tokens in args.tokens:
                    for r in rows(layer, tokens, args, limits):
                        error = "" if r["error"] is None else f"{r['error']:.1e}"
                        other = "" if r["best_other"] is None else f"{r['best_other']:.2f}"
                        print(
                            f"{tokens:>6}  {r['name']:<16}{r['ms']:>10.3f}{r['fastest_ms']:>10.3f}"
                            f"{r['weights_gb_s']:>8.1f}{r['gflop_s']:>9.0f}{r['of_read']:>9.0%}"
                            f"{r['of_product']:>12.0%}{error:>10}{other:>12}",
                            flush=True,
                        )
                        records.append({"shape": shape, "dtype": dtype_name, **r})
    runtimes = one_openmp()
    if len(runtimes) > 1:
        raise SystemExit(f"several OpenMP runtimes in one process, the times mean little: {', '.join(runtimes)}")
    if args.json:
        whole = {"command": " ".join(sys.argv), "threads": args.threads, "torch": torch.__version__, "records": records}
        Path(args.json).write_text(json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    main()
