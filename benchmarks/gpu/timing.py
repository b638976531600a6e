"""Clocks: what enters is a call, what leaves is milliseconds of the device.

On CUDA: events around replays of a CUDA graph where the call can be captured, else around the call, in which case gaps
between its launches count.  Before each the L2 is flushed, which also keeps the device busy while the host enqueues.
Without CUDA (a dry run): ``perf_counter``, no graphs, nothing flushed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

FLUSH_BYTES = 256 << 20  # written between measurements: four times the L2 of the largest device now
LEAST, MOST, DRY = 5, 40, 2  # rounds
Run = Callable[[Tensor, Tensor, Tensor], Any]


class Lost(RuntimeError):
    """The device gives errors whatever is asked of it: nothing more can be measured in this process."""


@dataclass(slots=True)
class Timed:
    """One contender's call on fixed buffers.  why: why it is not captured.  ms: one a round."""

    name: str
    call: Callable[[], Any]
    captured: bool = False
    why: str = ""
    ms: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.ms)


def reason_of(fault: BaseException) -> str:
    """An exception in one line."""
    text = str(fault).strip().splitlines()
    return f"{type(fault).__name__}: {text[0][:200]}" if text else type(fault).__name__


def attempt(device: torch.device, call: Callable[[], Any]) -> tuple[Any, str]:
    """(result, "") or (None, what went wrong).  Raises Lost where the device does not recover."""
    try:
        found = call()
        synchronize(device)
    except Exception as fault:  # noqa: BLE001  a contender that fails is a row of the report
        reason = reason_of(fault)
        del fault
    else:
        return found, ""
    try:
        synchronize(device)
    except RuntimeError as fault:
        raise Lost(f"after {reason}: {reason_of(fault)}") from fault
    return None, reason


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Clock:
    """Of one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cuda = device.type == "cuda"
        self.flushed = torch.empty(FLUSH_BYTES if self.cuda else 0, dtype=torch.int8, device=device)

    def once(self, call: Callable[[], Any]) -> float:
        """Milliseconds of one call, after a flush."""
        if not self.cuda:
            started = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - started)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self.flushed.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))

    def median(self, call: Callable[[], Any], rounds: int) -> float:
        call()
        return statistics.median(self.once(call) for _ in range(rounds if self.cuda else DRY))

    def prepare(self, name: str, call: Callable[[], Any], capture: bool) -> Timed:
        """Warms the call up, then captures it where that is wanted and works.  Raises what the call raises."""
        for _ in range(2):
            call()
        synchronize(self.device)
        if not self.cuda:
            return Timed(name, call, why="no CUDA")
        if not capture:
            return Timed(name, call, why="it waits for the device")
        graph, reason = attempt(self.device, lambda: _captured(call))
        return Timed(name, call, why=reason) if graph is None else Timed(name, graph.replay, True)

    def interleave(self, timed: Sequence[Timed], load: Callable[[int], None], seconds: float) -> None:
        """Rounds of all in turn, until the time is up; ``load(i)`` puts the inputs of round i into the buffers.

        A contender whose call fails in between is named in its ``why`` and has no times.
        """
        failed: set[str] = set()
        for one in timed:  # not counted: clocks of the device come up
            load(0)
            self._take(one, failed)
            one.ms.clear()
        end, rounds = time.perf_counter() + seconds, 0
        least, most = (LEAST, MOST) if self.cuda else (DRY, DRY)
        while rounds < least or (rounds < most and time.perf_counter() < end):
            load(rounds)
            for one in timed:
                self._take(one, failed)
            rounds += 1

    def _take(self, one: Timed, failed: set[str]) -> None:
        if one.name in failed:
            return
        ms, reason = attempt(self.device, lambda: self.once(one.call))
        if reason:
            failed.add(one.name)
            one.ms.clear()
            one.why = reason
        else:
            one.ms.append(ms)


def _captured(call: Callable[[], Any]) -> Any:
    """A graph of the call, warmed up on the stream that captures."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def limits(clock: Clock) -> dict[str, Any]:
    """bf16_flops: the best of square products of random bfloat16; copy_bytes_per_s: of a copy, read and written."""
    sizes = (4096, 8192, 16384) if clock.cuda else (64, 128)
    products = {}
    for n in sizes:
        a, b = (torch.randn(n, n, device=clock.device, dtype=torch.bfloat16) for _ in range(2))
        out = torch.empty_like(a)
        ms = clock.median(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), 10)  # type: ignore[misc]
        products[str(n)] = 2 * n**3 / ms * 1e3
    source = torch.randint(256, (4 << 30 if clock.cuda else 1 << 20,), dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(source)
    copied = clock.median(lambda: target.copy_(source), 10)
    return {
        "bf16_flops": max(products.values()),
        "bf16_flops_by_size": products,
        "copy_bytes_per_s": 2 * source.numel() / copied * 1e3,
    }
