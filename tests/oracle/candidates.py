"""A described, fixed candidate set and the shapes of real models: nothing here changes when kernels arrive.

The costs are plausible, not measured; they are chosen so that every rule of the ladder and every weight traffic is met.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from moe_fx.binding import Operand, WeightBinding
from moe_fx.kernels.capability import Capability, Open
from moe_fx.kernels.experts.torch_experts import TorchExperts
from moe_fx.kernels.registry import Cost, Kernel, touched
from moe_fx.spec import CombineSpec, ExpertSpec, MoESpec

ANY = frozenset({"", "float16", "bfloat16", "float32", "float64"})
FLOATS = ANY - {""}
NARROW = frozenset({""})
ALL_ACTS = frozenset({"silu", "gelu", "gelu_tanh", "relu", "relu2", "swiglu_oai", "swiglu_clamp", "swiglu_step"})
FORMS = frozenset({"stacked", "flat", "list"})


def capability(**changes: Any) -> Capability:
    """All that plain PyTorch can do, less ``changes``."""
    everything: dict[str, Any] = dict(
        devices=frozenset({"cpu", "cuda", "rocm", "xpu"}),
        dtypes=FLOATS,
        activations=ALL_ACTS,
        forms=FORMS,
        biases=True,
        norms=frozenset({"", "rms", "rms_plus_one", "rms_input_scaled"}),
        weight_on=frozenset({"output", "input"}),
        act_dtypes=ANY,
        compute_dtypes=ANY,
        accumulate=ANY,
        out_dtypes=ANY,
        backward="save",
    )
    return Capability(**(everything | changes))


def described(name: str, rank: int, cost: Cost, **changes: Any) -> Kernel:
    return Kernel(name, TorchExperts, capability(**changes), cost, rank)


KERNELS: dict[str, Kernel] = {
    kernel.name: kernel
    for kernel in (
        described(
            "reference",
            100,
            Cost("active", lambda E, T, k: 20 * E, ((1, 0.02), (64, 0.3))),
            **{f.name: Open() for f in fields(Capability) if str(f.type) == "frozenset[str]" and f.name != "packages"},
        ),
        described(
            "loop", 50, Cost("active", lambda E, T, k: 10 + 8 * touched(E, T, k), ((1, 0.04), (16, 0.3), (256, 0.9)))
        ),
        described(
            "grouped",
            20,
            Cost("active", lambda E, T, k: 14, ((1, 0.02), (16, 0.25), (64, 0.6), (256, 0.8))),
            dtypes=frozenset({"bfloat16", "float32"}),
            forms=frozenset({"stacked", "flat"}),
            packages=frozenset({"torch.grouped_mm"}),
            size_multiple=8,
        ),
        described(
            "gather",
            40,
            Cost("per_row", lambda E, T, k: 8, ((1, 0.2),)),
            forms=frozenset({"stacked", "flat"}),
            weight_on=frozenset({"output"}),
        ),
        described(
            "fused_gpu",
            10,
            Cost("active", lambda E, T, k: 5, ((1, 0.03), (16, 0.35), (64, 0.65), (256, 0.75))),
            devices=frozenset({"cuda", "rocm", "xpu"}),
            dtypes=frozenset({"bfloat16", "float16"}),
            activations=frozenset({"silu", "gelu", "gelu_tanh", "swiglu_oai"}),
            forms=frozenset({"stacked"}),
            norms=NARROW,
            act_dtypes=NARROW,
            compute_dtypes=NARROW,
            packages=frozenset({"triton"}),
            gated=frozenset({True}),
        ),
        described(
            "fused_cpu",
            10,
            Cost("active", lambda E, T, k: 3, ((1, 0.05), (4, 0.2), (16, 0.5), (256, 0.85))),
            devices=frozenset({"cpu"}),
            dtypes=frozenset({"bfloat16", "float32"}),
            activations=frozenset({"silu", "gelu", "swiglu_oai"}),
            forms=frozenset({"stacked"}),
            biases=False,
            norms=NARROW,
            act_dtypes=NARROW,
            compute_dtypes=NARROW,
            accumulate=frozenset({"", "float32"}),
            backward="",
        ),
        described(
            "inlined",
            30,
            Cost("gathered", lambda E, T, k: 0, ((1, 0.3),)),
            forms=frozenset({"stacked", "flat"}),
            transposed=frozenset({False}),
            backward="",
            compiled=True,
        ),
        described(
            "dense",
            60,
            Cost("all", lambda E, T, k: 9, ((1, 0.1), (64, 0.9))),
            devices=frozenset({"cpu", "cuda", "rocm", "xpu", "tpu"}),
            forms=frozenset({"stacked"}),
            norms=NARROW,
        ),
    )
}


def binding(*roles: str, form: str = "stacked", transposed: bool = False, order: str = "gate_up") -> WeightBinding:
    return WeightBinding(tuple(Operand(r, form, transposed, order) for r in roles))  # type: ignore[arg-type]


STACKED = binding("w13", "w2")
IN_OUT = binding("w13", "w2", transposed=True)


def moe(experts: int, k: int, hidden: int, inter: int, combine: CombineSpec | None = None, **expert: Any) -> MoESpec:
    return MoESpec(k, ExpertSpec(experts, hidden, inter, **expert), combine or CombineSpec())


# Sizes: config.json of the checkpoints named; storage: the classes of transformers 5.23 (HF-MOE.md).
MODELS: dict[str, tuple[MoESpec, WeightBinding]] = {
    "mixtral-8x7b": (moe(8, 2, 4096, 14336), STACKED),
    "qwen3-30b-a3b": (moe(128, 8, 2048, 768), STACKED),
    "olmoe-1b-7b": (moe(64, 8, 2048, 1024), STACKED),
    "gpt-oss-20b": (
        moe(32, 4, 2880, 2880, act="swiglu_oai", act_params=(1.702, 7.0), w13_bias=True, w2_bias=True),
        binding("w13", "w2", "w13_bias", "w2_bias", transposed=True, order="interleaved"),
    ),
    "deepseek-v3": (moe(256, 8, 7168, 2048, CombineSpec(accumulate="float32")), STACKED),
    "deepseek-v2-lite": (moe(64, 6, 2048, 1408), STACKED),
    "granite-3.0-1b": (moe(32, 8, 1024, 512), STACKED),
    "llama4-scout": (moe(16, 1, 5120, 8192, CombineSpec(weight_on="input")), IN_OUT),
    "jetmoe-8b": (moe(8, 2, 2048, 5632), STACKED),
    "aria": (moe(64, 6, 2560, 1664), IN_OUT),
    "phi-3.5-moe": (moe(16, 2, 4096, 6400), STACKED),
    "dbrx": (moe(16, 4, 6144, 10752), binding("w1", "w3", "w2", form="flat")),
    "nemotron-3-nano": (moe(128, 6, 2688, 1856, act="relu2", gated=False), binding("w1", "w2")),
    "switch-base-8": (moe(8, 1, 768, 2048, act="relu", gated=False), binding("w1", "w2", form="list")),
    "normed-experts": (moe(64, 4, 1024, 768, norm="rms", norm_eps=1e-6), binding("w13", "w2", "norm")),
}
