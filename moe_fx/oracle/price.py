"""The price of a candidate: a Cost and a workload enter, seconds of one forward as a function of T leave.

Sympy expressions in T and the sizes, compiled once per Cost::

    touched  D = E (1 - (1 - k/E)^T)       distinct experts that T tokens reach under uniform routing
    traffic      weights read              rows computed    rows of one product
      active     D experts                 T k              T k / D
      all        E experts                 T E              T            every token through every expert
      gathered   T k experts               T k              1            read anew for every row
      per_row    3 T k experts             T k              1            copied: read, written, read
    bytes      = weights + activations, each written once and read once
    flops      = 2 rows (H N + I H)        N = 2I gated, I not
    time       = max(bytes / bandwidth, flops / (peak * efficiency(rows of one product)))
                 + passes * activations / bandwidth + launches * launch_s

Products and what they read overlap; ops between the products (``Cost.passes``) do not.

Weights that are codes weigh what ``QuantKey.nbytes`` says: codes, scales, zero points.  A kernel that makes floats of
them before a product pays for it with every expert it reads: ``Cost.dequantise``.  Products are priced at the peak of
the dtype in which they run without quantisation, also where a kernel multiplies codes.

A backward is not priced: all kernels share one, so it moves no order.  The layout is not priced either: Cost gives one
efficiency for every storage, so a copy is only chosen where it admits a kernel that the model's own storage does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import astuple, dataclass
from functools import lru_cache
from itertools import pairwise

import sympy

from moe_fx.hardware import Device
from moe_fx.kernels.registry import Cost, touched
from moe_fx.oracle.request import Request, itemsize
from moe_fx.spec import MoESpec

T, E, K, H, INTER, N = sympy.symbols("T E k H I N", positive=True)
X_SIZE, W_SIZE, BIAS = sympy.symbols("x_size w_size bias", nonnegative=True)
CODES, CODE_BYTES = sympy.symbols("codes code_bytes", nonnegative=True)
BANDWIDTH, PEAK, LAUNCH = sympy.symbols("bandwidth peak launch_s", positive=True)

TOUCHED = touched(E, T, K)
EXPERT_BYTES = (H * N + INTER * H - CODES + BIAS) * W_SIZE + CODE_BYTES
TRAFFIC: dict[str, tuple[sympy.Expr, sympy.Expr, sympy.Expr]] = {  # experts read, rows, rows of one product
    "active": (TOUCHED, T * K, T * K / TOUCHED),
    "all": (E, T * E, T),
    "gathered": (T * K, T * K, sympy.Integer(1)),
    "per_row": (3 * T * K, T * K, sympy.Integer(1)),
}


@dataclass(frozen=True, slots=True)
class Workload:
    """The numbers behind the symbols, in the order of SYMBOLS: sizes, bytes, bytes/s, FLOP/s, seconds.

    codes, code_bytes: weights of one expert that are held as codes, and what they take.
    """

    experts: int
    top_k: int
    hidden: int
    intermediate: int
    up_rows: int
    x_size: int
    w_size: int
    bias: int
    codes: int
    code_bytes: int
    bandwidth: float
    peak: float
    launch_s: float


SYMBOLS = (E, K, H, INTER, N, X_SIZE, W_SIZE, BIAS, CODES, CODE_BYTES, BANDWIDTH, PEAK, LAUNCH)


def workload(spec: MoESpec, request: Request, device: Device) -> Workload:
    e = spec.expert
    up_rows = e.intermediate * (2 if e.gated else 1)
    codes, code_bytes = held_as_codes(spec)
    return Workload(
        experts=e.experts,
        top_k=spec.top_k,
        hidden=e.hidden,
        intermediate=e.intermediate,
        up_rows=up_rows,
        x_size=itemsize(request.dtype),
        w_size=itemsize(request.weights),
        bias=up_rows * e.w13_bias + e.hidden * e.w2_bias,
        codes=codes,
        code_bytes=code_bytes,
        bandwidth=device.bandwidth,
        peak=device.peak(e.compute_dtype or request.weights),
        launch_s=device.launch_s,
    )


def held_as_codes(spec: MoESpec) -> tuple[int, int]:
    """(weights of one expert that are codes, bytes of those with their scales)."""
    e, up_rows = spec.expert, spec.expert.intermediate * (2 if spec.expert.gated else 1)
    sizes = ((spec.quant.key("w13"), up_rows, e.hidden), (spec.quant.key("w2"), e.hidden, e.intermediate))
    held = [(rows * cols, key.nbytes(rows, cols)) for key, rows, cols in sizes if key is not None]
    return sum(n for n, _ in held), sum(size for _, size in held)


def seconds(cost: Cost, work: Workload) -> Callable[[int], float]:
    """T → seconds of one forward."""
    compiled, numbers = _compiled(cost), astuple(work)
    return lambda tokens: float(compiled(tokens, *numbers))


def expression(cost: Cost) -> sympy.Expr:
    """Seconds, in T and SYMBOLS.  ValueError for a weight traffic that is not in TRAFFIC."""
    if cost.weight_traffic not in TRAFFIC:
        raise ValueError(f"weight_traffic {cost.weight_traffic!r} is not one of {', '.join(TRAFFIC)}")
    experts, rows, rows_each = TRAFFIC[cost.weight_traffic]
    activations = X_SIZE * (2 * T * H + 2 * rows * (2 * H + N + INTER))  # x and y; gathered rows, N, I, expert outputs
    each, ops = cost.dequantise
    memory = (experts * (EXPERT_BYTES + each * CODES) + activations) / BANDWIDTH
    flops = 2 * rows * (H * N + INTER * H)
    compute = flops / (PEAK * efficiency(cost.efficiency, rows_each))
    launches = cost.launches(E, T, K) + sympy.Piecewise((ops * experts, CODES > 0), (0, True))
    between = cost.passes * activations / BANDWIDTH
    return sympy.Max(memory, compute, evaluate=False) + between + sympy.sympify(launches) * LAUNCH


def efficiency(table: tuple[tuple[int, float], ...], rows: sympy.Expr) -> sympy.Expr:
    """Share of the peak at ``rows``: a power law between the points of the table, constant outside it."""
    points = _raised(table)
    pieces = [(points[0][1], rows <= points[0][0])]
    for (r0, s0), (r1, s1) in pairwise(points):
        slope = math.log(s1 / s0) / math.log(r1 / r0)
        pieces.append((s0 * (rows / r0) ** slope, rows <= r1))
    return sympy.Piecewise(*pieces, (points[-1][1], True))


def _raised(table: tuple[tuple[int, float], ...]) -> list[tuple[int, float]]:
    """Ascending points, each share raised to what padding to the next point's rows would reach: otherwise more tokens
    could cost less."""
    out: list[tuple[int, float]] = []
    for rows, share in sorted(table, reverse=True):
        out.insert(0, (rows, max(share, out[0][1] * rows / out[0][0]) if out else share))
    return out


@lru_cache(maxsize=256)
def _compiled(cost: Cost) -> Callable[..., float]:
    compiled: Callable[..., float] = sympy.lambdify((T, *SYMBOLS), expression(cost), modules="math", cse=True)
    return compiled
