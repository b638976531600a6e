"""Published runs (``published``) against our prices, and docs/prices.md against both.

A price within LOW … HIGH of a published time: prices rank to within about a third, and the runs are of other programs,
clocks and versions.  Where a source says which of two is faster by more than a tenth, our prices say so too.  A layer's
share of the peak may be less than that of its products; shares are compared with products alone.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from moe_fx.hardware import catalogue
from moe_fx.kernels.registry import Cost
from moe_fx.oracle import Request
from moe_fx.oracle.price import seconds, workload

from . import published
from .published import ORDERS, PRODUCTS, TIMES, Order, Product, Time, flops, price

LOW, HIGH = 0.6, 1.67


def test_work_is_counted_as_the_sources_count_it() -> None:
    """VeOmni says 242 TFLOP/s beside 10.22 ms."""
    assert flops(published.QWEN3, 32768) / 10.22e-3 == pytest.approx(242e12, rel=0.01)
    assert flops(published.R1_EP8, 512) / 0.435795e-3 == pytest.approx(103.48e12, rel=0.01)
    assert [published.AO / took for took in (1.31e-3, 0.885e-3)] == pytest.approx([524e12, 776e12], rel=0.01)


@pytest.mark.parametrize("fact", [*TIMES, *PRODUCTS], ids=lambda f: f"{f.source}: {f.case}")
def test_prices_are_near_published_times(fact: Time | Product) -> None:
    assert LOW <= published.ratio(fact) <= HIGH


@pytest.mark.parametrize("fact", ORDERS, ids=lambda f: f"{f.source}: {f.case}")
def test_prices_have_the_published_order(fact: Order) -> None:
    assert fact.ratio >= 1.1, "a difference of less than a tenth is no fact about kernels"
    assert fact.first() < fact.second()


@pytest.mark.parametrize("tokens", [64, 256, 4096, 16384])
def test_flashinfer_and_triton_are_nearly_tied_on_hopper(tokens: int) -> None:
    """+3.8 % and -3.5 % for Qwen3-30B-A3B in bfloat16 (vllm PRs 44220, TP2 on H200, and 54742, H100)."""
    for spec, device in ((published.QWEN3_TP2, "h200"), (published.QWEN3, "h100")):
        ratio = price("flashinfer_cutlass", spec, device, tokens) / price("triton", spec, device, tokens)
        assert 1 / 1.1 <= ratio <= 1.1


@pytest.mark.parametrize("device", ["a100", "rtx5090"])
def test_without_a_grouped_kernel_torch_launches_for_every_expert(device: str) -> None:
    """A loop over groups, none of them left out, before Hopper and on others (pytorch issue 186620, PR 161407)."""
    one, other = published.moe(64, 8, 2048, 768), published.moe(128, 8, 2048, 768)
    launch = catalogue()[device].launch_s
    assert price("torch_grouped", other, device, 1) - price("torch_grouped", one, device, 1) >= 2 * 64 * launch
    for fused in ("h100", "h200", "b200"):
        grown = price("torch_grouped", other, fused, 1) - price("torch_grouped", one, fused, 1)
        assert grown < catalogue()[fused].launch_s


def test_rounded_inputs_cost_two_launches_more() -> None:
    """One before each product; the weights of one token are read in the same time."""
    launch = catalogue()["h100"].launch_s
    more = price("triton_fp8", published.QWEN3, "h100", 1) - price("triton", published.QWEN3, "h100", 1)
    assert more == pytest.approx(2 * launch)


def test_passes_are_added_to_products_and_only_off_the_host() -> None:
    """Two bytes each of x and y [T, H], and written and read of rows [T k, ·]: inputs H, up N, hidden I, results H."""
    work = workload(published.QWEN3, Request("bfloat16"), catalogue()["h100"])
    plain = Cost("active", lambda E, T, k: 0, ((1, 0.5),))
    rows, tokens = 8 * 1000, 1000
    moved = 2 * (2 * tokens * 2048 + 2 * rows * (2048 + 2 * 768 + 768 + 2048))
    cost = replace(plain, passes=1.5)
    more = seconds(cost.on("cuda", "sm90"), work)(tokens) - seconds(plain, work)(tokens)
    assert more == pytest.approx(1.5 * moved / 3.35e12)
    assert seconds(cost.on("cpu", "avx512"), work)(tokens) == seconds(plain, work)(tokens)


def test_the_cost_of_an_architecture_is_the_first_that_fits() -> None:
    old, never = Cost("all", lambda E, T, k: 1), Cost("all", lambda E, T, k: 2)
    others = (("sm[78]?", old), ("sm8*", never))
    cost = Cost("active", lambda E, T, k: 3, ((1, 0.1),), on_gpu=((1, 0.2),), on_archs=others)
    assert cost.on("cuda", "sm80") is old
    assert cost.on("cuda", "sm90").efficiency == ((1, 0.2),)
    assert cost.on("cpu", "avx512").efficiency == ((1, 0.1),)


def test_the_page_is_what_the_facts_and_the_costs_say() -> None:
    assert published.PAGE.read_text() == published.page(), "python -m tests.oracle.published --write"
    assert len(published.page().splitlines()) <= 75
