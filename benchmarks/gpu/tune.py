"""Tries tile sizes of our Triton kernels for each shape and number of tokens; the best found are rows of a JSON file.

``configs.choose`` is replaced for the call, so that kernels and launches are the real ones.  A config whose result
differs from that of the default one, or that does not compile, is left out.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any
from unittest import mock

from torch import Tensor

from benchmarks.gpu.contenders import CONTENDERS
from benchmarks.gpu.layers import item
from benchmarks.gpu.report import save
from benchmarks.gpu.session import Session
from benchmarks.gpu.shapes import BOUND, Layer, error
from benchmarks.gpu.timing import Run, attempt, synchronize
from moe_fx.kernels.triton import configs, launch
from moe_fx.kernels.triton.configs import Config

ROUNDS = 7
# (columns, inner, warps, stages), in order of worth, by the rows of a tile
TILES = {
    16: ((64, 128, 4, 4), (32, 128, 4, 4), (64, 256, 4, 3), (128, 128, 4, 3), (32, 256, 4, 4), (128, 64, 4, 4)),
    32: ((64, 128, 4, 4), (128, 64, 4, 4), (128, 128, 4, 3), (64, 64, 4, 4), (64, 256, 4, 2)),
    64: ((128, 64, 4, 4), (128, 64, 8, 4), (128, 128, 4, 3), (64, 128, 4, 3), (256, 64, 8, 3), (64, 64, 4, 4)),
    128: ((128, 64, 8, 3), (128, 64, 8, 4), (256, 64, 8, 3), (128, 64, 4, 3), (128, 128, 8, 2), (64, 64, 4, 4)),
    256: ((128, 64, 8, 3), (64, 64, 8, 4), (128, 32, 8, 4)),
}


def candidates(rows: int) -> list[Config]:
    """For tiles of so many rows; groups of 8 tiles share what L2 holds, where there are many."""
    return [Config(rows, n, k, 8 if rows > 32 else 1, warps, stages) for n, k, warps, stages in TILES[rows]]


@contextmanager
def chosen(up: Config, down: Config) -> Iterator[None]:
    """``configs.choose`` gives these, wherever it is called by its name."""
    signature = inspect.signature(configs.choose)

    def choose(*args: Any, **kwargs: Any) -> Config:
        return up if signature.bind(*args, **kwargs).arguments["matrices"] == 2 else down

    with (
        mock.patch.object(configs, "choose", choose),
        mock.patch.object(launch, "choose", choose),
        mock.patch.object(launch, "measured", create=True, return_value=None),  # sizes measured before would win
    ):
        yield


def likely(rows: int, experts: int) -> list[int]:
    """Rows of a tile: the fewest that hold an expert's share, and one step to both sides."""
    each, sizes = -(-rows // min(experts, rows)), list(TILES)
    at = next((i for i, size in enumerate(sizes) if each <= size), len(sizes) - 1)
    return sizes[max(0, at - 1) : at + 2]


def tune(session: Session, part: str) -> Iterator[str]:
    left = len(session.shapes) * len(session.tokens)
    for name in session.shapes:
        for tokens in session.tokens:
            yield item(name, tokens)
            session.found["tuning"].append(search(session, session.load(name), tokens, session.slice(left)))
            left -= 1
            save(session.found["tuning"], session.out.with_name(f"{session.out.stem}-tuning.json"))


def search(session: Session, layer: Layer, tokens: int, seconds: float) -> dict[str, Any]:
    """The best up config first, with the default's down; then the best down config of as many rows."""
    s, inputs = layer.shape, layer.inputs(tokens)[0]
    run, rows = CONTENDERS["moe_fx:triton"].prepare(layer), tokens * s.top_k
    sizes = (rows, s.experts, session.device, 2)
    default = (configs.choose(*sizes, 2), configs.choose(*sizes, 1))
    wanted = run(*inputs)
    ends = time.perf_counter() + seconds
    first = _time(session, run, inputs, default, wanted)
    tried = {default: first} if first is not None else {}
    failed = 0

    def attempt_pairs(pairs: list[tuple[Config, Config]]) -> None:
        nonlocal failed
        for pair in pairs:
            if pair in tried or (tried and time.perf_counter() > ends):
                continue
            ms = _time(session, run, inputs, pair, wanted)
            if ms is None:
                failed += 1
            else:
                tried[pair] = ms

    sizes_of = likely(rows, s.experts)
    half = {size: candidates(size)[0] for size in sizes_of}
    attempt_pairs([(up, half[size]) for size in sizes_of for up in candidates(size)])
    if tried:
        best = min(tried, key=lambda pair: tried[pair])[0]
        if best.rows in TILES:
            attempt_pairs([(best, down) for down in candidates(best.rows)])
    pair = min(tried, key=lambda pair: tried[pair]) if tried else default
    return dict(
        shape=layer.name,
        experts=s.experts,
        hidden=s.hidden,
        intermediate=s.intermediate,
        rows=rows,
        tokens=tokens,
        config_up=asdict(pair[0]),
        config_down=asdict(pair[1]),
        ms=tried.get(pair),
        default_ms=first,
        tried=len(tried),
        failed=failed,
    )


def _time(
    session: Session, run: Run, inputs: tuple[Tensor, ...], pair: tuple[Config, Config], wanted: Tensor
) -> float | None:
    """Milliseconds with these configs; None where they fail or give another result."""

    def measured() -> float | None:
        with chosen(*pair):
            y = run(*inputs)
            synchronize(session.device)
            if error(y, wanted.float()) > BOUND:
                return None
            one = session.clock.prepare("tune", lambda: run(*inputs), capture=True)
            return session.clock.median(one.call, ROUNDS)

    found: float | None = attempt(session.device, measured)[0]
    return found
