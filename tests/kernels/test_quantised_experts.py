"""Kernels over quantised operands, against a sum over (token, slot) pairs in float64.

The cases and the sum are those of ``quantised_cases``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

import moe_fx.kernels.experts  # noqa: F401  registers the kernels
from moe_fx import quant
from moe_fx.binding import Experts, InputScales, Matrices, Quantised
from moe_fx.hardware import detect
from moe_fx.kernels.build import quant_config, run
from moe_fx.kernels.config import (
    FusedMoEConfig,
    FusedMoEQuantConfig,
    fp8_w8a8_moe_quant_config,
    fp8_w8a16_moe_quant_config,
    int4_w4a16_moe_quant_config,
    int8_w8a8_moe_quant_config,
    int8_w8a16_moe_quant_config,
    mxfp4_w4a16_moe_quant_config,
    nvfp4_moe_quant_config,
    ocp_mx_moe_quant_config,
)
from moe_fx.kernels.experts.backward import experts_backward
from moe_fx.kernels.ladder import Question, ladder
from moe_fx.kernels.modular_kernel import FusedMoEKernel
from moe_fx.kernels.modular_kernel.workspace import release
from moe_fx.kernels.prepare_finalize import PrepareAndFinalizeNoEP
from moe_fx.kernels.registry import kernel
from moe_fx.quant import QuantKey
from moe_fx.reference import experts_forward
from moe_fx.reference.quantise import quantise
from moe_fx.spec import ExpertSpec, MoESpec
from tests.reference.number_formats import by_hand

from .cases import assert_as_exact
from .quantised_cases import DOUBLE, FORMS, SCHEMES, SHARED, WEIGHTS, Case, E, H, I, K, T, dense, held, inputs, scheme
from .test_workspace import Live

LOOPS = ("sorted_loop", "batched_loop", "reference")


@pytest.fixture(autouse=True)
def _below_autograd() -> Iterator[None]:
    with torch.no_grad():
        yield


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


# --- forward


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("loop", LOOPS)
def test_forward_is_the_dense_sum(loop: str, name: str, form: str) -> None:
    """In float64, where rounding is the only error there is.  A loop that goes expert by expert refuses scales that
    come from all tokens at once."""
    case = Case(SCHEMES[name], form)
    question = Question(
        loop,
        kernel(loop).capability,
        FusedMoEConfig.of(case.spec, DOUBLE),
        detect(torch.device("cpu")),
        "float64",
        (case.quant.key("w13"), case.quant.key("a1")),
        None,
    )
    if name in SHARED and loop != "reference":
        assert [reason.code for reason in ladder(question)] == ["veto.scheme"]
        return
    assert ladder(question) == ()
    experts, exact = case.experts()
    x, ids, weights = inputs()
    expected = dense(case, x, ids, weights, exact)
    close(run(kernel(loop), x, ids, weights, experts, case.spec), expected)
    assert expected.norm() > 1


def test_what_is_refused() -> None:
    assert sorted(SHARED) == [
        "FP8_TENSOR-FP8_DYNAMIC",
        "INT8_CHANNEL-INT8_DYNAMIC",
        "INT8_TENSOR-INT8_DYNAMIC",
        "NVFP4-NVFP4_DYNAMIC",
    ]


VARIANTS = {"no biases": dict(bias=False), "no gate": dict(gated=False), "gate and up apart": dict(split=True)}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["INT4_32_ZERO", "MXFP4-MXFP8_DYNAMIC", "INT8_CHANNEL-INT8_TENSOR", "FP8_BLOCK"])
@pytest.mark.parametrize("loop", LOOPS)
def test_variants(loop: str, name: str, variant: str) -> None:
    for form in FORMS:
        case = Case(SCHEMES[name], form, **VARIANTS[variant])
        experts, exact = case.experts()
        x, ids, weights = inputs(1)
        close(run(kernel(loop), x, ids, weights, experts, case.spec), dense(case, x, ids, weights, exact))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", [n for n in SCHEMES if n not in SHARED])
def test_the_tolerance_rule(name: str, dtype: torch.dtype) -> None:
    case = Case(SCHEMES[name])
    experts, exact = case.experts()
    x, ids, weights = inputs(2)
    x = x.to(dtype)
    truth = dense(case, x.double(), ids, weights, exact)
    usual = experts_forward(x, ids, weights, experts, case.spec)
    for loop in LOOPS[:2]:
        y = run(kernel(loop), x, ids, weights, experts, case.spec)
        assert_as_exact(y, usual, truth, torch.finfo(dtype).eps, f"{loop} {name}")


@pytest.mark.parametrize("name", [n for n in SCHEMES if n not in SHARED])
def test_chunks(name: str) -> None:
    """One token at a time: nothing is taken from the others."""
    case = Case(SCHEMES[name])
    experts, exact = case.experts()
    x, ids, weights = inputs(3)
    for loop in ("sorted_loop", "reference"):
        close(run(kernel(loop), x, ids, weights, experts, case.spec, 1), dense(case, x, ids, weights, exact))


@pytest.mark.parametrize("name", SHARED)
def test_scales_of_all_tokens_are_not_chunked(name: str) -> None:
    case = Case(SCHEMES[name])
    experts, exact = case.experts()
    x, ids, weights = inputs(3)
    close(run(kernel("reference"), x, ids, weights, experts, case.spec, 1), dense(case, x, ids, weights, exact))


# --- the configuration


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", SCHEMES)
def test_a_configuration_says_the_scheme(name: str, form: str) -> None:
    case = Case(SCHEMES[name], form)
    experts, _ = case.experts()
    assert quant_config(case.quant, experts).spec == case.quant


def codes(key: QuantKey) -> tuple[Quantised, Quantised]:
    return held("w13", key)[0], held("down", key)[0]


def scales(key: QuantKey) -> tuple[Any, Any]:
    return codes(key)[0].scale, codes(key)[1].scale


def zeros(key: QuantKey) -> tuple[Any, Any]:
    return codes(key)[0].zero, codes(key)[1].zero


A1, A2 = torch.tensor([0.02]), torch.tensor([0.01])
BLOCK = [128, 128]


def nvfp4() -> FusedMoEQuantConfig:
    """Alphas are products of both global scales."""
    first, second = (q.global_scale for q in codes(quant.NVFP4))
    assert isinstance(first, Tensor) and isinstance(second, Tensor)
    return nvfp4_moe_quant_config(first * A1, second * A2, A1, A2, *scales(quant.NVFP4))


# name → (key of the weights, the builder's call, the scheme that it means)
BUILT: dict[str, tuple[QuantKey, Callable[[], FusedMoEQuantConfig], str]] = {
    "fp8 block": (
        quant.FP8_BLOCK,
        lambda: fp8_w8a8_moe_quant_config(*scales(quant.FP8_BLOCK), block_shape=BLOCK),
        "FP8_BLOCK-FP8_GROUP",
    ),
    "fp8 tensor": (quant.FP8_TENSOR, lambda: fp8_w8a8_moe_quant_config(*scales(quant.FP8_TENSOR), A1, A2), "static"),
    "fp8 tensor, scales [E]": (
        quant.FP8_TENSOR,
        lambda: fp8_w8a8_moe_quant_config(*(s.flatten() for s in scales(quant.FP8_TENSOR)), A1, A2),
        "static",
    ),
    "fp8 dynamic": (
        quant.FP8_TENSOR,
        lambda: fp8_w8a8_moe_quant_config(*scales(quant.FP8_TENSOR)),
        "FP8_TENSOR-FP8_DYNAMIC",
    ),
    "fp8 token": (
        quant.FP8_CHANNEL,
        lambda: fp8_w8a8_moe_quant_config(*scales(quant.FP8_CHANNEL), per_act_token_quant=True, per_out_ch_quant=True),
        "FP8_CHANNEL-FP8_TOKEN",
    ),
    "fp8 w8a16": (quant.FP8_BLOCK, lambda: fp8_w8a16_moe_quant_config(*scales(quant.FP8_BLOCK), BLOCK), "FP8_BLOCK"),
    "int8 token": (
        quant.INT8_CHANNEL,
        lambda: int8_w8a8_moe_quant_config(*scales(quant.INT8_CHANNEL), per_act_token_quant=True),
        "INT8_CHANNEL-INT8_TOKEN",
    ),
    "int8 w8a16": (
        WEIGHTS["INT8_CHANNEL_ZERO"],
        lambda: int8_w8a16_moe_quant_config(
            *scales(WEIGHTS["INT8_CHANNEL_ZERO"]), *zeros(WEIGHTS["INT8_CHANNEL_ZERO"])
        ),
        "INT8_CHANNEL_ZERO",
    ),
    "int4": (
        WEIGHTS["INT4_32_ZERO"],
        lambda: int4_w4a16_moe_quant_config(
            *scales(WEIGHTS["INT4_32_ZERO"]), *zeros(WEIGHTS["INT4_32_ZERO"]), block_shape=[0, 32]
        ),
        "INT4_32_ZERO",
    ),
    "mxfp4": (quant.MXFP4, lambda: mxfp4_w4a16_moe_quant_config(*scales(quant.MXFP4)), "MXFP4"),
    "mxfp6": (
        quant.MXFP6_E2M3,
        lambda: ocp_mx_moe_quant_config("mxfp6_e2m3", *scales(quant.MXFP6_E2M3)),
        "MXFP6_E2M3-MXFP6_E2M3_DYNAMIC",
    ),
    "nvfp4": (quant.NVFP4, nvfp4, "nvfp4"),
}


@pytest.mark.parametrize("name", BUILT)
@pytest.mark.parametrize("loop", ["sorted_loop", "reference"])
def test_codes_and_a_builder_are_enough(loop: str, name: str) -> None:
    """The layer is described by its sizes, the quantisation by the builder: nothing else says that x is rounded."""
    key, make, means = BUILT[name]
    chosen, q = make(), codes(key)
    rest = scheme(key, quant.FP8_TENSOR if means == "static" else quant.NVFP4_DYNAMIC)
    case = Case(SCHEMES.get(means, rest), bias=False)
    if means in SHARED and loop != "reference":
        return
    experts = kernel(loop).experts.make_standard_experts(
        FusedMoEConfig(E, K, H, E, in_dtype=DOUBLE, intermediate_size=I), chosen
    )
    x, ids, weights = inputs(4)
    y = FusedMoEKernel(PrepareAndFinalizeNoEP(), experts).apply(x, q[0].codes, q[1].codes, ids, weights, "silu")
    _, exact = case.experts()
    assert isinstance(y, Tensor)
    if means == "static":
        case = Fixed(case.quant, bias=False)
    close(y, dense(case, x, ids, weights, exact) if means != "nvfp4" else with_global_scales(x, ids, weights, exact))


class Fixed(Case):
    """One scale for each product."""

    @property
    def given(self) -> InputScales:
        return InputScales(A1.reshape(()), A2.expand(E))


def with_global_scales(x: Tensor, ids: Tensor, weights: Tensor, m: dict[str, Tensor]) -> Tensor:
    """``dense`` of nvfp4 where the global scales of activations are given."""
    y = torch.zeros_like(x)

    def hand(row: Tensor, whole: Tensor) -> Tensor:
        return torch.from_numpy(by_hand(row[None].numpy(), quant.NVFP4_DYNAMIC, None, float(whole)).values)[0]

    for t in range(len(x)):
        for k in range(K):
            if 0 <= (e := int(ids[t, k])) < E:
                row = hand(x[t], A1)
                g, u = m["gate"][e] @ row, m["up"][e] @ row
                y[t] += weights[t, k] * (m["down"][e] @ hand(g * torch.sigmoid(g) * u, A2))
    return y


# --- memory


def tensors_of(q: Matrices) -> list[Tensor]:
    assert isinstance(q, Quantised)
    parts = [p for p in (q.codes, q.scale, q.zero, q.global_scale) if p is not None]
    return [t for p in parts for t in (p if isinstance(p, list) else [p])]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["INT4_32_ZERO", "MXFP4", "MXFP6_E2M3", "FP8_BLOCK", "NF4", "INT8_CHANNEL-INT8_TOKEN"])
@pytest.mark.parametrize("loop", LOOPS)
def test_the_bank_never_exists_whole(loop: str, name: str, form: str) -> None:
    """All experts have tokens, and only one is floats at a time."""
    experts_count, hidden, inner, tokens = 24, 96, 64, 12
    draw = torch.Generator().manual_seed(6)
    chosen = SCHEMES[name]
    up, down = (
        FORMS[form](quantise(torch.randn(experts_count, *size, generator=draw), key))
        for size, key in (((2 * inner, hidden), chosen.key("w13")), ((hidden, inner), chosen.key("w2")))
        if key is not None
    )
    experts = Experts((up,), down, (), None, None, "gate_up")
    spec = MoESpec(2, ExpertSpec(experts_count, hidden, inner), quant=chosen)
    x = torch.randn(tokens, hidden, generator=draw)
    ids, weights = torch.arange(2 * tokens).remainder(experts_count).view(tokens, 2), torch.rand(tokens, 2)
    release()  # the workspace of earlier tests is larger
    run(kernel(loop), x, ids, weights, experts, spec)
    with Live(x, ids, weights, *tensors_of(up), *tensors_of(down)) as live:
        run(kernel(loop), x, ids, weights, experts, spec)
    one = 2 * inner * hidden * 4
    rows = tokens * (experts_count if loop == "batched_loop" else 2)  # as prepare lays them out
    activations = (2 * rows * hidden + tokens * 2 * 3 * inner) * 4
    most = 8 * one + activations  # codes apart, as numbers, their scales, the products of both; in float32
    assert live.peak <= most
    assert most < experts_count * (one + one // 2) / 2, "the bound would not see the bank"


# --- backward


@pytest.mark.parametrize("weight_on", ["output", "input"])
@pytest.mark.parametrize("tokens", [T, 300])
@pytest.mark.parametrize(
    "name", ["INT4_32_ZERO", "MXFP4", "NF4", "FP8_BLOCK-FP8_GROUP", "INT8_CHANNEL-INT8_TENSOR", *SHARED]
)
def test_backward_through_frozen_codes(name: str, tokens: int, weight_on: Literal["output", "input"]) -> None:
    """dx and dweights are those of autograd through the sum, rounding the identity."""
    case = Case(SCHEMES[name], weight_on=weight_on)
    experts, exact = case.experts()
    x, ids, weights = inputs(5, tokens)
    dy = torch.randn(tokens, H, generator=torch.Generator().manual_seed(7), dtype=DOUBLE)
    found = experts_backward(dy, x, ids, weights, experts, case.spec, None)
    with torch.enable_grad():
        leaves = x.clone().requires_grad_(), weights.clone().requires_grad_()
        expected = torch.autograd.grad(dense(case, leaves[0], ids, leaves[1], exact), leaves, dy)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


# --- defects


def test_defects_are_seen() -> None:
    """Scales of the next expert, no zero points, no rounding: each changes the result far more than the tolerance."""
    case = Case(SCHEMES["INT4_32_ZERO"])
    experts, exact = case.experts()
    x, ids, weights = inputs()
    expected = dense(case, x, ids, weights, exact)
    (up,) = experts.up
    assert isinstance(up, Quantised) and isinstance(up.scale, Tensor)
    wrong = [replace(up, scale=up.scale.roll(1, 0)), replace(up, zero=None)]
    for q in wrong:
        y = run(kernel("sorted_loop"), x, ids, weights, replace(experts, up=(q,)), case.spec)
        assert float((y - expected).norm() / expected.norm()) > 0.05
    unrounded = replace(case.spec, quant=scheme(quant.INT8_CHANNEL))
    rounding = Case(SCHEMES["INT8_CHANNEL-INT8_TOKEN"])
    experts, exact = rounding.experts()
    y = run(kernel("sorted_loop"), x, ids, weights, experts, unrounded)
    expected = dense(rounding, x, ids, weights, exact)
    assert float((y - expected).norm() / expected.norm()) > 1e-3
