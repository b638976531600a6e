"""Ranks and layers, and the names that libraries give to routers and activations, by hand from SEED-API §1."""

from __future__ import annotations

from dataclasses import fields
from itertools import product
from typing import Any

import pytest
import torch

from moe_fx.kernels.config import (
    ALL2ALL_BACKENDS,
    FusedMoEConfig,
    FusedMoEParallelConfig,
    RoutingMethodType,
    activation_name,
    routing_method,
)
from moe_fx.reasons import MoEFxOptionError
from moe_fx.reference import ACTIVATIONS
from moe_fx.spec import ExpertSpec, MoESpec, RouterSpec

# --- ranks


def ranks(tp: int, dp: int) -> list[tuple[int, int]]:
    return list(product(range(dp), range(tp)))  # data parallelism is outermost


# (TP, DP, experts whole) → for every rank (tp, dp, ep) as (size, rank): the six examples of the page, by hand
EXAMPLES: dict[tuple[int, int, bool], list[tuple[tuple[int, int], tuple[int, int], tuple[int, int]]]] = {
    (2, 1, False): [((2, 0), (1, 0), (1, 0)), ((2, 1), (1, 0), (1, 0))],
    (1, 2, False): [((2, 0), (2, 0), (1, 0)), ((2, 1), (2, 1), (1, 0))],
    (2, 2, False): [
        ((4, 0), (2, 0), (1, 0)),
        ((4, 1), (2, 0), (1, 0)),
        ((4, 2), (2, 1), (1, 0)),
        ((4, 3), (2, 1), (1, 0)),
    ],
    (2, 1, True): [((1, 0), (1, 0), (2, 0)), ((1, 0), (1, 0), (2, 1))],
    (1, 2, True): [((1, 0), (2, 0), (2, 0)), ((1, 0), (2, 1), (2, 1))],
    (2, 2, True): [
        ((1, 0), (2, 0), (4, 0)),
        ((1, 0), (2, 0), (4, 1)),
        ((1, 0), (2, 1), (4, 2)),
        ((1, 0), (2, 1), (4, 3)),
    ],
}


def pairs(config: FusedMoEParallelConfig) -> tuple[tuple[int, int], ...]:
    return (
        (config.tp_size, config.tp_rank),
        (config.dp_size, config.dp_rank),
        (config.ep_size, config.ep_rank),
    )


@pytest.mark.parametrize("example", EXAMPLES, ids=str)
def test_parallel_examples(example: tuple[int, int, bool]) -> None:
    tp, dp, whole = example
    found = [FusedMoEParallelConfig.make(tp, dp, tp_rank, dp_rank, whole) for dp_rank, tp_rank in ranks(tp, dp)]
    assert [pairs(config) for config in found] == EXAMPLES[example]
    assert all(config.use_ep == whole for config in found)
    assert all(config.use_all2all_kernels == (whole and dp > 1) for config in found)


def test_one_rank_has_no_expert_parallelism() -> None:
    config = FusedMoEParallelConfig.make(1, 1, use_ep=True)
    assert config == FusedMoEParallelConfig()
    assert not config.use_ep


BY_BACKEND = {
    "pplx": ("use_pplx_kernels", True),
    "deepep_high_throughput": ("use_deepep_ht_kernels", False),
    "deepep_low_latency": ("use_deepep_ll_kernels", True),
    "naive": (None, False),
    "allgather_reducescatter": (None, False),
    "torch_all2all": (None, False),
}
FLAGS = ("use_pplx_kernels", "use_deepep_ht_kernels", "use_deepep_ll_kernels")


@pytest.mark.parametrize("backend", BY_BACKEND)
@pytest.mark.parametrize(("dp", "whole"), [(2, True), (1, True), (2, False)])
def test_use_flags(backend: str, dp: int, whole: bool) -> None:
    """A backend is used only where tokens travel."""
    assert backend in ALL2ALL_BACKENDS
    config = FusedMoEParallelConfig.make(2, dp, use_ep=whole, all2all_backend=backend)
    travels, (flag, batched) = dp > 1 and whole, BY_BACKEND[backend]
    assert {f: getattr(config, f) for f in FLAGS} == {f: travels and f == flag for f in FLAGS}
    assert config.use_batched_activation_format == (travels and batched)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(tp_size=2, tp_rank=2), "tp_rank=2 is not a rank of tp_size=2"),
        (dict(dp_size=0), "dp_rank=0 is not a rank of dp_size=0"),
        (dict(ep_size=4, ep_rank=-1), "ep_rank=-1"),
        (dict(all2all_backend="carrier_pigeon"), "'carrier_pigeon' is not known; known: .*pplx"),
    ],
)
def test_wrong_ranks(given: dict[str, Any], message: str) -> None:
    with pytest.raises(MoEFxOptionError, match=message):
        FusedMoEParallelConfig(**given)


def test_make_checks_the_ranks_it_is_given() -> None:
    with pytest.raises(MoEFxOptionError, match="tp_rank=3 is not a rank of tp_size=2"):
        FusedMoEParallelConfig.make(2, 2, tp_rank=3, use_ep=True)


# --- layers


def layer(**changes: Any) -> FusedMoEConfig:
    given: dict[str, Any] = dict(num_experts=8, experts_per_token=2, hidden_dim=16, num_local_experts=4)
    return FusedMoEConfig(**(given | changes))


@pytest.mark.parametrize(
    "name", ["num_experts", "experts_per_token", "hidden_dim", "num_local_experts", "max_num_tokens"]
)
@pytest.mark.parametrize("value", [0, -3])
def test_sizes_are_positive(name: str, value: int) -> None:
    with pytest.raises(MoEFxOptionError, match=f"{name} must be positive, got {value}"):
        layer(**{name: value})


def test_an_unknown_activation_lists_the_known() -> None:
    with pytest.raises(MoEFxOptionError, match="'sliu' is not one of silu, gelu"):
        layer(activation="sliu")


def test_a_layer_passes_its_ranks_through() -> None:
    parallel = FusedMoEParallelConfig(2, 3, 4, 1, 2, 3, True, "deepep_low_latency")
    config = layer(moe_parallel_config=parallel)
    own = [f.name for f in fields(FusedMoEParallelConfig) if f.name != "all2all_backend"]
    for name in (*own, *FLAGS):
        assert getattr(config, name) == getattr(parallel, name), name
    assert (config.use_deepep_ll_kernels, config.use_pplx_kernels) == (True, False)


def test_mathematics_of_the_fields() -> None:
    config = layer(activation="swigluoai", has_bias=True, intermediate_size=24)
    expert = ExpertSpec(4, 16, 24, "swiglu_oai", (1.702, 7.0), True, True, True)
    assert config.mathematics == MoESpec(2, expert)
    assert config.is_act_and_mul
    assert not layer(activation="relu2_no_mul").is_act_and_mul


def test_a_layer_of_a_spec() -> None:
    spec = MoESpec(2, ExpertSpec(8, 16, 24, "relu2", gated=False, w2_bias=True), router=RouterSpec(renormalise=True))
    config = FusedMoEConfig.of(spec, torch.float16, max_num_tokens=5)
    assert config.mathematics is spec
    assert (config.num_experts, config.num_local_experts, config.experts_per_token) == (8, 8, 2)
    assert (config.hidden_dim, config.intermediate_size, config.in_dtype) == (16, 24, torch.float16)
    assert (config.has_bias, config.activation, config.max_num_tokens) == (True, "relu2_no_mul", 5)
    assert config.routing_method is RoutingMethodType.RenormalizeNaive


# --- names of libraries

SIGMOID = dict(score="sigmoid", bias="scores", renormalise=True, sorted=False)
GROUPED = dict(groups=8, topk_groups=4, group_score="top2_sum", group_fill=0.0)
# model → (its router, k, the number that libraries know it by); from the models' own code (HF-MOE.md)
ROUTERS: dict[str, tuple[RouterSpec | None, int, str]] = {
    "mixtral": (RouterSpec(renormalise=True, score_dtype="float32"), 2, "RenormalizeNaive"),
    "qwen3": (RouterSpec(renormalise=True, score_dtype="float32", weight_dtype="bfloat16"), 8, "RenormalizeNaive"),
    "olmoe": (RouterSpec(score_dtype="float32"), 8, "Default"),
    "gpt-oss": (RouterSpec(order="topk_first"), 4, "Renormalize"),
    "granite": (RouterSpec(order="topk_first", score_dtype="float32"), 8, "Renormalize"),
    "llama4": (RouterSpec("sigmoid", "topk_first", score_dtype="float32"), 1, "Llama4"),
    "deepseek-v3": (RouterSpec(**SIGMOID, **GROUPED, scale=2.5, eps=1e-20), 8, "DeepSeekV3"),  # type: ignore[arg-type]
    "glm-4.5": (RouterSpec(**SIGMOID, scale=2.5, eps=1e-20), 8, "DeepSeekV3"),  # type: ignore[arg-type]
    "minimax-m2": (RouterSpec(**SIGMOID), 8, "MiniMax2"),  # type: ignore[arg-type]
    "sigmoid": (RouterSpec("sigmoid"), 4, "Sigmoid"),
    "sigmoid renormalised": (RouterSpec("sigmoid", renormalise=True), 4, "SigmoidRenorm"),
    "deepseek-v2": (RouterSpec(groups=8, topk_groups=3, weights_from="masked", scale=16.0), 6, "Unspecified"),
    "ernie": (RouterSpec(bias="scores", renormalise=True, eps=1e-12, eps_form="clamp"), 6, "Unspecified"),
    "gemma4": (RouterSpec(renormalise=True, expert_scale=True), 8, "Unspecified"),
    "deepseek-v4": (RouterSpec("sqrtsoftplus", bias="scores", renormalise=True, scale=1.5), 6, "Unspecified"),
    "sigmoid after top-2": (RouterSpec("sigmoid", "topk_first"), 2, "Unspecified"),
    "groups by their best": (
        RouterSpec(**SIGMOID, groups=8, topk_groups=4, group_score="max", scale=2.5),  # type: ignore[arg-type]
        8,
        "Unspecified",
    ),
    "none": (None, 2, "Unspecified"),
}


@pytest.mark.parametrize("model", ROUTERS)
def test_routing_methods(model: str) -> None:
    router, top_k, expected = ROUTERS[model]
    assert routing_method(router, top_k).name == expected


def test_numbers_of_routers() -> None:
    """Libraries pass them as integers."""
    known = dict(Default=0, Renormalize=1, DeepSeekV3=2, Llama4=3, RenormalizeNaive=4, TopK=5, SigmoidRenorm=6)
    known |= dict(MiniMax2=7, Sigmoid=8)
    assert {kind.name: kind.value for kind in RoutingMethodType if kind.name != "Unspecified"} == known


ACTIVATION_NAMES = {
    ("silu", True): "silu", ("gelu", True): "gelu", ("gelu_tanh", True): "gelu_tanh",
    ("swiglu_oai", True): "swigluoai", ("swiglu_step", True): "swiglustep",
    ("silu", False): "silu_no_mul", ("gelu", False): "gelu_no_mul", ("gelu_tanh", False): "gelu_tanh_no_mul",
    ("relu2", False): "relu2_no_mul", ("relu", False): "relu_no_mul",
}  # fmt: skip


def test_activation_names() -> None:
    for act, gated in ACTIVATIONS:
        own = act if gated else f"{act}_no_mul"
        assert activation_name(ExpertSpec(4, 8, 8, act, gated=gated)) == ACTIVATION_NAMES.get((act, gated), own)
    names = [activation_name(ExpertSpec(4, 8, 8, act, gated=gated)) for act, gated in ACTIVATIONS]
    assert len(set(names)) == len(names)
