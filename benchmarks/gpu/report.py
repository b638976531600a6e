"""The report: a JSON file, written anew after every part, a table on the terminal and, where matplotlib is, a plot."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.contenders import BASE

FORMAT = "gpu-benchmark/1"
ROOT = Path(__file__).parents[2]
UNITS = {
    "ms": "milliseconds of the device, median of the rounds",
    "fastest_ms": "milliseconds, of the fastest round",
    "slowest_ms": "milliseconds, of the slowest round",
    "tflops": "1e12 floating-point operations a second, of the products of routed rows alone",
    "weights_gb_s": "1e9 bytes a second, of the matrices of experts that some token reached, each read once",
    "of_peak": "share of limits.bf16_flops",
    "of_bandwidth": "share of limits.copy_bytes_per_s",
    "error": "relative root mean square error against float32; null where not finite",
    "peak_bytes": "bytes allocated at most during a step, besides weights and inputs",
    "seconds": "seconds of wall clock",
    "bf16_flops": "floating-point operations a second",
    "copy_bytes_per_s": "bytes read plus bytes written a second",
    "tokens_per_s": "tokens a second",
}
PACKAGES = ("torch", "triton", "transformers", "moe_fx", "liger-kernel", "vllm", "flashinfer-python", "numpy")


def number(value: float) -> float | None:
    """As JSON knows numbers."""
    return value if math.isfinite(value) else None


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "a checkout" if package == "moe_fx" else ""


def provenance(device: torch.device, dry: bool) -> dict[str, Any]:
    """Where the numbers come from."""
    found: dict[str, Any] = {
        "device": platform.processor() or platform.machine(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "commit": commit(),
        "dry_run": dry,
        "interpreted": os.environ.get("TRITON_INTERPRET") == "1",
        "versions": {
            **{name: version(name) for name in PACKAGES},
            "python": platform.python_version(),
            "cuda": torch.version.cuda or "",
        },
    }
    if device.type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        found |= dict(device=facts.name, capability=f"{facts.major}.{facts.minor}", memory_bytes=facts.total_memory)
        found |= dict(multiprocessors=facts.multi_processor_count, l2_bytes=getattr(facts, "L2_cache_size", None))
    return found


def commit() -> str:
    """Of the checkout; "-" where it is none, and a "+" where files differ from it."""
    try:
        head = _git("rev-parse", "--short", "HEAD")
        return head + "+" * bool(_git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        return "-"


def _git(*words: str) -> str:
    return subprocess.run(("git", *words), cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def save(found: dict[str, Any], path: Path) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
    beside.replace(path)


def default_path(device: torch.device) -> Path:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "dry-run"
    word = "-".join(part for part in name.lower().split() if part not in ("nvidia", "gpu"))
    return ROOT / "benchmarks" / "results" / f"{word}-{time.strftime('%Y-%m-%d', time.gmtime())}.json"


# --- on the terminal


def tables(found: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, head, rows) of what was measured."""
    made = []
    times: list[dict[str, Any]] = found["times"]
    for shape in found["shapes"]:
        mine = [r for r in times if r["shape"] == shape and r["ms"] is not None]
        names = list(dict.fromkeys(r["contender"] for r in mine))
        rows = []
        for tokens in sorted({r["tokens"] for r in mine}):
            at = {(r["part"], r["contender"]): r for r in mine if r["tokens"] == tokens}
            rows.append([str(tokens), *(_cells(at, name) for name in names)])
        if rows:
            made.append(
                (f"{shape}: ms, × as fast as {BASE} in the same part, of peak / of bandwidth", ["T", *names], rows)
            )
    for part in ("training", "models"):
        rows = [_row(part, r) for r in found[part] if r["ms"] is not None]
        if rows:
            made.append((part, ["what", "contender", "ms", ""], rows))
    return made


def _cells(at: dict[tuple[str, str], dict[str, Any]], name: str) -> str:
    found = next(((part, r) for (part, n), r in at.items() if n == name), None)
    if found is None:
        return "–"
    part, r = found
    base = at.get((part, BASE))
    ratio = f" {base['ms'] / r['ms']:.2f}×" if base else ""
    graph = "" if r["captured"] else " *"
    return f"{r['ms']:.3f}{ratio} {r['of_peak']:.0%}/{r['of_bandwidth']:.0%}{graph}"


def _row(part: str, r: dict[str, Any]) -> list[str]:
    if part == "training":
        memory = "" if r["peak_bytes"] is None else f"{r['peak_bytes'] / 2**30:.2f} GiB"
        return [f"{r['shape']} T={r['tokens']}", r["contender"], f"{r['ms']:.2f}", memory]
    return [f"{r['model']} {r['workload']}", r["contender"], f"{r['ms']:.3f}", f"{r['tokens_per_s']:.0f} tokens/s"]


def show(found: dict[str, Any]) -> None:
    """Prints the tables, what is absent or wrong, and what was not reached."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        for title, head, rows in tables(found):
            widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
            print(f"\n{title}")
            for line in (head, *rows):
                print("  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True)))
    else:
        console = Console(width=None if sys.stdout.isatty() else 200)
        for title, head, rows in tables(found):
            table = Table(*head, title=title, title_justify="left")
            for line in rows:
                table.add_row(*line)
            console.print(table)
    if any(not r["captured"] for r in found["times"] if r["ms"] is not None):
        print("* not in a CUDA graph: gaps between launches count")
    for kind in ("times", "training", "models"):
        reasons = dict.fromkeys((r["contender"], r["reason"]) for r in found[kind] if r["reason"])
        for name, reason in reasons:
            print(f"{kind}: {name} not timed: {reason}")
    for part, state in found["parts"].items():
        if state["not_reached"]:
            print(f"{part}: not reached: {', '.join(state['not_reached'])}")


def plot(found: dict[str, Any], path: Path) -> bool:
    """times over tokens, one panel a shape, as a PNG; False where matplotlib is not installed or there is nothing."""
    try:
        import matplotlib  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    times = [r for r in found["times"] if r["ms"] is not None]
    shapes = list(dict.fromkeys(r["shape"] for r in times))
    if not shapes:
        return False
    figure, axes = pyplot.subplots(-(-len(shapes) // 3), min(3, len(shapes)), figsize=(18, 10), squeeze=False)
    for axis, shape in zip(axes.flat, shapes, strict=False):
        for name in dict.fromkeys(r["contender"] for r in times):
            points = {r["tokens"]: r["ms"] for r in reversed(times) if (r["shape"], r["contender"]) == (shape, name)}
            axis.plot(sorted(points), [points[t] for t in sorted(points)], marker="o", markersize=3, label=name)
        axis.set(title=shape, xlabel="tokens", ylabel="ms", xscale="log", yscale="log")
    axes.flat[0].legend(fontsize="small")
    figure.suptitle(f"{found['provenance']['device']}, {found['provenance']['date']}")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    return True
