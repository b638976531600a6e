"""The oracle: veto, price, sort.

A spec, its storage, a request, a device and the kernels enter; a Plan with a verdict on every candidate leaves.  Pure
and deterministic: the device is a description, so plans can be made for machines that are not here.
Holds: an explicit request is met or raises with all reasons; the reference runs only when nothing else survives (or
when it is asked for); the ranges cover T >= 1 without gap.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch

from moe_fx.binding import WeightBinding
from moe_fx.hardware import Device
from moe_fx.kernels.registry import Kernel
from moe_fx.oracle.price import seconds, workload
from moe_fx.oracle.priority import places
from moe_fx.oracle.request import Request
from moe_fx.oracle.vetoes import Case, candidate_layouts, vetoes
from moe_fx.plan import Plan, Range, Verdict
from moe_fx.reasons import MoEFxOptionError, MoEFxUnsupportedError, Reject
from moe_fx.spec import MoESpec

GRID = (1, *sorted(m << p for p in range(15) for m in (2, 3)), 65536)  # powers of two and the midpoints between them
PRICED_AT = (1, 4, 16, 64, 256, 1024, 4096, 16384)

INLINE_PRICE = 0.7  # of what else would run: prices rank to within about a third (measured: benchmarks/cpu)
# What a graph waits for a call of an op, its Python included, beyond what the kernel takes: 1.4 ms instead of 1.0 for a
# token of Granite-3.0-1B's layer on two cores of a Zen 4.  On a device the host runs ahead.
CALL_S = {"cpu": 0.4e-3}
INLINE_MOST = 64  # tokens: a graph for one larger number of tokens is not worth a kernel of its own
REFERENCE = "reference"  # the kernel of last resort
Key = Callable[[int], tuple[float, int, str]]  # T → what candidates are sorted by: log price (or place), place, name


def choose(
    spec: MoESpec, binding: WeightBinding, request: Request, device: Device, kernels: Mapping[str, Kernel]
) -> Plan:
    """The plan for one block.

    ``kernels`` must hold "reference".  Policy "price": the layout with the lowest geometric mean of its best prices
    over GRID (every octave of T counts the same; a view wins ties), then per range the cheapest kernel over that
    layout, ties by place.  Policy "priority": the lowest place alone.  The place is that in the table of the scheme
    (``oracle.priority``), behind all of it the rank.  A compiled kernel takes no range: it is ``Plan.inline`` where it
    is cheaper.  Training saves the up products where all chosen kernels can: less than what the original saves, and a
    quarter of the forward's work less in the backward.
    Raises MoEFxOptionError for an unknown kernel, MoEFxUnsupportedError for a request that is vetoed.
    """
    if request.kernel is not None and request.kernel not in kernels:
        raise MoEFxOptionError(f"no kernel {request.kernel!r}; known: {', '.join(sorted(kernels))}")
    if REFERENCE not in kernels:
        raise ValueError(f"the kernel {REFERENCE!r} must be among the candidates; given: {', '.join(sorted(kernels))}")
    ordered = sorted(kernels.values(), key=lambda k: (k.rank, k.name))
    shared = candidate_layouts(spec, binding, request)
    named = [(kernel, kernel.experts.layout_for(spec)) for kernel in ordered]
    pairs = [(kernel, layout) for kernel, own in named for layout in ((own,) if own else shared)]
    cases = [Case(spec, binding, request, device, kernel, layout) for kernel, layout in pairs]
    layouts = list(dict.fromkeys((*shared, *(layout for _, layout in pairs))))
    reasons = {case.candidate: vetoes(case) for case in cases}
    survivors = [case for case in cases if not reasons[case.candidate]]
    if not survivors:
        raise MoEFxUnsupportedError(_refusal(request, device, spec, reasons))

    work = workload(spec, request, device)
    price = {case.kernel.name: seconds(case.kernel.cost.on(device.kind, device.arch), work) for case in survivors}
    by_name = {case.kernel.name: case for case in survivors}
    runtime = [case for case in survivors if not case.kernel.capability.compiled]
    pool = [case for case in runtime if case.kernel.name != REFERENCE] or runtime or survivors
    if request.training:  # one kernel that saves nothing would cost every range what the others save
        pool = [case for case in pool if case.kernel.capability.backward == "save"] or pool
    table = places(spec, getattr(torch, request.dtype), device)
    placed = {kernel.name: table.get(kernel.name, len(table) + kernel.rank) for kernel in ordered}
    keys = {case.candidate: _key(case, price[case.kernel.name], placed, request) for case in pool}
    layout = min(
        dict.fromkeys(case.layout for case in pool),
        key=lambda name: (_score([keys[c.candidate] for c in pool if c.layout == name]), layouts.index(name)),
    )
    ranges = _ranges({case.kernel.name: keys[case.candidate] for case in pool if case.layout == layout})
    call = 0.0 if request.policy == "priority" else CALL_S.get(device.kind, 0.0)
    inline = _inline(survivors, layout, ranges, lambda name: _key(by_name[name], price[name], placed, request), call)

    chosen = {f"{r.kernel}/{layout}" for r in (*ranges, *([] if inline is None else [inline]))}
    verdicts = tuple(_verdict(case, reasons[case.candidate], price, chosen) for case in cases)
    saves = request.training and all(kernels[r.kernel].capability.backward == "save" for r in ranges)
    backward: Literal["save", "recompute"] = "save" if saves else "recompute"
    return Plan(layout, ranges, backward, PRICED_AT, verdicts, inline, workspace_bytes=request.workspace_bytes)


def _key(case: Case, price: Callable[[int], float], placed: Mapping[str, int], request: Request) -> Key:
    name, place = case.kernel.name, placed[case.kernel.name]
    if request.policy == "priority":
        return lambda tokens: (place, place, name)
    return lambda tokens: (math.log(price(tokens)), place, name)


def _score(keys: Sequence[Key]) -> float:
    """Of one layout: the mean over GRID of its best key (rounded: equal stays equal)."""
    return round(sum(min(key(tokens) for key in keys)[0] for tokens in GRID) / len(GRID), 9)


def _ranges(keys: Mapping[str, Key]) -> tuple[Range, ...]:
    """The winner at every T: on GRID first, then the crossings between two of its points by bisection."""

    def winner(tokens: int) -> str:
        return min(keys, key=lambda name: keys[name](tokens))

    starts = [(1, winner(1))]
    for high in GRID[1:]:
        while starts[-1][1] != winner(high):
            low, current = max(starts[-1][0], _before(high)), starts[-1][1]
            starts.append(_crossing(low, high, current, winner))
    ends = [start - 1 for start, _ in starts[1:]]
    return tuple(Range(start, end, name) for (start, name), end in zip(starts, [*ends, None], strict=True))


def _inline(
    cases: Sequence[Case], layout: str, ranges: tuple[Range, ...], key: Callable[[str], Key], call: float
) -> Range | None:
    """The compiled kernel that wins at T = 1 against what runs otherwise, for as long as it wins.  call: seconds that
    it saves by not being called."""
    names = [c.kernel.name for c in cases if c.kernel.capability.compiled and c.layout == layout]
    if not names:
        return None
    name = min(names, key=lambda n: key(n)(1))
    if ranges[0].kernel == name:  # nothing else was allowed
        return Range(1, None, name)
    last = 0
    while last < INLINE_MOST:
        ours, theirs = (key(n)(last + 1) for n in (name, next(r.kernel for r in ranges if last + 1 in r)))
        other = math.log(math.exp(theirs[0]) + call) if call else theirs[0]
        if ours[0] >= other + math.log(INLINE_PRICE):
            break
        last += 1
    return Range(1, last, name) if last else None


def _before(tokens: int) -> int:
    return GRID[GRID.index(tokens) - 1]


def _crossing(low: int, high: int, current: str, winner: Callable[[int], str]) -> tuple[int, str]:
    """First T in (low, high] where ``current``, which wins at low and not at high, has lost; and who wins there."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if winner(middle) == current else (low, middle)
    return high, winner(high)


def _verdict(
    case: Case, reasons: tuple[Reject, ...], price: Mapping[str, Callable[[int], float]], chosen: set[str]
) -> Verdict:
    if reasons:
        return Verdict(case.candidate, "vetoed", reasons)
    microseconds = tuple(float(f"{price[case.kernel.name](t) * 1e6:.6g}") for t in PRICED_AT)
    return Verdict(case.candidate, "chosen" if case.candidate in chosen else "survived", (), microseconds)


def _refusal(request: Request, device: Device, spec: MoESpec, reasons: Mapping[str, tuple[Reject, ...]]) -> str:
    """Every candidate that the request names, with every reason against it."""
    wishes = {n: v for n in ("kernel", "layout") if (v := getattr(request, n)) is not None}
    lines = [f"{' and '.join(f'{n}={v!r}' for n, v in wishes.items())} cannot be had on {device.name} for {spec}:"]
    for candidate, rejects in reasons.items():
        if not any(r.code == "veto.request" for r in rejects):
            lines += [f"  {candidate}: {reject.code}: {reject.text}" for reject in rejects]
    return "\n".join(lines)
