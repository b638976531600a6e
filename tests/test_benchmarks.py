"""Benchmarks run, at a size where their times mean nothing, and report what they promise."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("training", [False, True])
def test_cpu(training: bool, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    command = [sys.executable, "benchmarks/cpu", "--shapes", "tiny", "--tokens", "1", "20", "--seconds", "0.01"]
    command += ["--json", str(out), *(["--training"] if training else [])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    whole = json.loads(out.read_text())
    assert whole["command"].startswith("benchmarks/cpu")
    records = whole["records"]
    assert {r["tokens"] for r in records} == {1, 20}
    assert {r["dtype"] for r in records} == {"bfloat16", "float32"}
    assert {"sorted_loop", "hf_grouped_mm"} <= {r["name"] for r in records}
    for r in records:
        assert r["fastest_ms"] <= r["ms"]
        assert r["rounds"] >= 3
        limit = {"bfloat16": 2e-2, "float32": 1e-5}[r["dtype"]]
        assert training or r["error"] < limit, r
