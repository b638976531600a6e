"""Experts over one batch each, experts with a router inside, and what experts classes say of themselves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import moe_fx.kernels.experts  # noqa: F401  registers the kernels
from moe_fx import quant
from moe_fx.kernels.config import (
    FUSED_MOE_UNQUANTIZED_CONFIG,
    FusedMoEConfig,
    FusedMoEParallelConfig,
    RoutingMethodType,
    fp8_w8a8_moe_quant_config,
    int8_w8a8_moe_quant_config,
)
from moe_fx.kernels.modular_kernel import ExpertTokensMetadata, FusedMoEActivationFormat, FusedMoEKernel
from moe_fx.kernels.prepare_finalize import MonolithicPrepareAndFinalizeNoEP
from moe_fx.kernels.registry import kernel
from moe_fx.kernels.weight_and_reduce import TopKWeightAndReduceDelegate, TopKWeightAndReduceNoOP
from moe_fx.quant import int_group
from moe_fx.reasons import MoEFxOptionError, MoEFxRuntimeError
from moe_fx.reference.quantise import quantise
from moe_fx.spec import ExpertSpec, MoESpec, RouterSpec
from tests.routers.formulas import ROUTERS, Router

E, K, H, I, T = 8, 2, 16, 12, 11  # noqa: E741
EXPERT = ExpertSpec(E, H, I)


@pytest.fixture(autouse=True)
def _below_autograd() -> Iterator[None]:
    with torch.no_grad():
        yield


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


W13, W2 = normal(E, 2 * I, H, seed=1, scale=H**-0.5), normal(E, H, I, seed=2, scale=I**-0.5)


def through(x: Tensor, e: int) -> Tensor:
    """x [.., H] through expert e, by the formula, in float64."""
    up = x @ W13[e].t()
    return up[..., :I] * torch.sigmoid(up[..., :I]) * up[..., I:] @ W2[e].t()


# --- one batch an expert


def batched(**config: Any) -> Any:
    made = FusedMoEConfig(E, K, H, E, in_dtype=torch.float64, intermediate_size=I, **config)
    return kernel("batched_loop").experts.make_batched_experts(made, FUSED_MOE_UNQUANTIZED_CONFIG, 6, 2)


def applied(experts: Any, x: Tensor, meta: ExpertTokensMetadata | None, **changes: Any) -> Tensor:
    output = torch.full_like(x, 7.0)
    given = dict(
        output=output,
        hidden_states=x,
        w1=W13,
        w2=W2,
        topk_weights=torch.rand(6, K),
        topk_ids=torch.zeros(6, K, dtype=torch.int64),
        activation="silu",
        global_num_experts=E,
        expert_map=None,
        a1q_scale=None,
        a2_scale=None,
        workspace13=torch.empty(0),
        workspace2=torch.empty(0),
        expert_tokens_meta=meta,
        apply_router_weight_on_input=False,
    )
    experts.apply(**(given | changes))
    return output


@pytest.mark.parametrize("on_host", [True, False])
def test_batches(on_host: bool) -> None:
    """Counts on the host bound the work; without them whole batches are computed.  Garbage stays where it is."""
    counts = torch.tensor([3, 0, 6, 1, 0, 2, 6, 5], dtype=torch.int32)
    x = normal(E, 6, H, seed=3)
    for e, n in enumerate(counts.tolist()):
        x[e, n:] = float("nan")
    y = applied(batched(), x, ExpertTokensMetadata(counts, counts if on_host else None))
    for e, n in enumerate(counts.tolist()):
        torch.testing.assert_close(y[e, :n], through(x[e, :n], e), rtol=1e-12, atol=1e-12)
        if on_host:
            assert bool((y[e, n:] == 7).all())


def test_batches_need_counts_and_floats() -> None:
    x, counts = normal(E, 6, H), torch.full((E,), 6, dtype=torch.int32)
    with pytest.raises(MoEFxRuntimeError, match="a count for each expert"):
        applied(batched(), x, None)
    with pytest.raises(MoEFxRuntimeError, match="quantised already"):
        applied(batched(), x, ExpertTokensMetadata(counts, counts), a1q_scale=torch.ones(E, 6, 1))
    with pytest.raises(MoEFxRuntimeError, match="one batch an expert"):
        batched().compute(x, x, x, x, x, x)


def test_what_batched_experts_are() -> None:
    experts = batched()
    assert (experts.max_num_tokens, experts.num_dispatchers) == (6, 2)
    assert experts.activation_format() is FusedMoEActivationFormat.BatchedExperts
    assert experts.finalize_weight_and_reduce_impl() == TopKWeightAndReduceDelegate()
    assert not experts.supports_chunking()
    assert experts.workspace_shapes(6, 2 * I, H, K, E, E, None, "silu") == ((0,), (0,), (E, 6, H))
    assert experts.moe_problem_size(normal(E, 6, H), W13, W2, torch.zeros(6, K)) == (E, 6, 2 * I, H, K)
    config = FusedMoEConfig(E, K, H, E)
    with pytest.raises(MoEFxOptionError, match="use make_batched_experts"):
        kernel("batched_loop").experts.make_standard_experts(config, FUSED_MOE_UNQUANTIZED_CONFIG)
    with pytest.raises(MoEFxOptionError, match="use make_standard_experts"):
        kernel("sorted_loop").experts.make_batched_experts(config, FUSED_MOE_UNQUANTIZED_CONFIG, 6, 1)


# --- the router inside

BIAS, SCALE = normal(E, seed=4, scale=0.1), torch.rand(E, generator=torch.Generator().manual_seed(5)).double() + 0.5


def routed(router: RouterSpec | None = None, quant_config: Any = FUSED_MOE_UNQUANTIZED_CONFIG, **more: Any) -> Any:
    spec = None if router is None else MoESpec(K, EXPERT, router=router)
    config = dict(in_dtype=torch.float64, intermediate_size=I, spec=spec) | more.pop("config", {})
    made = kernel("routed_loop").experts(FusedMoEConfig(E, K, H, E, **config), quant_config, **more)  # type: ignore[arg-type]
    return FusedMoEKernel(MonolithicPrepareAndFinalizeNoEP(), made)


def by_hand(router: Router, x: Tensor, logits: Tensor) -> Tensor:
    """Token by token, over Python floats up to the experts."""
    y = torch.zeros_like(x)
    for t in range(len(x)):
        ids, weights = router.by_hand(logits[t].tolist(), BIAS.tolist(), SCALE.tolist(), K)
        for e, w in zip(ids, weights, strict=True):
            y[t] += w * through(x[t], e)
    return y


@pytest.mark.parametrize("tokens", [0, 1, T])
@pytest.mark.parametrize("router", ROUTERS, ids=str)
def test_router_and_experts(router: Router, tokens: int) -> None:
    x, logits = normal(tokens, H, seed=6), normal(tokens, E, seed=7)
    chosen = routed(router.spec, expert_scale=SCALE if router.spec.expert_scale else None)
    bias = BIAS if router.spec.bias else None
    before = [t.clone() for t in (x, logits, W13, W2)]
    y = chosen.apply_monolithic(x, W13, W2, logits, "silu", e_score_correction_bias=bias)
    torch.testing.assert_close(y, by_hand(router, x, logits), rtol=1e-10, atol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(before, (x, logits, W13, W2), strict=True))


# number that libraries know → the same router in tests/routers/formulas.py
NUMBERS = {"Default": "S1", "RenormalizeNaive": "S1 renormalised", "Renormalize": "T1"}


@pytest.mark.parametrize("number", NUMBERS)
def test_a_router_by_number(number: str) -> None:
    router = next(r for r in ROUTERS if r.name == NUMBERS[number])
    x, logits = normal(T, H, seed=6), normal(T, E, seed=7)
    y = routed(config=dict(routing_method=RoutingMethodType[number])).apply_monolithic(x, W13, W2, logits, "silu")
    torch.testing.assert_close(y, by_hand(router, x, logits), rtol=1e-10, atol=1e-12)


def sigmoids(logits: Tensor, renormalise: bool, scale: float = 1.0, bias: Tensor | None = None) -> Tensor:
    """Weights [T, E], zero where not chosen."""
    scores = torch.sigmoid(logits)
    chosen = torch.zeros_like(scores)
    for t in range(len(scores)):
        row = scores[t] if bias is None else scores[t] + bias
        best = sorted(range(E), key=lambda e: -float(row[e]))[:K]
        chosen[t, best] = scores[t, best]
    return scale * (chosen / chosen.sum(1, keepdim=True) if renormalise else chosen)


@pytest.mark.parametrize(
    ("number", "given", "expected"),
    [
        ("Sigmoid", {}, dict(renormalise=False)),
        ("SigmoidRenorm", {}, dict(renormalise=True)),
        ("SigmoidRenorm", dict(e_score_correction_bias=BIAS), dict(renormalise=True, bias=BIAS)),
        ("MiniMax2", dict(e_score_correction_bias=BIAS), dict(renormalise=True, bias=BIAS)),
        (
            "DeepSeekV3",
            dict(e_score_correction_bias=BIAS, routed_scaling_factor=2.5),
            dict(renormalise=True, scale=2.5, bias=BIAS),
        ),
        ("Llama4", {}, dict(renormalise=False)),
    ],
)
def test_sigmoid_routers_by_number(number: str, given: dict[str, Any], expected: dict[str, Any]) -> None:
    x, logits = normal(T, H, seed=6), normal(T, E, seed=7)
    method = RoutingMethodType[number]
    y = routed(config=dict(routing_method=method)).apply_monolithic(x, W13, W2, logits, "silu", **given)
    shares = sigmoids(logits, **expected)
    dense = sum(shares[:, e, None] * through(x, e) for e in range(E))
    torch.testing.assert_close(y, dense, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("number", ["TopK", "Unspecified"])
def test_a_number_that_says_no_router(number: str) -> None:
    x, logits = normal(T, H), normal(T, E)
    chosen = routed(config=dict(routing_method=RoutingMethodType[number]))
    with pytest.raises(MoEFxOptionError, match=f"{number} says no router: give FusedMoEConfig a spec"):
        chosen.apply_monolithic(x, W13, W2, logits, "silu")


def test_groups_and_scale_of_a_call() -> None:
    """They replace those of the spec."""
    x, logits = normal(T, H, seed=6), normal(T, E, seed=7)
    g1 = next(r for r in ROUTERS if r.name == "G1")
    plain = replace(g1.spec, groups=1, topk_groups=1, scale=1.0)
    given = dict(num_expert_group=4, topk_group=2, routed_scaling_factor=2.5, e_score_correction_bias=BIAS)
    y = routed(plain).apply_monolithic(x, W13, W2, logits, "silu", **given)
    torch.testing.assert_close(y, by_hand(g1, x, logits), rtol=1e-10, atol=1e-12)


def test_an_expert_map_of_a_routed_kernel() -> None:
    """The router sees all experts, this rank has half of them, in another order."""
    x, logits = normal(T, H, seed=6), normal(T, E, seed=7)
    table = torch.tensor([-1, 3, -1, 0, -1, 1, 2, -1], dtype=torch.int32)
    local = [3, 5, 6, 1]
    config = dict(
        num_local_experts=4, spec=MoESpec(K, replace(EXPERT, experts=4), router=RouterSpec()), in_dtype=torch.float64
    )
    made = kernel("routed_loop").experts(FusedMoEConfig(E, K, H, **config))  # type: ignore[arg-type]
    chosen = FusedMoEKernel(MonolithicPrepareAndFinalizeNoEP(), made)
    y = chosen.apply_monolithic(x, W13[local], W2[local], logits, "silu", E, table)
    shares = torch.softmax(logits, -1)
    kept = torch.zeros_like(shares)
    for t in range(T):
        best = sorted(range(E), key=lambda e: -float(shares[t, e]))[:K]
        kept[t, best] = shares[t, best]
    dense = sum(kept[:, e, None] * through(x, e) for e in local)
    torch.testing.assert_close(y, dense, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(dense, sum(kept[:, e, None] * through(x, e) for e in range(E)))


def test_weight_on_input_of_a_routed_kernel() -> None:
    x, logits = normal(T, H, seed=6), normal(T, E, seed=7)
    y = routed(RouterSpec()).apply_monolithic(x, W13, W2, logits, "silu", apply_router_weight_on_input=True)
    expected = torch.zeros_like(x)
    for t in range(T):
        ids, weights = ROUTERS[0].by_hand(logits[t].tolist(), [], [], K)
        for e, w in zip(ids, weights, strict=True):
            expected[t] += through(w * x[t], e)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-12)


def test_a_routed_kernel_rounds_its_inputs() -> None:
    """It gets tokens as they are, rounds them, and gives what the loop inside gives."""
    scheme = quant.QuantSpec(*[str(quant.INT8_CHANNEL)] * 2, *[str(quant.INT8_TOKEN)] * 2)
    codes = [quantise(w, quant.INT8_CHANNEL) for w in (W13, W2)]
    chosen = int8_w8a8_moe_quant_config(*(q.scale for q in codes), per_act_token_quant=True)  # type: ignore[arg-type]
    x, logits = normal(T, H, seed=6), normal(T, E, seed=7)
    spec = MoESpec(K, EXPERT, router=RouterSpec(), quant=scheme)
    kernels = [routed(None, chosen, config=dict(spec=s)) for s in (spec, replace(spec, quant=quant.QuantSpec()))]
    first, second = (k.apply_monolithic(x, *(q.codes for q in codes), logits, "silu") for k in kernels)
    assert torch.equal(first, second), "the configuration says what the spec says"
    exact = by_hand(ROUTERS[0], x, logits)
    assert 1e-4 < float((first - exact).norm() / exact.norm()) < 0.05


# --- what classes say of themselves


def classes(*names: str) -> list[Any]:
    return [kernel(name).experts for name in names]


def test_queries() -> None:
    loop, grouped, batches, whole = classes("sorted_loop", "torch_grouped", "batched_loop", "routed_loop")
    parallel = FusedMoEParallelConfig.make(2, 2, use_ep=True)
    low_latency = replace(parallel, all2all_backend="deepep_low_latency")
    kinds, formats = RoutingMethodType, FusedMoEActivationFormat
    assert [c.activation_format() for c in (loop, batches, whole)] == [
        formats.Standard,
        formats.BatchedExperts,
        formats.Standard,
    ]
    for c in (loop, grouped, batches, whole):
        assert c._supports_current_device()
        assert c._supports_no_act_and_mul()
        for activation in ("silu", "gelu_tanh", "swigluoai", "relu2_no_mul", "silu_no_mul", "tanh_no_mul"):
            assert c._supports_activation(activation), activation
        assert not c._supports_activation("sliu")
        assert not c._supports_activation("sliu_no_mul")
        assert c._supports_quant_scheme(None, None)
        assert c._supports_quant_scheme(quant.FP8_BLOCK, quant.FP8_GROUP) == (c is not grouped)
        assert c._supports_parallel_config(FusedMoEParallelConfig())
        assert c._supports_parallel_config(parallel) == (c is not batches)
        assert c._supports_parallel_config(low_latency) == (c is batches)
        assert c._supports_routing_method(kinds.DeepSeekV3, None, None)
        assert c._supports_router_logits_dtype(torch.bfloat16, kinds.Default)
        assert c._supports_router_logits_dtype(None, kinds.Default)
        assert c._supports_router_logits_dtype(torch.int32) == (c is not whole)
        assert c._supports_shape(24)
        assert c._supports_shape(25) == (c is not grouped)
    assert not loop._supports_quant_scheme(quant.FP8_TENSOR, quant.FP8_DYNAMIC)
    assert kernel("reference").experts._supports_quant_scheme(quant.FP8_TENSOR, quant.FP8_DYNAMIC)


@pytest.mark.parametrize(
    ("changes", "scheme", "form", "reason"),
    [
        ({}, (None, None), "Standard", None),
        (dict(in_dtype=torch.float32), (None, None), "Standard", "veto.dtype"),
        (dict(hidden_dim=20), (None, None), "Standard", "veto.shape: hidden=20"),
        ({}, (quant.FP8_TENSOR, None), "Standard", "veto.scheme"),
        ({}, (None, None), "BatchedExperts", "veto.format"),
        (dict(batch_invariant=True), (None, None), "Standard", "veto.invariance"),
        (dict(is_lora_enabled=True), (None, None), "Standard", "veto.lora"),
    ],
)
def test_is_supported_config(changes: dict[str, Any], scheme: Any, form: str, reason: str | None) -> None:
    given: dict[str, Any] = dict(num_experts=E, experts_per_token=K, hidden_dim=H, num_local_experts=E)
    config = FusedMoEConfig(**(given | dict(intermediate_size=16) | changes))
    made = kernel("torch_grouped").experts
    able, why = made.is_supported_config(config, *scheme, FusedMoEActivationFormat[form])
    assert able == (reason is None)
    assert why is None if reason is None else reason in str(why)


def test_every_reason_is_given() -> None:
    config = FusedMoEConfig(E, K, 20, E, in_dtype=torch.float32, intermediate_size=I, is_lora_enabled=True)
    _, why = kernel("torch_grouped").experts.is_supported_config(config, int_group(4, 32), None)
    for code in ("veto.dtype", "veto.shape", "veto.lora", "veto.scheme"):
        assert code in str(why)


def test_sizes_of_experts() -> None:
    loop = kernel("sorted_loop").experts(FusedMoEConfig(E, K, H, E, in_dtype=torch.bfloat16, intermediate_size=I))
    assert (loop.adjust_N_for_activation(24, "silu"), loop.adjust_N_for_activation(24, "relu2_no_mul")) == (12, 24)
    assert loop.moe_problem_size(normal(T, H), W13, W2, torch.zeros(T, K)) == (E, T, 2 * I, H, K)
    assert loop.moe_problem_size(normal(T, H), (W13, W13), W2, torch.zeros(T, K))[2] == 4 * I
    assert loop.workspace_dtype(torch.float32) == torch.bfloat16
    assert loop.workspace_shapes(100, 2 * I, H, K, E, E, None, "silu") == ((200, H), (200, 2 * I), (100, H))
    assert loop.workspace_shapes(10_000, 2 * I, H, K, E, E, None, "silu")[1] == (256 + 2048, 2 * I)
    assert loop.finalize_weight_and_reduce_impl() == TopKWeightAndReduceNoOP()
    assert loop.supports_expert_map()
    assert not loop.supports_packed_ue8m0_act_scales()
    assert not loop.expects_unquantized_inputs
    codes = fp8_w8a8_moe_quant_config(torch.ones(E, 1, 1), torch.ones(E, 1, 1), per_act_token_quant=True)
    rounding = kernel("sorted_loop").experts(FusedMoEConfig(E, K, H, E), codes)
    assert rounding.expects_unquantized_inputs
    with pytest.raises(MoEFxRuntimeError, match="quantised already"):
        applied(loop, normal(T, H), None, a1q_scale=torch.ones(T, 1))
