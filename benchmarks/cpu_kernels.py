"""Times the experts kernels on this machine's CPU against transformers' own, interleaved in one process.

    python benchmarks/cpu_kernels.py --shapes olmoe granite --dtypes bfloat16 float32 --tokens 1 16 256 --json out.json

One MoE layer (gated SiLU, stacked weights), random routing that rotates from round to round.  Prints, per shape, dtype
and T, the median and the fastest time of each contestant in ms, and the share of the measured GEMM peak.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import moe_fx.kernels.experts  # noqa: F401  registers the kernels
from moe_fx.binding import Experts, bind, parse_binding
from moe_fx.kernels.experts import experts_backward
from moe_fx.kernels.registry import KERNELS
from moe_fx.spec import ExpertSpec, MoESpec
from moe_fx.weights import WeightStore

SHAPES = {  # E, k, H, I
    "olmoe": (64, 8, 2048, 1024),
    "granite": (32, 8, 1024, 512),
    "qwen3": (128, 8, 2048, 768),
    "mixtral": (8, 2, 4096, 14336),
}
BINDING = parse_binding("bind/1 w13:stacked:out_in:gate_up w2:stacked:out_in:gate_up")
GATHER_ROWS = 32  # contestants that copy the weights of every row are left out above this
COMPILED_ROWS = 128  # and those that read them anew for every row above this
Inputs = tuple[Tensor, Tensor, Tensor]
Run = Callable[[Tensor, Tensor, Tensor], Any]
Clock = Callable[[], float]
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.thread_time}


def hugging_face(w13: Tensor, w2: Tensor) -> SimpleNamespace:
    """What transformers' experts functions read from a module."""
    return SimpleNamespace(
        gate_up_proj=w13,
        down_proj=w2,
        num_experts=w13.shape[0],
        has_gate=True,
        has_bias=False,
        has_post_expert_norm=False,
        is_transposed=False,
        _is_expert_parallel=False,
        _apply_gate=lambda rows: F.silu(rows.chunk(2, -1)[0]) * rows.chunk(2, -1)[1],
    )


def contestants(w13: Tensor, w2: Tensor, spec: MoESpec, rows: int, wanted: list[str]) -> dict[str, Run]:
    """name → one forward of (x, ids, weights)."""
    from transformers.integrations.moe import batched_mm_experts_forward, grouped_mm_experts_forward

    views = {"view": bind(BINDING, [w13, w2], w13.shape[0])}
    if not wanted or any(name.endswith("/transposed") for name in wanted):
        views["transposed"] = WeightStore().get("transposed", BINDING, [w13, w2], w13.shape[0])
    runs: dict[str, Run] = {}
    for name, kernel in KERNELS.items():
        if w13.dtype is not torch.bfloat16 and "float32" not in kernel.capability.dtypes:
            continue
        if kernel.capability.compiled:
            if rows <= COMPILED_ROWS:
                runs[name] = compiled(kernel.forward, w13, w2, spec)
            continue
        for layout, experts in views.items():
            if layout == "transposed" and name not in ("sorted_loop", "torch_grouped"):
                continue

            def run(x: Tensor, ids: Tensor, weights: Tensor, f: Any = kernel.forward, experts: Any = experts) -> Any:
                return f(x, ids, weights, experts, spec)

            runs[name if layout == "view" else f"{name}/{layout}"] = run
    module: Any = hugging_face(w13, w2)
    runs["hf_grouped_mm"] = lambda x, ids, weights: grouped_mm_experts_forward(module, x, ids, weights)
    runs["hf_batched_mm"] = lambda x, ids, weights: batched_mm_experts_forward(module, x, ids, weights)
    if rows > GATHER_ROWS:
        del runs["hf_batched_mm"], runs["gather_bmm"]
    return {name: run for name, run in runs.items() if not wanted or name in wanted}


def compiled(forward: Any, w13: Tensor, w2: Tensor, spec: MoESpec) -> Run:
    """As it stands in a graph that Inductor compiles for one number of tokens."""

    def run(x: Tensor, ids: Tensor, weights: Tensor) -> Any:
        return forward(x, ids, weights, bind(BINDING, [w13, w2], w13.shape[0]), spec)

    run_compiled: Run = torch.compile(run, dynamic=False)
    return run_compiled


def backward_contestants(w13: Tensor, w2: Tensor, spec: MoESpec) -> dict[str, Run]:
    """Forward and backward: ours by hand, transformers' by autograd."""
    from transformers.integrations.moe import grouped_mm_experts_forward

    views = bind(BINDING, [w13, w2], w13.shape[0])

    def train(name: str, frozen: bool, save: bool = True) -> Run:
        def run(x: Tensor, ids: Tensor, weights: Tensor) -> Any:
            forward: Any = KERNELS[name].forward
            saved: list[Tensor] = []
            y = forward(x, ids, weights, views, spec, keep=saved if save else None)
            grads: Experts | None = None
            if not frozen:
                grads = bind(BINDING, [torch.empty_like(w13), torch.empty_like(w2)], w13.shape[0])
            return experts_backward(torch.ones_like(y), x, ids, weights, views, spec, grads, saved)

        return run

    def transformers(x: Tensor, ids: Tensor, weights: Tensor) -> Any:
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in (w13, w2, x, weights)]
            module: Any = hugging_face(leaves[0], leaves[1])
            y = grouped_mm_experts_forward(module, leaves[2], ids, leaves[3])
            return torch.autograd.grad(y, leaves, torch.ones_like(y))

    return {
        "sorted_loop+backward": train("sorted_loop", False),
        "sorted_loop+backward, recomputed": train("sorted_loop", False, save=False),
        "sorted_loop+backward, frozen": train("sorted_loop", True),
        "hf_grouped_mm+autograd": transformers,
    }


def routings(experts: int, k: int, hidden: int, tokens: int, dtype: torch.dtype) -> list[Inputs]:
    out = []
    for _ in range(8):
        scores = torch.rand(tokens, experts)
        weights, ids = scores.topk(k, dim=-1)
        out.append((torch.randn(tokens, hidden).to(dtype), ids, (weights / weights.sum(-1, keepdim=True)).to(dtype)))
    return out


def measure(runs: dict[str, Run], inputs: list[Inputs], seconds: float, clock: Clock) -> dict[str, list[float]]:
    """Rounds of all contestants in turn until the time is up (three at least) → seconds of each."""
    for run in runs.values():
        run(*inputs[0])
    times: dict[str, list[float]] = {name: [] for name in runs}
    end, rounds = time.perf_counter() + seconds, 0
    while rounds < 3 or (time.perf_counter() < end and rounds < 60):
        for name, run in runs.items():
            start = clock()
            run(*inputs[rounds % len(inputs)])
            times[name].append(clock() - start)
        rounds += 1
    return times


def peak(dtype: torch.dtype, clock: Clock) -> float:
    """FLOP/s of a square product: the best of ten."""
    a = torch.randn(1024, 1024).to(dtype)
    best = float("inf")
    for _ in range(10):
        start = clock()
        a @ a
        best = min(best, clock() - start)
    return 2 * 1024**3 / best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["olmoe", "granite"], choices=SHAPES)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 4, 16, 64, 256, 1024])
    parser.add_argument("--kernels", nargs="+", default=[], help="contestants by name (default: all)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=1.0, help="per row of the table")
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu: time of one thread, for a machine that others use too"
    )
    parser.add_argument("--backward", action="store_true", help="time forward and backward instead")
    parser.add_argument("--json", metavar="FILE", help="write all times there")
    args = parser.parse_args()
    if args.clock == "cpu" and args.threads != 1:
        parser.error("--clock cpu needs --threads 1: it sees one thread")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    records = []
    for shape in args.shapes:
        e, k, h, i = SHAPES[shape]
        spec = MoESpec(k, ExpertSpec(e, h, i))
        for dtype_name in args.dtypes:
            dtype = getattr(torch, dtype_name)
            top = peak(dtype, CLOCKS[args.clock])
            w13, w2 = ((torch.randn(s) * 0.02).to(dtype) for s in ((e, 2 * i, h), (e, h, i)))
            print(
                f"\n{shape} {dtype_name}, {args.threads} threads, {args.clock} clock, GEMM peak {top / 1e9:.0f} GFLOP/s"
            )
            print(f"{'T':>5}  {'contestant':<30}{'median ms':>11}{'fastest ms':>12}{'of peak':>9}{'weights GB/s':>14}")
            for tokens in args.tokens:
                inputs = routings(e, k, h, tokens, dtype)
                with torch.no_grad():
                    if args.backward:
                        runs = backward_contestants(w13, w2, spec)
                    else:
                        runs = contestants(w13, w2, spec, tokens * k, args.kernels)
                    times = measure(runs, inputs, args.seconds, CLOCKS[args.clock])
                read = statistics.mean(ids.unique().numel() for _, ids, _ in inputs) * 3 * h * i * dtype.itemsize
                flops = 6 * tokens * k * h * i * (3 if args.backward else 1)
                for name, values in times.items():
                    median, best = statistics.median(values), min(values)
                    share, rate = flops / best / top, read / best / 1e9
                    print(f"{tokens:>5}  {name:<30}{median * 1e3:>11.3f}{best * 1e3:>12.3f}{share:>9.1%}{rate:>14.1f}")
                    records.append(dict(shape=shape, dtype=dtype_name, tokens=tokens, name=name, seconds=values))
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"threads": args.threads, "clock": args.clock, "records": records}, file)


if __name__ == "__main__":
    main()
