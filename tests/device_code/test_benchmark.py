"""``benchmarks/gpu`` without a GPU: its dry run does all that it can, and its report has every field it promises."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from .here import needs_compiler

ROOT = Path(__file__).resolve().parents[2]
pytestmark = needs_compiler  # the run is a process of its own, which has the interpreter whatever this one has
OURS = ("moe_fx:triton", "moe_fx:torch_grouped", "moe_fx:compiled")
TORCH = ("torch_grouped_mm", "hf_grouped_mm", "hf_eager", "hf_batched_mm", "inductor_grouped_mm")
PEERS = ("liger", "vllm_triton", "flashinfer_cutlass", "deep_gemm")
SHAPES = {
    "qwen3-30b-a3b": (128, 8, 2048, 768),
    "mixtral-8x7b": (8, 2, 4096, 14336),
    "olmoe-1b-7b": (64, 8, 2048, 1024),
    "gpt-oss-20b": (32, 4, 2880, 2880),
    "deepseek-v3-ep8": (32, 8, 7168, 2048),
    "granite-1b-a400m": (32, 8, 1024, 512),
}
NUMBERS = ("ms", "fastest_ms", "slowest_ms", "tflops", "weights_gb_s", "of_peak", "of_bandwidth")


def start(*arguments: str, module: bool = False, **changes: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", **changes}
    what = ["-m", "benchmarks.gpu"] if module else ["benchmarks/gpu"]
    command = [sys.executable, *what, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)


def dry(path: Path, *arguments: str, module: bool = False) -> tuple[dict[str, Any], str]:
    """(the report, what was printed) of a run that must succeed."""
    done = start("--dry-run", "--out", str(path), *arguments, module=module)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(path.read_text()), done.stdout


def check(report: dict[str, Any], shapes: list[str], tokens: list[int]) -> None:
    """Every field, and of every shape, number of tokens and contender times or a reason."""
    assert report["format"] == "gpu-benchmark/1"
    assert not report["lost"]
    check_origin(report)
    assert list(report["contenders"]) == [n for n in report["contenders"] if n in (*OURS, *TORCH, *PEERS)]
    assert {n for n, c in report["contenders"].items() if c["absent"]} == set(PEERS)
    assert {state["error"] for state in report["parts"].values()} == {""}
    assert not [part for part, state in report["parts"].items() if state["not_reached"]]
    assert list(report["shapes"]) == shapes
    for shape in report["shapes"].values():
        assert (shape["experts"], shape["hidden"], shape["intermediate"], shape["dtype"]) == (4, 64, 32, "bfloat16")
        assert shape["weight_bytes"] == 4 * 3 * 64 * 32 * 2
    assert report["limits"]["bf16_flops"] == max(report["limits"]["bf16_flops_by_size"].values())
    assert report["limits"]["copy_bytes_per_s"] > 0
    for row in report["correctness"]:
        assert row["right"] and 0 < row["error"] <= row["bound"] < 0.05, row
    assert {r["tokens"] for r in report["correctness"]} == {1, 5, 8}
    check_times(report, shapes, tokens)


def check_origin(report: dict[str, Any]) -> None:
    origin = report["provenance"]
    assert origin["dry_run"] is True and origin["interpreted"] is True
    assert origin["versions"]["torch"] == str(torch.__version__) or origin["versions"]["torch"] in torch.__version__
    for field in ("device", "date", "command", "commit"):
        assert isinstance(origin[field], str) and origin[field], field
    assert "--dry-run" in origin["command"] and origin["date"].endswith("Z")
    assert set(report["units"]) >= {*NUMBERS, "error", "peak_bytes", "seconds", "bf16_flops", "copy_bytes_per_s"}


def check_times(report: dict[str, Any], shapes: list[str], tokens: list[int]) -> None:
    cells = {(r["shape"], r["tokens"], r["contender"]): r for r in report["times"]}
    wanted = {(s, t, c) for s in shapes for t in tokens for c in (*OURS, *TORCH, *PEERS)}
    assert set(cells) == wanted
    sliced = {s for s, shape in report["shapes"].items() if shape["of"] > shape["experts"]}
    for (shape, count, name), row in cells.items():
        if name in PEERS or (shape in sliced and name in ("moe_fx:compiled", "inductor_grouped_mm")):
            assert row["reason"] and row["ms"] is None, row
            continue
        assert not row["reason"], row
        assert all(math.isfinite(row[field]) and row[field] >= 0 for field in NUMBERS), row
        assert row["fastest_ms"] <= row["ms"] <= row["slowest_ms"]
        assert row["rounds"] == 2 and row["captured"] is False and row["not_captured"] == "no CUDA"
        check_rates(report, shape in sliced, count, row)


def check_rates(report: dict[str, Any], sliced: bool, tokens: int, row: dict[str, Any]) -> None:
    """Against the time: two products of two rows a token, and each expert that was reached read once."""
    seconds, limits = row["ms"] / 1e3, report["limits"]
    flop, read = row["tflops"] * 1e12 * seconds, row["weights_gb_s"] * 1e9 * seconds
    most = tokens * 2 * 6 * 64 * 32
    assert flop == pytest.approx(most) or (sliced and flop <= most)
    experts = read / (3 * 64 * 32 * 2)
    assert (0 if sliced else min(2, tokens)) <= experts <= min(4, 2 * tokens) + 1e-9
    assert row["of_peak"] == pytest.approx(row["tflops"] * 1e12 / limits["bf16_flops"])
    assert row["of_bandwidth"] == pytest.approx(row["weights_gb_s"] * 1e9 / limits["copy_bytes_per_s"])


def check_training(report: dict[str, Any], shapes: list[str]) -> None:
    names = ("moe_fx:triton", "moe_fx:compiled", "hf_grouped_mm", "liger")
    assert [(r["shape"], r["contender"]) for r in report["training"]] == [(s, n) for s in shapes for n in names]
    for row in report["training"]:
        if row["contender"] == "liger":
            assert row["reason"] and row["ms"] is None
        else:
            assert row["ms"] > 0 and row["rounds"] == 2 and 0 < row["error"] <= row["bound"] and not row["reason"], row
        assert row["peak_bytes"] is None  # the CPU counts none


def check_models(report: dict[str, Any], names: list[str]) -> None:
    workloads = ("decode 1", "prefill 512", "decode 16")
    contenders = ("hf_eager", "hf_grouped_mm", "inductor_grouped_mm", "moe_fx:compiled")
    found = [(r["model"], r["workload"], r["contender"]) for r in report["models"]]
    assert found == [(m, w, c) for m in names for w in workloads for c in contenders]
    for row in report["models"]:
        assert row["ms"] > 0 and row["tokens_per_s"] > 0 and row["error"] is not None and not row["reason"], row
        assert row["fused"] == ("4/4" if row["contender"] == "moe_fx:compiled" else None)


def test_a_dry_run_of_two_layers(tmp_path: Path) -> None:
    shapes = ["gpt-oss-20b", "deepseek-v3-ep8"]
    parts = ["correctness", "limits", "kernels", "peers", "training", "rest"]
    report, printed = dry(tmp_path / "two.json", "--shapes", *shapes, "--tokens", "1", "8", "--parts", *parts)
    check(report, shapes, [1, 8])
    check_training(report, shapes[:1])
    assert "gpt-oss-20b: ms" in printed and "vllm_triton not timed: it needs CUDA" in printed


@pytest.mark.slow
def test_a_whole_dry_run(tmp_path: Path) -> None:
    report, printed = dry(tmp_path / "all.json", "--tokens", "1", "4", module=True)
    check(report, list(SHAPES), [1, 4])
    check_training(report, [s for s in SHAPES if s != "deepseek-v3-ep8"])
    check_models(report, ["qwen3-30b-a3b", "olmoe-1b-7b", "granite-1b-a400m"])
    assert all(f"{shape}: ms" in printed for shape in SHAPES)


def test_tile_sizes_are_tried(tmp_path: Path) -> None:
    """Rows of the default and of others, each with what was tried; the file beside the report holds the same."""
    shape = ["--shapes", "granite-1b-a400m", "--tokens", "2", "--parts", "tune", "--seconds", "20"]
    report, _ = dry(tmp_path / "t.json", *shape)
    (row,) = report["tuning"]
    assert json.loads((tmp_path / "t-tuning.json").read_text()) == [row]
    assert (row["experts"], row["hidden"], row["intermediate"], row["rows"]) == (4, 64, 32, 4)
    sizes = {"rows", "columns", "inner", "group", "warps", "stages"}
    assert set(row["config_up"]) == set(row["config_down"]) == sizes
    assert row["config_up"]["rows"] == row["config_down"]["rows"]
    assert 0 < row["ms"] <= row["default_ms"]
    assert row["tried"] > 1


def test_what_was_not_reached_is_listed(tmp_path: Path) -> None:
    report, printed = dry(tmp_path / "short.json", "--seconds", "0", "--shapes", "olmoe-1b-7b", "--tokens", "1", "2")
    parts = report["parts"]
    assert parts["correctness"]["not_reached"] == ["olmoe-1b-7b"]
    assert parts["kernels"]["not_reached"] == ["olmoe-1b-7b T=1", "olmoe-1b-7b T=2"]
    assert not report["times"]
    assert "kernels: not reached: olmoe-1b-7b T=1" in printed


def test_the_interpreter_is_asked_for() -> None:
    done = start("--dry-run", TRITON_INTERPRET="0")
    assert done.returncode == 2
    assert "TRITON_INTERPRET=1" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    done = start("--seconds", "1")
    assert done.returncode == 2
    assert "--dry-run" in done.stderr


def test_a_wrong_contender_is_reported_and_not_timed(tmp_path: Path) -> None:
    """Gate and up change places in one contender, which is run in the same way as ours."""
    seeded = tmp_path / "seeded.py"
    seeded.write_text(
        "import sys, runpy\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from benchmarks.gpu import contenders\n"
        "whole = contenders.TorchGrouped.prepare\n"
        "def swapped(self, layer):\n"
        "    run, w13 = whole(self, layer), layer.operands[0]\n"
        "    def call(*inputs):\n"
        "        w13.copy_(w13.roll(w13.shape[1] // 2, dims=1))\n"
        "        y = run(*inputs)\n"
        "        w13.copy_(w13.roll(w13.shape[1] // 2, dims=1))\n"
        "        return y\n"
        "    return call\n"
        "contenders.TorchGrouped.prepare = swapped\n"
        f"sys.argv = ['gpu', '--dry-run', '--out', {str(tmp_path / 'w.json')!r}, '--shapes', 'olmoe-1b-7b',\n"
        "    '--tokens', '2', '--parts', 'correctness', 'kernels']\n"
        "runpy.run_module('benchmarks.gpu', run_name='__main__')\n"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(seeded)], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr[-2000:]
    report = json.loads((tmp_path / "w.json").read_text())
    wrong = {r["contender"] for r in report["correctness"] if not r["right"]}
    assert wrong == {"moe_fx:torch_grouped"}
    rows = {r["contender"]: r for r in report["times"]}
    assert rows["moe_fx:torch_grouped"]["ms"] is None and "wrong" in rows["moe_fx:torch_grouped"]["reason"]
    assert rows["moe_fx:triton"]["ms"] > 0
