from __future__ import annotations

from dataclasses import astuple, replace

import pytest
import sympy

from moe_fx.hardware import Device
from moe_fx.kernels.registry import Cost, touched
from moe_fx.oracle import Request
from moe_fx.oracle.price import SYMBOLS, T, expression, seconds, workload

from .candidates import moe

SLOW_MEMORY = Device("cpu", "d", "a", 2**30, 1e6, (("bfloat16", 1e18), ("float32", 5e17)), 1, 1e-3)
SLOW_PRODUCT = replace(SLOW_MEMORY, bandwidth=1e18, peaks=(("bfloat16", 1e9), ("float32", 5e8)))
SPEC = moe(8, 2, 32, 16)
EXPERT = 3 * 32 * 16 * 2  # bytes


def price(cost: Cost, device: Device, tokens: int, spec=SPEC, request: Request | None = None) -> float:
    return seconds(cost, workload(spec, request or Request("bfloat16"), device))(tokens)


def none(E: object, T: object, k: object) -> int:
    return 0


def test_touched_experts() -> None:
    assert touched(8, 1, 2) == pytest.approx(2)
    assert touched(8, 10**6, 2) == pytest.approx(8)
    assert touched(4, 3, 4) == 4


@pytest.mark.parametrize(("traffic", "experts", "rows"), [("active", 2, 2), ("all", 8, 8), ("per_row", 6, 2)])
def test_one_token_on_slow_memory(traffic: str, experts: int, rows: int) -> None:
    activations = 2 * (2 * 32 + 2 * rows * (2 * 32 + 32 + 16))
    assert price(Cost(traffic, none), SLOW_MEMORY, 1) == pytest.approx((experts * EXPERT + activations) / 1e6)


@pytest.mark.parametrize(("traffic", "rows"), [("active", 2), ("all", 8), ("per_row", 2)])
def test_flops(traffic: str, rows: int) -> None:
    flops = 2 * 10 * rows * (32 * 32 + 16 * 32)
    assert price(Cost(traffic, none, ((1, 0.5),)), SLOW_PRODUCT, 10) == pytest.approx(flops / 0.5e9)


def test_ungated_biased_and_other_dtypes() -> None:
    plain = Cost("all", none, ((1, 1.0),))
    ungated = moe(8, 2, 32, 16, gated=False, act="relu")
    assert price(plain, SLOW_PRODUCT, 1, ungated) == pytest.approx(2 / 3 * price(plain, SLOW_PRODUCT, 1))
    biased = moe(8, 2, 32, 16, w13_bias=True, w2_bias=True)
    more = price(plain, SLOW_MEMORY, 1, biased) - price(plain, SLOW_MEMORY, 1)
    assert more == pytest.approx(8 * (32 + 32) * 2 / 1e6)
    wide = Request("bfloat16", "float32")
    assert price(plain, SLOW_MEMORY, 1, request=wide) - price(plain, SLOW_MEMORY, 1) == pytest.approx(8 * EXPERT / 1e6)
    assert price(plain, SLOW_PRODUCT, 1, request=wide) == pytest.approx(2 * price(plain, SLOW_PRODUCT, 1))
    cast = moe(8, 2, 32, 16, compute_dtype="float32")
    assert price(plain, SLOW_PRODUCT, 1, cast) == pytest.approx(2 * price(plain, SLOW_PRODUCT, 1))


def test_launches_are_added() -> None:
    cost = Cost("active", lambda E, T, k: 3 * E + k + T)
    with_launches = price(cost, SLOW_PRODUCT, 5)
    assert with_launches - price(Cost("active", none), SLOW_PRODUCT, 5) == pytest.approx((24 + 2 + 5) * 1e-3)


def test_efficiency_is_a_power_law_between_points_and_constant_outside() -> None:
    cost = Cost("all", none, ((4, 0.1), (64, 0.4)))  # "all": rows of one product = T

    def share(tokens: int) -> float:
        return 2 * tokens * 8 * (32 * 32 + 16 * 32) / 1e9 / price(cost, SLOW_PRODUCT, tokens)

    assert [share(t) for t in (1, 4, 16, 64, 4096)] == pytest.approx([0.1, 0.1, 0.2, 0.4, 0.4])


def test_a_share_that_grows_faster_than_the_rows_is_padding() -> None:
    cost = Cost("all", none, ((1, 0.001), (16, 0.8)))
    assert price(cost, SLOW_PRODUCT, 1) == pytest.approx(price(cost, SLOW_PRODUCT, 16))


def test_the_compiled_price_is_the_expression() -> None:
    cost = Cost("active", lambda E, T, k: 4 * touched(E, T, k), ((1, 0.1), (64, 0.5)))
    work = workload(SPEC, Request("bfloat16"), SLOW_MEMORY)
    written = expression(cost)
    assert written.free_symbols == {T, *SYMBOLS}
    for tokens in (1, 7, 500):  # as floats: exact rationals to the power of 500 take minutes
        numbers = dict(zip((T, *SYMBOLS), map(sympy.Float, (tokens, *astuple(work))), strict=True))
        assert float(written.subs(numbers)) == pytest.approx(seconds(cost, work)(tokens))


def test_unknown_traffic_is_an_error() -> None:
    with pytest.raises(ValueError, match="'some' is not one of active, all, gathered, per_row"):
        expression(Cost("some", none))
