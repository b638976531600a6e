"""The parts that measure one layer: are the contenders right, and how long does each take."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from benchmarks.gpu.contenders import BASE, CONTENDERS, Contender
from benchmarks.gpu.session import Session
from benchmarks.gpu.shapes import BOUND, Inputs, Layer, error, truth, work
from benchmarks.gpu.timing import Timed, attempt

ANCHORS = ("moe_fx:triton", BASE)  # timed again in every part, so that speeds are compared within it
SHARE = 0.5  # of a cell's time that rounds may take; the rest is for compiling, checking and capturing


def items(session: Session, part: str) -> list[str]:
    """The cells of a part; none where none of its contenders can run here."""
    if not able(session, part):
        return []
    return [item(shape, tokens) for shape in session.shapes for tokens in session.tokens]


def item(shape: str, tokens: int) -> str:
    return f"{shape} T={tokens}"


def able(session: Session, part: str) -> bool:
    return any(not c.available(session.device) for c in session.contenders(part))


def correctness(session: Session, part: str) -> Iterator[str]:
    """Of what the part "kernels" times; the others are checked in their own parts, before they are timed."""
    for name in session.shapes:
        yield name
        layer = session.load(name)
        for contender in session.contenders("kernels"):
            session.run_of(layer, contender)


def times(session: Session, part: str) -> Iterator[str]:
    """Every shape at every number of tokens: the contenders of the part, and the anchors."""
    chosen = session.contenders(part)
    if not able(session, part):
        yield "none of its contenders can run here"
        for name, tokens, c in itertools.product(session.shapes, session.tokens, chosen):
            session.found["times"].append(row(part, name, tokens, c, c.available(session.device)))
        return
    chosen += [CONTENDERS[name] for name in ANCHORS if name in session.names and CONTENDERS[name] not in chosen]
    left = len(items(session, part))
    for name in session.shapes:
        for tokens in session.tokens:
            yield item(name, tokens)
            session.found["times"] += cell(
                session, part, session.load(name), tokens, chosen, SHARE * session.slice(left)
            )
            left -= 1


def cell(
    session: Session, part: str, layer: Layer, tokens: int, chosen: list[Contender], seconds: float
) -> list[dict[str, Any]]:
    """One row a contender: interleaved, on inputs that rotate."""
    inputs = layer.inputs(tokens)
    x, ids, weights = (t.clone() for t in inputs[0])
    buffers = (x, ids, weights)
    exact = truth(layer, inputs[1]) if tokens <= 512 else None

    def load(turn: int) -> None:
        for buffer, t in zip(buffers, inputs[turn % len(inputs)], strict=True):
            buffer.copy_(t)

    timed, rows = [], []
    for contender in chosen:
        load(0)
        found, reason = _prepare(session, layer, contender, buffers)
        if found is not None and exact is not None:
            load(1)  # what was captured must follow the routing
            reason = _wrong(session, *found, exact)
        if found is None or reason:
            rows.append(row(part, layer.name, tokens, contender, reason))
        else:
            timed.append(found[0])
    session.clock.interleave(timed, load, seconds)
    flop, touched = work(layer.shape, inputs)
    limits = session.found["limits"]
    for one in timed:
        made = row(part, layer.name, tokens, CONTENDERS[one.name], "" if one.ms else one.why)
        if one.ms:
            rate, width = flop / one.median * 1e3, touched / one.median * 1e3
            made |= dict(ms=one.median, fastest_ms=min(one.ms), slowest_ms=max(one.ms), rounds=len(one.ms))
            made |= dict(captured=one.captured, not_captured=one.why, tflops=rate / 1e12, weights_gb_s=width / 1e9)
            made |= dict(of_peak=rate / limits["bf16_flops"], of_bandwidth=width / limits["copy_bytes_per_s"])
        rows.append(made)
    timed.clear()
    gc.collect()  # graphs hold their memory
    return rows


def row(part: str, shape: str, tokens: int, contender: Contender, reason: str) -> dict[str, Any]:
    """Without times, and why."""
    empty: dict[str, Any] = dict.fromkeys(
        ("ms", "fastest_ms", "slowest_ms", "tflops", "weights_gb_s", "of_peak", "of_bandwidth")
    )
    return {
        **dict(part=part, shape=shape, tokens=tokens, contender=contender.name, reason=reason),
        **empty,
        **dict(rounds=0, captured=False, not_captured=""),
    }


def _prepare(
    session: Session, layer: Layer, contender: Contender, buffers: Inputs
) -> tuple[tuple[Timed, list[Tensor]] | None, str]:
    """((its call on the buffers, where the last result is), "") or (None, why not)."""
    run, reason = session.run_of(layer, contender)
    if run is None:
        return None, reason
    if reason := contender.takes(layer.shape, len(buffers[0])):
        return None, reason
    last: list[Tensor] = []

    def call() -> None:
        last[:] = [run(*buffers)]

    one, reason = attempt(session.device, lambda: session.clock.prepare(contender.name, call, contender.captures))
    return (None, f"failed: {reason}") if one is None else ((one, last), "")


def _wrong(session: Session, one: Timed, last: list[Tensor], exact: Tensor) -> str:
    """Why its result on what the buffers hold now is not right, or empty."""
    _, reason = attempt(session.device, one.call)
    if reason:
        return f"failed: {reason}"
    found = error(last[0], exact)
    how = "replayed with another routing" if one.captured else "on another routing"
    return "" if found <= BOUND else f"wrong {how}: relative RMS error {found:.1e}"
