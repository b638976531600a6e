"""Measured tiles: what is found, kept and read again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from moe_fx.__main__ import main
from moe_fx.reasons import MoEFxWarning
from moe_fx.spec import ExpertSpec, MoESpec

from .here import INTERPRETED

pytest.importorskip("triton")
DEVICE = torch.device("cuda")


@pytest.fixture(autouse=True)
def _own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_fx.kernels.triton import tiles

    monkeypatch.setenv("MOE_FX_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tiles, "_device_name", lambda device: "A Device, 80 GB")
    tiles._layers.cache_clear()


def layer(**changes: int) -> object:
    from moe_fx.kernels.triton.tiles import Layer

    return Layer.of(
        MoESpec(2, ExpertSpec(**({"experts": 8, "hidden": 64, "intermediate": 32} | changes))), torch.float16
    )


def test_the_nearest_number_of_rows_counts() -> None:
    from moe_fx.kernels.triton.configs import Config
    from moe_fx.kernels.triton.tiles import measured, search, write

    wanted = {16: 32, 256: 128, 4096: 64}  # rows → columns of the tiles that the stopwatch likes

    def measure_at(rows: int):
        return lambda up, down: (abs(up.columns - wanted[rows]) + 1.0, abs(down.columns - 64) + 1.0)

    found = list(search(list(wanted), layer(), measure_at))  # type: ignore[arg-type]
    assert [entry["rows"] for entry in found] == list(wanted)
    path = write("A Device, 80 GB", "a test", layer(), found)  # type: ignore[arg-type]
    assert path.name == "a_device_80_gb.json"
    for rows, columns in ((1, 32), (16, 32), (63, 32), (65, 128), (1000, 128), (1100, 64), (1 << 20, 64)):
        tiles = measured(layer(), rows, DEVICE)  # type: ignore[arg-type]
        assert tiles is not None
        up, down = tiles
        assert isinstance(up, Config)
        assert (up.columns, down.columns, up.rows) == (columns, 64, down.rows)
    assert measured(layer(experts=9), 16, DEVICE) is None  # type: ignore[arg-type]
    assert measured(layer(), 16, torch.device("cpu")) is None  # type: ignore[arg-type]
    again = search([16], layer(), lambda rows: lambda up, down: (abs(up.columns - 64) + 1.0, 1.0))  # type: ignore[arg-type]
    write("A Device, 80 GB", "a test", layer(), list(again))  # type: ignore[arg-type]
    assert len(json.loads(path.read_text())["layers"]) == 1
    assert measured(layer(), 16, DEVICE)[0].columns == 64  # type: ignore[arg-type, index]


def test_tiles_that_the_device_refuses_are_left_out() -> None:
    from moe_fx.kernels.triton.tiles import search

    inf = float("inf")
    some = search([64], layer(), lambda rows: lambda up, down: (1.0 if up.inner == 64 else inf, 1.0))  # type: ignore[arg-type]
    assert [entry["up"]["inner"] for entry in some] == [64]
    assert not list(search([64], layer(), lambda rows: lambda up, down: (inf, inf)))  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["{", '{"version": "another/1"}', '{"version": "moe_fx.tiles/1", "layers": [{}]}'])
def test_a_file_that_cannot_be_read_is_named_and_left_out(text: str, tmp_path: Path) -> None:
    from moe_fx.kernels.triton.tiles import measured

    path = tmp_path / "moe_fx" / "tiles" / "a_device_80_gb.json"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.warns(MoEFxWarning, match="moe_fx tune"):
        assert measured(layer(), 16, DEVICE) is None  # type: ignore[arg-type]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "qwen3_moe"]) == 2
    assert "no GPU" in capsys.readouterr().err


@pytest.mark.skipif(not INTERPRETED, reason="no GPU: `make interpreted` runs it, in a process of its own")
def test_the_stopwatch_runs_what_it_times() -> None:
    from moe_fx.kernels.triton.configs import Config
    from moe_fx.kernels.triton.stopwatch import of_layer

    config = Config(16, 32, 32, 1, 4, 2)
    times = of_layer(layer(), torch.device("cpu"))(12)(config, config)  # type: ignore[arg-type]
    assert all(0 < seconds < float("inf") for seconds in times)
