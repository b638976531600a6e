"""Measured choice: a priced plan and a stopwatch enter, the plan with the kernels that were really fastest leaves.

Only the best few by price are measured, at a few token counts; between two of them the border is their geometric mean.
A kernel for a compiler (``Plan.inline``) keeps its price: to measure it is to compile it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

from moe_fx.plan import Plan, Range, Verdict

MEASURED_AT = (1, 4, 16, 64, 256, 1024)
BEST = 3  # candidates by price at each T
LONGEST = 2.0  # seconds of one forward, as priced: what takes longer is left to its price

Measure = Callable[[str, int], float]  # kernel, T → seconds of one forward


def tuned(plan: Plan, measure: Measure) -> Plan:
    """``plan`` with ranges from measurements over its layout; unchanged where there is nothing to compare."""
    prices = {_kernel(v): v.price_us for v in plan.verdicts if v.price_us and v.candidate.endswith(f"/{plan.layout}")}
    names = [name for name in prices if plan.inline is None or name != plan.inline.kernel]
    if len(names) < 2 or (len(plan.ranges) == 1 and plan.ranges[0].kernel not in names):
        return plan
    times: dict[str, dict[int, float]] = {name: {} for name in names}
    for tokens in MEASURED_AT:
        ranked = sorted(names, key=lambda name: _at(prices[name], plan.priced_at, tokens))
        if _at(prices[ranked[0]], plan.priced_at, tokens) > LONGEST * 1e6:
            break
        for name in ranked[:BEST]:
            times[name][tokens] = measure(name, tokens)
    counts = [t for t in MEASURED_AT if any(t in seconds for seconds in times.values())]
    if not counts:
        return plan
    fastest = {t: min((n for n in names if t in times[n]), key=lambda n: times[n][t]) for t in counts}
    verdicts = tuple(_verdict(v, plan, times, set(fastest.values()), counts) for v in plan.verdicts)
    return replace(plan, ranges=_ranges(fastest), verdicts=verdicts, measured_at=tuple(counts))


def _kernel(verdict: Verdict) -> str:
    return verdict.candidate.partition("/")[0]


def _at(prices: tuple[float, ...], counts: tuple[int, ...], tokens: int) -> float:
    """The price at the nearest priced T."""
    return min(zip(counts, prices, strict=True), key=lambda pair: abs(math.log(pair[0] / tokens)))[1]


def _ranges(fastest: dict[int, str]) -> tuple[Range, ...]:
    starts = [(1, next(iter(fastest.values())))]
    for (low, before), (high, after) in pairwise(fastest.items()):
        if after != before:
            starts.append((math.ceil(math.sqrt(low * high)), after))
    ends = [start - 1 for start, _ in starts[1:]]
    return tuple(Range(start, end, name) for (start, name), end in zip(starts, [*ends, None], strict=True))


def _verdict(
    verdict: Verdict, plan: Plan, times: dict[str, dict[int, float]], chosen: set[str], counts: list[int]
) -> Verdict:
    name, _, layout = verdict.candidate.partition("/")
    inline = plan.inline is not None and plan.inline.kernel == name
    if verdict.status == "vetoed" or layout != plan.layout or inline:
        return verdict
    measured = tuple(round(times[name][t] * 1e6, 1) if t in times.get(name, {}) else None for t in counts)
    return replace(verdict, status="chosen" if name in chosen else "survived", measured_us=measured)
