"""The zoo's catalogue: one entry per mixture-of-experts family of transformers 5.23, 75 in all.

Enters: nothing. Leaves: FAMILIES, name -> Family. Holds: router and experts classes are those of the table in
HF-MOE.md; `config` is what sets a family's tiny configuration apart from samples.COMMON; `moe_layers` is the exact
number of MoE blocks its tiny forward executes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Implementation = Literal["eager", "batched_mm", "grouped_mm"]
IMPLEMENTATIONS: tuple[Implementation, ...] = ("eager", "batched_mm", "grouped_mm")


@dataclass(frozen=True, slots=True)
class Family:
    """One row of HF-MOE.md and what a tiny model of it needs.

    name, router, experts: as in the table. model: the class of the smallest (sub)model that holds the MoE.
    config: overrides of samples.COMMON. folder: its place in transformers.models, the name unless said.
    inputs: which recipe of samples.py makes its inputs. moe_layers: MoE blocks one forward executes.
    experts_class: regular expression that the class name of a block's experts matches in full.
    settable: whether experts_implementation can be chosen.
    status, why: what the fusion pass owes it, and the reason when that is not all of it.
    default_waits: its chosen implementations must be fused, its own default may wait for Route B.
    """

    name: str
    router: str
    experts: str
    model: str
    config: Mapping[str, Any] = field(default_factory=dict)
    folder: str = ""
    inputs: Literal["tokens", "embeddings", "patches", "images"] = "tokens"
    moe_layers: int = 2
    experts_class: str = r"\w*Experts"
    settable: bool = True
    status: Literal["fuse", "route_b", "left_alone"] = "fuse"
    why: str = ""
    default_waits: bool = False

    @property
    def implementations(self) -> tuple[Implementation | None, ...]:
        """What `build` accepts as implementation: None, the family's own default, then those that can be chosen."""
        return (None, *IMPLEMENTATIONS) if self.settable else (None,)

    @property
    def python_module(self) -> str:
        """Dotted name of the modeling module."""
        folder = self.folder or self.name
        return f"transformers.models.{folder}.modeling_{folder}"


_GROUPS = dict(n_group=4, topk_group=2)  # group-limited routing that excludes something: half of 4 groups of 2 experts
_LOCAL = dict(layer_types=["sliding_attention", "full_attention"])
_LINEAR = dict(layer_types=["linear_attention", "full_attention"])
_SPARSE_ATTENTION = dict(layer_types=["linear_attention", "indexed_attention"])

_ENTRIES = (
    Family("afmoe", "G0", "E1", "AfmoeForCausalLM", dict(num_dense_layers=0, **_LOCAL)),
    Family("aria", "T1", "E1t", "AriaTextForCausalLM"),
    Family("axk1", "G1", "E1", "AXK1ForCausalLM", _GROUPS),
    Family("axk2", "G1", "E1", "AXK2ForCausalLM", _GROUPS),
    Family("bailing_hybrid", "G1", "E1", "BailingHybridForCausalLM", dict(num_expert_group=4, topk_group=2, **_LINEAR)),
    Family("beam", "G1", "E1f", "BeamForCausalLM", dict(**_GROUPS, **_LOCAL)),
    Family("cohere2_moe", "T1", "E1", "Cohere2MoeForCausalLM", dict(logit_scale=1.0)),
    Family(
        "dbrx", "S1p", "E3", "DbrxForCausalLM",
        dict(
            d_model=32, n_layers=2, n_heads=4, max_seq_len=128,
            attn_config=dict(kv_n_heads=2, rope_theta=1e4, clip_qkv=8.0),
            ffn_config=dict(hidden_size=32, ffn_hidden_size=24, moe_num_experts=8, moe_top_k=2),
        ),
        settable=False, status="route_b", why="a Python loop over experts, flat weights viewed per expert",
    ),
    Family("deepseek_ocr2", "S2", "E1", "DeepseekOcr2TextModel"),
    Family("deepseek_v2", "S2", "E1", "DeepseekV2ForCausalLM", dict(topk_method="group_limited_greedy", **_GROUPS)),
    Family("deepseek_v3", "G1", "E1", "DeepseekV3ForCausalLM", _GROUPS),
    Family("deepseek_v32", "G1", "E1", "DeepseekV32ForCausalLM", _GROUPS),
    Family(
        "deepseek_v4", "Q1", "E1c", "DeepseekV4ForCausalLM",
        dict(
            mlp_layer_types=["hash_moe", "moe"],
            layer_types=["heavily_compressed_attention", "compressed_sparse_attention"],
            compress_rates=dict(heavily_compressed_attention=8, compressed_sparse_attention=4),
            num_key_value_heads=1, partial_rotary_factor=0.5,
        ),
    ),
    Family("diffusion_gemma", "S1g", "E1a", "DiffusionGemmaEncoderTextModel", dict(global_head_dim=8, **_LOCAL)),
    Family(
        "doge", "PK", "E7", "DogeForCausalLM", dict(is_moe=True, num_experts=16), experts_class="DogeCDMoE",
        settable=False, status="left_alone",
        why="token t is routed by other tokens' logits: view(2, tokens, keys) scrambles them",
    ),
    Family("dots1", "G1", "E1", "Dots1ForCausalLM"),
    Family("dots3_note", "G1", "E1", "Dots3NoteForCausalLM"),
    Family(
        "dots3_note_vision", "G0", "E1", "Dots3NoteVisionModel",
        dict(pyramid_num_routed=[4, 8], patch_size=4, adapter_in_dim=32, adapter_out_dim=32),
        folder="dots3_note", inputs="patches",
    ),
    Family("ernie4_5_moe", "S3", "E1", "Ernie4_5_MoeForCausalLM", dict(moe_layer_start_index=0, moe_layer_end_index=1)),
    Family(
        "ernie4_5_vl_moe", "S3", "E1", "Ernie4_5_VLMoeTextModel",
        dict(
            moe_intermediate_size=[24, 16],
            rope_parameters=dict(rope_type="default", rope_theta=5e5, mrope_section=[1, 1, 2]),
        ),
    ),
    Family("exaone_moe", "G1", "E1", "ExaoneMoeForCausalLM"),
    Family("flex_olmo", "S1", "E1", "FlexOlmoForCausalLM"),
    Family("flint", "G0", "E1", "FlintForCausalLM", _LOCAL),
    Family("gemma4", "S1g", "E1a", "Gemma4ForCausalLM", dict(enable_moe_block=True, global_head_dim=8, **_LOCAL)),
    Family("glm4_moe", "G1", "E1", "Glm4MoeForCausalLM"),
    Family("glm4_moe_lite", "G1", "E1", "Glm4MoeLiteForCausalLM"),
    Family(
        "glm4v_moe", "G1", "E1", "Glm4vMoeTextModel",
        dict(
            rope_parameters=dict(
                rope_type="default", rope_theta=1e4, partial_rotary_factor=1.0, mrope_section=[1, 1, 2]
            ),
        ),
    ),
    Family("glm5_next", "G1", "E1c", "Glm5NextTextModel", dict(qk_rope_head_dim=0, index_kpool=4, **_SPARSE_ATTENTION)),
    Family("glm_moe_dsa", "G1", "E1", "GlmMoeDsaForCausalLM"),
    Family("gpt_oss", "T1b", "E6", "GptOssForCausalLM", _LOCAL),
    Family("granitemoe", "T1", "E1", "GraniteMoeForCausalLM"),
    Family("granitemoe_swa", "T1", "E1", "GraniteMoeSWAForCausalLM", _LOCAL),
    Family("granitemoehybrid", "T1", "E1", "GraniteMoeHybridForCausalLM", _LINEAR),
    Family("granitemoeshared", "T1", "E1", "GraniteMoeSharedForCausalLM"),
    Family("hunyuan_v1_moe", "S1", "E1", "HunYuanMoEV1ForCausalLM"),
    Family("hy_v3", "G0", "E1", "HYV3ForCausalLM"),
    Family("hy_v4", "G1", "E1c", "HYV4ForCausalLM"),
    Family(
        "inkling", "GJ", "E1", "InklingForCausalLM",
        dict(n_shared_experts=2, logits_mup_width_multiplier=1.0, layer_types=["hybrid_sliding", "hybrid"]),
        experts_class="InklingExperts",
    ),
    Family(
        "inkling2", "Q1", "E1s", "Inkling2ForCausalLM",
        dict(mlp_gate_softcap=1.0, mlp_up_softcap=2.0, layer_types=["hybrid_sliding", "hybrid"]),
    ),
    Family(
        "jamba", "S1", "E1", "JambaForCausalLM",
        dict(
            expert_layer_period=1, expert_layer_offset=0, attn_layer_period=2, attn_layer_offset=1,
            use_mamba_kernels=False,
        ),
    ),
    Family(
        "jetmoe", "T1", "E5", "JetMoeForCausalLM", dict(kv_channels=8), experts_class="JetMoeMoE", settable=False,
        why="its MoA, projections routed per token around attention, is left alone: neither half is a MoE",
    ),
    Family("kimi_linear", "G1", "E1", "KimiLinearForCausalLM", _LINEAR),
    Family("kolibri1", "G0", "E1", "Kolibri1ForCausalLM", _LOCAL),
    Family("laguna", "G0", "E1", "LagunaForCausalLM"),
    Family(
        "lfm2_moe", "G0", "E1", "Lfm2MoeForCausalLM", dict(num_dense_layers=0, layer_types=["conv", "full_attention"])
    ),
    Family("llama4", "L4", "E9", "Llama4ForCausalLM", settable=False),
    Family(
        "longcat_flash", "S3z", "E8", "LongcatFlashForCausalLM",
        dict(num_layers=2, ffn_hidden_size=40, expert_ffn_hidden_size=24, zero_expert_num=4, routed_scaling_factor=2.0),
        settable=False, status="route_b", why="a Python loop over experts; experts past the last one are the identity",
    ),
    Family("mellum", "S1", "E1", "MellumForCausalLM"),
    Family("mimo_v2_flash", "G1", "E1", "MiMoV2FlashForCausalLM"),
    Family("minimax", "S1", "E1", "MiniMaxForCausalLM", _LINEAR),
    Family("minimax_m2", "G0", "E1", "MiniMaxM2ForCausalLM"),
    Family("minimax_m3_vl", "G0", "E6", "MiniMaxM3VLForCausalLM", dict(rotary_dim=4, dense_intermediate_size=40)),
    Family("mistral4", "S2", "E1", "Mistral4ForCausalLM", _GROUPS),
    Family("mistral_large4", "S2", "E1", "MistralLarge4TextModel", _GROUPS),
    Family("mixtral", "S1", "E1", "MixtralForCausalLM"),
    Family("muse_spark", "G0", "E1n", "MuseSparkTextModel", dict(moe_hidden_size=16, output_multiplier=1.0, **_LOCAL)),
    Family(
        "nemotron_h", "G1", "E2", "NemotronHForCausalLM",
        dict(
            layers_block_type=["linear_attention", "moe", "full_attention", "moe"],
            moe_latent_size=16, moe_shared_expert_intermediate_size=40,
            mamba_num_heads=8, mamba_head_dim=8, ssm_state_size=8, n_groups=2, chunk_size=8, use_mamba_kernels=False,
        ),
    ),
    Family(
        "nllb_moe", "SC2", "E4", "NllbMoeEncoder",
        dict(d_model=32, encoder_layers=2, encoder_ffn_dim=24, encoder_attention_heads=4, encoder_sparse_step=1),
        settable=False, status="left_alone",
        why="a 0/1 mask goes through one_hot: only experts 0 and 1 ever run, whatever the router chose",
    ),
    Family("olmoe", "S1", "E1", "OlmoeForCausalLM"),
    Family(
        "openai_privacy_filter", "T1b", "E6", "OpenAIPrivacyFilterForTokenClassification",
        default_waits=True, why="its own default is the eager loop over experts, computed in float32",
    ),
    Family("phimoe", "SM", "E1", "PhimoeForCausalLM"),
    Family("qwen2_moe", "S1", "E1", "Qwen2MoeForCausalLM"),
    Family("qwen3_5_moe", "S1", "E1", "Qwen3_5MoeForCausalLM", _LINEAR),
    Family("qwen3_moe", "S1", "E1", "Qwen3MoeForCausalLM", dict(norm_topk_prob=True)),
    Family("qwen3_next", "S1", "E1", "Qwen3NextForCausalLM", _LINEAR),
    Family("qwen3_omni_moe", "S1", "E1", "Qwen3OmniMoeThinkerTextModel"),
    Family(
        "qwen3_omni_moe_talker", "S1", "E1", "Qwen3OmniMoeTalkerModel", dict(shared_expert_intermediate_size=40),
        folder="qwen3_omni_moe", inputs="embeddings",
    ),
    Family("qwen3_vl_moe", "S1", "E1", "Qwen3VLMoeTextModel"),
    # its indexed attention loops over queries in Python, which no graph can hold: linear attention only
    Family("qwen4_exp", "S1", "E1", "Qwen4ExpForCausalLM", dict(hc_lowrank=8, layer_types=["linear_attention"] * 2)),
    Family("solar_open", "G1", "E1", "SolarOpenForCausalLM"),
    Family(
        "step3p7", "G0", "E1c", "Step3p7TextModel",
        dict(share_expert_dim=40, num_sliding_attention_heads=4, query_pre_attn_scalar=8, swiglu_limits=[0.5, 0.0]),
        settable=False, status="route_b", why="a Python loop over experts",
    ),
    Family(
        "switch_transformers", "SC1", "E4", "SwitchTransformersEncoderModel",
        dict(
            d_model=32, d_kv=8, d_ff=24, num_heads=4, num_layers=2, num_decoder_layers=2, num_sparse_encoder_layers=2,
            expert_capacity=2,
        ),
        settable=False, status="route_b",
        why="a Python loop over experts; tokens past an expert's capacity are dropped",
    ),
    Family("unlimited_ocr", "S2", "E1", "UnlimitedOcrTextModel"),
    Family(
        "vitpose_backbone", "NONE", "E10", "VitPoseBackbone",
        dict(image_size=[16, 16], patch_size=[8, 8], num_experts=4, part_features=8, mlp_ratio=2),
        inputs="images", experts_class="VitPoseNaiveMoe",
        settable=False, status="left_alone", why="no router: the data set of an image names its expert",
    ),
    Family("zaya", "S3n", "E1", "ZayaForCausalLM", dict(num_experts_per_tok=1, router_hidden_size=16)),
)  # fmt: skip

FAMILIES: dict[str, Family] = {family.name: family for family in _ENTRIES}
