"""Tile sizes that were measured: by device, layer and number of routed rows, as JSON.

    {"version": "moe_fx.tiles/1", "device": "NVIDIA H200", "source": "how and when", "layers": [
        {"experts": 128, "hidden": 2048, "intermediate": 768, "gated": true, "dtype": "bfloat16",
         "tiles": [{"rows": 8, "up": {"rows": 16, "columns": 64, ...}, "down": {...}, "us": 41.0}, ...]}]}

Read from this package (``measured/``) and, before it, from the folder "tiles" of ``cache``, where ``moe_fx tune``
writes.
Between measured numbers of rows the nearest counts, by ratio; a layer that was not measured has none.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from moe_fx import cache
from moe_fx.kernels.triton.configs import Config
from moe_fx.reasons import MoEFxWarning
from moe_fx.spec import MoESpec

VERSION = "moe_fx.tiles/1"
SHIPPED = Path(__file__).parent / "measured"

Measure = Callable[[Config, Config], tuple[float, float]]  # tiles → seconds of the up and of the down product


@dataclass(frozen=True, slots=True)
class Layer:
    """What tile sizes hang on.  dtype: the name of that of the products."""

    experts: int
    hidden: int
    intermediate: int
    gated: bool
    dtype: str

    @classmethod
    def of(cls, spec: MoESpec, dtype: torch.dtype) -> Layer:
        """dtype: that of the weights, where the spec asks for no other."""
        e = spec.expert
        name = e.compute_dtype or str(dtype).removeprefix("torch.")
        return cls(e.experts, e.hidden, e.intermediate, e.gated, name)


def measured(layer: Layer, rows: int, device: torch.device) -> tuple[Config, Config] | None:
    """(up, down) for ``rows`` routed rows; None where nothing was measured."""
    known = _layers(device).get(layer) if device.type == "cuda" else None
    if not known:
        return None
    return known[min(known, key=lambda at: abs(math.log(at / rows)))]


def search(rows: Sequence[int], layer: Layer, measure_at: Callable[[int], Measure]) -> Iterator[dict[str, Any]]:
    """The best tiles for each number of routed rows, as entries of the file: of the candidates with as many rows a tile
    the best up and the best down apart, then the best sum."""
    for count in rows:
        measure, found = measure_at(count), list[tuple[float, Config, Config]]()
        for alike in candidates(-(-count // max(1, min(layer.experts, count)))):
            times = [(*measure(config, config), config) for config in alike]
            up, down = min(times, key=lambda t: t[0]), min(times, key=lambda t: t[1])
            found.append((up[0] + down[1], up[2], down[2]))
        seconds, best_up, best_down = min(found, key=lambda f: f[0])
        if math.isfinite(seconds):
            yield {"rows": count, "up": asdict(best_up), "down": asdict(best_down), "us": round(seconds * 1e6, 2)}


def candidates(each: int) -> list[list[Config]]:
    """Tiles worth a try for ``each`` rows of one expert, in groups of as many rows a tile."""
    heights = [rows for rows in (16, 32, 64, 128) if rows <= max(16, 4 * each) and (rows * 8 >= each or rows == 128)]
    return [
        [
            Config(rows, columns, inner, group, warps, stages)
            for columns in (32, 64, 128, 256)
            for inner in (64, 128)
            for warps in (4, 8)
            for stages in (3, 4)
            for group in ((1,) if rows <= 32 else (8,))
            if rows * columns <= 128 * 256 and (warps == 4 or rows * columns >= 64 * 128)
        ]
        for rows in heights
    ]


def write(device: str, source: str, layer: Layer, tiles: Sequence[dict[str, Any]]) -> Path:
    """Puts the tiles of a layer into the user's file of the device, in the place of what it has of that layer."""
    path = cache.folder("tiles") / f"{_file(device)}.json"
    whole: dict[str, Any] = {"version": VERSION, "device": device, "source": source, "layers": []}
    if path.exists():
        whole["layers"] = [one for one in json.loads(path.read_text())["layers"] if _layer(one) != layer]
    whole["layers"].append({**asdict(layer), "tiles": list(tiles)})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(whole, indent=1) + "\n")
    _layers.cache_clear()
    return path


def _layer(entry: dict[str, Any]) -> Layer:
    return Layer(*(entry[name] for name in Layer.__slots__))


@lru_cache(maxsize=64)
def _layers(device: torch.device) -> dict[Layer, dict[int, tuple[Config, Config]]]:
    """Of all files of a device: the user's count more than those shipped.  Read once in a process."""
    found: dict[Layer, dict[int, tuple[Config, Config]]] = {}
    for folder in (SHIPPED, cache.folder("tiles")):
        path = folder / f"{_file(_device_name(device))}.json"
        if not path.exists():
            continue
        try:
            whole = json.loads(path.read_text())
            if whole["version"] != VERSION:
                raise ValueError(f"version {whole['version']!r} is not {VERSION!r}")
            for entry in whole["layers"]:
                tiles = {t["rows"]: (Config(**t["up"]), Config(**t["down"])) for t in entry["tiles"]}
                found[_layer(entry)] = tiles
        except (KeyError, TypeError, ValueError) as error:
            text = f"{path} is not a file of measured tiles and is left out ({error}): write it anew with moe_fx tune"
            warnings.warn(text, MoEFxWarning, stacklevel=2)
    return found


def _device_name(device: torch.device) -> str:
    return str(torch.cuda.get_device_properties(device).name)


def _file(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_")
