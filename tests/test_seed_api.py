"""The public names of the modular kernel and its oracle, walked by hand from SEED-API §1 to §5: each can be imported,
has a docstring, and takes the arguments that the page states, in its order."""

from __future__ import annotations

import inspect
import subprocess
import sys
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

import pytest
import torch

import moe_fx.kernels as kernels
import moe_fx.oracle as oracle
from moe_fx.kernels.config import FusedMoEQuantConfig
from moe_fx.oracle import fp8, unquantized
from moe_fx.reasons import MoEFxOptionError

QUANT_PROPERTIES = """quant_dtype is_quantized is_per_act_token per_act_token_quant per_out_ch_quant is_per_tensor
block_shape is_block_quantized a1_scale a1_gscale a2_scale a2_gscale w1_scale w1_zp w1_bias w1_precision g1_alphas
w2_scale w2_zp w2_bias w2_precision g2_alphas use_fp8_w8a8 use_int8_w8a8 use_int8_w8a16 use_int4_w4a16 ocp_mx_scheme
use_mxfp4_w4a16 use_nvfp4_w4a4"""
PARALLEL_FIELDS = "tp_size dp_size ep_size tp_rank dp_rank ep_rank use_ep"
PARALLEL_PROPERTIES = """use_all2all_kernels use_pplx_kernels use_deepep_ht_kernels use_deepep_ll_kernels
use_batched_activation_format"""
CONFIG_FIELDS = """num_experts experts_per_token hidden_dim num_local_experts moe_parallel_config in_dtype
max_num_tokens has_bias activation routing_method is_lora_enabled moe_backend"""
PREPARE = """a1 topk_weights topk_ids num_experts expert_map apply_router_weight_on_input quant_config
defer_input_quant"""
FINALIZE = """output fused_expert_output topk_weights topk_ids apply_router_weight_on_input
weight_and_reduce_impl"""
APPLY = """output hidden_states w1 w2 topk_weights topk_ids activation global_num_experts expert_map a1q_scale a2_scale
workspace13 workspace2 expert_tokens_meta apply_router_weight_on_input"""
MONOLITHIC = """hidden_states w1 w2 router_logits activation global_num_experts expert_map a1q_scale
apply_router_weight_on_input num_expert_group e_score_correction_bias routed_scaling_factor topk_group"""
WORKSPACES = """M N K topk global_num_experts local_num_experts expert_tokens_meta activation"""
SCALES = "w1_scale w2_scale"

# name in moe_fx.kernels → the arguments of its call, in order; more may follow
CALLS = {
    "FusedMoEQuantDesc": "dtype shape scale alpha_or_gscale zp bias",
    "FusedMoEQuantConfig": "_a1 _a2 _w1 _w2",
    "FusedMoEQuantConfig.config_name": "self dtype",
    "FusedMoEQuantConfig.scale_shape": "self max_tokens hidden_dim",
    "FusedMoEQuantConfig.batched_scale_shape": "self num_experts max_tokens hidden_dim",
    "FusedMoEQuantConfig.make": "",
    "fp8_w8a8_moe_quant_config": SCALES,
    "fp8_w8a16_moe_quant_config": SCALES,
    "int8_w8a8_moe_quant_config": SCALES,
    "int8_w8a16_moe_quant_config": f"{SCALES} w1_zp w2_zp",
    "int4_w4a16_moe_quant_config": f"{SCALES} w1_zp w2_zp",
    "mxfp4_w4a16_moe_quant_config": SCALES,
    "ocp_mx_moe_quant_config": f"quant_dtype {SCALES}",
    "nvfp4_moe_quant_config": f"g1_alphas g2_alphas a1_gscale a2_gscale {SCALES}",
    "biased_moe_quant_config": "w1_bias w2_bias",
    "FusedMoEParallelConfig": PARALLEL_FIELDS,
    "FusedMoEParallelConfig.make": "tp_size dp_size",
    "FusedMoEConfig": CONFIG_FIELDS,
    "ExpertTokensMetadata": "expert_num_tokens expert_num_tokens_cpu",
    "FusedMoEPrepareAndFinalize.max_num_tokens_per_rank": "self",
    "FusedMoEPrepareAndFinalize.topk_indices_dtype": "self",
    "FusedMoEPrepareAndFinalize.num_dispatchers": "self",
    "FusedMoEPrepareAndFinalize.output_is_reduced": "self",
    "FusedMoEPrepareAndFinalize.supports_async": "self",
    "FusedMoEPrepareAndFinalize.post_init_setup": "self experts",
    "FusedMoEPrepareAndFinalizeModular.prepare": f"self {PREPARE}",
    "FusedMoEPrepareAndFinalizeModular.prepare_async": f"self {PREPARE}",
    "FusedMoEPrepareAndFinalizeModular.finalize": f"self {FINALIZE}",
    "FusedMoEPrepareAndFinalizeModular.finalize_async": f"self {FINALIZE}",
    "FusedMoEPrepareAndFinalizeMonolithic.prepare": "self a1 router_logits quant_config defer_input_quant",
    "FusedMoEPrepareAndFinalizeMonolithic.finalize": "self fused_expert_output",
    "FusedMoEExperts.is_supported_config": "moe_config",
    "FusedMoEExperts.make_standard_experts": "moe_config quant_config",
    "FusedMoEExperts.make_batched_experts": "moe_config quant_config max_num_tokens num_dispatchers",
    "FusedMoEExperts._supports_current_device": "",
    "FusedMoEExperts._supports_no_act_and_mul": "",
    "FusedMoEExperts._supports_activation": "activation",
    "FusedMoEExperts._supports_quant_scheme": "weight_key activation_key",
    "FusedMoEExperts._supports_parallel_config": "moe_parallel_config",
    "FusedMoEExperts._supports_routing_method": "routing_method",
    "FusedMoEExperts._supports_router_logits_dtype": "router_logits_dtype",
    "FusedMoEExperts._supports_shape": "hidden_dim",
    "FusedMoEExperts.activation_format": "",
    "FusedMoEExperts.supports_chunking": "self",
    "FusedMoEExperts.supports_expert_map": "self",
    "FusedMoEExperts.supports_packed_ue8m0_act_scales": "self",
    "FusedMoEExpertsModular.workspace_shapes": f"self {WORKSPACES}",
    "FusedMoEExpertsModular.workspace_dtype": "self act_dtype",
    "FusedMoEExpertsModular.moe_problem_size": "self a1 w1 w2 topk_ids",
    "FusedMoEExpertsModular.adjust_N_for_activation": "self N activation",
    "FusedMoEExpertsModular.finalize_weight_and_reduce_impl": "self",
    "FusedMoEExpertsModular.apply": f"self {APPLY}",
    "FusedMoEExpertsMonolithic.apply": f"self {MONOLITHIC}",
    "FusedMoEKernel": "prepare_finalize experts shared_experts",
    "FusedMoEKernel.apply": """self hidden_states w1 w2 topk_ids topk_weights activation global_num_experts expert_map
        apply_router_weight_on_input shared_experts_input""",
    "FusedMoEKernelModularImpl._allocate_buffers": "self",
    "FusedMoEKernelModularImpl._chunk_info": "self",
    "FusedMoEKernelModularImpl._prepare": "self",
    "FusedMoEKernelModularImpl._fused_experts": "self",
    "FusedMoEKernelModularImpl._finalize": "self",
    "FusedMoEKernelMonolithicImpl": "",
    "TopKWeightAndReduce.apply": "self output fused_expert_output topk_weights topk_ids apply_router_weight_on_input",
    "TopKWeightAndReduceNoOP": "",
    "TopKWeightAndReduceContiguous": "",
    "TopKWeightAndReduceNaiveBatched": "rank",
    "TopKWeightAndReduceDelegate": "",
}
# the scheme's own arguments, anywhere in the call
ALSO = {
    "fp8_w8a8_moe_quant_config": """a1_scale a2_scale per_act_token_quant per_out_ch_quant block_shape a1_gscale
        a2_gscale g1_alphas g2_alphas""",
    "int8_w8a8_moe_quant_config": "a1_scale a2_scale per_act_token_quant",
    "int8_w8a16_moe_quant_config": "block_shape",
    "int4_w4a16_moe_quant_config": "block_shape",
    "mxfp4_w4a16_moe_quant_config": "w1_bias w2_bias",
    "ocp_mx_moe_quant_config": "weight_dtype",
    "FusedMoEQuantConfig.make": f"quant_dtype per_act_token_quant per_out_ch_quant block_shape {SCALES}",
    "FusedMoEParallelConfig.make": "tp_rank dp_rank use_ep",
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "FusedMoEKernel": dict(shared_experts=None),
    "FusedMoEKernel.apply": dict(
        global_num_experts=-1, expert_map=None, apply_router_weight_on_input=False, shared_experts_input=None
    ),
}
ABSTRACT = {
    "FusedMoEPrepareAndFinalize", "FusedMoEPrepareAndFinalizeModular", "FusedMoEPrepareAndFinalizeMonolithic",
    "FusedMoEExpertsModular", "FusedMoEExpertsMonolithic", "TopKWeightAndReduce",
}  # fmt: skip


def found(package: Any, path: str) -> Any:
    """The object at "Name" or "Class.method" of the package's public names."""
    first, *rest = path.split(".")
    assert first in package.__all__, f"{first} is no public name of {package.__name__}"
    thing = getattr(package, first)
    for name in rest:
        thing = getattr(thing, name)
    return thing


def arguments(thing: Any) -> list[str]:
    return list(inspect.signature(thing).parameters)


def documented(path: str, package: Any) -> bool:
    """It has a docstring, and not the one that a dataclass makes."""
    thing = found(package, path)
    text = inspect.getdoc(thing) or ""
    generated = is_dataclass(thing) and text.startswith(f"{path}(")
    return bool(text) and not generated


# --- §1 and §2


@pytest.mark.parametrize("path", CALLS)
def test_calls_take_the_stated_arguments(path: str) -> None:
    stated, given = CALLS[path].split(), arguments(found(kernels, path))
    assert given[: len(stated)] == stated
    assert set(ALSO.get(path, "").split()) <= set(given)
    parameters = inspect.signature(found(kernels, path)).parameters
    for name, default in DEFAULTS.get(path, {}).items():
        assert parameters[name].default == default


@pytest.mark.parametrize("path", CALLS)
def test_calls_have_docstrings(path: str) -> None:
    assert documented(path, kernels), path


@pytest.mark.parametrize("name", sorted(ABSTRACT))
def test_abstract_ones_are(name: str) -> None:
    with pytest.raises(TypeError, match="abstract"):
        found(kernels, name)()


def test_experts_are_abstract() -> None:
    """They have two kinds; the base class has what both share."""
    base = found(kernels, "FusedMoEExperts")
    for kind in ("FusedMoEExpertsModular", "FusedMoEExpertsMonolithic"):
        assert issubclass(found(kernels, kind), base)
        assert inspect.isabstract(found(kernels, kind))


def test_properties() -> None:
    config = found(kernels, "FusedMoEQuantConfig")
    for name in QUANT_PROPERTIES.split():
        assert isinstance(getattr(config, name), property), name
    parallel, layer = found(kernels, "FusedMoEParallelConfig"), found(kernels, "FusedMoEConfig")
    for name in PARALLEL_PROPERTIES.split():
        assert isinstance(getattr(parallel, name), property), name
    passed = [*PARALLEL_FIELDS.split(), "use_pplx_kernels", "use_deepep_ht_kernels", "use_deepep_ll_kernels"]
    for name in passed:
        assert isinstance(getattr(layer, name), property), name
    assert isinstance(found(kernels, "FusedMoEExperts.expects_unquantized_inputs"), property)
    assert isinstance(found(kernels, "FusedMoEPrepareAndFinalize.activation_format"), property)


def test_values() -> None:
    plain = found(kernels, "FUSED_MOE_UNQUANTIZED_CONFIG")
    assert isinstance(plain, FusedMoEQuantConfig)
    assert plain == FusedMoEQuantConfig.make()
    kinds = found(kernels, "FusedMoEActivationFormat")
    assert [kind.name for kind in kinds] == ["Standard", "BatchedExperts"]
    assert tuple(found(kernels, "GroupShape")(-1, 128)) == (-1, 128)
    for text in ("nvfp4", "mxfp4", "mxfp6_e3m2", "mxfp6_e2m3", "int4", torch.int8, torch.float8_e4m3fn, None):
        assert found(kernels, "FusedMoEQuantDesc")(text).dtype == text


def test_every_public_name_is_there() -> None:
    for package in (kernels, oracle):
        assert set(package.__all__) <= set(dir(package))
        for name in package.__all__:
            assert getattr(package, name) is not None
    named = {path.split(".")[0] for path in CALLS} | {
        "FUSED_MOE_UNQUANTIZED_CONFIG", "FusedMoEActivationFormat", "GroupShape", "RoutingMethodType",
    }  # fmt: skip
    assert named <= set(kernels.__all__)
    with pytest.raises(AttributeError, match="no attribute 'FusedMoE'"):
        kernels.FusedMoE  # noqa: B018


def test_names_load_on_first_use() -> None:
    code = (
        "import sys, moe_fx.kernels as k; heavy = [m for m in sys.modules if m.startswith('moe_fx.kernels.')];"
        "k.FusedMoEParallelConfig; print(heavy, 'moe_fx.kernels.modular_kernel' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[] False", done.stderr


# --- §3 and §4

FP8_BACKENDS = """NONE FLASHINFER_TRTLLM FLASHINFER_CUTLASS DEEPGEMM BATCHED_DEEPGEMM MARLIN TRITON BATCHED_TRITON AITER
VLLM_CUTLASS"""
PLAIN_BACKENDS = "FLASHINFER_TRTLLM FLASHINFER_CUTLASS AITER TRITON BATCHED_TRITON CPU XPU TPU OOT"
# the page's room and name → arguments; both rooms have a backend_2_kernel_cls, so the package itself exports neither
ORACLE = {
    (fp8, "backend_2_kernel_cls"): "backend",
    (fp8, "select_fp8_moe_backend"): "config weight_key activation_key allow_vllm_cutlass",
    (fp8, "convert_to_fp8_moe_kernel_format"): """backend layer w13 w2 w13_scale w2_scale w13_input_scale
        w2_input_scale""",
    (fp8, "make_fp8_moe_quant_config"): """backend w1_scale w2_scale a1_scale a2_scale block_shape per_act_token_quant
        per_out_ch_quant""",
    (fp8, "make_fp8_moe_kernel"): "",
    (unquantized, "map_unquantized_backend"): "name",
    (unquantized, "select_unquantized_moe_backend"): "moe_config use_ep use_dp",
}


@pytest.mark.parametrize("room, name", ORACLE)
def test_the_oracle_s_calls(room: Any, name: str) -> None:
    call = getattr(room, name)
    stated, given = ORACLE[room, name].split(), arguments(call)
    assert given[: len(stated)] == stated
    assert inspect.getdoc(call)


@pytest.mark.parametrize(
    ("kind", "members"),
    [(fp8.Fp8MoeBackend, FP8_BACKENDS), (unquantized.UnquantizedMoeBackend, PLAIN_BACKENDS)],
)
def test_the_oracle_s_backends(kind: type[Enum], members: str) -> None:
    """All of the page; later ones may have come."""
    assert {*members.split()} <= {member.name for member in kind}
    assert inspect.getdoc(kind)


def test_defaults_of_the_oracle() -> None:
    select = inspect.signature(fp8.select_fp8_moe_backend).parameters
    assert select["allow_vllm_cutlass"].default is False
    with pytest.raises(MoEFxOptionError, match=r"(?i)flashinfer_cutlass.*triton"):
        unquantized.map_unquantized_backend("no such backend")


# --- §5: the contract that a prepare/finalize across ranks implements


def test_a_prepare_finalize_of_another_kind_can_be_written() -> None:
    """By the abstract names alone; what is not abstract has a default."""
    modular = found(kernels, "FusedMoEPrepareAndFinalizeModular")
    abstract = {"activation_format", "max_num_tokens_per_rank", "topk_indices_dtype", "num_dispatchers"}
    assert modular.__abstractmethods__ == abstract | {"output_is_reduced", "prepare", "finalize"}
    made = type("Dispatch", (modular,), {name: lambda self, *_: None for name in modular.__abstractmethods__})()
    assert made.supports_async() is False
    assert made.post_init_setup(None) is None


def test_fields_of_configurations_are_frozen() -> None:
    for name in ("FusedMoEQuantDesc", "FusedMoEQuantConfig", "FusedMoEParallelConfig", "FusedMoEConfig"):
        kind = found(kernels, name)
        assert kind.__dataclass_params__.frozen
        assert all(f.init for f in fields(kind))
