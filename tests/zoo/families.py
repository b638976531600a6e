"""The zoo's catalogue: one entry per mixture-of-experts family of transformers, 75 in all.

Enters: nothing. Leaves: FAMILIES, name -> Family. Holds: names, router and experts classes are those of the table in HF-MOE.md; `config` is what
distinguishes the family's tiny configuration from COMMON (build.py), and `blocks` is the exact number of MoE blocks its tiny forward executes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Status = Literal["fuse", "route_b", "left_alone"]


@dataclass(frozen=True, slots=True)
class Family:
    """One row of HF-MOE.md, with what a tiny model of it needs.

    model: the model class (the smallest one that holds the MoE). module: its folder in transformers.models (the name by default).
    moe_layers: MoE blocks one forward executes. experts_module: suffix of the class name of a block's experts.
    config: overrides of build.COMMON. why: the reason for a status other than "fuse".
    default_waits: the family's own default implementation may wait for Route B although its settable ones must be fused.
    """

    name: str
    router: str
    experts: str
    model: str
    moe_layers: int = 2
    module: str = ""
    settable: bool = True
    status: Status = "fuse"
    why: str = ""
    default_waits: bool = False
    experts_module: str = "Experts"
    inputs: Literal["tokens", "patches", "image", "embeds"] = "tokens"
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def implementations(self) -> tuple[str | None, ...]:
        """What `build` accepts: the model's own default (None), then the settable ones."""
        return (None, "eager", "batched_mm", "grouped_mm") if self.settable else (None,)


def _family(name: str, router: str, experts: str, model: str, *, config: Mapping[str, Any] | None = None, **facts: Any) -> Family:
    return Family(name, router, experts, model, **{"module": name, "config": config or {}, **facts})


_ENTRIES = (
    _family("afmoe", "G0", "E1", "AfmoeForCausalLM", config=dict(num_dense_layers=0, layer_types=["sliding_attention", "full_attention"])),
    _family("aria", "T1", "E1t", "AriaTextForCausalLM", config=dict(intermediate_size=24)),
    _family("axk1", "G1", "E1", "AXK1ForCausalLM"),
    _family("axk2", "G1", "E1", "AXK2ForCausalLM"),
    _family("bailing_hybrid", "G1", "E1", "BailingHybridForCausalLM", config=dict(layer_types=["linear_attention", "full_attention"])),
    _family("beam", "G1", "E1f", "BeamForCausalLM", config=dict(layer_types=["sliding_attention", "full_attention"])),
    _family("cohere2_moe", "T1", "E1", "Cohere2MoeForCausalLM", config=dict(intermediate_size=24, num_shared_experts=1)),
    _family("dbrx", "S1p", "E3", "DbrxForCausalLM", settable=False, status="route_b", config=dict(n_layers=2, n_heads=4, d_model=32, max_seq_len=128, attn_config=dict(kv_n_heads=2), ffn_config=dict(hidden_size=32, ffn_hidden_size=24, moe_num_experts=8, moe_top_k=2))),
    _family("deepseek_ocr2", "S2", "E1", "DeepseekOcr2TextModel"),
    _family("deepseek_v2", "S2", "E1", "DeepseekV2ForCausalLM", config=dict(topk_method="group_limited_greedy")),
    _family("deepseek_v3", "G1", "E1", "DeepseekV3ForCausalLM"),
    _family("deepseek_v32", "G1", "E1", "DeepseekV32ForCausalLM"),
    _family("deepseek_v4", "Q1", "E1c", "DeepseekV4ForCausalLM", config=dict(mlp_layer_types=["hash_moe", "moe"], layer_types=["heavily_compressed_attention", "compressed_sparse_attention"], compress_rates=dict(compressed_sparse_attention=4, heavily_compressed_attention=8), num_key_value_heads=1)),
    _family("diffusion_gemma", "S1g", "E1a", "DiffusionGemmaEncoderTextModel", config=dict(layer_types=["sliding_attention", "full_attention"])),
    _family("doge", "PK", "E7", "DogeForCausalLM", settable=False, status="left_alone", why="x", experts_module="CDMoE", config=dict(is_moe=True, num_experts=16)),
    _family("dots1", "G1", "E1", "Dots1ForCausalLM"),
    _family("dots3_note", "G1", "E1", "Dots3NoteForCausalLM"),
    _family("dots3_note_vision", "G0", "E1", "Dots3NoteVisionModel", module="dots3_note", inputs="patches"),
    _family("ernie4_5_moe", "S3", "E1", "Ernie4_5_MoeForCausalLM", config=dict(moe_layer_start_index=0, moe_layer_end_index=1)),
    _family("ernie4_5_vl_moe", "S3", "E1", "Ernie4_5_VLMoeTextModel", config=dict(moe_intermediate_size=[24, 16])),
    _family("exaone_moe", "G1", "E1", "ExaoneMoeForCausalLM"),
    _family("flex_olmo", "S1", "E1", "FlexOlmoForCausalLM", config=dict(intermediate_size=24)),
    _family("flint", "G0", "E1", "FlintForCausalLM"),
    _family("gemma4", "S1g", "E1a", "Gemma4ForCausalLM", config=dict(enable_moe_block=True, layer_types=["sliding_attention", "full_attention"])),
    _family("glm4_moe", "G1", "E1", "Glm4MoeForCausalLM"),
    _family("glm4_moe_lite", "G1", "E1", "Glm4MoeLiteForCausalLM"),
    _family("glm4v_moe", "G1", "E1", "Glm4vMoeTextModel"),
    _family("glm5_next", "G1", "E1c", "Glm5NextTextModel", config=dict(layer_types=["linear_attention", "indexed_attention"])),
    _family("glm_moe_dsa", "G1", "E1", "GlmMoeDsaForCausalLM"),
    _family("gpt_oss", "T1b", "E6", "GptOssForCausalLM", config=dict(intermediate_size=24)),
    _family("granitemoe", "T1", "E1", "GraniteMoeForCausalLM", config=dict(intermediate_size=24)),
    _family("granitemoe_swa", "T1", "E1", "GraniteMoeSWAForCausalLM", config=dict(intermediate_size=24)),
    _family("granitemoehybrid", "T1", "E1", "GraniteMoeHybridForCausalLM", config=dict(intermediate_size=24)),
    _family("granitemoeshared", "T1", "E1", "GraniteMoeSharedForCausalLM", config=dict(intermediate_size=24)),
    _family("hunyuan_v1_moe", "S1", "E1", "HunYuanMoEV1ForCausalLM", config=dict(intermediate_size=24)),
    _family("hy_v3", "G0", "E1", "HYV3ForCausalLM"),
    _family("hy_v4", "G1", "E1c", "HYV4ForCausalLM"),
    _family("inkling", "GJ", "E1", "InklingForCausalLM"),
    _family("inkling2", "Q1", "E1s", "Inkling2ForCausalLM"),
    _family("jamba", "S1", "E1", "JambaForCausalLM", config=dict(intermediate_size=24)),
    _family("jetmoe", "T1", "E5", "JetMoeForCausalLM", settable=False, experts_module="JetMoeMoE", config=dict(intermediate_size=24)),
    _family("kimi_linear", "G1", "E1", "KimiLinearForCausalLM", config=dict(layer_types=["linear_attention", "full_attention"])),
    _family("kolibri1", "G0", "E1", "Kolibri1ForCausalLM"),
    _family("laguna", "G0", "E1", "LagunaForCausalLM"),
    _family("lfm2_moe", "G0", "E1", "Lfm2MoeForCausalLM", config=dict(num_dense_layers=0, layer_types=["conv", "full_attention"])),
    _family("llama4", "L4", "E9", "Llama4ForCausalLM", settable=False, config=dict(intermediate_size=24)),
    _family("longcat_flash", "S3z", "E8", "LongcatFlashForCausalLM", settable=False, status="route_b"),
    _family("mellum", "S1", "E1", "MellumForCausalLM"),
    _family("mimo_v2_flash", "G1", "E1", "MiMoV2FlashForCausalLM"),
    _family("minimax", "S1", "E1", "MiniMaxForCausalLM", config=dict(intermediate_size=24)),
    _family("minimax_m2", "G0", "E1", "MiniMaxM2ForCausalLM", config=dict(intermediate_size=24)),
    _family("minimax_m3_vl", "G0", "E6", "MiniMaxM3VLForCausalLM", config=dict(intermediate_size=24)),
    _family("mistral4", "S2", "E1", "Mistral4ForCausalLM"),
    _family("mistral_large4", "S2", "E1", "MistralLarge4TextModel"),
    _family("mixtral", "S1", "E1", "MixtralForCausalLM", config=dict(intermediate_size=24)),
    _family("muse_spark", "G0", "E1n", "MuseSparkTextModel"),
    _family("nemotron_h", "G1", "E2", "NemotronHForCausalLM"),
    _family("nllb_moe", "SC2", "E4", "NllbMoeEncoder", settable=False, status="left_alone", why="x"),
    _family("olmoe", "S1", "E1", "OlmoeForCausalLM", config=dict(intermediate_size=24)),
    _family("openai_privacy_filter", "T1b", "E6", "OpenAIPrivacyFilterForTokenClassification", default_waits=True, config=dict(intermediate_size=24)),
    _family("phimoe", "SM", "E1", "PhimoeForCausalLM", config=dict(intermediate_size=24)),
    _family("qwen2_moe", "S1", "E1", "Qwen2MoeForCausalLM"),
    _family("qwen3_5_moe", "S1", "E1", "Qwen3_5MoeForCausalLM", config=dict(layer_types=["linear_attention", "full_attention"])),
    _family("qwen3_moe", "S1", "E1", "Qwen3MoeForCausalLM"),
    _family("qwen3_next", "S1", "E1", "Qwen3NextForCausalLM", config=dict(layer_types=["linear_attention", "full_attention"])),
    _family("qwen3_omni_moe", "S1", "E1", "Qwen3OmniMoeThinkerTextModel"),
    _family("qwen3_omni_moe_talker", "S1", "E1", "Qwen3OmniMoeTalkerModel", module="qwen3_omni_moe"),
    _family("qwen3_vl_moe", "S1", "E1", "Qwen3VLMoeTextModel"),
    _family("qwen4_exp", "S1", "E1", "Qwen4ExpForCausalLM", config=dict(layer_types=["linear_attention", "indexed_attention"])),
    _family("solar_open", "G1", "E1", "SolarOpenForCausalLM"),
    _family("step3p7", "G0", "E1c", "Step3p7TextModel", settable=False, status="route_b"),
    _family("switch_transformers", "SC1", "E4", "SwitchTransformersEncoderModel", settable=False, status="route_b"),
    _family("unlimited_ocr", "S2", "E1", "UnlimitedOcrTextModel"),
    _family("vitpose_backbone", "NONE", "E10", "VitPoseBackbone", settable=False, status="left_alone", why="x", experts_module="MoeMLP", inputs="image"),
    _family("zaya", "S3n", "E1", "ZayaForCausalLM", config=dict(num_experts_per_tok=1)),
)

FAMILIES: dict[str, Family] = {family.name: family for family in _ENTRIES}
