"""Builds the zoo's tiny models: a family's name and an implementation enter, a Sample (model, inputs, what to compare) leaves.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .families import FAMILIES, Family

COMMON: dict[str, Any] = dict(
    vocab_size=96,
    vocab_size_per_layer_input=96,
    unpadded_vocab_size=96,
    max_position_embeddings=128,
    model_max_length=128,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    # the residual stream and its depth
    hidden_size=32,
    num_hidden_layers=2,
    hidden_size_per_layer_input=8,
    mlp_layer_types=["sparse", "sparse"],
    mlp_only_layers=[],
    first_k_dense_replace=0,
    # attention, plain and latent
    num_attention_heads=4,
    num_key_value_heads=2,
    swa_num_attention_heads=4,
    swa_num_key_value_heads=2,
    head_dim=8,
    swa_head_dim=8,
    global_head_dim=8,
    num_global_key_value_heads=2,
    kv_lora_rank=16,
    q_lora_rank=16,
    o_lora_rank=16,
    o_groups=2,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
    sliding_window=8,
    index_topk=64,
    index_head_dim=16,
    index_n_heads=2,
    # linear attention and state space mixers
    linear_head_dim=8,
    linear_num_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    mamba_n_heads=8,
    mamba_d_head=8,
    mamba_d_state=8,
    mamba_chunk_size=8,
    # dense, shared and routed feed-forward
    intermediate_size=40,
    shared_intermediate_size=40,
    shared_expert_intermediate_size=40,
    moe_intermediate_size=24,
    num_experts=8,
    num_local_experts=8,
    n_routed_experts=8,
    moe_num_experts=8,
    num_experts_per_tok=2,
    num_experts_per_token=2,
    top_k_experts=2,
    moe_topk=2,
    moe_k=2,
    num_shared_experts=1,
    n_shared_experts=1,
    moe_num_shared_experts=1,
    n_group=4,
    num_expert_group=4,
    topk_group=2,
)


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    family: Family
    implementation: str | None
    model: nn.Module
    inputs: dict[str, Any]

    def inputs_of(self, batch: int, length: int, seed: int) -> dict[str, Any]:
        return _INPUTS[self.family.inputs](self, batch, length, torch.Generator().manual_seed(seed))

    def output(self, out: Any) -> tuple[Tensor, ...]:
        for name in ("logits", "last_hidden_state", "feature_maps"):
            value = getattr(out, name, None)
            if value is not None:
                return (value,) if isinstance(value, Tensor) else tuple(value)
        raise TypeError(f"{self.family.name}: nothing to compare in {type(out).__name__}")


def _tokens(sample: Sample, batch: int, length: int, generator: torch.Generator) -> dict[str, Any]:
    ids = torch.randint(3, 96, (batch, length), generator=generator)
    return {"input_ids": ids, "use_cache": False}


_INPUTS = {"tokens": _tokens}


def build(name, implementation=None, dtype=torch.float32, seed=0):
    family = FAMILIES[name]
    module = importlib.import_module(f"transformers.models.{family.module}.modeling_{family.module}")
    model_class = getattr(module, family.model)
    config_class = model_class.config_class
    known = {f.name for f in dataclasses.fields(config_class)}
    config = config_class(**{k: v for k, v in COMMON.items() if k in known} | dict(family.config))
    if implementation is not None:
        config._experts_implementation = implementation
    torch.manual_seed(seed)
    model = model_class(config).eval()
    _randomise(model, torch.Generator().manual_seed(seed))
    model = model.to(dtype)
    sample = Sample(family, implementation, model, {})
    return dataclasses.replace(sample, inputs=sample.inputs_of(2, 11, seed))


@torch.no_grad()
def _randomise(model, generator):
    pers = set(model.state_dict(keep_vars=True))
    for name, t in [*model.named_parameters(), *((n, b) for n, b in model.named_buffers() if n in pers)]:
        if not t.is_floating_point():
            continue
        noise = torch.randn(t.shape, generator=generator)
        if t.ndim >= 2:
            if "embed" in name: t.copy_(noise)
            else: t.copy_(noise * t[0].numel()**-.5 if t.ndim!=3 else noise * t.shape[-1]**-.5)
        elif (t == 1).all(): t.copy_(1 + 0.1*noise)
        elif (t == 0).all(): t.copy_(0.1*noise)
        else: print("   odd", name, tuple(t.shape), t.flatten()[:3].tolist())
